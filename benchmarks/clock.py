#!/usr/bin/env python3
"""Calibrate the clock: race models against copies of themselves, and against copies slowed down by 2 %.

    python benchmarks/clock.py MODEL... [-o benchmarks/results/clock.json] [--races 20] [--seconds 2] [--patience 30]

Each model races against itself and a copy, by the rules of the final race of `pwopt optimize`. This happens `--races`
times under four conditions: idle and beside a busy loop on another core, with huge pages and without. The models must
be equal, so every 99 % interval that excludes 1 is a false verdict, and at most 1 in 50 may be one. The power of the
clock is the time that it takes to find a copy slower whose every run spins for 2 % longer. Dynamic sizes are the likely
ones. The busy loop needs Linux and two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pwopt.graph.files import load
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.optimizing.attempt import final_rules
from pwopt.running import huge_pages, installation, timing
from pwopt.running.progress import ignore_progress
from pwopt.running.providers import as_provider
from pwopt.running.session import Session
from pwopt.running.size_trials import choose_sizes

#: By how much a copy is slowed down.
SLOWDOWN = 1.02
#: The highest rate of false verdicts: that of the interval, doubled.
TOLERATED = 2 * (1 - timing.CONFIDENCE)


class SlowedSession(Session):
    """A session whose runs take `SLOWDOWN` times as long."""

    def step(self) -> None:
        begin = self.clock()
        super().step()
        end = begin + SLOWDOWN * (self.clock() - begin)
        while self.clock() < end:
            pass


@contextlib.contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    """Keep this process on one core, and another one busy."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    loop = None
    if busy:
        loop = subprocess.Popen([sys.executable, "-c", "while True: sum(range(100000))"])
        os.sched_setaffinity(loop.pid, cores[1:2])
    try:
        yield
    finally:
        if loop is not None:
            loop.kill()
            loop.wait()
        os.sched_setaffinity(0, cores)


def calibrate(path: Path, races: int, seconds: float, patience: float) -> dict[str, Any]:
    """In a process of its own: the intervals of races of a model against itself, and the time to find it slowed."""
    model = load(path)
    specs = input_specs(model.proto)
    provider = as_provider("cpu")
    feeds = draw_feeds(specs, choose_sizes(specs, model.proto, path, provider, None, ignore_progress).sizes)
    opener = partial(Session, path, provider, 1)
    found: list[dict[str, float]] = []
    for _ in range(races):
        race = timing.race([opener] * 3, feeds, seconds, rules=final_rules(measured=True))
        low, high = race.interval()
        found.append({"ratio": race.speedup(), "low": low, "high": high, "pairs": len(race.pairs)})
    took, verdicts = [], []
    for _ in range(max(1, races // 5)):
        begin = time.perf_counter()
        rules = timing.Rules(decided=timing.CONFIDENCE)
        race = timing.race([opener, partial(SlowedSession, path, provider, 1)], feeds, patience, rules=rules)
        took.append(time.perf_counter() - begin)
        verdicts.append(race.interval()[1] < 1)
    run = race.median(0)
    return {
        "races": found, "slowdown_seconds": took, "slowdown_found": verdicts, "run_ms": run * 1e3,
        "huge_pages": huge_pages.held_bytes(),
    }  # fmt: skip


def run_child(path: Path, huge: bool, options: argparse.Namespace) -> dict[str, Any]:
    """`calibrate` in a process with or without huge pages."""
    environ = (huge_pages.requesting if huge else huge_pages.refusing)(os.environ)
    command = [
        sys.executable, __file__, str(path), "--child", "--races", str(options.races),
        "--seconds", str(options.seconds), "--patience", str(options.patience),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """False verdicts, widths and power over all models under one condition."""
    races = [race for row in rows for race in row["races"]]
    wrong = sum(r["low"] > 1 or r["high"] < 1 for r in races)
    seconds = [s for row in rows for s in row["slowdown_seconds"]]
    return {
        "races": len(races),
        "false_verdicts": wrong,
        "rate": wrong / len(races),
        "half_width": float(np.median([np.log(r["high"] / r["low"]) / 2 for r in races])),
        "extreme_ratios": [min(r["ratio"] for r in races), max(r["ratio"] for r in races)],
        "slowdown_found": float(np.mean([found for row in rows for found in row["slowdown_found"]])),
        "slowdown_seconds": float(np.median(seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that a race has to find a slow copy")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(calibrate(options.models[0], options.races, options.seconds, options.patience)))
        return
    console, results = Console(), {}
    table = Table("condition", "races", "false verdicts", "half-width", "ratios", "2 % found", "seconds to find it")
    for busy in (False, True):
        for huge in (True, False):
            name = f"{'beside a busy loop' if busy else 'idle'}, {'huge pages' if huge else 'pages of 4 KiB'}"
            with busy_core(busy):
                rows = [{"model": p.name, **run_child(p, huge, options)} for p in options.models]
            summary = summarize(rows)
            results[name] = {**summary, "models": rows}
            low, high = summary["extreme_ratios"]
            table.add_row(
                name, str(summary["races"]), str(summary["false_verdicts"]), f"±{summary['half_width']:.2%}",
                f"{low:.3f} to {high:.3f}", f"{summary['slowdown_found']:.0%}", f"{summary['slowdown_seconds']:.1f}",
            )  # fmt: skip
            console.print(f"{name}: {summary['false_verdicts']} of {summary['races']} verdicts false")
            if options.output is not None:
                machine = installation.describe_machine(as_provider("cpu"), 1)
                content = {
                    "environment": machine,
                    "seconds": options.seconds,
                    "patience": options.patience,
                    "conditions": results,
                }
                options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(table)
    if any(found["rate"] > TOLERATED for found in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
