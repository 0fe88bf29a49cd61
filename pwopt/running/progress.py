"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the name of the current stage, and the fraction of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]

#: The stages of an optimisation, by the beginning of their names: the fractions of the whole run at which each one
#: usually starts and ends. The longest beginning that matches counts.
STAGES = {
    "reading": (0.0, 0.02), "choosing inputs": (0.02, 0.04), "trying ": (0.02, 0.04), "rewriting": (0.04, 0.08),
    "waiting for the clock": (0.08, 0.08), "looking for rewrites": (0.08, 0.1), "profiling ": (0.1, 0.5),
    "racing ": (0.1, 0.5), "verifying": (0.5, 0.6), "racing": (0.6, 0.8), "racing with ": (0.8, 0.95),
    "profiling": (0.95, 0.98), "writing": (0.98, 1.0),
}  # fmt: skip


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
