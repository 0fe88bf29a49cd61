"""Decisions of earlier races, on disk: one small file each, so that processes cannot get in each other's way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from pwopt.graph.json_files import read_json, read_record
from pwopt.graph.storage import replacing
from pwopt.running import installation
from pwopt.running.providers import Provider
from pwopt.running.timing import CONFIDENCE, Evidence
from pwopt.selecting.autotuning import is_clear

#: Where decisions are kept instead of the user's cache folder, if set.
FOLDER_VARIABLE = "PWOPT_CACHE"
#: The most pairs of sessions, and the largest logarithm of a speed-up, that a record is believed.
MAX_RECORDED_PAIRS, MAX_LOG = 1e9, 20.0


@dataclass(frozen=True)
class TuningRecord:
    """What a race on this machine said of one kind of rewrite.

    Attributes
    ----------
    pass_name, signature : str
        The kind of rewrite.
    place : str
        Provider, onnxruntime version, processor with its features, and threads; a decision holds there only.
    pairs, total, squares : float
        What the races said, in sums that later ones add to (`pwopt.running.timing.Evidence`).
    model : str
        A digest of the model that was raced; "" for a decision that holds for others too.
    name, date : str
        The file that was raced, and when (ISO 8601, UTC); "" where nobody said.
    profiled : str
        "kept" or "dropped" if profiles of its operators decided, and no race of its own; else "".
    """

    pass_name: str
    signature: str
    place: str
    pairs: float
    total: float
    squares: float
    model: str = ""
    name: str = ""
    date: str = ""
    profiled: str = ""

    @property
    def plausible(self) -> bool:
        """Whether races can have given these figures; a damaged file may hold any."""
        numbers = self.pairs, self.total, self.squares
        if not all(map(math.isfinite, numbers)) or not 0 <= self.pairs <= MAX_RECORDED_PAIRS:
            return False
        known = self.profiled in ("", "kept", "dropped")
        return known and abs(self.total) <= MAX_LOG * self.pairs and 0 <= self.squares <= MAX_LOG**2 * self.pairs

    @property
    def evidence(self) -> Evidence:
        return Evidence(self.pairs, self.total, self.squares)

    @property
    def speedup(self) -> float:
        """Of the whole model."""
        return self.evidence.speedup

    @property
    def interval(self) -> tuple[float, float]:
        """Of the speed-up, at the confidence that decides."""
        return self.evidence.interval(CONFIDENCE)

    @property
    def clear(self) -> bool:
        """Whether the races left no doubt, so that they say something of other models as well."""
        return not self.profiled and is_clear(self.evidence)

    def to_dict(self) -> dict[str, Any]:
        """As a user reads it."""
        low, high = self.interval
        return {**asdict(self), "speedup": self.speedup, "low": low, "high": high, "decision": self.verdict}

    @property
    def verdict(self) -> str:
        return self.profiled or ("kept" if self.interval[0] > 1.0 else "dropped" if self.clear else "in doubt")


def find_folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else user_cache_path("pwopt", appauthor=False) / "decisions"


def describe_place(provider: Provider, threads: int) -> str:
    """Everything that a time depends on, but the model."""
    machine = installation.describe_machine(provider, threads)
    version, card = machine["onnxruntime"], machine["device"]
    sets = hashlib.sha256(read_cpu_features().encode()).hexdigest()[:12]
    processor = f"{installation.cpu_name()} {sets}" + (f", {card}" if card else "")
    return f"{provider}, onnxruntime {version}, {processor}, {threads} threads"


def read_cpu_features() -> str:
    """The instruction sets of the processor."""
    info = installation.CPUINFO
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _make_key(entry: TuningRecord) -> tuple[str, str, str, str]:
    return entry.pass_name, entry.signature, entry.place, entry.model


def _find_path(key: tuple[str, str, str, str]) -> Path:
    return find_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def look_up(pass_name: str, signature: str, where: str, model: str = "") -> TuningRecord | None:
    """The decision on a kind of rewrite in this model, or a clear one in another; None if there is none.

    A damaged file holds no decision.
    """
    for asked in dict.fromkeys([(pass_name, signature, where, model), (pass_name, signature, where, "")]):
        entry = _read(_find_path(asked))
        if entry is not None and _make_key(entry) == asked and (model == entry.model or entry.clear):
            return entry
    return None


def _read(path: Path) -> TuningRecord | None:
    with contextlib.suppress(OSError, ValueError, OverflowError):
        record = read_record(TuningRecord, read_json(path))
        return record if record.plausible and record.pairs >= 1 else None
    return None


def store(entry: TuningRecord) -> None:
    """Keep a decision, for other models too if it is clear; a cache that cannot be written is no reason to fail."""
    for kept in (entry, replace(entry, model="")) if entry.clear else (entry,):
        path = _find_path(_make_key(kept))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(json.dumps(asdict(kept)).encode())


def read_decisions() -> Iterator[TuningRecord]:
    """All decisions that can be read, each once."""
    yield from dict.fromkeys(replace(entry, model="") for entry in read_records())


def read_records() -> list[TuningRecord]:
    """Everything that can be read, as it is: clear decisions for their model and for others."""
    read = [_read(path) for path in sorted(find_folder().glob("*.json"))]
    return [entry for entry in read if entry is not None]


def clear() -> int:
    """Forget everything; returns how many decisions that were."""
    count = len(list(read_decisions()))
    for path in find_folder().glob("*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    return count
