#!/usr/bin/env python3
"""Verify what several optimisers make of real models, and keep the reports.

    python benchmarks/tools.py FOLDER OUT [--tools pwopt,onnxsim,onnxslim] [--models a,b]

FOLDER holds .onnx files and may hold a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}. Every tool that is
installed makes a model, which is compared with the original as anybody's would be; OUT gets a Markdown report of each
pair and summary.json. Besides, each original is verified against itself optimised by onnxruntime alone (which must
pass), and against itself with one weight tensor off by a thousandth (which must fail, at that layer).
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

import pwopt
from pwopt.reporting.document import render_document
from pwopt.reporting.report import Comparison, to_json
from pwopt.running.installation import describe_machine


def by_pwopt(path: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    pwopt.optimize(path, out, shapes=shapes, cost="analytic")


def by_onnxsim(path: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    model, _ = importlib.import_module("onnxsim").simplify(onnx.load(path))
    onnx.save(model, out)


def by_onnxslim(path: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    onnx.save(importlib.import_module("onnxslim").slim(onnx.load(path)), out)


def by_onnxruntime(path: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    """The graph after onnxruntime's extended optimisations, which differs by an optimisation level alone."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def planted(path: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    """The weights of the middle convolution, off by a thousandth at random."""
    model = onnx.load(path)
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    chosen = convs[len(convs) // 2].input[1]
    makers = {n.output[0]: n for n in model.graph.node if n.op_type == "Constant"}
    held = {t.name: t for t in model.graph.initializer} | {k: n.attribute[0].t for k, n in makers.items()}
    values = numpy_helper.to_array(held[chosen])
    wrong = values * (1 + 1e-3 * np.random.default_rng(0).normal(size=values.shape))
    held[chosen].CopyFrom(numpy_helper.from_array(wrong.astype(values.dtype), held[chosen].name))
    onnx.save(model, out)


TOOLS: dict[str, Callable[[Path, Path, dict[str, list[int]]], None]] = {
    "pwopt": by_pwopt, "onnxsim": by_onnxsim, "onnxslim": by_onnxslim, "onnxruntime": by_onnxruntime, "planted": planted,
}  # fmt: skip


def compare(path: Path, tool: str, shapes: dict[str, list[int]], out: Path) -> dict[str, Any]:
    """One row: the verdict on what a tool made, or what stopped it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{path.stem}.{tool}.onnx"
        try:
            TOOLS[tool](path, made, shapes)
        except Exception as error:
            return {"model": path.name, "tool": tool, "error": f"{type(error).__name__}: {str(error)[:200]}"}
        try:
            found = pwopt.verify(path, made, shapes=shapes)
        except pwopt.PwoptError as error:
            return {"model": path.name, "tool": tool, "error": str(error)}
    worst = max(found.outputs, key=lambda o: (not o.passed, o.max_abs))
    comparison = Comparison(path.name, made.name, "cpu", describe_machine(), found)
    (out / f"{path.stem}.{tool}.md").write_text(render_document(comparison, "markdown"), encoding="utf-8")
    return {
        "model": path.name,
        "tool": tool,
        "passed": found.passed,
        "max_abs": worst.max_abs,
        "floor": worst.floor,
        "reason": worst.reason,
        "difference": None if found.difference is None else found.difference.explain(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--models", default="", help="parts of names; all by default")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    listed = options.folder / "shapes.json"
    shapes = json.loads(listed.read_text()) if listed.exists() else {}
    wanted = options.models.split(",")
    console, rows = Console(width=140, emoji=False), []
    table = Table("model", "tool", "verdict", "deviation", "floor", "where")
    for path in sorted(options.folder.glob("*.onnx")):
        if not any(part in path.name for part in wanted):
            continue
        for tool in options.tools.split(","):
            row = compare(path, tool, shapes.get(path.name, {}), options.out)
            rows.append(row)
            if "error" in row:
                table.add_row(path.name, tool, "error", "", "", row["error"][:80])
                continue
            verdict = "equivalent" if row["passed"] else "rejected"
            where = (row["difference"] or "")[:80]
            table.add_row(path.name, tool, verdict, f"{row['max_abs']:.2g}", f"{row['floor']:.2g}", where)
    console.print(table)
    summary = options.out / "summary.json"
    before = json.loads(summary.read_text())["rows"] if summary.exists() else []
    done = {(r["model"], r["tool"]) for r in rows}
    kept = [r for r in before if (r["model"], r["tool"]) not in done]
    content = {"environment": describe_machine(), "rows": sorted(kept + rows, key=lambda r: (r["model"], r["tool"]))}
    summary.write_text(to_json(content), encoding="utf-8")


if __name__ == "__main__":
    main()
