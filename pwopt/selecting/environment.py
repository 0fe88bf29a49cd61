"""The execution environment of an optimisation: provider, threads, inputs, and the worker process that runs models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pwopt.inputs.samples import Sample
from pwopt.running import huge_pages, timing
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
    small_worker : Worker or None
        The same with pages of 4 KiB; None if `worker` has those, or if the system gives every program the same pages.
    small_pages : bool
        Whether this is the environment of `use_small_pages`.
    together : bool
        Whether sessions of several models are open side by side; not those of large models (`timing.race`).
    """

    provider: Provider
    threads: int
    samples: list[Sample]
    worker: Worker | None = None
    small_worker: Worker | None = None
    small_pages: bool = False
    together: bool = True

    @property
    def huge_pages_mb(self) -> float | None:
        """Megabytes in huge pages of the process that times models, after a run; None where the system has none."""
        if not huge_pages.system_mode():
            return None
        held = self.worker.huge_bytes if self.worker is not None and self.worker.ready else huge_pages.held_bytes()
        return held / 1e6

    def use_small_pages(self) -> Environment | None:
        """Return this environment with pages of 4 KiB; None unless programs can have either size of pages."""
        if self.small_worker is None or not self.huge_pages_mb:
            return None
        return replace(self, worker=self.small_worker, small_worker=None, small_pages=True)

    def await_workers(self) -> None:
        """Wait for processes that start in the background, since nothing else may run while models are timed."""
        for worker in filter(None, (self.worker, self.small_worker)):
            worker.await_start()

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
        return timing.race(openers, feeds, seconds, progress, rules, together=self.together)
