"""Checks that a third-party pass changes the graph only in its rewrites.

`View` counts its own edits, but a pass may also assign to a node or to a tensor. `GraphRecord` notes what every node
and every tensor is, and finds what changed without a rewrite.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.graph.ir import Constant, LazyValues, Node, Tensor
from pwopt.graph.journal import Journal, State
from pwopt.graph.view import View

#: How often a pass may rewrite each node of a graph in one run, on average.
MAX_REWRITES_PER_NODE = 64


class GraphRecord:
    """What the nodes and tensors of a graph are, to find those that change without a rewrite."""

    def __init__(self, view: View) -> None:
        graph = view.graph
        self._lists: list[list[Any]] = [graph.nodes, graph.inputs, graph.outputs]
        self._listed = [list[Any](listed) for listed in self._lists]
        self._nodes: dict[Node, tuple[object, object]] = {}
        self._tensors: dict[Tensor, tuple[object, ...]] = {}
        self._add(view.nodes())
        self._tensors.update((t, _record_tensor(t)) for t in (*graph.inputs, *graph.outputs))

    def _add(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self._nodes[node] = _record_node(node)
            self._tensors.update((t, _record_tensor(t)) for t in (*node.inputs, *node.outputs))

    def accept(self, view: View, journal: Journal) -> str:
        """Take over what a rewrite changed: the nodes and tensors that the journal lists.

        Returns
        -------
        str
            A node that the pass had changed before the rewrite noted it; "" if there is none.
        """
        for node, state in journal.states.items():
            if node in self._nodes and state is not None and _record_state(state) != self._nodes[node][0]:
                return f"the node {node.name or node.op!r}"
        for node in journal.states.keys() - self._nodes.keys():
            if node in view:
                self._add([node])
        for node in journal.states.keys() & self._nodes.keys():
            if node in view:
                self._add([node])
            else:
                del self._nodes[node]
        self._tensors.update((t, _record_tensor(t)) for t in journal.changed)
        return ""

    def find_change(self) -> str:
        """Describe something that changed without a rewrite; "" if nothing did."""
        for what, now, before in zip(("nodes", "inputs", "outputs"), self._lists, self._listed, strict=True):
            if list(now) != before:
                return f"the list of {what} of the graph"
        changed = next((n for n, record in self._nodes.items() if _record_node(n) != record), None)
        if changed is not None:
            return f"the node {changed.name or changed.op!r}"
        tensor = next((t for t, record in self._tensors.items() if not _is_unchanged(t, record)), None)
        return "" if tensor is None else f"the tensor {tensor.name!r}"


def _record_node(node: Node) -> tuple[object, object]:
    return _record_state(State.of(node)), (node.name, node.domain or "")


def _record_state(state: State) -> object:
    attrs = tuple((key, _record_attribute(value)) for key, value in state.attrs.items())
    return state.op, attrs, state.inputs, state.outputs


def _record_attribute(value: Any) -> object:
    if isinstance(value, gs.Graph):
        return tuple(map(_record_node, value.nodes)), tuple(value.inputs), tuple(value.outputs)
    return tuple(value) if isinstance(value, list) else value


def _record_tensor(tensor: Tensor) -> tuple[object, ...]:
    if not isinstance(tensor, Constant):
        return tensor.name, None if tensor.shape is None else tuple(tensor.shape), str(tensor.dtype)
    return tensor.name, _checksum(tensor.stored) if isinstance(tensor.stored, np.ndarray) else tensor.stored


def _checksum(values: Any) -> object:
    held = np.ascontiguousarray(values)
    return str(held.dtype), held.shape, zlib.crc32(held.tobytes())


def _is_unchanged(tensor: Tensor, record: tuple[object, ...]) -> bool:
    """Whether a tensor is what it was; reading the values of a constant loads them, but changes nothing."""
    now, stored = _record_tensor(tensor), record[1]
    if now == record:
        return True
    return now[0] == record[0] and isinstance(stored, LazyValues) and _checksum(stored.load()) == now[1]
