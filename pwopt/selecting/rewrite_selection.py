"""Which measured rewrites are made: a model to rewrite, a place to race, and a memory of earlier decisions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Protocol

import onnx

from pwopt.graph.files import save
from pwopt.graph.memo import LATEST, digest
from pwopt.graph.model import Model
from pwopt.graph.shapes import skeleton
from pwopt.graph.storage import total_bytes
from pwopt.inputs.samples import Sample
from pwopt.maps.cost import Cost
from pwopt.rewriting.driver import Certifier, Pass
from pwopt.rewriting.records import Outcome, Rewrite, Site, Skip
from pwopt.rewriting.wording import counted
from pwopt.running import timing
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider
from pwopt.running.session import Session
from pwopt.running.worker import UnusableError, Worker
from pwopt.selecting import autotuning as tune
from pwopt.selecting.cache import TuningRecord, look_up, place, store, stored
from pwopt.selecting.operator_matching import marked
from pwopt.selecting.priors import Prior, priors
from pwopt.selecting.profile_estimate import look
from pwopt.selecting.snapshot import Snapshot, Wanted, select_passes

LOG = logging.getLogger(__name__)

#: What to say of a rewrite that its certificate refuses.
DEFECT = "a defect of pwopt, please report it with the model"
#: A model, the rewrites that made it, and its file for the profiler, if it can have one.
Numbered = tuple[onnx.ModelProto, tuple[Rewrite, ...], Path | None]
#: Seconds for profiles of two models, and runs of each at least.
LOOK_SECONDS, LEAST_RUNS = 1.0, 4
#: How often rewriting starts anew without what certificates refused.
MAX_REFUSALS = 8


@dataclass(frozen=True)
class Environment:
    """Where models run: a provider, threads, and inputs."""

    provider: Provider
    threads: int
    samples: list[Sample]
    #: Tries models first, where they can do no harm.
    worker: Worker | None = None

    def fault(self, model: Path) -> str:
        """Why a model cannot be used here, as a clause, else ""."""
        return "" if self.worker is None else self.worker.fault(model)

    def race(
        self,
        models: Sequence[Path],
        seconds: float,
        progress: Progress = ignore_progress,
        rules: timing.Rules = timing.TO_THE_END,
    ) -> timing.Race:
        """As users run them: on CUDA, that is with TF32."""
        feeds = self.samples[0].feeds
        if self.worker is not None and self.worker.ready:
            return self.worker.race(models, self.threads, feeds, seconds, rules, progress)
        openers = [partial(Session, m, self.provider, self.threads, tf32=True) for m in models]
        return timing.race(openers, feeds, seconds, progress, rules)


@dataclass(frozen=True)
class Selection:
    """Which measured rewrites are made.

    Attributes
    ----------
    allowed : frozenset of str or None
        Their sites; None for those that a shape alone decides.
    dropped : tuple of Skip
        Why the others are not made.
    notes : tuple of str
        What a user should know of the races.
    """

    allowed: frozenset[Site] | None = None
    dropped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compilation:
    """A model to rewrite, as often as needed, and a folder for the results."""

    target: Model
    source: Model
    passes: Sequence[Wanted] | None
    denied: Iterable[Site]
    sizes: Mapping[str, Sequence[int]]
    folder: Path
    #: The kind of provider that it is for (`pwopt.running.providers.Provider.kind`).
    kind: str = "cpu"
    #: The fraction by which the model may grow; None for any.
    max_growth: float | None = None
    #: Whether kinds of rewrites are tried that hardly ever paid on machines like this one.
    thorough: bool = False
    #: Just the passes that need no cost to judge them.
    always_only: bool = False
    #: Sites that turned out not to be worth it, each with the reason.
    refused: Mapping[Site, Skip] = field(default_factory=dict)
    #: Judges every rewrite that a result is made of.
    certifier: Certifier | None = None
    #: What the passes without a clock leave, by what is denied to them: shared by all versions of this work.
    snapshots: dict[tuple[bool, frozenset[Site]], Snapshot] = field(default_factory=dict, repr=False, compare=False)
    #: Sentences on those, for the user.
    notes: tuple[str, ...] = ()

    def certified(
        self, allowed: frozenset[Site] | None
    ) -> tuple[Cost, Outcome, Cost, onnx.ModelProto, dict[Site, Skip]]:
        """`rewrite`, again without the sites whose certificates fail or that grow too much; those last, by site."""
        refused = dict(self.refused)
        for _ in range(MAX_REFUSALS):
            done = self.rewrite(allowed, self.certifier, refused)
            failed = [r for r in done[1].rewrites if r.certificate is not None and not r.certificate.passed]
            heavy = [] if failed else self._heavy(done[1].rewrites, done[3])
            if not failed and not heavy:
                return *done, refused
            mine = {p.name for p in select_passes(self.passes) if p.builtin}
            refused.update((r.site, Skip(_refusal(r, r.pass_name in mine), r.site)) for r in failed)
            refused.update((r.site, Skip(_too_large(r), r.site)) for r in heavy)
        raise RuntimeError(f"certificates refuse rewrites at {', '.join(map(str, refused))}")

    def _heavy(self, rewrites: Iterable[Rewrite], proto: onnx.ModelProto) -> list[Rewrite]:
        """The largest of what made the model grow too much."""
        if self.max_growth is None:
            return []
        before = total_bytes(self.source.proto)
        excess = total_bytes(proto) - before - self.max_growth * before
        found = []
        for r in sorted(rewrites, key=lambda r: -r.growth):
            if excess <= 0 or r.growth <= 0:
                break
            found.append(r)
            excess -= r.growth
        return found

    def rewrite(
        self, allowed: frozenset[Site] | None, certifier: Certifier | None = None, refused: Iterable[Site] = ()
    ) -> tuple[Cost, Outcome, Cost, onnx.ModelProto]:
        """The model with measured rewrites at the `allowed` sites; None for those that a shape alone decides."""
        denied = (*self.denied, *self.refused, *refused)
        branch = self.settled(denied).branch(denied, certifier, eager=allowed is not None)
        return *branch.finish(allowed), branch.model.to_proto()

    def settled(self, denied: Collection[Site]) -> Snapshot:
        """The model that all passes but the measured ones are done with; the same for the same denials of theirs."""
        passes = [p for p in self.candidates() if p.policy == "always" or not self.always_only]
        measured = {p.name for p in passes if p.policy == "measured"}
        key = (self.always_only, frozenset(site for site in denied if site.pass_name not in measured))
        if key not in self.snapshots:
            if len(self.snapshots) >= LATEST:
                self.snapshots.clear()
            fresh = self.target.copy()
            self.snapshots[key] = Snapshot.of(fresh, passes, denied, self.sizes, self.certifier)
        return self.snapshots[key]

    def without(self, rewrites: Iterable[Rewrite], reason: str) -> Compilation:
        """The same, but for the sites of some rewrites; the reason is a clause."""
        gone = {r.site: Skip(f"left out ({reason}): {r.reason}", r.site) for r in rewrites}
        names = ", ".join(dict.fromkeys(s.pass_name for s in gone.values()))
        note = f"Left out: {names} at {counted(len(gone), 'place')}, {reason}."
        return replace(self, refused={**self.refused, **gone}, notes=(*self.notes, note))

    def candidates(self) -> list[Pass]:
        """Passes that were asked for by name, or those that may pay on this kind of provider."""
        return [p for p in select_passes(self.passes) if p.requested or self.kind in p.pays_on]

    def unfit(self) -> list[str]:
        """Names of the passes that may pay on onnxruntime's CPU provider, and not here."""
        fit = {p.name for p in self.candidates()}
        return [p.name for p in select_passes(self.passes) if p.name not in fit and "cpu" in p.pays_on]

    def digest(self) -> str:
        """Equal for models of the same operators, attributes and sizes, whatever their large weights."""
        return digest(skeleton(self.target.proto, self.sizes))

    def opportunities(self) -> tuple[list[Rewrite], list[Skip]]:
        """Everything that each measured pass could do by itself, and what it refuses."""
        found: list[Rewrite] = []
        refused: list[Skip] = []
        snapshot, branch = self.settled(tuple(self.denied)), None
        for p in snapshot.passes:
            if p.needs_measuring:
                branch = branch or snapshot.branch(self.denied, eager=True)
                outcome = branch.could(p.name)
                found += [r for r in outcome.rewrites if r.pass_name == p.name]
                refused += [s for s in outcome.skips if s.pass_name == p.name]
                if outcome.rewrites:
                    branch = None
        return found, refused

    def file(self, proto: onnx.ModelProto) -> Path:
        path = self.folder / f"candidate{len(list(self.folder.glob('*.onnx')))}.onnx"
        save(proto, path, self.source, lasting=False)
        return path


def _refusal(rewrite: Rewrite, mine: bool) -> str:
    c = rewrite.certificate
    assert c is not None
    fault = DEFECT if mine else f"the pass {rewrite.pass_name!r} is wrong here"
    return f"refused by its certificate ({c.reason}: residual {c.residual:.2g}, bound {c.bound:.2g}): {fault}"


def _too_large(rewrite: Rewrite) -> str:
    return f"{rewrite.reason}, but its constants take {counted(rewrite.growth, 'byte')} more than --max-growth leaves"


class Memory(Protocol):
    """Decisions on kinds of rewrites that are known already."""

    @property
    def undecided(self) -> str:
        """What to say of a kind of rewrite that was not decided."""

    @property
    def doubtful(self) -> str:
        """What to say where races ended in doubt."""

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        """The decision on one kind; None if there is none."""

    def keep(self, decision: tune.Decision) -> None:
        """Remember a race."""

    def priors(self, kind: str) -> Mapping[str, Prior]:
        """What is known of passes on a kind of provider, whatever the model."""


class NoTuningRecords:
    """No memory."""

    undecided = "no time was left to measure it; --effort or --budget give more"
    doubtful = "More of --budget decides."

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        return None

    def keep(self, decision: tune.Decision) -> None:
        pass

    def priors(self, kind: str) -> Mapping[str, Prior]:
        return priors(kind, ())


@dataclass(frozen=True)
class CachedTuningRecords:
    """This machine's cache, for a provider, a number of threads and a model (its digest)."""

    provider: Provider
    threads: int
    model: str
    #: Pass name → what it is known by besides, for passes that may change while their names stay.
    marks: Mapping[str, str] = field(default_factory=dict)
    #: What to call the model when its decisions are listed.
    name: str = ""
    undecided: str = NoTuningRecords.undecided
    doubtful: str = "The next run of this model goes on where these races ended."

    def _marked(self, pass_name: str) -> str:
        return f"{pass_name} {self.marks.get(pass_name, '')}".strip()

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        return look_up(self._marked(pass_name), signature, place(self.provider, self.threads), self.model)

    def keep(self, decision: tune.Decision) -> None:
        made = entry(decision, place(self.provider, self.threads))
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        marked = self._marked(made.pass_name)
        store(replace(made, pass_name=marked, model=self.model, name=self.name, date=date))

    def priors(self, kind: str) -> Mapping[str, Prior]:
        where = place(self.provider, self.threads)
        return priors(kind, (e for e in stored() if e.place == where and e.model))


def entry(decision: tune.Decision, where: str) -> TuningRecord:
    """What is kept of a decision."""
    group, e = decision.group, decision.evidence
    return TuningRecord(
        group.pass_name, group.signature, where, e.pairs, e.total, e.squares,
        profiled=("kept" if decision.kept else "dropped") if decision.looked else "",
    )  # fmt: skip


def decide(
    work: Compilation, arena: Environment | None, budget: float, memory: Memory, progress: Progress
) -> list[tune.Decision]:
    """Race what measured passes could do, unless it is remembered; without an arena, or time, only that counts."""
    return _decide(work, work.opportunities()[0], arena, budget, memory, progress)


def select(
    work: Compilation, arena: Environment | None, budget: float, memory: Memory, progress: Progress
) -> Selection:
    """Sites of the measured rewrites that pay, and why the others were dropped."""
    progress("looking for rewrites to measure", 0.0)
    found, refused = work.opportunities()
    decisions = _decide(work, found, arena, budget, memory, progress)
    kept = frozenset(site for d in decisions if d.kept for site in d.group.sites)
    undecided = [
        Skip(f"{g.signature}: {memory.undecided}", site)
        for g in tune.groups(found)
        if all(d.group != g for d in decisions)
        for site in g.sites
    ]
    skips = (*refused, *(s for d in decisions for s in d.skips()), *undecided)
    return Selection(kept, skips, tuple(_doubts(decisions, memory)))


def _doubts(decisions: Iterable[tune.Decision], memory: Memory) -> Iterator[str]:
    """Which races ended in doubt, and on a busy machine."""
    doubtful = [d for d in decisions if not d.clear]
    if doubtful:
        listed = "; ".join(f"{d.group.pass_name} {_figures(d)}" for d in doubtful)
        yield f"Left out in doubt: {listed}. {memory.doubtful}"
    busy = min((d.own for d in decisions if d.raced), default=1.0)
    if busy < tune.BUSY:
        yield f"The machine was busy: models had {busy:.0%} of the time that passed in a race, so that counts less."


def _figures(decision: tune.Decision) -> str:
    low, high = decision.interval
    return f"{decision.speedup:.3f}× [{low:.3f}, {high:.3f}]"


def _decide(
    work: Compilation,
    found: list[Rewrite],
    arena: Environment | None,
    budget: float,
    memory: Memory,
    progress: Progress,
) -> list[tune.Decision]:
    groups, known = tune.groups(found), memory.priors(work.kind)
    groups.sort(key=lambda g: -known.get(g.pass_name, Prior()).expected)
    vain = {} if work.thorough else {name: p for name, p in known.items() if p.vain}
    judge = Judge(work, arena, memory, vain)
    decisions = tune.choose(groups, judge, 0.0 if arena is None else budget, progress)
    for d in decisions:
        if d.raced and not d.remembered:
            memory.keep(d)
    return decisions


@dataclass(frozen=True)
class Judge:
    """Decides on groups of one work by races in one arena; see `tune.Judge`."""

    work: Compilation
    arena: Environment | None
    memory: Memory
    #: Passes that are not worth a try on machines like this one, with what is known of them.
    vain: Mapping[str, Prior] = field(default_factory=dict)
    _files: dict[tuple[Site, ...], Path] = field(default_factory=dict)
    _base: dict[frozenset[Site], Numbered] = field(default_factory=dict)

    def build(self, sites: frozenset[Site]) -> Path:
        _, outcome, _, proto = self.work.rewrite(sites)
        made = tuple(r.site for r in outcome.rewrites)
        if made not in self._files:
            self._files[made] = self.work.file(proto)
        return self._files[made]

    def fault(self, model: Path) -> str:
        return "" if self.arena is None else self.arena.fault(model)

    def race(self, a: Path, b: Path, seconds: float, known: timing.Evidence) -> timing.Race | str:
        assert self.arena is not None
        rules = timing.Rules(timing.CONFIDENCE, tune.WORTH, known)
        try:
            return self.arena.race([a, b], seconds, rules=rules)
        except UnusableError as error:
            return str(error)

    def look(self, kept: Sequence[tune.Group], groups: Sequence[tune.Group]) -> Mapping[tune.Group, tune.Estimate]:
        worker = self.arena.worker if self.arena is not None else None
        if worker is None or not worker.ready:
            return {}
        base = frozenset(site for g in kept for site in g.sites)
        if base not in self._base:  # of one kind after another; candidates are large, and not asked for again
            self._base.clear()
            self._base[base] = self._numbered(base, "base")
        before, _, a = self._base[base]
        after, rewrites, b = self._numbered(base.union(*(g.sites for g in groups)), "look")
        if a is None or b is None:
            return {}
        try:
            runs, own = worker.profiles([a, b], LOOK_SECONDS, LEAST_RUNS)
        except UnusableError as error:
            LOG.info("a look at %s tells nothing: %s", groups[0].pass_name, error)
            return {}
        seen = look(before, after, rewrites, groups, (runs[0], runs[1]))
        return {g: glance._replace(sure=own >= tune.BUSY) for g, glance in seen.items()}

    def _numbered(self, sites: frozenset[Site], name: str) -> Numbered:
        """A model with the rewrites of these sites."""
        _, outcome, _, proto = self.work.rewrite(sites)
        return proto, outcome.rewrites, marked(proto, self.work.folder / name / "model.onnx")

    def remembered(self, group: tune.Group) -> tune.Decision | None:
        known = self.memory.recall(group.pass_name, group.signature)
        if known is None:
            prior = self.vain.get(group.pass_name)
            if prior is None:
                return None
            paid = f"it paid in {prior.kept} of {prior.asked} cases on processors like this"
            return tune.Decision(group, settled=f"not tried, since {paid}; --effort thorough does")
        confirmed = known.evidence if known.profiled == "kept" else None
        return tune.Decision(group, known.evidence, True, looked=bool(known.profiled), confirmed=confirmed)
