"""Models that another tool optimised, and normalisations that onnx cannot infer, gain as much as their plain forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import pwopt

ort.set_default_logger_severity(4)
HIDDEN, HEADS, LENGTH = 32, 2, 16
#: Passes that change the form of a normalisation, which differs between the models on purpose.
OF_NORMALISATIONS = {"lower-group-norm", "lower-residual"}


class Graph:
    """Operators and weights, collected one at a time."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def constant(self, name: str, value: object, dtype: type = np.float32) -> str:
        self.weights[name] = np.asarray(value, dtype)
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.generator.normal(size=shape) / np.sqrt(np.prod(shape[1:])))

    def around(self, name: str, mean: float, *shape: int) -> str:
        return self.constant(name, mean + 0.1 * self.generator.normal(size=shape))

    def add(self, op: str, read: Sequence[str], out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(read), [out], name=out, **attributes))
        return out

    def model(self, inputs: dict[str, list[int | str]], output: str, opset: int) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "g", [info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(v, n) for n, v in self.weights.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10)


def encoder(layers: int = 2) -> onnx.ModelProto:
    """A BERT encoder with a low-rank first map in each feed-forward network and a scale of its result (LayerScale)."""
    g, width = Graph(), HIDDEN // HEADS

    def normalise(x: str, out: str) -> str:
        read = [x, g.around(f"{out}_gamma", 1, HIDDEN), g.around(f"{out}_beta", 0, HIDDEN)]
        return g.add("LayerNormalization", read, out, axis=-1, epsilon=1e-12)

    def linear(x: str, out: str, inn: int, channels: int) -> str:
        product = g.add("MatMul", [x, g.weight(f"{out}_weight", inn, channels)], f"{out}_product")
        return g.add("Add", [g.around(f"{out}_bias", 0, channels), product], out)

    def heads(x: str, perm: list[int], out: str) -> str:
        shape = g.constant("split", [0, 0, HEADS, width], np.int64)
        return g.add("Transpose", [g.add("Reshape", [x, shape], f"{out}_split")], out, perm=perm)

    h = normalise("x", "first")
    for i in range(layers):
        p = f"layer{i}_"
        perms = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
        q, k, v = (heads(linear(h, p + n, HIDDEN, HIDDEN), perm, f"{p}{n}_heads") for n, perm in perms.items())
        scores = g.add("Div", [g.add("MatMul", [q, k], p + "qk"), g.constant("root", np.sqrt(width))], p + "scores")
        weights = g.add("Softmax", [g.add("Add", [scores, "mask"], p + "masked")], p + "softmax", axis=-1)
        joined = g.add("Transpose", [g.add("MatMul", [weights, v], p + "pv")], p + "joined", perm=[0, 2, 1, 3])
        joined = g.add("Reshape", [joined, g.constant("join", [0, 0, HIDDEN], np.int64)], p + "attention")
        h = normalise(g.add("Add", [linear(joined, p + "out", HIDDEN, HIDDEN), h], p + "sum"), p + "middle")
        low = g.add("MatMul", [h, g.weight(f"{p}low_weight", HIDDEN, HIDDEN)], p + "low")
        wide = linear(low, p + "wide", HIDDEN, 4 * HIDDEN)
        erf = g.add("Erf", [g.add("Div", [wide, g.constant("root2", np.sqrt(2))], p + "ratio")], p + "erf")
        gelu = g.add("Mul", [wide, g.add("Add", [erf, g.constant("one", 1)], p + "shifted")], p + "product")
        gelu = g.add("Mul", [gelu, g.constant("half", 0.5)], p + "gelu")
        narrow = linear(gelu, p + "narrow", 4 * HIDDEN, HIDDEN)
        scaled = g.add("Mul", [narrow, g.around(p + "scale", 1, HIDDEN)], p + "scaled")
        h = normalise(g.add("Add", [scaled, h], p + "sum2"), "y" if i == layers - 1 else p + "last")
    return g.model({"x": ["N", LENGTH, HIDDEN], "mask": ["N", 1, 1, LENGTH]}, "y", 17)


def unet(grouped: bool) -> onnx.ModelProto:
    """A small diffusion U-Net with GroupNormalization, or with how exporters spelled it before opset 18."""
    g = Graph()

    def conv(x: str, out: str, inn: int, channels: int, kernel: int = 3, **attributes: object) -> str:
        read = [x, g.weight(f"{out}_weight", channels, inn, kernel, kernel), g.around(f"{out}_bias", 0, channels)]
        return g.add("Conv", read, out, pads=[kernel // 2] * 4, **attributes)

    def normalise(x: str, out: str, channels: int) -> str:
        scale, shift = (g.around(f"{out}_{n}", mean, channels) for n, mean in (("gamma", 1), ("beta", 0)))
        if grouped:
            return g.add("GroupNormalization", [x, scale, shift], out, num_groups=4)
        for name in (scale, shift):
            g.weights[name] = g.weights[name].reshape(-1, 1, 1)
        ones, zeros = g.constant("ones", np.ones(4)), g.constant("zeros", np.zeros(4))
        rows = g.add("Reshape", [x, g.constant("groups", [0, 4, -1], np.int64)], f"{out}_rows")
        rows = g.add("InstanceNormalization", [rows, ones, zeros], f"{out}_normal")
        shape = g.add("Shape", [x], f"{out}_shape")
        whole = g.add("Reshape", [rows, shape], f"{out}_whole")
        return g.add("Add", [g.add("Mul", [whole, scale], f"{out}_scaled"), shift], out)

    def block(x: str, p: str, inn: int, channels: int) -> str:
        h = normalise(x, p + "norm1", inn)
        h = conv(g.add("Mul", [h, g.add("Sigmoid", [h], p + "gate1")], p + "silu1"), p + "conv1", inn, channels)
        h = g.add("Mul", [h, g.around(p + "scale", 1, channels, 1, 1)], p + "scaled")
        h = normalise(h, p + "norm2", channels)
        h = conv(g.add("Mul", [h, g.add("Sigmoid", [h], p + "gate2")], p + "silu2"), p + "conv2", channels, channels)
        skip = conv(conv(x, p + "skip1", inn, 2 * channels, 1), p + "skip2", 2 * channels, channels, 1)
        return g.add("Add", [h, skip], p + "sum")

    h = conv("x", "stem", 4, 16)
    outer = block(h, "down_", 16, 16)
    h = block(conv(outer, "half", 16, 32, strides=[2, 2]), "middle_", 32, 32)
    h = g.add("Resize", [h, "", g.constant("factors", [1, 1, 2, 2])], "double", mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    h = g.add("Concat", [conv(h, "wide", 32, 16), outer], "joined", axis=1)
    h = normalise(block(h, "up_", 32, 16), "last_norm", 16)
    conv(g.add("Mul", [h, g.add("Sigmoid", [h], "last_gate")], "last_silu"), "y", 16, 4)
    return g.model({"x": ["N", 4, 16, 16]}, "y", 21)


def count_rewrites(model: onnx.ModelProto) -> Counter[str]:
    """How often each pass applied outside of normalisations. The result is verified."""
    result = pwopt.optimize(model, cost="analytic")
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed
    made = [r for r in result.report.rewrites if r.pass_name not in OF_NORMALISATIONS]
    return Counter(r.pass_name for r in made if "norm" not in r.site.tensor)


def test_an_encoder_that_onnxruntime_optimised(tmp_path: Path) -> None:
    plain, path = encoder(), tmp_path / "fused.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = onnx.load(path)
    assert {"BiasGelu", "FusedMatMul", "SkipLayerNormalization"} <= {n.op_type for n in fused.graph.node}
    expected = {"fold-affine": 2, "fold-chains": 2, "merge-siblings": 2}
    assert count_rewrites(plain) == expected
    assert count_rewrites(fused) == expected


def test_a_unet_with_group_normalization() -> None:
    expected = {"fold-affine": 3, "fold-chains": 3}
    assert count_rewrites(unet(grouped=False)) == expected
    assert count_rewrites(unet(grouped=True)) == expected
