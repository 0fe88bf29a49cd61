"""Divide the time for measurements: races of rewrites get what verification and the final race leave."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pwopt.optimizing.other_conditions import CONDITION_SHARE
from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Measuring

#: The greatest share of the budget for the final race.
FINAL_SHARE = 0.15
#: How many times longer a second final race may be if the first one decides nothing, and the share of the budget that
#: is kept for it.
OPEN_RACES, OPEN_SHARE = 6.0, 0.2
#: Models that are loaded to verify and to profile: the original with and without graph optimisation, the result, and
#: both once more under the profiler. Two more are loaded for each other condition.
LOADS, LOADS_PER_CONDITION = 5, 2
#: Runs of each sample to verify: two of the original, one of the result.
VERIFYING_RUNS = 3
#: Seconds for all runs under the profiler.
PROFILING_SECONDS = 1.0
#: The greatest share of the budget that is reserved for all this, because the first load on a provider may take much
#: longer than later ones.
MAX_RESERVED = 0.5


class Budget:
    """The seconds for all measurements of one optimisation. They begin when the object is created.

    Parameters
    ----------
    problem : Problem
    measuring : Measuring
    conditions : int
        The number of other conditions under which the result is raced.
    """

    def __init__(self, problem: Problem, measuring: Measuring, conditions: int) -> None:
        self._end = time.perf_counter() + measuring.seconds
        self._seconds, self._race_seconds = measuring.seconds, measuring.race_seconds
        worker = problem.environment.worker if problem.environment is not None else None
        load, run = worker.took if worker is not None and worker.ready else (0.0, 0.0)
        loads = (LOADS + LOADS_PER_CONDITION * conditions) * load
        reserved = loads + VERIFYING_RUNS * len(problem.samples) * run + PROFILING_SECONDS
        self._reserved = min(reserved, MAX_RESERVED * self._seconds)
        #: How many final races all conditions take together.
        self._races = 1 + CONDITION_SHARE * conditions

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def allows_retry(self) -> bool:
        """Whether there is time to verify and race another result."""
        return self._seconds <= 0 or self.left > self._reserved + self._final_races()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time in this context."""
        begin = time.perf_counter()
        yield
        self._end += time.perf_counter() - begin

    def for_selection(self) -> float:
        """Seconds for races of rewrites, if the final race takes its full share and decides nothing."""
        return max(0.0, self.left - self._reserved - self._final_races() - OPEN_SHARE * self._seconds)

    def for_final_race(self) -> float:
        """Seconds for the final race under the first condition."""
        if self._seconds <= 0:
            return self._race_seconds
        return min(self._race_seconds, max(0.0, self.left - self._reserved) / self._races)

    def for_open_race(self) -> float:
        """Seconds for a second final race; enough is left to verify and race another result."""
        left = max(0.0, self.left - self._reserved - self._final_races())
        return min(OPEN_RACES * self.for_final_race(), left)

    def _final_races(self) -> float:
        return self._races * min(self._race_seconds, FINAL_SHARE * self._seconds)
