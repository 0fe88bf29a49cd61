#!/usr/bin/env python3
"""Race optimised models against onnxruntime alone on the originals.

    python benchmarks/run.py FOLDER [-o RESULTS.json] [--seconds 10] [--budget 60] [--threads 1] [--provider cpu]

FOLDER holds .onnx files and may hold a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}, for dynamic
inputs. Nothing is downloaded and nothing is written into FOLDER. Both models run with all of onnxruntime's graph
optimisations, in pairs of fresh sessions; the ratio is the geometric mean over the pairs, with a 99 % confidence
interval, and that of minima.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pwopt
from pwopt.optimizing.request import EFFORTS
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine
from pwopt.running.providers import as_provider


def measure(path: Path, shapes: dict[str, list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """One model's row: costs, latency, equivalence; or the error that stopped it."""
    start = time.perf_counter()
    try:
        result = pwopt.optimize(
            path,
            shapes=shapes,
            provider=options.provider,
            threads=options.threads,
            measuring=pwopt.Measuring(race_seconds=options.seconds, budget=options.budget),
            cache=False,
        )
    except pwopt.PwoptError as error:
        return {"model": path.name, "error": str(error)}
    report = result.report.to_dict()
    return {
        "model": path.name,
        "shapes": report["shapes"],
        "cost": report["cost"],
        "latency": report["latency"],
        "equivalence": report["equivalence"],
        "rewrites": dict(Counter(r["pass"] for r in report["rewrites"])),
        "measured": sorted({s["reason"] for s in report["skips"] if "measured" in s["reason"]}),
        "skips": len(report["skips"]),
        "notes": report["notes"],
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="time to race each model")
    parser.add_argument("--budget", type=float, default=EFFORTS["normal"], help="seconds of measuring for each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    listed = options.folder / "shapes.json"
    shapes = json.loads(listed.read_text()) if listed.exists() else {}
    console = Console(width=140, emoji=False)
    table = Table(
        "model", "before", "after", "median of ratios", "ratio of minima", "multiply-adds", "deviation", "floor"
    )
    rows = []
    for path in sorted(options.folder.glob("*.onnx")):
        row = measure(path, shapes.get(path.name, {}), options)
        rows.append(row)
        console.print(f"[dim]{path.name} done[/dim]")
        if "error" in row:
            table.add_row(path.name, row["error"])
            continue
        t, cost = row["latency"], row["cost"]
        if t is None:
            table.add_row(path.name, "", "", "unchanged")
            continue
        low, high = t["interval"]
        change = cost["after"]["macs"] / cost["before"]["macs"] - 1 if cost["before"]["macs"] else 0.0
        worst = max(row["equivalence"]["outputs"], key=lambda o: o["max_abs"])
        table.add_row(
            path.name,
            f"{t['before_ms']:.2f} ms",
            f"{t['after_ms']:.2f} ms",
            f"{t['speedup']:.3f} [{low:.3f}, {high:.3f}]",
            f"{t['before_min_ms'] / t['after_min_ms']:.3f}",
            f"{change:+.1%}",
            f"{worst['max_abs']:.2g}",
            f"{worst['floor']:.2g}",
        )
    console.print(table)
    if options.output:
        content = {"environment": describe_machine(as_provider(options.provider), options.threads), "models": rows}
        options.output.write_text(to_json(content))


if __name__ == "__main__":
    main()
