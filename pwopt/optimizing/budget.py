"""How the seconds that may go into measuring are spent: races of rewrites first, as much as the rest leaves them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

from pwopt.optimizing.other_conditions import SHARE, others
from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Request

#: The final race takes this part of the budget at most.
FINAL = 0.15
#: Models that are loaded to verify and to profile: the original with and without graph optimisation, the result, both
#: once more under the profiler; and two for each further condition.
LOADS, LOADS_ELSEWHERE = 5, 2
#: Runs of each sample to verify it: the original twice, the result.
RUNS = 3
#: Seconds for all runs under the profiler.
PROFILING = 1.0
#: What is kept back for all that, at most: the first load of a provider may take long, and later ones do not.
MOST = 0.5


class Budget:
    """The wall seconds for all measuring of one optimisation, from the moment when it is made.

    Parameters
    ----------
    subject : Problem
    request : Request
    """

    def __init__(self, subject: Problem, request: Request) -> None:
        self._end = time.perf_counter() + request.seconds
        self.request = request
        self._elsewhere = max(0, len(others(subject, request)))
        worker = subject.arena.worker if subject.arena is not None else None
        load, run = worker.took if worker is not None and worker.ready else (0.0, 0.0)
        loads = (LOADS + LOADS_ELSEWHERE * self._elsewhere) * load
        fixed = loads + RUNS * len(subject.samples) * run + PROFILING
        self._fixed = min(fixed, MOST * request.seconds)

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.perf_counter())

    @property
    def again(self) -> bool:
        """Whether there is time to verify and to race another result."""
        return self.request.seconds <= 0 or self.left > self._fixed + self._races * self._final

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time for what is no measuring."""
        begin = time.perf_counter()
        yield
        self._end += time.perf_counter() - begin

    @property
    def for_choosing(self) -> float:
        """Seconds for races of rewrites, if the final race is to be as long as it may."""
        return max(0.0, self.left - self._fixed - self._races * self._final)

    @property
    def _races(self) -> float:
        """How many final races all conditions together take."""
        return 1 + SHARE * self._elsewhere

    @property
    def _final(self) -> float:
        return min(self.request.race_seconds, FINAL * self.request.seconds)

    def rest(self) -> Request:
        """The request with what is left for the final race."""
        if self.request.seconds <= 0:
            return self.request
        left = max(0.0, self.left - self._fixed) / self._races
        return replace(self.request, race_seconds=min(self.request.race_seconds, left))
