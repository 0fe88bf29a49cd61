"""Passes in turn, until nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pwopt.graph.ir import Graph
from pwopt.rewriting.driver import Certifier, Pass, Rewriter
from pwopt.rewriting.records import Outcome, Rewrite, Site, Skip

#: A pipeline repeats until nothing changes; real models need two or three rounds.
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Settled:
    """What is known when all passes but the measured ones have nothing left to do.

    Attributes
    ----------
    rw : Rewriter
        On the graph that they left.
    rewrites : tuple of Rewrite
    skips : dict
        Pass name → its refusals, when it last ran.
    named : frozenset of str
        The tensors and nodes of the graph before.
    """

    rw: Rewriter
    rewrites: tuple[Rewrite, ...]
    skips: Mapping[str, tuple[Skip, ...]]
    named: frozenset[str]

    def branch(self, graph: Graph, denied: Iterable[Site], certifier: Certifier | None) -> Settled:
        """The same on a copy of the graph."""
        return Settled(self.rw.branch(graph, denied, certifier), self.rewrites, self.skips, self.named)


@dataclass(frozen=True)
class Pipeline:
    """Passes in turn, until every one has nothing left to do; measured ones once, when the others have finished.

    A pure function of the graph, the denied sites and the allowed ones: the same inputs give the same graph, byte
    for byte.
    """

    passes: Sequence[Pass]

    def run(
        self,
        graph: Graph,
        *,
        denied: Iterable[Site] = (),
        allowed: Collection[Site] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> Outcome:
        """Edit `graph` in place; parameters as for `Pass.run`. Refusals are those of each pass's last run.

        `allowed` lists the sites where measured passes may act that nobody asked for by name; None for all. Refusals
        are of tensors that the graph had to begin with: nobody asked for what becomes of those that a rewrite made.
        """
        rw = Rewriter(graph, denied, sizes, reserved, certifier)
        return self.finish(self.settle(rw), allowed)

    def settle(self, rw: Rewriter) -> Settled:
        """Run all passes but the measured ones; leaves a graph that may be copied."""
        named = frozenset(t.name or n.name for n in rw.graph.nodes for t in n.outputs)
        rewrites: list[Rewrite] = []
        skips: dict[str, tuple[Skip, ...]] = {}
        _repeat(rw, self._settling(), rewrites, skips)
        rw.close()
        return Settled(rw, tuple(rewrites), skips, named)

    def finish(self, settled: Settled, allowed: Collection[Site] | None = None) -> Outcome:
        """Run the measured passes, and the others once more over what those made."""
        rw, rewrites, skips = settled.rw, list(settled.rewrites), dict(settled.skips)
        finished = len(rewrites)
        for p in self._measured():
            outcome = rw.apply(p, None if p.requested else allowed)
            rewrites.extend(outcome.rewrites)
            skips[p.name] = outcome.skips
        if len(rewrites) > finished:
            _repeat(rw, [p for p in self._settling() if p.phase != "early"], rewrites, skips)
        for p in self.passes:
            if p.phase == "late":
                rewrites.extend(rw.apply(p).rewrites)
        rw.close()
        listed = itertools.chain.from_iterable(skips.values())
        return Outcome(tuple(rewrites), tuple(s for s in listed if s.tensor in settled.named))

    def could(self, settled: Settled, name: str) -> Outcome:
        """What the measured pass of this name does by itself, beside those that were asked for."""
        outcome = Outcome((), ())
        for p in self._measured():
            if p.requested or p.name == name:
                outcome = settled.rw.apply(p)
            if p.name == name:
                break
        return Outcome(outcome.rewrites, tuple(s for s in outcome.skips if s.tensor in settled.named))

    def _settling(self) -> list[Pass]:
        return [p for p in self.passes if p.policy != "measured" and p.phase != "late"]

    def _measured(self) -> list[Pass]:
        return [p for p in self.passes if p.policy == "measured"]


def _repeat(rw: Rewriter, passes: Sequence[Pass], rewrites: list[Rewrite], skips: dict[str, tuple[Skip, ...]]) -> None:
    idle = 0
    for p in itertools.islice(itertools.cycle(passes), MAX_ROUNDS * len(passes)):
        outcome = rw.apply(p)
        rewrites.extend(outcome.rewrites)
        skips[p.name] = outcome.skips
        idle = 0 if outcome.rewrites else idle + 1
        if idle == len(passes):
            break
