from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import HoistStride

X = normal(2, 8, 13, 11)
SIDE = "(double[2,8,13,11] x) => (double[N] y) "


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def strides(model: onnx.ModelProto) -> list[list[int]]:
    return [list(a.ints) for n in model.graph.node for a in n.attribute if a.name == "strides"]


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def test_a_strided_map_hands_its_stride_up() -> None:
    body = SIDE + "{ a = Conv<pads=[1,1,1,1]>(x, u, b) r = Relu(a) y = Conv<strides=[2,2]>(r, v) }"
    model = parse(body, **weights(u=(8, 8, 3, 3), b=(8,), v=(4, 8, 1, 1)))
    result, outcome, _ = run(model, HoistStride())
    assert strides(result) == [[2, 2], [1, 1]]
    assert outcome.rewrites[0].macs_before == macs(model)
    assert outcome.rewrites[0].macs_after == macs(result) < macs(model)
    same(model, result, 1e-11, x=X)


@pytest.mark.parametrize("size", [6, 11, 16])
def test_automatic_padding_is_that_of_the_size_before(size: int) -> None:
    """SAME padding of stride 5 is 0 at these sizes, and negative at the sizes that are left."""
    side = f"(double[2,8,{size},{size}] x) => (double[N] y) "
    body = side + '{ a = Conv(x, u) r = Relu(a) y = Conv<auto_pad="SAME_UPPER", strides=[5,5]>(r, v) }'
    model = parse(body, **weights(u=(8, 8, 1, 1), v=(4, 8, 1, 1)))
    result, _, _ = run(model, HoistStride())
    assert strides(result) == [[5, 5], [1, 1]]
    same(model, result, 1e-11, x=normal(2, 8, size, size))


def test_a_residual_block_with_two_strided_readers() -> None:
    """A ResNet block whose successor has the stride on its first 1×1 map and on its projection."""
    body = SIDE + (
        "{ p = Conv(x, a) q = Relu(p) s = Conv<pads=[1,1,1,1]>(q, b) t = Relu(s) u = Conv(t, c) w = Add(u, x) r = Relu(w)"
        " m = Conv<strides=[2,2]>(r, d) n = Conv<strides=[2,2]>(r, e) y = Add(m, n) }"
    )
    shapes = {"a": (64, 8, 1, 1), "b": (64, 64, 3, 3), "c": (8, 64, 1, 1), "d": (4, 8, 1, 1), "e": (4, 8, 1, 1)}
    model = parse(body, **weights(**shapes))
    result, outcome, _ = run(model, HoistStride())
    assert ops(result)["MaxPool"] == 1  # the residual is subsampled
    assert strides(result) == [[2, 2], [1, 1], [2, 2], [1, 1], [1, 1]] or len(outcome.rewrites) == 1
    assert macs(result) < 0.5 * macs(model)
    same(model, result, 1e-11, x=X)


@pytest.mark.parametrize(
    "readers",
    [
        "y = Conv<strides=[2,3]>(r, v)",
        "y = MaxPool<kernel_shape=[1,1], strides=[2,3]>(r)",
        "y = AveragePool<kernel_shape=[1,1], strides=[2,3]>(r)",
        "s = Conv<strides=[2,3]>(r, v) t = Conv<strides=[4,3]>(r, w) y = GlobalMaxPool(t)",
    ],
)
def test_readers_that_skip_positions(readers: str) -> None:
    body = SIDE + "{ a = Conv<pads=[1,1,1,1]>(x, u) r = Relu(a) " + readers + "}"
    names = {"u": (8, 8, 3, 3), "v": (4, 8, 1, 1), "w": (4, 8, 1, 1)}
    model = parse(body, **{k: v for k, v in weights(**names).items() if f"{k})" in body})
    result, _, _ = run(model, HoistStride())
    assert strides(result)[0] == [2, 3]
    same(model, result, 1e-11, x=X)


@pytest.mark.parametrize(
    ("producer", "passed"),
    [
        ("a = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", True),
        ("a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,1]>(x)", True),
        ("a = MaxPool<kernel_shape=[3,3], ceil_mode=1, strides=[2,2]>(x)", False),
        ('a = Conv<auto_pad="SAME_UPPER">(x, u)', True),
        ("a = Softmax<axis=1>(x)", False),
    ],
)
def test_what_makes_the_skipped_positions(producer: str, passed: bool) -> None:
    body = SIDE + "{" + producer + " r = Sigmoid(a) s = Mul(a, r) y = Conv<strides=[2,2]>(s, v) }"
    names = {"u": (8, 8, 3, 3), "v": (4, 8, 1, 1)}
    model = parse(body, **{k: v for k, v in weights(**names).items() if f" {k})" in body})
    result, outcome, _ = run(model, HoistStride())
    assert (strides(result)[-1] == [1, 1]) == (passed or "Softmax" in producer or "ceil" in producer)
    assert bool(outcome.rewrites) == (strides(result) != strides(model))
    same(model, result, 1e-11, x=X)


@pytest.mark.parametrize(
    "between",
    [
        "r = Concat<axis=1>(a, x) ",
        "g = GlobalAveragePool(a) h = Sigmoid(g) r = Mul(x, h) ",  # the gate needs everything
        "r = BatchNormalization(a, s, s, s, s) ",
        "r = Clip(a, lo, hi) ",
    ],
)
def test_what_lies_between(between: str) -> None:
    body = SIDE + "{ a = Conv<pads=[1,1,1,1]>(x, u) " + between + "y = Conv<strides=[2,2]>(r, v) }"
    out = 16 if "Concat" in between else 8
    names = weights(u=(8, 8, 3, 3), v=(4, out, 1, 1))
    names |= {"s": np.abs(normal(8))} if "Batch" in between else {}
    names |= {"lo": np.float64(-1), "hi": np.float64(1)} if "Clip" in between else {}
    model = parse(body, **names)
    result, _, _ = run(model, HoistStride())
    assert macs(result) <= macs(model)
    same(model, result, 1e-12, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "{ a = Conv(x, u) r = Relu(a) s = Conv<strides=[2,2]>(r, v) t = Conv(r, w) m = GlobalMaxPool(s) n = GlobalMaxPool(t) y = Add(m, n) }",
        "{ a = Conv(x, u) r = Relu(a) y = Conv<strides=[2,2], pads=[1,1,1,1]>(r, v) }",
        "{ a = Conv(x, u) r = Relu(a) y = Conv<strides=[2,2]>(r, k) }",
        "{ a = Conv(x, u) r = Softmax<axis=2>(a) y = Conv<strides=[2,2]>(r, v) }",
    ],
)
def test_readers_that_look_everywhere(body: str) -> None:
    names = {"u": (8, 8, 1, 1), "v": (4, 8, 1, 1), "w": (4, 8, 1, 1), "k": (4, 8, 3, 3)}
    model = parse(SIDE + body, **{k: v for k, v in weights(**names).items() if f" {k})" in body})
    assert run(model, HoistStride())[0] is model


def test_automatic_padding_of_the_stride_before_is_kept() -> None:
    """At stride 1 it pads by 1 and 1; at stride 2, on an even size, it would by 0 and 1."""
    body = (
        '(double[2,8,12,10] x) => (double[N] y) { a = Conv<auto_pad="SAME_UPPER">(x, u) y = Conv<strides=[2,2]>(a, v) }'
    )
    model = parse(body, **weights(u=(8, 8, 3, 3), v=(4, 8, 1, 1)))
    result, _, _ = run(model, HoistStride())
    assert strides(result)[0] == [2, 2]
    same(model, result, 1e-11, x=normal(2, 8, 12, 10))


def test_a_scale_per_column_needs_every_column_in_its_place() -> None:
    body = SIDE + "{ a = Conv(x, u) r = Mul(a, k) y = Conv<strides=[2,2]>(r, v) }"
    model = parse(body, **weights(u=(8, 8, 1, 1), v=(4, 8, 1, 1), k=(11,)))
    assert run(model, HoistStride())[0] is model


def test_a_graph_output_is_needed_whole() -> None:
    body = "(double[2,8,13,11] x) => (double[N] y, double[N] r) { a = Conv(x, u) r = Relu(a) y = Conv<strides=[2,2]>(r, v) }"
    model = parse(body, **weights(u=(8, 8, 1, 1), v=(4, 8, 1, 1)))
    assert run(model, HoistStride())[0] is model


def test_subsampling_that_costs_more_than_it_saves_is_refused() -> None:
    body = SIDE + (
        "{ s1 = Softmax<axis=2>(x) s2 = Softmax<axis=3>(x) s3 = Softmax<axis=1>(x)"
        " r = Sum(s1, s2, s3) y = MaxPool<kernel_shape=[1,1], strides=[1,2]>(r) }"
    )
    model = parse(body)
    result, outcome, _ = run(model, HoistStride())
    assert result is model
    assert "would cost more" in reasons(outcome)[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_types_are_subsampled_by_a_slice(dtype: type) -> None:
    name = {np.float16: "float16", np.float32: "float"}[dtype]
    body = (
        f"({name}[2,8,13,11] x, {name}[2,8,13,11] z) => ({name}[N] y) "
        "{ a = Conv<pads=[1,1,1,1]>(x, u) w = Add(a, z) y = Conv<strides=[2,2]>(w, v) }"
    )
    model = parse(body, **{k: v.astype(dtype) for k, v in weights(u=(8, 8, 3, 3), v=(4, 8, 1, 1)).items()})
    result, _, _ = run(model, HoistStride())
    assert ops(result)["Slice" if dtype is np.float16 else "MaxPool"] == 1
    same(
        model,
        result,
        2e-2 if dtype is np.float16 else 1e-4,
        x=X.astype(dtype),
        z=normal(2, 8, 13, 11, seed=3, dtype=dtype),
    )


def test_dynamic_sizes() -> None:
    body = "(double[N,8,H,W] x) => (double[M] y) { a = Conv<pads=[1,1,1,1]>(x, u) r = Relu(a) y = Conv<strides=[2,2]>(r, v) }"
    model = parse(body, **weights(u=(8, 8, 3, 3), v=(4, 8, 1, 1)))
    result, _, _ = run(model, HoistStride(), sizes={"a": (1, 8, 9, 9), "r": (1, 8, 9, 9), "y": (1, 4, 5, 5)})
    assert strides(result) == [[2, 2], [1, 1]]
    for size in ((2, 8, 13, 11), (1, 8, 6, 7)):
        same(model, result, 1e-11, x=normal(*size))


STEP = st.sampled_from(["relu", "conv1", "conv3", "strided", "pool1", "residual", "norm", "pool3"])


@settings(max_examples=60)
@given(st.lists(STEP, min_size=2, max_size=7), st.integers(0, 3))
def test_random_stacks(steps: list[str], seed: int) -> None:
    lines, numbers, before, t = [], {}, "x", "x"
    for i, step in enumerate(steps):
        y = f"t{i}"
        if step in ("conv1", "conv3", "strided"):
            k, s, p = {"conv1": (1, 1, 0), "conv3": (3, 1, 1), "strided": (1, 2, 0)}[step]
            numbers[f"w{i}"] = normal(8, 8, k, k, seed=seed + i)
            lines.append(f"{y} = Conv<strides=[{s},{s}], pads=[{p},{p},{p},{p}]>({t}, w{i})")
        elif step == "residual":
            lines.append(
                f"{y} = Add({t}, {before})"
                if before != t and "strided" not in steps[:i] and "pool1" not in steps[:i]
                else f"{y} = Abs({t})"
            )
        elif step == "norm":
            numbers[f"s{i}"] = np.abs(normal(8, seed=i)) + 0.1
            lines.append(f"{y} = BatchNormalization({t}, s{i}, s{i}, s{i}, s{i})")
        else:
            call = {
                "relu": "Relu(%s)",
                "pool1": "MaxPool<kernel_shape=[1,1], strides=[2,2]>(%s)",
                "pool3": "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(%s)",
            }
            lines.append(f"{y} = {call[step] % t}")
        before, t = t, y
    one = SIDE.replace("2,8", "1,8").replace(
        " y)", f" {t})"
    )  # onnx's evaluator takes its time for each element to pool
    model = parse(one + "{" + " ".join(lines) + "}", **numbers)
    result, _, _ = run(model, HoistStride())
    assert macs(result) <= macs(model)
    same(model, result, 1e-9, x=X[:1])
