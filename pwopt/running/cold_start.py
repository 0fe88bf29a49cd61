"""Cold starts: what loading and running a model once takes in a process that has run no model yet.

The process does not import onnx, and so starts sooner.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph.temporary import temporary_folder
from pwopt.inputs.feeds import Feeds
from pwopt.running import installation, providers
from pwopt.running.child_process import child_command
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import Session

#: Linux's description of a process's memory (proc(5)).
STATUS = Path("/proc/self/status")


def measure_cold_starts(
    paths: Sequence[Path], provider: Provider, threads: int, feeds: Feeds
) -> list[dict[str, float]]:
    """Load and run each model once in a new process; return seconds of both, and the increase of memory in bytes.

    Where the system has it, each process is forked from one that has imported onnxruntime and runs no model itself.

    Raises
    ------
    UsageError
        If a model does not run there.
    """
    if not hasattr(os, "fork"):
        return [measured for path in paths for measured in _run_children([path], provider, threads, feeds)]
    return _run_children(paths, provider, threads, feeds)


def _run_children(paths: Sequence[Path], provider: Provider, threads: int, feeds: Feeds) -> list[dict[str, float]]:
    with _save_inputs(feeds) as inputs:
        command = child_command(_measure_models, provider.text, str(threads), str(inputs), *map(str, paths))
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    measured: list[dict[str, float]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(measured) != len(paths):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(
            f"{str(paths[min(len(measured), len(paths) - 1)])!r} does not run in a process of its own: {reason}"
        )
    return measured


@contextlib.contextmanager
def _save_inputs(feeds: Feeds) -> Iterator[Path]:
    with temporary_folder() as folder:
        path = folder / "inputs.npz"
        arrays: dict[str, Any] = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        np.savez(path, **arrays)
        yield path


def _read_peak() -> float:
    """Read the peak memory of this process since the last `_reset_peak`, in bytes; 0 if the system does not say."""
    if STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, in KiB elsewhere
    return most * (1.0 if sys.platform == "darwin" else 1024.0)


def _reset_peak() -> None:
    """Reset the peak memory of this process (Linux, proc(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _measure_models(provider: str, threads: str, inputs: str, *paths: str) -> None:
    """Measure each model in a fork of this process, one after another; a single one in this process."""
    installation.silence_onnxruntime()
    installation.import_onnxruntime()
    feeds = dict(np.load(inputs))
    for path in paths:
        if len(paths) == 1:
            _measure_model_here(path, as_provider(provider), int(threads), feeds)
        elif (child := os.fork()) == 0:
            _measure_and_exit(path, as_provider(provider), int(threads), feeds)
        elif os.waitpid(child, 0)[1]:
            sys.exit(1)


def _measure_and_exit(path: str, placed: Provider, threads: int, feeds: Feeds) -> NoReturn:
    """In a fork: measure a model, and end without exit handlers, which wait for threads that the fork does not have."""
    code = 1
    try:
        _measure_model_here(path, placed, threads, feeds)
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _measure_model_here(path: str, placed: Provider, threads: int, feeds: Feeds) -> None:
    card = providers.find_card(placed)
    _reset_peak()
    before = _read_peak()
    start = time.perf_counter()
    session = Session(path, placed, threads, tf32=True)
    loaded = time.perf_counter()
    session.run(feeds)
    ran = time.perf_counter()
    measured = {"session": loaded - start, "first": ran - loaded, "memory": _read_peak() - before}
    since = providers.find_card(placed)
    if card is not None and since is not None:
        measured["device"] = (since.used - card.used) * 1.048576
    sys.stdout.write(json.dumps(measured) + "\n")
