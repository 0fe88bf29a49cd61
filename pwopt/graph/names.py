"""Names for nodes that have none."""

from __future__ import annotations

import itertools
from collections import Counter

import onnx

from pwopt.graph.functions import nodes_within


def name_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name for every node: those without get their operator's and their first result's.

    Names are unique in the whole model, bodies and functions included, as onnxruntime asks for in each graph; those
    that are there stay.

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
