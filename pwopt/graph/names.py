"""Names for nodes that have none."""

from __future__ import annotations

import itertools
from collections import Counter

import onnx

from pwopt.graph.functions import nodes_within


def name_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node without a name one: its operator and its first output.

    Names are unique in the whole model, including bodies and functions, because onnxruntime requires unique names in
    each graph. Existing names stay.

    Parameters
    ----------
    proto : onnx.ModelProto

    Returns
    -------
    onnx.ModelProto
        The same object if every node has a name already.
    """
    if all(node.name for node in _nodes(proto)):
        return proto
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    taken, counts = {node.name for node in _nodes(model)}, Counter[str]()
    for node in _nodes(model):
        if node.name:
            continue
        base = "_".join(filter(None, (node.op_type, next(filter(None, node.output), ""))))
        node.name = base
        while node.name in taken:
            counts[base] += 1
            node.name = f"{base}_{counts[base]}"
        taken.add(node.name)
    return model


def _nodes(model: onnx.ModelProto) -> itertools.chain[onnx.NodeProto]:
    return itertools.chain(nodes_within(model.graph.node), *(nodes_within(f.node) for f in model.functions))
