#!/usr/bin/env python3
"""Measure what onnxruntime's settings change for a model: docs/running-fast.md quotes the results.

    python benchmarks/settings.py MODEL... [-o benchmarks/results/settings.json] [--seconds 4]

Each setting races against onnxruntime's defaults in pairs of fresh sessions, in a process with huge pages: denormals
flushed to zero, no memory arena, and, with two threads, threads that do not spin. `pwopt bench MODEL` measures huge
pages themselves. Ratios are the default's time over the setting's: processor time on one thread, else wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from pwopt.graph.files import load
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.running import huge_pages, installation, timing
from pwopt.running.progress import ignore_progress
from pwopt.running.providers import as_provider
from pwopt.running.size_trials import choose_sizes


class TunedSession:
    """What `pwopt.running.timing.race` needs of a session, with any session options."""

    def __init__(self, path: Path, threads: int, change: Callable[[ort.SessionOptions], None] | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if change is not None:
            change(options)
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._feeds: Feeds = {}
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.spins = threads > 1

    def bind(self, feeds: Feeds) -> None:
        self._feeds = feeds

    def step(self) -> None:
        self._session.run(None, self._feeds)


def flush_denormals(options: ort.SessionOptions) -> None:
    options.add_session_config_entry("session.set_denormal_as_zero", "1")


def drop_arena(options: ort.SessionOptions) -> None:
    options.enable_cpu_mem_arena = False


def stop_spinning(options: ort.SessionOptions) -> None:
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")


#: Name of a setting → threads, and the setting itself.
SETTINGS = {
    "denormals flushed to zero": (1, flush_denormals),
    "no memory arena": (1, drop_arena),
    "2 threads that do not spin": (2, stop_spinning),
}


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """Race every setting against the defaults."""
    model = load(path)
    specs = input_specs(model.proto)
    sizes = choose_sizes(specs, model.proto, path, as_provider("cpu"), None, ignore_progress).sizes
    feeds, found = draw_feeds(specs, sizes), {}
    for name, (threads, change) in SETTINGS.items():
        openers = [partial(TunedSession, path, threads, None), partial(TunedSession, path, threads, change)]
        race = timing.race(openers, feeds, seconds)  # type: ignore[arg-type]
        low, high = race.interval()
        found[name] = {"ms": race.median(0) * 1e3, "ratio": race.speedup(), "low": low, "high": high}
    return {"model": path.name, "sizes": sizes, "settings": found, "huge_pages": huge_pages.held_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.models[0], options.seconds)))
        return
    rows = []
    for path in options.models:
        command = [sys.executable, __file__, str(path), "--child", "--seconds", str(options.seconds)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=huge_pages.requesting(os.environ)
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("model", *SETTINGS)
    for row in rows:
        cells = (f"{s['ratio']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in row["settings"].values())
        table.add_row(row["model"], *cells)
    Console().print(table)
    if options.output is not None:
        content = {"environment": installation.describe_machine(as_provider("cpu"), 1), "models": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
