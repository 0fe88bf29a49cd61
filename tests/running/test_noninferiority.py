"""Races under other conditions end after few pairs where the result is not slower."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from helpers import planted_race

from pwopt.running.noninferiority import LEAST_SPREAD, NoninferiorityRules, Spread
from pwopt.running.student import student_quantile
from pwopt.running.timing import CONFIDENCE, Race, SessionPair


def pairs(*speedups: float) -> Race:
    return planted_race(np.array(speedups), np.ones(len(speedups)))


KNOWN = Spread(0.03, 4)
RULES = NoninferiorityRules(CONFIDENCE, harmless=0.01, spread=KNOWN)


def test_the_spread_is_pooled_over_the_models_of_a_race() -> None:
    logs = np.array([[0.1, 0.2, 0.3], [0.0, 0.1, -0.1]])
    race = planted_race(np.ones(3), *np.exp(-logs))
    assert Spread.from_race(race).deviation == pytest.approx(0.1)
    assert Spread.from_race(race).freedom == 4


def test_sessions_under_other_conditions_differ_at_least_by_a_little() -> None:
    assert Spread.from_race(pairs(1.2, 1.2, 1.2)) == Spread(LEAST_SPREAD, 2)
    assert Spread.from_race(pairs(1.2)) == Spread(LEAST_SPREAD, 0)


def test_few_pairs_have_the_interval_of_the_known_spread() -> None:
    low, high = KNOWN.interval(pairs(1.2))
    reach = student_quantile(4, CONFIDENCE) * 0.03
    assert (low, high) == pytest.approx((1.2 * math.exp(-reach), 1.2 * math.exp(reach)))
    spread = pairs(1.2 * math.exp(0.04), 1.2 * math.exp(-0.04))  # their own spread counts too
    reach = student_quantile(5, CONFIDENCE) * math.sqrt((4 * 0.03**2 + 2 * 0.04**2) / 5 / 2)
    assert KNOWN.interval(spread) == pytest.approx((1.2 * math.exp(-reach), 1.2 * math.exp(reach)))


def test_pairs_that_differ_by_more_than_is_known_speak_for_themselves() -> None:
    """On a busy machine, sessions with two threads differ much more than with one: this is no slow model."""
    wide = pairs(0.8, 0.65, 0.55)
    assert KNOWN.interval(wide) == wide.interval()
    assert KNOWN.interval(wide)[1] > 1
    assert KNOWN.interval(pairs(0.8, 0.78, 0.82))[1] < 0.9


def test_many_pairs_speak_for_themselves() -> None:
    many = pairs(*np.exp(np.linspace(0.1, 0.2, 5)))
    assert KNOWN.interval(many) == many.interval()
    assert Spread().interval(pairs(1.2)) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("speedups", "ended"),
    [
        ([1.1], True),
        ([1.04], False),  # within the spread of sessions
        ([1.04, 1.05], True),
        ([0.9], False),
        ([0.9, 0.9], False),
        ([1.3, 0.9], False),  # their own spread counts too
    ],
)
def test_a_race_ends_when_the_model_is_not_slower(speedups: list[float], ended: bool) -> None:
    assert RULES.ended_by(pairs(*speedups)) is ended


def test_without_a_known_spread_one_pair_ends_nothing() -> None:
    assert not NoninferiorityRules(CONFIDENCE, harmless=0.01).ended_by(pairs(1.5))


@pytest.mark.parametrize(
    ("speedup", "creation", "ended"), [(1.0, 0.5, True), (1.0, 0.05, False), (0.995, 0.5, True), (0.98, 0.5, False)]
)
def test_what_does_not_seem_slower_is_not_raced_for_long(speedup: float, creation: float, ended: bool) -> None:
    """Two pairs that cost a second in sum are enough, unless the model seems slower."""
    pair = SessionPair((np.array([0.001 * speedup]), np.array([0.001])), (creation, creation), (0.0, 0.0))
    rules = NoninferiorityRules(CONFIDENCE, harmless=0.01, spread=KNOWN, patience=1.0)
    assert not rules.ended_by(Race((pair,)))
    assert rules.ended_by(Race((pair, pair))) is ended


def test_other_rules_still_end_a_race() -> None:
    assert NoninferiorityRules(CONFIDENCE).ended_by(pairs(*[0.5] * 5))


def test_rules_can_be_sent_to_the_process_that_races() -> None:
    assert pickle.loads(pickle.dumps(RULES)) == RULES
