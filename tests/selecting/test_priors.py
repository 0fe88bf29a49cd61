"""Where to look first: what is known of kinds of rewrites orders them, and leaves out what never paid."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import normal, parse, plant, planted_race

import pwopt
from pwopt.passes import PASSES
from pwopt.running.providers import DEFAULT
from pwopt.running.timing import Race
from pwopt.running.worker import UnusableError, Worker
from pwopt.selecting import priors, tuning_cache
from pwopt.selecting.priors import ENOUGH_CASES, Prior
from pwopt.selecting.rewrite_selection import RacingEvaluator
from pwopt.selecting.tuning_cache import TuningRecord

F = np.float32


def entry(name: str, speedup: float, number: int, spread: float = 0.0) -> TuningRecord:
    logs = 40 * math.log(speedup)
    return TuningRecord(name, f"kind {number}", "here", 40.0, logs, logs**2 / 40 + 40 * spread**2, f"model {number}")


def test_decisions_are_counted_by_kind() -> None:
    found = priors.count_decisions([
        entry("winograd", 1.1, 1), entry("winograd", 1.2, 2), entry("winograd", 0.9, 3), entry("to-matmul", 0.8, 1),
        entry("frames", 1.02, 1, spread=0.5),  # in doubt
        replace(entry("frames", 1.5, 2), profiled="dropped"),
    ])  # fmt: skip
    assert (found["winograd"].decided, found["winograd"].kept) == (3, 2)
    assert found["winograd"].gain == pytest.approx(math.log(1.1 * 1.2))
    assert (found["to-matmul"].decided, found["to-matmul"].kept) == (1, 0)
    assert (found["frames"].decided, found["frames"].kept) == (1, 0)
    assert found["winograd"].expected_gain > Prior().expected_gain > found["to-matmul"].expected_gain


def test_in_vain_is_said_late_and_taken_back_at_once() -> None:
    assert not Prior(ENOUGH_CASES - 1).unprofitable
    assert Prior(2 * ENOUGH_CASES).unprofitable
    assert Prior(4 * ENOUGH_CASES, 1, 0.01).unprofitable
    assert not (Prior(2 * ENOUGH_CASES) + Prior(1, 1, 0.05)).unprofitable


def test_what_ships_names_its_machines_and_passes_that_there_are() -> None:
    content = json.loads(resources.files("pwopt.selecting").joinpath("priors.json").read_text(encoding="utf-8"))
    assert {m["for"] for m in content["machines"]} == set(content["priors"])
    names = {p.name for p in PASSES if p.policy == "measured"}
    for recorded in content["priors"].values():
        assert set(recorded) <= names
        assert all(0 <= kept <= asked for asked, kept, _ in recorded.values())


def siblings() -> onnx.ModelProto:
    """Convolutions that may be merged, and may be products."""
    body = "(float[1,6,5,7] x) => (float[N] a, float[N] b) { a = Conv(x, u) b = Conv(x, v) }"
    return parse(body, **{k: normal(4, 6, 1, 1, seed=i, dtype=F) for i, k in enumerate("uv")})


def known(monkeypatch: pytest.MonkeyPatch, **found: list[float]) -> None:
    named = {name.replace("_", "-"): prior for name, prior in found.items()}
    monkeypatch.setattr(priors, "read_table", lambda: {"priors": {f"cpu {priors.classify_processor()}": named}})


def test_kinds_that_never_paid_are_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    plant(monkeypatch, lambda *_, **__: planted_race(np.full(40, 2.0), np.full(40, 1.0)))
    known(monkeypatch, to_matmul=[50, 1, 0.001])
    report = pwopt.optimize(siblings(), threads=1, cache=False).report
    assert "to-matmul" not in {r.pass_name for r in report.rewrites}
    (reason,) = {s.reason for s in report.skips if s.pass_name == "to-matmul"}
    assert "not tried, since it paid in 1 of 50 cases on processors like this; --effort thorough does" in reason
    thorough = pwopt.optimize(siblings(), threads=1, measuring=pwopt.Measuring(effort="thorough"), cache=False).report
    assert {r.pass_name for r in thorough.rewrites} & {"to-matmul", "merge-siblings"}
    assert not any("not tried" in s.reason for s in thorough.skips)


@pytest.mark.parametrize("first", ["to-matmul", "merge-siblings"])
def test_what_paid_most_is_raced_first(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    raced: list[set[str]] = []

    def race(_arena: object, models: list[Path], *_: object, **__: object) -> Race:
        raced.append({n.op_type for n in onnx.load(models[1]).graph.node})
        return planted_race(np.full(40, 2.0), np.full(40, 1.0))

    plant(monkeypatch, race)
    known(monkeypatch, **{first.replace("-", "_"): [10, 9, 3.0]})
    pwopt.optimize(siblings(), threads=1, cache=False)
    assert ("MatMul" in raced[0]) == (first == "to-matmul")


def test_this_machine_s_own_decisions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that paid here once is tried, whatever the table says."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    plant(monkeypatch, lambda *_, **__: planted_race(np.full(40, 2.0), np.full(40, 1.0)))
    known(monkeypatch, to_matmul=[50, 1, 0.001])
    tuning_cache.store(replace(entry("to-matmul", 1.2, 1), place=tuning_cache.describe_place(DEFAULT, 1)))
    report = pwopt.optimize(siblings(), threads=1).report
    assert not any("not tried" in s.reason for s in report.skips)


def test_passes_are_profiled_together_and_apart_if_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model without them is profiled once; a variant that fails spoils no estimate of another one."""
    pytest.importorskip("onnxruntime")
    profile, estimate, asked = Worker.profiles, RacingEvaluator.estimate, list[int]()
    plant(monkeypatch, lambda *_, **__: planted_race(np.full(40, 2.0), np.full(40, 1.0)))
    monkeypatch.setattr(RacingEvaluator, "estimate", estimate)

    def record(worker: Worker, models: list[Path], *rest: Any) -> Any:
        asked.append(len(models))
        if len(models) > failing:
            raise UnusableError("it crashes")
        return profile(worker, models, *rest)

    monkeypatch.setattr(Worker, "profiles", record)
    failing, measuring = 9, pwopt.Measuring(effort="thorough")
    pwopt.optimize(siblings(), threads=1, measuring=measuring, cache=False)
    assert asked[0] == 3
    asked.clear()
    failing = 2
    pwopt.optimize(siblings(), threads=1, measuring=measuring, cache=False)
    assert asked[:3] == [3, 2, 2]
