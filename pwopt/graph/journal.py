"""What an edit touches: nodes as they were, and the tensors that got another name or shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs


@dataclass(frozen=True, eq=False)
class State:
    """A node at one moment: tensors are the graph's own objects, whose names may change later."""

    node: gs.Node
    op: str
    attrs: dict[str, Any]
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    @classmethod
    def of(cls, node: gs.Node) -> State:
        attrs = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
        inputs, outputs = tuple(node.inputs), tuple(node.outputs)
        return cls(
            node, str(node.op), attrs, inputs, outputs,
            tuple(str(t.name) for t in inputs), tuple(str(t.name) for t in outputs),
        )  # fmt: skip

    def computes(self, other: State) -> bool:
        """Whether both apply the same operator, to whatever inputs, and call the results alike."""
        return (self.op, *map(id, self.outputs)) == (other.op, *map(id, other.outputs)) and _same(
            self.attrs, other.attrs
        )

    def reads_as(self, other: State) -> bool:
        return [id(t) for t in self.inputs] == [id(t) for t in other.inputs]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    plain = (int, float, str, bytes, list)
    return a.keys() == b.keys() and all(a[k] == b[k] if isinstance(a[k], plain) else a[k] is b[k] for k in a)


class Journal:
    """Nodes as they were before the first edit that touched them, and the tensors that got another name or shape."""

    def __init__(self) -> None:
        self.states: dict[int, State | None] = {}
        self.nodes: dict[int, gs.Node] = {}
        self.changed: dict[int, gs.Tensor] = {}

    def note(self, node: gs.Node | None) -> None:
        if node is not None and id(node) not in self.states:
            self.states[id(node)], self.nodes[id(node)] = State.of(node), node

    def note_new(self, node: gs.Node) -> None:
        if id(node) not in self.states:
            self.states[id(node)], self.nodes[id(node)] = None, node
