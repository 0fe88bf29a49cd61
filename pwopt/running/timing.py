"""Interleaved timing of models, and what can be said from it."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.algebra import Values
from pwopt.inputs.samples import Feeds
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.session import Session

#: Rounds before the first one that counts.
WARM_UP = 3
#: Never fewer rounds than this, whatever the budget, unless a race may end early; never more than that.
MIN_ROUNDS, MAX_ROUNDS = 20, 400
#: Bootstrap samples for the confidence interval (Efron, 1979).
RESAMPLES = 2000
#: Rounds, and seconds, before a race may be decided: fewer tell nothing, and shorter ones may lie in one slow spell.
FIRST_LOOK, SHORTEST = 3, 0.1
#: Rounds before a race may end because there is nothing to gain, and the confidence of that.
HOPELESS_ROUNDS, HOPELESS = 8, 0.7
#: Ratios that are further from their median than so many scaled median absolute deviations count as if they were no
#: further (Huber, "Robust Estimation of a Location Parameter", 1964), from so many rounds on.
HUBER, ROBUST = 1.5, 8


_turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def share(turn: contextlib.AbstractContextManager[Any]) -> None:
    """Let what several processes share, such as a lock, decide whose clocks run."""
    global _turn
    _turn = turn


def alone() -> contextlib.AbstractContextManager[Any]:
    """The time in which no other process that shares this machine's turn runs its clocks."""
    return _turn


@dataclass(frozen=True)
class Evidence:
    """What rounds of races said of one model against another, in sums, so that later rounds can be added.

    Attributes
    ----------
    rounds : float
        How many; those under load count for less than one.
    total, squares : float
        Sums over them of the logarithm of the ratio of times, and of its square.
    runs : int
        How many there really were, if that is known: as many as there are, their spread is known from.
    """

    rounds: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    runs: int = 0

    @classmethod
    def of(cls, race: Race, i: int = 1) -> Evidence:
        """Of model i against the first; a round counts as much as the machine let the models have its time.

        From `ROBUST` rounds on by one step of Huber's M-estimator, since slow spells hit single runs.
        """
        logs = np.log(race.times[0] / race.times[i])
        middle = float(np.median(logs))
        scale = 1.4826 * float(np.median(np.abs(logs - middle)))
        mean, spread = float(np.mean(logs)), float(np.std(logs))
        if scale > 0 and len(logs) >= ROBUST:
            scores = (logs - middle) / scale
            clipped, near = np.clip(scores, -HUBER, HUBER), float(np.mean(np.abs(scores) < HUBER))
            mean = middle + scale * float(np.mean(clipped)) / near
            spread = scale * float(np.std(clipped)) / near
        rounds = race.own * len(logs)
        return cls(rounds, rounds * mean, rounds * (mean**2 + spread**2), len(logs))

    def __add__(self, other: Evidence) -> Evidence:
        sums = self.rounds + other.rounds, self.total + other.total, self.squares + other.squares
        return Evidence(*sums, self._seen + other._seen)

    @property
    def _seen(self) -> int:
        return self.runs or int(self.rounds)

    @property
    def speedup(self) -> float:
        """The geometric mean of the ratios."""
        return math.exp(self.total / self.rounds) if self.rounds else 1.0

    def interval(self, confidence: float) -> tuple[float, float]:
        """Of the speed-up, by Student's distribution (1908): honest for few rounds as well."""
        if self._seen < 2 or not self.rounds:
            return 0.0, math.inf
        mean = self.total / self.rounds
        counted = self.rounds * (1 - 1 / self._seen)
        variance = max(0.0, self.squares / self.rounds - mean**2) / counted
        reach = student(self._seen - 1, confidence) * math.sqrt(variance)
        return math.exp(mean - reach), math.exp(min(mean + reach, 700.0))


#: No rounds.
NOTHING = Evidence()


@functools.lru_cache(maxsize=4096)
def student(freedom: int, confidence: float) -> float:
    """How many standard errors either side hold a mean with this confidence, for so many degrees of freedom."""
    if freedom > MAX_ROUNDS:
        return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2 if high - low < 1 or low > 0 else math.sqrt(max(high, 1.0))
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that a variable of Student's distribution lies between −t and t (Abramowitz and Stegun, 26.7)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True)
class Race:
    """Times of several models, run in turn.

    Attributes
    ----------
    times : tuple of arrays
        Seconds by `Session.clock`, one array per model; equal indices ran in the same round.
    own : float
        Which part of the time that passed the models had for themselves; 1 where nobody can say.
    """

    times: tuple[Values, ...]
    own: float = 1.0

    @property
    def rounds(self) -> int:
        return len(self.times[0])

    def median(self, i: int) -> float:
        return float(np.median(self.times[i]))

    def minimum(self, i: int) -> float:
        return float(np.min(self.times[i]))

    def speedup(self, i: int = 1) -> float:
        """Median over the rounds of the time of the first model over that of model i: slow spells hit both alike.

        Of few rounds, the geometric mean, as for `interval`.
        """
        if self.rounds < MIN_ROUNDS:
            return Evidence.of(self, i).speedup
        return float(np.median(self.times[0] / self.times[i]))

    def interval(self, i: int = 1, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `speedup`: by the bootstrap, resampling rounds, or of few rounds by `Evidence`."""
        if self.rounds < MIN_ROUNDS:
            return Evidence.of(self, i).interval(confidence)
        rng = np.random.default_rng(0)
        picks = rng.integers(0, self.rounds, (RESAMPLES, self.rounds))
        ratios = np.median((self.times[0] / self.times[i])[picks], axis=1)
        tail = (1 - confidence) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class Rules:
    """When a race may end before its time is over, or must go on beyond it.

    Attributes
    ----------
    decided : float or None
        As soon as the second model is faster or slower at this confidence, however often that is asked.
    worth : float
        As soon as the second model's speed-up is hardly this; not before `HOPELESS_ROUNDS`.
    least : int
        Not before so many rounds, whatever the time.
    known : Evidence
        Of earlier races.
    precise : float
        As soon as the speed-up is known to this part of it, with 95 % confidence.
    """

    decided: float | None = None
    worth: float = 0.0
    least: int = MIN_ROUNDS
    known: Evidence = NOTHING
    precise: float = 0.0

    def over(self, race: Race, spent: float) -> bool:
        """Whether what was seen so far is enough."""
        if race.rounds < max(FIRST_LOOK, self.least) or spent < SHORTEST:
            return False
        if self.decided is None and not self.precise:
            return False  # of a single model, nothing can be said
        evidence = self.known + Evidence.of(race)
        if self.precise and race.rounds >= MIN_ROUNDS:
            low, high = evidence.interval(0.95)
            if high < low * (1 + 2 * self.precise):
                return True
        if self.decided is None:
            return False
        looks = race.rounds - FIRST_LOOK + 1
        doubt = (1 - self.decided) * 6 / (math.pi * looks) ** 2  # which adds up to 1 − decided over all looks
        low, high = evidence.interval(1 - doubt)
        if low > 1.0 or high < 1.0:
            return True
        return race.rounds >= HOPELESS_ROUNDS and evidence.interval(HOPELESS)[1] < self.worth


#: All rounds that there is time for.
TO_THE_END = Rules()


def race(
    sessions: Sequence[Session],
    feeds: Feeds,
    budget: float,
    progress: Progress = ignore_progress,
    rules: Rules = TO_THE_END,
) -> Race:
    """Time models against each other on the same inputs.

    Every round runs each model once, in random order, so that drift and noise hit all alike.

    Parameters
    ----------
    sessions : sequence of Session
    feeds : dict of arrays
    budget : float
        Seconds to spend.
    progress : callable, optional
        Called with (stage, fraction done).
    rules : Rules, optional
        What may end a race of two models early; `least` rounds are run in any case.
    """
    for session in sessions:
        session.bind(feeds)
        for _ in range(WARM_UP if budget > 0 else 1):
            begin = time.perf_counter()
            session.step()
            if time.perf_counter() - begin > budget / MIN_ROUNDS:
                break  # a slow model is warm after one run
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in sessions]
    start, passed = time.perf_counter(), 0.0
    for done in range(MAX_ROUNDS):
        for i in rng.permutation(len(sessions)):
            clock = sessions[i].clock
            if sessions[i].spins:
                sessions[i].step()
            begin, wall = clock(), time.perf_counter()
            sessions[i].step()
            times[i].append(clock() - begin)
            passed += time.perf_counter() - wall
        spent = time.perf_counter() - start
        progress("racing", min(1.0, max(spent / budget if budget else 1.0, (done + 1) / MAX_ROUNDS)))
        seen = Race(tuple(np.array(t) for t in times), min(1.0, sum(map(sum, times)) / passed))
        if (done + 1 >= rules.least and spent >= budget) or rules.over(seen, spent):
            break
    return seen
