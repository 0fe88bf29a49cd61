"""Select the measured rewrites to make: find candidates, decide on them by races or records."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import onnx

from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.rewriting.wording import join_clauses
from pwopt.running import timing
from pwopt.running.progress import Progress
from pwopt.running.session import NodeTime
from pwopt.running.worker import UnusableError, Worker
from pwopt.selecting import autotuning
from pwopt.selecting.autotuning import Decision, Estimate
from pwopt.selecting.combinations import combine
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.environment import Environment
from pwopt.selecting.gain_records import describe_group
from pwopt.selecting.groups import Group, group_rewrites
from pwopt.selecting.priors import Prior
from pwopt.selecting.profile_alignment import save_marked
from pwopt.selecting.profile_estimate import bound_speedups, estimate
from pwopt.selecting.tuning_records import TuningRecords

LOG = logging.getLogger(__name__)

#: Seconds to profile two models (and half of that for each other one), and the least number of runs of each.
ESTIMATE_SECONDS, ESTIMATE_RUNS = 0.4, 4
#: The least number of runs of a model that takes so many milliseconds. Slow operators vary less.
SLOW_MS, SLOW_RUNS = 250.0, 2
#: The same to profile the model without any group, for bounds.
BOUND_SECONDS, BOUND_RUNS = 0.1, 2


@dataclass(frozen=True)
class Candidates:
    """Measured rewrites that could be made.

    Attributes
    ----------
    groups : tuple of Group
        Rewrites that look alike form a group.
    refused : tuple of Skip
    priors : mapping of str to Prior
        Pass name → how often the pass paid before.
    thorough : bool
        Whether to try passes too that hardly ever paid on machines like this one.
    """

    groups: tuple[Group, ...]
    refused: tuple[Skip, ...]
    priors: Mapping[str, Prior]
    thorough: bool = False

    def order(self) -> list[Group]:
        """The groups in the order of races: those first that are likely to gain most."""
        return sorted(self.groups, key=lambda g: -self.priors.get(g.pass_name, Prior()).expected_gain)

    def unprofitable(self) -> dict[str, Prior]:
        """The passes that are not tried."""
        return {} if self.thorough else {name: p for name, p in self.priors.items() if p.unprofitable}


@dataclass(frozen=True)
class Selection:
    """The measured rewrites that are made.

    Attributes
    ----------
    allowed : frozenset of Site or None
        Their sites; None if shapes alone decide.
    dropped : tuple of Skip
        Why the others are not made.
    decisions : tuple of Decision
    hint : str
        What to do about races that ended in doubt, as a sentence.
    """

    allowed: frozenset[Site] | None = None
    dropped: tuple[Skip, ...] = ()
    decisions: tuple[Decision, ...] = ()
    hint: str = ""

    @classmethod
    def from_decisions(cls, candidates: Candidates, decisions: Sequence[Decision], records: TuningRecords) -> Selection:
        """Keep the sites of the groups that pay, and record why the others were dropped."""
        kept = frozenset(site for d in decisions if d.kept for site in d.group.sites)
        decided = {d.group for d in decisions}
        undecided = [
            Skip(join_clauses(g.details, records.undecided_reason), site)
            for g in candidates.groups
            if g not in decided
            for site in g.sites
        ]
        left = [s for s in (*(s for d in decisions for s in d.skips()), *undecided) if s.site not in kept]
        dropped = (*candidates.refused, *left)
        return cls(kept, dropped, tuple(decisions), records.doubt_advice)


def _join_sites(groups: Sequence[Group]) -> frozenset[Site]:
    return frozenset(site for g in groups for site in g.sites)


def find_candidates(compilation: Compilation, records: TuningRecords, *, thorough: bool = False) -> Candidates:
    """Find the measured rewrites that each pass could make."""
    found, refused = compilation.find_opportunities()
    priors = records.priors(compilation.provider_kind)
    alone = group_rewrites(r for r in found if not r.enabled_by)
    joint, useless = combine([r for r in found if r.enabled_by], alone)
    # A combination comes first: if it pays, its parts need no race.
    return Candidates((*joint, *alone), (*refused, *useless), priors, thorough)


def decide(
    compilation: Compilation, candidates: Candidates, environment: Environment | None, seconds: float,
    records: TuningRecords, progress: Progress,
) -> list[Decision]:  # fmt: skip
    """Race the candidates unless records decide; without an environment or seconds, only the records count."""
    evaluator = RacingEvaluator(compilation, environment, records, candidates.unprofitable())
    seconds = 0.0 if environment is None else seconds
    decisions = autotuning.race_groups(candidates.order(), evaluator, seconds, progress)
    for d in decisions:
        if d.raced and not d.remembered:
            records.store(d)
    return decisions


class _Profiled(NamedTuple):
    """A model, the rewrites that made it, and its file for the profiler."""

    proto: onnx.ModelProto
    rewrites: tuple[Rewrite, ...]
    path: Path
    #: Runs of the model alone under the profiler.
    runs: tuple[tuple[NodeTime, ...], ...] = ()

    @property
    def whole(self) -> float:
        """Milliseconds of a run: the median; 0 if it was not profiled."""
        return statistics.median(1e3 * sum(t.seconds for t in run) for run in self.runs) if self.runs else 0.0


@dataclass(frozen=True)
class RacingEvaluator:
    """Evaluates the groups of one compilation by races in one environment; see `autotuning.CandidateEvaluator`."""

    compilation: Compilation
    environment: Environment | None
    records: TuningRecords
    unprofitable: Mapping[str, Prior] = field(default_factory=dict)
    _files: dict[tuple[Site, ...], Path] = field(default_factory=dict)
    _base: dict[frozenset[Site], _Profiled] = field(default_factory=dict)

    def build(self, sites: frozenset[Site]) -> Path:
        result = self.compilation.rewrite(sites)
        made = tuple(r.site for r in result.rewrites)
        if made not in self._files:
            self._files[made] = self.compilation.write_file(result.proto)
        return self._files[made]

    def fault(self, model: Path) -> str:
        return "" if self.environment is None else self.environment.fault(model)

    def race(self, a: Path, b: Path, seconds: float, known: timing.Evidence, promise: float) -> timing.Race | str:
        assert self.environment is not None
        rules = timing.Rules(timing.CONFIDENCE, autotuning.WORTH, known=known, promise=promise)
        try:
            return self.environment.race([a, b], seconds, rules=rules)
        except UnusableError as error:
            return str(error)

    def least_provable(self, seconds: float) -> float:
        worker = self._find_worker()
        if worker is None:
            return 1.0
        load, run = worker.took
        return timing.least_provable(int(seconds / (2 * (load + (2 + timing.MIN_PAIR_ROUNDS) * run))))

    def bound(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, float]:
        worker, base = self._find_worker(), self._build_base(kept)
        if worker is None:
            return {}
        try:
            runs, _ = worker.profiles([base.path], BOUND_SECONDS, BOUND_RUNS, sessions=1)
        except UnusableError as error:
            LOG.info("the profile of the model cannot be used: %s", error)
            return {}
        self._base[_join_sites(kept)] = base._replace(runs=tuple(map(tuple, runs[0])))
        return bound_speedups(base.proto, groups, runs[0])

    def estimate(self, kept: Sequence[Group], groups: Sequence[Group]) -> Mapping[Group, Estimate]:
        worker = self._find_worker()
        if worker is None:
            return {}
        before = self._build_base(kept)
        keys = {g: self._describe(before, g) for g in groups}
        found = {g: each for g, key in keys.items() if (each := self._recall_gain(key, before.whole)) is not None}
        unknown = [g for g in groups if g not in found]
        if unknown:
            profiled = self._profile(worker, kept, unknown)
            for g, each in profiled.items():
                if (key := keys[g]) is not None and each.sure:
                    self.records.store_gain(key, each, before.whole)
            found |= profiled
        return found

    def _describe(self, base: _Profiled, group: Group) -> str | None:
        """Describe a group for records of gains; None if the model was not profiled, or sizes are unknown."""
        if not base.runs:
            return None
        sizes = self.compilation.snapshot(tuple(self.compilation.denied)).sizes
        return describe_group(base.proto, sizes, group, base.runs[0], self.records.mark(group.pass_name))

    def _recall_gain(self, key: str | None, whole: float) -> Estimate | None:
        record = None if key is None else self.records.recall_gain(key)
        return None if record is None else record.to_estimate(whole)

    def _profile(self, worker: Worker, kept: Sequence[Group], groups: Sequence[Group]) -> dict[Group, Estimate]:
        """Profile the model with the groups of each pass beside the model without any."""
        base, before = _join_sites(kept), self._build_base(kept)
        names = dict.fromkeys(g.pass_name for g in groups)
        parts = [[g for g in groups if g.pass_name == name] for name in names]
        after = [self._build_profiled(base.union(*(g.sites for g in p)), f"look{k}") for k, p in enumerate(parts)]
        paths = [each.path for each in (before, *after)]
        try:
            least = SLOW_RUNS if before.whole > SLOW_MS else ESTIMATE_RUNS
            runs, share = worker.profiles(paths, ESTIMATE_SECONDS * len(paths) / 2, least)
        except UnusableError as error:
            LOG.info("profiles of %s cannot be used: %s", ", ".join(names), error)
            alone = parts if len(parts) > 1 else []
            return {g: each for p in alone for g, each in self._profile(worker, kept, p).items()}
        found: dict[Group, Estimate] = {}
        for part, each, own in zip(parts, after, runs[1:], strict=True):
            found |= estimate(before.proto, each.proto, (before.rewrites, each.rewrites), part, (runs[0], own))
        return {g: each._replace(sure=share >= autotuning.BUSY) for g, each in found.items()}

    def _find_worker(self) -> Worker | None:
        worker = self.environment.worker if self.environment is not None else None
        return worker if worker is not None and worker.ready else None

    def _build_base(self, kept: Sequence[Group]) -> _Profiled:
        """Build the model with the kept groups only."""
        base = _join_sites(kept)
        if base not in self._base:  # candidates are large, and one base after another is asked for
            self._base.clear()
            self._base[base] = self._build_profiled(base, "base")
        return self._base[base]

    def _build_profiled(self, sites: frozenset[Site], name: str) -> _Profiled:
        result = self.compilation.rewrite(sites)
        path = save_marked(result.proto, self.compilation.folder / f"{name}.onnx", self.compilation.source)
        return _Profiled(result.proto, result.rewrites, path)

    def recall(self, group: Group) -> Decision | None:
        known = self.records.recall(group.pass_name, group.signature)
        if known is None:
            prior = self.unprofitable.get(group.pass_name)
            if prior is None:
                return None
            paid = f"it paid in {prior.kept} of {prior.decided} cases on processors like this"
            return Decision(group, not_raced=f"not tried, since {paid}; --effort thorough does")
        confirmed = known.evidence if known.profiled == "kept" else None
        return Decision(
            group,
            known.evidence,
            True,
            estimated=bool(known.profiled),
            confirmed=confirmed,
            origin=self.records.origin,
        )
