from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import evaluate, normal, ops, parse, reasons, run, same, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_maps import apply
from onnx import TensorProto, helper, numpy_helper

from pwopt.algebra.geometry import Geometry, Refusal, add_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph.files import from_proto
from pwopt.graph.ir import Variable
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.cost import Cost, measure
from pwopt.maps.forms import Reading
from pwopt.maps.paths import Path, relative_places, trace
from pwopt.passes import CleanUp, FoldAffine, FoldChains, SumBranches, sum_branches
from pwopt.passes.sum_branches import Branch, Term, _cheapest
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.records import Site
from pwopt.rewriting.wording import dearer
from pwopt.selecting.snapshot import run_pipeline

X = normal(2, 4, 6, 6)
Z = normal(2, 4, 6, 6, seed=9)
SIDE = "(double[2,4,6,6] x) => (double[N] y) "
BOTH = "(double[2,4,6,6] x, double[2,4,6,6] z) => (double[N] y) "
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


# Blocks that train with branches


@pytest.mark.parametrize("stride", [1, 2])
def test_repvgg(stride: int) -> None:
    """3×3, 1×1 and, without stride, the identity, each normalised."""
    net, strides = Net(2, 4, 6, 6), [stride, stride]
    branches = [net("Conv", "x", W3, pads=[1, 1, 1, 1], strides=strides), net("Conv", "x", W1, strides=strides), "x"]
    model = net.model(net.total(*(net.batch_norm(b, 4)[0] for b in branches[: 3 if stride == 1 else 2])))
    result, _, _ = run(model, FoldAffine(), SumBranches())
    assert ops(result) == {"Conv": 1}
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "strides") == strides
    same(model, result, x=X)


@pytest.mark.parametrize("passes", [(SumBranches,), (FoldAffine, SumBranches)])
def test_mobileone_depthwise(passes: Sequence[type[Pass]]) -> None:
    """Over-parametrised depthwise 3×3, depthwise 1×1 and a normalised identity stay one depthwise convolution."""
    net = Net("N", 4, "H", "W")
    branches = [net("Conv", "x", normal(4, 1, 3, 3, seed=s), pads=[1, 1, 1, 1], group=4) for s in range(3)]
    branches += [net("Conv", "x", normal(4, 1, 1, 1), group=4), "x"]
    model = net.model(net("Relu", net.total(*(net.batch_norm(b, 4)[0] for b in branches))))
    result, _, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1, "Relu": 1}
    assert groups(result) == [4]
    assert weight(result, result.graph.node[0].input[1]).shape == (4, 1, 3, 3)
    same(model, result, x=X)


AROUND = np.array([0, 0, 1, 1, 0, 0, 1, 1])


def shift_border(net: Net, tensor: str, fill: np.ndarray) -> str:
    """x − b, padded with zeros, plus b."""
    wide = fill.reshape(-1, 1, 1)
    return net("Add", net("Pad", net("Sub", tensor, wide), AROUND), wide)


def value_border(net: Net, tensor: str, fill: np.ndarray) -> str:
    """Padding with one number."""
    return net("Pad", tensor, AROUND, np.asarray(fill[-1]))


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


Border = Callable[[Net, str, np.ndarray], str]
BORDERS: dict[str, Border] = {"shift": shift_border, "value": value_border, "scatter": scatter_border}


def diverse_branch_block(stride: int, border: Border, error: float = 0.0, dtype: type = np.float64) -> onnx.ModelProto:
    """k×k, 1×1, 1×1 → k×k and 1×1 → average (Ding et al., 2021), each normalised; 4 → 5 channels on 6×6.

    What lies between is padded with what the normalisation gives for zero, plus `error` in the last channel.
    """
    net, strides = Net(2, 4, 6, 6, dtype=dtype), [stride, stride]

    def between(out: int, seed: int) -> str:
        level = 0.3 if border is value_border else None
        middle, fill = net.batch_norm(net("Conv", "x", normal(out, 4, 1, 1, seed=seed)), out, level)
        fill[-1] += error
        return border(net, middle, fill)

    branches = [
        net("Conv", "x", normal(5, 4, 3, 3), pads=[1, 1, 1, 1], strides=strides),
        net("Conv", "x", normal(5, 4, 1, 1, seed=1), strides=strides),
        net("AveragePool", between(5, 4), kernel_shape=[3, 3], strides=strides),
        net("Conv", between(4, 2), normal(5, 4, 3, 3, seed=3), strides=strides),
    ]
    return net.model(net.total(*(net.batch_norm(b, 5)[0] for b in branches)))


#: Branches may come as they are, or with what surrounds them folded already.
FOLD = pytest.mark.parametrize("passes", [(SumBranches,), (FoldAffine, SumBranches, FoldChains, CleanUp)])


@FOLD
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("border", BORDERS)
def test_diverse_branch_block(border: str, stride: int, passes: Sequence[type[Pass]]) -> None:
    model = diverse_branch_block(stride, BORDERS[border])
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1}, reasons(outcome)
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "pads") == [1, 1, 1, 1]
    same(model, result, x=X)


@FOLD
@pytest.mark.parametrize("border", BORDERS)
def test_diverse_branch_block_whose_border_is_rounded(border: str, passes: Sequence[type[Pass]]) -> None:
    """In float32 a border is its rounding of the normalisation's bias: what is left of b − v is rounding only."""
    model = diverse_branch_block(1, BORDERS[border], dtype=np.float32)
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result) == {"Conv": 1}, reasons(outcome)
    same(model, result, 1e-4, x=X.astype(np.float32))


@FOLD
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("border", BORDERS)
def test_a_border_that_is_not_the_bias_stays(border: str, dtype: type, passes: Sequence[type[Pass]]) -> None:
    model = diverse_branch_block(1, BORDERS[border], error=1e-2, dtype=dtype)
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result)["Conv"] == 4  # k×k and 1×1 are one
    assert "zero padding" in " ".join(reasons(outcome))
    same(model, result, 1e-9 if dtype is np.float64 else 1e-4, x=X.astype(dtype))


@FOLD
@pytest.mark.parametrize("options", [{"spoiled": 1e-2}, {"top": [1]}, {"top": [0, 1]}])
def test_a_border_with_one_other_number_or_a_gap_stays(options: dict[str, Any], passes: Sequence[type[Pass]]) -> None:
    """One position differs; the first row keeps its zeros; or the inside is overwritten as well."""
    model = diverse_branch_block(1, lambda *border: scatter_border(*border, **options))
    result, outcome, _ = run(model, *(p() for p in passes))
    assert ops(result)["ScatterND"] == 8
    assert ops(result)["Conv"] == 4
    assert "Transpose is not a linear map" in " ".join(reasons(outcome))
    same(model, result, x=X)


# Borders as they are read


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


@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("opset", [1, 2, 10, 11, 13, 18, 21])
def test_padding_around_a_feature_map_is_a_border(opset: int, value: float) -> None:
    old = f"Pad<{'paddings' if opset == 1 else 'pads'}=[0,0,1,2,0,0,0,3], value={value}>(x)"
    pad = old if opset < 11 else "Pad(x, p, v)" if opset < 18 else "Pad(x, q, v, a)"
    weights = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 3]), "v": np.float64(value)}
    model = build(SIDE + f"{{ y = {pad} }}", opset, **weights, q=np.array([2, 1, 3, 0]), a=np.array([-1, 2]))
    reading = read(model) if opset == 1 else border(model)  # the reference evaluator begins at opset 2
    assert isinstance(reading, Reading)
    assert reading.geometry.pads == (1, 2, 0, 3)
    assert (reading.fill is None) if value == 0 else (reading.fill is not None and reading.fill.tolist() == [value] * 4)


def test_padding_of_sequences_and_volumes() -> None:
    model = build("(double[2,4,6] x) => (double[N] y) { y = Pad(x, p) }", p=np.array([0, 0, 1, 0, 0, 2]))
    assert border(model, normal(2, 4, 6)).geometry.pads == (1, 2)
    pads = np.array([0, 0, 0, 1, 2, 0, 0, 3, 0, 1])
    model = build("(double[2,3,2,3,4] x) => (double[N] y) { y = Pad(x, p, v) }", p=pads, v=np.float64(2))
    assert border(model, normal(2, 3, 2, 3, 4)).geometry.pads == (0, 1, 2, 3, 0, 1)


@pytest.mark.parametrize(
    "pad",
    [
        'Pad<mode="reflect">(x, p)', 'Pad<mode="edge">(x, p)', "Pad(x, negative)", "Pad(x, channels)",
        "Pad(x, nothing)", "Pad(x, p, infinite)", "Pad(x, computed)", "Pad(x, p, number)",
    ],
)  # fmt: skip
def test_other_paddings_are_no_borders(pad: str) -> None:
    weights = {
        "p": AROUND, "nothing": 0 * AROUND, "infinite": np.float64(-np.inf),
        "negative": np.array([0, 0, -1, 1, 0, 0, 1, 1]), "channels": np.array([0, 1, 1, 0, 0, 0, 0, 0]),
    }  # fmt: skip
    side = "(double[2,4,6,6] x, int64[8] computed, double number) => (double[N,M,H,W] y) "
    assert read(build(side + f"{{ y = {pad} }}", **weights)) is None


@pytest.mark.parametrize("fill", [np.zeros(4), B])
def test_an_overwritten_border(fill: np.ndarray) -> None:
    net = Net(2, 4, 6, 6)
    reading = border(net.model(scatter_border(net, "x", fill)))
    assert reading.geometry.pads == (1, 1, 1, 1)
    assert len(reading.nodes) == 10
    assert reading.source.name == "x"
    assert fill.tolist() == ([0] * 4 if reading.fill is None else reading.fill.tolist())


def test_a_border_of_which_a_part_is_overwritten() -> None:
    """Padded with 2, then overwritten with 2 in one column."""
    net = Net(2, 4, 6, 6)
    y = net("Transpose", net("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.asarray(2.0)), perm=[3, 1, 2, 0])
    y = net("ScatterND", y, np.array([[0]]), np.full((1, 4, 7, 2), 2.0))
    reading = border(net.model(net("Transpose", y, perm=[3, 1, 2, 0])))
    assert reading.geometry.pads == (1, 1, 0, 0)
    assert reading.fill is not None
    assert reading.fill.tolist() == [2] * 4


def test_a_border_overwritten_position_by_position() -> None:
    places = np.array([[[[n, c, h, 0] for h in range(6)] for c in range(4)] for n in range(2)])
    updates = np.broadcast_to(B.reshape(1, 4, 1), (2, 4, 6)).copy()
    body = SIDE + "{ p = Pad(x, a) y = ScatterND(p, i, v) }"
    weights: dict[str, Any] = {"a": np.array([0, 0, 0, 1, 0, 0, 0, 0]), "i": places}
    fill = border(build(body, v=updates, **weights)).fill
    assert fill is not None
    assert fill.tolist() == B.tolist()
    updates[1, 2, 3] += 1
    assert read(build(body, v=updates, **weights)) is None


@pytest.mark.parametrize(
    "change", ["spoiled", "gap", "inside", "reader", "output", "updates", "indices", "added", "order", "size", "edge"]
)
def test_what_is_no_overwritten_border(change: str) -> None:
    net = Net(2, 4, 6, "W" if change == "size" else 6)
    top = {"gap": [1], "inside": [0, 1]}.get(change, [0])
    outputs = [scatter_border(net, "x", B, 1e-9 if change == "spoiled" else 0.0, top)]
    if change == "reader":
        outputs.append(net("Relu", "t4"))
    if change == "output":
        outputs.append("t4")
    if change == "order":
        net.nodes[-1].attribute[0].ints[:] = [3, 1, 0, 2]
    if change == "added":
        net.nodes[2].attribute.append(helper.make_attribute("reduction", "add"))
    if change == "edge":
        net.nodes[0].attribute.append(helper.make_attribute("mode", "edge"))
    model = net.model(*outputs)
    if change in ("updates", "indices"):  # callers may override them
        name = net.nodes[2].input[2 if change == "updates" else 1]
        held = next(t for t in net.weights if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, held.data_type, held.dims))
    assert read(model) is None


# Paths


def path_to(body: str) -> tuple[View, Path]:
    """The path to the tensor `e`, which only a Relu reads."""
    view = View(from_proto(build(body.replace(" }", " y = Relu(e) }"))).graph)
    return view, trace(view, next(t for n in view.nodes() for t in n.outputs if t.name == "e"))


def composed(view: View, path: Path) -> LinearMap:
    return path.compose(view)


def test_a_path_is_followed_to_what_others_read() -> None:
    side = "(double[2,4,6,6] x) => (double[N] y, double[N] z) "
    view, path = path_to(side + "{ z = Conv(x, w1) a = Conv(z, u1) b = Mul(a, s) e = Add(b, sc) }")
    assert path.source.name == "z"
    assert path.obstacle == "'z' is a graph output"
    assert [n.op for n in path.nodes] == ["Conv", "Mul", "Add"]
    assert path.axis == 1
    np.testing.assert_allclose(composed(view, path).weight, 0.7 * U1)
    np.testing.assert_allclose(composed(view, path).bias, B)


def test_a_path_of_scalars_has_no_axis() -> None:
    view, path = path_to(SIDE + "{ a = Mul(x, s) e = Neg(a) }")
    assert (path.source.name, path.axis, path.obstacle) == ("x", None, "")
    assert composed(view, path).scale.tolist() == [-0.7]


def test_a_path_of_nothing_is_the_identity() -> None:
    view, path = path_to(SIDE + "{ e = Relu(x) }")
    assert path.readings == ()
    assert path.source is path.output
    assert path.obstacle == "Relu is not a linear map with constant numbers"
    assert composed(view, path).scale.tolist() == [1]
    assert path.price(view) == 0


@pytest.mark.parametrize(
    ("body", "source", "obstacle"),
    [
        ("a = MatMul(u, x) b = Mul(a, s) e = MatMul(b, w)", "a", "MatMul acts on axis 1, not 2"),
        ("a = MatMul(x, w) e = MatMul(a, w)", "e", "the weight 'w' is shared"),
        ("a = Mul(x, s) b = Relu(a) c2 = Add(a, b) e = Neg(c2)", "c2", "Add is not a linear map"),
        ("a = Mul(x, s) b = Relu(a) e = MatMul(a, w)", "a", "'a' has 2 consumers"),
        ("a = MatMul(w, u) b = MatMul(x, a) e = Neg(b)", "b", "MatMul is not a linear map"),
    ],
)
def test_where_a_path_begins(body: str, source: str, obstacle: str) -> None:
    _, path = path_to(f"(double[2,4,4] x) => (double[N] y) {{ {body} }}")
    assert path.source.name == source
    assert obstacle in path.obstacle


def test_a_path_stops_at_what_the_runtime_fuses() -> None:
    view, path = path_to(SIDE + "{ a = Mul(x, s) e = Conv(a, w1) }")
    assert path.source.name == "x"
    blocked = trace(view, path.output, {path.nodes[0]})
    assert blocked.source.name == "a"
    assert blocked.obstacle == "Mul belongs to a larger operator that onnxruntime runs as one"


@pytest.mark.parametrize(("size", "places"), [("6,6", [72, 18]), ("H,W", [1, 0.25])])
def test_the_price_is_per_position_of_the_end(size: str, places: list[float]) -> None:
    """4·4 weights at four times as many positions as 4·4·9 weights; scales and pooling are free."""
    side = f"(double[2,4,{size}] x) => (double[N] y) "
    view, path = path_to(side + f"{{ a = Conv(x, w1) b = Conv<{P1}, strides=[2,2]>(a, w3) e = Mul(b, s) }}")
    assert path.price(view) == 4 * 16 + 144
    assert relative_places(view, list(path.readings[:2])) == places
    view, path = path_to(side + "{ a = Conv(x, w1) e = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a) }")
    assert path.price(view) == 4 * 16


# Sums

TERMS = {
    "a": f"Conv<{P1}>(x, w3)", "b": "Conv(x, w1, c)", "d": "Conv(z, u1)", "e": f"Conv<{P1}>(z, u3)",
    "f": f"Conv<{P1}, group=4>(x, d3)", "g": "Conv(x, u1)", "r": "Relu(x)", "t": "Tanh(x)",
}  # fmt: skip


def added(sums: str, side: str = SIDE) -> str:
    """The sums, and those of the terms above that they name and do not define."""
    used = {n: term for n, term in TERMS.items() if reads(sums, n) and f"{n} = " not in sums}
    terms = " ".join(f"{name} = {term}" for name, term in used.items())
    return f"{side} {{ {terms} {sums} }}"


@pytest.mark.parametrize(
    "sums",
    [
        "y = Add(a, b)",
        "y = Sub(a, b)",
        "y = Sum(a, b)",
        "p = Sub(x, a) y = Sub(p, b)",
        "p = Sub(x, b) y = Sub(a, p)",
        "p = Add(a, x) q = Sub(b, x) y = Sub(p, q)",
        "p = Sub(a, b) q = Neg(p) y = Sub(x, q)",
        "p = Mul(a, s) q = Div(b, s) o = Sub(s, x) y = Sum(p, q, o)",
        "p = Add(a, sc) y = Add(p, b)",
    ],
)
def test_signs_and_nesting(sums: str) -> None:
    check(added(sums), {"Conv": 1})


@pytest.mark.parametrize(
    "sums",
    [
        "p = Add(a, b) y = Add(p, r)",
        "p = Add(a, r) y = Add(p, b)",
        "p = Add(a, r) y = Add(b, p)",
        "p = Sub(r, a) y = Sub(p, b)",
        "p = Sub(a, r) y = Sub(b, p)",
        "p = Sub(a, b) y = Sub(r, p)",
        "y = Sum(a, r, b)",
        "p = Sum(r, b) y = Sub(a, p)",
    ],
)
def test_what_can_be_joined_is_joined(sums: str) -> None:
    """Beside an activation: one convolution, one sum."""
    model = build(added(sums))
    result, _, _ = run(model, SumBranches())
    assert ops(result) in ({"Conv": 1, "Relu": 1, "Add": 1}, {"Conv": 1, "Relu": 1, "Sub": 1})
    same(model, result, x=X)


@pytest.mark.parametrize(
    "sums", ["y = Sum(a, r, b, t)", "p = Sum(t, a, r) y = Add(p, b)", "p = Add(a, t) q = Add(r, b) y = Sub(q, p)"]
)
def test_beside_several_that_cannot_be(sums: str) -> None:
    """In one Sum of many terms as well as in sums of two."""
    model = build(added(sums))
    result, outcome, _ = run(model, SumBranches())
    assert ops(result)["Conv"] == 1, reasons(outcome)
    assert cost(result).nodes <= cost(model).nodes
    same(model, result, x=X)


def test_an_inner_sum_that_something_else_reads_stays() -> None:
    """Its own branches may be joined, but no others with them."""
    observed = SIDE.replace(" y)", " y, double[N] o)")
    check(added("p = Add(a, b) o = Abs(p) y = Add(p, g)", observed), {"Conv": 2, "Add": 1, "Abs": 1})
    check(added("p = Add(a, r) o = Abs(p) y = Add(p, b)", observed), {"Conv": 2, "Add": 2, "Abs": 1, "Relu": 1})
    check(added("o = Add(a, r) y = Add(o, b)", observed), {"Conv": 2, "Add": 2, "Relu": 1})


def test_nodes_that_are_added_have_names_of_their_own() -> None:
    model = build(added("p = Add(a, r) q = Sub(p, b) y = Add(q, t)"))
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
    result, outcome, _ = run(model, SumBranches())
    assert len(outcome.rewrites) == 1
    names = [n.name for n in result.graph.node]
    assert len(names) == len(set(names)) == 5
    assert all(names)
    assert outcome.rewrites[0].removed == ("Conv node0", "Conv node1", "Add node4", "Sub node5", "Add node6")
    assert outcome.rewrites[0].reason == "2 branches of 'x' are one map: Conv node0, Conv node1"


@pytest.mark.parametrize("sums", ["p = Sum(a, d, e) y = Add(b, p)", "p = Add(a, d) q = Sub(b, e) y = Add(p, q)"])
def test_two_origins(sums: str) -> None:
    model = build(added(sums, BOTH))
    result, _, _ = run(model, SumBranches())
    assert ops(result)["Conv"] == 2
    assert sum(ops(result).values()) == 3
    assert {n.input[0] for n in result.graph.node if n.op_type == "Conv"} == {"x", "z"}
    same(model, result, x=X, z=Z)


@pytest.mark.parametrize("flip", [False, True])
def test_forty_branches_are_joined_in_pieces(flip: bool) -> None:
    net = Net(2, 4, 3, 3)
    total = "x"
    for seed in range(40):
        term = net("Conv", "x", normal(4, 4, 1, 1, seed=seed))
        total = net("Add", *((term, total) if flip else (total, term)))
    model = net.model(total)
    result, _, _ = run(model, SumBranches())
    assert ops(result) == {"Conv": 1}
    same(model, result, x=X[..., :3, :3])


def test_a_constant_in_a_sum_of_several() -> None:
    check(added("y = Sum(a, sc, b)"), {"Conv": 1, "Add": 1})
    check(added("y = Sum(a, sc, b)"), {"Conv": 1}, SumBranches(), FoldAffine())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_scalars_of_every_shape(shape: tuple[int, ...]) -> None:
    check(added("p = Mul(x, s) q = Sub(s, p) y = Sub(q, a)"), {"Conv": 1}, s=np.full(shape, 0.7))


def test_sums_that_broadcast_are_no_sums_of_maps() -> None:
    """A scalar that adds an axis; one output channel, added to all four of the input, and the other way round."""
    untouched(added("p = Mul(x, s) y = Add(p, a)"), "Mul is not a linear map", s=np.full((1, 1, 1, 1, 1), 0.7))
    untouched(SIDE + "{ a = Conv(x, k) y = Add(a, x) }", "channels differ", k=W1[:1])
    body = "(double[2,1,6,6] x) => (double[N] y) { a = Conv(x, k) y = Add(a, x) }"
    untouched(body, "channels differ", k=W1[:, :1])


def test_branches_of_a_sum_that_is_broadcast() -> None:
    """A batch of one, added to a batch of three."""
    model = build(added("p = Add(a, b) y = Add(p, z)", "(double[1,4,6,6] x, double[3,4,6,6] z) => (double[N] y) "))
    result, _, _ = run(model, SumBranches())
    assert ops(result) == {"Conv": 1, "Add": 1}
    same(model, result, x=X[:1], z=normal(3, 4, 6, 6))


PARTIAL = [SumBranches(), FoldAffine(), SumBranches()]


def test_a_partial_sum_has_the_width_of_its_branches() -> None:
    """Not of the whole sum, which a constant may have enlarged: passes that follow read the shape."""
    side = "(double[2,3,4] x) => (double[N] y) "
    narrow = {"w": normal(4, 1), "u": normal(4, 1, seed=1), "k": normal(5)}
    body = side + "{ a = MatMul(x, w) b = MatMul(x, u) y = Sum(a, b, k) }"
    check(body, {"MatMul": 1, "Add": 1}, *PARTIAL, x=normal(2, 3, 4), **narrow)
    narrow = {"w1": W1[:1], "u1": U1[:1], "k": normal(5, 1, 1), "m": normal(5, 1, 1, seed=1)}
    body = SIDE + "{ a = Conv(x, w1) b = Conv(x, u1) p = Sum(a, b, k) y = Mul(p, m) }"
    check(body, {"Conv": 1, "Add": 1, "Mul": 1}, *PARTIAL, **narrow)


def test_a_partial_sum_has_the_rank_of_its_branches() -> None:
    """One constant acts on the batch of 2, but would on the 2 channels if the sum had the rank of the other one."""
    weights: dict[str, Any] = {
        "k": normal(2, 1, 1, 1),
        "m": normal(3, 1, 1, 1, 1),
        "w1": W1[:2],
        "u1": U1[:2],
        "v1": W1[2:],
    }
    body = SIDE + "{ a = Conv(x, w1) b = Conv(x, u1) d = Conv(x, v1) y = Sum(a, b, d, k, m) }"
    model = build(body, **weights)
    result, _, _ = run(model, *PARTIAL)
    assert ops(result)["Conv"] == 1
    same(model, result, x=X)


def test_a_partial_sum_of_dynamic_size_is_counted() -> None:
    body = added("y = Sum(b, g, r)", "(double[N,4,H,W] x) => (double[N,4,H,W] y) ")
    before, _, after = run_pipeline(from_proto(build(body)), [SumBranches()], (), {"x": (1, 4, 6, 6)})
    assert before == Cost(nodes=4, params=36, macs=2 * 16 * 36, unknown=0)
    assert after == Cost(nodes=3, params=20, macs=16 * 36, unknown=0)


@pytest.mark.parametrize("term", ["b", "r"])
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 15, 16, 17, 30])
def test_a_sum_added_to_itself(depth: int, term: str) -> None:
    """s + s, again and again."""
    doubled = " ".join(f"s{i + 1} = Add(s{i}, s{i})" for i in range(depth))
    model = build(added(f"s0 = Add(a, {term}) {doubled} y = Neg(s{depth})"))
    result, _, _ = run(model, SumBranches())
    assert cost(result).nodes <= cost(model).nodes
    assert cost(result).macs <= cost(model).macs
    same(model, result, x=X)


@pytest.mark.parametrize("sums", ["y = Add(a, a)", "y = Sub(a, a)", "y = Sum(a, x, a)", "y = Sum(a, a, b)"])
def test_a_branch_that_is_read_twice(sums: str) -> None:
    for thin in (False, True):  # 4 → 1 → 4 costs 8 multiply-adds however often its result is added, 4 → 4 costs 16
        model = build(added(f"p = Conv(x, k) a = Conv(p, m) {sums}" if thin else sums), k=W1[:1], m=W1[:, :1])
        result, _, _ = run(model, SumBranches())
        assert cost(result).macs <= cost(model).macs
        assert cost(result).nodes <= cost(model).nodes
        same(model, result, x=X)


def test_the_input_is_a_branch() -> None:
    """x + Wx = (I + W)x, x − Wx = (I − W)x, D(x) + s·x"""
    result = check(added("y = Add(x, b)"), {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w1")[:, :, 0, 0], np.eye(4) + W1[:, :, 0, 0])
    result = check(SIDE + f"{{ a = Conv<{P1}>(x, w3, c) y = Sub(x, a) }}", {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w3")[:, :, 1, 1], np.eye(4) - W3[:, :, 1, 1])
    np.testing.assert_allclose(weight(result, "c"), -B)
    result = check(added("p = Mul(x, sc) y = Add(f, p)"), {"Conv": 1})
    assert groups(result) == [4]
    np.testing.assert_allclose(weight(result, "d3")[:, 0, 1, 1], D3[:, 0, 1, 1] + B)


def test_the_input_is_a_branch_of_products() -> None:
    side = "(double[4,4] x) => (double[N] y) "
    square = normal(4, 4)
    result = check(side + "{ a = MatMul(x, w) y = Add(x, a) }", {"MatMul": 1}, x=square)
    np.testing.assert_allclose(weight(result, "w"), WEIGHTS["w"] + np.eye(4))
    check(side + "{ a = MatMul(w, x) y = Sub(a, x) }", {"MatMul": 1}, x=square)
    check(side + "{ a = Gemm<transB=1>(x, w, c) y = Sub(x, a) }", {"Gemm": 1}, x=square)
    check(side + "{ a = MatMul(x, w) b = MatMul(u, x) y = Add(a, b) }", {"MatMul": 2, "Add": 1}, x=square)


@pytest.mark.parametrize("biased", [False, True])
def test_expandnet(biased: bool) -> None:
    """1×1 → k×k → 1×1, as a chain and beside a branch; a bias before the zero padding keeps the first apart."""
    weights: dict[str, Any] = {
        "k": normal(16, 4, 1, 1),
        "l": normal(16),
        "m": normal(16, 16, 3, 3),
        "n": normal(4, 16, 1, 1),
    }
    first = "Conv(x, k, l)" if biased else "Conv(x, k)"
    chain = SIDE + f"{{ a = {first} b = Conv<{P1}>(a, m) d = Conv(b, n)"
    model = build(chain + " y = Relu(d) }", **weights)
    result, _, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1 + biased, "Relu": 1}
    same(model, result, 1e-8, x=X)
    model = build(chain + " e = Conv(x, w1) y = Add(d, e) }", **weights)
    result, outcome, _ = run(model, SumBranches())
    assert ops(result) == ({"Conv": 4, "Add": 1} if biased else {"Conv": 1}), reasons(outcome)
    same(model, result, 1e-8, x=X)


# Stencils, groups and prices


@pytest.mark.parametrize(
    ("first", "second", "strides"),
    [
        (P1, "pads=[0,0,0,0]", [1, 1]),
        ("pads=[2,2,2,2], dilations=[2,2]", "pads=[0,0,0,0]", [1, 1]),
        ('auto_pad="SAME_UPPER"', "strides=[1,1]", [1, 1]),
        (f"{P1}, strides=[2,2]", "strides=[2,2]", [2, 2]),
        (f"{P1}, strides=[1,3]", "strides=[1,3]", [1, 3]),
        ("pads=[0,0,2,2]", "pads=[0,0,0,0]", [1, 1]),
        ("pads=[2,0,0,2]", "pads=[0,0,0,0]", [1, 1]),
    ],
)
def test_kernels_align(first: str, second: str, strides: list[int]) -> None:
    result = check(SIDE + f"{{ a = Conv<{first}>(x, w3) b = Conv<{second}>(x, u1) y = Add(a, b) }}", {"Conv": 1})
    assert attribute(result.graph.node[0], "kernel_shape") == [3, 3]
    assert attribute(result.graph.node[0], "strides") == strides


@pytest.mark.parametrize(
    ("pair", "expected"), [((1, 1), 1), ((2, 2), 2), ((4, 4), 4), ((4, 2), 2), ((2, 4), 2), ((1, 4), 1)]
)
def test_groups(pair: tuple[int, int], expected: int) -> None:
    k, m = (normal(4, 4 // g, 3, 3, seed=g) for g in pair)
    convs = f"a = Conv<{P1}, group={pair[0]}>(x, k) b = Conv<{P1}, group={pair[1]}>(x, m, c)"
    result = check(SIDE + f"{{ {convs} y = Sum(a, b, x) }}", {"Conv": 1}, k=k, m=m)
    assert groups(result) == [expected]
    assert weight(result, result.graph.node[0].input[1]).shape == (4, 4 // expected, 3, 3)


def test_coprime_groups_are_joined_if_that_is_not_dearer() -> None:
    side = "(double[2,6,5,5] x) => (double[N] y) { a = Conv<group=2>(x, k) b = Conv<group=3>(x, m) "
    weights = {"k": normal(6, 3, 1, 1), "m": normal(6, 2, 1, 1), "n": normal(6, 3, 1, 1, seed=1)}
    untouched(side + "y = Add(a, b) }", "joining the branches would cost 1.20× the multiply-adds", **weights)
    body = side + "d = Conv<group=2>(x, n) y = Sum(a, b, d) }"
    result = check(body, {"Conv": 2, "Add": 1}, x=normal(2, 6, 5, 5), **weights)
    assert groups(result) == [2, 3]


def test_what_is_refused_by_price() -> None:
    """Depthwise 3×3 + dense 1×1 (36 + 16 → 144 multiply-adds), 3×3 + dilated 3×3 (2·9 → 25 taps), 1×1 + pooling."""
    dearer = "joining the branches would cost {:.2f}× the multiply-adds"
    untouched(added("y = Add(f, g)"), dearer.format(144 / 52))
    untouched(added("e = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, u3) y = Add(a, e)"), dearer.format(25 / 18))
    untouched(added(f"p = {POOL} y = Add(p, b)"), dearer.format(9))
    untouched(added("y = Sum(b, x, r)"), "joining the branches would not save an operator")


POOL = "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)"


def test_average_pooling_is_free_beside_a_stencil_of_its_size() -> None:
    result = check(added(f"p = {POOL} y = Sub(a, p)"), {"Conv": 1})
    np.testing.assert_allclose(weight(result, "w3"), W3 - np.eye(4)[:, :, None, None] / 9)
    check(added(f"p = {POOL} y = Add(f, p)"), {"Conv": 1})
    strided = "a = Conv<strides=[2,2]>(x, w4) p = AveragePool<kernel_shape=[4,4], strides=[2,2]>(x)"
    check(SIDE + f"{{ {strided} y = Add(a, p) }}", {"Conv": 1})
    fewer = POOL.replace(", count_include_pad=1", "")
    untouched(added(f"p = {fewer} y = Add(a, p)"), "average fewer elements")


def test_the_cheap_ones_are_joined_and_the_dear_ones_stay_apart() -> None:
    """Two depthwise 3×3 and two dense 1×1: two convolutions."""
    sums = f"h = Conv<{P1}, group=4>(x, k) p = Add(f, b) q = Add(h, g) y = Add(p, q)"
    result = check(added(sums), {"Conv": 2, "Add": 1}, k=D3 + 1)
    assert groups(result) == [1, 4]


def test_selections_are_branches() -> None:
    """W₁x[:2] + W₂x[2:] = (W₁ W₂)x; a permutation beside a dense map."""
    body = SIDE + "{ p = Slice(x, i, j, k) q = Slice(x, j, l, k) a = Conv(p, w1) b = Conv(q, u1) y = Add(a, b) }"
    numbers = {"i": np.array([0]), "j": np.array([2]), "k": np.array([1]), "l": np.array([4])}
    check(body, {"Conv": 1}, w1=W1[:, :2], u1=W1[:, 2:], **numbers)
    check(added("p = Gather<axis=1>(x, i) y = Add(p, b)"), {"Conv": 1}, i=np.array([2, 1, 0, 3]))


# Adapters

LORA: dict[str, Any] = {
    "w": normal(8, 8), "b": normal(8, seed=1), "l": normal(8, 2, seed=2), "m": normal(2, 8, seed=3), "s": np.float64(0.5)
}  # fmt: skip
ROWS = normal(2, 3, 8)
MERGED = LORA["w"] + 0.5 * LORA["l"] @ LORA["m"]


@pytest.mark.parametrize(
    "adapter",
    [
        "e = MatMul(d, m) f = Mul(e, s) y = Add(p, f)",
        "f = Mul(d, s) e = MatMul(f, m) y = Add(e, p)",
        "e = MatMul(d, m) f = Mul(s, e) g = Identity(f) y = Add(p, g)",
        "e = MatMul(d, m) f = Mul(e, s) g = Neg(f) y = Sub(p, g)",
    ],
)
def test_an_unmerged_adapter(adapter: str) -> None:
    """x·W + b + s·((x·A)·B) = x·(W + s·AB) + b (Hu et al., 2021)"""
    body = f"(double[2,3,8] x) => (double[N] y) {{ h = MatMul(x, w) p = Add(h, b) d = MatMul(x, l) {adapter} }}"
    result = check(body, {"MatMul": 1, "Add": 1}, x=ROWS, **LORA)
    np.testing.assert_allclose(weight(result, "w"), MERGED)


def test_an_unmerged_adapter_without_bias() -> None:
    body = "(double[2,3,8] x) => (double[N] y) { h = MatMul(x, w) d = MatMul(x, l) e = MatMul(d, m) y = Add(h, e) }"
    check(body, {"MatMul": 1}, x=ROWS, **LORA)


def test_an_unmerged_adapter_of_rows() -> None:
    side = "(double[3,8] x) => (double[N] y) "
    body = side + "{ p = Gemm(x, w, b) d = Gemm(x, l) e = Gemm<alpha=0.5>(d, m) y = Add(p, e) }"
    np.testing.assert_allclose(weight(check(body, {"Gemm": 1}, x=ROWS[0], **LORA), "w"), MERGED)
    flipped = LORA | {name: LORA[name].T.copy() for name in "wlm"}
    body = body.replace("Gemm(", "Gemm<transB=1>(").replace("alpha", "transB=1, alpha")
    np.testing.assert_allclose(weight(check(body, {"Gemm": 1}, x=ROWS[0], **flipped), "w"), MERGED.T)
    body = side + "{ h = MatMul(x, w) p = Add(h, b) d = MatMul(x, l) e = MatMul(d, m) f = Mul(e, s) y = Add(p, f) }"
    check(body, {"Gemm": 1}, x=ROWS[0], **LORA)


def test_an_adapter_that_something_else_reads_stays() -> None:
    """Its inner features are used: merging would have to keep them."""
    side = "(double[2,3,8] x) => (double[N] y, double[N] d) "
    untouched(side + "{ h = MatMul(x, w) d = MatMul(x, l) e = MatMul(d, m) y = Add(h, e) }", "'d' is a graph", **LORA)


def test_adapters_in_a_transformer() -> None:
    """Adapters on Q and V, none on K: six products remain, the four projections and attention's two."""
    net = Net(2, 5, 8)

    def project(tensor: str, seed: int, adapter: bool = False) -> str:
        whole = net("Add", net("MatMul", tensor, normal(8, 8, seed=seed)), normal(8, seed=seed + 1))
        if not adapter:
            return whole
        inner = net("MatMul", tensor, normal(8, 2, seed=seed + 2))
        return net("Add", whole, net("Mul", net("MatMul", inner, normal(2, 8, seed=seed + 3)), np.asarray(2.0)))

    def heads(tensor: str, *perm: int) -> str:
        return net("Transpose", net("Reshape", tensor, np.array([0, 0, 2, 4])), perm=perm)

    q, k, v = project("x", 10, adapter=True), project("x", 20), project("x", 30, adapter=True)
    scores = net("Mul", net("MatMul", heads(q, 0, 2, 1, 3), heads(k, 0, 2, 3, 1)), np.asarray(0.5))
    mixed = net("MatMul", net("Softmax", scores, axis=-1), heads(v, 0, 2, 1, 3))
    merged = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 0, 8]))
    model = net.model(net("Add", "x", project(merged, 40)))
    result, outcome, _ = run(model, SumBranches())
    assert len(outcome.rewrites) == 2
    assert ops(result)["MatMul"] == 6
    assert {tuple(t.dims) for t in result.graph.initializer if len(t.dims) == 2} == {(8, 8)}
    assert cost(result).nodes == cost(model).nodes - 2 * 4
    same(model, result, x=normal(2, 5, 8))


# Refusals


@pytest.mark.parametrize(
    ("inputs", "outputs", "nodes", "word"),
    [
        ("", "", "a = Conv<strides=[2,2]>(x, w1) b = Conv(x, w4) y = Add(a, b)", "the strides differ"),
        (
            "",
            "",
            "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w3) b = Conv<pads=[1,1,0,0], strides=[2,2]>(x, u3) y = Add(a, b)",
            "the output sizes differ",
        ),
        ("", ", double[N] a", "a = Conv(x, w1) b = Conv(x, u1) y = Add(a, b)", "'a' is a graph output"),
        ("", ", double[N] q", "a = Conv(x, w1) q = Abs(a) b = Conv(x, u1) y = Add(a, b)", "'a' has 2 consumers"),
        ("", "", "a = Conv(x, w1) b = Conv(x, w1) y = Add(a, b)", "the weight 'w1' is shared"),
        ("", "", "a = Conv(x, w1) p = Relu(a) b = Conv(x, u1) y = Add(p, b)", "Relu is not a linear map"),
        (", double q", "", "a = Conv(x, w1) p = Mul(a, q) b = Conv(x, u1) y = Add(p, b)", "Mul is not a linear map"),
        (", double[4,4,1,1] q", "", "a = Conv(x, w1) b = Conv(x, q) y = Add(a, b)", "its weight is not a constant"),
        ("", "", "a = Conv(x, w1, c) p = Conv<pads=[1,1,1,1]>(a, w3) b = Conv(x, u1) y = Add(p, b)", "zero padding"),
        (
            "",
            "",
            "a = ConvTranspose<strides=[2,2]>(x, w1) b = ConvTranspose<strides=[2,2]>(x, u1) y = Add(a, b)",
            "transposed",
        ),
        (", double[2,4,6,6] z", "", "a = Conv(x, w1) b = Conv(z, u1) y = Add(a, b)", ""),
        ("", "", "a = Relu(x) b = Tanh(x) y = Add(a, b)", "Relu is not a linear map"),
    ],
)
def test_refusals(inputs: str, outputs: str, nodes: str, word: str) -> None:
    untouched(f"(double[2,4,6,6] x{inputs}) => (double[N] y{outputs}) {{ {nodes} }}", word)


def test_automatic_padding_of_unknown_size() -> None:
    """At 6×6, SAME padding of a 3×3 with stride 2 is (0, 1); that is not the 1×1's."""
    nodes = '{ a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w3) b = Conv<strides=[2,2]>(x, u1) y = Add(a, b) }'
    untouched("(double[N,4,H,W] x) => (double[N] y) " + nodes, "automatic padding")
    untouched(SIDE + nodes, "the output sizes differ")


@pytest.mark.parametrize(("captured", "word"), [("a", "control-flow"), ("w1", "shared"), ("y", ""), ("x", "")])
def test_what_a_body_of_control_flow_reads(captured: str, word: str) -> None:
    """A branch and a weight must stay; the input and the sum do anyway."""
    model = build("(double[2,4,6,6] x, bool f) => (double[N] y) { a = Conv(x, w1) b = Conv(x, u1) y = Add(a, b) }")
    ends = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in "pq"]
    then = helper.make_graph([helper.make_node("Neg", [captured], ["p"])], "then", [], ends[:1])
    other = helper.make_graph([helper.make_node("Abs", [captured], ["q"])], "else", [], ends[1:])
    model.graph.node.append(helper.make_node("If", ["f"], ["o"], then_branch=then, else_branch=other))
    shape = [4, 4, 1, 1] if captured == "w1" else [2, 4, 6, 6]
    model.graph.output.append(helper.make_tensor_value_info("o", TensorProto.DOUBLE, shape))
    result, outcome, _ = run(model, SumBranches())
    assert (result is model) == bool(word)
    assert ops(result)["Conv"] == (2 if word else 1)
    assert word in " ".join(reasons(outcome))
    same(model, result, x=X, f=np.array(True))


@pytest.mark.parametrize("name", ["w1", "c", "sc"])
def test_an_initializer_that_callers_may_override(name: str) -> None:
    model = build(SIDE + "{ a = Conv(x, w1, c) p = Mul(a, sc) b = Conv(x, u1) y = Add(p, b) }")
    assert ops(run(model, SumBranches())[0]) == {"Conv": 1}
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, WEIGHTS[name].shape))
    result, outcome, _ = run(model, SumBranches())
    assert result is model
    assert "constant" in " ".join(reasons(outcome))


@pytest.mark.parametrize(("scale", "word"), [(4e4, "the folded weights overflow float16"), (1.0, "")])
def test_weights_that_overflow_their_type(scale: float, word: str) -> None:
    values = np.full((4, 4, 1, 1), scale, np.float16)
    body = "(float16[1,4,6,6] x) => (float16[N] y) { a = Conv(x, k) b = Conv(x, m) y = Add(a, b) }"
    model = build(body, k=values, m=values)
    result, outcome, _ = run(model, SumBranches())
    assert (result is model) == bool(word)
    assert reasons(outcome) == ([word] if word else [])


@pytest.mark.parametrize("sums", ["y = Add(b, g)", "y = Sum(b, g)"])
def test_before_opset_7_sums_broadcast_by_attribute(sums: str) -> None:
    for opset in (6, 7):
        model = build(added(sums), opset)
        assert (run(model, SumBranches())[0] is model) == (opset < 7)


def test_a_denied_sum_stays() -> None:
    model = build(added("p = Add(b, g) q = Relu(p) h = Conv(q, k) y = Add(q, h)"), k=W1 + 1)
    _, free, _ = run(model, SumBranches())
    assert [str(r.site) for r in free.rewrites] == ["sum-branches:p", "sum-branches:y"]
    result, outcome, _ = run(model, SumBranches(), denied={Site("sum-branches", "p")})
    assert [str(r.site) for r in outcome.rewrites] == ["sum-branches:y"]
    assert ops(result) == {"Conv": 3, "Add": 1, "Relu": 1}
    assert reasons(outcome) == ["denied by the user"]


# Every sum


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


def add_branch(net: Net, spec: dict[str, Any], seed: int) -> str:
    kernel, dilation, biased, tensor = spec["kernel"], spec["dilation"], spec["biased"], "x"
    if spec["kind"] == "relu":
        tensor = net("Relu", tensor)
    if spec["kind"] == "chain":
        tensor = net("Conv", tensor, normal(8, 4, 1, 1, seed=seed + 1), *([normal(8)] if biased else []))
    if spec["kind"] in ("conv", "chain"):
        wide = 8 if spec["kind"] == "chain" else 4
        inputs = [normal(4, wide // spec["group"], kernel, kernel, seed=seed), *([normal(4)] if biased else [])]
        pads, dilations = [dilation * (kernel // 2)] * 4, [dilation] * 2
        tensor = net("Conv", tensor, *inputs, pads=pads, dilations=dilations, group=spec["group"])
    if spec["kind"] == "pool":
        pads = [kernel // 2] * 4
        tensor = net("AveragePool", tensor, kernel_shape=[kernel] * 2, pads=pads, count_include_pad=int(biased))
    if spec["scaled"]:
        tensor = net("Mul", tensor, np.full([(), (1,), (1, 1, 1, 1)][seed % 3], 0.5 + seed))
    if spec["shifted"]:
        tensor = net(["Add", "Sub"][seed % 2], tensor, normal(4, 1, 1, seed=seed))
    return tensor


@settings(max_examples=80)
@given(st.lists(branches(), min_size=2, max_size=4), st.data())
def test_every_sum_keeps_its_values_and_never_costs_more(specs: list[dict[str, Any]], data: st.DataObject) -> None:
    net = Net(1, 4, 5, 5)
    terms = [add_branch(net, spec, seed) for seed, spec in enumerate(specs)]
    while len(terms) > 1:
        count = data.draw(st.integers(2, len(terms)), label="terms")
        start = data.draw(st.integers(0, len(terms) - count), label="from")
        op = data.draw(st.sampled_from(["Add", "Sub", "Sum"]), label="op") if count == 2 else "Sum"
        terms[start : start + count] = [net(op, *terms[start : start + count])]
    model = net.model(net("Identity", terms[0]))
    result, _, _ = run(model, SumBranches())
    before, after = cost(model), cost(result)
    assert after.unknown == before.unknown == 0
    assert after.macs <= before.macs
    assert after.nodes <= before.nodes
    same(model, result, 1e-8, x=normal(1, 4, 5, 5, seed=11))
    convs = [s for s in specs if s["kind"] == "conv"]
    plain = all(s["kind"] in ("conv", "identity") and s["dilation"] == 1 for s in specs)
    if plain and any(s["group"] == 1 and s["kernel"] == max(c["kernel"] for c in convs) for s in convs):
        assert ops(result)["Conv"] == 1  # a dense one has a tap for every other's


def _branch(kernel: int, groups: int, stride: int, biased: bool, separate: float) -> Branch:
    pads = (kernel // 2,) * 2
    geometry = Geometry(4, 4, groups, (kernel,), (stride,), (1,), pads, biased=biased)
    tensor = Variable("x")
    return Branch((Term(Path(tensor, tensor, (), None, ""), 1.0),), geometry, separate)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            _branch,
            st.sampled_from([1, 3, 5]),
            st.sampled_from([1, 2, 4]),
            st.sampled_from([1, 1, 1, 2]),
            st.booleans(),
            st.sampled_from([0.0, 16.0, 48.0, 80.0, 1000.0]),
        ),
        max_size=9,
    )
)
def test_branches_are_joined_as_if_every_pair_were_tried(branches: list[Branch]) -> None:
    assert _cheapest(branches) == cheapest_by_trying_all(branches)


def test_the_work_of_joining_grows_with_the_kinds_of_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(sum_branches, "add_geometry", lambda maps: calls.append(maps) or add_geometry(maps))
    joined, _ = _cheapest([_branch(1, 1, 1, False, 16.0) for _ in range(200)])
    assert joined is not None
    assert len(joined.terms) == 200
    assert len(calls) < 10


def cheapest_by_trying_all(branches: Sequence[Branch]) -> tuple[Branch | None, str]:
    """The definition of what `_cheapest` finds: every pair is tried in every step."""
    pool, reason = list(branches), "the branches are not linear maps with constant numbers"
    while True:
        best: tuple[float, int, int, Branch] | None = None
        for i, a in enumerate(pool):
            for j, b in enumerate(pool[:i]):
                geometry = add_geometry([b.geometry, a.geometry])
                if isinstance(geometry, Refusal):
                    reason = f"the branches do not sum: {geometry.reason}"
                    continue
                pair = Branch((*b.terms, *a.terms), geometry, a.separate + b.separate)
                saved = a.together + b.together - pair.together
                if saved < 0:
                    reason = f"joining the branches would cost {dearer(a.together + b.together, pair.together)}"
                elif best is None or saved > best[0]:
                    best = (saved, i, j, pair)
        if best is None:
            break
        _, i, j, pair = best
        pool = [p for k, p in enumerate(pool) if k not in (i, j)] + [pair]
    joined = [b for b in pool if len(b.terms) > 1]
    return (joined[0], "") if joined else (None, reason)
