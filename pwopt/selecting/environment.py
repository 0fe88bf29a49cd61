"""The execution environment of an optimisation: provider, threads, inputs, and the worker process that runs models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pwopt.inputs.samples import Sample
from pwopt.running import timing
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider
from pwopt.running.session import Session
from pwopt.running.worker import Worker


@dataclass(frozen=True)
class Environment:
    """Where models run.

    Attributes
    ----------
    provider : Provider
    threads : int
    samples : list of Sample
        Inputs; races run on the first.
    worker : Worker or None
        A process that runs each model first, so that a crash does no harm.
    """

    provider: Provider
    threads: int
    samples: list[Sample]
    worker: Worker | None = None

    def fault(self, model: Path) -> str:
        """Return why a model cannot be used here, as a clause, or ""."""
        return "" if self.worker is None else self.worker.fault(model)

    def race(
        self,
        models: Sequence[Path],
        seconds: float,
        progress: Progress = ignore_progress,
        rules: timing.Rules = timing.TO_THE_END,
    ) -> timing.Race:
        """Time models side by side, as users run them: on CUDA with TF32."""
        feeds = self.samples[0].feeds
        if self.worker is not None and self.worker.ready:
            return self.worker.race(models, self.threads, feeds, seconds, rules, progress)
        openers = [partial(Session, m, self.provider, self.threads, tf32=True) for m in models]
        return timing.race(openers, feeds, seconds, progress, rules)
