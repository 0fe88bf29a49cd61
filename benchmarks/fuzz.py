#!/usr/bin/env python3
"""Optimise random models by every pass alone and by all together, and compare with the originals.

    python benchmarks/fuzz.py [--graphs 20000] [--first 0] [--processes 2] [--minutes 60] [--forced] [-o RESULTS.json]

Graph number n is made from seed n alone (tests/strategies), so a failure is reproduced by ``--first n --graphs 1``.
With --forced, each graph is optimised once only, by all passes wherever they are exact. With -o, a campaign that was
interrupted goes on where it stopped. The judge (tests/judge.py) is onnxruntime without graph optimisation, on the sizes
that a graph was made for and on others of its dynamic dimensions. Every fifty graphs run in a process of their own,
which onnxruntime takes down with it where it aborts; the graph at fault is found, and counts as a failure unless the
original alone does it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from judge import WrongError, choose, judge
from strategies import random_sample

from pwopt.passes import PASSES
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine

#: Graphs that a process runs before its figures are written down.
BATCH = 50


def run(seeds: range, forced: bool) -> dict[str, Any]:
    """Figures of these graphs: by judge, rewrites by pass, failures."""
    every = [p.name for p in PASSES]
    ways = [every] if forced else [None, *([name] for name in every)]
    warnings.simplefilter("ignore")
    judges: Counter[str] = Counter()
    rewrites: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        sample = random_sample(Random(seed))
        make, given = choose(sample.model, sample.feeds)
        judges[make.__name__ if make is not None else "none"] += 1
        judges["nodes"] += len(sample.model.graph.node)
        for passes in ways if make is not None else []:
            try:
                rewrites.update(judge(sample, passes, given, make))
            except Exception as error:
                kind = "wrong" if isinstance(error, WrongError) else "crash"
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.append({"seed": seed, "passes": "forced" if forced else passes, "kind": kind, "error": f"{type(error).__name__}: {error}",
                                 "at": f"{Path(where.filename).name}:{where.lineno}"})  # fmt: skip
    return {"judges": judges, "rewrites": rewrites, "failures": failures}


def judged(seed: int) -> None:
    """Run the original alone."""
    sample = random_sample(Random(seed))
    choose(sample.model, sample.feeds)


def apart(seeds: range, *options: str) -> dict[str, Any] | None:
    """`run` in a process of its own; None if that dies."""
    command = [sys.executable, __file__, "--first", str(seeds.start), "--graphs", str(len(seeds)), "--apart", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def found(seeds: range, *options: str) -> dict[str, Any]:
    """`run` apart; by halves where it dies."""
    figures = apart(seeds, *options)
    if figures is not None:
        return figures
    if len(seeds) == 1:
        if apart(seeds, "--original") is None:
            return {"judges": {"aborts": 1}, "rewrites": {}, "failures": []}
        return {"judges": {}, "rewrites": {}, "failures": [{"seed": seeds.start, "kind": "abort"}]}
    half = len(seeds) // 2
    parts = [found(seeds[:half], *options), found(seeds[half:], *options)]
    return {
        "judges": sum((Counter(p["judges"]) for p in parts), Counter()),
        "rewrites": sum((Counter(p["rewrites"]) for p in parts), Counter()),
        "failures": [f for p in parts for f in p["failures"]],
    }


def batches(first: int, graphs: int, done: set[int]) -> Iterator[range]:
    for start in range(first, first + graphs, BATCH):
        if start not in done:
            yield range(start, min(start + BATCH, first + graphs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--graphs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first graph; a multiple of 50 to go on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no batch after this time")
    parser.add_argument("--forced", action="store_true", help="only all passes together, wherever they are exact")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--original", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.graphs)
    if options.apart:
        print(json.dumps(judged(seeds.start) if options.original else run(seeds, options.forced)))
        return
    known = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    judges, rewrites = Counter(known.get("judges", {})), Counter(known.get("rewrites", {}))
    failures, done = known.get("failures", []), set(known.get("done", []))
    start, forced = time.monotonic(), ["--forced"] if options.forced else []
    with ThreadPoolExecutor(options.processes) as pool:
        waiting = batches(options.first, options.graphs, done)
        running = {
            pool.submit(found, seeds, *forced): seeds
            for seeds in (next(waiting, None) for _ in range(options.processes))
            if seeds
        }
        while running:
            future = next(iter(running))
            seeds, figures = running.pop(future), future.result()
            judges.update(figures["judges"])
            rewrites.update(figures["rewrites"])
            failures += figures["failures"]
            done.add(seeds.start)
            for failure in figures["failures"]:
                print(failure, flush=True)
            if time.monotonic() - start < 60 * options.minutes and (following := next(waiting, None)):
                running[pool.submit(found, following, *forced)] = following
            ran = sum(n for name, n in judges.items() if name != "nodes")
            content = {
                "environment": describe_machine(),
                "graphs": ran,
                "judges": dict(judges),
                "rewrites": {p.name: rewrites[p.name] for p in PASSES},
                "failures": failures,
                "done": sorted(done),
            }
            if options.output:
                options.output.write_text(to_json(content))
    print(f"{ran} graphs, {sum(rewrites.values())} rewrites, {len(failures)} failures")
    print(" ".join(f"{p.name}:{rewrites[p.name]}" for p in PASSES))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
