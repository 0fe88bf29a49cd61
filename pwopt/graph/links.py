"""The links between nodes and tensors that onnx-graphsurgeon keeps.

Its lists update each other at every edit, which searches all readers of a tensor. `View` keeps an index instead: `put`
changes one list only, and `relink` writes all links once at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pwopt.graph.ir import Constant, Graph, Node, Tensor, Variable


def put(tensors: list[Tensor], index: int, tensor: Tensor) -> None:
    """Make `tensor` the input or output `index` of a node; inputs in between become empty ones."""
    while len(tensors) <= index:
        list.append(tensors, Variable.empty())
    list.__setitem__(tensors, index, tensor)


def relink(graph: Graph, nodes: Sequence[Node], tensors: Iterable[Tensor], known: Collection[Node]) -> None:
    """Set the nodes of a graph, and the readers and producers of its tensors that follow from them.

    Parameters
    ----------
    graph : Graph
    nodes : sequence of Node
    tensors : iterable of Tensor
        All tensors that nodes read or produce, now or before the edits.
    known : collection of Node
        The nodes that are or were in the graph itself. Readers in bodies are not among them, and stay linked.
    """
    graph.nodes[:] = nodes
    for tensor in tensors:
        inside = [n for n in list(tensor.outputs) if n not in known]
        list.clear(tensor.outputs)
        list.extend(tensor.outputs, inside)
        if not isinstance(tensor, Constant):
            list.clear(tensor.inputs)
    for node in nodes:
        for t in node.inputs:
            list.append(t.outputs, node)
        for t in node.outputs:
            if t.name:
                list.append(t.inputs, node)


def count_bytes_held(tensor: Tensor) -> int:
    """Count the bytes of a constant; 0 for any other tensor."""
    if isinstance(tensor, Constant):
        return int(tensor.stored.nbytes)
    makers = vars(tensor).get("inputs")
    maker = makers[0] if makers else None
    value = maker.attrs.get("value") if maker is not None and maker.op == "Constant" else None
    return count_bytes_held(value) if isinstance(value, Constant) else 0
