"""How the seconds that may go into measuring are spent: races of rewrites first, as much as the rest leaves them."""

from __future__ import annotations

import time
from dataclasses import replace

from pwopt.optimizing.conditions import SHARE, others
from pwopt.optimizing.request import Request
from pwopt.optimizing.subject import Subject

#: The final race takes this part of the budget at most.
FINAL = 0.15
#: Models that are loaded to verify and to profile: the original with and without graph optimisation, the result, both
#: once more under the profiler; and two for each further condition.
LOADS, LOADS_ELSEWHERE = 5, 2
#: Runs of each sample to verify it: the original twice, the result.
RUNS = 3
#: Seconds for all runs under the profiler.
PROFILING = 1.0


class Allowance:
    """The wall seconds for all measuring of one optimisation, from the moment when it is made.

    Parameters
    ----------
    subject : Subject
    request : Request
    """

    def __init__(self, subject: Subject, request: Request) -> None:
        self._end = time.perf_counter() + request.seconds
        self._request = request
        self._elsewhere = max(0, len(others(subject, request)))
        worker = subject.arena.worker if subject.arena is not None else None
        load, run = worker.took if worker is not None and worker.ready else (0.0, 0.0)
        loads = (LOADS + LOADS_ELSEWHERE * self._elsewhere) * load
        self._fixed = loads + RUNS * len(subject.samples) * run + PROFILING

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.perf_counter())

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
        return min(self._request.race_seconds, FINAL * self._request.seconds)

    def rest(self) -> Request:
        """The request with what is left for the final race."""
        if self._request.seconds <= 0:
            return self._request
        left = max(0.0, self.left - self._fixed) / self._races
        return replace(self._request, race_seconds=min(self._request.race_seconds, left))
