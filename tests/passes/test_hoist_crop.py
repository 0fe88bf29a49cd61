from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from helpers import normal, open_session, ops, parse, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure
from pwopt.passes import HoistCrop

X = normal(2, 3, 12, 10)
SIDE = "(double[2,3,12,10] x) => (double[N] y) "
CROP = {"a": np.array([4, 3]), "e": np.array([9, 8]), "d": np.array([2, 3])}


def macs(model: onnx.ModelProto) -> int:
    return measure(View(from_proto(model).graph)).macs


def order(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node if n.op_type != "Constant"]


@pytest.mark.parametrize("call", ["Relu(x)", "Mul(x, x)", "Mul(x, g)"])
def test_elementwise_operators_compute_what_is_kept(call: str) -> None:
    gate = "g = GlobalAveragePool(x) " if "g)" in call else ""
    model = parse(SIDE + "{" + gate + f"r = {call} y = Slice(r, a, e, d) }}", **CROP)
    result, _, _ = run(model, HoistCrop())
    assert order(result)[-2:] == ["Slice", call.partition("(")[0]]
    same(model, result, x=X)


def test_two_inputs_are_cropped_if_that_saves_enough() -> None:
    body = "(double[2,3,12,10] x, double[2,3,12,10] z) => (double[N] y) { r = Add(x, z) y = Slice(r, a, e, d) }"
    model = parse(body, **CROP)
    result, _, _ = run(model, HoistCrop())
    assert order(result) == ["Slice", "Slice", "Add"]
    same(model, result, x=X, z=normal(2, 3, 12, 10, seed=1))
    barely = CROP | {"a": np.array([0, 0]), "e": np.array([12, 9])}
    result, outcome, _ = run(parse(body, **barely), HoistCrop())
    assert order(result) == ["Add", "Slice"]
    assert "cost more than it saves" in reasons(outcome)[0]


def test_a_crop_moves_all_the_way_up() -> None:
    body = (
        SIDE
        + "{ p = Conv<pads=[1,1,1,1]>(x, u, b) q = Relu(p) r = Conv<pads=[2,2,2,2], dilations=[2,2]>(q, v) y = Slice(r, a, e, d) }"
    )
    model = parse(body, u=normal(4, 3, 3, 3), v=normal(5, 4, 3, 3), b=normal(4), **CROP)
    result, outcome, _ = run(model, HoistCrop())
    assert order(result) == ["Slice", "Conv", "Relu", "Conv"]
    assert macs(result) < macs(model)
    assert len(outcome.rewrites) == 3
    same(model, result, x=X)


@settings(max_examples=120)
@given(
    kernel=st.sampled_from([1, 2, 3, 5]), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    begin=st.integers(0, 4), end=st.integers(0, 4), first=st.integers(0, 11), length=st.integers(1, 12),
    pool=st.sampled_from(["", "MaxPool", "AveragePool0", "AveragePool1"]),
)  # fmt: skip
def test_every_window(
    kernel: int, stride: int, dilation: int, begin: int, end: int, first: int, length: int, pool: str
) -> None:
    size = (12 + begin + end - dilation * (kernel - 1) - 1) // stride + 1
    dilation = 1 if pool else dilation
    if pool:
        begin, end = min(begin, kernel - 1), min(end, kernel - 1)
        size = (12 + begin + end - kernel) // stride + 1
    first, last = min(first, size - 1), min(first + length, size)
    if size < 1 or last <= first:
        return
    attrs = f"strides=[{stride},1], pads=[{begin},0,{end},0]"
    call = f"Conv<{attrs}, dilations=[{dilation},1]>(x, w, b)"
    if pool:
        include = f", count_include_pad={pool[-1]}" if pool != "MaxPool" else ""
        call = f"{pool.rstrip('01')}<{attrs}, kernel_shape=[{kernel},1]{include}>(x)"
    model = parse(
        SIDE + f"{{ r = {call} y = Slice(r, a, e, d) }}",
        a=np.array([first]), e=np.array([last]), d=np.array([2]),
        **({} if pool else {"w": normal(2, 3, kernel, 1), "b": normal(2)}),
    )  # fmt: skip
    result, _, _ = run(model, HoistCrop())
    assert macs(result) <= macs(model)
    if pool == "MaxPool":  # the reference evaluator fails on some paddings of the original
        pytest.importorskip("onnxruntime")
        a, b = (open_session(m).run(None, {"x": X})[0] for m in (model, result))
        np.testing.assert_array_equal(a, b)
    else:
        same(model, result, 1e-10, x=X)


def test_cropping_what_padding_made_only_removes_the_padding() -> None:
    body = SIDE + "{ r = Conv<pads=[2,0,1,0]>(x, w) y = Slice(r, a, e, d) }"
    model = parse(body, w=normal(4, 3, 2, 1), a=np.array([2]), e=np.array([13]), d=np.array([2]))
    result, _, _ = run(model, HoistCrop())
    assert order(result) == ["Conv"]
    same(model, result, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "{ p = Conv(x, u) y = Slice(p, a, e, c) }",  # channels
        "{ p = Conv(x, u) y = Slice(p, a, e, d, s) }",  # in steps
        "{ p = Relu(x) q = Slice(p, a, e, d) r = GlobalAveragePool(p) y = Add(q, r) }",  # needed whole
        "{ p = Softmax<axis=2>(x) y = Slice(p, a, e, d) }",
        "{ p = AveragePool<kernel_shape=[2,2], ceil_mode=1>(x) y = Slice(p, a, e, d) }",
        "{ p = Conv(x, k) y = Slice(p, one, two, one) }",  # channels that are mixed
        "{ p = Conv(x, k) y = Slice(p, one, two, zero) }",  # a sample
        "{ p = Conv(x, k) y = Slice(p, two, two, two) }",  # nothing
    ],
)
def test_refusals(body: str) -> None:
    numbers = CROP | {"u": normal(12, 3, 3, 3), "c": np.array([1, 2]), "s": np.array([2, 1]), "k": normal(3, 3, 1, 1)}
    numbers |= {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    used = {k: v for k, v in numbers.items() if f" {k})" in body or f" {k}," in body}
    model = parse(SIDE + body, **used)
    assert run(model, HoistCrop())[0] is model


def test_old_spellings_stay() -> None:
    model = parse(SIDE + "{ p = Relu(x) y = Slice<axes=[2],starts=[2],ends=[5]>(p) }", 9)
    assert run(model, HoistCrop())[0] is model


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape=[3,3]>(x)", "AveragePool<kernel_shape=[2,2]>(x)"])
def test_pooling_computes_what_is_kept(pool: str) -> None:
    model = parse(SIDE + f"{{ p = {pool} y = Slice(p, a, e, d) }}", **CROP)
    result, _, _ = run(model, HoistCrop())
    assert order(result) == ["Slice", pool.partition("<")[0]]
    same(model, result, x=X)


def test_a_dynamic_size_is_told() -> None:
    model = parse(
        "(double[2,3,H,10] x) => (double[N] y) { p = Conv(x, u) y = Slice(p, a, e, d) }", u=normal(4, 3, 3, 3), **CROP
    )
    result, _, _ = run(model, HoistCrop())
    assert result is model


def test_all_pairs_of_axes() -> None:
    for axes in itertools.permutations([2, 3]):
        model = parse(
            SIDE + "{ r = Conv<pads=[1,1,1,1]>(x, w) y = Slice(r, a, e, d) }",
            w=normal(4, 3, 3, 3),
            **(CROP | {"d": np.array(axes)}),
        )
        result, _, _ = run(model, HoistCrop())
        assert ops(result) == {"Slice": 1, "Conv": 1}
        same(model, result, x=X)


def test_a_crop_of_padding_alone_stays() -> None:
    model = parse(
        SIDE + "{ r = Conv<pads=[5,0,5,0]>(x, w, b) y = Slice(r, a, e, d) }", w=normal(4, 3, 2, 1), b=normal(4),
        a=np.array([0]), e=np.array([2]), d=np.array([2]),
    )  # fmt: skip
    result, outcome, _ = run(model, HoistCrop())
    assert result is model
    assert "padding alone" in reasons(outcome)[0]
