"""Cache of tuning records and gains on disk. Each is a file of its own, so that processes need no lock."""

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

from pwopt.graph.json_files import read_json, read_record
from pwopt.graph.storage import replacing
from pwopt.running import installation
from pwopt.running.providers import Provider
from pwopt.running.timing import CONFIDENCE, Evidence
from pwopt.selecting.autotuning import is_clear
from pwopt.selecting.gain_records import GainRecord

#: The environment variable that names another folder than the user's cache folder.
FOLDER_VARIABLE = "PWOPT_CACHE"
#: The largest plausible number of pairs of sessions, and the largest plausible logarithm of a speed-up.
MAX_RECORDED_PAIRS, MAX_LOG = 1e9, 20.0
#: The folder of gains in the folder of records, and the greatest number of gains. The oldest are deleted first.
GAINS, MAX_GAINS = "gains", 4096


@dataclass(frozen=True)
class TuningRecord:
    """The result of races of one kind of rewrite on this machine.

    Attributes
    ----------
    pass_name, signature : str
        The kind of rewrite.
    place : str
        Provider, onnxruntime version, processor with its features, and threads. A decision holds there only.
    pairs, total, squares : float
        The measurements as sums, to which later races add (`pwopt.running.timing.Evidence`).
    model : str
        A digest of the raced model; "" for a decision that also holds for other models.
    name, date : str
        The raced file, and the time of the race (ISO 8601, UTC); "" if unknown.
    profiled : str
        "kept" or "dropped" if a profile-guided estimate decided; "" if a race of its own did.
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
        """Whether races can produce these figures. A damaged file may contain any."""
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
        """The speed-up of the whole model."""
        return self.evidence.speedup

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the speed-up, at the confidence that decides."""
        return self.evidence.interval(CONFIDENCE)

    @property
    def clear(self) -> bool:
        """Whether races decided clearly. Then the decision also holds for other models."""
        return not self.profiled and is_clear(self.evidence)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields with the derived figures, for listings."""
        low, high = self.interval
        return {**asdict(self), "speedup": self.speedup, "low": low, "high": high, "decision": self.verdict}

    @property
    def verdict(self) -> str:
        return self.profiled or ("kept" if self.interval[0] > 1.0 else "dropped" if self.clear else "in doubt")


def find_folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("pwopt", appauthor=False) / "decisions"


def describe_place(provider: Provider, threads: int) -> str:
    """Describe everything that a time depends on except the model."""
    machine = installation.describe_machine(provider, threads)
    version, card = machine["onnxruntime"], machine["device"]
    sets = hashlib.sha256(read_cpu_features().encode()).hexdigest()[:12]
    processor = f"{installation.cpu_name()} {sets}" + (f", {card}" if card else "")
    return f"{provider}, onnxruntime {version}, {processor}, {threads} threads"


def read_cpu_features() -> str:
    """Read the instruction sets of the processor."""
    info = installation.CPUINFO
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _make_key(entry: TuningRecord) -> tuple[str, str, str, str]:
    return entry.pass_name, entry.signature, entry.place, entry.model


def _find_path(key: tuple[str, str, str, str]) -> Path:
    return find_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def look_up(pass_name: str, signature: str, where: str, model: str = "") -> TuningRecord | None:
    """Return the decision on a kind of rewrite in this model, else a clear one in another model, else None.

    Damaged files are ignored.
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
    """Store a decision, for other models too if it is clear. Errors of the file system are ignored."""
    for kept in (entry, replace(entry, model="")) if entry.clear else (entry,):
        path = _find_path(_make_key(kept))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(json.dumps(asdict(kept)).encode())


def read_decisions() -> Iterator[TuningRecord]:
    """Yield all decisions, each once."""
    yield from dict.fromkeys(replace(entry, model="") for entry in read_records())


def read_records() -> list[TuningRecord]:
    """Read all records. A clear decision has two: one for its model and one for other models."""
    read = [_read(path) for path in sorted(find_folder().glob("*.json"))]
    return [entry for entry in read if entry is not None]


def _find_gain_path(key: str, place: str) -> Path:
    return find_folder() / GAINS / f"{hashlib.sha256(json.dumps([key, place]).encode()).hexdigest()[:32]}.json"


def look_up_gain(key: str, place: str) -> GainRecord | None:
    """Return the gain of a group that was profiled in any model, or None. Damaged files are ignored."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        record = read_record(GainRecord, read_json(_find_gain_path(key, place)))
        return record if record.plausible and (record.key, record.place) == (key, place) else None
    return None


def store_gain(record: GainRecord) -> None:
    """Store a gain, and delete the oldest beyond `MAX_GAINS`. Errors of the file system are ignored."""
    path = _find_gain_path(record.key, record.place)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, lasting=False) as stream:
            stream.write(json.dumps(asdict(record)).encode())
        stored = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime_ns)
        for old in stored[: max(0, len(stored) - MAX_GAINS)]:
            old.unlink(missing_ok=True)


def clear() -> int:
    """Delete all records, and return the number of decisions."""
    count = len(list(read_decisions()))
    for path in [*find_folder().glob("*.json"), *(find_folder() / GAINS).glob("*.json")]:
        with contextlib.suppress(OSError):
            path.unlink()
    return count
