"""Collects the new operators of a rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import emit
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.steps import Step, repeat_activation


@dataclass
class Builder:
    """The operators that a rewrite adds. The graph does not change until `Rewriter.replace` inserts them.

    Attributes
    ----------
    rw : Rewriter
    nodes : list of Node
        In an order in which they can run.
    residual : float
        Largest relative rounding of the weights so far.
    """

    rw: Rewriter
    nodes: list[Node] = field(default_factory=list, init=False)
    residual: float = field(default=0.0, init=False)

    def add_node(self, op: str, inputs: Sequence[Tensor], output: Tensor, **attrs: object) -> None:
        """Add an operator whose name comes from its output."""
        name = self.rw.node_name(str(output.name), f"_{op.lower()}")
        self.nodes.append(Node(op, name, attrs, list(inputs), [output]))

    def add_map(
        self,
        linear: LinearMap,
        like: Reading,
        source: Tensor,
        output: Tensor,
        axis: int | None = 1,
        *,
        inherit: bool = False,
    ) -> Node:
        """Add `output = linear(source)` in the form of `like`; returns its first operator.

        `inherit` gives it the names of `like`, as in `pwopt.maps.emit.write`, which refuses numbers that do not fit.
        """
        written = emit.write(self.rw, linear, like, source, output, axis, inherit=inherit)
        self.nodes += written.nodes
        self.residual = max(self.residual, written.residual)
        return written.nodes[0]

    def add_step(self, step: Step, source: Tensor, output: Tensor) -> None:
        """Add the operators of an activation on another tensor."""
        self.nodes += repeat_activation(self.rw, step, source, output)
