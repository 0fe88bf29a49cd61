"""What a rewrite changed: the part of the graph around it as it was, and as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from pwopt.graph.journal import Journal, State

if TYPE_CHECKING:
    from pwopt.graph.view import View


@dataclass(frozen=True)
class Operator:
    """A node in a drawing: its operator, its name, and what it reads and makes, by name."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """Operators before and after a rewrite, in an order in which they can run.

    Attributes
    ----------
    before, after : tuple of State
    renamed : dict of int to gs.Tensor
        Tensors, by id, whose value is another one since; only operators inside the region touch them.
    rerouted : tuple of (State, State)
        Operators around it of which only the inputs changed.
    context : int
        How far above it a certificate may look for facts that the rewrite rests on.
    """

    before: tuple[State, ...]
    after: tuple[State, ...]
    renamed: dict[int, gs.Tensor]
    rerouted: tuple[tuple[State, State], ...] = ()
    context: int = 0

    @classmethod
    def of(cls, view: View, journal: Journal, context: int = 0) -> Region:
        """The region of everything that a journal saw change."""
        renamed = dict(journal.changed)
        before: dict[int, State] = {}
        after: dict[int, State] = {}
        rerouted: dict[int, tuple[State, State]] = {}
        for key, old in journal.states.items():
            node = journal.nodes[key]
            new = State.of(node) if node in view else None
            if old is not None and new is not None and old.computes(new):
                if not old.reads_as(new) and not any(
                    id(t) in renamed for t in (*old.inputs, *new.inputs, *new.outputs)
                ):
                    rerouted[key] = old, new
                    continue
                if old.reads_as(new) and not any(id(t) in renamed for t in (*new.inputs, *new.outputs)):
                    continue
            if old is not None:
                before[key] = old
            if new is not None:
                after[key] = new
        for tensor in renamed.values():
            for node in (view.producer(tensor), *view.readers(tensor)):
                if node is not None and id(node) not in after:
                    before[id(node)] = after[id(node)] = State.of(node)
        sides = _ordered(view, before.values()), _ordered(view, after.values())
        return cls(*sides, renamed, tuple(rerouted.values()), context)

    def with_rerouted(self, view: View) -> Region:
        """The region with the operators that only read something else since."""
        old, new = [a for a, _ in self.rerouted], [b for _, b in self.rerouted]
        sides = _ordered(view, (*self.before, *old)), _ordered(view, (*self.after, *new))
        return Region(*sides, self.renamed, (), self.context)

    def widened(self, view: View) -> Region:
        """The region with the operators that feed it."""
        inside = {id(s.node) for s in (*self.before, *self.after)}
        feeding = {id(n): n for t in self.sources() if (n := view.producer(t)) is not None and id(n) not in inside}
        more = [State.of(n) for n in feeding.values()]
        sides = _ordered(view, (*self.before, *more)), _ordered(view, (*self.after, *more))
        return Region(*sides, self.renamed, self.rerouted, self.context - 1 if feeding else 0)

    def sources(self) -> list[gs.Tensor]:
        """Tensors that come from outside."""
        made = [{id(t) for s in side for t in s.outputs} for side in (self.before, self.after)]
        pairs = [t for old, new in self.rerouted for t in _exchanged(old, new)]
        found: dict[int, gs.Tensor] = {}
        for side, own, ends in zip(
            (self.before, self.after), made, ([a for a, _ in pairs], [b for _, b in pairs]), strict=True
        ):
            read = (t for s in side for t in s.inputs if t.name)
            found.update((id(t), t) for t in (*read, *ends) if id(t) not in own)
        return list(found.values())

    def claims(self) -> list[tuple[gs.Tensor, gs.Tensor]]:
        """Tensors before, each with the one after that must hold the same value."""
        made = {id(t) for s in self.before for t in s.outputs}
        kept = [t for s in self.after for t in s.outputs if t.name and id(t) in made and id(t) not in self.renamed]
        return [(t, t) for t in kept] + [pair for old, new in self.rerouted for pair in _exchanged(old, new)]

    def lost(self, view: View) -> gs.Tensor | None:
        """A tensor that is still needed, and that nothing makes any more."""
        made = {id(t) for s in self.after for t in s.outputs}
        gone = (t for s in self.before for t in s.outputs if t.name and id(t) not in made)
        return next((t for t in gone if view.producer(t) is None and (view.readers(t) or view.pinned(t))), None)

    def drawings(self, view: View) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
        """Both sides for people to see, constants left out."""
        both = (*self.before, *self.after)
        constants = {id(t) for s in both for t in s.outputs if s.op == "Constant"}
        constants |= {id(t) for s in both for t in s.inputs if view.constant(t) is not None}
        before, after = (
            tuple(_operator(s, constants) for s in side if s.op != "Constant") for side in (self.before, self.after)
        )
        return before, after


def _exchanged(old: State, new: State) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    yield from ((a, b) for a, b in zip(old.inputs, new.inputs, strict=False) if a is not b and a.name and b.name)


def _ordered(view: View, states: Iterable[State]) -> tuple[State, ...]:
    return tuple(sorted(states, key=lambda s: view.position(s.node)))


def _operator(state: State, constants: set[int]) -> Operator:
    inputs = tuple(n for n, t in zip(state.input_names, state.inputs, strict=True) if id(t) not in constants)
    return Operator(state.op, str(state.node.name), inputs, state.output_names)
