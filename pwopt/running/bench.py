"""Benchmark models side by side: latency with its interval, cold start, memory, and time per operator."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from pwopt.errors import ModelError, UsageError
from pwopt.graph.files import load
from pwopt.graph.operators import VIEWS
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.input_specs import InputSpec, check_shapes, input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.running import huge_pages, memory, timing, turn
from pwopt.running.cold_start import measure_cold_starts
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import NodeTime, Session, check_settings, nodes_elsewhere
from pwopt.running.size_trials import Sizes, choose_sizes
from pwopt.running.worker import UnusableError, Worker

#: Operators that only change the layout of a tensor in memory.
LAYOUT = VIEWS | {"ReorderInput", "ReorderOutput", "Transpose"}
#: Number of runs under the profiler.
PROFILED = 10
#: How often processes with and without huge pages are timed in turn.
HUGE_PAGES_PAIRS = 5


@dataclass(frozen=True)
class Row:
    """One model at one batch size.

    Attributes
    ----------
    model : str
    shapes : dict
        Input name → sizes.
    median_ms, minimum_ms : float
        Of all runs, interleaved with those of the other models, over several fresh sessions.
    ratio : float
        The first model's time over this one's, the geometric mean over pairs of fresh sessions; `interval` is its 99 %
        confidence interval.
    session_ms, first_run_ms : float
        Loading the model, and its first run, in a process of its own.
    memory_mb : float
        By how much loading and the first run increase the peak memory of that process.
    device_mb : float or None
        By how much they increase the memory in use on the graphics card; None without a card.
    operators : dict
        Operator → milliseconds per run under the profiler, the slowest first.
    layout_share : float
        The fraction of that time in `LAYOUT` operators.
    elsewhere : int
        How many nodes ran on another provider.
    control : tuple of float
        What a copy of the first model reached in the same race: its ratio, and both ends of the interval.
    huge_pages : tuple of float, or None
        Of a single model: its time with pages of 4 KiB over its time with huge pages, and both ends of the interval.
        None where programs cannot choose, and on other providers than the CPU.
    start : tuple of float
        The first model's time to create a session over this one's, in processor time, the geometric mean over pairs of
        fresh sessions; and both ends of the interval.
    huge_pages_mb : float or None
        How many megabytes of the process that raced the models lay in huge pages; None on other systems than Linux.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    median_ms: float
    minimum_ms: float
    ratio: float
    interval: tuple[float, float]
    session_ms: float
    first_run_ms: float
    memory_mb: float
    device_mb: float | None
    operators: dict[str, float]
    layout_share: float
    elsewhere: int
    control: tuple[float, float, float] = (1.0, 1.0, 1.0)
    huge_pages: tuple[float, float, float] | None = None
    start: tuple[float, float, float] = (1.0, 1.0, 1.0)
    huge_pages_mb: float | None = None


def benchmark(
    models: Sequence[str | os.PathLike[str]],
    *,
    provider: str | Provider = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: Sequence[int] = (),
    seconds: float = 8.0,
    progress: Progress = ignore_progress,
) -> list[Row]:
    """Time any models that take the same inputs against the first.

    Parameters
    ----------
    models : sequence of paths
    provider : str or Provider
        Never replaced by another.
    threads : int
    shapes : mapping of input name to sizes, optional
        For dynamic inputs; likely sizes otherwise.
    batch : sequence of int, optional
        Sizes for the first axis of every input whose first axis is dynamic; as many rows per model.
    seconds : float
        To race all models, per batch size.
    progress : callable, optional
        Called with (stage, fraction done).

    Returns
    -------
    list of Row

    Raises
    ------
    UsageError, ModelError, ProviderError
        If the models do not take the same inputs, or a batch size does not fit; see `pwopt.errors`.

    Examples
    --------
    >>> import pwopt
    >>> rows = pwopt.benchmark(["models/linear_sequence.onnx"], shapes={"x": (1, 64, 8, 8)}, seconds=0.1)
    >>> rows[0].ratio
    1.0
    """
    if not models:
        raise UsageError("there is no model to time; give one or more")
    check_settings(threads, None, None)
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"models cannot be raced for {seconds:g} seconds; give 0 or more, and a finite number")
    paths, placed = [Path(m) for m in models], as_provider(provider)
    model = load(paths[0]).proto
    specs = _check_common_inputs(model, paths)
    rows: list[Row] = []
    for size in batch or (None,):
        sizes = choose_sizes(specs, model, paths[0], placed, shapes, progress).sizes
        if size is not None:
            batched = _set_batch(specs, sizes, size)
            sizes = choose_sizes(specs, model, paths[0], placed, batched, progress).sizes
        report = progress if size is None else functools.partial(_report_batch, progress, size)
        rows += _race_models(paths, specs, sizes, placed, threads, seconds, report)
    return rows


def _report_batch(progress: Progress, batch: int, stage: str, done: float) -> None:
    progress(f"{stage} at batch {batch}", done)


def _race_models(
    paths: Sequence[Path],
    specs: Sequence[InputSpec],
    sizes: Sizes,
    provider: Provider,
    threads: int,
    seconds: float,
    progress: Progress,
) -> list[Row]:
    """Race all models at the same sizes; returns one row per model."""
    for path in paths[1:]:
        check_shapes(input_specs(load(path).proto), sizes)
    feeds = draw_feeds(specs, sizes)
    with turn.exclusive(), contextlib.closing(Worker(paths[0], provider, threads, feeds)) as worker:
        race = _race_in(worker, [*paths, paths[0]], provider, threads, feeds, seconds, progress)
        held = worker.huge_bytes if worker.ready else huge_pages.held_bytes()
    held_mb = held / 1e6 if huge_pages.system_mode() else None
    rows = []
    for i, path in enumerate(paths):
        progress(f"profiling {path.name}", i / len(paths))
        rows.append(replace(_measure_model(path, i, race, provider, threads, sizes, feeds), huge_pages_mb=held_mb))
    if len(rows) == 1:
        rows = [replace(rows[0], huge_pages=_huge_pages_gain(paths[0], provider, threads, feeds, seconds, progress))]
    return rows


def _race_in(
    worker: Worker, paths: Sequence[Path], provider: Provider, threads: int, feeds: Feeds, seconds: float,
    progress: Progress,
) -> timing.Race:  # fmt: skip
    """Race models in a process with huge pages, or in this one if no other can be started."""
    if not worker.ready:
        openers = [functools.partial(Session, p, provider, threads, tf32=True) for p in paths]
        return timing.race(openers, feeds, seconds, progress)
    for path in dict.fromkeys(paths):
        fault = worker.fault(path)
        if fault:
            raise ModelError(f"{str(path)!r} cannot be timed: {fault}")
    try:
        return worker.race(paths, threads, feeds, seconds, timing.TO_THE_END, progress)
    except UnusableError as error:
        raise ModelError(f"a model failed while it was timed: {error}") from error


def _huge_pages_gain(
    path: Path, provider: Provider, threads: int, feeds: Feeds, seconds: float, progress: Progress
) -> tuple[float, float, float] | None:
    """Divide the time of a model with pages of 4 KiB by its time with huge pages, with the interval.

    Two processes, one with huge pages and one without, time the model in turn, in fresh sessions.
    """
    if provider.kind != "cpu" or huge_pages.system_mode() != "madvise":
        return None
    logs: list[float] = []
    with turn.exclusive(), contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(contextlib.closing(Worker(path, provider, threads, feeds, huge=huge)))
            for huge in (False, True)
        ]
        if not all(worker.ready for worker in workers):
            return None
        for k in range(HUGE_PAGES_PAIRS):
            progress("comparing with huge pages", k / HUGE_PAGES_PAIRS)
            took = [0.0, 0.0]
            for i in (0, 1) if k % 2 else (1, 0):
                each = seconds / (4 * HUGE_PAGES_PAIRS)
                took[i] = workers[i].race([path], threads, feeds, each, timing.TO_THE_END, ignore_progress).median(0)
            logs.append(math.log(took[0] / took[1]))
    evidence = timing.Evidence.from_logs(np.array(logs))
    return evidence.speedup, *evidence.interval()


def _check_common_inputs(first: onnx.ModelProto, paths: Sequence[Path]) -> list[InputSpec]:
    """Read the inputs of the first model, and check that the others have the same."""
    specs = input_specs(first)
    for path in paths[1:]:
        theirs = [(s.name, s.dtype) for s in input_specs(load(path).proto)]
        if sorted(theirs) != sorted((s.name, s.dtype) for s in specs):
            raise UsageError(f"{str(path)!r} does not take the same inputs as {str(paths[0])!r}")
    return specs


def _set_batch(
    specs: Sequence[InputSpec], sizes: Mapping[str, Sequence[int]], batch: int
) -> dict[str, tuple[int, ...]]:
    if batch < 1:
        raise UsageError(f"a batch has 1 or more samples, not {batch}")
    dynamic = {s.name for s in specs if s.shape and not isinstance(s.shape[0], int)}
    if not dynamic and all(size[:1] != (batch,) for size in sizes.values()):
        raise UsageError(f"the first axis of no input is dynamic, so the batch cannot be {batch}")
    return {name: (batch, *size[1:]) if name in dynamic else tuple(size) for name, size in sizes.items()}


def _measure_model(
    path: Path,
    index: int,
    race: timing.Race,
    provider: Provider,
    threads: int,
    sizes: dict[str, tuple[int, ...]],
    feeds: Feeds,
) -> Row:
    (cold,) = measure_cold_starts([path], provider, threads, feeds)
    operators = sum_by_operator(time_nodes([path], provider, threads, feeds)[0])
    profiled = Session(path, provider, threads, profile=True)
    profiled.run(feeds)
    placed = profiled.placement()
    total = sum(operators.values())
    return Row(
        str(path),
        sizes,
        race.median(index) * 1e3,
        race.minimum(index) * 1e3,
        race.speedup(index),
        race.interval(index) if index else (1.0, 1.0),
        cold["session"] * 1e3,
        cold["first"] * 1e3,
        cold["memory"] / 1e6,
        cold.get("device"),
        operators,
        sum(ms for op, ms in operators.items() if op in LAYOUT) / total if total else 0.0,
        sum(map(len, nodes_elsewhere(placed, provider).values())),
        (race.speedup(-1), *race.interval(-1)),
        start=_compare_starts(race, index),
    )


def _compare_starts(race: timing.Race, i: int) -> tuple[float, float, float]:
    """Divide the first model's time to create a session by that of model `i`, with the interval."""
    if i == 0 or not race.pairs[0].creation:
        return 1.0, 1.0, 1.0
    evidence = timing.Evidence.from_logs(race.creation_logs(i))
    return evidence.speedup, *evidence.interval()


def time_nodes(
    paths: Sequence[Path],
    provider: Provider,
    threads: int,
    feeds: Feeds,
    runs: int = PROFILED,
    *,
    together: bool = True,
) -> list[list[NodeTime]]:
    """Profile models; returns the nodes of each, with their times.

    They run in turn, so that a slow period affects all of them. Without `together`, each is closed before the next one
    is created.
    """
    if together:
        return _profile_in_turn([Session(path, provider, threads, profile=True) for path in paths], feeds, runs)
    found: list[list[NodeTime]] = []
    for path in paths:
        found += _profile_in_turn([Session(path, provider, threads, profile=True)], feeds, runs)
        memory.release_freed()
    return found


def sum_by_operator(nodes: Iterable[NodeTime]) -> dict[str, float]:
    """Sum node times by operator, in milliseconds per run, the slowest first."""
    total: dict[str, float] = {}
    for node in nodes:
        total[node.op] = total.get(node.op, 0.0) + node.seconds * 1e3
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _profile_in_turn(sessions: Sequence[Session], feeds: Feeds, runs: int) -> list[list[NodeTime]]:
    for _ in range(runs):
        for session in sessions:
            session.profiled_run(feeds)
    return [session.nodes() for session in sessions]
