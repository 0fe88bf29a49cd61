"""What a rewrite changed: its part of the graph before and after."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.journal import Journal, State

if TYPE_CHECKING:
    from pwopt.graph.view import View


@dataclass(frozen=True)
class Operator:
    """A node in a drawing: its operator, its name, and the names of its inputs and outputs."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """The operators before and after a rewrite, in an order in which they can run.

    Attributes
    ----------
    before, after : tuple of State
    renamed : dict of Tensor to str
        Tensors whose value changed, with their former names. Only operators of this change read or compute them.
    rerouted : tuple of (State, State)
        Other operators, of which only the inputs changed.
    context : int
        How many levels of operators above it a certificate may include.
    """

    before: tuple[State, ...]
    after: tuple[State, ...]
    renamed: dict[Tensor, str]
    rerouted: tuple[tuple[State, State], ...] = ()
    context: int = 0

    @classmethod
    def of(cls, view: View, journal: Journal, context: int = 0) -> Change:
        """Collect everything that a journal recorded as changed."""
        renamed = dict(journal.changed)
        before: dict[Node, State] = {}
        after: dict[Node, State] = {}
        rerouted: dict[Node, tuple[State, State]] = {}
        for node, old in journal.states.items():
            new = State.of(node) if node in view else None
            if old and new and old.computes(new) and _is_apart(renamed, old, new):
                if not old.reads_as(new):
                    rerouted[node] = old, new
                continue
            if old is not None:
                before[node] = old
            if new is not None:
                after[node] = new
        for tensor in renamed:
            for touching in (view.producer(tensor), *view.readers(tensor)):
                if touching is not None and touching not in after:
                    before[touching] = after[touching] = State.of(touching)
        sides = _order(view, before.values()), _order(view, after.values())
        return cls(*sides, renamed, tuple(rerouted.values()), context)

    def include_rerouted(self, view: View) -> Change:
        """Include the operators of which only the inputs changed."""
        old, new = [a for a, _ in self.rerouted], [b for _, b in self.rerouted]
        sides = _order(view, (*self.before, *old)), _order(view, (*self.after, *new))
        return Change(*sides, self.renamed, (), self.context)

    def widen(self, view: View) -> Change:
        """Include the operators that compute its inputs."""
        inside = {s.node for s in (*self.before, *self.after)}
        feeding = dict.fromkeys(n for t in self.sources() if (n := view.producer(t)) is not None and n not in inside)
        more = [State.of(n) for n in feeding]
        sides = _order(view, (*self.before, *more)), _order(view, (*self.after, *more))
        return Change(*sides, self.renamed, self.rerouted, self.context - 1 if feeding else 0)

    def sources(self) -> list[Tensor]:
        """The tensors that other operators compute."""
        made = [{t for s in side for t in s.outputs} for side in (self.before, self.after)]
        pairs = self._exchanged
        found: dict[Tensor, None] = {}
        for side, own, ends in zip(
            (self.before, self.after), made, ([a for a, _ in pairs], [b for _, b in pairs]), strict=True
        ):
            read = (t for s in side for t in s.inputs if t.name)
            found.update(dict.fromkeys(t for t in (*read, *ends) if t not in own))
        return list(found)

    def claims(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of tensors, before and after, that must have the same value."""
        made = {t for s in self.before for t in s.outputs}
        kept = [t for s in self.after for t in s.outputs if t.name and t in made and t not in self.renamed]
        return [(t, t) for t in kept] + self._exchanged

    @functools.cached_property
    def _exchanged(self) -> list[tuple[Tensor, Tensor]]:
        """The inputs of rerouted operators, before and after, that differ."""
        inputs = (pair for old, new in self.rerouted for pair in zip(old.inputs, new.inputs, strict=False))
        return list(dict.fromkeys((a, b) for a, b in inputs if a is not b and a.name and b.name))

    def find_lost(self, view: View) -> Tensor | None:
        """Find a tensor that is still used, but that no operator computes any more."""
        made = {t for s in self.after for t in s.outputs}
        gone = (t for s in self.before for t in s.outputs if t.name and t not in made)
        return next((t for t in gone if view.producer(t) is None and (view.readers(t) or view.must_keep(t))), None)

    def draw(self, view: View) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
        """Draw both sides for reports, without constants."""
        both = (*self.before, *self.after)
        constants = {t for s in both for t in s.outputs if s.op == "Constant"}
        constants |= {t for s in both for t in s.inputs if view.constant(t) is not None}
        before, after = (
            tuple(_draw(s, constants, names) for s in side if s.op != "Constant")
            for side, names in ((self.before, self.renamed), (self.after, {}))
        )
        return before, after


def _is_apart(renamed: Mapping[Tensor, str], old: State, new: State) -> bool:
    """Whether a node neither reads nor computes a renamed tensor."""
    return not renamed or renamed.keys().isdisjoint((*old.inputs, *new.inputs, *new.outputs))


def _order(view: View, states: Iterable[State]) -> tuple[State, ...]:
    return tuple(sorted(states, key=lambda s: view.position(s.node)))


def _draw(state: State, constants: set[Tensor], former: Mapping[Tensor, str]) -> Operator:
    """Draw an operator; `former` has the names that tensors had at that time, if they have others now."""
    inputs, outputs = (
        tuple(former.get(t, str(t.name)) for t in tensors if t not in hidden)
        for tensors, hidden in ((state.inputs, constants), (state.outputs, ()))
    )
    return Operator(state.op, str(state.node.name), inputs, outputs)
