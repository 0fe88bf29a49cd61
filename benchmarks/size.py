#!/usr/bin/env python3
"""Memory and time of pwopt itself on models that grow: in gigabytes of weights, and in operators.

    python benchmarks/size.py [-o RESULTS.json] [--gigabytes 0.25,0.5,1,2.2] [--nodes 6250,12500,25000,50000]

Each row is a process of its own, whose peak resident memory is read when it ends. The large models have external data,
written piece by piece into a temporary folder (--folder, with room for twice the largest); some maps fold, most do not:
how much of the data was copied untouched is counted. Nothing is run: `optimize` with verify=False. Growth is the slope of
log(seconds) over log(nodes): 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine

#: Side of the large models' square weights: 64 MiB each in float32.
WIDTH = 4096
CHANNELS = 4


def gigabytes(folder: Path, size: float) -> Path:
    """Square products with a Relu after each, every eighth with a scale that folds: `size` GB of external data."""
    count = max(2, round(size * 1e9 / (4 * WIDTH * WIDTH)))
    rng = np.random.default_rng(0)
    block = (rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
    nodes, tensors = [], []
    with (folder / "weights.bin").open("wb") as data:
        for i in range(count):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": data.tell(), "length": block.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(np.roll(block, i, axis=0).tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"a{i}"]))
            last = f"a{i}"
            if i % 8 == 0:
                nodes.append(helper.make_node("Mul", [last, "scale"], [f"b{i}"]))
                last = f"b{i}"
            nodes.append(helper.make_node("Relu", [last], [f"x{i + 1}"]))
    tensors.append(numpy_helper.from_array(np.float32(0.5), "scale"))
    return _written(folder, nodes, tensors, "x0", f"x{count}", [1, WIDTH])


def blocks(folder: Path, size: int) -> Path:
    """Conv, Mul, Add (by a scalar that all share) and Relu."""
    count, nodes = size // 4, []
    for i in range(count):
        nodes += [
            helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", "s"], [f"b{i}"]),
            helper.make_node("Add", [f"b{i}", "s"], [f"c{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]),
        ]
    tensors = [_orthogonal(i) for i in range(count)]
    tensors.append(numpy_helper.from_array(np.float32(0.5), "s"))
    return _written(folder, nodes, tensors, "x0", f"x{count}", [1, CHANNELS, 8, 8])


def chain(folder: Path, size: int) -> Path:
    """1×1 convolutions one after the other."""
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(size)]
    return _written(folder, nodes, [_orthogonal(i) for i in range(size)], "x0", f"x{size}", [1, CHANNELS, 8, 8])


def activations(folder: Path, size: int) -> Path:
    """Operators on which nothing applies, of a size that is not known."""
    nodes = [helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(size)]
    return _written(folder, nodes, [], "x0", f"x{size}", ["N", CHANNELS, 8, 8])


def _orthogonal(i: int) -> TensorProto:
    values = np.linalg.qr(np.random.default_rng(i % 64).normal(size=(CHANNELS, CHANNELS)))[0]
    return numpy_helper.from_array(values.astype(np.float32).reshape(CHANNELS, CHANNELS, 1, 1), f"w{i}")


def _written(
    folder: Path, nodes: list[onnx.NodeProto], tensors: list[TensorProto], first: str, last: str, shape: list[Any]
) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (first, last)]
    graph = helper.make_graph(nodes, "size", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


FAMILIES: dict[str, Callable[[Path, Any], Path]] = {
    "gigabytes": gigabytes, "blocks": blocks, "chain": chain, "activations": activations,
}  # fmt: skip


def resident(field: str) -> int:
    """KiB of resident memory that Linux counts for this process: VmHWM is the most it ever had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def run(path: Path) -> dict[str, Any]:
    """Optimise one model in this process: seconds, peak memory, and what became of it."""
    import pwopt

    idle = resident("VmHWM")
    start = time.perf_counter()
    result = pwopt.optimize(path, path.with_name("out.onnx"), cost="analytic", verify=False,
                            shapes={"x0": (1, CHANNELS, 8, 8)} if path.stat().st_size and "N" in _sizes(path) else None)  # fmt: skip
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    weights = sum(p.stat().st_size for p in path.parent.glob("weights.bin"))
    return {
        "seconds": round(seconds, 2),
        "peak MB": peak >> 10,
        "peak over idle MB": (peak - idle) >> 10,
        "weights MB": weights >> 20,
        "peak over weights": round((peak << 10) / weights, 2) if weights else None,
        "nodes before": result.report.before.nodes,
        "nodes after": result.report.after.nodes,
        "tensors still external": sum(t.data_location == TensorProto.EXTERNAL for t in result.model.graph.initializer),
        "tensors new": sum(t.data_location != TensorProto.EXTERNAL for t in result.model.graph.initializer),
    }


def _sizes(path: Path) -> list[str]:
    model = onnx.load(path, load_external_data=False)
    return [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]


def measured(family: str, size: float, where: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pwopt-size-", dir=where) as name:
        path = FAMILIES[family](Path(name), size)
        command = [sys.executable, __file__, "--run", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return {"family": family, "size": size, **json.loads(done.stdout)}


def growth(rows: list[dict[str, Any]]) -> float:
    """Slope of log(seconds) over log(size)."""
    sizes, seconds = (np.log([r[key] for r in rows]) for key in ("size", "seconds"))
    return float(np.polyfit(sizes, seconds, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--gigabytes", default="0.25,0.5,1,2.2")
    parser.add_argument("--nodes", default="6250,12500,25000,50000,100000")
    parser.add_argument("--folder", type=Path, help="where the models are written")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(options.run)))
        return
    rows, slopes = [], {}
    for family in FAMILIES:
        sizes = (
            map(float, options.gigabytes.split(",")) if family == "gigabytes" else map(int, options.nodes.split(","))
        )
        found = []
        for size in sizes:
            found.append(measured(family, size, options.folder))
            print(found[-1], flush=True)
        slopes[family] = round(growth(found), 2) if len(found) > 1 else None
        rows += found
    print("growth:", slopes)
    if options.output:
        options.output.write_text(to_json({"environment": describe_machine(), "rows": rows, "growth": slopes}))


if __name__ == "__main__":
    main()
