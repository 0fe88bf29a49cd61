"""Race the result at other input sizes, thread counts and page sizes. It may be slower at none of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pwopt.reporting.report import NEGLIGIBLE_SLOWDOWN, ConditionLatency, Latency
from pwopt.rewriting.records import Rewrite
from pwopt.rewriting.wording import format_count
from pwopt.running.installation import list_cores
from pwopt.running.noninferiority import OWN_PAIRS, UNKNOWN_SPREAD, NoninferiorityRules, Spread
from pwopt.running.progress import Progress
from pwopt.running.student import student_quantile
from pwopt.running.timing import CONFIDENCE, Race, Rules
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.environment import Environment

#: The seconds for each other condition, as a share of those for the final race, and the share of those seconds after
#: which a race may end because the result does not seem slower.
CONDITION_SHARE, PATIENCE = 0.375, 0.4
#: How many more races settle it where the first one suspects that the result is slower.
MORE_RACES = 6
#: A race under another condition ends early when the speed-up is known to this relative precision.
CONDITION_PRECISION = 0.01


def usual_threads() -> int:
    """The number of threads that onnxruntime uses by default: one for each physical core of this process."""
    cores = set()
    for cpu in list_cores():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu))
    return max(1, len(cores))


def other_environments(environment: Environment | None, thread_counts: Sequence[int]) -> list[Environment]:
    """List the combinations of sizes and thread counts without the first one, and the first one with pages of 4 KiB.

    Given thread counts are combined with all sizes. Those that pwopt chooses itself are combined with the first size
    only. Pages of 4 KiB are a condition only where programs can have those or huge pages.

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
    first = next(iter(threads))
    listed = [(i, t) for i in sizes.values() for t in threads if thread_counts or t == first or i == 0]
    found = [replace(environment, threads=t, samples=[environment.samples[i]]) for i, t in listed]
    small = found[0].use_small_pages()
    return found[1:] if small is None else [*found[1:], small]


def compare_page_sizes(small: Race, huge: Race) -> tuple[float, float, float]:
    """Divide the original's time with pages of 4 KiB by its time with huge pages.

    Parameters
    ----------
    small, huge : Race
        The original is the first model in both. They ran in two processes, so their pairs of sessions are independent.

    Returns
    -------
    tuple of float
        The ratio, and both ends of its confidence interval, by the t-test of Welch (Biometrika 34, 1947).
    """
    logs = [np.array([math.log(float(np.median(pair.times[0]))) for pair in race.pairs]) for race in (small, huge)]
    ratio = float(np.mean(logs[0]) - np.mean(logs[1]))
    if min(map(len, logs)) < 2:
        return math.exp(ratio), 0.0, math.inf
    parts = [max(float(np.var(x, ddof=1)), 1e-12) / len(x) for x in logs]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, logs, strict=True))
    reach = min(student_quantile(max(1, int(freedom)), CONFIDENCE) * math.sqrt(sum(parts)), 700.0 - abs(ratio))
    return math.exp(ratio), math.exp(ratio - reach), math.exp(ratio + reach)


@dataclass(frozen=True)
class ConditionRaces:
    """Races of an original against candidates under other conditions.

    Attributes
    ----------
    original : Path
    seconds : float
        For each race, the start of its process included.
    progress : Progress
    noise : float
        The ratio of a copy of the original in the race under the first condition, at least 1. A result is called slower
        only if it is slower than that.
    spread : Spread
        How much the ratio differs between pairs of sessions, from the race under the first condition.
    """

    original: Path
    seconds: float
    progress: Progress
    noise: float = 1.0
    spread: Spread = UNKNOWN_SPREAD

    def learn(self, latency: Latency | None, race: Race) -> ConditionRaces:
        """Take the noise and the spread from the race under the first condition."""
        noise = self.noise if latency is None else latency.noise
        return replace(self, noise=noise, spread=Spread.from_race(race))

    def run(self, candidate: Path, environment: Environment) -> tuple[ConditionLatency, Race] | None:
        """Race a candidate against the original; None if the process for pages of 4 KiB does not start.

        Of many conditions, one may seem slower by chance. So a candidate that seems slower races several times more,
        and only these races decide.
        """
        begin = time.perf_counter()
        if environment.small_pages and (environment.worker is None or not environment.worker.ready):
            return None
        started = time.perf_counter() - begin
        pages = ", pages of 4 KiB" if environment.small_pages else ""
        label = f"racing with {format_count(environment.threads, 'thread')}, {environment.samples[0].label}{pages}"
        self.progress(label, 0.0)
        race = self._race(candidate, environment, self.seconds - started)
        if self.spread.pool(race)[1] < 1 / self.noise:
            race = self._race_again(candidate, environment)
        latency = replace(Latency.from_race(race), interval=self.spread.interval(race))
        slower = latency.slower and latency.interval[1] < 1 / self.noise
        shapes = {name: value.shape for name, value in environment.samples[0].feeds.items()}
        return ConditionLatency(environment.threads, shapes, latency, slower, environment.small_pages), race

    def _race_again(self, candidate: Path, environment: Environment) -> Race:
        """Race several times more, and fewer times if the candidate does not seem slower any more."""
        races: list[Race] = []
        for _ in range(MORE_RACES):
            races.append(self._race(candidate, environment, self.seconds))
            race = Race(tuple(pair for r in races for pair in r.pairs), min(r.own for r in races))
            if len(race.pairs) >= OWN_PAIRS and race.speedup() > 1 - NEGLIGIBLE_SLOWDOWN:
                break
        return race

    def _race(self, candidate: Path, environment: Environment, seconds: float) -> Race:
        rules = NoninferiorityRules(
            CONFIDENCE, precise=CONDITION_PRECISION, harmless=NEGLIGIBLE_SLOWDOWN, spread=self.spread,
            patience=PATIENCE * self.seconds,
        )  # fmt: skip
        return environment.race([self.original, candidate], max(0.0, seconds), rules=rules)

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
        left_out: set[str] = set()
        for environment, measured in slow:
            if left_out:
                again = self.run(candidate, environment)
                if again is None or not again[0].slower:
                    continue
            for name in reversed(dict.fromkeys(r.pass_name for r in rewrites if r.pass_name not in left_out)):
                reason = f"slower with {measured.label}: {measured.latency.speedup:.3f}×"
                tried = compilation.leave_out([r for r in rewrites if r.pass_name == name], reason)
                model = build(tried)
                if environment.fault(model):
                    continue
                race = environment.race([candidate, model], self.seconds, rules=Rules(CONFIDENCE))
                if race.interval(confidence=CONFIDENCE)[0] <= 1.0:
                    continue
                compilation, candidate = tried, model
                left_out.add(name)
                again = self.run(candidate, environment)
                if again is None or not again[0].slower:
                    break
        return compilation
