#!/usr/bin/env python3
"""What other tools make of the same models, and how fast that runs.

    python benchmarks/peers.py FOLDER... [-o RESULTS.json] [--seconds 15] [--tools a,b] [--models a,b]
    python benchmarks/peers.py --render [-o RESULTS.json]

onnxsim, OnnxSlim, onnxoptimizer, onnxscript's optimizer with its rewrite rules, and pwopt each make a model of every .onnx
file in some folders, in a process of its own, with their defaults; pwopt's cache is empty. What they make is verified
against the original as anybody's would be, and raced on onnxruntime's CPU provider, one thread, all side by side with
the original and with OpenVINO on the original (sizes fixed, float32). OpenVINO's outputs are compared to a thousandth
of their scale. A tool that fails, or whose model is not equivalent, counts as the original: 1.

The second form writes the table and the chart of a recorded run, `benchmarks/results/peers.json`, into README.md
and docs/pictures. Needs `pip install onnxsim onnxslim onnxoptimizer onnxscript openvino`; tools that are missing are left
out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "peers.json"
CHART = ROOT / "docs" / "pictures" / "peers.svg"
#: Where the table stands in README.md.
START, END = "<!-- peers: start -->\n", "<!-- peers: end -->"
#: Characters in a line of README.md.
WIDTH = 120
#: Seconds that a tool may take for one model.
PATIENCE = 300
Row = dict[str, Any]


def by_pwopt(path: Path, out: Path) -> None:
    importlib.import_module("pwopt").optimize(path, out)


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
TOOLS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
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
    return {"seconds": float(done.stdout.split()[-1])}


def one(tool: str, path: Path, out: Path) -> float:
    """Seconds that a tool takes, its import not counted."""
    function, package = TOOLS[tool]
    importlib.import_module(package)
    start = time.perf_counter()
    function(path, out)
    return time.perf_counter() - start


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


def measure(path: Path, tools: Iterable[str], seconds: float) -> Row:
    """All that was made of one model, verified, and raced side by side."""
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
    with tempfile.TemporaryDirectory() as folder:
        entered = []
        for tool in tools:
            made = Path(folder) / f"{tool}.onnx"
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
            else:
                row = make(tool, path, made)
                reason = "" if "error" in row else verified(path, made)
                if "error" not in row and not reason:
                    row["nodes"], racer = len(load(made).proto.graph.node), partial(Session, made)
            found[tool] = row
            if reason:
                row["error"] = reason
            if "error" not in row:
                entered.append(tool)
                racers.append(racer)
        race = timing.race([*racers, partial(Session, path)], feeds, seconds)
    for i, tool in enumerate(entered, 1):
        found[tool]["speedup"] = [race.speedup(i), *race.interval(i)]
        found[tool]["start"] = race.creation(0) / race.creation(i)
    shapes = {name: list(shape) for name, shape in sizes.items()}
    nodes = len(proto.graph.node)
    copy = [race.speedup(-1), *race.interval(-1)]
    start_ms = 1e3 * race.creation(0)
    row = {"model": path.stem, "shapes": shapes, "nodes": nodes, "ms": 1e3 * race.median(0), "start_ms": start_ms}
    return {**row, "copy": copy, "tools": found}


def speedup(row: Row, tool: str) -> float:
    """Of what a tool made, against onnxruntime on the original; 1 where it failed."""
    found = row["tools"].get(tool, {}).get("speedup")
    return float(found[0]) if found else 1.0


def best(row: Row) -> set[str]:
    """The tools whose intervals the highest speed-up does not lie above."""
    raced = {t: row["tools"][t]["speedup"] for t in COLUMNS if "speedup" in row["tools"].get(t, {})}
    if not raced:
        return set()
    leader = max(raced.values())
    return {t for t, (_, _, high) in raced.items() if high >= leader[1] and leader[0] > 1}


def table(record: Row) -> str:
    """Markdown: one row per model, and what it comes to."""
    rows, tools = record["models"], record["tools"]
    lines = [f"| model | original, ms | {' | '.join(tools)} |", "|---|--:|" + "--:|" * len(tools)]
    for row in rows:
        winners = best(row)
        cells = []
        for tool in tools:
            found = row["tools"].get(tool, {})
            told = f"{found['speedup'][0]:.2f}" if "speedup" in found else "—"
            cells.append(f"**{told}**" if tool in winners else told)
        lines.append(f"| {row['model']} | {row['ms']:.1f} | {' | '.join(cells)} |")
    values = [statistics.geometric_mean([speedup(r, t) for r in rows]) for t in tools]
    means = [f"**{v:.3f}**" if v == max(values) else f"{v:.3f}" for v in values]
    least = [f"{min(speedup(r, t) for r in rows):.2f}" for t in tools]
    failed = [str(sum("error" in r["tools"].get(t, {}) for r in rows)) for t in tools]
    taken = [statistics.median([r["tools"][t]["seconds"] for r in rows if "seconds" in r["tools"][t]]) for t in tools]
    lines.append(f"| geometric mean | | {' | '.join(means)} |")
    lines.append(f"| minimum | | {' | '.join(least)} |")
    lines.append(f"| failed or not equivalent | | {' | '.join(failed)} |")
    lines.append(f"| seconds taken, median | | {' | '.join(f'{s:.1f}' for s in taken)} |")
    return "\n".join(lines) + "\n"


def ahead(record: Row) -> list[tuple[str, str, float]]:
    """Where another tool's model is faster than pwopt's beyond doubt: model, tool, and how much."""
    found = []
    for row in record["models"]:
        mine = row["tools"].get("pwopt", {}).get("speedup", [1.0, 1.0, 1.0])
        for tool in record["tools"]:
            theirs = row["tools"].get(tool, {}).get("speedup")
            if theirs and theirs[1] > mine[2]:
                found.append((row["model"], tool, theirs[0] / mine[0]))
    return sorted(found, key=lambda f: -f[2])


def find_least(record: Row) -> str:
    """Say which of pwopt's models became slower beyond doubt, or which one gained least."""
    raced = [row for row in record["models"] if "speedup" in row["tools"].get("pwopt", {})]
    found = [(*row["tools"]["pwopt"]["speedup"], row["model"]) for row in raced]
    slower = [model for _, _, high, model in found if high < 1]
    least, low, high, model = min(found)
    if slower:
        return f"pwopt made {', '.join(slower)} slower."
    return f"pwopt made no model slower beyond doubt; the least is {model}, {least:.2f} [{low:.2f}, {high:.2f}]."


def told(record: Row) -> str:
    """What stands in README.md: machine, versions, table, and where others are ahead."""
    machine, versions = record["environment"], record["versions"]
    named = ", ".join(f"{tool} {version}" for tool, version in versions.items() if tool != "pwopt")
    others = [f"{tool} on {model} ({times:.2f}×)" for model, tool, times in ahead(record)]
    behind = f"Clearly faster than pwopt: {', '.join(others)}." if others else "No tool is clearly faster than pwopt."
    failures = [
        f"{tool} on {row['model']} ({row['tools'][tool]['error'].rstrip('.')})"
        for row in record["models"]
        for tool in record["tools"]
        if "error" in row["tools"].get(tool, {})
    ]
    broken = f" Failed: {'; '.join(failures)}." if failures else ""
    head = (
        f"The table shows speed-ups over onnxruntime {machine['onnxruntime']} on the original model. The figures are"
        f" medians of interleaved runs, measured on {record['date']} on one thread ({machine['cpu']}) with {named}."
        " onnxruntime runs the models that the tools write. OpenVINO runs the original model in its own runtime. Bold"
        " marks the fastest tool, and every tool whose interval overlaps with that of the fastest. A dash marks a result"
        " that failed or was not equivalent. Such a result counts as 1 in the geometric mean and in the minimum."
    )
    means = [f"{t} {statistics.geometric_mean([speedup(r, t) for r in record['models']]):.2f}" for t in record["tools"]]
    seen = f"A dot for each of {len(record['models'])} models and each tool. Geometric means: {', '.join(means)}"
    chart = f"![{seen}]({CHART.relative_to(ROOT).as_posix()})"
    paragraphs = (
        textwrap.fill(head, WIDTH),
        chart,
        table(record).rstrip(),
        textwrap.fill(f"{find_least(record)} {behind}{broken}", WIDTH),
    )
    return "\n\n".join(paragraphs) + "\n"


def draw(record: Row) -> None:
    """A dot per model and tool, models in the order of pwopt's speed-up."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pwopt"  # the same bytes for the same figures
    from matplotlib import pyplot

    rows = sorted(record["models"], key=lambda r: speedup(r, "pwopt"))
    figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(rows) + 1.4))
    marks = dict(zip(record["tools"], ("o", "v", "^", "s", "D", "x"), strict=False))
    colours = dict(
        zip(record["tools"], ("#0b6e4f", "#9aa5b1", "#c08497", "#7a9cc6", "#b3a369", "#d1495b"), strict=False)
    )
    for tool in reversed(record["tools"]):
        places = [(speedup(r, tool), i) for i, r in enumerate(rows) if "speedup" in r["tools"].get(tool, {})]
        first = tool == "pwopt"
        axes.scatter(
            [p[0] for p in places],
            [p[1] for p in places],
            marker=marks[tool],
            color=colours[tool],
            s=46 if first else 26,
            zorder=3 if first else 2,
            label=tool,
        )
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [r["model"] for r in rows], fontsize=8)
    axes.set_xlabel("times as fast as onnxruntime alone on the original")
    axes.grid(axis="both", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right")
    CHART.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(CHART, metadata={"Date": None}, bbox_inches="tight")


def render(record: Row) -> None:
    """The record's table and chart into README.md and docs."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md has no place for the table: {START.strip()} and {END}")
    readme.write_text(before + START + told(record) + END + after, encoding="utf-8")
    draw(record)


def run(options: argparse.Namespace) -> Row:
    from pwopt.running.installation import describe_machine

    packages = {**{tool: package for tool, (_, package) in TOOLS.items()}, RUNTIME: "openvino"}
    asked = options.tools.split(",")
    tools = [t for t in COLUMNS if t in asked and importlib.util.find_spec(packages[t])]
    rows = []
    for path in sorted(p for folder in options.folders for p in folder.rglob("*.onnx")):
        if options.models and path.stem not in options.models.split(","):
            continue
        row = measure(path, tools, options.seconds)
        rows.append(row)
        cells = [
            f"{t} {f['speedup'][0]:.3f} ({f['seconds']:.1f} s)" if "speedup" in f else f"{t}: {f['error']}"
            for t, f in row["tools"].items()
        ]
        print(f"{row['model']} {row['ms']:.1f} ms: {', '.join(cells)}", file=sys.stderr, flush=True)
    versions = {t: importlib.metadata.version(packages[t]) for t in tools}
    return {
        "date": date.today().isoformat(),
        "environment": describe_machine(),
        "versions": versions,
        "tools": tools,
        "models": rows,
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--seconds", type=float, default=15.0, help="to race each model")
    parser.add_argument("--tools", default=",".join(COLUMNS))
    parser.add_argument("--models", default="", help="just these, by name without .onnx, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the recorded table and chart into README.md")
    options = parser.parse_args()
    if options.render:
        render(json.loads(options.output.read_text()))
        return
    record = run(options)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
