#!/usr/bin/env python3
"""Models that rewrites make faster under one condition and slower under another: neither may come out slower.

    python benchmarks/conditions.py [-o RESULTS.json] [--seconds 6]

Minimal filtering (`winograd`) trades multiply-adds for some sixty operators: it pays on large planes and costs time on
small ones, and on one thread more than on several. The models are convolutions of 3×3 on open sizes. Each is forced first
(`--passes winograd`), so that the trap is seen to be there, then optimised for both conditions; at last both results are
raced against the original under each condition.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from builder import Builder

import pwopt
from pwopt.running import timing
from pwopt.running.session import Session

#: Name → channels, convolutions, planes to optimise for and to check, numbers of threads.
CASES = {
    "large first": (160, 3, (56, 4), (1,)),
    "small first": (160, 3, (4, 56), (1,)),
    "one thread first": (160, 2, (28,), (1, 2)),
    "two threads first": (160, 2, (28,), (2, 1)),
}


def write(path: Path, channels: int, count: int) -> None:
    b, x = Builder(), "x"
    for _ in range(count):
        x = b.op("Relu", b.conv(x, channels, channels, 3))
    b.save(path, {"x": [1, channels, "h", "w"]}, [x])  # type: ignore[list-item]


def measured(case: str, folder: Path, seconds: float) -> dict[str, Any]:
    channels, count, planes, threads = CASES[case]
    path, forced, out = (folder / f"{case} {kind}.onnx".replace(" ", "-") for kind in ("model", "forced", "out"))
    write(path, channels, count)
    shapes = [{"x": (1, channels, side, side)} for side in planes]
    pwopt.optimize(path, forced, passes=["winograd"], shapes=shapes[0], cost="analytic")
    report = pwopt.optimize(path, out, shapes=shapes, threads=threads, cache=False).report
    found = []
    for shape in shapes:
        for count in threads:
            feeds = {"x": np.random.default_rng(0).normal(size=shape["x"]).astype(np.float32)}
            row: dict[str, Any] = {"plane": shape["x"][-1], "threads": count}
            for name, other in (("forced", forced), ("optimised", out)):  # waiting threads of a third would disturb
                race = timing.race([partial(Session, p, threads=count) for p in (path, other)], feeds, seconds)
                row[name] = [race.speedup(), *race.interval()]
            found.append(row)
            print(case, json.dumps(row), flush=True)
    return {"kept": sorted({r.pass_name for r in report.rewrites}), "notes": report.notes, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {case: measured(case, Path(folder), options.seconds) for case in CASES}
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
