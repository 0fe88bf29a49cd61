#!/usr/bin/env python3
"""Compare onnxruntime's offline optimisation with pwopt: start-up, speed, size, and where the files load.

    python benchmarks/offline.py MODEL... [-o benchmarks/results/offline.json] [--seconds 4]
    python benchmarks/offline.py --render [-o benchmarks/results/offline.json]

For each model there are four files: the original, pwopt's result with default options, and what onnxruntime writes with
`optimized_model_filepath` (ORT_ENABLE_ALL) from either of them. onnxruntime's own files are loaded without graph
optimisation, as its documentation recommends, because that is what saves time. All files and a copy of the original race
in pairs of fresh sessions, on one thread, in a process with huge pages. Ratios are the original's processor time over
that of the file.

For each file, the script also counts the operators of domains other than ONNX's (`com.microsoft.nchwc` is the blocked
layout of the machine that wrote the file), and tries three other readers: onnx's checker, onnx's reference evaluator,
and OpenVINO, if it is installed. The second form writes the recorded table into docs/running-fast.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from pages import fill_page

import pwopt
from pwopt.graph.files import load
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.reporting.text import format_ratio
from pwopt.running import huge_pages, installation, timing
from pwopt.running.session import Session
from pwopt.running.size_trials import choose_sizes

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "offline.json"
PAGE = ROOT / "docs" / "running-fast.md"
#: The files that are compared, and whether onnxruntime optimises them while it loads them.
FILES = {"original": True, "onnxruntime": False, "pwopt": True, "pwopt, then onnxruntime": False}
Row = dict[str, Any]


def write_offline(path: Path, output: Path) -> None:
    """Let onnxruntime write the graph that it would run on this machine."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def make_files(path: Path, folder: Path) -> dict[str, Path]:
    """Write all files of a model; returns their paths in the order of `FILES`."""
    made = [folder / f"{i}.onnx" for i in range(3)]
    pwopt.optimize(path, made[1])
    write_offline(path, made[0])
    write_offline(made[1], made[2])
    return dict(zip(FILES, [path, *made], strict=True))


def _check(path: Path) -> None:
    onnx.checker.check_model(str(path))


def _evaluate(path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    ReferenceEvaluator(str(path))


def _compile_with_openvino(path: Path) -> None:
    import openvino

    core = openvino.Core()
    core.compile_model(core.read_model(str(path)), "CPU")


#: Other readers of ONNX files.
READERS = {"onnx.checker": _check, "onnx.reference": _evaluate, "OpenVINO": _compile_with_openvino}


def describe_file(path: Path) -> Row:
    """Measure a file's size, count its operators by domain, and say which other programs read it."""
    proto = onnx.load(path, load_external_data=False)
    domains = Counter(n.domain for n in proto.graph.node if n.domain not in ("", "ai.onnx"))
    loads: dict[str, str] = {}
    for name, read in READERS.items():
        if name == "OpenVINO" and importlib.util.find_spec("openvino") is None:
            continue
        try:
            read(path)
            loads[name] = ""
        except Exception as error:  # any reader may fail in its own way
            loads[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    size = sum(p.stat().st_size for p in [path, *path.parent.glob(f"{path.name}*.data")] if p.exists())
    return {"nodes": len(proto.graph.node), "mb": size / 1e6, "domains": dict(domains), "loads": loads}


def measure(path: Path, seconds: float) -> Row:
    """Write all files of a model, describe and race them."""
    model = load(path)
    specs = input_specs(model.proto)
    sizes = choose_sizes(specs, model.proto, path).sizes
    feeds = draw_feeds(specs, sizes)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(path, Path(folder))
        found = {name: describe_file(file) for name, file in files.items()}
        openers = [partial(Session, file, optimise=FILES[name]) for name, file in files.items()]
        race = timing.race([*openers, partial(Session, path)], feeds, seconds)
    for i, row in enumerate(found.values()):
        start = timing.Evidence.from_logs(race.creation_logs(i))
        row["start"] = [start.speedup, *(start.interval() if i else (1.0, 1.0))]
        row["start_ms"] = race.creation(i) * 1e3
        row["speedup"] = [race.speedup(i), *(race.interval(i) if i else (1.0, 1.0))]
    copy = [race.speedup(-1), *race.interval(-1)]
    return {"model": path.stem, "ms": race.median(0) * 1e3, "files": found, "copy": copy, "pairs": len(race.pairs)}


def render(record: Row) -> str:
    """Format the recorded table as Markdown."""
    machine = record["environment"]
    lines = [
        f"Ratios to the original, in processor time, with 99 % intervals: {machine['cpu']}, 1 thread, onnxruntime",
        f"{machine['onnxruntime']}, {record['date']}. `benchmarks/offline.py` prints these figures.",
        "",
        "| model | file | operators | MB | session creation | speed | foreign operators | does not load in |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in record["models"]:
        for name, file in row["files"].items():
            ratios = (format_ratio(*measured) for measured in (file["start"], file["speedup"]))
            domains = ", ".join(f"{count} {domain}" for domain, count in file["domains"].items()) or "none"
            failed = ", ".join(reader for reader, error in file["loads"].items() if error) or "–"
            cells = (row["model"], name, str(file["nodes"]), f"{file['mb']:.1f}", *ratios, domains, failed)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--seconds", type=float, default=4.0, help="to race each model")
    parser.add_argument("--render", action="store_true", help="write the recorded table into docs/running-fast.md")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        fill_page(PAGE, "offline", render(json.loads(options.output.read_text(encoding="utf-8"))))
        return
    if options.child:
        installation.silence_onnxruntime()
        print(json.dumps(measure(options.models[0], options.seconds)))
        return
    rows = []
    for path in options.models:
        command = [sys.executable, __file__, str(path), "--child", "--seconds", str(options.seconds)]
        environ = huge_pages.requesting(os.environ)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{path.stem} done", file=sys.stderr, flush=True)
    machine = installation.describe_machine()
    record = {"date": date.today().isoformat(), "environment": machine, "models": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(render(record))


if __name__ == "__main__":
    main()
