"""Choose the model to return: the result, the result without measured rewrites, or the original if both are slower."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import onnx

from pwopt.graph.reasons import Reason
from pwopt.optimizing.attempt import Attempt
from pwopt.reporting import notes
from pwopt.reporting.report import RejectedCandidate
from pwopt.rewriting.records import Skip

LOG = logging.getLogger(__name__)


def choose_result(
    done: Attempt, try_unmeasured: Callable[[], Attempt | None], original: onnx.ModelProto, insists: str
) -> Attempt:
    """Return the result, the result without its measured rewrites, or the original.

    Measured rewrites must make the whole model faster beyond doubt. The others save operators or work by themselves, so
    they stay unless the model is slower beyond doubt.

    Parameters
    ----------
    done : Attempt
        With all rewrites that were selected.
    try_unmeasured : callable
        Returns an attempt without the measured rewrites, not raced if there is no time for that; None if there are
        no measured rewrites.
    original : onnx.ModelProto
    insists : str
        The option because of which the result is returned though it is slower, else "".
    """
    latency = done.report.latency
    if latency is None or not done.report.rewrites:
        return done
    if insists and (done.slower or not latency.faster):
        return done.add_notes(notes.explain_kept(latency, done.report.slowest_condition, insists))
    if not latency.faster or done.slower:
        LOG.info("not faster beyond doubt: the rewrites that need no measurement are tried alone")
        done = _drop_measured(done, try_unmeasured())
    return _return_original(done, original) if done.slower else done.add_notes(*notes.explain_verdict(done.report))


def _drop_measured(tried: Attempt, unmeasured: Attempt | None) -> Attempt:
    """Return the attempt without measured rewrites, with the reason for each one that was dropped."""
    latency = tried.report.latency
    if unmeasured is None or latency is None:
        return tried
    compared, figures = notes.compare_with_original(latency, tried.report.slowest_condition)
    kept = {r.site for r in unmeasured.report.rewrites}
    dropped = [r for r in tried.report.rewrites if r.site not in kept]
    skips = tuple(
        Skip(Reason("measured {} in the whole model{}: {}", compared, figures, r.reason), r.site) for r in dropped
    )
    names = ", ".join(dict.fromkeys(r.pass_name for r in dropped))
    report = replace(unmeasured.report, skips=(*unmeasured.report.skips, *skips))
    note = f"With {names} the model was measured {compared}{figures}, so these rewrites were left out."
    return Attempt(unmeasured.proto, report).add_notes(*([note] if names else []))


def _return_original(tried: Attempt, original: onnx.ModelProto) -> Attempt:
    """Return the original, with the measurements of the rewritten model."""
    report, latency = tried.report, tried.report.latency
    assert latency is not None
    compared, figures = notes.compare_with_original(latency, report.slowest_condition)
    undone = tuple(
        Skip(Reason("measured {} in the whole model{}: {}", compared, figures, r.reason), r.site)
        for r in report.rewrites
    )
    unchanged = replace(
        report, rewrites=(), skips=(*report.skips, *undone), after=report.before, latency=latency.compare_with_self(),
        operators=None, candidate=RejectedCandidate(report.after, latency, report.conditions, report.operators),
        conditions=tuple(c.compare_with_self() for c in report.conditions), layers=None,
    )  # fmt: skip
    return Attempt(original, unchanged).add_notes(
        f"The rewritten model was measured {compared}{figures}: the original is returned."
    )
