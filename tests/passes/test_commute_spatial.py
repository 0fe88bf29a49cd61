from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

import pwopt
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import CommuteSpatial, FoldAffine, FoldChains, HoistStride, SumBranches

X = normal(2, 8, 12, 10)
SIDE = "(double[2,8,12,10] x) => (double[N] y) "
B = normal(4, seed=7)


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def order(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node if n.op_type != "Constant"]


DOWN = {
    "AveragePool<kernel_shape=[2,2], strides=[2,2]>(%s)": True,
    "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(%s)": True,
    "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(%s)": True,
    "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(%s)": False,
    "GlobalAveragePool(%s)": True,
    "ReduceMean<axes=[2,3]>(%s)": True,
    "ReduceMean<axes=[3]>(%s)": True,
    "ReduceSum(%s, hw)": False,
    "Slice(%s, one, five, two)": True,
}
NUMBERS = {"hw": np.array([2, 3]), "one": np.array([1]), "five": np.array([5]), "two": np.array([2])}


def needed(body: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in NUMBERS.items() if f" {k})" in body or f" {k}," in body}


@pytest.mark.parametrize(("call", "constants"), DOWN.items())
@pytest.mark.parametrize("biased", [False, True])
def test_a_map_moves_behind_what_leaves_fewer_positions(call: str, constants: bool, biased: bool) -> None:
    body = SIDE + f"{{ a = Conv(x, w{', b' if biased else ''}) y = {call % 'a'} }}"
    model = parse(body, w=normal(12, 8, 1, 1), **({"b": normal(12)} if biased else {}), **needed(body))
    result, outcome, _ = run(model, CommuteSpatial())
    if biased and not constants:
        assert result is model
        assert "does not keep constants" in reasons(outcome)[0]
    else:
        assert order(result)[-1] == "Conv"
        assert macs(result) < macs(model)
    same(model, result, x=X)


UP = {
    'Resize<mode="nearest">(%s, , s2)': (1, True),
    'Resize<mode="linear">(%s, , s2)': (1, True),
    'Resize<mode="cubic">(%s, , s2)': (1, True),
    'Resize<mode="cubic", exclude_outside=1>(%s, , s2)': (1, True),
    'Resize<mode="linear", coordinate_transformation_mode="align_corners">(%s, , s2)': (1, True),
    'Resize<mode="linear", coordinate_transformation_mode="asymmetric">(%s, , s3)': (1, True),
    'Resize<mode="linear">(%s, , , size)': (1, True),
    "Expand(%s, wide)": (0, True),
    "Tile(%s, repeats)": (1, True),
    'Pad<mode="edge">(%s, around)': (1, True),
    'Pad<mode="reflect">(%s, around)': (1, True),
    "Pad(%s, around)": (1, False),
}
LARGE = {
    "s2": np.array([1, 1, 2, 2], np.float32), "s3": np.array([1, 1, 1.7, 2.3], np.float32),
    "size": np.array([2, 8, 7, 9]), "wide": np.array([2, 8, 12, 10]), "repeats": np.array([1, 1, 3, 2]),
    "around": np.array([0, 0, 4, 3, 0, 0, 2, 5]),
}  # fmt: skip


@pytest.mark.parametrize(("call", "facts"), UP.items())
@pytest.mark.parametrize("biased", [False, True])
def test_a_map_moves_before_what_makes_more_positions(call: str, facts: tuple[int, bool], biased: bool) -> None:
    whole, constants = facts
    size = (2, 8, 3, 4) if "Resize" in call else X.shape if whole else (2, 8, 1, 1)  # older onnx takes long for more
    side = f"(double[{','.join(map(str, size))}] x) => (double[N] y) "
    body = side + f"{{ a = {call % 'x'} y = Conv(a, w{', b' if biased else ''}) }}"
    model = parse(
        body,
        w=normal(4, 8, 1, 1),
        **({"b": B} if biased else {}),
        **{k: v for k, v in LARGE.items() if f" {k})" in body},
    )
    result, outcome, _ = run(model, CommuteSpatial())
    if biased and not constants:
        assert result is model
        assert "does not keep constants" in reasons(outcome)[0]
    else:
        assert order(result)[0] == "Conv"
        assert macs(result) < macs(model)
    same(model, result, x=normal(*size))


def test_cropping_coordinates_are_left_alone() -> None:
    body = SIDE + '{ a = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, s2) y = Conv(a, w) }'
    model = parse(body, w=normal(4, 8, 1, 1), s2=LARGE["s2"], roi=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32))
    assert run(model, CommuteSpatial())[0] is model


@pytest.mark.parametrize(
    "body",
    [
        "{ a = Conv(x, w) y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) }",  # not linear
        "{ a = Conv<pads=[1,1,1,1]>(x, k) y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a) }",  # not pointwise
        "{ a = Conv(x, w) p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a) r = GlobalMaxPool(a) y = Add(p, r) }",
        "{ a = Conv(x, w) r = Relu(a) y = GlobalAveragePool(r) }",
    ],
)
def test_refusals(body: str) -> None:
    names = {"w": normal(24, 8, 1, 1), "k": normal(4, 8, 3, 3)}
    model = parse(SIDE + body, **{k: v for k, v in names.items() if f" {k})" in body})
    assert run(model, CommuteSpatial())[0] is model


def test_a_map_that_makes_many_channels_stays_behind() -> None:
    """Before the upsampling it would save multiply-adds, but three hundred channels would be upsampled for one."""
    body = '(double[2,1,12,10] x) => (double[N] y) { a = Resize<mode="linear">(x, , s2) y = Conv(a, w) }'
    model = parse(body, w=normal(300, 1, 1, 1), s2=LARGE["s2"])
    result, outcome, _ = run(model, CommuteSpatial())
    assert result is model
    assert "would not be cheaper" in reasons(outcome)[0]


def test_matrix_products_move_behind_a_crop_of_tokens() -> None:
    body = "(double[2,9,6] x) => (double[N] y) { m = MatMul(x, w) a = Add(m, b) y = Slice(a, zero, one, one) }"
    model = parse(body, w=normal(6, 4), b=B, zero=np.array([0]), one=np.array([1]))
    result, _, _ = run(model, CommuteSpatial())
    assert order(result) == ["Slice", "MatMul", "Add"]
    same(model, result, x=normal(2, 9, 6))


NECK = "(double[2,8,6,5] x, double[2,%d,12,10] z) => (double[N] y) "


@pytest.mark.parametrize("parts", ["u, z", "z, u", "z, u, v", "u, z, v"])
def test_only_the_upsampled_part_of_a_concat_moves(parts: str) -> None:
    body = NECK % 3 + (
        f'{{ u = Resize<mode="nearest">(x, , s2) v = Sigmoid(z) c = Concat<axis=1>({parts}) y = Conv(c, w, b) }}'
    )
    width = sum({"u": 8, "z": 3, "v": 3}[p] for p in parts.split(", "))
    model = parse(body, w=normal(4, width, 1, 1), b=B, s2=LARGE["s2"])
    result, outcome, _ = run(model, CommuteSpatial())
    assert ops(result)["Conv"] == 2
    assert ops(result)["Concat"] == ("v" in parts)
    assert outcome.rewrites[0].macs_before - outcome.rewrites[0].macs_after == 2 * 4 * 8 * (120 - 30)
    same(model, result, x=normal(2, 8, 6, 5), z=normal(2, 3, 12, 10, seed=1))


def test_a_pooled_context_is_added_by_broadcasting() -> None:
    """Image pooling (ASPP, Chen et al., 2017): pooled features joined to every position, then mapped."""
    body = NECK % 3 + ("{ g = GlobalAveragePool(x) e = Expand(g, wide) c = Concat<axis=1>(z, e) y = Conv(c, w, b) }")
    model = parse(body, w=normal(4, 11, 1, 1), b=B, wide=np.array([2, 8, 12, 10]))
    result, _, _ = run(model, CommuteSpatial())
    assert ops(result) == {"GlobalAveragePool": 1, "Conv": 2, "Add": 1}
    same(model, result, x=normal(2, 8, 6, 5), z=normal(2, 3, 12, 10, seed=1))


def test_everything_upsampled_is_mapped_before() -> None:
    body = "(double[2,8,6,5] x, double[2,8,3,5] z) => (double[N] y) " + (
        '{ u = Resize<mode="linear">(x, , s2) v = Resize<mode="linear">(z, , s4) c = Concat<axis=1>(u, v) y = Conv(c, w, b) }'
    )
    model = parse(body, w=normal(4, 16, 1, 1), b=B, s2=LARGE["s2"], s4=np.array([1, 1, 4, 2], np.float32))
    result, _, _ = run(model, CommuteSpatial())
    assert ops(result) == {"Conv": 2, "Resize": 2, "Add": 1}
    same(model, result, x=normal(2, 8, 6, 5), z=normal(2, 8, 3, 5, seed=1))


def test_a_size_computed_from_the_present_channels_is_refused() -> None:
    body = (
        '(double[2,8,H,W] x, int64[4] size) => (double[N] y) { a = Resize<mode="linear">(x, , , size) y = Conv(a, w) }'
    )
    model = parse(body, w=normal(4, 8, 1, 1))
    loaded = {"x": (2, 8, 4, 4), "a": (2, 8, 8, 8), "y": (2, 4, 8, 8)}
    assert run(model, CommuteSpatial(), sizes=loaded)[0] is model


def test_dynamic_sizes_at_two_scales() -> None:
    body = "(double[N,8,H,W] x, double[N,3,I,J] z) => (double[M] y) " + (
        '{ u = Resize<mode="nearest">(x, , s2) c = Concat<axis=1>(u, z) y = Conv(c, w, b) }'
    )
    model = parse(body, w=normal(4, 11, 1, 1), b=B, s2=LARGE["s2"])
    sizes = {"x": (1, 8, 5, 5), "u": (1, 8, 10, 10), "z": (1, 3, 10, 10), "c": (1, 11, 10, 10), "y": (1, 4, 10, 10)}
    result, _, _ = run(model, CommuteSpatial(), sizes=sizes)
    assert ops(result)["Conv"] == 2
    for h, w in ((6, 5), (3, 9)):
        same(model, result, x=normal(2, 8, h, w), z=normal(2, 3, 2 * h, 2 * w, seed=1))


STEP = st.sampled_from(["map", "relu", "mean", "up", "down", "concat", "add", "strided", "bias", "conv", "crop"])


@settings(max_examples=80)
@given(st.lists(STEP, min_size=2, max_size=8), st.integers(0, 9))
def test_random_stacks(steps: list[str], seed: int) -> None:
    """Maps, pooling, resizing, strides, Concat and sums in any order: equal, and never more multiply-adds."""
    lines: list[str] = []
    numbers: dict[str, np.ndarray] = {}
    t, channels, h, w = "x", 8, 12, 10
    for i, step in enumerate(steps):
        y = f"t{i}"
        if step in ("map", "strided", "conv"):
            k, s, p = {"map": (1, 1, 0), "strided": (1, 2, 0), "conv": (3, 1, 1)}[step]
            out = 2 + (seed * 7 + i * 5) % 9
            numbers[f"w{i}"], numbers[f"b{i}"] = normal(out, channels, k, k, seed=i), normal(out, seed=i + 50)
            bias = f", b{i}" if (seed + i) % 2 else ""
            if not bias:
                del numbers[f"b{i}"]
            lines.append(f"{y} = Conv<strides=[{s},{s}], pads=[{p},{p},{p},{p}]>({t}, w{i}{bias})")
            channels, h, w = out, -(-h // s), -(-w // s)
        elif step == "up":
            numbers[f"s{i}"] = np.array([1, 1, 2, 2], np.float32)
            lines.append(f'{y} = Resize<mode="{("nearest", "linear")[seed % 2]}">({t}, , s{i})')
            h, w = 2 * h, 2 * w
        elif step == "down" and min(h, w) >= 2:
            lines.append(f"{y} = AveragePool<kernel_shape=[2,2], strides=[2,2], pads=[1,0,0,1]>({t})")
            h, w = (h + 1 - 2) // 2 + 1, (w + 1 - 2) // 2 + 1
        elif step == "mean" and seed % 3 == 0:
            lines.append(f"{y} = GlobalAveragePool({t})")
            h = w = 1
        elif step == "concat":
            lines.append(f"n{i} = Neg({t}) {y} = Concat<axis=1>({t}, n{i})")
            channels *= 2
        elif step == "add":
            lines.append(f"n{i} = Sigmoid({t}) {y} = Add({t}, n{i})")
        elif step == "bias":
            numbers[f"c{i}"] = normal(channels, 1, 1, seed=i)
            lines.append(f"{y} = Mul({t}, c{i})")
        elif step == "crop" and min(h, w) >= 3:
            numbers |= {f"a{i}": np.array([1, 0]), f"e{i}": np.array([h - 1, w - 1]), f"x{i}": np.array([2, 3])}
            lines.append(f"{y} = Slice({t}, a{i}, e{i}, x{i})")
            h, w = h - 2, w - 1
        else:
            lines.append(f"{y} = Relu({t})")
        t = y
    model = parse(SIDE.replace(" y)", f" {t})") + "{" + " ".join(lines) + "}", **numbers)
    passes = [FoldAffine(), SumBranches(), FoldChains(), CommuteSpatial(), HoistStride()]
    result, _, _ = run(model, *passes)
    assert macs(result) <= macs(model)
    same(model, result, 1e-7, x=X)


def stochastic(nodes: int, *, symmetric: bool = False) -> np.ndarray:
    """A normalised adjacency with self-loops: rows sum to one, or D^(−1/2)·A·D^(−1/2)."""
    a = np.abs(normal(nodes, nodes)) + np.eye(nodes)
    a = a + a.T
    degree = a.sum(1)
    return np.asarray(a / np.sqrt(np.outer(degree, degree)) if symmetric else a / degree[:, None])


def graph_layer(
    inn: int, out: int, *, before: bool, bias: str = "", nodes: int = 9, matrix: np.ndarray | None = None
) -> onnx.ModelProto:
    """A·(xW) if the map comes before the adjacency, else (Ax)·W."""
    head = f"(double[2,{nodes},{inn}] x) => (double[N] y) "
    body = f"h = MatMul(x, w) {bias} y = MatMul(a, {'k' if bias else 'h'})" if before else ""
    body = body or f"h = MatMul(a, x) {'k = MatMul(h, w) y = Add(k, b)' if bias else 'y = MatMul(h, w)'}"
    a = stochastic(nodes) if matrix is None else matrix
    return parse(f"{head}{{ {body} }}", w=normal(inn, out), a=a, **({"b": normal(out, seed=3)} if bias else {}))


@pytest.mark.parametrize(("inn", "out", "before"), [(4, 7, True), (7, 4, False)])
def test_a_map_moves_to_the_cheaper_side_of_a_constant_matrix(inn: int, out: int, before: bool) -> None:
    model = graph_layer(inn, out, before=before)
    result, outcome, _ = run(model, CommuteSpatial())
    assert macs(model) - macs(result) == 2 * 9 * 9 * 3
    assert "mixes 4 channels, not 7" in outcome.rewrites[0].reason
    same(model, result, x=normal(2, 9, inn))


@pytest.mark.parametrize(("inn", "out", "before"), [(7, 4, True), (4, 7, False), (5, 5, True), (5, 5, False)])
def test_a_map_stays_on_the_cheaper_side_of_a_constant_matrix(inn: int, out: int, before: bool) -> None:
    model = graph_layer(inn, out, before=before)
    result, outcome, _ = run(model, CommuteSpatial())
    assert result is model
    assert "would not be cheaper" in reasons(outcome)[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_bias_is_mixed_by_a_matrix_unless_its_rows_sum_to_one(symmetric: bool) -> None:
    """k = xW + b in front of A: A(xW + b) = (Ax)W + b only if A keeps constants."""
    model = graph_layer(4, 7, before=True, bias="k = Add(h, b)", matrix=stochastic(9, symmetric=symmetric))
    result, outcome, _ = run(model, CommuteSpatial())
    if symmetric:
        assert result is model
        assert "does not keep constants" in reasons(outcome)[0]
    else:
        assert macs(result) < macs(model)
    same(model, result, x=normal(2, 9, 4))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_bias_behind_a_matrix_may_stay_behind(symmetric: bool) -> None:
    """(Ax)W + b = A(xW) + b for any A."""
    model = graph_layer(7, 4, before=False, bias="b", matrix=stochastic(9, symmetric=symmetric))
    result, *_ = run(model, CommuteSpatial())
    assert macs(model) - macs(result) == 2 * 9 * 9 * 3
    same(model, result, x=normal(2, 9, 7))


def test_a_matrix_that_pools_nodes() -> None:
    """Fewer nodes behind it, so a map is cheaper there although it widens."""
    body = "(double[2,12,4] x) => (double[N] y) { h = MatMul(x, w) y = MatMul(a, h) }"
    model = parse(body, w=normal(4, 4), a=normal(3, 12))
    result, *_ = run(model, CommuteSpatial())
    assert order(result) == ["MatMul", "MatMul"]
    assert macs(model) - macs(result) == 2 * 4 * 4 * (12 - 3)
    same(model, result, x=normal(2, 12, 4))


def test_maps_along_one_axis_do_not_commute() -> None:
    body = "(double[2,6,4] x) => (double[N] y) { h = MatMul(v, x) y = MatMul(a, h) }"
    model = parse(body, v=normal(9, 6), a=normal(9, 9))
    assert run(model, CommuteSpatial())[0] is model


def test_a_convolution_moves_past_a_transform_of_rows() -> None:
    body = "(double[2,8,12,10] x) => (double[N] y) { h = Conv(x, w) y = MatMul(a, h) }"
    model = parse(body, w=normal(12, 8, 1, 1), a=normal(12, 12))
    result, *_ = run(model, CommuteSpatial())
    assert order(result) == ["MatMul", "Conv"]
    same(model, result, x=X)


def test_observed_and_shared_maps_stay_beside_a_matrix() -> None:
    body = "{ h = MatMul(x, w) y = MatMul(a, h) %s }"
    for outputs, more, says in (
        ("y, double[N] h", "", "graph output"),
        ("y, double[N] z", "z = MatMul(x, w)", "shared"),
    ):
        model = parse(f"(double[2,9,4] x) => (double[N] {outputs}) {body % more}", w=normal(4, 7), a=stochastic(9))
        result, outcome, _ = run(model, CommuteSpatial())
        assert result is model
        assert says in reasons(outcome)[0]


@pytest.mark.parametrize("biased", [False, True])
def test_a_map_moves_past_the_bias_of_the_layer_before(biased: bool) -> None:
    """(Ax + c)W + b = A(xW) + (cW + b), as between two layers of a graph network without activation."""
    body = "(double[2,9,7] x) => (double[N] y) { h = MatMul(a, x) k = Add(h, c) l = MatMul(k, w) y = %s }"
    c = normal(7, seed=5)
    model = parse(
        body % ("Add(l, b)" if biased else "Neg(l)"),
        a=stochastic(9, symmetric=True), c=c, w=normal(7, 4), **({"b": normal(4, seed=3)} if biased else {}),
    )  # fmt: skip
    result, outcome, _ = run(model, CommuteSpatial(), FoldAffine())
    assert macs(model) - macs(result) == 2 * 9 * 9 * 3
    assert "then mixes 4 channels, not 7" in outcome.rewrites[0].reason
    assert ops(result) == ({"MatMul": 2, "Add": 1} if biased else {"MatMul": 2, "Add": 1, "Neg": 1})
    same(model, result, x=normal(2, 9, 7))


PAST: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "would not be cheaper": ("k = Add(h, c) y = MatMul(k, w)", {"w": normal(7, 9)}),
    "graph output": ("k = Add(h, c) y = MatMul(k, w)", {}),
    "2 consumers": ("k = Add(h, c) l = MatMul(k, w) m = Neg(h) y = MatMul(m, v)", {"v": normal(7, 2)}),
}


@pytest.mark.parametrize("reason", PAST)
def test_a_map_stays_behind_the_bias_if(reason: str) -> None:
    steps, weights = PAST[reason]
    outputs = "double[N] y, double[N] k" if reason == "graph output" else "double[N] y"
    body = f"(double[2,9,7] x) => ({outputs}) {{ h = MatMul(a, x) {steps} }}"
    model = parse(body, **({"a": stochastic(9), "c": normal(7), "w": normal(7, 4)} | weights))
    result, outcome, _ = run(model, CommuteSpatial())
    assert result is model
    assert any(reason in r for r in reasons(outcome))


@pytest.mark.parametrize(
    ("middle", "values"),
    [
        ("Add(h, c)", normal(9, 1)),
        ("Add(h, c)", normal(1)),
        ("Mul(h, c)", normal(7)),
        ("Add(h, c)", normal(9, 7)),
        ("Relu(h)", None),
    ],
)
def test_what_lies_between_is_something_else(middle: str, values: np.ndarray | None) -> None:
    """A shift that differs between nodes, or is the matrix's own bias; a scale, an activation."""
    body = f"(double[2,9,7] x) => (double[N] y) {{ h = MatMul(a, x) k = {middle} y = MatMul(k, w) }}"
    model = parse(body, a=stochastic(9), w=normal(7, 4), **({} if values is None else {"c": values}))
    assert run(model, CommuteSpatial())[0] is model


def test_a_map_and_its_bias_between_a_matrix_and_a_map() -> None:
    """The bias is that map's own, and the two maps are a chain."""
    body = "(double[2,9,7] x) => (double[N] y) { g = MatMul(a, x) h = MatMul(g, v) k = Add(h, c) y = MatMul(k, w) }"
    model = parse(body, a=stochastic(9), v=normal(7, 8), c=normal(8), w=normal(8, 3))
    result, *_ = run(model, CommuteSpatial(), FoldChains())
    same(model, result, x=normal(2, 9, 7))


LAYER = st.tuples(st.sampled_from(["map", "mix", "identity", "shift", "nodes' shift", "relu"]), st.integers(1, 9))


@settings(max_examples=60)
@given(st.lists(LAYER, min_size=2, max_size=7))
def test_random_graph_layers(layers: list[tuple[str, int]]) -> None:
    """Maps of features, matrices of nodes (every other one keeps constants), and shifts of both, by the whole pipeline."""
    nodes, width, t, lines, numbers = 5, 6, "x", [], {}
    for i, (layer, size) in enumerate(layers):
        y, w = f"t{i}", f"w{i}"
        if layer == "map":
            numbers[w], width = normal(width, size, seed=i), size
            lines.append(f"{y} = MatMul({t}, {w})")
        elif layer == "mix":
            matrix = np.abs(normal(size, nodes, seed=i))
            numbers[w], nodes = matrix / (matrix.sum(1, keepdims=True) if size % 2 else 1), size
            lines.append(f"{y} = MatMul({w}, {t})")
        elif layer == "identity":
            numbers[w] = np.eye(nodes)
            lines.append(f"{y} = MatMul({w}, {t})")
        elif layer == "relu":
            lines.append(f"{y} = Relu({t})")
        else:
            numbers[w] = normal(width, seed=i) if layer == "shift" else normal(nodes, 1, seed=i)
            lines.append(f"{y} = Add({t}, {w})")
        t = y
    model = parse(f"(double[2,5,6] x) => (double[N] y) {{ {' '.join(lines)} y = Neg({t}) }}", **numbers)
    result = pwopt.optimize(model, cost="analytic", verify=False)
    assert result.report.after.macs <= result.report.before.macs
    same(model, result.model, 1e-8, x=normal(2, 5, 6))
