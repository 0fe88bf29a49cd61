"""Choose what is returned: the result if it is faster, else only the rewrites that always pay, else the original."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import onnx

from pwopt.optimizing.attempt import Attempt
from pwopt.reporting import notes
from pwopt.reporting.report import RejectedCandidate
from pwopt.rewriting.records import Skip

LOG = logging.getLogger(__name__)

#: A speed-up below this is explained.
EXPLAINED_SPEEDUP = 1.05


def choose_result(
    done: Attempt, try_always_only: Callable[[], Attempt | None], original: onnx.ModelProto, insists: str
) -> Attempt:
    """Return the first of three that is faster than the original beyond doubt, or the original.

    Parameters
    ----------
    done : Attempt
        With all rewrites that were selected.
    try_always_only : callable
        Returns an attempt with only the rewrites that always pay; None if there is no time for it.
    original : onnx.ModelProto
    insists : str
        The option because of which the result is returned though it is not faster, else "".
    """
    if not done.faster:
        if insists:
            return _keep_slower(done, insists)
        LOG.info("not faster beyond doubt: only the rewrites that always pay are tried, or the original is returned")
        done = _fall_back(done, try_always_only() or done, original)
    latency = done.report.latency
    if done.faster and latency is not None and latency.speedup < EXPLAINED_SPEEDUP and not insists:
        return done.noted(f"Little was gained. {notes.explain_small_gain(done.report)}")
    return done


def _keep_slower(done: Attempt, option: str) -> Attempt:
    latency = done.report.latency
    assert latency is not None
    return done.noted(notes.explain_kept(latency, done.report.slowest_condition, option))


def _fall_back(tried: Attempt, always: Attempt, original: onnx.ModelProto) -> Attempt:
    """Return the attempt with only the rewrites that always pay if it is faster beyond doubt, else the original."""
    report, latency = tried.report, tried.report.latency
    assert latency is not None
    slower, figures = notes.compare_with_original(latency, report.slowest_condition)
    reason = f"measured {slower} in the whole model{figures}"
    better = always.report.latency is not None and always.faster
    kept = {r.site for r in always.report.rewrites} if better else set()
    undone = tuple(Skip(f"{reason}: {r.reason}", r.site) for r in report.rewrites if r.site not in kept)
    skips = (*report.skips, *undone)
    measured = f"The rewritten model was measured {slower}{figures}"
    if better:
        only = Attempt(always.proto, replace(always.report, skips=skips))
        return only.noted(f"{measured}: only the rewrites that always pay were kept.")
    unchanged = replace(
        report, rewrites=(), skips=skips, after=report.before, latency=latency.unchanged(), operators=None,
        candidate=RejectedCandidate(report.after, latency, report.conditions, report.operators),
        conditions=tuple(c.unchanged() for c in report.conditions), layers=None,
    )  # fmt: skip
    why = notes.explain_small_gain(report)
    return Attempt(original, unchanged).noted(f"{measured}: the original is returned. {why}")
