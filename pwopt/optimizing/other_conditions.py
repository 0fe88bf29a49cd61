"""Race the result at other input sizes and thread counts. It may be slower at none of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pwopt.reporting.report import ConditionLatency, Latency
from pwopt.rewriting.records import Rewrite
from pwopt.rewriting.wording import format_count
from pwopt.running.progress import Progress
from pwopt.running.timing import CONFIDENCE, Race, Rules
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.environment import Environment

#: The seconds for each other condition, as a share of those for the final race.
CONDITION_SHARE = 0.25


def usual_threads() -> int:
    """The number of threads that onnxruntime uses by default: one for each physical core of this process."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu))
    return max(1, len(cores))


def other_environments(environment: Environment | None, thread_counts: Sequence[int]) -> list[Environment]:
    """The combinations of all sizes with all thread counts, without the first.

    Parameters
    ----------
    environment : Environment or None
        Its samples have all sizes.
    thread_counts : sequence of int
        Empty for the defaults: 1, and `usual_threads`.
    """
    if environment is None:
        return []
    sizes: dict[tuple[tuple[int, ...], ...], int] = {}
    for i, sample in enumerate(environment.samples):
        sizes.setdefault(tuple(value.shape for value in sample.feeds.values()), i)
    threads = dict.fromkeys(thread_counts or (1, usual_threads()))
    found = [replace(environment, threads=t, samples=[environment.samples[i]]) for i in sizes.values() for t in threads]
    return found[1:]


@dataclass(frozen=True)
class ConditionRaces:
    """Races of an original against candidates under other conditions.

    Attributes
    ----------
    original : Path
    seconds : float
        For each race.
    progress : Progress
    """

    original: Path
    seconds: float
    progress: Progress

    def run(self, candidate: Path, environment: Environment) -> ConditionLatency:
        """Race a candidate against the original."""
        label = f"racing with {format_count(environment.threads, 'thread')}, {environment.samples[0].label}"
        self.progress(label, 0.0)
        race = self._race(self.original, candidate, environment)
        shapes = {name: value.shape for name, value in environment.samples[0].feeds.items()}
        latency = Latency.from_race(race)
        return ConditionLatency(environment.threads, shapes, latency, latency.slower)

    def _race(self, a: Path, b: Path, environment: Environment) -> Race:
        return environment.race([a, b], self.seconds, rules=Rules(CONFIDENCE))

    def leave_out_slow(
        self, slow: Sequence[tuple[Environment, ConditionLatency]], candidate: Path, compilation: Compilation,
        rewrites: Sequence[Rewrite], build: Callable[[Compilation], Path],
    ) -> Compilation:  # fmt: skip
        """Leave out the kinds of rewrites that make a result slower under some conditions.

        One kind after another is taken out, the last first. It stays out if the model is faster without it beyond doubt
        under that condition. This ends when the model is no longer slower than the original there.

        Parameters
        ----------
        slow : sequence of (Environment, ConditionLatency)
            Conditions under which the result is slower, with the measurements.
        candidate : Path
            The result.
        compilation : Compilation
        rewrites : sequence of Rewrite
            The rewrites of the result.
        build : callable
            Writes the model of a compilation.

        Returns
        -------
        Compilation
            The given one if no kind is at fault alone.
        """
        for environment, measured in slow:
            for name in reversed(dict.fromkeys(r.pass_name for r in rewrites)):
                reason = f"slower with {measured.label}: {measured.latency.speedup:.3f}×"
                tried = compilation.leave_out([r for r in rewrites if r.pass_name == name], reason)
                model = build(tried)
                if environment.fault(model):
                    continue
                if self._race(candidate, model, environment).interval(confidence=CONFIDENCE)[0] <= 1.0:
                    continue
                compilation, candidate = tried, model
                if not self.run(candidate, environment).slower:
                    break
        return compilation
