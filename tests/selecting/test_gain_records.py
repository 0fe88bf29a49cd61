"""What profiles said of a group in one model holds for the same operators in another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, parse, plant, planted_race

import pwopt
from pwopt.rewriting.records import Site
from pwopt.running.providers import DEFAULT
from pwopt.running.session import NodeTime
from pwopt.running.timing import Evidence
from pwopt.running.worker import Worker
from pwopt.selecting import tuning_cache
from pwopt.selecting.autotuning import Estimate
from pwopt.selecting.gain_records import GainRecord, describe_group
from pwopt.selecting.groups import Group
from pwopt.selecting.rewrite_selection import RacingEvaluator
from pwopt.selecting.tuning_records import CachedTuningRecords

F = np.float32
#: Of a model that takes 10 ms, a group saves 1 ms by itself and 2 ms with its neighbours.
GAINS = np.array([0.9, 1.0, 1.1, 1.0])
ESTIMATE = Estimate(*(Evidence.from_logs(np.log(10 / (10 - gain))) for gain in (GAINS, GAINS + 1)))
RECORD = GainRecord.from_estimate("key", "place", ESTIMATE, 10.0)


def test_a_gain_is_recorded_in_milliseconds() -> None:
    assert RECORD.own == pytest.approx(1.0, rel=1e-3)
    assert RECORD.best == pytest.approx(2.0, rel=1e-3)
    assert RECORD.own_deviation == pytest.approx(np.std(GAINS, ddof=1), rel=0.01)
    assert RECORD.runs == 4


def test_a_gain_holds_for_the_same_model_as_before_and_for_others_by_their_time() -> None:
    same, larger = RECORD.to_estimate(10.0), RECORD.to_estimate(100.0)
    assert same is not None
    assert larger is not None
    assert same.own.interval() == pytest.approx(ESTIMATE.own.interval())
    assert same.best.speedup == pytest.approx(ESTIMATE.best.speedup)
    assert larger.own.speedup == pytest.approx(100 / 99, rel=1e-4)
    assert larger.best.speedup == pytest.approx(100 / 98, rel=1e-4)


def test_a_gain_that_a_fast_model_cannot_have_is_not_used() -> None:
    assert RECORD.to_estimate(2.1) is None
    assert replace(RECORD, own=-1.0, best=-1.0).to_estimate(0.5) is not None  # a loss is possible


def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    tuning_cache.store_gain(RECORD)
    (path,) = (tmp_path / tuning_cache.GAINS).glob("*.json")
    return path


def test_the_cache_keeps_gains_by_key_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, monkeypatch)
    assert tuning_cache.look_up_gain("key", "place") == RECORD
    assert tuning_cache.look_up_gain("key", "elsewhere") is None
    assert tuning_cache.look_up_gain("other", "place") is None
    assert tuning_cache.read_records() == []  # they are no decisions
    assert tuning_cache.clear() == 0
    assert tuning_cache.look_up_gain("key", "place") is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[", "[]", "{}", '{"key": "key"}', json.dumps({**asdict(RECORD), "own": "fast"}),
        json.dumps({**asdict(RECORD), "own": 1e300}), json.dumps({**asdict(RECORD), "runs": 0}),
        json.dumps({**asdict(RECORD), "best_deviation": -1.0}), json.dumps({**asdict(RECORD), "own": float("nan")}),
        json.dumps({**asdict(RECORD), "key": "other"}), json.dumps({**asdict(RECORD), "more": 1}),
    ],
)  # fmt: skip
def test_damaged_gains_are_ignored(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, monkeypatch).write_text(content)
    assert tuning_cache.look_up_gain("key", "place") is None


def test_the_oldest_gains_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning_cache, "MAX_GAINS", 2)
    for key in "abc":
        tuning_cache.store_gain(replace(RECORD, key=key))
    assert [tuning_cache.look_up_gain(key, "place") is not None for key in "abc"] == [False, True, True]


BODY = "(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, u) b = Abs(a) y = Conv<pads=[1,1,1,1]>(b, v) }"
SIZES = {"x": (1, 4, 6, 6), "a": (1, 4, 6, 6), "b": (1, 4, 6, 6), "y": (1, 4, 6, 6)}


def described(
    body: str = BODY, sizes: dict[str, tuple[int, ...]] = SIZES, names: Sequence[str] = ("@0@", "@1@", "@2@"),
    width: int = 4, signature: str = "s", mark: str = "p", tensor: str = "b",
) -> str | None:  # fmt: skip
    model = parse(body, u=normal(4, 4, 1, 1, dtype=F), v=normal(width, 4, 3, 3, seed=1, dtype=F))
    group = Group("p", signature, (Site("p", tensor),), 1, frozenset({tensor}))
    return describe_group(model, sizes, group, [NodeTime("Op", name, 1e-3) for name in names], mark)


def test_the_same_operators_have_the_same_key_whatever_lies_further_away() -> None:
    further = BODY.replace("y = Conv", "c = Conv").replace("}", "y = Relu(c) }")
    assert described() == described(further, names=("@0@", "@1@", "@2@", "@3@")) == described(width=8)
    assert described() is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"sizes": {**SIZES, "b": (1, 4, 3, 3)}}, {"signature": "t"}, {"mark": "p 2"},
        {"body": BODY.replace("Abs", "Erf")}, {"body": BODY.replace("y = Conv<pads=[1,1,1,1]>(b, v)", "y = Exp(b)")},
        {"names": ("a_nchwc", "@1@", "@2@")}, {"names": ("@0@", "b_nchwc", "@2@")},
    ],
)  # fmt: skip
def test_what_changes_the_time_changes_the_key(changed: dict[str, object]) -> None:
    assert described(**changed) not in (None, described())  # type: ignore[arg-type]


def test_attributes_and_constants_of_the_operators_change_the_key() -> None:
    own = described(tensor="y")
    assert described(tensor="y", width=8) not in (None, own)
    assert described(BODY.replace("[1,1,1,1]", "[0,1,2,1]"), tensor="y") not in (None, own)


def test_unknown_operators_and_sizes_have_no_key() -> None:
    assert described(tensor="elsewhere") is None
    assert described(sizes={"x": (1, 4, 6, 6)}) is None


def product(tail: str) -> onnx.ModelProto:
    """A convolution that could be a product, and a last operator that is no neighbour of it."""
    body = f"(float[1,6,40,40] x) => (float[N] y) {{ r = Abs(x) a = Conv(r, u) b = Mul(a, a) y = {tail}(b) }}"
    return parse(body, u=normal(6, 6, 1, 1, dtype=F))


def test_a_later_model_reuses_what_profiles_of_an_earlier_one_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model differs, so no decision holds for it; its kinds are not profiled again."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    profile, bound, estimate = Worker.profiles, RacingEvaluator.bound, RacingEvaluator.estimate
    in_doubt = planted_race(np.exp(np.linspace(-1, 1, 40)), np.full(40, 1.0))
    plant(monkeypatch, lambda *_, **__: in_doubt)
    asked = list[int]()

    def record(worker: Worker, models: list[Path], *rest: object, **options: object) -> object:
        asked.append(len(models))
        return profile(worker, models, *rest, **options)[0], 1.0  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "profiles", record)
    monkeypatch.setattr(RacingEvaluator, "estimate", estimate)
    monkeypatch.setattr(RacingEvaluator, "bound", lambda *arguments: bound(*arguments) and {})  # drop nothing
    for tail, profiled in (("Erf", [1, 2]), ("Sin", [1])):
        asked.clear()
        pwopt.optimize(product(tail), threads=1, measuring=pwopt.Measuring(effort="thorough"))
        assert asked == profiled


def test_the_code_of_plugins_marks_their_records() -> None:
    """A combination of passes has the fingerprints of all of them."""
    records = CachedTuningRecords(DEFAULT, 1, "model", {"mine": "12ab", "other": "34cd"})
    assert [records.mark(name) for name in ("mine", "fold", "mine + fold", "fold + mine + other")] == [
        "mine 12ab", "fold", "mine + fold 12ab", "fold + mine + other 12ab 34cd",
    ]  # fmt: skip
