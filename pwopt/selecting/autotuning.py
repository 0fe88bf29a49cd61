"""Measured selection: which of the rewrites that only a clock can judge are kept.

Sites that look alike (`Rewrite.signature`) form a group, which is decided as one. Groups are raced one after
another in the whole model, on top of those already kept, since timing isolated operators misleads: a change of
layout around them may cost more than they save.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.timing import CONFIDENCE, HOPELESS, HOPELESS_PAIRS, NO_EVIDENCE, Evidence, Race

LOG = logging.getLogger(__name__)

#: Seconds for one group at most.
LONGEST_RACE = 6.0
#: The part of the time that may go into looking before races, and the confidence of what is seen: a race confirms it.
ESTIMATING_SHARE, ESTIMATE_CONFIDENCE = 0.5, 0.9
#: A speed-up that profiles must allow for to be raced: sessions of one model differ by more than races tell below it.
SMALLEST_RACED = 1.01
#: A speed-up that is worth a race to its end.
WORTH = 1.005
#: Below this part of the time for themselves, models raced on a busy machine.
BUSY = 0.8


@dataclass(frozen=True)
class Group:
    """Measured rewrites that look alike.

    Attributes
    ----------
    pass_name, signature : str
    sites : tuple of Site
    macs : int
        Multiply-adds that they touch.
    """

    pass_name: str
    signature: str
    sites: tuple[Site, ...]
    macs: int


@dataclass(frozen=True)
class Decision:
    """What races, earlier ones perhaps, said of a group."""

    group: Group
    evidence: Evidence = NO_EVIDENCE
    remembered: bool = False
    #: Whether it is profiles that the evidence is from; what the race of all that pay by them said, if it did confirm.
    estimated: bool = False
    confirmed: Evidence | None = None
    #: Why there was no race, as a clause ("the model with it cannot be used, since …"); else "".
    not_raced: str = ""
    #: Why the model with the group cannot be used at all, as a clause; else "".
    fault: str = ""
    #: Which part of the time the models of the last race had for themselves.
    own: float = 1.0

    @property
    def speedup(self) -> float:
        return self.evidence.speedup

    @property
    def interval(self) -> tuple[float, float]:
        return self.evidence.interval(CONFIDENCE)

    @property
    def raced(self) -> bool:
        return not self.not_raced and not self.fault

    @property
    def kept(self) -> bool:
        if self.estimated:
            return self.confirmed is not None
        return self.raced and self.interval[0] > 1.0

    @property
    def clear(self) -> bool:
        """Whether more races would not change it: it pays, or it does not, or hardly."""
        return not self.raced or self.estimated or is_clear(self.evidence)

    def reason(self) -> str:
        """The group, and what decided."""
        if self.not_raced:
            return f"{self.group.signature}: {self.not_raced}"
        if self.fault:
            return f"{self.group.signature}: the model with it cannot be used, since {self.fault}"
        low, high = self.interval
        figures = f"{self.speedup:.3f}× [{low:.3f}, {high:.3f}]"
        if self.estimated:
            raced = "" if self.confirmed is None else f", {self.confirmed.speedup:.3f}× in a race of all that pay so"
            return f"{self.group.signature}: measured {figures} in the whole model by profiles of its operators{raced}"
        when = " by an earlier run" if self.remembered else "" if self.own >= BUSY else " on a busy machine"
        doubt = "" if self.clear else ", in doubt"
        return f"{self.group.signature}: measured {figures}{doubt} in the whole model{when}"

    def explain(self) -> str:
        """What became of the group, and why."""
        return f"{'kept' if self.kept else 'dropped'} {self.group.pass_name}: {self.reason()}"

    def skips(self) -> list[Skip]:
        """A record for each site, if the group was dropped."""
        return [] if self.kept else [Skip(self.reason(), site) for site in self.group.sites]


def is_clear(evidence: Evidence) -> bool:
    """Whether races have decided: faster or slower beyond doubt, or hardly worth having."""
    low, high = evidence.interval(CONFIDENCE)
    return low > 1.0 or high < 1.0 or is_hopeless(evidence)


def is_hopeless(evidence: Evidence) -> bool:
    """Whether there is hardly anything to gain."""
    return evidence.pairs >= HOPELESS_PAIRS and evidence.interval(HOPELESS)[1] < WORTH


def group_rewrites(rewrites: Iterable[Rewrite]) -> list[Group]:
    """Measured rewrites by signature: those of one pass together, the largest first.

    The pass that saves most multiply-adds comes first, since time may run out before the last; others come in their own
    order. Of passes that save the same the last comes first: where two act on one place, the first one does, and should
    be raced against the other. Of a signature like "gates: 72 at 28×28", the part before the colon says what belongs
    together.
    """
    found: dict[tuple[str, str], list[Rewrite]] = {}
    for r in rewrites:
        found.setdefault((r.pass_name, r.signature.partition(": ")[0]), []).append(r)
    listed = [
        Group(name, _join_signatures(rs), tuple(r.site for r in rs), sum(r.macs_before for r in rs))
        for (name, _), rs in found.items()
    ]
    saved = Counter[str]()
    for (name, _), rs in found.items():
        saved[name] += max(0, sum(r.macs_before - r.macs_after for r in rs))
    names = list(dict.fromkeys(g.pass_name for g in listed))
    order = sorted(names, key=lambda name: (-saved[name], names.index(name) * (-1 if saved[name] else 1)))
    return sorted(listed, key=lambda g: (order.index(g.pass_name), -g.macs))


def _join_signatures(rewrites: Sequence[Rewrite]) -> str:
    """The signature of a group: what its members have in common, and how often they differ in what."""
    kind, _, details = rewrites[0].signature.partition(": ")
    counted = Counter(r.signature.partition(": ")[2] for r in rewrites)
    listed = ", ".join(f"{n} × {detail}" if n > 1 else detail for detail, n in sorted(counted.items()))
    return f"{kind}: {listed}" if details else kind


class Estimate(NamedTuple):
    """What profiles say of a group: speed-ups of the whole model, by its own operators and at best.

    On a busy machine they rule out, and promise nothing (`sure`).
    """

    own: Evidence
    best: Evidence
    sure: bool = True


class CandidateEvaluator(Protocol):
    """What decides on groups: builds models, says whether they can be used, races them, and remembers."""

    def build(self, sites: frozenset[Site]) -> Path:
        """Write the model in which the measured rewrites of just these sites were made; models alike may be one."""

    def fault(self, model: Path) -> str:
        """Why a model cannot be raced, else ""."""

    def race(self, a: Path, b: Path, seconds: float, known: Evidence) -> Race | str:
        """Race two models for at most so many seconds, on top of what is known; or why one of them fails now."""

    def recall(self, group: Group) -> Decision | None:
        """Return what is known of a group already, decided or not."""

    def estimate(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, Estimate]:
        """What profiles say of groups on top of those that are kept; nothing of those that they cannot tell."""


def race_groups(
    candidates: Sequence[Group], evaluator: CandidateEvaluator, budget: float, progress: Progress = ignore_progress
) -> list[Decision]:
    """Race each group on top of those kept so far, unless it was decided before.

    Groups depend on each other: those that were in doubt before others were kept are raced again, on top of these, and
    at last those that were kept are raced again on top of all others, and dropped if they no longer pay.

    Parameters
    ----------
    candidates : sequence of Group
        In the order in which they are raced.
    evaluator : CandidateEvaluator
    budget : float
        Seconds for everything; groups that it leaves no time for are not decided.
    progress : callable, optional
        Called with what is raced, and the fraction of groups done.

    Returns
    -------
    list of Decision
    """
    contest = _Contest(candidates, evaluator, budget, progress)
    for group in candidates:
        earlier = evaluator.recall(group)
        if earlier is not None:
            contest.decided[group] = earlier
            LOG.info("%s", earlier.explain())
    waiting = [g for g in candidates if g not in contest.decided or not contest.decided[g].clear]
    promising = contest.estimate([g for g in waiting if g not in contest.decided])
    if len(promising) > 1:  # one is raced by itself anyway
        contest.confirm(promising)
    waiting = [g for g in waiting if g not in contest.decided or not contest.decided[g].clear]
    waiting.sort(key=lambda g: g not in promising)  # otherwise as they came
    for done, group in enumerate(waiting):
        contest.decide(group, 2 * (len(waiting) - done))  # as much again for what follows
    decided, kept = contest.decided, contest.kept()
    last = candidates.index(kept[-1]) if kept else 0
    again = [g for g in candidates[:last] if g in decided and not decided[g].clear and not decided[g].remembered]
    for i, group in enumerate(again):
        contest.decide(group, len(again) - i + len(kept), anew=True)
    doubted = [g for g in contest.kept()[:-1] if not decided[g].remembered and not decided[g].estimated]
    for i, group in enumerate(doubted):
        contest.decide(group, len(doubted) - i, anew=True)
    return [decided[g] for g in candidates if g in decided]


class _Contest:
    """Races of groups of rewrites, and what they have decided so far."""

    def __init__(
        self, candidates: Sequence[Group], evaluator: CandidateEvaluator, budget: float, progress: Progress
    ) -> None:
        self.candidates, self.decided = candidates, dict[Group, Decision]()
        self._evaluator, self._progress = evaluator, progress
        self._budget, self._deadline = budget, time.perf_counter() + budget
        self._files: dict[frozenset[Site], Path] = {}

    def kept(self) -> list[Group]:
        return [g for g in self.candidates if g in self.decided and self.decided[g].kept]

    def _model(self, groups: Iterable[Group]) -> Path:
        sites = frozenset(site for g in groups for site in g.sites)
        if sites not in self._files:
            self._files[sites] = self._evaluator.build(sites)
        return self._files[sites]

    def estimate(self, groups: Sequence[Group]) -> dict[Group, Evidence]:
        """What pays by profiles, the best first; what does not is decided, and what they do not tell is neither."""
        seen: dict[Group, Estimate] = {}
        for name in dict.fromkeys(g.pass_name for g in groups):
            if time.perf_counter() > self._deadline - (1 - ESTIMATING_SHARE) * self._budget:
                break
            self._progress(f"profiling {name}", 1 - (self._deadline - time.perf_counter()) / self._budget)
            seen.update(self._evaluator.estimate(self.kept(), [g for g in groups if g.pass_name == name]))
        promised = {
            g: e.own for g, e in seen.items() if e.own.interval(ESTIMATE_CONFIDENCE)[0] > 1.0 and e.own.speedup >= WORTH
        }
        paying = {g: own for g, own in promised.items() if seen[g].sure}
        for group, estimate in seen.items():
            figures = estimate.own.speedup, *estimate.own.interval(ESTIMATE_CONFIDENCE)
            LOG.info("profiled %s: %s: %.3f× [%.3f, %.3f]", group.pass_name, group.signature, *figures)
            if estimate.best.interval(ESTIMATE_CONFIDENCE)[1] < SMALLEST_RACED and group not in promised:
                self.decided[group] = Decision(group, estimate.own, estimated=True)
        return dict(sorted(paying.items(), key=lambda found: -found[1].speedup))

    def confirm(self, groups: Mapping[Group, Evidence]) -> None:
        """Race all groups that pay by profiles at once; if they do together, all are kept."""
        left = self._deadline - time.perf_counter()
        if left <= 0:
            return
        self._progress(f"racing {', '.join(dict.fromkeys(g.pass_name for g in groups))}", 1 - left / self._budget)
        without, model = self._model(self.kept()), self._model([*self.kept(), *groups])
        if without == model or self._evaluator.fault(model):
            return
        result = self._evaluator.race(without, model, min(LONGEST_RACE, left / 2), NO_EVIDENCE)
        if isinstance(result, str) or not (confirmed := Evidence.from_race(result)).interval(CONFIDENCE)[0] > 1.0:
            return
        for group, evidence in groups.items():
            self.decided[group] = Decision(group, evidence, estimated=True, confirmed=confirmed)
        LOG.info("kept %s: %.3f× together", ", ".join(g.signature for g in groups), confirmed.speedup)

    def decide(self, group: Group, races: int, *, anew: bool = False) -> None:
        """Race a group on top of the others that are kept, with its share of the time that is left.

        What earlier races said of it counts too, unless they were on top of others (`anew`).
        """
        left = self._deadline - time.perf_counter()
        if left <= 0:
            return
        self._progress(f"racing {group.pass_name}: {group.signature}", 1 - left / self._budget)
        others = [g for g in self.kept() if g is not group]
        without, model = self._model(others), self._model([*others, group])
        if without == model:
            self.decided[group] = Decision(group, not_raced="another rewrite that was kept takes its place")
            return
        known = NO_EVIDENCE if anew or group not in self.decided else self.decided[group].evidence
        fault = self._evaluator.fault(model)
        left = self._deadline - time.perf_counter()
        result = fault or self._evaluator.race(without, model, min(LONGEST_RACE, max(0.0, left) / races), known)
        if isinstance(result, str):
            self.decided[group] = Decision(group, fault=result)
        else:
            self.decided[group] = Decision(group, known + Evidence.from_race(result), own=result.own)
        LOG.info("%s", self.decided[group].explain())
