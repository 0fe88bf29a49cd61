"""What the tests of sum-branches share: models with parallel branches, and checks of their sums."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from helpers import evaluate, normal, ops, parse, reasons, run, same
from hypothesis import strategies as st
from linear_maps import apply
from onnx import helper, numpy_helper

from pwopt.algebra.geometry import Refusal
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.cost import Cost, measure
from pwopt.maps.forms import Reading
from pwopt.passes import SumBranches
from pwopt.rewriting.driver import Pass

X = normal(2, 4, 6, 6)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "
P1 = "pads=[1,1,1,1]"
EPSILON = float(np.float32(1e-5))
W3, U3 = normal(4, 4, 3, 3), normal(4, 4, 3, 3, seed=1)
W1, U1 = normal(4, 4, 1, 1, seed=2), normal(4, 4, 1, 1, seed=3)
D3, B = normal(4, 1, 3, 3, seed=4), normal(4, seed=6)
WEIGHTS: dict[str, Any] = {
    "w3": W3, "u3": U3, "w1": W1, "u1": U1, "d3": D3, "c": B, "s": np.float64(0.7), "sc": B.reshape(4, 1, 1),
    "w4": normal(4, 4, 4, 4), "w": normal(4, 4, seed=8), "u": normal(4, 4, seed=9),
}  # fmt: skip


def reads(body: str, name: str) -> bool:
    return re.search(rf"[(,] ?{name}[,)]", body) is not None


def build(body: str, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    """The model with the weights that it names."""
    return parse(body, opset, **{n: v for n, v in (WEIGHTS | weights).items() if reads(body, n)})


def check(body: str, expected: dict[str, int], *passes: Pass, x: np.ndarray = X, **weights: Any) -> onnx.ModelProto:
    """The model becomes the expected operators and computes the same."""
    model = build(body, **weights)
    result, outcome, _ = run(model, *(passes or [SumBranches()]))
    assert ops(result) == expected, reasons(outcome)
    same(model, result, x=x)
    return result


def untouched(body: str, word: str, **weights: Any) -> None:
    """Nothing changes, and the reason says why; no reason where nothing is to be said."""
    model = build(body, **weights)
    result, outcome, _ = run(model, SumBranches())
    assert result is model, outcome.rewrites
    assert word in " ".join(reasons(outcome))
    assert bool(word) == bool(reasons(outcome))


def cost(model: onnx.ModelProto) -> Cost:
    return measure(View(from_proto(model).graph))


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def groups(model: onnx.ModelProto) -> list[int]:
    return sorted(attribute(n, "group") for n in model.graph.node if n.op_type == "Conv")


class Net:
    """A model that grows node by node; arrays become initializers of its type."""

    def __init__(self, *shape: int | str, dtype: type = np.float64) -> None:
        self.shape, self.dtype = shape, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        names = [self.constant(v) if isinstance(v, np.ndarray) else v for v in inputs]
        self.nodes.append(helper.make_node(op, names, [f"t{len(self.nodes)}"], **attributes))
        return f"t{len(self.nodes) - 1}"

    def constant(self, value: np.ndarray) -> str:
        held = value.astype(self.dtype) if value.dtype.kind == "f" else value
        self.weights.append(numpy_helper.from_array(held, f"c{len(self.weights)}"))
        return f"c{len(self.weights) - 1}"

    def total(self, *terms: str) -> str:
        return terms[0] if len(terms) == 1 else self("Add", self.total(*terms[:-1]), terms[-1])

    def batch_norm(self, tensor: str, channels: int, level: float | None = None) -> tuple[str, np.ndarray]:
        """A BatchNormalization, and what it gives for zero (`level`, if that is given)."""
        seed = len(self.nodes)
        gamma, mean, beta, variance = (normal(channels, seed=seed + i, dtype=self.dtype) for i in range(4))
        variance = np.abs(variance) + self.dtype(0.5)
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
        beta = beta if level is None else (level + mean * scale).astype(self.dtype)
        return self("BatchNormalization", tensor, gamma, beta, mean, variance), beta - mean * scale

    def model(self, *outputs: str) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        inputs = [helper.make_tensor_value_info("x", kind, self.shape)]
        ends = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, ends, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(known)
        return model


AROUND = np.array([0, 0, 1, 1, 0, 0, 1, 1])


def scatter_border(net: Net, tensor: str, fill: np.ndarray, spoiled: float = 0.0, top: Sequence[int] = (0,)) -> str:
    """Padding 6×6 with zeros, then `y[:, :, 0, :] = b` and so on, as torch exports it."""
    wide = fill.reshape(1, -1, 1, 1)
    rows = np.broadcast_to(wide, (len(top), len(fill), 2, 8))
    columns = np.broadcast_to(wide, (1, len(fill), 8, 2)).copy()
    columns[0, 1, 2, 0] += spoiled
    y = net("Transpose", net("Pad", tensor, AROUND), perm=[2, 1, 0, 3])
    y = net("Identity", net("ScatterND", y, np.array(top).reshape(-1, 1), rows))
    y = net("Transpose", net("ScatterND", y, np.array([[7]]), rows[:1]), perm=[3, 1, 0, 2])
    y = net("Identity", net("ScatterND", y, np.array([[0]]), columns))
    return net("Transpose", net("ScatterND", y, np.array([[-1]]), columns), perm=[3, 1, 2, 0])


def read(model: onnx.ModelProto) -> Reading | Refusal | None:
    """What produces the first output, as it is read."""
    graph = from_proto(model).graph
    view = View(graph)
    return forms.read(view, view.producer(graph.outputs[0]))


def border(model: onnx.ModelProto, x: np.ndarray = X) -> Reading:
    """The first output is read as a border, which equals it."""
    reading = read(model)
    assert isinstance(reading, Reading)
    assert (reading.kind, reading.axis, reading.weighted) == ("border", 1, False)
    padding = reading.load()
    fill = (np.zeros(x.shape[1]) if reading.fill is None else reading.fill).reshape(-1, *(1,) * (x.ndim - 2))
    np.testing.assert_allclose(apply(padding, x - fill) + fill, evaluate(model, x=x)[0], atol=1e-12)
    return reading


TERMS = {
    "a": f"Conv<{P1}>(x, w3)", "b": "Conv(x, w1, c)", "d": "Conv(z, u1)", "e": f"Conv<{P1}>(z, u3)",
    "f": f"Conv<{P1}, group=4>(x, d3)", "g": "Conv(x, u1)", "r": "Relu(x)", "t": "Tanh(x)",
}  # fmt: skip


def added(sums: str, side: str = SIDE) -> str:
    """The sums, and those of the terms above that they name and do not define."""
    used = {n: term for n, term in TERMS.items() if reads(sums, n) and f"{n} = " not in sums}
    terms = " ".join(f"{name} = {term}" for name, term in used.items())
    return f"{side} {{ {terms} {sums} }}"


@st.composite
def branches(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(["conv", "conv", "conv", "chain", "pool", "identity", "relu"])),
        "kernel": draw(st.sampled_from([1, 3, 5])),
        "dilation": draw(st.sampled_from([1, 1, 2])),
        "group": draw(st.sampled_from([1, 2, 4])),
        "biased": draw(st.booleans()),
        "scaled": draw(st.booleans()),
        "shifted": draw(st.booleans()),
    }
