"""Passes in turn, until nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pwopt.rewriting.driver import Certifier, Pass, Rewriter
from pwopt.rewriting.records import Outcome, Rewrite, Skip

#: A pipeline repeats until nothing changes; real models need two or three rounds.
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Pipeline:
    """Passes in turn, until every one has nothing left to do; measured ones once, when the others have finished.

    A pure function of the graph, the denied sites and the allowed ones: the same inputs give the same graph, byte
    for byte.
    """

    passes: Sequence[Pass]

    def run(
        self,
        graph: gs.Graph,
        *,
        denied: Iterable[str] = (),
        allowed: Collection[str] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
        certifier: Certifier | None = None,
    ) -> Outcome:
        """Edit `graph` in place; parameters as for `Pass.run`. Refusals are those of each pass's last run.

        `allowed` lists the sites where measured passes may act that nobody asked for by name; None for all. Refusals
        are of tensors that the graph had to begin with: nobody asked for what becomes of those that a rewrite made.
        """
        named = {t.name or n.name for n in graph.nodes for t in n.outputs}
        rw = Rewriter(graph, denied, sizes, reserved, certifier)
        rewrites: list[Rewrite] = []
        skips: dict[str, tuple[Skip, ...]] = {}
        settled = [p for p in self.passes if p.policy != "measured" and not p.late]
        _repeat(rw, settled, rewrites, skips)
        finished = len(rewrites)
        for p in self.passes:
            if p.policy == "measured":
                outcome = rw.apply(p, None if p.asked else allowed)
                rewrites.extend(outcome.rewrites)
                skips[p.name] = outcome.skips
        if len(rewrites) > finished:
            _repeat(rw, [p for p in settled if not p.early], rewrites, skips)
        for p in self.passes:
            if p.late:
                rewrites.extend(rw.apply(p).rewrites)
        rw.close()
        listed = itertools.chain.from_iterable(skips.values())
        return Outcome(tuple(rewrites), tuple(s for s in listed if s.tensor in named))


def _repeat(rw: Rewriter, passes: Sequence[Pass], rewrites: list[Rewrite], skips: dict[str, tuple[Skip, ...]]) -> None:
    idle = 0
    for p in itertools.islice(itertools.cycle(passes), MAX_ROUNDS * len(passes)):
        outcome = rw.apply(p)
        rewrites.extend(outcome.rewrites)
        skips[p.name] = outcome.skips
        idle = 0 if outcome.rewrites else idle + 1
        if idle == len(passes):
            break
