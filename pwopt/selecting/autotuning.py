"""Decide by races which measured rewrites to keep.

Rewrites with the same signature (`Rewrite.signature`) form a group, and one decision holds for the whole group. Each
group is raced in the whole model, together with the groups that are already kept. Timing an operator alone would
mislead: a change of layout around it may cost more than it saves.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from pwopt.rewriting.ratios import format_ratio, is_vague
from pwopt.rewriting.records import Site, Skip
from pwopt.rewriting.wording import join_clauses
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.timing import CONFIDENCE, HOPELESS, HOPELESS_PAIRS, NO_EVIDENCE, Evidence, Race
from pwopt.selecting.groups import Group

LOG = logging.getLogger(__name__)

#: The time limit for the race of one group: at least so many seconds, or this share of the budget.
LONGEST_RACE, LONGEST_SHARE = 3.0, 0.1
#: How many passes are profiled together, beside the model without them.
PASSES_TOGETHER = 3
#: The share of the time that profiles may take before the races, and the confidence of an estimate. A race confirms it.
ESTIMATING_SHARE, ESTIMATE_CONFIDENCE = 0.5, 0.9
#: A group is profiled if its operators allow at least this speed-up, and raced if its profile allows at least the
#: second one or shows that it pays. Smaller ones vanish in the difference of two sessions.
SMALLEST_PROFILED, SMALLEST_RACED = 1.01, 1.02
#: A race ends early if the speed-up is surely below this one.
WORTH = 1.005
#: A group in doubt whose speed-up seems to be this is raced for as long as there is time.
PROMISING = 1.02
#: The machine was busy if the models had the processor for less than this share of the time.
BUSY = 0.8


@dataclass(frozen=True)
class Decision:
    """The decision on a group, with the evidence for it."""

    group: Group
    evidence: Evidence = NO_EVIDENCE
    #: Whether an earlier run decided.
    remembered: bool = False
    #: Whether the evidence is a profile-guided estimate.
    estimated: bool = False
    #: The race that confirmed the estimates of several groups together; None if none did.
    confirmed: Evidence | None = None
    #: Why there was no race, as a clause; else "".
    not_raced: str = ""
    #: Why the model with the group cannot be used, as a clause; else "".
    fault: str = ""
    #: The share of the time that the models of the last race had the processor for themselves.
    own: float = 1.0
    #: Where a remembered decision was found.
    origin: str = "by an earlier run"

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
        """Whether more races would not change the decision."""
        return not self.raced or self.estimated or is_clear(self.evidence)

    def reason(self) -> str:
        """Describe the group and the evidence."""
        if self.not_raced:
            return join_clauses(self.group.details, self.not_raced)
        if self.fault:
            return join_clauses(self.group.details, f"the model with it cannot be used, since {self.fault}")
        low, high = self.interval
        vague = is_vague(low, high) and low <= 1.0 <= high
        figures = format_ratio(self.speedup, low, high, 3) if vague else f"{self.speedup:.3f}× [{low:.3f}, {high:.3f}]"
        if self.estimated:
            raced = "" if self.confirmed is None else f", {self.confirmed.speedup:.3f}× in a race of all that pay so"
            found = f"{'' if vague else 'measured '}{figures} in the whole model by profiles of its operators{raced}"
            return join_clauses(self.group.details, found)
        when = f" {self.origin}" if self.remembered else "" if self.own >= BUSY else " on a busy machine"
        if vague:
            return join_clauses(self.group.details, f"{figures} in races of the whole model{when}")
        doubt = "" if self.clear else ", in doubt"
        return join_clauses(self.group.details, f"measured {figures}{doubt} in the whole model{when}")

    def explain(self) -> str:
        """Say whether the group is kept, and why."""
        return f"{'kept' if self.kept else 'dropped'} {self.group.pass_name}: {self.reason()}"

    def skips(self) -> list[Skip]:
        """Return a record for each site if the group was dropped."""
        return [] if self.kept else [Skip(self.reason(), site) for site in self.group.sites]


def is_clear(evidence: Evidence) -> bool:
    """Whether races have decided: the group is surely faster, surely slower, or hopeless."""
    low, high = evidence.interval(CONFIDENCE)
    return low > 1.0 or high < 1.0 or is_hopeless(evidence)


def is_hopeless(evidence: Evidence) -> bool:
    """Whether the gain is surely below `WORTH`."""
    return evidence.pairs >= HOPELESS_PAIRS and evidence.interval(HOPELESS)[1] < WORTH


class Estimate(NamedTuple):
    """Profile-guided estimate of the speed-up of the whole model by one group.

    Attributes
    ----------
    own : Evidence
        The speed-up by the group's own operators.
    best : Evidence
        The largest speed-up that the profiles allow.
    sure : bool
        False if the machine was busy. Then the estimate can drop a group, but not keep it.
    """

    own: Evidence
    best: Evidence
    sure: bool = True


class CandidateEvaluator(Protocol):
    """Builds the models with and without a group, checks, profiles and races them, and recalls earlier decisions."""

    def build(self, sites: frozenset[Site]) -> Path:
        """Write the model with measured rewrites at exactly these sites. Equal models may share a file."""

    def fault(self, model: Path) -> str:
        """Return why a model cannot be raced, or ""."""

    def race(self, a: Path, b: Path, seconds: float, known: Evidence, promise: float) -> Race | str:
        """Race two models within a time limit, in addition to known evidence; return a reason if one of them fails.

        The race may end early if it is unlikely to prove even the speed-up `promise`.
        """

    def least_provable(self, seconds: float) -> float:
        """Return the least speed-up that a race of so many seconds can be expected to prove."""

    def recall(self, group: Group) -> Decision | None:
        """Return what is already known about a group, even if it is not clear."""

    def bound(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, float]:
        """Bound the speed-ups by groups, from a profile of the model with the kept groups only.

        Groups without a bound are missing.
        """

    def estimate(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, Estimate]:
        """Estimate groups in addition to the kept ones, those of each pass in a model of their own.

        Groups that profiles cannot separate are missing.
        """


def race_groups(
    candidates: Sequence[Group], evaluator: CandidateEvaluator, budget: float, progress: Progress = ignore_progress
) -> list[Decision]:
    """Race each group in addition to the groups kept so far, unless an earlier run decided.

    Groups depend on each other. After the first races, groups that were dropped are profiled again if a group was kept
    that writes their operators in another form, and groups in doubt are raced again if a later group was kept.
    Then, each kept group is raced again in addition to all other kept groups, and dropped if it no longer pays. The
    time that is left is for groups in doubt that promise much.

    Parameters
    ----------
    candidates : sequence of Group
        In the order of the races.
    evaluator : CandidateEvaluator
    budget : float
        Seconds for all races and profiles. Groups for which no time is left are not decided.
    progress : callable, optional
        Called with (stage, fraction of the time that is spent).

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
    recalled = contest.kept()
    promising = contest.estimate([g for g in waiting if g not in contest.decided])
    if len(promising) > 1:  # a single group is raced below
        contest.confirm(promising)
    waiting = [g for g in waiting if g not in contest.decided or not contest.decided[g].clear]
    waiting.sort(key=lambda g: (g not in promising, -contest.estimated.get(g, 1.0)))  # time may run out; stable
    for done, group in enumerate(waiting):
        contest.decide(group, 2 * (len(waiting) - done))  # half of the time is for the races below
    contest.reconsider(recalled)
    decided, kept = contest.decided, contest.kept()
    last = candidates.index(kept[-1]) if kept else 0
    again = [g for g in candidates[:last] if g in decided and not decided[g].clear and not decided[g].remembered]
    for i, group in enumerate(again):
        contest.decide(group, len(again) - i + len(kept), anew=True)
    doubted = [g for g in contest.kept()[:-1] if not decided[g].remembered and not decided[g].estimated]
    for i, group in enumerate(doubted):
        contest.decide(group, len(doubted) - i, anew=True)
    before = contest.kept()
    contest.persist()
    contest.reconsider(before)
    return [decided[g] for g in candidates if g in decided]


class _Contest:
    """Races groups, and holds the decisions so far."""

    def __init__(
        self, candidates: Sequence[Group], evaluator: CandidateEvaluator, budget: float, progress: Progress
    ) -> None:
        self.candidates, self.decided = candidates, dict[Group, Decision]()
        self.estimated = dict[Group, float]()  # speed-ups by profiles
        self._largest = dict[Group, float]()  # the largest speed-ups that profiles allow
        self._evaluator, self._progress = evaluator, progress
        self._budget, self._deadline = budget, time.perf_counter() + budget
        self._longest = max(LONGEST_RACE, LONGEST_SHARE * budget)
        self._files: dict[frozenset[Site], Path] = {}
        self._profiled = set[Group]()  # they ran, so they need no check before a race
        self._raced: dict[tuple[Path, Path], Group] = {}
        self._against = dict[Group, list[Group]]()  # the groups that were kept when a group was raced last

    def kept(self) -> list[Group]:
        return [g for g in self.candidates if g in self.decided and self.decided[g].kept]

    def _model(self, groups: Iterable[Group]) -> Path:
        sites = frozenset(site for g in groups for site in g.sites)
        if sites not in self._files:
            self._files[sites] = self._evaluator.build(sites)
        return self._files[sites]

    def estimate(self, groups: Sequence[Group], share: float = ESTIMATING_SHARE) -> dict[Group, Evidence]:
        """Return the groups that pay according to profiles, the best first.

        Groups that surely gain nothing are dropped. Other groups stay undecided. No profile begins after this share of
        the time.
        """
        groups = self._drop_small(groups)
        seen: dict[Group, Estimate] = {}
        names = list(dict.fromkeys(g.pass_name for g in groups))
        for start in range(0, len(names), PASSES_TOGETHER):
            if time.perf_counter() > self._deadline - (1 - share) * self._budget:
                break
            together = names[start : start + PASSES_TOGETHER]
            done = 1 - (self._deadline - time.perf_counter()) / self._budget
            self._progress(f"profiling {', '.join(together)}", done)
            seen.update(self._evaluator.estimate(self.kept(), [g for g in groups if g.pass_name in together]))
        self._profiled.update(seen)
        self.estimated = {g: e.own.speedup for g, e in seen.items()}
        self._largest.update((g, e.best.interval(ESTIMATE_CONFIDENCE)[1]) for g, e in seen.items() if e.sure)
        promised = {
            g: e.own for g, e in seen.items() if e.own.interval(ESTIMATE_CONFIDENCE)[0] > 1.0 and e.own.speedup >= WORTH
        }
        paying = {g: own for g, own in promised.items() if seen[g].sure}
        for group, estimate in seen.items():
            figures = estimate.own.speedup, *estimate.own.interval(ESTIMATE_CONFIDENCE)
            LOG.info("profiled %s: %.3f× [%.3f, %.3f]", group.title, *figures)
            if estimate.best.interval(ESTIMATE_CONFIDENCE)[1] < SMALLEST_RACED and group not in promised:
                self.decided[group] = Decision(group, estimate.own, estimated=True)
        return dict(sorted(paying.items(), key=lambda found: -found[1].speedup))

    def reconsider(self, before: Sequence[Group]) -> None:
        """Profile dropped groups again whose operators a group that is kept now writes in another form.

        Those that seem to pay are raced.

        An example are sums behind 1-D convolutions: they gain from declared shapes only after they became 2-D.

        Parameters
        ----------
        before : sequence of Group
            The groups that were kept at the first profiles.
        """
        written = {tensor for g in self.kept() if g not in before for tensor in g.tensors}
        dropped = {
            g: d
            for g, d in self.decided.items()
            if not d.kept
            and not d.remembered
            and (d.estimated or d.raced)
            and any(s.tensor in written for s in g.sites)
        }
        for group in dropped:
            del self.decided[group]
        promising = self.estimate(list(dropped), share=1.0) if dropped else {}
        if len(promising) > 1:
            self.confirm(promising)
        left = [g for g in dropped if g not in self.decided]
        again = [g for g in left if g in promising or self.estimated.get(g, 1.0) >= PROMISING]
        for i, group in enumerate(sorted(again, key=lambda g: -self.estimated[g])):
            self.decide(group, 2 * (len(again) - i))
        for group, decision in dropped.items():
            self.decided.setdefault(group, decision)

    def _drop_small(self, groups: Sequence[Group]) -> list[Group]:
        """Drop the groups whose operators take too little time to be worth a race; return the others."""
        if not groups or time.perf_counter() > self._deadline:
            return list(groups)
        self._progress("profiling the model", 1 - (self._deadline - time.perf_counter()) / self._budget)
        bounds = self._evaluator.bound(self.kept(), groups)
        for g in groups:
            if bounds.get(g, math.inf) < SMALLEST_PROFILED:
                reason = f"not tried, since its operators take so little time that it gains at most {bounds[g]:.3f}×"
                self.decided[g] = Decision(g, not_raced=reason)
                LOG.info("%s", self.decided[g].explain())
        return [g for g in groups if g not in self.decided]

    def confirm(self, groups: Mapping[Group, Evidence]) -> None:
        """Race all groups that pay according to profiles together; keep all if they are faster together."""
        left = self._deadline - time.perf_counter()
        if left <= 0:
            return
        self._progress(f"racing {', '.join(dict.fromkeys(g.pass_name for g in groups))}", 1 - left / self._budget)
        without, model = self._model(self.kept()), self._model([*self.kept(), *groups])
        if without == model:
            return
        promise, seconds = math.prod(self._largest.get(g, math.inf) for g in groups), min(self._longest, left / 2)
        if promise < self._evaluator.least_provable(seconds):
            return
        result = self._evaluator.race(without, model, seconds, NO_EVIDENCE, promise)
        if isinstance(result, str) or not (confirmed := Evidence.from_race(result)).interval(CONFIDENCE)[0] > 1.0:
            return
        for group, evidence in groups.items():
            self.decided[group] = Decision(group, evidence, estimated=True, confirmed=confirmed)
        LOG.info("kept %s: %.3f× together", ", ".join(g.title for g in groups), confirmed.speedup)

    def persist(self) -> None:
        """Race groups in doubt that promise much for all of the time that is left: a busy machine needs more pairs."""
        doubted = [g for g in self._against if not self.decided[g].clear and self.decided[g].speedup >= PROMISING]
        for i, group in enumerate(sorted(doubted, key=lambda g: -self.decided[g].speedup)):
            changed = self._against[group] != self.kept()
            self.decide(group, len(doubted) - i, anew=changed, longest=math.inf)

    def decide(self, group: Group, races: int, *, anew: bool = False, longest: float | None = None) -> None:
        """Race a group in addition to the other kept groups, with its share of the time that is left.

        Earlier evidence counts too, unless `anew` says that other groups were kept then.
        """
        left = self._deadline - time.perf_counter()
        if left <= 0:
            return
        self._progress(f"racing {group.title}", 1 - left / self._budget)
        others = [g for g in self.kept() if g is not group]
        without, model = self._model(others), self._model([*others, group])
        if without == model:
            self.decided[group] = Decision(group, not_raced="another rewrite that was kept takes its place")
            return
        if not anew and self._raced.setdefault((without, model), group) is not group:
            self.decided[group] = Decision(group, not_raced="it makes the same model as another rewrite that was raced")
            return
        longest = self._longest if longest is None else longest
        seconds, promise = min(longest, left / races), self._largest.get(group, math.inf)
        provable = self._evaluator.least_provable(seconds)
        if promise < provable and self.estimated.get(group, math.inf) < PROMISING:
            reason = f"not raced, since it gains at most {promise:.3f}× by profiles, and a race of {seconds:.0f} s can "
            self.decided[group] = Decision(group, not_raced=f"{reason}only prove more than {provable:.3f}×")
            return
        known = NO_EVIDENCE if anew or group not in self.decided else self.decided[group].evidence
        fault = "" if group in self._profiled else self._evaluator.fault(model)
        left = self._deadline - time.perf_counter()
        self._against[group] = others
        seconds, promise = min(longest, max(0.0, left) / races), max(promise, known.speedup)
        result = fault or self._evaluator.race(without, model, seconds, known, promise)
        if isinstance(result, str):
            self.decided[group] = Decision(group, fault=result)
        else:
            self.decided[group] = Decision(group, known + Evidence.from_race(result), own=result.own)
        LOG.info("%s", self.decided[group].explain())
