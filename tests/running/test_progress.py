"""The progress of a whole run never falls, and every stage of the pipeline has its share."""

from __future__ import annotations

import pytest
from helpers import MODELS

import pwopt
from pwopt.running.progress import STAGES, track_run


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
