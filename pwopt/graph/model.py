"""Converts between an ONNX file and a graph without losing anything.

Passes edit a graph of onnx-graphsurgeon. It is written back into the messages of the original file: every node,
initializer and field that no pass changed is copied verbatim. So metadata, documentation, denotations, annotations,
functions, sparse initializers and foreign attributes survive by construction. Weights stay in their files until a pass
reads them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from pwopt.algebra import Values
from pwopt.errors import ModelError
from pwopt.graph.functions import drop_unused_opsets
from pwopt.graph.ir import Constant, Graph, LazyValues, Node, Tensor, as_message
from pwopt.graph.provenance import find_origins, write_documentation
from pwopt.graph.shapes import OVERRIDABLE_SINCE_IR, read_dims
from pwopt.graph.storage import copy_fields, find_locations, resolve_link

#: The kinds of numpy types whose elements a file stores as numpy does.
PLAIN = "fiu"


class StoredValues(LazyValues):
    """The values of an initializer, read from its message or its file at each call of `load`."""

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        self.tensor, self.folder = tensor, folder
        self.shape = tuple(tensor.dims)
        try:
            self.dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except KeyError:
            raise ModelError(f"initializer {tensor.name!r} has no valid type; export the model again") from None
        elements = math.prod(self.shape)
        inside = tensor.data_location != TensorProto.EXTERNAL
        if min(self.shape, default=0) < 0 or (
            inside and elements > 8 * tensor.ByteSize()
        ):  # no type has less than a bit
            raise ModelError(f"initializer {tensor.name!r} does not hold what its shape says; export the model again")
        self.nbytes = elements * self.dtype.itemsize

    def load(self) -> Values:
        tensor = self.tensor
        try:
            inside = tensor.data_location != TensorProto.EXTERNAL and tensor.HasField("raw_data")
            if inside and self.dtype.kind in PLAIN and sys.byteorder == "little":
                return np.array(np.frombuffer(tensor.raw_data, self.dtype).reshape(self.shape))
            return np.array(numpy_helper.to_array(*resolve_link(tensor, self.folder)))
        except (ValueError, TypeError, OSError, onnx.checker.ValidationError) as error:
            raise ModelError(f"initializer {self.tensor.name!r} cannot be read: {error}") from error


@dataclass(eq=False)
class Model:
    """A model being optimised.

    Attributes
    ----------
    graph : Graph
        What passes edit. Tensors carry inferred shapes and types. Initializers that callers may
        override are graph inputs here, not constants.
    proto : onnx.ModelProto
        The model as read; external data is not loaded into it.
    folder : Path or None
        Where its external data lies.
    """

    graph: Graph
    proto: onnx.ModelProto
    folder: Path | None = None
    _nodes: dict[Node, tuple[onnx.NodeProto, dict[str, Any]]] = field(default_factory=dict, repr=False)
    _constants: dict[str, tuple[Constant, TensorProto]] = field(default_factory=dict, repr=False)

    @property
    def opset(self) -> int:
        return int(self.graph.opset)

    @property
    def layout(self) -> dict[str, str]:
        """Tensor → the external file that holds it."""
        return find_locations(self.proto)

    def names(self) -> set[str]:
        """Names that new tensors must not take, even if the graph does not contain them."""
        return {t.name for t in self.proto.graph.initializer} | {
            s.values.name for s in self.proto.graph.sparse_initializer
        }

    def to_proto(self) -> onnx.ModelProto:
        """The graph as a model, with the original messages of everything that did not change."""
        if self.is_unchanged():
            return self.proto
        model = onnx.ModelProto()
        copy_fields(self.proto, model, skip={"graph"})
        old, new = self.proto.graph, model.graph
        copy_fields(old, new, skip={"node", "initializer", "input", "value_info", "quantization_annotation"})
        new.node.extend(self._node_protos())

        constants = self._constant_tensors()
        made = {name for node in new.node for name in node.output}
        fixed = {t.name for t in old.initializer if t.name not in self._constants}
        annotations = [q for q in old.quantization_annotation if q.tensor_name in made | fixed | constants.keys()]
        parameters = {entry.value for q in annotations for entry in q.quant_parameter_tensor_names}
        written = set()
        for tensor in old.initializer:
            if tensor.name not in self._constants:  # overridable, or read by nobody from the start
                new.initializer.append(tensor)
            elif tensor.name in constants:
                new.initializer.append(self._constant_proto(constants[tensor.name]))
            elif tensor.name in parameters:  # nothing else reads it any more
                new.initializer.append(tensor)
            else:
                continue
            written.add(tensor.name)
        added = [c for name, c in constants.items() if name not in written]
        new.initializer.extend(self._constant_proto(c) for c in added)
        written.update(c.name for c in added)

        listed_initializers = {t.name for t in old.initializer}
        dims = {t.name: tuple(t.dims) for t in new.initializer}
        stale = {n for n, size in dims.items() if n in self._constants and size != tuple(self._constants[n][1].dims)}
        stale |= {n for n in dims if n not in self._constants}  # a Constant node's, until it became an initializer
        for value in old.input:
            if value.name not in listed_initializers or value.name in written:
                new.input.append(value)
                if value.name in stale:
                    declare(new.input[-1], dims[value.name])
        if self.proto.ir_version < OVERRIDABLE_SINCE_IR:  # there, every initializer is listed as an input
            new.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
                for t in new.initializer[len(new.initializer) - len(added) :]
            )
        declared = self._find_declared()
        new.value_info.extend(v for v in old.value_info if v.name in (made | written) - stale - declared.keys())
        new.value_info.extend(declared.values())
        new.quantization_annotation.extend(annotations)
        drop_unused_opsets(model)
        return model

    def copy(self) -> Model:
        """Copy the model. Nodes and tensors are new; weights, bodies and messages are shared."""
        graph, twins = self.graph, dict[Tensor, Tensor]()

        def twin(tensor: Tensor) -> Tensor:
            found = twins.get(tensor)
            if found is None:
                found = tensor.copy()
                if tensor.name:
                    twins[tensor] = found
            return found

        nodes, messages = [], dict(self._nodes)
        for node in graph.nodes:
            attrs = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
            inputs, outputs = [twin(t) for t in node.inputs], [twin(t) for t in node.outputs]
            made = Node(node.op, node.name, attrs, inputs, outputs, node.domain)
            if node.replaced:
                made.replaced = node.replaced
            if node in messages:
                messages[made] = messages[node]
            nodes.append(made)
        ends = ([twin(t) for t in graph.inputs], [twin(t) for t in graph.outputs])
        copied = Graph(
            [], *ends, graph.name, graph.doc_string, graph.opset, graph.import_domains, functions=graph.functions,
            ir_version=graph.ir_version,
        )  # fmt: skip
        copied.nodes = nodes  # afterwards, because onnx-graphsurgeon would look for bodies in each of them
        copied.trained, copied.annotated = graph.trained, graph.annotated
        constants = {name: (_same_or(twins, c), tensor) for name, (c, tensor) in self._constants.items()}
        return Model(copied, self.proto, self.folder, messages, constants)

    def become(self, other: Model) -> None:
        """Take over the content of another model in the same folder."""
        self.graph, self.proto, self._nodes, self._constants = other.graph, other.proto, other._nodes, other._constants

    def is_unchanged(self) -> bool:
        """Whether the graph is exactly that of the file."""
        if len(self.graph.nodes) != len(self.proto.graph.node):
            return False
        pairs = zip(self.graph.nodes, self.proto.graph.node, strict=True)
        same = all(_same_edges(node, proto) and self._original(node) is proto for node, proto in pairs)
        held = all(
            name in self._constants and self._constants[name][0] is c and isinstance(c.stored, StoredValues)
            for name, c in self._constant_tensors().items()
        )
        return same and held and not self._find_declared()

    def _find_declared(self) -> dict[str, onnx.ValueInfoProto]:
        """What passes declared: the shapes of tensors that differ from those in the file."""
        before = read_declared(self.proto)
        tensors = {t.name: t for node in self.graph.nodes for t in node.outputs if t.declared is not None}
        return {
            name: onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(t.dtype), t.declared)
            for name, t in tensors.items()
            if before.get(name) != t.declared
        }

    def _original(self, node: Node) -> onnx.NodeProto | None:
        """The original message of a node, if its operator and attributes did not change."""
        found = self._nodes.get(node)
        if found is None:
            return None
        proto, attrs = found
        same = (node.op, node.name, node.domain or "") == (proto.op_type, proto.name, proto.domain)
        return proto if same and snapshot(node.attrs) == attrs else None

    def _node_protos(self) -> Iterator[onnx.NodeProto]:
        for node in self.graph.nodes:
            proto = self._original(node)
            if proto is None:
                proto = as_message(node)
                write_documentation(proto, self.message(node), list(find_origins(node, self.message)))
            elif not _same_edges(node, proto) or node.replaced:
                original, proto = proto, onnx.NodeProto()
                proto.CopyFrom(original)
                proto.input[:] = [t.name for t in node.inputs]
                proto.output[:] = [t.name for t in node.outputs]
                write_documentation(proto, original, list(find_origins(node, self.message)))
            yield proto

    def message(self, node: Node) -> onnx.NodeProto | None:
        """The original message of a node, even if the node changed."""
        found = self._nodes.get(node)
        return None if found is None else found[0]

    def _constant_tensors(self) -> dict[str, Constant]:
        """The constants in use, by name: those that a node reads or a body captures, and graph outputs."""
        captured = find_captured_names(self.proto.graph.node)
        used = {t.name: t for node in self.graph.nodes for t in node.inputs if isinstance(t, Constant)} | {
            t.name: t for t in self.graph.outputs if isinstance(t, Constant)
        }
        for name, (constant, _) in self._constants.items():
            if name in captured:
                used.setdefault(name, constant)
        return used

    def _constant_proto(self, constant: Constant) -> TensorProto:
        held, proto = self._constants.get(constant.name, (None, TensorProto()))
        if held is constant:
            if isinstance(constant.stored, StoredValues):
                return proto
            if np.array_equal(StoredValues(proto, self.folder).load(), constant.values):
                return proto
        return numpy_helper.from_array(np.asarray(constant.values), constant.name)


def read_declared(proto: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """The shapes in `value_info` that are declared completely."""
    shapes = {v.name: read_dims(v.type) for v in proto.graph.value_info}
    return {
        name: tuple(d for d in shape if d is not None)
        for name, shape in shapes.items()
        if shape is not None and None not in shape
    }


def _same_or(twins: Mapping[Tensor, Tensor], constant: Constant) -> Constant:
    """The copy of a constant, or the constant itself if the graph does not contain it."""
    found = twins.get(constant)
    return found if isinstance(found, Constant) else constant


def _same_edges(node: Node, proto: onnx.NodeProto) -> bool:
    return [t.name for t in node.inputs] == list(proto.input) and [t.name for t in node.outputs] == list(proto.output)


def snapshot(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: tuple(v) if isinstance(v, list) else v if isinstance(v, (int, float, str, bytes)) else id(v)
        for k, v in attrs.items()
    }


def find_captured_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Find the names that bodies of If, Loop and Scan use at any depth. Outer tensors of these names must stay."""
    names: set[str] = set()
    pending = [(node, False) for node in nodes]
    while pending:
        node, inside = pending.pop()
        if inside:
            names.update(node.input)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                names.update(output.name for output in body.output)
                pending.extend((inner, True) for inner in body.node)
    return names


def declare(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    declared = value.type.tensor_type.shape
    if len(declared.dim) != len(shape):
        del declared.dim[:]
        for _ in shape:
            declared.dim.add()
    for dim, size in zip(declared.dim, shape, strict=True):
        dim.dim_value = size
