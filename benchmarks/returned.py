#!/usr/bin/env python3
"""List for many models what pwopt returns, why, how fast that is, and what it takes to start, beside other tools.

    python benchmarks/returned.py FOLDER... [-o RESULTS.json] [--seconds 5] [--models a,b]
    python benchmarks/returned.py --render [-o RESULTS.json]

pwopt optimises every .onnx file of the folders with its defaults and an empty cache; onnxsim and OnnxSlim make theirs,
if they are installed. Then the original, a copy of it and all results race in pairs of fresh sessions, on one thread of
the CPU provider, in a process with huge pages. The race of a model takes `--seconds` at most, and two thirds of it in the
median, besides the time of the tools. Results of other tools are not verified here: `benchmarks/peers.py` does that.

The script also runs onnxsim and OnnxSlim on pwopt's result, and lists what kinds of operators they still remove there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import by_onnxsim, by_onnxslim

import pwopt
from pwopt.graph.files import load
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.reporting.report import Report
from pwopt.reporting.text import format_ratio
from pwopt.running import huge_pages, installation, timing
from pwopt.running.session import Session

RECORD = Path(__file__).resolve().parent / "results" / "returned.json"
#: Name of a tool → its package, and how it makes a model.
TOOLS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "onnxsim": ("onnxsim", by_onnxsim),
    "OnnxSlim": ("onnxslim", by_onnxslim),
}
#: Seconds for one model, all tools together.
PATIENCE = 900
Row = dict[str, Any]


def count_operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in load(path).proto.graph.node if n.op_type != "Constant")


def explain(report: Report) -> tuple[str, str]:
    """Return what came back ("result", or "original" for one of three reasons), and pwopt's sentences on it."""
    said = " ".join(report.notes)
    if report.rewrites:
        return "result", said
    if report.candidate is not None:
        return "original: the rewritten model was slower", said
    return ("original: rewrites were refused" if report.skips else "original: nothing to rewrite"), said


def make(tool: str, path: Path, output: Path) -> str:
    """Let a tool make a model; returns why it failed, or ""."""
    try:
        TOOLS[tool][1](path, output)
        Session(output)
    except Exception as error:  # any tool may fail in its own way
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def measure(path: Path, seconds: float) -> Row:
    """Optimise a model with all tools, and race everything against the original."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"original": path, "pwopt": folder / "pwopt.onnx"}
        report = pwopt.optimize(path, files["pwopt"], cache=False).report
        outcome, sentences = explain(report)
        row: Row = {"model": path.stem, "returned": outcome, "why": sentences, "tools": {}, "removes": {}}
        own = count_operators(files["pwopt"])
        for tool in (t for t, (package, _) in TOOLS.items() if find_spec(package)):
            made, again = folder / f"{tool}.onnx", folder / f"{tool}_again.onnx"
            error = make(tool, path, made)
            if error:
                row["tools"][tool] = {"error": error}
            else:
                files[tool] = made
            if not make(tool, files["pwopt"], again):
                row["removes"][tool] = dict(own - count_operators(again))
        feeds = draw_feeds(input_specs(load(path).proto), report.shapes)
        openers = [partial(Session, file) for file in (*files.values(), path)]
        race = timing.race(openers, feeds, seconds, rules=timing.Rules(precise=0.005))
        for i, (tool, file) in enumerate(files.items()):
            start = timing.Evidence.from_logs(race.creation_logs(i))
            row["tools"][tool] = {
                "nodes": count_operators(file).total(),
                "start_ms": race.creation(i) * 1e3,
                "start": [start.speedup, *start.interval()] if i else [1.0, 1.0, 1.0],
                "speedup": [race.speedup(i), *race.interval(i)] if i else [1.0, 1.0, 1.0],
            }
        row |= {"ms": race.median(0) * 1e3, "copy": [race.speedup(-1), *race.interval(-1)], "pairs": len(race.pairs)}
    return row


def render(record: Row) -> str:
    """Format the record as Markdown: a row for each model, and what it comes to."""
    rows = [r for r in record["models"] if "error" not in r]
    tools = ["original", "pwopt", *(t for t in TOOLS if any(t in r["tools"] for r in rows))]
    lines = [
        f"| model | returned | result against original | copy | {' | '.join(f'operators, {t}' for t in tools)} "
        f"| {' | '.join(f'session creation, {t}, ms' for t in tools)} |",
        "|---|---|---|---|" + "--:|" * (2 * len(tools)),
    ]
    for r in rows:
        found = [r["tools"].get(t, {}) for t in tools]
        nodes = [str(f["nodes"]) if "nodes" in f else "–" for f in found]
        starts = [f"{f['start_ms']:.0f}" if "start_ms" in f else "–" for f in found]
        raced = [format_ratio(*measured, digits=3) for measured in (r["tools"]["pwopt"]["speedup"], r["copy"])]
        lines.append(f"| {' | '.join([r['model'], r['returned'], *raced, *nodes, *starts])} |")
    back = Counter(r["returned"] for r in rows)
    slower = [r["model"] for r in rows if r["tools"]["pwopt"]["speedup"][2] < 0.99]
    lines += ["", f"{len(rows)} models: {', '.join(f'{n} {what}' for what, n in back.most_common())}."]
    lines.append(f"Slower than the original by more than 1 %: {', '.join(slower) or 'none'}.")
    for tool in tools[1:]:
        for key, what in (("speedup", "latency"), ("start", "session creation")):
            values = [r["tools"].get(tool, {}).get(key, [1.0])[0] for r in rows]
            lines.append(f"{tool}, geometric mean of {what}: {statistics.geometric_mean(values or [1.0]):.3f}.")
    for tool in (t for t in TOOLS if any(t in r["removes"] for r in rows)):
        removed: Counter[str] = Counter()
        for r in rows:
            removed.update(r["removes"].get(tool, {}))
        listed = ", ".join(f"{n} {op}" for op, n in removed.most_common(12))
        lines.append(f"{tool} still removes from pwopt's results: {listed or 'nothing'}.")
    lines += [f"{r['model']} failed: {r['error']}" for r in record["models"] if "error" in r]
    return "\n".join(lines) + "\n"


def run_child(path: Path, seconds: float) -> Row:
    """Run `measure` in a process with huge pages."""
    command = [sys.executable, __file__, str(path), "--child", "--seconds", str(seconds)]
    environ = huge_pages.requesting(os.environ)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"model": path.stem, "error": f"stopped after {PATIENCE} s"}
    if done.returncode:
        return {"model": path.stem, "error": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--seconds", type=float, default=5.0, help="to race each model")
    parser.add_argument("--models", default="", help="just these, by name without .onnx, separated by commas")
    parser.add_argument("--render", action="store_true", help="print the table of a recorded run")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        print(render(json.loads(options.output.read_text(encoding="utf-8"))))
        return
    if options.child:
        installation.silence_onnxruntime()
        print(json.dumps(measure(options.folders[0], options.seconds)))
        return
    wanted = options.models.split(",") if options.models else []
    found = sorted(p for f in options.folders for p in (f.rglob("*.onnx") if f.is_dir() else [f]))
    record: Row = {"date": date.today().isoformat(), "environment": installation.describe_machine(), "models": []}
    for path in (p for p in found if not wanted or p.stem in wanted):
        row = run_child(path, options.seconds)
        record["models"].append(row)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")  # a stopped run is not lost
        print(f"{row['model']}: {row.get('error') or row['returned']}", file=sys.stderr, flush=True)
    print(render(record))


if __name__ == "__main__":
    main()
