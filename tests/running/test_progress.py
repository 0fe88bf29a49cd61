"""The progress of a whole run never falls, and every stage of the pipeline has its share."""

from __future__ import annotations

import pytest
from helpers import MODELS

import pwopt
from pwopt.running.progress import STAGES, TimeLeft, track_run


def test_repeated_and_unknown_stages_never_take_progress_back() -> None:
    shown: list[float] = []
    show = track_run(lambda _stage, done: shown.append(done))
    for stage, done in (
        ("reading", 1.0),
        ("racing sum-branches: x", 0.5),
        ("rewriting", 0.2),
        ("resting", 0.9),
        ("writing", 2.0),
    ):
        show(stage, done)
    assert shown == pytest.approx([0.02, 0.3, 0.3, 0.3, 1.0])


def test_the_pipeline_names_stages_that_are_known() -> None:
    stages: list[str] = []
    pwopt.optimize(
        MODELS / "linear_sequence.onnx", cost="analytic", verify=False, progress=lambda s, _: stages.append(s)
    )
    assert stages
    assert [s for s in stages if not s.startswith(tuple(STAGES))] == []


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_of_one_model_is_what_its_measurements_may_take() -> None:
    clock = Clock()
    left = TimeLeft(40.0, clock)
    shown = []
    for stage, seconds in (("reading", 20.0), ("rewriting", 60.0), ("racing to-matmul: x", 10.0), ("rewriting", 5.0)):
        left.update(stage, 0.1)
        clock.now += seconds
        shown.append(left.describe())
    left.update("verifying", 0.5)  # rewriting does not count
    shown.append(left.describe())
    clock.now += 45.0
    assert [*shown, left.describe()] == ["", "", "at most 0:30 left", "at most 0:30 left", "at most 0:30 left", ""]


def test_nothing_is_known_of_a_model_that_is_not_measured() -> None:
    clock = Clock()
    left = TimeLeft(0.0, clock)
    for stage in STAGES:
        left.update(stage, 0.5)
        clock.now += 10.0
        assert left.describe() == ""


def test_the_time_left_of_many_models_follows_from_those_that_are_done() -> None:
    clock = Clock()
    left = TimeLeft(clock=clock)
    left.update("a.onnx: reading", 0.0)
    clock.now += 30.0
    left.update("a.onnx: racing", 0.2)  # the stages of one model say little
    assert left.describe() == ""
    left.update("b.onnx: reading", 0.25)
    assert left.describe() == "about 1:30 left"
    clock.now += 10.0
    left.update("b.onnx: racing", 0.4)
    assert left.describe() == "about 1:20 left"
    clock.now += 30.0
    left.update("c.onnx: reading", 0.5)
    assert left.describe() == "about 1:10 left"
