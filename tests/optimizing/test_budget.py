"""The seconds for measuring: races of rewrites get what verification, the final race and the profile leave."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from helpers import normal, parse

import pwopt
from pwopt.errors import UsageError
from pwopt.graph.files import from_proto
from pwopt.inputs.samples import Sample, SampleLabel
from pwopt.optimizing import budget
from pwopt.optimizing.budget import Budget
from pwopt.optimizing.other_conditions import CONDITION_SHARE
from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import RACE_SECONDS
from pwopt.running.providers import DEFAULT
from pwopt.running.worker import Worker
from pwopt.selecting.environment import Environment

F = np.float32


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def subject(load: float, run: float, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A model that takes so long to load and to run."""
    model = from_proto(parse("(float[1,4,5,6] x) => (float[N] y) { y = Relu(x) }"))
    samples = [Sample(SampleLabel("normal"), {"x": normal(1, 4, 5, 6, dtype=F)})] * 3
    worker = Worker(Path("m.onnx"), DEFAULT, 1, samples[0].feeds)
    worker.took = (load, run)
    monkeypatch.setattr(Worker, "ready", True)
    return Problem(
        model, Path("m.onnx"), samples, {"x": (1, 4, 5, 6)}, False, (), Environment(DEFAULT, 1, samples, worker)
    )


def test_what_is_needed_in_the_end_is_kept_back(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(subject(0.5, 0.1, monkeypatch), pwopt.Measuring(budget=40.0), 0)
    fixed = 5 * 0.5 + 3 * 3 * 0.1 + budget.PROFILING_SECONDS
    assert given.for_selection() == pytest.approx(40 - fixed - RACE_SECONDS - 8)
    clock.now += 20
    assert given.for_selection() == pytest.approx(20 - fixed - RACE_SECONDS - 8)
    assert given.for_open_race() == 6 * RACE_SECONDS
    clock.now += 10
    assert given.for_open_race() == pytest.approx(10 - fixed - RACE_SECONDS)
    clock.now -= 10
    assert given.allows_retry
    assert given.for_final_race() == RACE_SECONDS
    clock.now += 16
    assert given.for_final_race() == 0
    assert given.for_selection() == 0
    assert not given.allows_retry


def test_other_conditions_want_their_share(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more models to load under each, and a quarter of the final race."""
    one, three = (Budget(subject(0.5, 0.1, monkeypatch), pwopt.Measuring(budget=40.0), others) for others in (0, 2))
    assert one.for_selection() - three.for_selection() == pytest.approx(2 * (2 * 0.5 + CONDITION_SHARE * RACE_SECONDS))


def test_a_small_budget_shortens_the_final_race(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(subject(0.0, 0.0, monkeypatch), pwopt.Measuring(budget=2.0), 0)
    assert given.for_selection() == pytest.approx(2 - budget.PROFILING_SECONDS - (0.15 + 0.2) * 2)


def test_a_slow_first_load_leaves_half(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a graphics card's libraries."""
    given = Budget(subject(20.0, 0.1, monkeypatch), pwopt.Measuring(budget=40.0), 0)
    assert given.for_selection() == pytest.approx(20 - RACE_SECONDS - 8)


def test_what_is_no_measuring_costs_nothing(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(subject(0.0, 0.0, monkeypatch), pwopt.Measuring(budget=10.0), 0)
    with given.pause():
        clock.now += 7
    assert given.left == pytest.approx(10)


def test_words_for_it() -> None:
    assert [pwopt.Measuring(effort=e).seconds for e in ("quick", "normal", "thorough")] == [
        10,
        40,
        180,
    ]
    assert pwopt.Measuring(effort="quick", budget=7.0).seconds == 7
    with pytest.raises(UsageError, match="quick, normal, thorough"):
        pwopt.optimize(parse("(float[1] x) => (float[N] y) { y = Relu(x) }"), measuring=pwopt.Measuring(effort="hard"))


def test_without_a_budget_the_final_race_is_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(subject(0.0, 0.0, monkeypatch), pwopt.Measuring(budget=0.0, race_seconds=3.0), 0)
    assert given.for_final_race() == 3
    assert given.allows_retry
