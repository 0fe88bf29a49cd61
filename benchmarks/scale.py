#!/usr/bin/env python3
"""Time pwopt itself on graphs of growing size: near-linear, or it shows here.

    python benchmarks/scale.py [-o RESULTS.json] [--sizes 2000,4000,8000,16000]

Two families: one chain of linear 1×1 convolutions, and blocks of Conv, Mul, Add (by one scalar that all share) and
Relu. Seconds are processor time for reading the graph, all passes to their end, and writing it back.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph.files import from_proto
from pwopt.passes import PASSES
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine
from pwopt.running.memory import collect_rarely
from pwopt.selecting.candidate_base import run_passes

CHANNELS = 4


def graph(nodes: list[onnx.NodeProto], first: str, last: str, weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    shape = [1, CHANNELS, 8, 8]
    inputs = [helper.make_tensor_value_info(first, TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)]
    made = helper.make_graph(nodes, "scale", inputs, outputs, weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weight(i: int) -> onnx.TensorProto:
    values = np.linalg.qr(np.random.default_rng(i).normal(size=(CHANNELS, CHANNELS)))[0]
    return numpy_helper.from_array(values.astype(np.float32).reshape(CHANNELS, CHANNELS, 1, 1), f"w{i}")


def linear_chain(size: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(size)]
    return graph(nodes, "x0", f"x{size}", [weight(i) for i in range(size)])


def blocks(size: int) -> onnx.ModelProto:
    nodes, count = [], size // 4
    for i in range(count):
        nodes += [
            helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"a{i}"]),
            helper.make_node("Mul", [f"a{i}", "s"], [f"b{i}"]),
            helper.make_node("Add", [f"b{i}", "s"], [f"c{i}"]),
            helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]),
        ]
    shared = numpy_helper.from_array(np.float32(0.5), "s")
    return graph(nodes, "x0", f"x{count}", [*(weight(i) for i in range(count)), shared])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--sizes", default="2000,4000,8000,16000")
    options = parser.parse_args()
    rows = []
    for build in (linear_chain, blocks):
        for size in map(int, options.sizes.split(",")):
            proto = build(size)
            with collect_rarely():
                start = time.process_time()
                model = from_proto(proto)
                outcome = run_passes(model, [p() for p in PASSES], (), {})
                result = model.to_proto()
                seconds = time.process_time() - start
            rows.append({
                "family": build.__name__, "nodes": size, "seconds": round(seconds, 2),
                "microseconds per node": round(seconds / size * 1e6), "nodes after": len(result.graph.node),
                "rewrites": len(outcome.rewrites),
            })  # fmt: skip
            print(rows[-1], flush=True)
    if options.output:
        options.output.write_text(to_json({"environment": describe_machine(), "rows": rows}))


if __name__ == "__main__":
    main()
