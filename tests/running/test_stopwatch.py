"""Time limits that other load on the machine does not use up."""

from __future__ import annotations

import itertools
import os
import sys

import pytest

from pwopt.running import stopwatch
from pwopt.running.stopwatch import PATIENT, Stopwatch, processor_time_of


@pytest.mark.parametrize(
    ("wall", "processor", "elapsed"),
    [
        (4.0, 1.0, 1.0),  # another process had the core
        (4.0, 7.0, 4.0),  # two threads
        (40.0, 0.0, 40.0 / PATIENT),  # it waits for something that may never come
        (4.0, None, 4.0),  # a graphics card works
    ],
)
def test_work_is_processor_time_unless_wall_time_is_less(
    wall: float, processor: float | None, elapsed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    walls, used = iter([100.0, 100.0 + wall]), itertools.count(5.0, processor or 0.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(walls))
    watch = Stopwatch(None if processor is None else lambda: next(used))
    assert watch.elapsed() == pytest.approx(elapsed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")
def test_processor_time_of_a_process_is_what_it_says_itself() -> None:
    read = processor_time_of(os.getpid())
    assert read is not None
    times = os.times()
    assert read() == pytest.approx(times.user + times.system, abs=0.1)
    assert processor_time_of(2**22 + 1) is None
