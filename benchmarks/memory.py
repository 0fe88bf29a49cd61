#!/usr/bin/env python3
"""Peak memory and temporary disk of an optimisation over all its processes (Linux), beside onnxsim and OnnxSlim.

    python benchmarks/memory.py [-o RESULTS.json] [--megabytes 128] [--peers PYTHON] [--folder FOLDER]

The model is a chain of 1×1 convolutions of 4 MiB each, every fourth with a scale that folds. It is stored as one file,
and with external data. While a command runs, the proportional set sizes (Pss) of its processes are added up every
50 ms, and so are the sizes of the files in its temporary folder and beside the output. The result counts as well. The
same command on a model of a few bytes tells what the interpreters and onnxruntime take without weights. The second ratio
is above that base. `--peers` is a Python with onnxsim and onnxslim installed; those that are not are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine

#: Channels of the model, so that a weight has 4 MiB in float32.
CHANNELS = 1024
#: Seconds between two samples.
INTERVAL = 0.05
#: What runs, by name: arguments of Python, with the model and the output at the end.
OWN = {
    "pwopt": ["-m", "pwopt", "optimize", "{model}", "-o", "{output}", "--no-cache", "--budget", "5"],
    "pwopt --cost analytic": ["-m", "pwopt", "optimize", "{model}", "-o", "{output}", "--cost", "analytic"],
    "pwopt --cost analytic --no-verify": [
        "-m", "pwopt", "optimize", "{model}", "-o", "{output}", "--cost", "analytic", "--no-verify",
    ],
}  # fmt: skip
PEERS = {
    "onnxsim": ["-m", "onnxsim", "{model}", "{output}"],
    "onnxslim": ["-m", "onnxslim", "{model}", "{output}"],
}


def write_model(path: Path, count: int, *, external: bool, channels: int = CHANNELS) -> None:
    rng = np.random.default_rng(0)
    nodes, tensors = [], [numpy_helper.from_array(np.float32(0.5), "s")]
    for i in range(count):
        values = (rng.normal(size=(channels, channels, 1, 1)) / channels**0.5).astype(np.float32)
        tensors.append(numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"a{i}"]))
        if i % 4 == 0:
            nodes.append(helper.make_node("Mul", [f"a{i}", "s"], [f"b{i}"]))
        nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], [f"x{i + 1}"]))
    ends = [helper.make_tensor_value_info(t, TensorProto.FLOAT, [1, channels, 4, 4]) for t in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "memory", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)


def find_descendants(pid: int) -> list[int]:
    """List a process and all processes below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def measure_pss(pid: int) -> int:
    """Bytes of memory of one process; pages that several processes share count in equal parts."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
    return 0


def count_files(folder: Path) -> int:
    """Count the bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def watch(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command; its peak memory, peak and remaining disk use in `folder`, processor seconds and exit code."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    environ = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    memory = disk = 0
    while process.poll() is None:
        memory = max(memory, sum(map(measure_pss, find_descendants(process.pid))))
        disk = max(disk, count_files(folder))
        time.sleep(INTERVAL)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "exit code": process.returncode,
        "processor seconds": round(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime, 2),
        "peak memory MB": round(memory / 1e6),
        "peak disk MB": round(disk / 1e6),
    }


def measure_base(python: str, arguments: list[str], where: Path | None) -> int:
    """Peak memory in megabytes on a model of a few bytes."""
    with tempfile.TemporaryDirectory(prefix="pwopt-memory-", dir=where) as text:
        model, out = Path(text, "model.onnx"), Path(text, "out")
        out.mkdir()
        write_model(model, 4, external=False, channels=4)
        filled = [a.format(model=model, output=out / "out.onnx") for a in arguments]
        return int(watch([python, *filled], out)["peak memory MB"])


def measure(
    name: str, python: str, arguments: list[str], count: int, where: Path | None, base: int, *, external: bool
) -> Any:
    with tempfile.TemporaryDirectory(prefix="pwopt-memory-", dir=where) as text:
        model, out = Path(text, "model.onnx"), Path(text, "out")
        out.mkdir()
        write_model(model, count, external=external)
        size, output = count_files(Path(text)), out / "out.onnx"
        filled = [a.format(model=model, output=output) for a in arguments]
        found = watch([python, *filled], out)
        left = sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and not p.name.startswith(output.name))
        return {
            "tool": name, "external data": external, "model MB": round(size / 1e6), **found,
            "base memory MB": base,
            "peak memory over model": round(found["peak memory MB"] / (size / 1e6), 2),
            "peak memory above base over model": round((found["peak memory MB"] - base) / (size / 1e6), 2),
            "peak disk over model": round(found["peak disk MB"] / (size / 1e6), 2),
            "temporary bytes left": left,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--peers", metavar="PYTHON", help="a Python with onnxsim and onnxslim")
    parser.add_argument("--folder", type=Path, help="where the models are written")
    options = parser.parse_args()
    tools = [(name, sys.executable, arguments) for name, arguments in OWN.items()]
    for name, arguments in PEERS.items() if options.peers else ():
        if subprocess.run([options.peers, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0:
            tools.append((name, options.peers, arguments))
    bases = {name: measure_base(python, arguments, options.folder) for name, python, arguments in tools}
    rows = []
    for external in (False, True):
        for name, python, arguments in tools:
            count = max(1, options.megabytes // 4)
            rows.append(measure(name, python, arguments, count, options.folder, bases[name], external=external))
            print(rows[-1], flush=True)
    if options.output:
        options.output.write_text(to_json({"environment": describe_machine(), "rows": rows}))


if __name__ == "__main__":
    main()
