"""Random networks with dead channels keep their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from helpers import normal, parse, run, same, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pruning import X, dead

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import DropDead

STEPS = (
    "conv", "same", "padded", "depthwise", "padded depthwise", "normalise", "relu", "clip", "hard swish", "maximum", "average",
    "padded average", "add", "residual", "concat", "gate", "scale",
)  # fmt: skip


class Net:
    """A random network in float64: every map has random dead rows and columns."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.pool: list[tuple[str, int, int]] = []  # name, channels, height and width
        self.conv(("x", 3, 5), 7)

    def const(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, f"c{len(self.weights)}"))
        return str(self.weights[-1].name)

    def add(self, op: str, inputs: list[str], channels: int, size: int, **attributes: Any) -> tuple[str, int, int]:
        self.pool.append((f"t{len(self.nodes)}", channels, size))
        self.nodes.append(helper.make_node(op, inputs, [self.pool[-1][0]], **attributes))
        return self.pool[-1]

    def dying(self, values: np.ndarray, axis: int) -> Any:
        gone = self.rng.random(values.shape[axis]) < self.rng.choice([0.0, 0.3, 0.7])
        return values * np.expand_dims(~gone, [a for a in range(values.ndim) if a != axis])

    def bias(self, channels: int) -> Any:
        return self.rng.normal(size=channels) * self.rng.choice([0.0, 1.0]) - self.rng.choice([0.0, 1.0])

    def conv(self, source: tuple[str, int, int], channels: int, kernel: int = 1) -> tuple[str, int, int]:
        name, inn, size = source
        values = self.rng.normal(size=(channels, inn, kernel, kernel)) / (inn**0.5 * kernel)
        values = self.dying(self.dying(values, 0), 1)
        inputs = [name, self.const(values), self.const(self.bias(channels))]
        return self.add("Conv", inputs, channels, size, pads=[kernel // 2] * 4)

    def pick(self, *like: int) -> tuple[str, int, int]:
        fitting = [p for p in self.pool if p[1:][-len(like) :] == like] if like else self.pool
        return fitting[-1] if self.rng.random() < 0.6 else fitting[self.rng.integers(len(fitting))]

    def step(self, kind: str) -> None:
        source = self.pick()
        name, channels, size = source
        fresh = int(self.rng.choice([4, 7, 8, 9]))
        if kind == "conv":
            self.conv(source, fresh)
        elif kind == "same":
            self.conv(source, self.pick()[1])
        elif kind == "padded":
            self.conv(source, fresh, 3)
        elif kind.endswith("depthwise") and (size > 2 or kind.startswith("padded")):
            pad = int(kind.startswith("padded"))
            values = self.dying(self.rng.normal(size=(channels, 1, 3, 3)) / 3, 0)
            inputs = [name, self.const(values), self.const(self.bias(channels))]
            self.add("Conv", inputs, channels, size + 2 * pad - 2, group=channels, pads=[pad] * 4)
        elif kind == "normalise":
            parts = [
                self.dying(self.bias(channels) + 0.1, 0),
                self.bias(channels),
                self.bias(channels),
                np.ones(channels),
            ]
            self.add("BatchNormalization", [name, *map(self.const, parts)], channels, size)
        elif kind in ("relu", "hard swish"):
            self.add("Relu" if kind == "relu" else "HardSwish", [name], channels, size)
        elif kind == "clip":
            self.add("Clip", [name, self.const(np.array(-0.5)), self.const(np.array(1.5))], channels, size)
        elif kind == "maximum":
            self.add("MaxPool", [name], channels, size, kernel_shape=[3, 3], pads=[1] * 4)
        elif kind.endswith("average"):
            pads = int(kind.startswith("padded"))
            self.add("AveragePool", [name], channels, size, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=pads)
        elif kind == "add":
            self.add("Add", [name, self.pick(channels, size)[0]], channels, size)
        elif kind == "residual":
            inner = self.conv(source, fresh)
            inner = self.add("Relu", [inner[0]], *inner[1:])
            self.add("Add", [name, self.conv(inner, channels)[0]], channels, size)
        elif kind == "concat":
            other = self.pick(size)
            if channels + other[1] <= 24:
                self.add("Concat", [name, other[0]], channels + other[1], size, axis=1)
        elif kind == "gate":
            pooled = self.add("GlobalAveragePool", [name], channels, 1)
            squeezed = self.conv(pooled, 3)
            squeezed = self.add("Relu", [squeezed[0]], *squeezed[1:])
            gate = self.conv(squeezed, channels)
            gate = self.add(str(self.rng.choice(["Sigmoid", "HardSigmoid"])), [gate[0]], *gate[1:])
            self.add("Mul", [name, gate[0]], channels, size)
        elif kind == "scale":
            values = self.dying(self.rng.normal(size=(channels, 1, 1)), 0)
            self.add(str(self.rng.choice(["Mul", "Add", "Sub"])), [self.const(values), name], channels, size)

    def model(self) -> onnx.ModelProto:
        read = {i for n in self.nodes for i in n.input}
        outputs = [p if self.rng.random() < 0.2 else self.conv(p, 2) for p in list(self.pool) if p[0] not in read]
        if self.rng.random() < 0.3:
            outputs.append(self.pick())
        declared = [
            helper.make_tensor_value_info(n, TensorProto.DOUBLE, [1, c, s, s]) for n, c, s in dict.fromkeys(outputs)
        ]
        x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 3, 5, 5])
        graph = helper.make_graph(self.nodes, "random", [x], declared, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(STEPS), min_size=1, max_size=10))
def test_random_networks(seed: int, steps: list[str]) -> None:
    net = Net(seed)
    for kind in steps:
        net.step(kind)
    model = net.model()
    onnx.checker.check_model(model, full_check=True)
    result, _, _ = run(model, DropDead())
    same(model, result, 1e-8, x=normal(1, 3, 5, 5, seed=seed % 1000))
    before, after = (measure(View(from_proto(m).graph)).macs for m in (model, result))
    assert after <= before
    assert run(result, DropDead())[0] is result


def test_every_dead_channel_goes_if_that_is_asked_for() -> None:
    body = "(double[2,4,6,6] x) => (double[N] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }"
    first = dead(normal(16, 4, 1, 1), range(5))
    model = parse(body, w=first, b=normal(16), v=normal(5, 16, 1, 1, seed=1))
    for eager, kept in ((False, 16), (True, 11)):
        p = DropDead()
        p.scope = "exact" if eager else "profitable"
        result, _, _ = run(model, p)
        assert weight(result, "w").shape[0] == kept
        same(model, result, x=X)
