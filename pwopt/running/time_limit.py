"""Run a model with a time limit, after which onnxruntime stops."""

from __future__ import annotations

import threading
import time

from pwopt.errors import ModelError
from pwopt.inputs.feeds import Feeds
from pwopt.running.installation import import_onnxruntime
from pwopt.running.session import Session
from pwopt.running.stopwatch import Stopwatch

#: A run shorter than this many seconds is repeated, since the first one also allocates memory.
MIN_TIMED_SECONDS = 0.05
#: Seconds between two looks at the time of a run.
TIMER_INTERVAL = 0.05


class TooSlowError(ModelError):
    """A run exceeded its time limit."""


def time_run(session: Session, feeds: Feeds, limit: float) -> float:
    """Measure the seconds of a run by the session's own clock.

    Parameters
    ----------
    limit : float
        Seconds of work (`pwopt.running.stopwatch.Stopwatch`) after which onnxruntime stops between two operators
        (``RunOptions.terminate``). A provider that replays a captured graph runs to the end.

    Raises
    ------
    TooSlowError
        If the run took longer.
    ModelError, ProviderError
        See `pwopt.running.session.Session.run`.
    """
    spent = [_time_once(session, feeds, limit)]
    if spent[0] < MIN_TIMED_SECONDS:
        spent.append(_time_once(session, feeds, limit))
    return min(spent)


def _time_once(session: Session, feeds: Feeds, limit: float) -> float:
    options = import_onnxruntime().RunOptions()
    options.log_severity_level = 4
    watch, begin = Stopwatch(time.process_time if session.on_cpu else None), session.clock()
    ended = threading.Event()

    def stop_in_time() -> None:
        while not ended.wait(TIMER_INTERVAL):
            if watch.elapsed() >= limit:
                options.terminate = True

    threading.Thread(target=stop_in_time, daemon=True).start()
    try:
        session.run(feeds, options)
    except ModelError:
        if watch.elapsed() < limit:
            raise
        raise TooSlowError(f"a run takes longer than {limit:.0f} seconds") from None
    finally:
        ended.set()
    return session.clock() - begin
