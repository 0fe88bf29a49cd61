"""How long work reports its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

#: Called with the name of the current stage, and the fraction of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]

#: The stages of an optimisation, by the beginning of their names: the fractions of the whole run at which each one
#: usually starts and ends. The longest beginning that matches counts.
STAGES = {
    "reading": (0.0, 0.02), "choosing inputs": (0.02, 0.04), "trying ": (0.02, 0.04), "rewriting": (0.04, 0.08),
    "waiting for a turn": (0.08, 0.08), "looking for rewrites": (0.08, 0.1), "profiling ": (0.1, 0.5),
    "racing ": (0.1, 0.5), "verifying": (0.5, 0.6), "racing": (0.6, 0.8), "racing with ": (0.8, 0.95),
    "profiling": (0.95, 0.98), "writing": (0.98, 1.0),
}  # fmt: skip
#: Stages that do not use up the time for measurements: those before it, and rewriting.
UNMEASURED = ("reading", "choosing inputs", "trying ", "rewriting")
#: The time for many models is estimated when this fraction of them is done, and after so many seconds.
ESTIMATED_FRACTION, ESTIMATED_SECONDS = 0.1, 5.0


def ignore_progress(_stage: str, _done: float) -> None:
    """Report nothing."""


def track_run(report: Progress) -> Progress:
    """Return a callback that reports the fraction of a whole optimisation instead of that of its stage.

    The fraction never falls, although stages may be repeated or left out.

    Examples
    --------
    >>> show = track_run(lambda stage, done: print(f"{stage} {done:.2f}"))
    >>> show("racing", 0.5)
    racing 0.70
    >>> show("rewriting", 0.0)
    rewriting 0.70
    """
    reached = 0.0

    def track(stage: str, done: float) -> None:
        nonlocal reached
        known = max((name for name in STAGES if stage.startswith(name)), key=len, default="")
        start, end = STAGES.get(known, (reached, reached))
        reached = max(reached, start + (end - start) * min(1.0, max(0.0, done)))
        report(stage, reached)

    return track


class TimeLeft:
    """Estimates the time that is left of a run, as far as it is known.

    One model has an upper bound as soon as it is measured, because its measurements have a limit. Before that, nothing
    is known: reading and rewriting have no limit. Many models have an estimate when some of them are done: the time of
    the others is in proportion.

    Parameters
    ----------
    limit : float, optional
        Seconds for all measurements of one model; 0 if nothing is measured. None for many models.
    clock : callable, optional
        Returns the time in seconds.
    """

    def __init__(self, limit: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._limit, self._clock = limit, clock
        self._start = self._updated = clock()
        self._end: float | None = None
        self._model, self._paused = "", False

    def update(self, stage: str, done: float) -> None:
        """Note the current stage and the fraction of the run that is done.

        The stages of many models are "NAME: stage" or "3 of 12 models".
        """
        now, model = self._clock(), stage.partition(": ")[0]
        if self._paused and self._end is not None:
            self._end += now - self._updated
        if self._limit is not None:
            self._paused = stage.startswith(UNMEASURED)
            if self._end is None and not self._paused:
                self._end = now + self._limit
        elif model != self._model and done >= ESTIMATED_FRACTION and now - self._start >= ESTIMATED_SECONDS:
            self._end = self._start + (now - self._start) / done
        self._updated, self._model = now, model

    def describe(self) -> str:
        """Describe the time that is left in minutes and seconds; "" if it is not known."""
        if self._end is None:
            return ""
        left = math.ceil(self._end - (self._updated if self._paused else self._clock()))
        if left <= 0:
            return ""
        return f"{'about' if self._limit is None else 'at most'} {left // 60}:{left % 60:02d} left"
