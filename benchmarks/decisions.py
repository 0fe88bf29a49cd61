#!/usr/bin/env python3
"""Whether decisions hold: beside a busy neighbour, and from one run to the next.

    python benchmarks/decisions.py MODEL... [--neighbour] [--again 3] [--budget SECONDS] [-o RESULTS.json]

With `--neighbour`, every model is optimised on one core by itself, and then beside a process that keeps the same core
busy, each with an empty cache: kinds of rewrites that were kept in one and not in the other are listed, with whether the
run said that it was in doubt (Linux). With `--again`, it is optimised that often with one cache, with `--budget` so small
that races end in doubt: the intervals of what is known after each run are listed, which must become narrower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = """
import json, sys
import pwopt
from pwopt.selecting import tuning_cache
report = pwopt.optimize(sys.argv[1], threads=1, **json.loads(sys.argv[2])).report
known = {f"{e.pass_name}: {e.signature}": [e.verdict, e.pairs, e.speedup, *e.interval] for e in tuning_cache.read_records() if e.model}
print(json.dumps({"known": known, "notes": report.notes, "kept": sorted({str(r.site) for r in report.rewrites}),
                  "speedup": report.latency.speedup}))
"""


def run(model: Path, folder: str, options: dict[str, Any], core: int | None) -> dict[str, Any]:
    """What one optimisation decided, on one core perhaps."""
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pinned, sys.executable, "-W", "ignore", "-c", RUN, str(model), json.dumps(options)]
    environment = {**os.environ, "PWOPT_CACHE": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def neighbour(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        quiet = run(model, a, options, core)
        busy = subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"])
        try:
            loaded = run(model, b, options, core)
        finally:
            busy.kill()
            busy.wait()
    verdicts = {k: (quiet["known"].get(k, ["none"])[0], v[0]) for k, v in loaded["known"].items()}
    differ = {k: v for k, v in verdicts.items() if v[0] != v[1]}
    said = [n for n in loaded["notes"] if "doubt" in n or "busy" in n]
    return {
        "decisions": len(verdicts),
        "differ": differ,
        "said": said,
        "speedup": [quiet["speedup"], loaded["speedup"]],
    }


def again(model: Path, options: dict[str, Any], times: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(model, folder, options, None)["known"] for _ in range(times)]
    doubtful = [k for k, v in runs[0].items() if v[0] == "in doubt"]
    return {k: [r[k] for r in runs if k in r] for k in doubtful}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--again", type=int, default=0)
    parser.add_argument("--budget", type=float)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    asked = {} if options.budget is None else {"budget": options.budget}
    rows = {}
    for model in options.models:
        row: dict[str, Any] = {}
        if options.neighbour:
            row["neighbour"] = neighbour(model, asked)
        if options.again:
            row["again"] = again(model, asked, options.again)
        rows[model.name] = row
        print(model.name, json.dumps(row, indent=1, ensure_ascii=False), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
