#!/usr/bin/env python3
"""Many models one by one, and through a cluster of two workers of which one is killed half-way.

    python benchmarks/fleet.py FOLDER... [-o RESULTS.json] [--count 20] [--measured]

Takes the first .onnx files of some folders, as many times as it takes to have --count. Says how long each way takes,
whether the results are the same byte by byte (decided from shapes, unless --measured), and how long it takes to do
nothing the second time. Needs `pip install "pwopt[fleet]"`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import LocalCluster

import pwopt
from pwopt.optimizing.batch import BatchRow
from pwopt.optimizing.cluster import Fleet
from pwopt.running.installation import describe_machine


def timed(run: Callable[[], list[BatchRow]]) -> tuple[list[BatchRow], float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def measure(models: list[Path], request: pwopt.Request, root: Path) -> dict[str, Any]:
    """Seconds each way, and whether all is there."""
    alone, one_by_one = timed(lambda: pwopt.optimize_many(models, root / "alone", request))
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        ended: list[BatchRow] = []

        def told(row: BatchRow) -> None:
            ended.append(row)
            if len(ended) == len(models) // 2:
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)

        there, out = Fleet(cluster.scheduler_address), root / "fleet"
        rows, together = timed(lambda: pwopt.optimize_many(models, out, request, runner=there, report_row=told))
        again, nothing = timed(lambda: pwopt.optimize_many(models, out, request, runner=there))
    same = [
        (root / "alone" / a.output).read_bytes() == (out / b.output).read_bytes()
        for a, b in zip(alone, rows, strict=True)
    ]
    return {
        "models": len(models),
        "statuses": sorted({r.status for r in rows}),
        "same": sum(same),
        "one_by_one_s": one_by_one,
        "cluster_s": together,
        "again_s": nothing,
        "again_statuses": sorted({r.status for r in again}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--measured", action="store_true", help="with races, as by default")
    options = parser.parse_args()
    found = sorted(p for folder in options.folders for p in folder.rglob("*.onnx") if ".pwopt" not in p.name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PWOPT_CACHE"] = str(Path(folder) / "cache")
        models = []
        for i, source in zip(range(options.count), itertools.cycle(found), strict=False):
            models.append(Path(folder) / "models" / f"{i:02}_{source.name}")
            models[-1].parent.mkdir(exist_ok=True)
            shutil.copy(source, models[-1])
        request = pwopt.Request() if options.measured else pwopt.Request(cost="analytic")
        result = {"environment": describe_machine(), **measure(models, request, Path(folder))}
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
