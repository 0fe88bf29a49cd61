"""What races say, when they end, and what of them adds up."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers import planted_race
from hypothesis import given
from hypothesis import strategies as st

from pwopt.optimizing.attempt import final_rules
from pwopt.running import timing
from pwopt.running.student import student_quantile
from pwopt.running.timing import HOPELESS_PAIRS, NO_EVIDENCE, Evidence, Race, Rules

RNG = np.random.default_rng(0)


def drawn(speedup: float, spread: float, pairs: int, own: float = 1.0) -> Race:
    """Pairs whose ratios are log-normal around a speed-up."""
    return planted_race(np.exp(RNG.normal(math.log(speedup), spread, pairs)), np.ones(pairs), own=own)


@pytest.mark.parametrize(
    ("freedom", "confidence", "value"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.999, 12.9240), (10, 0.999, 4.5869), (30, 0.99, 2.7500), (500, 0.95, 1.96)],
)  # fmt: skip
def test_quantiles_of_students_distribution_are_those_of_tables(freedom: int, confidence: float, value: float) -> None:
    assert student_quantile(freedom, confidence) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("pairs", [3, 5, 12, 60])
def test_intervals_hold_as_often_as_they_say(pairs: int) -> None:
    """Also of few pairs, and of some that a slow spell hit."""
    held = 0
    for _ in range(400):
        logs = RNG.normal(0.05, 0.03, pairs)
        logs[RNG.random(pairs) < 0.05] += RNG.normal(0, 0.3)
        low, high = Evidence.from_logs(logs).interval(0.95)
        held += low <= math.exp(0.05) <= high
    assert held / 400 > 0.87


def test_what_differs_between_sessions_is_in_the_interval() -> None:
    """A hundred rounds of two sessions that differ by their memory are no evidence that the models differ."""
    wrong = 0
    for _ in range(300):
        between = RNG.normal(0, 0.05, 5)
        runs = [np.exp(RNG.normal(0, 0.002, (2, 100))) for _ in between]
        pairs = [timing.SessionPair((np.exp(b) * a, c)) for b, (a, c) in zip(between, runs, strict=True)]
        low, high = Race(tuple(pairs)).interval(confidence=0.99)
        wrong += low > 1 or high < 1
    assert wrong <= 9


def test_later_pairs_add_to_earlier_ones() -> None:
    parts = [Evidence.from_race(drawn(1.1, 0.05, 50)) for _ in range(4)]
    total = sum(parts, NO_EVIDENCE)
    assert total.pairs == 200
    assert total.speedup == pytest.approx(math.exp(np.mean([math.log(p.speedup) for p in parts])))
    widths = [high - low for low, high in (sum(parts[:k], NO_EVIDENCE).interval(0.999) for k in (1, 2, 4))]
    assert widths[0] > widths[1] > widths[2]


@given(st.integers(2, 40), st.floats(0.0, 0.5))
def test_a_speedup_lies_within_its_interval(pairs: int, spread: float) -> None:
    race = drawn(1.5, spread, pairs)
    low, high = race.interval()
    assert low <= race.speedup() * (1 + 1e-12)
    assert race.speedup() <= high * (1 + 1e-12)


def test_pairs_under_load_count_for_less() -> None:
    quiet, busy = drawn(1.1, 0.05, 100), drawn(1.1, 0.05, 100, own=0.4)
    assert Evidence.from_race(busy).pairs == pytest.approx(40)
    width = [e.interval(0.999)[1] - e.interval(0.999)[0] for e in (Evidence.from_race(quiet), Evidence.from_race(busy))]
    assert width[1] > 1.3 * width[0]


def test_a_few_pairs_under_load_that_agree_are_believed() -> None:
    """A slow model on a busy machine is run in five pairs, and has a third of the time."""
    ratios = np.array([2.1, 2.3, 2.2, 2.25, 2.15])
    low, high = planted_race(ratios, np.ones(5), own=0.3).interval(confidence=0.95)
    assert 1.9 < low < 2.2 < high < 2.6
    quiet = planted_race(ratios, np.ones(5)).interval(confidence=0.95)
    assert low < quiet[0] < quiet[1] < high
    assert planted_race(ratios[:1], np.ones(1), own=0.3).interval() == (0.0, math.inf)


def test_slow_spells_hardly_move_the_ratio() -> None:
    logs = RNG.normal(0.1, 0.02, 100)
    logs[:10] += 2.0
    assert Evidence.from_logs(logs).speedup == pytest.approx(math.exp(0.1), rel=0.01)


@given(st.integers(1, 40), st.floats(0.0, 0.3))
def test_no_pairs_say_nothing_and_one_hardly_more(pairs: int, spread: float) -> None:
    low, high = Evidence.from_race(drawn(1.0, spread, pairs)).interval(0.99)
    assert low <= high
    assert NO_EVIDENCE.interval(0.99) == (0.0, math.inf)
    assert pairs > 1 or (low, high) == (0.0, math.inf)


def draw_race(spreads: Sequence[float], pairs: int, rules: Rules = timing.TO_THE_END) -> Race:
    """Equal models whose sessions differ by these spreads, raced for so many pairs or until the rules end it."""
    done: list[timing.SessionPair] = []
    while len(done) < pairs and not (done and rules.ended_by(Race(tuple(done)))):
        done.append(timing.SessionPair(tuple(np.exp(RNG.normal(0, s, 1)) for s in spreads)))
    return Race(tuple(done))


class Planted:
    """Sessions that take as long as they are told, by a clock of their own."""

    now, spins = 0.0, False
    opened: list[float]

    def __init__(self, seconds: float, spread: float, between: float = 0.0, start: float = 0.0) -> None:
        Planted.now += start
        Planted.opened.append(seconds)
        self.seconds, self.spread = seconds * math.exp(RNG.normal(0, between)), spread
        self.clock = lambda: Planted.now

    def bind(self, _feeds: object) -> None:
        pass

    def step(self) -> None:
        Planted.now += self.seconds * math.exp(RNG.normal(0, self.spread))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(0))  # whatever ran before
    monkeypatch.setattr(Planted, "opened", [], raising=False)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: Planted.now)
    monkeypatch.setattr(timing.time, "process_time", lambda: Planted.now)
    return iter(())


def raced(speedup: float, spread: float, budget: float, rules: Rules, **session: float) -> Race:
    """A race of two models, the first of which takes `speedup` times as long; `each` is the second's time."""
    each = session.pop("each", 0.1)
    openers = [lambda s=s: Planted(each * s, spread, **session) for s in (speedup, 1.0)]
    return timing.race(openers, {}, budget, rules=rules)  # type: ignore[arg-type]


def test_a_single_model_is_run_for_as_long_as_there_is_time() -> None:
    done = timing.race([lambda: Planted(0.1, 0.01)], {}, 5.0)  # type: ignore[list-item, return-value]
    assert Planted.now > 5.0
    assert 10 <= done.rounds <= 50
    assert done.median(0) == pytest.approx(0.1, rel=0.02)


def test_every_pair_has_fresh_sessions_in_changing_order() -> None:
    done = raced(2.0, 0.01, 10.0, Rules())
    assert Planted.opened[:8] == [0.2, 0.1, 0.1, 0.2, 0.1, 0.2, 0.2, 0.1]
    assert len(Planted.opened) == 2 * len(done.pairs)


class Counted(Planted):
    """Counts the sessions that are open at the same time."""

    alive, most = 0, 0

    def __init__(self, seconds: float, spread: float) -> None:
        super().__init__(seconds, spread)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("together", [True, False])
def test_sessions_of_large_models_are_open_one_after_the_other(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "most", 0)
    openers = [lambda s=s: Counted(s, 0.001) for s in (0.2, 0.1, 0.2)]
    done = timing.race(openers, {}, 20.0, rules=Rules(0.99), together=together)  # type: ignore[arg-type]
    assert Counted.most == (3 if together else 1)
    assert done.speedup() == pytest.approx(2.0, rel=0.01)
    assert done.speedup(2) == pytest.approx(1.0, rel=0.01)
    assert all(len({len(times) for times in pair.times}) == 1 for pair in done.pairs)


def test_every_model_is_created_at_every_place_equally_often() -> None:
    """Of three, the second was always created in the middle, and lost up to a hundredth by that."""
    openers = [lambda s=s: Planted(s, 0.01) for s in (0.1, 0.2, 0.3)]
    timing.race(openers, {}, 60.0)  # type: ignore[arg-type]
    places = np.array(Planted.opened[:18]).reshape(6, 3)
    assert {tuple(row) for row in places} == set(itertools.permutations((0.1, 0.2, 0.3)))
    assert all(sorted(column) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3] for column in places.T)


def test_few_pairs_of_a_slow_model_decide() -> None:
    done = raced(0.8, 0.005, 60.0, Rules(0.99), each=1.0)
    assert 3 <= len(done.pairs) <= 5
    assert done.interval()[1] < 1.0


def test_a_race_ends_where_there_is_nothing_to_gain() -> None:
    done = raced(1.0, 0.002, 600.0, Rules(0.99, worth=1.005))
    assert HOPELESS_PAIRS <= len(done.pairs) <= 20


def test_a_race_ends_if_it_can_hardly_prove_even_what_is_promised() -> None:
    """Sessions differ by 3 % here. In this time, a gain of 1 % cannot be proved, but one of 10 % can."""
    small = raced(1.01, 0.001, 20.0, Rules(0.99, promise=1.01), between=0.03)
    assert len(small.pairs) in timing.LOOKS[:3]
    assert len(raced(1.01, 0.001, 20.0, Rules(0.99), between=0.03).pairs) > len(small.pairs)
    large = raced(1.1, 0.001, 20.0, Rules(0.99, promise=1.1), between=0.03)
    assert large.interval()[0] > 1.0


def test_a_continued_race_forgives_one_disturbed_pair() -> None:
    """Of three earlier pairs, one was disturbed. As evidence of its own it would widen the interval to the end."""
    ratios = (1.4, 1.42, 2.4)
    earlier = tuple(timing.SessionPair((np.array([r]), np.ones(1), np.array([r]))) for r in ratios)
    rules = Rules(0.99, roughly=0.02)
    apart = replace(rules, known=Evidence.from_race(Race(earlier)))
    new = [timing.SessionPair((np.array([1.4 + 0.001 * k]), np.ones(1), np.array([1.4]))) for k in range(12)]
    assert replace(rules, earlier=earlier).ended_by(Race(tuple(new[:5])))
    assert not apart.ended_by(Race(tuple(new)))


def test_a_promise_ends_few_races_that_would_have_kept_it() -> None:
    """Such an end takes at most one of twenty chances."""
    rules, proved, ended = Rules(0.99, promise=1.03), 0, 0
    for _ in range(300):
        logs = RNG.normal(math.log(1.03), 0.02, 24)
        pairs = [timing.SessionPair((np.exp([gain]), np.ones(1))) for gain in logs]
        whole = Race(tuple(pairs))
        if whole.interval()[0] > 1.0:
            proved += 1
            seen = [Race(tuple(pairs[:n])) for n in timing.LOOKS if n < 24]
            ended += any(rules.ended_by(race, len(race.pairs) / 24) and race.interval()[0] <= 1.0 for race in seen)
    assert proved > 250
    assert ended / proved < 0.05


def test_chance_decides_no_race() -> None:
    """Asking often whether a race is decided must not decide it; nor must the memory of its sessions."""
    races = [draw_race((0.03, 0.03), timing.MAX_PAIRS, Rules(0.99)) for _ in range(100)]
    assert sum(len(done.pairs) < timing.MAX_PAIRS for done in races) <= 3


def test_a_race_ends_when_its_time_is_over_and_has_three_pairs_at_least() -> None:
    begin = Planted.now
    assert len(raced(1.01, 0.01, 2.0, Rules(0.99)).pairs) == timing.MIN_PAIRS
    assert 2.0 < Planted.now - begin < 6.0
    begin = Planted.now
    assert len(raced(1.01, 0.01, 100.0, Rules(), start=1.0).pairs) > 10
    assert 100.0 <= Planted.now - begin < 110.0


def test_a_model_too_slow_for_its_time_has_two_pairs() -> None:
    assert len(raced(1.01, 0.01, 1.0, Rules(), each=5.0).pairs) == 2


def test_sessions_that_are_slow_to_start_have_more_rounds_each() -> None:
    """(Kalibera and Jones, 2013)."""
    quick, slow = (raced(1.0, 0.05, 60.0, Rules(), start=start, each=0.01) for start in (0.001, 1.0))
    assert slow.rounds / len(slow.pairs) > 2 * quick.rounds / len(quick.pairs)


def test_what_is_known_already_shortens_a_race() -> None:
    known = Evidence.from_race(drawn(1.05, 0.05, 40))
    fresh = raced(1.05, 0.05, 1e9, Rules(0.99), between=0.05)
    more = raced(1.05, 0.05, 1e9, Rules(0.99, known=known), between=0.05)
    assert len(more.pairs) <= len(fresh.pairs)
    assert len(more.pairs) <= 5


def test_the_last_race_ends_when_the_ratio_is_known() -> None:
    assert len(raced(1.3, 0.002, 600.0, Rules(precise=0.01)).pairs) <= 9
    assert len(raced(1.3, 0.1, 600.0, Rules(precise=0.01), between=0.1).pairs) > 20


def race_with_copy(speedup: float, rules: Rules, between: float = 0.006, budget: float = 600.0) -> Race:
    openers = [lambda s=s: Planted(0.1 * s, 0.002, between) for s in (speedup, 1.0, speedup)]
    return timing.race(openers, {}, budget, rules=rules)  # type: ignore[arg-type]


def test_three_models_share_the_spread_of_sessions() -> None:
    """The interval from three pairs of equal models is much narrower, and holds as often as it says."""
    wrong, narrower = 0, 0
    for _ in range(300):
        times = np.exp(RNG.normal(0, 0.02, (3, 3)))
        race = Race(tuple(timing.SessionPair(tuple(row[:, None])) for row in times))
        low, high = race.interval(confidence=0.95)
        alone = Evidence.from_logs(race.logs(1)).interval(0.95)
        wrong += low > 1 or high < 1
        narrower += high / low < alone[1] / alone[0]
        assert low < race.speedup() < high
    assert wrong / 300 < 0.08
    assert narrower / 300 > 0.6


def find_misses(races: Sequence[Race], confidence: float) -> float:
    """The share of intervals of equal models that exclude 1."""
    intervals = [race.interval(confidence=confidence) for race in races]
    return float(np.mean([low > 1 or high < 1 for low, high in intervals]))


def test_a_model_whose_sessions_differ_more_than_the_others_has_a_wider_interval() -> None:
    assert find_misses([draw_race((0.005, 0.015, 0.005), 3) for _ in range(3000)], 0.9) < 0.15


@pytest.mark.parametrize("pairs", [8, 12])
def test_values_drawn_nearer_are_no_evidence_of_a_small_spread(pairs: int) -> None:
    logs = RNG.normal(0, 0.02, (3000, pairs))
    assert np.mean([low > 1 or high < 1 for low, high in (Evidence.from_logs(x).interval(0.99) for x in logs)]) < 0.0155


def test_a_race_that_ends_by_what_it_sees_misses_no_more_often() -> None:
    rules = final_rules(measured=False)
    races = [draw_race((0.01, 0.01, 0.01), 24, rules) for _ in range(400)]
    assert find_misses(races, 0.9) < 0.105


def test_a_clear_verdict_ends_the_final_race(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(0.99, worth=1.005, precise=0.0005, roughly=0.02)
    assert len(race_with_copy(1.1, rules).pairs) <= 8
    assert len(race_with_copy(1.0, rules).pairs) <= 24  # hardly anything to gain
    fine = replace(rules, roughly=0.001)
    assert len(race_with_copy(3.0, fine).pairs) <= 8  # a tenth of a large gain is precise enough
    monkeypatch.setattr(timing, "PART_OF_GAIN", 0.0)
    assert len(race_with_copy(1.1, fine).pairs) > 12
    assert len(race_with_copy(3.0, fine).pairs) > 12


def test_a_result_that_need_not_be_faster_ends_the_race_when_it_is_surely_not_slower() -> None:
    rules = Rules(0.99, margin=0.01, roughly=0.02)
    done = race_with_copy(1.003, rules, between=0.003)
    assert HOPELESS_PAIRS <= len(done.pairs) <= 12
    assert done.interval()[0] > 0.99
    assert len(race_with_copy(1.003, replace(rules, margin=0.0), between=0.003).pairs) > len(done.pairs)


def test_a_harmless_condition_ends_its_race_after_three_pairs() -> None:
    assert len(raced(1.1, 0.002, 600.0, Rules(harmless=0.01), between=0.005).pairs) == timing.LOOKS[0]
    assert len(raced(0.95, 0.002, 600.0, Rules(harmless=0.01), between=0.005).pairs) == timing.MAX_PAIRS


def test_a_copy_that_differs_leaves_a_race_undecided() -> None:
    """The second model is 2 % faster than the first, and a copy of the first is 3 % faster."""
    openers = [lambda s=s: Planted(0.1 * s, 0.0, 0.0005) for s in (1.02, 1.0, 0.99)]
    begin = Planted.now
    timing.race(openers, {}, 60.0, rules=Rules(0.99))  # type: ignore[arg-type]
    assert Planted.now - begin > 59.0


def test_a_slow_model_is_warmed_up_once() -> None:
    for each, warm in ((0.1, 2), (0.5, 1)):
        begin = Planted.now
        done = raced(1.1, 0.0, 1000.0, Rules(0.99), each=each)
        seconds = each * 2.1
        assert round((Planted.now - begin) / seconds) == done.rounds + warm * len(done.pairs)


def test_a_race_tells_what_sessions_take_to_start() -> None:
    done = raced(2.0, 0.0, 20.0, Rules(), start=0.7)
    assert done.creation(0) == pytest.approx(0.7)
    assert done.first_run(0) == pytest.approx(0.2)
    assert done.first_run(1) == pytest.approx(0.1)


class Spinning(Planted):
    """Runs right after another session's are disturbed by its threads."""

    last: object = None
    spins = True

    def step(self) -> None:
        Planted.now += 0.1 if Spinning.last is self else 0.5
        Spinning.last = self


@pytest.mark.parametrize(("spins", "seconds"), [(True, 0.1), (False, 0.5)])
def test_threads_that_wait_actively_are_left_to_calm_down(
    spins: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run after another session's is not timed."""
    monkeypatch.setattr(Spinning, "spins", spins)
    done = timing.race([lambda: Spinning(0.1, 0.0)] * 2, {}, 9.0)  # type: ignore[list-item, return-value]
    assert done.median(0) == pytest.approx(seconds)
    assert not spins or max(np.max(p.times[0]) for p in done.pairs) == pytest.approx(seconds)
