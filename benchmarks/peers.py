#!/usr/bin/env python3
"""What other tools make of the same models, and how fast that runs.

    python benchmarks/peers.py FOLDER... [-o RESULTS.json] [--seconds 15] [--tools a,b] [--models a,b]
        [--keep FOLDER [--again]]
    python benchmarks/peers.py --render [-o RESULTS.json]

onnxsim, OnnxSlim, onnxoptimizer, onnxscript's optimizer with its rewrite rules, and pwopt each make a model of every .onnx
file in some folders, in a process of its own, with their defaults; pwopt's cache is empty. What they make is verified
against the original as anybody's would be, and raced on onnxruntime's CPU provider, one thread, all side by side with
the original and with OpenVINO on the original (sizes fixed, float32). OpenVINO's outputs are compared to a thousandth
of their scale. A tool that fails, or whose model is not equivalent, counts as the original: 1. The races take place in
a process with huge pages, beside a copy of the original. The record also says what pwopt returned, and why.

With `--keep`, what the tools made stays in a folder. With `--again`, what an earlier run kept there is raced again, and
the new times replace those of its record.

The second form writes the tables and the chart of a recorded run, `benchmarks/results/peers.json`, into README.md
and docs. Needs `pip install onnxsim onnxslim onnxoptimizer onnxscript openvino`; tools that are missing are left
out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pages import fill_page
from peers_tables import draw, summarize, write_section, write_start_table, write_table

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "peers.json"
#: Seconds that a tool may take for one model.
PATIENCE = 300
#: How often the sessions of one model are created, and seconds after which that may end.
LEAST_CREATIONS, MOST_CREATIONS, CREATION_SECONDS = 8, 30, 10.0
Row = dict[str, Any]


def by_pwopt(path: Path, out: Path) -> Row:
    """Make a model; returns what came back, and pwopt's sentences on it."""
    report = importlib.import_module("pwopt").optimize(path, out).report
    returned = "result"
    if not report.rewrites:
        returned = "original: rewrites failed" if report.candidate is not None else "original: nothing to rewrite"
    return {"returned": returned, "why": " ".join(report.notes)}


def by_onnxsim(path: Path, out: Path) -> None:
    onnx = importlib.import_module("onnx")
    model, checked = importlib.import_module("onnxsim").simplify(onnx.load(path))
    if not checked:
        raise RuntimeError("its own check failed")
    onnx.save(model, out)


def by_onnxslim(path: Path, out: Path) -> None:
    onnx = importlib.import_module("onnx")
    onnx.save(importlib.import_module("onnxslim").slim(onnx.load(path)), out)


def by_onnxoptimizer(path: Path, out: Path) -> None:
    onnx, tool = importlib.import_module("onnx"), importlib.import_module("onnxoptimizer")
    onnx.save(tool.optimize(onnx.load(path), tool.get_fuse_and_elimination_passes()), out)


def by_onnxscript(path: Path, out: Path) -> None:
    onnx = importlib.import_module("onnx")
    model = importlib.import_module("onnxscript.optimizer").optimize(onnx.load(path))
    onnx.save(importlib.import_module("onnxscript.rewriter").rewrite(model), out)


#: What makes a model of a model → its package.
TOOLS: dict[str, tuple[Callable[[Path, Path], Row | None], str]] = {
    "pwopt": (by_pwopt, "pwopt"),
    "onnxsim": (by_onnxsim, "onnxsim"),
    "OnnxSlim": (by_onnxslim, "onnxslim"),
    "onnxoptimizer": (by_onnxoptimizer, "onnxoptimizer"),
    "onnxscript": (by_onnxscript, "onnxscript"),
}
#: What runs the original in another way.
RUNTIME = "OpenVINO"
COLUMNS = (*TOOLS, RUNTIME)


class OpenVino:
    """OpenVINO on one thread, as `pwopt.running.timing.race` wants a session.

    Parameters
    ----------
    path : Path
    sizes : dict
        Input → shape, which the model is fixed to.
    """

    clock = staticmethod(time.thread_time)  # with one thread it runs in the caller's
    spins = False

    def __init__(self, path: Path, sizes: dict[str, tuple[int, ...]]) -> None:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        model = core.read_model(str(path))
        model.reshape({name: list(shape) for name, shape in sizes.items()})
        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.request = core.compile_model(model, "CPU", options).create_infer_request()

    def bind(self, feeds: dict[str, Any]) -> None:
        for name, value in feeds.items():
            self.request.set_tensor(name, importlib.import_module("openvino").Tensor(value))

    def step(self) -> None:
        self.request.infer()

    def outputs(self) -> list[Any]:
        return [self.request.get_output_tensor(i).data for i in range(len(self.request.model_outputs))]


def make(tool: str, path: Path, out: Path) -> Row:
    """What a tool makes of a model, in a process of its own: seconds it took, or what stopped it."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PWOPT_CACHE": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", tool, str(path), str(out)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {PATIENCE} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def make_one(tool: str, path: Path, out: Path) -> Row:
    """Let a tool make a model. The seconds do not include its import."""
    function, package = TOOLS[tool]
    importlib.import_module(package)
    start = time.perf_counter()
    extra = function(path, out)
    return {"seconds": time.perf_counter() - start, **(extra or {})}


def verified(path: Path, made: Path) -> str:
    """Why a model is not equivalent to the original; nothing if it is."""
    import pwopt

    try:
        found = pwopt.verify(path, made, locate=False)
    except pwopt.PwoptError as error:
        return str(error)
    worst = found.worst()
    return "" if found.passed else f"not equivalent: {worst.explain() if worst else 'no output'}"


def compared(wanted: list[Any], got: list[Any]) -> str:
    """Why outputs differ by more than a thousandth of their scale; nothing if they do not."""
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has the shape {list(b.shape)} instead of {list(a.shape)}"
        scale = float(np.max(np.abs(a.astype(np.float64)), initial=0.0))
        if not np.allclose(a, b, rtol=1e-3, atol=1e-3 * scale):
            return f"output {i} differs by more than a thousandth of its scale"
    return ""


def count_operators(model: Any) -> int:
    """How many operators stand in the main graph; constants do not count."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def time_creation(openers: Sequence[Callable[[], Any]]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Seconds of processor time that each session takes to be created, several times in random order."""
    took: list[list[float]] = [[] for _ in openers]
    rng = np.random.default_rng(0)
    end = time.perf_counter() + CREATION_SECONDS
    for k in range(MOST_CREATIONS):
        if k >= LEAST_CREATIONS and time.perf_counter() > end:
            break
        for i in rng.permutation(len(openers)):
            begin = time.process_time()
            openers[i]()
            took[i].append(time.process_time() - begin)
    return [np.array(each) for each in took]


def measure(path: Path, tools: Sequence[str], seconds: float, folder: Path, known: Row) -> Row:
    """All that was made of one model, left in a folder, verified, and raced side by side.

    `known` says of each tool's model that lies in the folder already how it was made.
    """
    from pwopt.graph.files import load
    from pwopt.inputs.input_specs import input_specs
    from pwopt.inputs.samples import draw_feeds
    from pwopt.running import timing
    from pwopt.running.session import Session
    from pwopt.running.size_trials import choose_sizes

    proto = load(path).proto
    specs = input_specs(proto)
    sizes = choose_sizes(specs, proto, path).sizes
    feeds = draw_feeds(specs, sizes)
    racers: list[Any] = [partial(Session, path)]
    found: dict[str, Row] = {}
    entered = []
    for tool in tools:
        made = folder / f"{path.stem}.{tool}.onnx"
        if tool == RUNTIME:
            start = time.perf_counter()
            try:
                racer: Any = partial(OpenVino, path, sizes)
                loaded = racer()
                row: Row = {"seconds": time.perf_counter() - start}
                loaded.bind(feeds)
                loaded.step()
                reason = compared(Session(path).run(feeds), loaded.outputs())
            except Exception as error:
                row, reason = {"error": (str(error).strip().splitlines() or ["?"])[-1][:300]}, ""
        elif tool in known:
            row, reason, racer = known[tool], "", partial(Session, made)
        else:
            row = make(tool, path, made)
            reason = "" if "error" in row else verified(path, made)
            if "error" not in row and not reason:
                row["nodes"], racer = count_operators(load(made).proto), partial(Session, made)
        found[tool] = row
        if reason:
            row["error"] = reason
        if "error" not in row:
            entered.append(tool)
            racers.append(racer)
    race = timing.race([*racers, partial(Session, path)], feeds, seconds, rules=timing.Rules(precise=0.004))
    creation = time_creation(racers)
    for i, tool in enumerate(entered, 1):
        start = timing.Evidence.from_logs(np.log(creation[0] / creation[i]))
        found[tool]["speedup"] = [race.speedup(i), *race.interval(i)]
        found[tool]["start"] = [start.speedup, *start.interval()]
    shapes = {name: list(shape) for name, shape in sizes.items()}
    nodes = count_operators(proto)
    copy = [race.speedup(-1), *race.interval(-1)]
    start_ms = 1e3 * float(np.median(creation[0]))
    row = {"model": path.stem, "shapes": shapes, "nodes": nodes, "ms": 1e3 * race.median(0), "start_ms": start_ms}
    return {**row, "copy": copy, "tools": found}


def measure_in_child(path: Path, tools: Sequence[str], options: argparse.Namespace, known: Row) -> Row:
    """`measure` in a process with huge pages."""
    from pwopt.running import huge_pages

    environment = huge_pages.requesting(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        asked = [str(path), tools, options.seconds, str(options.keep or folder), known]
        command = [sys.executable, __file__, "--measure", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"model": path.stem, "error": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


#: File → what stands between its markers.
TABLES = {ROOT / "README.md": write_section, ROOT / "docs" / "benchmarks.md": write_start_table}


def render(record: Row) -> None:
    """Write the record's tables and its chart into README.md and docs."""
    for page, write in TABLES.items():
        fill_page(page, "peers", write(record))
    draw(record)


def run(options: argparse.Namespace) -> Row:
    from pwopt.running.installation import describe_machine

    packages = {**{tool: package for tool, (_, package) in TOOLS.items()}, RUNTIME: "openvino"}
    asked = options.tools.split(",")
    tools = [t for t in COLUMNS if t in asked and importlib.util.find_spec(packages[t])]
    record: Row = {
        "date": date.today().isoformat(),
        "environment": describe_machine(),
        "versions": {t: importlib.metadata.version(packages[t]) for t in tools},
        "tools": tools,
        "models": [],
    }
    earlier = {}
    if options.again:
        rows = json.loads(options.output.read_text())["models"]
        earlier = {row["model"]: {t: f for t, f in row["tools"].items() if t in TOOLS} for row in rows}
    for path in sorted(p for folder in options.folders for p in folder.rglob("*.onnx")):
        if options.models and path.stem not in options.models.split(","):
            continue
        row = measure_in_child(path, tools, options, earlier.get(path.stem, {}))
        if "error" in row:
            print(f"{row['model']}: {row['error']}", file=sys.stderr, flush=True)
            continue
        record["models"].append(row)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        cells = [
            f"{t} {f['speedup'][0]:.3f} ({f['seconds']:.1f} s)" if "speedup" in f else f"{t}: {f['error']}"
            for t, f in row["tools"].items()
        ]
        print(f"{row['model']} {row['ms']:.1f} ms: {', '.join(cells)}", file=sys.stderr, flush=True)
    return record


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(make_one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    if sys.argv[1:2] == ["--measure"]:
        path, tools, seconds, folder, known = json.loads(sys.argv[2])
        print(json.dumps(measure(Path(path), tools, seconds, Path(folder), known)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--seconds", type=float, default=15.0, help="to race each model")
    parser.add_argument("--tools", default=",".join(COLUMNS))
    parser.add_argument("--models", default="", help="just these, by name without .onnx, separated by commas")
    parser.add_argument("--keep", type=Path, help="an existing folder for what the tools make")
    parser.add_argument("--again", action="store_true", help="race what --keep kept, with the facts of the record")
    parser.add_argument("--render", action="store_true", help="write the recorded table and chart into README.md")
    options = parser.parse_args()
    if options.render:
        render(json.loads(options.output.read_text()))
        return
    record = run(options)
    print(write_table(record))
    print(summarize(record))


if __name__ == "__main__":
    main()
