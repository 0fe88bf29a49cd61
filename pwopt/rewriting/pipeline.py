"""Run passes in turn until nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pwopt.graph.ir import Graph
from pwopt.rewriting.driver import Certifier, Pass, Rewriter
from pwopt.rewriting.records import Outcome, Rewrite, Site, Skip

#: The largest number of rounds. Real models need two or three.
MAX_PIPELINE_ROUNDS = 8


@dataclass(frozen=True)
class Fixpoint:
    """The state in which no pass changes anything any more, measured and late passes excepted.

    Attributes
    ----------
    rw : Rewriter
        Of the rewritten graph.
    rewrites : tuple of Rewrite
        Those that led here.
    skips : dict
        Pass name → its refusals in its last run.
    named : frozenset of str
        The tensors and nodes of the original graph.
    """

    rw: Rewriter
    rewrites: tuple[Rewrite, ...]
    skips: Mapping[str, tuple[Skip, ...]]
    named: frozenset[str]

    def branch(self, graph: Graph, denied: Iterable[Site], certifier: Certifier | None) -> Fixpoint:
        """Continue with a copy of the graph."""
        return Fixpoint(self.rw.branch(graph, denied, certifier), self.rewrites, self.skips, self.named)


@dataclass(frozen=True)
class Pipeline:
    """Runs passes until none of them changes anything, then each measured pass once, then the others again.

    The result depends only on the graph, the denied sites and the allowed sites: the same inputs give the same graph,
    byte for byte.
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
        """Edit `graph` in place.

        Parameters
        ----------
        allowed : collection of Site, optional
            The sites where measured passes may act if the user did not ask for them by name. Default: everywhere.
        graph, denied, sizes, reserved, certifier
            As for `Pass.run`.

        Returns
        -------
        Outcome
            Its refusals come from the last run of each pass, and concern tensors of the original graph only.
        """
        rw = Rewriter(graph, denied, sizes, reserved, certifier)
        return self.finish(self.run_to_fixpoint(rw), allowed)

    def run_to_fixpoint(self, rw: Rewriter) -> Fixpoint:
        """Run all passes but the measured and the late ones. Afterwards the graph may be copied."""
        named = frozenset(t.name or n.name for n in rw.graph.nodes for t in n.outputs)
        rewrites: list[Rewrite] = []
        skips: dict[str, tuple[Skip, ...]] = {}
        _repeat(rw, self._unmeasured(), rewrites, skips)
        rw.close()
        return Fixpoint(rw, tuple(rewrites), skips, named)

    def finish(self, fixpoint: Fixpoint, allowed: Collection[Site] | None = None) -> Outcome:
        """Run the measured passes, then the others again if those changed anything, then the late ones."""
        rw, rewrites, skips = fixpoint.rw, list(fixpoint.rewrites), dict(fixpoint.skips)
        finished = len(rewrites)
        for p in self._measured():
            if allowed is not None and not p.requested and all(site.pass_name != p.name for site in allowed):
                continue  # it may act nowhere, and its preparations take time
            outcome = rw.apply(p, None if p.requested else allowed)
            rewrites.extend(outcome.rewrites)
            skips[p.name] = outcome.skips
        if len(rewrites) > finished:
            _repeat(rw, [p for p in self._unmeasured() if p.phase != "early"], rewrites, skips)
        for p in self.passes:
            if p.phase == "late" and p.policy != "measured":
                outcome = rw.apply(p)
                rewrites.extend(outcome.rewrites)
                skips[p.name] = outcome.skips
        rw.close()
        listed = itertools.chain.from_iterable(skips.values())
        return Outcome(tuple(rewrites), tuple(s for s in listed if s.tensor in fixpoint.named))

    def try_pass(self, fixpoint: Fixpoint, name: str) -> Outcome:
        """Run one measured pass, after the measured passes before it that the user asked for."""
        outcome = Outcome((), ())
        for p in self._measured():
            if p.requested or p.name == name:
                outcome = fixpoint.rw.apply(p)
            if p.name == name:
                break
        return Outcome(outcome.rewrites, tuple(s for s in outcome.skips if s.tensor in fixpoint.named))

    def _unmeasured(self) -> list[Pass]:
        return [p for p in self.passes if p.policy != "measured" and p.phase != "late"]

    def _measured(self) -> list[Pass]:
        return [p for p in self.passes if p.policy == "measured"]


def _repeat(rw: Rewriter, passes: Sequence[Pass], rewrites: list[Rewrite], skips: dict[str, tuple[Skip, ...]]) -> None:
    """Run passes in turn until a whole round changes nothing; append to `rewrites`, and update `skips`."""
    idle = 0
    for p in itertools.islice(itertools.cycle(passes), MAX_PIPELINE_ROUNDS * len(passes)):
        outcome = rw.apply(p)
        rewrites.extend(outcome.rewrites)
        skips[p.name] = outcome.skips
        idle = 0 if outcome.rewrites else idle + 1
        if idle == len(passes):
            break
