"""Interleaved timing of models, and what can be said from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.algebra import Values
from pwopt.running.runtime import Feeds, Session

#: Rounds before the first one that counts.
WARM_UP = 3
#: Never fewer rounds than this, whatever the budget; never more than that.
MIN_ROUNDS, MAX_ROUNDS = 20, 400
#: Bootstrap samples for the confidence interval (Efron, 1979).
RESAMPLES = 2000


_turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def share(turn: contextlib.AbstractContextManager[Any]) -> None:
    """Let what several processes share, such as a lock, decide whose clocks run."""
    global _turn
    _turn = turn


def alone() -> contextlib.AbstractContextManager[Any]:
    """The time in which no other process that shares this machine's turn runs its clocks."""
    return _turn


@dataclass(frozen=True)
class Race:
    """Times of several models, run in turn.

    Attributes
    ----------
    times : tuple of arrays
        Seconds by `Session.clock`, one array per model; equal indices ran in the same round.
    """

    times: tuple[Values, ...]

    @property
    def rounds(self) -> int:
        return len(self.times[0])

    def median(self, i: int) -> float:
        return float(np.median(self.times[i]))

    def minimum(self, i: int) -> float:
        return float(np.min(self.times[i]))

    def speedup(self, i: int = 1) -> float:
        """Median over the rounds of the time of the first model over that of model i: slow spells hit both alike."""
        return float(np.median(self.times[0] / self.times[i]))

    def interval(self, i: int = 1, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap confidence interval of `speedup`, resampling rounds."""
        rng = np.random.default_rng(0)
        picks = rng.integers(0, self.rounds, (RESAMPLES, self.rounds))
        ratios = np.median((self.times[0] / self.times[i])[picks], axis=1)
        tail = (1 - confidence) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return float(low), float(high)


def race(
    sessions: Sequence[Session],
    feeds: Feeds,
    budget: float,
    progress: Callable[[float], None] = lambda _: None,
    *,
    decided: float | None = None,
    least: int = MIN_ROUNDS,
) -> Race:
    """Time models against each other on the same inputs.

    Every round runs each model once, in random order, so that drift and noise hit all alike.

    Parameters
    ----------
    sessions : sequence of Session
    feeds : dict of arrays
    budget : float
        Seconds to spend; at least `least` rounds are run.
    progress : callable, optional
        Called with the fraction done.
    decided : float, optional
        Stop as soon as the interval of the second model's speed-up at this confidence excludes 1; close to 1,
        since the question is asked many times.
    """
    for session in sessions:
        session.bind(feeds)
        for _ in range(WARM_UP):
            session.step()
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        for i in rng.permutation(len(sessions)):
            clock = sessions[i].clock
            begin = clock()
            sessions[i].step()
            times[i].append(clock() - begin)
        spent = time.perf_counter() - start
        progress(min(1.0, max(spent / budget if budget else 1.0, (done + 1) / MAX_ROUNDS)))
        if done + 1 < least:
            continue
        if spent >= budget:
            break
        if decided is not None and (done + 1) % least == 0:
            low, high = Race(tuple(np.array(t) for t in times)).interval(confidence=decided)
            if low > 1.0 or high < 1.0:
                break
    return Race(tuple(np.array(t) for t in times))
