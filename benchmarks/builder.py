"""A small writer of float32 models with seeded weights, for the scripts beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Nodes are added one by one; each call returns the name of what it makes."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attrs: object) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attrs))
        return name

    def constant(self, values: np.ndarray) -> str:
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(self, x: str, inn: int, out: int, kernel: int = 1, groups: int = 1, stride: int = 1, rank: int = 2) -> str:
        fan = inn // groups * kernel**rank
        weight = self.constant(self.rng.normal(0, (2 / fan) ** 0.5, (out, inn // groups, *[kernel] * rank)))
        bias = self.constant(self.rng.normal(0, 0.1, out))
        shape = {"kernel_shape": [kernel] * rank, "pads": [kernel // 2] * 2 * rank, "strides": [stride] * rank}
        return self.op("Conv", x, weight, bias, group=groups, **shape)

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def gate(self, x: str, channels: int, squeezed: int) -> str:
        """Squeeze-and-excitation (Hu et al., 2018)."""
        g = self.op("Relu", self.conv(self.op("GlobalAveragePool", x), channels, squeezed))
        return self.op("Mul", x, self.op("Sigmoid", self.conv(g, squeezed, channels)))

    def norm(self, x: str, channels: int) -> str:
        """Normalisation over channels as torch exports it from ConvNeXt's and NAFNet's code."""
        two, small = self.constant(np.array(2.0)), self.constant(np.array(1e-6))
        scale, shift = (self.constant(self.rng.normal(size=(1, channels, 1, 1))) for _ in range(2))
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[1]))
        variance = self.op("ReduceMean", self.op("Pow", centred, two), axes=[1])
        whitened = self.op("Div", centred, self.op("Sqrt", self.op("Add", variance, small)))
        return self.op("Add", self.op("Mul", whitened, scale), shift)

    def save(
        self, path: Path, inputs: Mapping[str, Sequence[int | str]], outputs: Sequence[str], opset: int = 17
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        x = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, path.stem, x, y, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
