"""Other sizes and numbers of threads than those that are optimised for: at none of them may the result be slower."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pwopt.optimizing.preparation import Problem
from pwopt.optimizing.request import Request
from pwopt.reporting.report import ConditionLatency, Latency, Report
from pwopt.rewriting.records import Rewrite
from pwopt.rewriting.wording import counted
from pwopt.running.timing import CONFIDENCE, Race, Rules
from pwopt.selecting.rewrite_selection import Compilation, Environment

#: Of the time for the final race, the part for each other condition.
SHARE = 0.25


def usual_threads() -> int:
    """As many threads as onnxruntime takes by itself: one for each physical core that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu))
    return max(1, len(cores))


def others(subject: Problem, request: Request) -> list[Environment]:
    """Every condition but the first: all numbers of threads at all sizes."""
    arena = subject.arena
    if arena is None:
        return []
    sizes: dict[tuple[tuple[int, ...], ...], int] = {}
    for i, sample in enumerate(arena.samples):
        sizes.setdefault(tuple(value.shape for value in sample.feeds.values()), i)
    threads = dict.fromkeys(request.thread_counts or (1, usual_threads()))
    found = [replace(arena, threads=t, samples=[arena.samples[i]]) for i in sizes.values() for t in threads]
    return found[1:]


def as_latency(race: Race) -> Latency:
    """What a report says of a race of an original and a candidate, and perhaps a copy of the original."""
    control = (race.speedup(2), race.interval(2)) if len(race.pairs[0].times) > 2 else (None, None)
    return Latency(
        race.median(0) * 1e3, race.median(1) * 1e3, race.speedup(), race.interval(),
        race.minimum(0) * 1e3, race.minimum(1) * 1e3, race.rounds, len(race.pairs), *control,
    )  # fmt: skip


def timed(original: Path, candidate: Path, arena: Environment, request: Request) -> ConditionLatency:
    """Race both models under one condition, for a short while."""
    request.progress(f"racing with {counted(arena.threads, 'thread')}, {arena.samples[0].label}", 0.0)
    race = _race(arena, original, candidate, request)
    shapes = {name: value.shape for name, value in arena.samples[0].feeds.items()}
    return ConditionLatency(arena.threads, shapes, as_latency(race), race.interval(confidence=CONFIDENCE)[1] < 1.0)


def _race(arena: Environment, a: Path, b: Path, request: Request) -> Race:
    return arena.race([a, b], SHARE * request.race_seconds, rules=Rules(CONFIDENCE))


def respecting(
    slow: Sequence[tuple[Environment, ConditionLatency]], original: Path, candidate: Path, work: Compilation,
    rewrites: Sequence[Rewrite], build: Callable[[Compilation], Path], request: Request,
) -> Compilation:  # fmt: skip
    """The work without the kinds of rewrites that make a result slower under some conditions.

    One kind after another is taken back, the last first, and stays out if the model is faster without it beyond doubt
    under that condition, until it is no longer slower than the original there.

    Parameters
    ----------
    slow : sequence of (Environment, ConditionLatency)
        Conditions under which the result is slower, with what was measured.
    build : callable
        Writes the model of a work.

    Returns
    -------
    Work
        The given one if no kind is at fault by itself.
    """
    for arena, measured in slow:
        for name in reversed(dict.fromkeys(r.pass_name for r in rewrites)):
            reason = f"slower with {measured.label}: {measured.latency.speedup:.3f}×"
            tried = work.without([r for r in rewrites if r.pass_name == name], reason)
            model = build(tried)
            if arena.fault(model) or _race(arena, candidate, model, request).interval(confidence=CONFIDENCE)[0] <= 1.0:
                continue
            work, candidate = tried, model
            if not timed(original, candidate, arena, request).slower:
                break
    return work


def slower_somewhere(report: Report) -> ConditionLatency | None:
    """The condition under which a result is slowest, if it is slower beyond doubt."""
    return min((c for c in report.conditions if c.slower), key=lambda c: c.latency.speedup, default=None)
