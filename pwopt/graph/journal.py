"""A journal of edits: the former states of nodes, and the tensors that were renamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pwopt.graph.ir import Node, Tensor


@dataclass(frozen=True, eq=False)
class State:
    """The state of a node at one moment. Its tensors are those of the graph, whose names may change later."""

    node: Node
    op: str
    attrs: dict[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, node: Node) -> State:
        attrs = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
        return cls(node, str(node.op), attrs, tuple(node.inputs), tuple(node.outputs))

    def computes(self, other: State) -> bool:
        """Whether both apply the same operator with the same attributes and outputs, to whatever inputs."""
        return (self.op, *map(id, self.outputs)) == (other.op, *map(id, other.outputs)) and _same(
            self.attrs, other.attrs
        )

    def reads_as(self, other: State) -> bool:
        return self.inputs == other.inputs


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    plain = (int, float, str, bytes, list)
    return a.keys() == b.keys() and all(a[k] == b[k] if isinstance(a[k], plain) else a[k] is b[k] for k in a)


class Journal:
    """The states of nodes before the first edit that touched them, and the tensors that were renamed.

    Attributes
    ----------
    states : dict
        Node → its former state; None if the node is new.
    changed : dict
        Renamed tensor → its former name.
    """

    def __init__(self) -> None:
        self.states: dict[Node, State | None] = {}
        self.changed: dict[Tensor, str] = {}

    def note(self, node: Node | None) -> None:
        if node is not None and node not in self.states:
            self.states[node] = State.of(node)

    def note_new(self, node: Node) -> None:
        if node not in self.states:
            self.states[node] = None
