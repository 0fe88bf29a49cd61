#!/usr/bin/env python3
"""A table of the sizes that dynamic models are run at: which, why, how long choosing took, and how much memory.

    python benchmarks/sizes.py [MODEL.onnx …] [-o RESULTS.json] [--table TABLE.md]

The models are those given, and the built ones of tests/dynamic.py: audio, tokens, images both ways, video, key-value
caches, several inputs that share an axis, indices. Each is a process of its own; its memory is the peak that choosing
both rounds of sizes added to it, with every run of the original that this takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from dynamic import CASES

from pwopt.graph.files import load
from pwopt.graph.shapes import format_shape
from pwopt.inputs.input_specs import input_specs
from pwopt.reporting.report import to_json
from pwopt.running import installation
from pwopt.running.size_trials import choose_rounds

#: What choosing sizes may take: bytes and seconds.
MOST_BYTES, MOST_SECONDS = 1 << 30, 10.0


def peak() -> int:
    """The most memory that this process has held, in bytes (Linux, proc(5))."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def row(name: str, path: Path) -> dict[str, Any]:
    """One model's sizes, in this process."""
    installation.import_onnxruntime()
    loaded = load(path)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, start, idle = peak(), time.perf_counter(), sum(os.times()[:4])
    specs = input_specs(loaded.proto)
    chosen = choose_rounds(specs, loaded.proto, path)
    spent, busy = time.perf_counter() - start, sum(os.times()[:4]) - idle
    return {
        "model": name,
        "declared": {v.name: declared(v) for v in loaded.proto.graph.input if v.name in chosen[0].sizes},
        "sizes": {n: list(s) for n, s in chosen[0].sizes.items()},
        "why": list(chosen[0].why),
        "other sizes": None if len(chosen) == 1 else {n: list(s) for n, s in chosen[1].sizes.items()},
        "seconds": round(spent, 2),
        "seconds of the processor": round(busy, 2),
        "run ms": None if chosen[0].seconds is None else round(chosen[0].seconds * 1e3, 2),
        "activations MiB, estimated": round(chosen[0].bytes / 2**20, 1),
        "peak added MiB": round((peak() - before) / 2**20, 1),
        "within bounds": spent <= MOST_SECONDS and peak() - before <= MOST_BYTES,
    }


def declared(value: onnx.ValueInfoProto) -> str:
    if not value.type.tensor_type.HasField("shape"):
        return "nothing"
    return format_shape(
        [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in value.type.tensor_type.shape.dim]
    )


def measured(name: str, path: Path) -> dict[str, Any]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--only", name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": name, "error": (done.stderr.strip().splitlines() or ["no reason"])[-1], "within bounds": False}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| model | declared | sizes | why | s | s of the processor | MiB |", "|---|---|---|---|---:|---:|---:|"]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | | | {r['error']} | | | |")
            continue
        shapes = [
            " ".join(f"{n} {format_shape(s) if isinstance(s, list) else s}" for n, s in r[k].items())
            for k in ("declared", "sizes")
        ]
        lines.append(
            f"| {r['model']} | {shapes[0]} | {shapes[1]} | {'; '.join(r['why'])} | {r['seconds']:.1f} | {r['seconds of the processor']:.1f} | {r['peak added MiB']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(row(options.only, options.models[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {path.stem: path for path in options.models}
        for i, (name, case) in enumerate(CASES.items()):
            models[name] = Path(folder) / f"{i}.onnx"
            models[name].write_bytes(case.build().SerializeToString())
        rows = []
        for name, path in models.items():
            rows.append(measured(name, path))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    bad = [r["model"] for r in rows if not r["within bounds"]]
    print(f"{len(rows)} models, {len(bad)} beyond {MOST_SECONDS:.0f} s or 1 GiB: {', '.join(bad) or 'none'}")
    if options.output:
        options.output.write_text(to_json({"environment": installation.describe_machine(), "rows": rows}))
    if options.table:
        options.table.write_text(markdown(rows))


if __name__ == "__main__":
    main()
