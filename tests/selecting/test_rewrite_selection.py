"""Races of groups of rewrites in an environment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import planted_race

from pwopt.running.timing import CONFIDENCE, Evidence, Race, Rules
from pwopt.selecting.autotuning import WORTH
from pwopt.selecting.rewrite_selection import RacingEvaluator
from pwopt.selecting.tuning_records import NoTuningRecords


def test_a_race_ends_by_earlier_evidence_and_by_what_profiles_promise() -> None:
    found = planted_race(1 + 0.01 * np.linspace(-1, 1, 6), np.ones(6))
    seen: list[Rules] = []

    def race(_models: list[Path], _seconds: float, *, rules: Rules) -> Race:
        seen.append(rules)
        return found

    environment: Any = SimpleNamespace(race=race)
    compilation: Any = None
    evaluator = RacingEvaluator(compilation, environment, NoTuningRecords())
    known = Evidence.from_race(found)
    assert evaluator.race(Path("a"), Path("b"), 1.0, known, 1.03) is found
    assert seen == [Rules(CONFIDENCE, WORTH, known=known, promise=1.03)]


@pytest.mark.parametrize(("took", "least"), [((0.05, 0.01), 1.006), ((0.4, 0.1), 1.047)])
def test_long_runs_prove_less_in_the_same_time(took: tuple[float, float], least: float) -> None:
    worker = SimpleNamespace(ready=True, took=took)
    environment: Any = SimpleNamespace(worker=worker)
    compilation: Any = None
    evaluator = RacingEvaluator(compilation, environment, NoTuningRecords())
    assert evaluator.least_provable(3.0) == pytest.approx(least, abs=1e-3)
