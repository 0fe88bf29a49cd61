#!/usr/bin/env python3
"""Write two 3-D models to bench: a chain of pointwise convolutions, and blocks like X3D's.

    python tests/benchmarks/video.py FOLDER && python tests/benchmarks/run.py FOLDER

Feichtenhofer, "X3D: Expanding Architectures for Efficient Video Recognition" (CVPR 2020): 1×1×1 expansion, depthwise
3×3×3, squeeze-and-excitation, Swish, 1×1×1 projection, residual; stage 3 of X3D-S on 13 frames of 20×20.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, inputs: list[str], **attrs: object) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attrs))
        return name

    def constant(self, values: np.ndarray) -> str:
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(self, x: str, inn: int, out: int, kernel: int = 1, groups: int = 1) -> str:
        fan = inn // groups * kernel**3
        weight = self.constant(self.rng.normal(0, (2 / fan) ** 0.5, (out, inn // groups, *[kernel] * 3)))
        bias = self.constant(self.rng.normal(0, 0.1, out))
        return self.op("Conv", [x, weight, bias], kernel_shape=[kernel] * 3, pads=[kernel // 2] * 6, group=groups)

    def save(self, path: Path, last: str, shape: list[int]) -> None:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, path.stem, [x], [y], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def chain(path: Path) -> None:
    b, x = Builder(), "x"
    for inn, out in ((48, 96), (96, 96), (96, 48)):
        x = b.op("Relu", [b.conv(x, inn, out)])
    b.save(path, x, [1, 48, 13, 20, 20])


def blocks(path: Path) -> None:
    b, x, width, inner, squeezed = Builder(), "x", 48, 108, 8
    for i in range(4):
        y = b.op("Relu", [b.conv(x, width, inner)])
        y = b.conv(y, inner, inner, 3, inner)
        if i % 2 == 0:
            gate = b.op("GlobalAveragePool", [y])
            gate = b.op("Relu", [b.conv(gate, inner, squeezed)])
            gate = b.op("Sigmoid", [b.conv(gate, squeezed, inner)])
            y = b.op("Mul", [y, gate])
        y = b.op("Mul", [y, b.op("Sigmoid", [y])])
        x = b.op("Relu", [b.op("Add", [x, b.conv(y, inner, width)])])
    b.save(path, x, [1, width, 13, 20, 20])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    chain(folder / "pointwise3d.onnx")
    blocks(folder / "x3d_blocks.onnx")
