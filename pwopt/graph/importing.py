"""Builds the graph that passes edit from the messages of a model.

onnx-graphsurgeon imports the bodies of control flow, tensors in attributes and functions. All other nodes are built
here, because its importer takes most of the time of reading a large model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from pwopt.graph.ir import Graph, Node, Tensor, Variable, adopt, find_bodies

#: How the value of an attribute is read, by its type. onnx-graphsurgeon leaves out attributes of other types.
_READERS: dict[int, Callable[[AttributeProto], Any]] = {
    AttributeProto.FLOAT: lambda a: a.f,
    AttributeProto.INT: lambda a: a.i,
    AttributeProto.STRING: lambda a: a.s.decode(),
    AttributeProto.TENSOR: lambda a: OnnxImporter.import_tensor(a.t),
    AttributeProto.FLOATS: lambda a: list(a.floats),
    AttributeProto.INTS: lambda a: list(a.ints),
    AttributeProto.STRINGS: lambda a: [s.decode() for s in a.strings],
}


def import_graph(proto: onnx.ModelProto, constants: Collection[str]) -> Graph:
    """Build the graph of a model, without values, types or shapes.

    Parameters
    ----------
    proto : onnx.ModelProto
    constants : collection of str
        The names of initializers that are not inputs of the graph although the model may list them as such.
    """
    shell = onnx.ModelProto(ir_version=proto.ir_version)
    shell.opset_import.extend(proto.opset_import)
    shell.functions.extend(proto.functions)
    shell.graph.name = proto.graph.name
    shell.graph.input.extend(v for v in proto.graph.input if v.name not in constants)
    shell.graph.output.extend(proto.graph.output)
    graph: Graph = gs.import_onnx(shell)
    tensors: dict[str, Tensor] = {t.name: t for t in (*graph.inputs, *graph.outputs)}
    graph.nodes[:] = [_import_node(message, tensors, graph) for message in proto.graph.node]
    if find_bodies(graph.nodes):
        graph._merge_subgraph_functions()
    return adopt(graph)


def _import_node(message: onnx.NodeProto, tensors: dict[str, Tensor], graph: Graph) -> Node:
    """Build a node; `tensors` gains those that it is the first to mention."""
    attributes = [a for a in message.attribute if a.type != a.STRING or _is_text(a.s)]  # the message keeps the others
    if any(a.type == a.GRAPH or a.ref_attr_name for a in attributes):
        kept = onnx.NodeProto()
        kept.CopyFrom(message)
        del kept.attribute[:]
        kept.attribute.extend(attributes)
        found: Node = OnnxImporter.import_node(kept, {}, tensors, graph.opset, graph.import_domains)
        return found

    def find(name: str) -> Tensor:
        return tensors.get(name) or (tensors.setdefault(name, Variable(name)) if name else Variable.empty())

    attrs = {a.name: _READERS[a.type](a) for a in attributes if a.type in _READERS}
    inputs, outputs = [find(name) for name in message.input], [find(name) for name in message.output]
    domain = message.domain if message.HasField("domain") else None
    return Node(message.op_type, message.name, attrs, inputs, outputs, domain)


def _is_text(value: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return value.decode() is not None
    return False
