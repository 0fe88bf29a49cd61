"""What a scale or a shift passes through. Each refused case would be wrong if its one precondition were dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import build, evaluate, normal, ops, parse, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.commute import Affine, lift, sink
from pwopt.passes import FoldAffine

X = normal(2, 4, 6, 6)
S = np.abs(normal(4, 1, 1)) + 0.5
W = normal(5, 4, 1, 1)
HEAD = "(double[2,4,6,6] x, double[2,4,6,6] k) => (double[N] y) "
OUT = "(double[2,4,6,6] x, double[2,4,6,6] k) => (double[N] y, double[N] z) "

STAYS = {
    "a square is not linear": HEAD + "{ p = Mul(x, s) q = Mul(p, p) y = Conv(q, w) }",
    "a double shift": HEAD + "{ p = Add(x, s) q = Add(p, p) y = Conv(q, w) }",
    "a divisor": HEAD + "{ p = Mul(x, s) q = Div(k, p) y = Conv(q, w) }",
    "a scale of one operand": HEAD + "{ p = Mul(x, s) q = Add(p, k) y = Conv(q, w) }",
    "a shift of one factor": HEAD + "{ p = Add(x, s) q = Mul(p, k) y = Conv(q, w) }",
    "through a graph output": OUT + "{ p = Mul(x, s) z = Relu(p) y = Conv(z, w) }",
    "its own graph output": OUT + "{ z = Mul(x, s) y = Conv(z, w) }",
    "two ways to one map": HEAD + "{ p = Mul(x, s) q = Relu(p) c = Concat<axis=1>(p, q) y = Conv(c, v) }",
    "indices of a maximum": OUT.replace("double[N] z", "int64[N] z") + "{ p = Mul(x, s) q, z = MaxPool<kernel_shape=[2,2]>(p) y = Conv(q, w) }",
    "up past a second reader": OUT + "{ p = Conv(x, w) q = Relu(p) r = Mul(q, u) y = Sigmoid(r) z = Neg(p) }",
    "up into a square": HEAD + "{ p = Conv(x, w) q = Mul(p, p) r = Mul(q, u) y = Sigmoid(r) }",
    "padding with a constant": HEAD + "{ p = Mul(x, s) q = Pad(p, e, c) y = Conv(q, w) }",
    "extrapolation": HEAD + '{ p = Add(x, s) q = Resize<coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=9.0>(p, roi, , size) y = Conv(q, w) }',
    "division by zero": HEAD + "{ p = Conv(x, w) q = Div(p, zero) y = Sigmoid(q) }",
}  # fmt: skip
WEIGHTS = {
    "s": S, "w": W, "v": normal(5, 8, 1, 1), "u": np.abs(normal(5, 1, 1)) + 0.5, "c": np.float64(5), "zero": np.zeros((5, 1, 1)),
    "e": np.array([0, 0, 0, 1, 0, 0, 0, 0]), "roi": np.array([0, 0, 0, 0, 1, 1, 1.5, 1.5]), "size": np.array([2, 4, 6, 6]),
}  # fmt: skip


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_a_scale_or_shift_does_not_pass(body: str) -> None:
    used = {k: v for k, v in WEIGHTS.items() if f", {k})" in body or f" {k}," in body}
    model = parse(body, **used)
    result, outcome, _ = run(model, FoldAffine())
    assert result is model, outcome.rewrites


def test_the_sign_of_a_subtrahend() -> None:
    model = parse(HEAD + "{ p = Add(x, s) q = Sub(k, p) y = Conv(q, w) }", s=S, w=W)
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Sub": 1, "Conv": 1}
    same(model, result, x=X, k=normal(2, 4, 6, 6, seed=3))


def test_broadcasting_to_a_higher_rank_moves_the_axis() -> None:
    """Axis 1 of the summand is axis 2 of the sum, whose axis 1 the convolution reads."""
    body = "(double[4,4,6] x, double[2,4,4,6] k) => (double[N] y) { p = Add(x, t) q = Add(p, k) y = Conv(q, w) }"
    model = parse(body, t=normal(4, 1), w=W)
    result, _, _ = run(model, FoldAffine())
    assert result is model


def test_broadcasting_over_the_channel_axis() -> None:
    body = "(double[2,1,6,6] x, double[2,4,6,6] k) => (double[N] y) { p = Add(x, t) q = Add(p, k) y = Conv(q, w) }"
    model = parse(body, t=np.full((1, 1, 1), 3.0), w=W)
    result, _, _ = run(model, FoldAffine())
    assert ops(result) == {"Add": 1, "Conv": 1}
    same(model, result, x=normal(2, 1, 6, 6), k=X)


SCALE, POSITIVE, SHIFT = "any scale", "positive scales", "shifts"
LINEAR = {SCALE, POSITIVE, SHIFT}
#: What passes on the channel axis.
PASSES_THROUGH: dict[str, set[str]] = {
    "Identity(x)": LINEAR,
    "Dropout(x)": LINEAR,
    "Dropout<seed=1>(x, r, yes)": set(),
    "Relu(x)": {POSITIVE},
    "LeakyRelu<alpha=0.3>(x)": {POSITIVE},
    "Abs(x)": {POSITIVE},
    "Sigmoid(x)": set(),
    "GlobalAveragePool(x)": LINEAR,
    "GlobalMaxPool(x)": {POSITIVE, SHIFT},
    "AveragePool<kernel_shape=[2,2]>(x)": LINEAR,
    "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(x)": LINEAR,
    "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(x)": {SCALE, POSITIVE},
    'AveragePool<kernel_shape=[3,3],auto_pad="SAME_UPPER",count_include_pad=1>(x)': {SCALE, POSITIVE},
    "AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1,count_include_pad=1>(x)": {SCALE, POSITIVE},
    "AveragePool<kernel_shape=[2,2],dilations=[4,4],pads=[3,3,3,3]>(x)": {SCALE, POSITIVE},
    "MaxPool<kernel_shape=[2,2]>(x)": {POSITIVE, SHIFT},
    "MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(x)": {POSITIVE, SHIFT},
    "MaxPool<kernel_shape=[2,2],dilations=[4,4],pads=[3,3,3,3]>(x)": set(),
    "ReduceMean<axes=[2,3]>(x)": LINEAR,
    "ReduceMean<axes=[2],keepdims=0>(x)": LINEAR,
    "ReduceMean<axes=[0],keepdims=0>(x)": LINEAR,
    "ReduceMean<axes=[1]>(x)": set(),
    "ReduceMean(x)": set(),
    "ReduceSum(x, last)": {SCALE, POSITIVE},
    "ReduceMax<axes=[2]>(x)": {POSITIVE, SHIFT},
    'Resize<mode="linear">(x, , twice)': LINEAR,
    'Resize<mode="cubic",exclude_outside=1>(x, , twice)': LINEAR,
    'Resize<mode="nearest">(x, , , sizes)': LINEAR,
    'Resize<mode="linear">(x, , channels)': set(),
    'Resize<mode="linear">(x, , , more)': set(),
    "Pad(x, around)": {SCALE, POSITIVE},
    'Pad<mode="edge">(x, around)': LINEAR,
    'Pad<mode="reflect">(x, around)': LINEAR,
    "Pad(x, around, five)": set(),
    'Pad<mode="edge">(x, before)': set(),
    "Slice(x, one, two, last)": LINEAR,
    "Slice(x, one, two, one)": set(),
    "Expand(x, larger)": set(),
    "Tile(x, wide)": LINEAR,
    "Tile(x, tall)": set(),
    "DepthToSpace<blocksize=2>(x)": set(),
    "SpaceToDepth<blocksize=2>(x)": set(),
    "Transpose<perm=[0,2,3,1]>(x)": LINEAR,
    "Transpose(x)": LINEAR,
    "Reshape(x, flat)": LINEAR,
    "Reshape(x, split)": LINEAR,
    "Reshape(x, mixed)": set(),
    "Reshape(x, turned)": set(),  # four, but others
    "Flatten(x)": set(),
    "Unsqueeze(x, one)": LINEAR,
    "Softmax<axis=1>(x)": set(),
}
ARGUMENTS = {
    "r": np.float64(0.5), "yes": np.array(True), "last": np.array([3]), "one": np.array([1]), "two": np.array([3]), "five": np.float64(5),
    "twice": np.array([1, 1, 2, 2], np.float32), "channels": np.array([1, 2, 1, 1], np.float32), "sizes": np.array([2, 4, 5, 7]),
    "more": np.array([2, 7, 6, 6]), "around": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "before": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "larger": np.array([3, 2, 4, 6, 6]), "wide": np.array([1, 1, 2, 1]), "tall": np.array([1, 2, 1, 1]), "flat": np.array([2, 4, 36]),
    "split": np.array([2, 4, 2, 3, 6]), "mixed": np.array([2, 8, 3, 6]), "turned": np.array([4, 2, 6, 6]),
}  # fmt: skip


def along(affine: Affine, values: np.ndarray) -> np.ndarray:
    """A scale and a shift of one axis."""
    shape = [-1 if a == affine.axis else 1 for a in range(values.ndim)]
    linear = affine.map if affine.axis is not None else affine.map.broadcast(1)
    return values * linear.scale.reshape(shape) + linear.bias.reshape(shape)


def kinds(count: int) -> Iterator[tuple[str, LinearMap]]:
    """A map of each kind."""
    for kind in (SCALE, POSITIVE, SHIFT):
        scale = np.ones(count) if kind == SHIFT else np.linspace(0.5 if kind == POSITIVE else -1.5, 2, count)
        yield kind, LinearMap.diagonal(scale, np.linspace(1, 2, count) * (kind == SHIFT))


@pytest.mark.parametrize("call", PASSES_THROUGH)
def test_what_passes_through_equals_the_original(call: str) -> None:
    """f(sx + t) = s'f(x) + t' in both directions, on any axis. On channels, exactly the listed kinds pass."""
    opset = 19 if "dilations" in call else 17
    model = build(f"(double[2,4,6,6] x) => (double[N] y) {{ y = {call} }}", ARGUMENTS, opset=opset)
    graph = from_proto(model).graph
    view, node = View(graph), graph.nodes[-1]
    (y,) = evaluate(model, x=X)
    passed = set()
    for axis in (*range(X.ndim), None):
        for kind, linear in kinds(1 if axis is None else X.shape[axis]):
            moves = sink(view, node, node.inputs[0], Affine(linear, axis))
            if not isinstance(moves, Refusal):
                changed = evaluate(model, x=along(Affine(linear, axis), X))[0]
                np.testing.assert_allclose(changed, along(moves[0][1], y), atol=1e-9)
                if axis == 1:
                    passed.add(kind)
    for axis in (*range(y.ndim), None):
        for _, linear in kinds(1 if axis is None else y.shape[axis]):
            found = lift(view, node, Affine(linear, axis))
            if not isinstance(found, Refusal):
                changed = evaluate(model, x=along(found[0][0][1], X))[0]
                np.testing.assert_allclose(changed, along(Affine(linear, axis), y), atol=1e-9)
    assert passed == PASSES_THROUGH[call]


@st.composite
def operators(draw: st.DrawFn) -> tuple[str, tuple[int, ...], dict[str, np.ndarray]]:
    """A call of one operator with random attributes, the shape of its input `x`, and its other inputs."""
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=3, max_size=4)))
    rank, space = len(shape), len(shape) - 2

    def each(low: int, high: int, count: int = space) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    axis = draw(st.integers(0, rank - 1))
    kind = draw(st.sampled_from(["pool", "reduce", "pad", "resize", "slice", "move", "repeat", "activate", "join"]))
    if kind == "pool":
        shape = (*shape[:2], *each(3, 5))
        kernel = each(1, 3)
        attributes = f"kernel_shape={kernel}, strides={each(1, 2)}"
        padded = f"{attributes}, pads={[k // 3 for k in kernel] * 2}, count_include_pad={draw(st.integers(0, 1))}"
        # the reference evaluator is wrong about padded maxima, and about global ones of sequences
        calls = [f"AveragePool<{attributes}>", f"AveragePool<{padded}>", f"MaxPool<{attributes}>", "GlobalAveragePool"]
        return f"{draw(st.sampled_from(calls))}(x)", shape, {}
    if kind == "reduce":
        axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
        op, keep = draw(st.sampled_from(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])), draw(st.integers(0, 1))
        return f"{op}<keepdims={keep}>(x, axes)", shape, {"axes": np.array(axes)}
    if kind == "pad":
        mode = draw(st.sampled_from(["constant", "edge", "reflect"]))
        value = {"value": np.float64(draw(st.integers(0, 2)))} if mode == "constant" else {}
        call = f'Pad<mode="{mode}">(x, pads{", value" if value else ""})'
        return call, shape, {"pads": np.array(each(0, 1, 2 * rank)), **value}
    if kind == "resize":
        mode = draw(st.sampled_from(["nearest", "linear"]))
        sizes = [d * draw(st.sampled_from([1, 1, 2])) for d in shape]
        return f'Resize<mode="{mode}">(x, , , sizes)', shape, {"sizes": np.array(sizes)}
    if kind == "slice":
        begin, step = draw(st.integers(0, shape[axis] - 1)), draw(st.integers(1, 2))
        bounds = {"s": begin, "e": draw(st.integers(begin + 1, 6)), "a": axis, "t": step}
        return "Slice(x, s, e, a, t)", shape, {k: np.array([v]) for k, v in bounds.items()}
    if kind == "move":
        factors = [[d, 1] if draw(st.booleans()) else [d] for d in shape]
        target = [d for part in factors for d in part]
        joined = [*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :]]
        call = draw(st.sampled_from([
            f"Transpose<perm={draw(st.permutations(range(rank)))}>(x)", "Reshape(x, split)", "Reshape(x, joined)",
            f"Flatten<axis={axis}>(x)", "Unsqueeze(x, at)",
        ]))  # fmt: skip
        constants = {"split": target, "joined": joined, "at": [axis]}
        return call, shape, {k: np.array(v) for k, v in constants.items()}
    if kind == "repeat":
        shape = tuple(1 if a == axis and draw(st.booleans()) else d for a, d in enumerate(shape))
        repeats = [1 + (a == axis) for a in range(rank)]
        larger = [3 if d == 1 else d for d in shape]
        return (
            draw(st.sampled_from(["Tile(x, n)", "Expand(x, larger)"])),
            shape,
            {"n": np.array(repeats), "larger": np.array(larger)},
        )
    if kind == "activate":
        return (
            draw(
                st.sampled_from(
                    [
                        "Relu(x)",
                        "LeakyRelu<alpha=0.3>(x)",
                        "Abs(x)",
                        "Neg(x)",
                        "Tanh(x)",
                        "Sign(x)",
                        f"Softmax<axis={axis}>(x)",
                    ]
                )
            ),
            shape,
            {},
        )
    other = draw(
        st.sampled_from([shape, shape[1:], shape[axis:], tuple(1 if a == axis else d for a, d in enumerate(shape))])
    )
    op, order = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Max"])), draw(st.sampled_from(["x, z", "z, x"]))
    return f"{op}({order})", shape, {"z": np.abs(normal(*other, seed=3)) + 0.5}


@settings(max_examples=400)
@given(operators(), st.data())
def test_a_moved_scale_or_shift_equals_the_original(
    case: tuple[str, tuple[int, ...], dict[str, np.ndarray]], data: st.DataObject
) -> None:
    """f(sx + t) = s'f(x) + t', whatever the operator, the axis, and the scale or the shift."""
    call, shape, others = case
    feeds = {"x": np.abs(normal(*shape)) + 0.5} | {k: v for k, v in others.items() if k == "z"}
    inputs = ", ".join(f"double[{','.join(map(str, v.shape))}] {k}" for k, v in feeds.items())
    constants = {k: v for k, v in others.items() if k != "z"}
    model = build(f"({inputs}) => (double[N] y) {{ y = {call} }}", constants, opset=18)
    graph = from_proto(model).graph
    view, node = View(graph), graph.nodes[-1]
    (y,) = evaluate(model, **feeds)

    def affine(values: np.ndarray) -> Affine:
        axis = data.draw(st.none() | st.integers(0, values.ndim - 1)) if values.ndim else None
        kind = data.draw(st.sampled_from([SCALE, POSITIVE, SHIFT]))
        return Affine(dict(kinds(1 if axis is None else values.shape[axis]))[kind], axis)

    before = affine(feeds["x"])
    moves = sink(view, node, next(t for t in node.inputs if t.name == "x"), before)
    if not isinstance(moves, Refusal):
        changed = evaluate(model, **feeds | {"x": along(before, feeds["x"])})[0]
        np.testing.assert_allclose(changed, along(moves[0][1], y), atol=1e-9)
    after = affine(y)
    found = lift(view, node, after)
    for way in [] if isinstance(found, Refusal) else found:
        moved = {t.name: along(a, feeds[t.name]) for t, a in way}
        np.testing.assert_allclose(evaluate(model, **feeds | moved)[0], along(after, y), atol=1e-9)


#: What passes from the first input on the channel axis.
JOINED: dict[str, set[str]] = {
    "Add(x, z)": {SHIFT},
    "Sub(x, z)": {SHIFT},
    "Sub(z, x)": {SHIFT},
    "Sum(x, z)": {SHIFT},
    "Mul(x, z)": {SCALE, POSITIVE},
    "Div(x, z)": {SCALE, POSITIVE},
    "Mul(x, g)": {SCALE, POSITIVE},
    "Mul(g, x)": {SCALE, POSITIVE},
    "Add(g, x)": {SHIFT},
    "Add(x, u)": {SHIFT},
    "Add(u, x)": set(),  # its channels lie on another axis of the sum
    "Mul(h, x)": set(),  # it has one for all of them
    "Max(x, z)": set(),
    "Concat<axis=1>(x, z)": LINEAR,
    "Concat<axis=2>(x, z)": set(),
    "Concat<axis=-1>(z, x)": set(),
}
SHAPES = {"x": (2, 4, 6, 6), "z": (2, 4, 6, 6), "g": (2, 4, 1, 1), "h": (2, 1, 6, 6), "u": (4, 6, 6)}


@pytest.mark.parametrize("call", JOINED)
def test_what_passes_through_operators_of_two_tensors_equals_the_original(call: str) -> None:
    inputs = ", ".join(f"double[{','.join(map(str, shape))}] {name}" for name, shape in SHAPES.items())
    model = build(f"({inputs}) => (double[N] y) {{ y = {call} }}", {})
    graph = from_proto(model).graph
    view, node = View(graph), graph.nodes[-1]
    feeds = {name: np.abs(normal(*shape, seed=i)) + 0.5 for i, (name, shape) in enumerate(SHAPES.items())}
    (y,) = evaluate(model, **feeds)
    passed = set()
    for number, tensor in enumerate(node.inputs):
        x = feeds[tensor.name]
        for axis in (*range(x.ndim), None):
            for kind, linear in kinds(1 if axis is None else x.shape[axis]):
                moves = sink(view, node, tensor, Affine(linear, axis))
                if not isinstance(moves, Refusal):
                    changed = evaluate(model, **feeds | {tensor.name: along(Affine(linear, axis), x)})[0]
                    np.testing.assert_allclose(changed, along(moves[0][1], y), atol=1e-9)
                    if number == 0 and axis == 1:
                        passed.add(kind)
    assert passed == JOINED[call]
    for axis in (*range(y.ndim), None):
        for _, linear in kinds(1 if axis is None else y.shape[axis]):
            found = lift(view, node, Affine(linear, axis))
            for moves in [] if isinstance(found, Refusal) else found:
                moved = {t.name: along(a, feeds[t.name]) for t, a in moves}
                np.testing.assert_allclose(
                    evaluate(model, **feeds | moved)[0], along(Affine(linear, axis), y), atol=1e-9
                )


@pytest.mark.parametrize("axis", [1, 2])
def test_what_passes_through_a_split_equals_the_original(axis: int) -> None:
    model = parse(f"(double[2,4,6,6] x) => (double[N] y, double[M] z) {{ y, z = Split<axis={axis}>(x, n) }}",
                  n=np.array([1, 3]) if axis == 1 else np.array([4, 2]))  # fmt: skip
    graph = from_proto(model).graph
    view, node = View(graph), graph.nodes[-1]
    results = evaluate(model, x=X)
    for a in (0, 1, 2, 3, None):
        for _, linear in kinds(1 if a is None else X.shape[a]):
            moves = sink(view, node, node.inputs[0], Affine(linear, a))
            assert not isinstance(moves, Refusal)
            changed = evaluate(model, x=along(Affine(linear, a), X))
            for found, result, (_, affine) in zip(changed, results, moves, strict=True):
                np.testing.assert_allclose(found, along(affine, result), atol=1e-9)


def test_a_scale_moved_past_a_mean_could_overflow_float16() -> None:
    model = parse("(float16[2,4,6,6] x) => (float16[N] y) { y = ReduceMean<axes=[2,3]>(x) }")
    graph = from_proto(model).graph
    refused = sink(View(graph), graph.nodes[-1], graph.inputs[0], Affine(LinearMap.diagonal(np.full(4, 2.0)), 1))
    assert isinstance(refused, Refusal)
    assert "overflow float16" in refused.reason
