"""Recall and store what races decided: in the cache of this machine, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Protocol

from pwopt.running.providers import Provider
from pwopt.selecting import tuning_cache
from pwopt.selecting.autotuning import Decision, Estimate
from pwopt.selecting.gain_records import GainRecord
from pwopt.selecting.priors import Prior, find_priors
from pwopt.selecting.tuning_cache import TuningRecord


class TuningRecords(Protocol):
    """What earlier races decided on kinds of rewrites."""

    @property
    def undecided_reason(self) -> str:
        """The reason for leaving out a kind of rewrite that was not decided."""

    @property
    def origin(self) -> str:
        """Where earlier decisions are found, after "measured"."""

    @property
    def doubt_advice(self) -> str:
        """A sentence on what to do about races that ended in doubt."""

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        """Return the record on one kind, or None."""

    def store(self, decision: Decision) -> None:
        """Store a decision."""

    def recall_gain(self, key: str) -> GainRecord | None:
        """Return what profiles of other models said of a group (`gain_records.describe_group`), or None."""

    def store_gain(self, key: str, estimate: Estimate, whole: float) -> None:
        """Store the estimate of a group in a model that takes `whole` milliseconds."""

    def mark(self, pass_name: str) -> str:
        """Return the name of a pass, with the fingerprint of its code where that may change."""

    def priors(self, kind: str) -> Mapping[str, Prior]:
        """Return how often each pass paid on a kind of provider, whatever the model."""


class NoGainRecords:
    """No gains: nothing is recalled and nothing is stored."""

    origin = "by an earlier run"

    def recall_gain(self, key: str) -> GainRecord | None:
        return None

    def store_gain(self, key: str, estimate: Estimate, whole: float) -> None:
        pass

    def mark(self, pass_name: str) -> str:
        return pass_name


class NoTuningRecords(NoGainRecords):
    """No records: nothing is recalled and nothing is stored."""

    undecided_reason = "no time was left to measure it; --effort or --budget give more"
    doubt_advice = "More of --budget decides."

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        return None

    def store(self, decision: Decision) -> None:
        pass

    def priors(self, kind: str) -> Mapping[str, Prior]:
        return find_priors(kind, ())


@dataclass(frozen=True)
class CachedTuningRecords:
    """The records in this machine's cache, for a provider, a number of threads and a model.

    Attributes
    ----------
    provider : Provider
    threads : int
    model : str
        The model's digest.
    marks : mapping of str to str
        Pass name → the fingerprint of its code, for passes that may change while their names stay.
    name : str
        The name of the model in listings.
    """

    provider: Provider
    threads: int
    model: str
    marks: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    undecided_reason: str = NoTuningRecords.undecided_reason
    origin: str = NoGainRecords.origin
    doubt_advice: str = "The next run of this model continues these races."

    def mark(self, pass_name: str) -> str:
        return " ".join([pass_name, *(self.marks[name] for name in pass_name.split(" + ") if name in self.marks)])

    def recall_gain(self, key: str) -> GainRecord | None:
        return tuning_cache.look_up_gain(key, tuning_cache.describe_place(self.provider, self.threads))

    def store_gain(self, key: str, estimate: Estimate, whole: float) -> None:
        where = tuning_cache.describe_place(self.provider, self.threads)
        record = GainRecord.from_estimate(key, where, estimate, whole)
        if record.plausible:
            tuning_cache.store_gain(record)

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        return tuning_cache.look_up(
            self.mark(pass_name), signature, tuning_cache.describe_place(self.provider, self.threads), self.model
        )

    def store(self, decision: Decision) -> None:
        made = record_decision(decision, tuning_cache.describe_place(self.provider, self.threads))
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        marked = self.mark(made.pass_name)
        tuning_cache.store(replace(made, pass_name=marked, model=self.model, name=self.name, date=date))

    def priors(self, kind: str) -> Mapping[str, Prior]:
        where = tuning_cache.describe_place(self.provider, self.threads)
        return find_priors(kind, (e for e in tuning_cache.read_records() if e.place == where and e.model))


def record_decision(decision: Decision, where: str) -> TuningRecord:
    """Convert a decision into a record for a place (`tuning_cache.describe_place`)."""
    group, e = decision.group, decision.evidence
    return TuningRecord(
        group.pass_name, group.signature, where, e.pairs, e.total, e.squares,
        profiled=("kept" if decision.kept else "dropped") if decision.estimated else "",
    )  # fmt: skip
