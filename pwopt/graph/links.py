"""graphsurgeon's own links between nodes and tensors, written once instead of kept up with every edit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs


def relink(graph: gs.Graph, nodes: Sequence[gs.Node], tensors: Iterable[gs.Tensor], known: Collection[int]) -> None:
    """Let a graph have these nodes, and its tensors the readers and producers that follow.

    Parameters
    ----------
    graph : gs.Graph
    nodes : sequence of gs.Node
    tensors : iterable of gs.Tensor
        All that nodes read or make, or did.
    known : collection of int
        Ids of nodes that are or were the graph's own; readers in bodies are none of them, and stay.
    """
    graph.nodes[:] = nodes
    for tensor in tensors:
        inside = [n for n in list(tensor.outputs) if id(n) not in known]
        list.clear(tensor.outputs)
        list.extend(tensor.outputs, inside)
        if not isinstance(tensor, gs.Constant):
            list.clear(tensor.inputs)
    for node in nodes:
        for t in node.inputs:
            list.append(t.outputs, node)
        for t in node.outputs:
            if t.name:
                list.append(t.inputs, node)


def stored_bytes(tensor: gs.Tensor) -> int:
    """What a constant takes to store; nothing for any other tensor."""
    if isinstance(tensor, gs.Constant):
        return int(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize)
    maker = tensor.inputs[0] if tensor.inputs else None
    value = maker.attrs.get("value") if maker is not None and maker.op == "Constant" else None
    return stored_bytes(value) if isinstance(value, gs.Constant) else 0
