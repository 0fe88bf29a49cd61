"""What races say, when they end, and what of them can be added up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwopt.running import timing
from pwopt.running.timing import HOPELESS_ROUNDS, NOTHING, Evidence, Race, Rules, student

RNG = np.random.default_rng(0)


def drawn(speedup: float, spread: float, rounds: int, own: float = 1.0) -> Race:
    """Rounds whose ratios are log-normal around a speed-up."""
    return Race((np.exp(RNG.normal(math.log(speedup), spread, rounds)), np.ones(rounds)), own)


@pytest.mark.parametrize(
    ("freedom", "confidence", "value"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.999, 12.9240), (10, 0.999, 4.5869), (30, 0.99, 2.7500), (500, 0.95, 1.96)],
)  # fmt: skip
def test_student_s_quantiles_are_those_of_tables(freedom: int, confidence: float, value: float) -> None:
    assert student(freedom, confidence) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("rounds", [3, 5, 12, 60])
def test_intervals_hold_as_often_as_they_say(rounds: int) -> None:
    """Also of few rounds, and of some that a slow spell hit."""
    held = 0
    for _ in range(400):
        logs = RNG.normal(0.05, 0.03, rounds)
        logs[RNG.random(rounds) < 0.05] += RNG.normal(0, 0.3)
        low, high = Evidence.of(Race((np.exp(logs), np.ones(rounds)))).interval(0.95)
        held += low <= math.exp(0.05) <= high
    assert held / 400 > 0.87


def test_later_rounds_add_to_earlier_ones() -> None:
    parts = [Evidence.of(drawn(1.1, 0.05, 50)) for _ in range(4)]
    total = sum(parts, NOTHING)
    assert total.rounds == 200
    assert total.speedup == pytest.approx(math.exp(np.mean([math.log(p.speedup) for p in parts])))
    widths = [high - low for low, high in (sum(parts[:k], NOTHING).interval(0.999) for k in (1, 2, 4))]
    assert widths[0] > widths[1] > widths[2]


@given(st.integers(2, 40), st.floats(0.0, 0.5))
def test_a_speedup_lies_within_its_interval(rounds: int, spread: float) -> None:
    race = drawn(1.5, spread, rounds)
    low, high = race.interval()
    assert low <= race.speedup() * (1 + 1e-12)
    assert race.speedup() <= high * (1 + 1e-12)


def test_rounds_under_load_count_for_less() -> None:
    quiet, busy = drawn(1.1, 0.05, 100), drawn(1.1, 0.05, 100, own=0.4)
    assert Evidence.of(busy).rounds == pytest.approx(40)
    width = [e.interval(0.999)[1] - e.interval(0.999)[0] for e in (Evidence.of(quiet), Evidence.of(busy))]
    assert width[1] > 1.3 * width[0]


def test_a_few_rounds_under_load_that_agree_are_believed() -> None:
    """A slow model on a busy machine is run five times, and has a third of the time."""
    ratios = np.array([2.1, 2.3, 2.2, 2.25, 2.15])
    low, high = Evidence.of(Race((ratios, np.ones(5)), own=0.3)).interval(0.95)
    assert 1.9 < low < 2.2 < high < 2.6
    quiet = Evidence.of(Race((ratios, np.ones(5)))).interval(0.95)
    assert low < quiet[0] < quiet[1] < high
    assert Evidence.of(Race((ratios[:1], np.ones(1)), own=0.3)).interval(0.95) == (0.0, math.inf)


def test_slow_spells_hardly_move_the_ratio() -> None:
    logs = RNG.normal(0.1, 0.02, 100)
    logs[:10] += 2.0
    assert Evidence.of(Race((np.exp(logs), np.ones(100)))).speedup == pytest.approx(math.exp(0.1), rel=0.01)


@given(st.integers(1, 40), st.floats(0.0, 0.3))
def test_no_rounds_say_nothing_and_one_hardly_more(rounds: int, spread: float) -> None:
    low, high = Evidence.of(drawn(1.0, spread, rounds)).interval(0.99)
    assert low <= high
    assert NOTHING.interval(0.99) == (0.0, math.inf)
    assert rounds > 1 or (low, high) == (0.0, math.inf)


class Planted:
    """A session that takes as long as it is told, by a clock of its own."""

    now, spins = 0.0, False

    def __init__(self, times: Iterator[float]) -> None:
        self.times = times
        self.clock = lambda: Planted.now

    def bind(self, _feeds: object) -> None:
        pass

    def step(self) -> None:
        Planted.now += next(self.times)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[Planted]:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: Planted.now)
    return Planted


def taking(seconds: float, spread: float) -> Iterator[float]:
    while True:
        yield seconds * math.exp(RNG.normal(0, spread))


def raced(
    planted: type[Planted], speedup: float, spread: float, budget: float, rules: Rules, each: float = 0.1
) -> Race:
    sessions = [planted(taking(each * speedup, spread)), planted(taking(each, spread))]
    return timing.race(sessions, {}, budget, rules=rules)  # type: ignore[arg-type]


def test_a_single_model_is_run_for_as_long_as_there_is_time(planted: type[Planted]) -> None:
    done = timing.race([planted(taking(0.1, 0.01))], {}, 5.0)  # type: ignore[list-item]
    assert 45 <= done.rounds <= 55
    assert done.median(0) == pytest.approx(0.1, rel=0.02)


def test_few_rounds_of_a_slow_model_decide(planted: type[Planted]) -> None:
    """Nobody waits for twenty rounds where five say it all."""
    done = raced(planted, 0.8, 0.005, 60.0, Rules(0.999, least=3), each=1.0)
    assert 3 <= done.rounds <= 6
    assert Evidence.of(done).interval(0.999)[1] < 1.0


def test_a_race_ends_where_there_is_nothing_to_gain(planted: type[Planted]) -> None:
    done = raced(planted, 1.0, 0.002, 600.0, Rules(0.999, worth=1.005, least=3))
    assert HOPELESS_ROUNDS <= done.rounds <= 20


def test_chance_decides_no_race(planted: type[Planted]) -> None:
    """A question that is asked after every round must not be answered by its being asked often."""
    wrong = 0
    for _ in range(60):
        done = raced(planted, 1.0, 0.05, 1e9, Rules(0.99, least=3))
        low, high = Evidence.of(done).interval(0.999)
        wrong += done.rounds < timing.MAX_ROUNDS and (low > 1.0 or high < 1.0)
    assert wrong <= 2


def test_a_race_ends_when_its_time_is_over(planted: type[Planted]) -> None:
    assert raced(planted, 1.01, 0.01, 1.9, Rules(0.999, least=3)).rounds == 10
    assert raced(planted, 1.01, 0.01, 0.5, Rules(least=20)).rounds == 20


def test_what_is_known_already_shortens_a_race(planted: type[Planted]) -> None:
    known = Evidence.of(drawn(1.05, 0.1, 150))
    fresh = raced(planted, 1.05, 0.1, 1e9, Rules(0.999, least=3))
    more = raced(planted, 1.05, 0.1, 1e9, Rules(0.999, least=3, known=known))
    assert more.rounds < fresh.rounds


def test_the_last_race_ends_when_the_ratio_is_known(planted: type[Planted]) -> None:
    done = raced(planted, 1.3, 0.002, 600.0, Rules(precise=0.003, least=5))
    assert done.rounds == timing.MIN_ROUNDS
    assert raced(planted, 1.3, 0.1, 20.0, Rules(precise=0.003, least=5)).rounds > 50


class Spinning(Planted):
    """Runs right after another session's are disturbed by its threads."""

    last: object = None
    spins = True

    def step(self) -> None:
        Planted.now += 0.1 if Spinning.last is self else 0.5
        Spinning.last = self


@pytest.mark.parametrize(("spins", "seconds"), [(True, 0.1), (False, 0.5)])
def test_threads_that_wait_actively_are_left_to_calm_down(
    spins: bool, seconds: float, planted: type[Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run after another session's is not timed."""
    monkeypatch.setattr(Spinning, "spins", spins)
    sessions = [Spinning(iter(())), Spinning(iter(()))]
    done = timing.race(sessions, {}, 0.0, rules=Rules(least=9))  # type: ignore[arg-type]
    assert np.median(done.times) == pytest.approx(seconds)
    assert not spins or np.max(done.times) == pytest.approx(seconds)
