"""Which measured rewrites are made: a model to rewrite, a place to race, and a memory of earlier decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import onnx

from pwopt.graph.files import from_proto, save
from pwopt.graph.memo import digest
from pwopt.graph.model import Model
from pwopt.graph.shapes import skeleton
from pwopt.graph.storage import total_bytes
from pwopt.maps.cost import Cost
from pwopt.rewriting.driver import Certifier, Pass
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Outcome, Rewrite, Skip
from pwopt.rewriting.wording import counted
from pwopt.running import timing
from pwopt.running.progress import Progress
from pwopt.running.runtime import Session
from pwopt.running.samples import Sample
from pwopt.running.worker import Worker
from pwopt.selecting import tune
from pwopt.selecting.cache import Entry, look_up, place, store
from pwopt.selecting.compiler import Wanted, concrete_sizes, run_pipeline, select_passes, settle

#: What to say of a rewrite that its certificate refuses.
DEFECT = "a defect of pwopt, please report it with the model"
#: How often rewriting starts anew without what certificates refused.
MAX_REFUSALS = 8


@dataclass(frozen=True)
class Arena:
    """Where models run: a provider, threads, and inputs."""

    provider: str
    threads: int
    samples: list[Sample]
    #: Tries models first, where they can do no harm.
    worker: Worker | None = None

    def fault(self, model: Path) -> str:
        """Why a model cannot be used here, as a clause, else ""."""
        return "" if self.worker is None else self.worker.fault(model)

    def session(self, model: Path, **options: bool) -> Session:
        return Session(model, self.provider, self.threads, **options)

    def race(
        self,
        models: Sequence[Path],
        seconds: float,
        progress: Callable[[float], None] = lambda _: None,
        decided: float | None = None,
        least: int = timing.MIN_ROUNDS,
    ) -> timing.Race:
        """As users run them: on CUDA, that is with TF32."""
        sessions = [self.session(m, tf32=True) for m in models]
        return timing.race(sessions, self.samples[0].feeds, seconds, progress, decided=decided, least=least)


@dataclass(frozen=True)
class Choice:
    """Which measured rewrites are made.

    Attributes
    ----------
    allowed : frozenset of str or None
        Their sites; None for those that a shape alone decides.
    dropped : tuple of Skip
        Why the others are not made.
    """

    allowed: frozenset[str] | None = None
    dropped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Work:
    """A model to rewrite, as often as needed, and a folder for the results."""

    target: Model
    source: Model
    passes: Sequence[Wanted] | None
    denied: Iterable[str]
    sizes: Mapping[str, Sequence[int]]
    folder: Path
    #: The kind of provider that it is for (`pwopt.running.providers.Provider.kind`).
    kind: str = "cpu"
    #: The fraction by which the model may grow; None for any.
    max_growth: float | None = None
    #: Just the passes that need no cost to judge them.
    always_only: bool = False
    #: Sites that turned out not to be worth it, each with the reason.
    refused: Mapping[str, Skip] = field(default_factory=dict)
    #: Sentences on those, for the user.
    notes: tuple[str, ...] = ()

    def certified(
        self, allowed: frozenset[str] | None, certifier: Certifier
    ) -> tuple[Cost, Outcome, Cost, onnx.ModelProto, dict[str, Skip]]:
        """`rewrite`, again without the sites whose certificates fail or that grow too much; those last, by site."""
        refused = dict(self.refused)
        for _ in range(MAX_REFUSALS):
            done = self.rewrite(allowed, certifier, refused)
            failed = [r for r in done[1].rewrites if r.certificate is not None and not r.certificate.passed]
            heavy = [] if failed else self._heavy(done[1].rewrites, done[3])
            if not failed and not heavy:
                return *done, refused
            mine = {p.name for p in select_passes(self.passes) if p.own}
            refused.update((r.site, Skip(_refusal(r, r.pass_name in mine), r.pass_name, r.site)) for r in failed)
            refused.update((r.site, Skip(_too_large(r), r.pass_name, r.site)) for r in heavy)
        raise RuntimeError(f"certificates refuse rewrites at {', '.join(refused)}")

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
        self, allowed: frozenset[str] | None, certifier: Certifier | None = None, refused: Iterable[str] = ()
    ) -> tuple[Cost, Outcome, Cost, onnx.ModelProto]:
        """The model with measured rewrites at the `allowed` sites; None for those that a shape alone decides."""
        fresh = from_proto(self.target.proto, self.target.folder)
        chosen = [p for p in self.candidates() if p.policy == "always" or not self.always_only]
        for p in chosen:
            p.eager = p.eager or (p.policy == "measured" and allowed is not None)
        denied = (*self.denied, *self.refused, *refused)
        before, outcome, after = run_pipeline(fresh, chosen, denied, self.sizes, allowed, certifier)
        return before, outcome, after, fresh.to_proto()

    def without(self, rewrites: Iterable[Rewrite], reason: str) -> Work:
        """The same, but for the sites of some rewrites; the reason is a clause."""
        gone = {r.site: Skip(f"left out ({reason}): {r.reason}", r.pass_name, r.site) for r in rewrites}
        names = ", ".join(dict.fromkeys(s.pass_name for s in gone.values()))
        note = f"Left out: {names} at {counted(len(gone), 'place')}, {reason}."
        return replace(self, refused={**self.refused, **gone}, notes=(*self.notes, note))

    def candidates(self) -> list[Pass]:
        """Passes that were asked for by name, or those that may pay on this kind of provider."""
        return [p for p in select_passes(self.passes) if not p.raced or self.kind in p.pays_on]

    def unfit(self) -> list[str]:
        """Names of the measured passes that may pay on onnxruntime's CPU provider, and not here."""
        fit = {p.name for p in self.candidates()}
        return [p.name for p in select_passes(self.passes) if p.name not in fit and "cpu" in p.pays_on]

    def digest(self) -> str:
        """Equal for models of the same operators, attributes and sizes, whatever their large weights."""
        return digest(skeleton(self.target.proto, self.sizes))

    def opportunities(self) -> tuple[list[Rewrite], list[Skip]]:
        """Everything that each measured pass could do by itself, and what it refuses."""
        found: list[Rewrite] = []
        refused: list[Skip] = []
        sizes = concrete_sizes(self.target.proto, self.sizes)
        for i, p in enumerate(self.candidates()):
            if p.raced:
                fresh = from_proto(self.target.proto, self.target.folder)
                chosen = [q for j, q in enumerate(self.candidates()) if not q.raced or i == j]
                for q in chosen:
                    q.eager = q.policy == "measured"
                settle(fresh, self.denied)
                outcome = Pipeline(chosen).run(fresh.graph, denied=self.denied, sizes=sizes, reserved=fresh.names())
                found += [r for r in outcome.rewrites if r.pass_name == p.name]
                refused += [s for s in outcome.skips if s.pass_name == p.name]
        return found, refused

    def file(self, proto: onnx.ModelProto) -> Path:
        path = self.folder / f"candidate{len(list(self.folder.glob('*.onnx')))}.onnx"
        save(proto, path, self.source)
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

    def recall(self, pass_name: str, signature: str) -> Entry | None:
        """The decision on one kind; None if there is none."""

    def keep(self, decision: tune.Decision) -> None:
        """Remember a race."""


class Forgetful:
    """No memory."""

    undecided = "no time was left to measure it; --budget gives more"

    def recall(self, pass_name: str, signature: str) -> Entry | None:
        return None

    def keep(self, decision: tune.Decision) -> None:
        pass


@dataclass(frozen=True)
class Disk:
    """This machine's cache, for a provider, a number of threads and a model (its digest)."""

    provider: str
    threads: int
    model: str
    #: Pass name → what it is known by besides, for passes that may change while their names stay.
    marks: Mapping[str, str] = field(default_factory=dict)
    #: What to call the model when its decisions are listed.
    name: str = ""
    undecided: str = Forgetful.undecided

    def _marked(self, pass_name: str) -> str:
        return f"{pass_name} {self.marks.get(pass_name, '')}".strip()

    def recall(self, pass_name: str, signature: str) -> Entry | None:
        return look_up(self._marked(pass_name), signature, place(self.provider, self.threads), self.model)

    def keep(self, decision: tune.Decision) -> None:
        made = entry(decision, place(self.provider, self.threads))
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        marked = self._marked(made.pass_name)
        store(replace(made, pass_name=marked, model=self.model, name=self.name, date=date))


def entry(decision: tune.Decision, where: str) -> Entry:
    """What is kept of a decision."""
    group = decision.group
    return Entry(group.pass_name, group.signature, where, decision.speedup, *decision.interval)


def decide(work: Work, arena: Arena | None, budget: float, memory: Memory, progress: Progress) -> list[tune.Decision]:
    """Race what measured passes could do, unless it is remembered; without an arena, or time, only that counts."""
    return _decide(work, work.opportunities()[0], arena, budget, memory, progress)


def select(work: Work, arena: Arena | None, budget: float, memory: Memory, progress: Progress) -> Choice:
    """Sites of the measured rewrites that pay, and why the others were dropped."""
    progress("looking for rewrites to measure", 0.0)
    found, refused = work.opportunities()
    decisions = _decide(work, found, arena, budget, memory, progress)
    kept = frozenset(site for d in decisions if d.kept for site in d.group.sites)
    undecided = [
        Skip(f"{g.signature}: {memory.undecided}", g.pass_name, site)
        for g in tune.groups(found)
        if all(d.group != g for d in decisions)
        for site in g.sites
    ]
    return Choice(kept, (*refused, *(s for d in decisions for s in d.skips()), *undecided))


def _decide(
    work: Work, found: list[Rewrite], arena: Arena | None, budget: float, memory: Memory, progress: Progress
) -> list[tune.Decision]:
    def remembered(group: tune.Group) -> tune.Decision | None:
        known = memory.recall(group.pass_name, group.signature)
        return None if known is None else tune.Decision(group, known.speedup, (known.low, known.high), remembered=True)

    def race(a: Path, b: Path, seconds: float) -> timing.Race:
        assert arena is not None
        return arena.race([a, b], seconds, decided=tune.CONFIDENCE)

    files: dict[tuple[str, ...], Path] = {}

    def build(sites: frozenset[str]) -> Path:
        _, outcome, _, proto = work.rewrite(sites)
        made = tuple(r.site for r in outcome.rewrites)
        return files[made] if made in files else files.setdefault(made, work.file(proto))

    decisions = tune.choose(
        tune.groups(found),
        build,
        race,
        0.0 if arena is None else budget,
        progress,
        remembered,
        (lambda _: "") if arena is None else arena.fault,
    )
    for d in decisions:
        if d.raced and not d.remembered and not d.fault:
            memory.keep(d)
    return decisions
