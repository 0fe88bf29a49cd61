#!/usr/bin/env python3
"""Compare what other runtimes and tools make of the original and of pwopt's result.

    python benchmarks/readers.py FOLDER [-o benchmarks/results/readers.json] [--models a,b] [--readers OpenVINO,tract]
        [--seconds 120] [--others PYTHON]
    python benchmarks/readers.py --render [-o benchmarks/results/readers.json]

FOLDER holds .onnx files and a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}. Each reader runs in a process of
its own. The original and the result have static input sizes, because some readers need them. Readers that are not installed are left out. --others
names a second interpreter for readers that are missing in this one: MNN's converter and onnxconverter-common need
different releases of protobuf.

The deviation is the largest over the outputs of |difference| / |answer| in the L2 norm. The answer is that of onnxruntime
on the original, without graph optimisation, so the original's own rounding is seen in every column.
Both models run alternately on one thread; the ratio is the median over the pairs of the original's processor time over
the result's, with the second smallest and the second largest ratio of 11 pairs (a 98.8 % interval). Runs of a subset of
models or readers update the file. The second form writes the table into docs/readers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import runtimes
from pages import fill_page
from runtimes import READERS, Row, by_onnxruntime, draw

RUNTIMES = Path(runtimes.__file__)
ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "readers.json"
PAGE = ROOT / "docs" / "readers.md"
#: The deviation up to which answers count as the same, if the original does not deviate more.
TOLERANCE = 1e-4
#: The same for readers that round: to 11 bits, and to 8 bits.
TOLERANCES = {
    "float16": 1e-2,
    "mixed precision": 5e-2,
    "dynamic quantisation": 0.1,
    "static quantisation": 0.1,
}
#: A deviation may grow by this factor: rounding errors are random.
MARGIN = 2.0
#: Distributions whose versions are recorded.
DISTRIBUTIONS = (
    "onnxruntime", "openvino", "onnx2torch", "torch", "tract", "MNN", "pnnx", "ncnn", "onnxsim", "onnxslim",
    "onnxconverter-common",
)  # fmt: skip


def ask(name: str, paths: list[Path], shapes: dict[str, list[int]], answer: Path, given: argparse.Namespace) -> Row:
    """Run one reader in a process of its own; if that process dies, in one process for each model."""
    task = json.dumps([name, [str(p) for p in paths], shapes, str(answer), given.time])
    # MNN's converter installs packages with pip while it runs, and replaces protobuf by an older one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    try:
        done = subprocess.run(
            [given.there[name], str(RUNTIMES), task], capture_output=True, text=True, check=False,
            timeout=given.seconds, env=environment,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return dict(json.loads(lines[-1]))
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    except subprocess.TimeoutExpired:
        error = f"took more than {given.seconds:.0f} seconds"
    if len(paths) == 1:
        return {"found": [{"error": error}]}
    return {"found": [ask(name, [path], shapes, answer, given)["found"][0] for path in paths]}


def make_static(source: Path, out: Path, shapes: dict[str, list[int]]) -> Path:
    """Copy a model with fixed input sizes."""
    model = onnx.load(source)
    for value in model.graph.input:
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


def judge(name: str, original: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Compare what a reader makes of both models."""
    if "error" in original:
        return "neither" if "error" in result else "only the result"
    if "error" in result:
        return "**only the original**"
    limit = max(MARGIN * original["deviation"], TOLERANCES.get(name, TOLERANCE))
    return "same" if result["deviation"] <= limit else f"**{original['deviation']:.1g} → {result['deviation']:.1g}**"


def format_cell(name: str, cell: Row) -> str:
    """Format one cell of the table: the verdict, and how much less time the result takes, with the interval."""
    verdict = judge(name, *cell["found"])
    if "ratio" not in cell:
        return verdict
    ratio, low, high = cell["ratio"]
    times = f"{ratio:.2f}× [{low:.2f}, {high:.2f}]"
    return times if verdict == "same" else f"{verdict}, {times}"


def render(record: Row) -> str:
    """Format a record as Markdown: one row per model and reader."""
    found = record["models"]
    names = [name for name in READERS if any(name in row for row in found.values())]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"Processor time of the original over that of pwopt's result: {record['cpu']}, 1 thread, {record['date']};",
        f"{versions}.",
        "",
        "| model | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for model, row in found.items():
        lines.append(f"| {model} | " + " | ".join(format_cell(n, row[n]) if n in row else "" for n in names) + " |")
    return "\n".join(lines) + "\n"


INSTALLED = """import importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
modules, names = json.loads(sys.argv[1])
print(json.dumps([[m for m in modules if importlib.util.find_spec(m)], {n: find(n) for n in names if find(n)}]))
"""


def find_readers(interpreters: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find the first interpreter that has each reader, and the versions of the packages."""
    there: dict[str, str] = {}
    versions: dict[str, str] = {}
    asked = json.dumps([[module.partition(".")[0] for module, _ in READERS.values()], DISTRIBUTIONS])
    for interpreter in interpreters:
        done = subprocess.run([interpreter, "-c", INSTALLED, asked], capture_output=True, text=True, check=True)
        modules, found = json.loads(done.stdout)
        there |= {n: interpreter for n, (m, _) in READERS.items() if n not in there and m.partition(".")[0] in modules}
        versions = found | versions
    return there, {name: versions[name] for name in DISTRIBUTIONS if name in versions}


def measure(
    folder: Path, model: str, shapes: dict[str, list[int]], readers: list[str], given: argparse.Namespace
) -> Row:
    """Let every reader run a model and what pwopt makes of it."""
    import pwopt

    found: Row = {}
    with tempfile.TemporaryDirectory() as place:
        original = make_static(folder / f"{model}.onnx", Path(place) / "original.onnx", shapes)
        result = Path(place) / "result.onnx"
        pwopt.optimize(folder / f"{model}.onnx", result, shapes=shapes, cost="analytic", static=True)
        answer = Path(place) / "answer.npz"
        np.savez(answer, *by_onnxruntime(original, draw(shapes), "ORT_DISABLE_ALL")())
        for name in readers:
            found[name] = ask(name, [original, result], shapes, answer, given)
            print(f"{model}: {name}: {format_cell(name, found[name])} {found[name]['found']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--models", help="comma-separated; all in shapes.json by default")
    parser.add_argument("--readers", help="comma-separated; all that are installed by default")
    parser.add_argument("--others", help="a second Python interpreter, for readers that this one lacks")
    parser.add_argument("--no-time", dest="time", action="store_false", help="compare the answers only")
    parser.add_argument("--seconds", type=float, default=120.0, help="the longest time for a reader and a model")
    parser.add_argument("--render", action="store_true", help="write the recorded table into docs/readers.md")
    given = parser.parse_args()
    record: Row = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {"models": {}}
    if given.render:
        fill_page(PAGE, "readers", render(record))
        return
    from pwopt.running import installation

    shapes = json.loads((given.folder / "shapes.json").read_text(encoding="utf-8"))
    models = given.models.split(",") if given.models else [name.removesuffix(".onnx") for name in shapes]
    given.there, versions = find_readers([sys.executable, *([given.others] if given.others else [])])
    readers = given.readers.split(",") if given.readers else list(given.there)
    cpu = installation.describe_machine()["cpu"]
    record = {"date": date.today().isoformat(), "cpu": cpu, "versions": versions, "models": record["models"]}
    for model in models:
        found = measure(given.folder, model, shapes[f"{model}.onnx"], readers, given)
        record["models"][model] = record["models"].get(model, {}) | found
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
