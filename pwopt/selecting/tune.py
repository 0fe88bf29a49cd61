"""Measured selection: which of the rewrites that only a clock can judge are kept.

Sites that look alike (`Rewrite.signature`) form a group, which is decided as one. Groups are raced one after
another in the whole model, on top of those already kept, since timing isolated operators misleads: a change of
layout around them may cost more than they save.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pwopt.rewriting.records import Rewrite, Skip
from pwopt.running.progress import Progress, silent
from pwopt.running.timing import Race

LOG = logging.getLogger(__name__)

#: A group is kept if it is faster at this confidence; the race stops as soon as that, or the contrary, is clear.
CONFIDENCE = 0.999
#: Seconds for one group at most.
LONGEST_RACE = 6.0


@dataclass(frozen=True)
class Group:
    """Measured rewrites that look alike.

    Attributes
    ----------
    pass_name, signature : str
    sites : tuple of str
    macs : int
        Multiply-adds that they touch.
    """

    pass_name: str
    signature: str
    sites: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Decision:
    """What a race, maybe an earlier one, said of a group: the speed-up it brought, its interval at `CONFIDENCE`.

    There was none if the model is the same without the group, since others that are kept act in its places.
    """

    group: Group
    speedup: float
    interval: tuple[float, float]
    remembered: bool = False
    #: Why the model with the group cannot be used at all, as a clause; else "".
    fault: str = ""
    raced: bool = True

    @property
    def kept(self) -> bool:
        return not self.fault and self.interval[0] > 1.0

    def reason(self) -> str:
        """The group, and what decided."""
        if not self.raced:
            return f"{self.group.signature}: another rewrite that was kept takes its place"
        if self.fault:
            return f"{self.group.signature}: the model with it cannot be used, since {self.fault}"
        low, high = self.interval
        when = " by an earlier run" if self.remembered else ""
        return f"{self.group.signature}: measured {self.speedup:.3f}× [{low:.3f}, {high:.3f}] in the whole model{when}"

    def explain(self) -> str:
        """What became of the group, and why."""
        return f"{'kept' if self.kept else 'dropped'} {self.group.pass_name}: {self.reason()}"

    def skips(self) -> list[Skip]:
        """A record for each site, if the group was dropped."""
        kept = self.kept and self.raced
        return [] if kept else [Skip(self.reason(), self.group.pass_name, site) for site in self.group.sites]


def groups(rewrites: Iterable[Rewrite]) -> list[Group]:
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
        Group(name, _joint(rs), tuple(r.site for r in rs), sum(r.macs_before for r in rs))
        for (name, _), rs in found.items()
    ]
    saved = Counter[str]()
    for (name, _), rs in found.items():
        saved[name] += max(0, sum(r.macs_before - r.macs_after for r in rs))
    names = list(dict.fromkeys(g.pass_name for g in listed))
    order = sorted(names, key=lambda name: (-saved[name], names.index(name) * (-1 if saved[name] else 1)))
    return sorted(listed, key=lambda g: (order.index(g.pass_name), -g.macs))


def _joint(rewrites: Sequence[Rewrite]) -> str:
    """The signature of a group: what its members have in common, and how often they differ in what."""
    kind, _, details = rewrites[0].signature.partition(": ")
    counted = Counter(r.signature.partition(": ")[2] for r in rewrites)
    listed = ", ".join(f"{n} × {detail}" if n > 1 else detail for detail, n in sorted(counted.items()))
    return f"{kind}: {listed}" if details else kind


def choose(
    candidates: Sequence[Group],
    build: Callable[[frozenset[str]], Path],
    race: Callable[[Path, Path, float], Race],
    budget: float,
    progress: Progress = silent,
    remembered: Callable[[Group], Decision | None] = lambda _group: None,
    fault: Callable[[Path], str] = lambda _model: "",
) -> list[Decision]:
    """Race each group on top of those kept so far, unless it was decided before.

    Groups depend on each other: those that were dropped before others were kept are raced again, on top of these, and
    at last those that were kept are raced again on top of all others, and dropped if they no longer pay.

    Parameters
    ----------
    candidates : sequence of Group
    build : callable
        Writes the model in which the measured rewrites of just these sites were made; models that are alike may be one.
    race : callable
        Races two such models for at most so many seconds.
    budget : float
        Seconds for everything; groups that it leaves no time for are not decided.
    progress : callable, optional
        Called with what is raced, and the fraction of groups done.
    remembered : callable, optional
        The decision of an earlier run on a group.
    fault : callable, optional
        Why a model cannot be raced, else "": its group is dropped.

    Returns
    -------
    list of Decision
    """
    contest = _Contest(candidates, build, race, budget, progress, fault)
    for done, group in enumerate(candidates):
        earlier = remembered(group)
        if earlier is not None:
            contest.decided[group] = earlier
            LOG.info("%s", earlier.explain())
        else:
            contest.decide(group, 2 * (len(candidates) - done))  # as much again for what follows
    decided, kept = contest.decided, contest.kept()
    last = candidates.index(kept[-1]) if kept else 0
    dropped = [g for g in candidates[:last] if g in decided and not decided[g].kept]
    again = [g for g in dropped if not decided[g].remembered and decided[g].interval[1] > 1.0]
    for i, group in enumerate(again):
        contest.decide(group, len(again) - i + len(kept))
    doubted = [g for g in contest.kept()[:-1] if not decided[g].remembered]
    for i, group in enumerate(doubted):
        contest.decide(group, len(doubted) - i)
    return [decided[g] for g in candidates if g in decided]


class _Contest:
    """Races of groups of rewrites, and what they have decided so far."""

    def __init__(
        self,
        candidates: Sequence[Group],
        build: Callable[[frozenset[str]], Path],
        race: Callable[[Path, Path, float], Race],
        budget: float,
        progress: Progress,
        fault: Callable[[Path], str],
    ) -> None:
        self._fault = fault
        self.candidates, self.decided = candidates, dict[Group, Decision]()
        self._build, self._race, self._progress = build, race, progress
        self._budget, self._deadline = budget, time.perf_counter() + budget
        self._files: dict[frozenset[str], Path] = {}

    def kept(self) -> list[Group]:
        return [g for g in self.candidates if g in self.decided and self.decided[g].kept]

    def _model(self, groups: Iterable[Group]) -> Path:
        sites = frozenset(site for g in groups for site in g.sites)
        if sites not in self._files:
            self._files[sites] = self._build(sites)
        return self._files[sites]

    def decide(self, group: Group, races: int) -> None:
        """Race a group on top of the others that are kept, with its share of the time that is left."""
        left = self._deadline - time.perf_counter()
        if left <= 0:
            return
        self._progress(f"racing {group.pass_name}: {group.signature}", 1 - left / self._budget)
        others = [g for g in self.kept() if g is not group]
        without, model = self._model(others), self._model([*others, group])
        if without == model:  # what is kept already took its places
            self.decided[group] = Decision(group, 1.0, (1.0, 1.0), raced=False)
            return
        fault = self._fault(model)
        if fault:
            self.decided[group] = Decision(group, 0.0, (0.0, 0.0), fault=fault)
            return
        result = self._race(without, model, min(LONGEST_RACE, left / races))
        self.decided[group] = Decision(group, result.speedup(), result.interval(confidence=CONFIDENCE))
        LOG.info("%s", self.decided[group].explain())
