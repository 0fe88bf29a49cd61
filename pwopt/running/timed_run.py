"""A run that ends: onnxruntime is told to stop when the time is over."""

from __future__ import annotations

import threading
import time

from pwopt.errors import ModelError
from pwopt.inputs.samples import Feeds
from pwopt.running.installation import import_onnxruntime
from pwopt.running.session import Session

#: A run shorter than this is done again, since a first one also finds memory.
SHORT = 0.05


class TooSlowError(ModelError):
    """A run that did not end in its time."""


def seconds_of(session: Session, feeds: Feeds, limit: float) -> float:
    """How long a run takes, by the session's own clock.

    Parameters
    ----------
    limit : float
        Seconds after which onnxruntime stops between two operators (``RunOptions.terminate``); a provider that records
        its launches runs to the end.

    Raises
    ------
    TooSlowError
        If it took longer.
    ModelError, ProviderError
        See `pwopt.running.session.Session.run`.
    """
    spent = [_timed(session, feeds, limit)]
    if spent[0] < SHORT:
        spent.append(_timed(session, feeds, limit))
    return min(spent)


def _timed(session: Session, feeds: Feeds, limit: float) -> float:
    options = import_onnxruntime().RunOptions()
    options.log_severity_level = 4
    start, begin = time.perf_counter(), session.clock()

    def stop() -> None:
        options.terminate = True

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    try:
        session.run(feeds, options)
    except ModelError:
        if time.perf_counter() - start < limit:
            raise
        raise TooSlowError(f"a run takes longer than {limit:.0f} seconds") from None
    finally:
        timer.cancel()
    return session.clock() - begin
