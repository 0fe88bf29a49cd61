"""Time limits that other load on the machine does not use up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

#: A limit on processor time ends after this many times as much wall time at the latest, since a process may also hang.
PATIENT = 10.0


class Stopwatch:
    """Seconds of work since it was made: processor time, or wall time where that is less.

    A busy machine keeps a process waiting, which is no fault of the model. Several threads use more processor time than
    wall time. At least one `PATIENT`-th of the wall time counts.

    Parameters
    ----------
    processor_time : callable, optional
        Seconds of processor time of whatever works. Without it, wall time counts, as for a graphics card.
    """

    def __init__(self, processor_time: Callable[[], float] | None = time.process_time) -> None:
        self._processor_time = processor_time
        self._begin = time.perf_counter(), 0.0 if processor_time is None else processor_time()

    def elapsed(self) -> float:
        """Seconds of work so far."""
        wall = time.perf_counter() - self._begin[0]
        if self._processor_time is None:
            return wall
        return max(min(wall, self._processor_time() - self._begin[1]), wall / PATIENT)


def processor_time_of(pid: int) -> Callable[[], float] | None:
    """A function that reads the seconds of processor time of another process (proc(5)); None where Linux has none."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    last = 0.0

    def read() -> float:
        nonlocal last
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            return last
        last = (int(fields[11]) + int(fields[12])) / ticks
        return last

    return read
