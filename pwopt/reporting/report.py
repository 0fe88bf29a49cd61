"""The report of an optimisation or a comparison, and its JSON layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from pwopt.errors import UsageError
from pwopt.evidence.equivalence import Equivalence
from pwopt.graph.json_files import read_json, read_record
from pwopt.graph.shapes import format_shape
from pwopt.maps.cost import NO_COST, Cost
from pwopt.rewriting.records import Rewrite, Site, Skip
from pwopt.rewriting.wording import format_count
from pwopt.running.bench import Row
from pwopt.running.timing import Evidence, Race

#: Version of the JSON layout; it increases when a field changes its meaning.
REPORT_SCHEMA = 2


#: A model that is slower than another by less than this fraction counts as equally fast.
NEGLIGIBLE_SLOWDOWN = 0.01


@dataclass(frozen=True)
class Start:
    """The time to start a session of the original and of the result: processor time in milliseconds.

    Attributes
    ----------
    creation_ms, first_run_ms : tuple of float
        Medians over the pairs of a race, of the original and of the result. The first run allocates memory.
    speedup : float
        Creation time of the original divided by that of the result: the geometric mean over the pairs.
    interval : tuple of float
        99 % confidence interval of `speedup`.
    memory_mb : tuple of float, or None
        Peak memory that creation and first run add to a new process; None if not measured.
    """

    creation_ms: tuple[float, float]
    first_run_ms: tuple[float, float]
    speedup: float
    interval: tuple[float, float]
    memory_mb: tuple[float, float] | None = None

    @classmethod
    def from_race(cls, race: Race) -> Start | None:
        """Compute the figures from a race of fresh sessions; None if their starts were not timed."""
        if not race.pairs[0].creation:
            return None
        evidence = Evidence.from_logs(race.creation_logs(1))
        creation = (race.creation(0) * 1e3, race.creation(1) * 1e3)
        first_run = (race.first_run(0) * 1e3, race.first_run(1) * 1e3)
        return cls(creation, first_run, evidence.speedup, evidence.interval())


@dataclass(frozen=True)
class Latency:
    """Time per run of both models, measured in interleaved rounds.

    Attributes
    ----------
    before_ms, after_ms : float
        Medians in milliseconds.
    speedup : float
        before / after: the geometric mean over pairs of fresh sessions.
    interval : tuple of float
        99 % confidence interval of the speed-up. New sessions of both models should confirm it.
    before_min_ms, after_min_ms : float
    rounds, pairs : int
        Runs of each model, and pairs of fresh sessions.
    control : float or None
        The speed-up of a copy of the original. Its distance from 1 is the error of the clock.
    control_interval : tuple of float, or None
    start : Start or None
        The time to start sessions of both models.
    """

    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    before_min_ms: float
    after_min_ms: float
    rounds: int
    pairs: int = 0
    control: float | None = None
    control_interval: tuple[float, float] | None = None
    start: Start | None = None

    @classmethod
    def from_race(cls, race: Race) -> Latency:
        """Compute the latency from a race of an original, a candidate, and optionally a copy of the original."""
        controlled = len(race.pairs[0].times) > 2
        return cls(
            race.median(0) * 1e3, race.median(1) * 1e3, race.speedup(), race.interval(),
            race.minimum(0) * 1e3, race.minimum(1) * 1e3, race.rounds, len(race.pairs),
            race.speedup(2) if controlled else None, race.interval(2) if controlled else None, Start.from_race(race),
        )  # fmt: skip

    @property
    def noise(self) -> float:
        """The speed-up or slow-down of a copy of the original, at least 1."""
        return 1.0 if self.control is None else max(self.control, 1 / self.control)

    @property
    def faster(self) -> bool:
        """Whether the model is surely faster: the interval lies above 1 and above the ratio of a copy."""
        return self.interval[0] > self.noise

    @property
    def slower(self) -> bool:
        """Whether the model is surely slower, by a fraction that may reach `NEGLIGIBLE_SLOWDOWN`."""
        return self.interval[1] < 1 / self.noise and not self.same

    @property
    def same(self) -> bool:
        """Whether the second model is surely not slower by `NEGLIGIBLE_SLOWDOWN` or more."""
        return self.interval[0] > 1 - NEGLIGIBLE_SLOWDOWN

    def compare_with_self(self) -> Latency:
        """Return the figures of the first model compared with itself."""
        return replace(
            self, after_ms=self.before_ms, after_min_ms=self.before_min_ms, speedup=1.0, interval=(1.0, 1.0), start=None
        )

    @property
    def apart(self) -> bool:
        """Whether the ratio of the medians lies outside the interval of the speed-up."""
        return not self.interval[0] * self.after_ms <= self.before_ms <= self.interval[1] * self.after_ms

    def contradiction(self) -> str:
        """Explain a speed-up that contradicts the medians; "" if they agree."""
        return explain_contradiction(self.before_ms, self.after_ms, self.speedup)


def explain_contradiction(before_ms: float, after_ms: float, ratio: float) -> str:
    """Explain a ratio of two models that contradicts their medians; "" if they agree."""
    if (ratio - 1) * (before_ms - after_ms) >= 0:
        return ""
    return (
        f"The medians ({before_ms:.3g} → {after_ms:.3g} ms) and the ratio ({ratio:.3f}×) point opposite ways. "
        "The ratio decides: it compares adjacent runs, which slow phases of the machine affect equally."
    )


@dataclass(frozen=True)
class RejectedCandidate:
    """A rewritten model that was timed against the original and not returned."""

    cost: Cost
    latency: Latency
    conditions: tuple[ConditionLatency, ...] = ()
    operators: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class ConditionLatency:
    """Time per run of both models with other threads, input sizes or memory pages than the first condition.

    Attributes
    ----------
    threads : int
    shapes : dict
        Input name → sizes.
    latency : Latency
    slower : bool
        Whether the result is surely slower (`Latency.slower`), also than a copy of the original.
    small_pages : bool
        Whether the process had pages of 4 KiB, and that of the first condition huge pages.
    """

    threads: int
    shapes: dict[str, tuple[int, ...]]
    latency: Latency
    slower: bool = False
    small_pages: bool = False

    def compare_with_self(self) -> ConditionLatency:
        """Return the figures of the first model compared with itself."""
        return replace(self, latency=self.latency.compare_with_self(), slower=False)

    @property
    def label(self) -> str:
        sizes = ", ".join(f"{name} {format_shape(shape)}" for name, shape in self.shapes.items())
        pages = ", pages of 4 KiB" if self.small_pages else ""
        return f"{format_count(self.threads, 'thread')}, {sizes}{pages}"


#: Name of the layer of operators that onnxruntime inserts to change the memory layout.
LAYOUT_CHANGES = "changes of layout"


@dataclass(frozen=True)
class Layer:
    """Operators of the original ("Op name"), the operators that replace them, and milliseconds per run of both."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class Report:
    """Result of one optimisation: rewrites, skipped sites, and measurements.

    Attributes
    ----------
    model, output : str
        Files of the original and of the result.
    provider, environment
        Where both models ran.
    shapes : dict
        Input name → sizes of all figures.
    rewrites, skips
        The rewrites, and the places that were not rewritten, with reasons.
    before, after : Cost
        Sizes of the original and of the returned model.
    equivalence : Equivalence or None
        Comparison of the rewritten model with the original; None if it was not run.
    latency : Latency or None
        Latency of the returned model; None if it was not measured.
    conditions : tuple of ConditionLatency
        Times with other threads, input sizes or memory pages.
    operators : dict or None
        Milliseconds by operator, "before" and "after"; None if not measured.
    candidate : RejectedCandidate or None
        The rewritten model if the original was returned instead.
    command : str or None
        The command line that repeats the run.
    notes : tuple of str
        Sentences about the result.
    layers : tuple of Layer or None
        Time by groups of operators that onnxruntime runs as one; None if not measured.
    passes : dict
        Name → identity of every pass that took part.
    huge_pages : tuple of float, or None
        The original's time with pages of 4 KiB over its time with huge pages, and both ends of the 99 % confidence
        interval; None if not measured, or where programs cannot choose.
    """

    model: str
    output: str | None
    provider: str
    environment: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()
    before: Cost = NO_COST
    after: Cost = NO_COST
    equivalence: Equivalence | None = None
    latency: Latency | None = None
    conditions: tuple[ConditionLatency, ...] = ()
    operators: dict[str, dict[str, float]] | None = None
    candidate: RejectedCandidate | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] | None = None
    passes: dict[str, str] = field(default_factory=dict)
    huge_pages: tuple[float, float, float] | None = None

    @property
    def result(self) -> str | None:
        """The file of the result."""
        return self.output

    @property
    def has_huge_pages(self) -> bool:
        """Whether the process of the first condition really had huge pages."""
        return bool(self.environment.get("huge_pages_mb"))

    @property
    def slowest_condition(self) -> ConditionLatency | None:
        """The condition under which the result is slowest; None if it is not surely slower under any."""
        return min((c for c in self.conditions if c.slower), key=lambda c: c.latency.speedup, default=None)

    def list_latencies(self) -> Iterator[Latency]:
        """List the latencies of the returned model and of the candidate, under all conditions."""
        for of in (self, self.candidate):
            if of is not None:
                yield from (t for t in (of.latency, *(c.latency for c in of.conditions)) if t is not None)

    def add_notes(self, *notes: str) -> Report:
        """Return a copy with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def to_dict(self) -> dict[str, Any]:
        """Convert to the JSON layout that docs/report.md documents."""
        return {
            "schema": REPORT_SCHEMA,
            "model": self.model,
            "output": self.output,
            "provider": self.provider,
            "environment": self.environment,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "rewrites": [
                {
                    "pass": r.pass_name,
                    "site": str(r.site),
                    "reason": r.reason,
                    "removed": list(r.removed),
                    "added": list(r.added),
                    "macs_before": r.macs_before,
                    "macs_after": r.macs_after,
                    "residual": r.residual,
                    "growth": r.growth,
                    "certificate": None if r.certificate is None else asdict(r.certificate),
                    "became": [list(pair) for pair in r.became],
                }
                for r in self.rewrites
            ],
            "passes": self.passes,
            "skips": [{"pass": s.pass_name, "site": str(s.site), "reason": s.reason} for s in self.skips],
            "cost": {"before": asdict(self.before), "after": asdict(self.after)},
            "equivalence": None if self.equivalence is None else _read_equivalence(self.equivalence),
            "latency": None if self.latency is None else asdict(self.latency),
            "conditions": [asdict(c) for c in self.conditions],
            "huge_pages": self.huge_pages,
            "operators": self.operators,
            "layers": None if self.layers is None else [asdict(layer) for layer in self.layers],
            "candidate": None if self.candidate is None else asdict(self.candidate),
            "command": self.command,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return to_json(self.to_dict())


@dataclass(frozen=True)
class Comparison:
    """A comparison of two models."""

    model: str
    candidate: str
    provider: str
    environment: dict[str, Any]
    equivalence: Equivalence
    command: str | None = None

    @property
    def result(self) -> str:
        return self.candidate

    def to_json(self) -> str:
        """Convert to the JSON layout that docs/report.md documents."""
        content = {
            "schema": REPORT_SCHEMA,
            "model": self.model,
            "candidate": self.candidate,
            "provider": self.provider,
            "tf32": False,
            "shapes": self.equivalence.shapes,
            "environment": self.environment,
            "equivalence": _read_equivalence(self.equivalence),
            "command": self.command,
        }
        return to_json(content)


def _read_equivalence(found: Equivalence) -> dict[str, Any]:
    content = {**asdict(found), "inputs": list(map(str, found.inputs))}
    if found.difference is not None:
        del content["difference"]["assumed"]
        content["difference"]["sites"] = [str(site) for site in found.difference.sites]
    return content


def to_json(value: Any) -> str:
    """Convert to strict JSON: infinities and NaN become strings, because JSON has no such numbers."""

    def strict(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: strict(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [strict(x) for x in v]
        return str(v) if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(strict(value), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def read_rewrites(path: Path) -> tuple[Rewrite, ...]:
    """Read the rewrites from a JSON report of `optimize`.

    Raises
    ------
    UsageError
        If the file is not such a report.
    """
    try:
        return tuple(_read_rewrite(content) for content in read_json(path)["rewrites"])
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{str(path)!r} is not a JSON report of pwopt optimize ({error!r})") from error


@dataclass(frozen=True)
class _RewriteFields:
    """The fields of a rewrite that comparisons read from a report."""

    reason: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    macs_before: int
    macs_after: int
    residual: float
    became: tuple[tuple[str, str], ...]
    site: str


def _read_rewrite(content: Mapping[str, Any]) -> Rewrite:
    fields = read_record(_RewriteFields, {f.name: content[f.name] for f in dataclass_fields(_RewriteFields)})
    return Rewrite(
        fields.reason, fields.removed, fields.added, fields.macs_before, fields.macs_after, fields.residual,
        fields.became, site=Site.parse(fields.site),
    )  # fmt: skip


def format_benchmark_json(rows: Sequence[Row], environment: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """Format the JSON that `pwopt bench --report` writes."""
    records = [asdict(r) for r in rows]
    return to_json({"schema": REPORT_SCHEMA, "environment": environment, "rows": records, "notes": list(notes)})
