"""Last stage: which of what was tried is returned, and one sentence on why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import onnx

from pwopt.optimizing.attempt import Attempt
from pwopt.optimizing.budget import Budget
from pwopt.optimizing.other_conditions import slower_somewhere
from pwopt.optimizing.request import Request
from pwopt.reporting.report import Latency, RejectedCandidate, Report
from pwopt.rewriting.records import Skip
from pwopt.selecting.snapshot import select_passes

LOG = logging.getLogger(__name__)

#: A speed-up below this is explained.
LITTLE = 1.05


def returned(
    tried: Callable[[bool], Attempt], original: onnx.ModelProto, request: Request, allowance: Budget
) -> Attempt:
    """What is faster beyond doubt, or else what comes next.

    Parameters
    ----------
    tried : callable
        Tries every rewrite that was chosen, or (True) only those of them that always pay.
    original : onnx.ModelProto
    request : Request
    allowance : Budget
        What comes next must fit into it.
    """
    done = tried(False)
    if not done.faster:
        if request.insists:
            return _kept(done, request.insists)
        policy = {p.name: p.policy for p in select_passes(request.passes, request.plugins)}
        LOG.info("not faster beyond doubt: only the rewrites that always pay are tried, or the original is returned")
        more = any(policy.get(r.pass_name) != "always" for r in done.report.rewrites)
        done = _best(done, tried(True) if more and allowance.again else done, original)
    latency = done.report.latency
    if done.faster and latency is not None and latency.speedup < LITTLE and not request.insists:
        return done.noted(f"Little was gained. {_why_little(done.report)}")
    return done


def _why_little(report: Report) -> str:
    """One sentence on what is left to gain."""
    change = report.before.change(report.after)
    if change is not None and change < 0:
        return f"Multiply-adds fell by {-change:.1%}, but the rest of the model takes the time."
    folded = report.before.nodes - report.after.nodes
    went = f"most of the {folded} operators that went are ones that onnxruntime fuses itself"
    return f"The multiply-adds are all needed, and {went if folded else 'there was nothing to fold'}."


def _kept(done: Attempt, asked: str) -> Attempt:
    """What is not faster, and stays since it was asked for."""
    latency = done.report.latency
    assert latency is not None
    slower = latency.slower
    found = f"Measured slower ({latency.speedup:.2f}×)" if slower else f"Not faster beyond doubt{_within(latency)}"
    elsewhere = slower_somewhere(done.report)
    if elsewhere is not None:
        found = f"Measured slower with {elsewhere.label}{_within(elsewhere.latency)}"
    return done.noted(f"{found}, and kept since {asked} was asked for.")


def _best(tried: Attempt, always: Attempt, original: onnx.ModelProto) -> Attempt:
    """The original, or the model with nothing but rewrites that always pay if that is faster than it beyond doubt."""
    raced = tried.report.latency
    assert raced is not None
    latency = raced
    which = "slower" if latency.slower else "no faster beyond doubt"
    elsewhere = slower_somewhere(tried.report)
    if elsewhere is not None:
        which, latency = f"slower with {elsewhere.label}", elsewhere.latency
    reason = f"measured {which} in the whole model{_within(latency)}"
    better = always.report.latency is not None and always.faster
    kept = always.report.rewrites if better else ()
    sites = {r.site for r in kept}
    taken = tuple(Skip(f"{reason}: {r.reason}", r.site) for r in tried.report.rewrites if r.site not in sites)
    skips = (*tried.report.skips, *taken)
    told = f"The rewritten model was measured {which}{_within(latency)}"
    if better:
        only = Attempt(always.proto, replace(always.report, skips=skips))
        return only.noted(f"{told}: only the rewrites that always pay were kept.")
    r = tried.report
    candidate = RejectedCandidate(r.after, raced, r.conditions, r.operators)
    report = replace(
        r, rewrites=(), skips=skips, after=r.before, latency=raced.unchanged(), operators=None, candidate=candidate,
        conditions=tuple(c.unchanged() for c in r.conditions), layers=None,
    )  # fmt: skip
    return Attempt(original, report).noted(f"{told}: the original is returned. {_why_little(tried.report)}")


def _within(latency: Latency) -> str:
    return f" ({latency.speedup:.3f}× [{latency.interval[0]:.3f}, {latency.interval[1]:.3f}])"
