#!/usr/bin/env python3
"""What is left in optimised models that is linear or does nothing, by kind, with the reason why it stays.

    python benchmarks/survey.py MODEL… [-o benchmarks/results/survey.json] [--peers onnxsim,OnnxSlim,onnxruntime]

Each model is optimised by what needs no clock (`--cost analytic`), and every operator that could still be one with
another is listed: scales, shifts and normalisations (`pwopt.maps.forms` reads them as maps), changes of view and order,
selections, repetitions, casts, shape arithmetic, and weighted maps that feed each other. The reason is what the passes
say of it, or else what stands beside it. Nothing is run or timed.

With `--peers`, other optimisers run on pwopt's results, each in a process of its own, and the survey lists which
operators they still remove and add (Constants do not count). "onnxruntime" is its basic level, which also runs on the
original: `fewer` is how many operators fewer it leaves than pwopt. The peers must be installed.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from peers import PATIENCE, TOOLS

import pwopt
from pwopt.graph import operators, values
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine

#: Operators that move, repeat or pick numbers and compute none.
MOVING = (
    "Transpose",
    "Slice",
    "Gather",
    "Split",
    "Concat",
    "Expand",
    "Tile",
    "Identity",
    "Cast",
    "Pad",
    *operators.VIEWS,
)


def kind(view: View, node: gs.Node) -> str:
    """Which of the kinds an operator is of, else ""."""
    op = view.op(node)
    output = next((t for t in node.outputs if t.name), None)
    if not op or output is None:
        return ""
    if op in ("Shape", "Size") or (op in values.RULES and str(view.dtype(output)) in ("int64", "int32", "bool")):
        return "shape arithmetic"
    reading = forms.linear(view, node)
    if reading is not None and reading.kind == "diagonal":
        return "scale or shift" if op != "BatchNormalization" else op
    if reading is not None and reading.weighted:
        before = forms.weighted(view, view.producer(reading.source))
        return "map after a map" if before is not None else ""
    if reading is not None and reading.kind in ("pool", "reduction"):
        return op
    return op if op in MOVING else ""


def reason(view: View, node: gs.Node, told: dict[str, str]) -> str:
    """Why an operator stays: what a pass said, without names, or what is around it."""
    found = next((told[t.name] for t in node.outputs if t.name in told), None)
    if found is not None:
        parts = found.split("'")
        return "…".join(parts[::2]) if len(parts) % 2 else found
    output = next(t for t in node.outputs if t.name)
    data = next((t for t in node.inputs if t.name and view.constant(t) is None), None)
    before = view.op(view.producer(data)) if data is not None else ""
    after = sorted({view.op(r) or "?" for r in view.readers(output)})
    pinned = view.must_keep(output)
    ends = "an output" if pinned else " and ".join(after[:3])
    return f"between {before or 'an input'} and {ends}"


def count_operators(model: onnx.ModelProto) -> Counter[str]:
    """Operators of the main graph by name, without Constants."""
    return Counter(node.op_type for node in model.graph.node if node.op_type != "Constant")


def by_onnxruntime(path: Path, out: Path) -> None:
    """The graph after onnxruntime's basic optimisations."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_peer(peer: str, path: Path, out: Path) -> Counter[str] | str:
    """The operators that a peer leaves, or why it fails."""
    command = [sys.executable, __file__, "--one", peer, str(path), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"stopped after {PATIENCE} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]
    return count_operators(onnx.load(out, load_external_data=False))


def compare_peers(path: Path, model: onnx.ModelProto, peers: Sequence[str]) -> dict[str, Any]:
    """What peers still remove from a result and add to it; onnxruntime also on the original."""
    left, found = count_operators(model), {}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "pwopt.onnx"
        onnx.save(model, made)
        for peer in peers:
            counts = run_peer(peer, made, Path(folder) / f"{peer}.onnx")
            changes = counts if isinstance(counts, str) else {"removed": left - counts, "added": counts - left}
            found[peer] = {"error": changes} if isinstance(changes, str) else changes
        if "onnxruntime" in peers:
            alone = run_peer("onnxruntime", path, Path(folder) / "alone.onnx")
            found["fewer"] = None if isinstance(alone, str) else max(0, left.total() - alone.total())
    return found


def survey(path: Path, peers: Sequence[str] = ()) -> tuple[dict[str, Any], Counter[tuple[str, str]]]:
    """Operators before and after, and how many of each kind stay for each reason."""
    result = pwopt.optimize(path, cost="analytic", verify=False)
    told = {
        s.tensor: s.reason
        for s in result.report.skips
        if s.pass_name in ("clean-up", "fold-affine", "fold-chains", "join-views")
    }
    view = View(from_proto(result.model, path.parent).graph)
    found: Counter[tuple[str, str]] = Counter()
    for node in view.nodes():
        what = kind(view, node)
        if what:
            found[what, reason(view, node, told)] += 1
    sizes: dict[str, Any] = {"before": result.report.before.nodes, "after": result.report.after.nodes}
    if peers:
        sizes["peers"] = compare_peers(path, result.model, peers)
    return sizes, found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        peer, path, out = sys.argv[2:]
        (by_onnxruntime if peer == "onnxruntime" else TOOLS[peer][0])(Path(path), Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--peers", default="", help="optimisers to run on the results, separated by commas")
    options = parser.parse_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    total: Counter[tuple[str, str]] = Counter()
    models: dict[str, Any] = {}
    for path in options.models:
        try:
            sizes, found = survey(path, peers)
        except pwopt.PwoptError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        total += found
        by_kind: Counter[str] = Counter()
        for (what, _), count in found.items():
            by_kind[what] += count
        models[path.stem] = {**sizes, "left": dict(by_kind.most_common())}
        print(path.stem, sizes, dict(by_kind.most_common()), flush=True)
    kinds: dict[str, dict[str, Any]] = {}
    for (what, why), count in total.most_common():
        entry = kinds.setdefault(what, {"count": 0, "reasons": {}})
        entry["count"] += count
        entry["reasons"][why] = count
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["count"]))
    for what, entry in ordered.items():
        print(f"{entry['count']:5} {what}")
        for why, count in list(entry["reasons"].items())[:6]:
            print(f"      {count:5} {why}")
    if options.output:
        content = {"environment": describe_machine(), "models": models, "kinds": ordered}
        options.output.write_text(to_json(content))


if __name__ == "__main__":
    main()
