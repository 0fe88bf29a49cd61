#!/usr/bin/env python3
"""How long pwopt takes to answer, stage by stage, and what the answer is worth.

    python benchmarks/answer_time.py FOLDER... [-o RESULTS.json] [--save OUT] [--models a,b] [--analytic]
        [--keep CACHES] [--with-records-of CACHES]
    python benchmarks/answer_time.py --race ORIGINALS BEFORE AFTER [-o RESULTS.json] [--seconds 8]

The first form optimises every .onnx file in some folders, each in a process of its own. The cache is empty, and there
are no tables of layers, as on the command line without --report. The table says for each how much time passed (wall),
and how much of the processors' it took (CPU), in total and by stage. A stage's time is its own: what it called that is listed too is not in it. CPU time includes that of the
process that tries and races candidates. The second form races what two versions made of the same originals, all
three side by side, with sizes that the second version's report says.

`--keep` keeps the cache of every model. `--with-records-of` begins with the records that `--keep` kept of all other
models, and never with those of the model itself.

A folder may hold a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: Stage → functions whose own time it is.
STAGES = {
    "read": ["pwopt.optimizing.optimizer:load", "pwopt.optimizing.optimizer:check_sites"],
    "sizes": ["pwopt.optimizing.optimizer:define_problem"],
    "snapshot": ["pwopt.optimizing.optimizer:start_compilation", "pwopt.selecting.compilation:Compilation.snapshot"],
    "search": ["pwopt.selecting.compilation:Compilation.find_opportunities"],
    "profiles": [
        "pwopt.selecting.rewrite_selection:RacingEvaluator.bound",
        "pwopt.selecting.rewrite_selection:RacingEvaluator.estimate",
    ],
    "candidates": [
        "pwopt.selecting.compilation:Compilation.write_file",
        "pwopt.selecting.compilation:Compilation.rewrite",
        "pwopt.selecting.environment:Environment.fault",
    ],
    "races": ["pwopt.selecting.rewrite_selection:RacingEvaluator.race"],
    "certificates": ["pwopt.selecting.compilation:Compilation.rewrite_certified"],
    "verify": ["pwopt.optimizing.attempt:Attempts.verify"],
    "final race": ["pwopt.optimizing.attempt:Attempts._race"],
    "layers": ["pwopt.optimizing.attempt:Pair.profile"],
    "conditions": [
        "pwopt.optimizing.attempt:Attempts._race_elsewhere",
        "pwopt.optimizing.other_conditions:ConditionRaces.leave_out_slow",
    ],
    "write": ["pwopt.optimizing.optimizer:save"],
}


class Stopwatch:
    """Exclusive times of stages, as functions enter and leave them."""

    def __init__(self) -> None:
        self.wall = dict.fromkeys((*STAGES, "other"), 0.0)
        self.cpu = dict.fromkeys((*STAGES, "other"), 0.0)
        self._stack = ["other"]
        self._last = time.perf_counter(), _processor_time()

    def charge(self) -> None:
        """Give the time since the last call to the stage that runs."""
        now = time.perf_counter(), _processor_time()
        self.wall[self._stack[-1]] += now[0] - self._last[0]
        self.cpu[self._stack[-1]] += now[1] - self._last[1]
        self._last = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timing(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self._stack.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self._stack.pop()

        return timing

    def watch(self) -> None:
        """Put a clock around every function of `STAGES`."""
        for stage, places in STAGES.items():
            for place in places:
                owner, name = find_function(place)
                setattr(owner, name, self.timed(stage, getattr(owner, name)))


def find_function(place: str) -> tuple[Any, str]:
    """Return the module or class that holds a function of `STAGES`, and the function's name there."""
    module, _, name = place.partition(":")
    *owners, last = name.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), last


def _processor_time() -> float:
    """Seconds of processor time of this process and its children, including those that still run (Linux)."""
    used = sum(os.times()[:4])
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in listed.read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                used += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return used


def one(path: Path, out: str, options: dict[str, Any]) -> dict[str, Any]:
    """Optimise one model in this process."""
    import pwopt

    watch = Stopwatch()
    importlib.import_module("pwopt.optimizing.optimizer")
    watch.watch()
    measuring = pwopt.Measuring(options.pop("effort", pwopt.Measuring.effort), layers=False)
    start, used = time.perf_counter(), _processor_time()
    try:
        result = pwopt.optimize(path, out or None, measuring=measuring, **options)
    except pwopt.PwoptError as error:
        return {"model": path.name, "error": str(error)}
    wall, cpu = time.perf_counter() - start, _processor_time() - used
    watch.charge()
    report = result.report.to_dict()
    return {
        "model": path.name,
        "wall": wall,
        "cpu": cpu,
        "stages": {s: {"wall": watch.wall[s], "cpu": watch.cpu[s]} for s in watch.wall},
        "shapes": report["shapes"],
        "latency": report["latency"],
        "decisions": sorted(
            {f"{s['pass']}: {s['reason']}" for s in report["skips"] if "measured" in s["reason"] or "no time" in s["reason"]}
        ),
        "kept": {name: sum(r["pass"] == name for r in report["rewrites"]) for name in report["passes"]},
        "notes": report["notes"],
        "environment": report["environment"],
    }  # fmt: skip


def copy_other_records(caches: Path, model: str, cache: Path) -> None:
    """Copy the records of all models but one into a cache; `caches` has a folder for each model."""
    for folder in sorted(caches.iterdir()):
        if folder.is_dir() and folder.name != model:
            shutil.copytree(folder, cache, dirs_exist_ok=True)


def apart(path: Path, out: str, options: dict[str, Any], keep: Path | None, others: Path | None) -> dict[str, Any]:
    """`one`, in a new process; its cache is empty or has the records of other models, and may be kept."""
    with tempfile.TemporaryDirectory() as cache:
        if others is not None:
            copy_other_records(others, path.stem, Path(cache))
        command = [sys.executable, __file__, "--one", str(path), out, json.dumps(options)]
        environment = {**os.environ, "PWOPT_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if keep is not None:
            shutil.copytree(cache, keep / path.stem, dirs_exist_ok=True)
    if done.returncode:
        return {"model": path.name, "error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def times(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    wanted = options.models.split(",") if options.models else []
    for folder in options.folders:
        listed = folder / "shapes.json"
        shapes = json.loads(listed.read_text()) if listed.exists() else {}
        for path in sorted(folder.rglob("*.onnx")):
            if wanted and path.stem not in wanted:
                continue
            asked: dict[str, Any] = {"cost": "analytic", "verify": False} if options.analytic else {}
            if options.effort != "normal":
                asked["effort"] = options.effort
            if path.name in shapes:
                asked["shapes"] = shapes[path.name]
            out = str(options.save / path.name) if options.save else ""
            row = apart(path, out, asked, options.keep, options.with_records_of)
            rows.append(row)
            latency = row.get("latency") or {}
            told = (
                row.get("error") or f"{row['wall']:.1f} s, {row['cpu']:.1f} s CPU, {latency.get('speedup', 1.0):.3f}×"
            )
            print(f"{path.name}: {told}", file=sys.stderr, flush=True)
    return rows


def tabulated(rows: list[dict[str, Any]]) -> Table:
    stages = [s for s in (*STAGES, "other") if any(r["stages"][s]["wall"] >= 0.05 for r in rows if "stages" in r)]
    table = Table("model", "wall s", "CPU s", *stages, "speed-up", title="wall / CPU seconds")
    for row in rows:
        if "error" in row:
            table.add_row(row["model"], row["error"])
            continue
        cells = [f"{row['stages'][s]['wall']:.1f}/{row['stages'][s]['cpu']:.1f}" for s in stages]
        speedup = f"{row['latency']['speedup']:.3f}" if row["latency"] else "-"
        table.add_row(row["model"], f"{row['wall']:.1f}", f"{row['cpu']:.1f}", *cells, speedup)
    return table


def raced(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The models of two versions against the originals and each other."""
    from pwopt.graph.files import load
    from pwopt.inputs.input_specs import input_specs
    from pwopt.inputs.samples import draw_feeds
    from pwopt.running import timing
    from pwopt.running.session import Session
    from pwopt.running.size_trials import choose_sizes

    originals, *versions = options.race
    rows = []
    for path in sorted(originals.rglob("*.onnx")):
        files = [path, *(v / path.name for v in versions)]
        if not all(f.exists() for f in files):
            continue
        proto = load(path).proto
        specs = input_specs(proto)
        feeds = draw_feeds(specs, choose_sizes(specs, proto, path).sizes)
        openers = [partial(Session, f) for f in (*files, path)]
        race = timing.race(openers, feeds, options.seconds)
        after = timing.Evidence.from_logs(race.logs(2, base=1), race.own)
        row = {
            "model": path.name,
            "before": [race.speedup(1), *race.interval(1)],
            "after": [race.speedup(2), *race.interval(2)],
            "after/before": [after.speedup, *after.interval()],
            "copy": [race.speedup(3), *race.interval(3)],
        }
        rows.append(row)
        print(
            path.name, *(f"{name} {v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for name, v in list(row.items())[1:]), flush=True
        )
    for name in ("before", "after", "after/before"):
        print(name, f"{statistics.geometric_mean([r[name][0] for r in rows]):.4f}")
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--save", type=Path, help="folder for what is made of the models")
    parser.add_argument("--keep", type=Path, help="folder for what races of each model said")
    parser.add_argument("--with-records-of", type=Path, metavar="CACHES", help="folder that --keep wrote")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--models", default="", help="just these, by name without .onnx, separated by commas")
    parser.add_argument("--analytic", action="store_true", help="with --cost analytic --no-verify")
    parser.add_argument("--race", type=Path, nargs=3, metavar=("ORIGINALS", "BEFORE", "AFTER"))
    parser.add_argument("--seconds", type=float, default=8.0, help="to race each model")
    options = parser.parse_args()
    if options.keep and options.with_records_of:
        parser.error("--keep keeps the records of one model, so it cannot begin with those of others")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    if options.race:
        rows = raced(options)
    else:
        rows = times(options)
        Console(width=200, emoji=False).print(tabulated(rows))
        walls = sorted(r["wall"] for r in rows if "wall" in r)
        speedups = [r["latency"]["speedup"] for r in rows if r.get("latency")]
        print(f"wall: median {statistics.median(walls):.1f} s, at most {walls[-1]:.1f} s")
        if speedups:
            print(f"speed-up: geometric mean {statistics.geometric_mean(speedups):.4f}, least {min(speedups):.3f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
