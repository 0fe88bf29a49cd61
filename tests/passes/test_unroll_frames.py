from __future__ import annotations

import helpers
import numpy as np
import pytest
from helpers import build, normal, ops, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes import UnrollFrames, unroll_frames

HEAD = "(double[1,4,5,6,7] x) => (double[N] y) "
SAME = "pads=[1,1,1,1,1,1]"
CONSTANTS = {
    "d": normal(4, 1, 3, 3, 3), "b": normal(4), "w": normal(6, 4, 1, 1, 1), "v": normal(4, 6, 1, 1, 1), "t": normal(4, 4, 3, 1, 1),
    "s": normal(4, 4, 1, 3, 3), "k": normal(4, 4, 3, 3, 3), "g": normal(2, 4, 1, 1, 1), "h": normal(4, 2, 1, 1, 1),
    "c": normal(4, 1, 1, 1), "f": normal(4, 5, 1, 1), "e": normal(5, 1, 1), "n": normal(1, 4, 1, 6, 7), "m": normal(7),
    "one": np.ones(4), "two": np.array([2, 3, 4]),
}  # fmt: skip
X = normal(1, 4, 5, 6, 7)


def eager() -> UnrollFrames:
    p = helpers.eager(UnrollFrames)
    assert isinstance(p, UnrollFrames)
    return p


def test_a_block_of_x3d_runs_frame_by_frame() -> None:
    body = f"""{{ a = Conv(x, w) r = Relu(a) q = Conv(r, v) z = Conv<{SAME}, group=4>(q, d, b)
        p = GlobalAveragePool(z) p1 = Conv(p, g) p2 = Relu(p1) p3 = Conv(p2, h) p4 = Sigmoid(p3) o = Mul(z, p4)
        y = Add(o, x) }}"""
    model = build(HEAD + body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    found = ops(result)
    assert found["Conv"] == 5 + 5 + (3 * 5 - 2) + 1 + 1  # no tap reaches beyond the first and the last frame
    assert found["Add"] == 2 * 5 - 2 + 5
    assert found["Squeeze"] == found["Unsqueeze"] == found["Relu"] - 1 == 5
    assert found["Split"] == found["Concat"] == found["Mean"] == found["Sigmoid"] == 1
    assert not found.keys() & {"Pad", "Slice", "Transpose"}
    (rewrite,) = outcome.rewrites
    assert rewrite.reason == "1 3-D convolution and 10 other operators around it run on each of 5 frames"
    same(model, result, x=X)


def test_frames_share_weights_and_constants() -> None:
    model = build(HEAD + f"{{ z = Conv<{SAME}>(x, k, b) u = Mul(z, c) y = Add(u, f) }}", CONSTANTS)
    result, _, _ = run(model, eager())
    shapes = [tuple(t.dims) for t in result.graph.initializer]
    assert shapes.count((4, 4, 3, 3)) == 3  # one for each tap
    assert shapes.count((4, 1, 1)) == 1 + 5  # the factor is the same for all frames, the shift is not


@pytest.mark.parametrize(
    "after",
    [
        "Relu(z)", "Mul(z, c)", "Add(z, f)", "Sub(z, e)", "Mul(z, n)", "Add(z, m)", "Div(one_, z)", "Tanh(z)",
        "BatchNormalization(z, one, b, b, one)", "ReduceMax<axes=[3]>(z)", "ReduceL2<axes=[1,-1]>(z)", "AveragePool<kernel_shape=[2,1,1], strides=[2,1,1]>(z)",
        "MaxPool<kernel_shape=[1,2,2], strides=[1,2,2]>(z)", "AveragePool<kernel_shape=[1,3,3], pads=[0,1,1,0,1,1]>(z)",
        "AveragePool<kernel_shape=[5,6,7]>(z)", "AveragePool<kernel_shape=[3,2,2], pads=[0,1,0,0,0,1]>(z)", "Concat<axis=1>(z, z)", "Conv(z, w)", "Conv<pads=[1,0,0,1,0,0]>(z, t)",
        "Conv<pads=[0,1,1,0,1,1]>(z, s)", "Conv<strides=[2,2,2]>(z, k)", "GlobalAveragePool(z)", "Identity(z)",
    ],
)  # fmt: skip
def test_operators_that_run_on_frames(after: str) -> None:
    constants = CONSTANTS | {"one_": np.array(1.0)}
    model = build(HEAD + f"{{ z = Conv<{SAME}>(x, k, b) y = {after} }}", constants)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == 1
    operator = after.partition("<")[0].partition("(")[0]
    whole = [n for n in result.graph.node if n.op_type == operator and any(t in "xyz" for t in (*n.input, *n.output))]
    assert len(whole) == (operator == "Concat")  # which joins the frames of the output
    same(model, result, x=X, tolerance=1e-8)


@pytest.mark.parametrize(
    "after",
    [
        "Softmax<axis=2>(z)", "ReduceMean<axes=[2,3,4]>(z)", "Concat<axis=2>(z, x)", "Slice(z, i0, i1, i2)",
        "AveragePool<kernel_shape=[2,1,1], pads=[1,0,0,0,0,0]>(z)", "Conv<pads=[4,0,0,0,0,0]>(z, w)", "MaxPool<kernel_shape=[2,1,1]>(z)", "MaxPool<kernel_shape=[1,2,2], ceil_mode=1>(z)",
        "Reshape(z, flat)", "ReduceMean<axes=[2,3,4], keepdims=0>(z)", "ReduceMean<axes=[0]>(z)", "ReduceMean(z)",
        "Mul(z, z2)", "AveragePool<kernel_shape=[1,2,2], pads=[1,0,0,0,0,0], count_include_pad=1>(z)", "GlobalMaxPool(z)",
        "AveragePool<kernel_shape=[1,2,2], pads=[0,0,0,1,0,0], count_include_pad=1>(z)",
    ],
)  # fmt: skip
def test_others_do_not(after: str) -> None:
    constants = CONSTANTS | {"flat": np.array([4, -1]), "z2": normal(2, 4, 5, 6, 7)}
    constants |= {"i0": np.array([1]), "i1": np.array([3]), "i2": np.array([2])}
    model = build(HEAD + f"{{ z = Conv<{SAME}>(x, k, b) y = {after} }}", constants)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == 1
    assert any(n.output[0] == "y" and n.op_type == after.partition("<")[0].partition("(")[0] for n in result.graph.node)
    same(model, result, x=X, tolerance=1e-8)


def test_what_is_made_of_constants_stays() -> None:
    """It has no frames: in the shape in which it would broadcast to them, it has an axis less."""
    model = build(
        f"(double[1,4,5,6,7] x) => (double[N] y) {{ r = Relu(n) z = Conv<{SAME}>(r, k) y = Add(z, x) }}", CONSTANTS
    )
    result, _, _ = run(model, eager())
    assert ops(result)["Relu"] == 1
    assert ops(result)["Conv"] == 1  # with one frame, only one tap reaches it
    same(model, result, x=X)


def test_a_stride_over_time_moves_frames() -> None:
    """Also where there are as many of them after as before, since zeros were put around."""
    body = "(double[1,4,2,6,7] x) => (double[N] y) { y = Conv<strides=[2,1,1], pads=[1,1,1,3,1,1]>(x, k) }"
    model = build(body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == 1
    same(model, result, x=normal(1, 4, 2, 6, 7))


def test_outputs_that_are_left_out_have_no_size() -> None:
    model = build(HEAD + f"{{ z = Conv<{SAME}>(x, k, b) r, left = Dropout(z) y = Relu(r) }}", CONSTANTS)
    model.graph.node[1].output[1] = ""
    result, _, _ = run(model, eager())
    assert {n.op_type for n in result.graph.node if n.output[0] == "y"} == {"Concat"}


def test_regions_are_connected() -> None:
    """By operators that run on frames, not by others; and by nothing of which the rank is not known."""
    body = f"(double[1,4,5,6,7] x, int64[K] q) => (double[N] y) {{ p = Softmax<axis=2>(x) a = Conv<{SAME}>(p, k) o = Conv<{SAME}>(p, d2) u = Concat<axis=0>(a, o) r = Reshape(u, q) y = Reshape(r, flat) }}"
    model = build(body, CONSTANTS | {"d2": normal(4, 4, 3, 3, 3, seed=1), "flat": np.array([-1])})
    assert len(run(model, eager())[1].rewrites) == 2


@pytest.mark.parametrize("size", ["2,4,5,6,7", "N,4,5,6,7", "1,4,T,6,7", "1,4,5,H,7", "1,4,0,6,7"])
def test_several_videos_and_sizes_that_are_not_known_stay(size: str) -> None:
    model = build(f"(double[{size}] x) => (double[N] y) {{ y = Conv<{SAME}>(x, k) }}", CONSTANTS)
    assert run(model, eager())[0] is model


@pytest.mark.parametrize("call", ["Conv(x, w)", "Conv<pads=[1,0,0,1,0,0]>(x, t)"])
def test_what_leaves_the_plane_alone_is_left_to_others(call: str) -> None:
    model = build(HEAD + f"{{ y = {call} }}", CONSTANTS)
    assert run(model, eager())[0] is model


def test_an_old_opset_stays() -> None:
    model = build(HEAD + f"{{ y = Conv<{SAME}>(x, k) }}", CONSTANTS, opset=12)
    assert run(model, eager())[0] is model


def test_weights_that_are_not_known_or_not_finite_stay() -> None:
    body = f"(double[1,4,5,6,7] x, double[4,4,3,3,3] k) => (double[N] y) {{ y = Conv<{SAME}>(x, k) }}"
    model = build(body, {})
    assert run(model, eager())[0] is model
    model = build(HEAD + f"{{ y = Conv<{SAME}>(x, k) }}", CONSTANTS | {"k": np.full((4, 4, 3, 3, 3), np.inf)})
    assert run(model, eager())[0] is model


def test_a_frame_that_no_tap_reaches_keeps_the_convolution() -> None:
    model = build(HEAD + "{ y = Conv<pads=[3,1,1,0,1,1]>(x, k, b) }", CONSTANTS)
    assert run(model, eager())[0] is model


def test_many_frames_are_not_unrolled() -> None:
    model = build(f"(double[1,4,17,6,7] x) => (double[N] y) {{ y = Conv<{SAME}>(x, k) }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert result is model
    why = "a region of 1 3-D convolution could run frame by frame, but a tensor has 17 frames, and at most 16 are unrolled"
    assert reasons(outcome) == [why]


def test_many_operators_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most five convolutions and four additions for each of the frames."""
    model = build(HEAD + f"{{ z = Conv<{SAME}>(x, k) y = Relu(z) }}", CONSTANTS)
    monkeypatch.setattr(unroll_frames, "MAX_OPERATORS", 5 * 5 + 5)
    assert len(run(model, eager())[1].rewrites) == 1
    monkeypatch.setattr(unroll_frames, "MAX_OPERATORS", 5 * 5 + 4)
    result, outcome, _ = run(model, eager())
    assert result is model
    assert reasons(outcome)[0].endswith("but it would become 30 operators, more than 29")


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_in_the_words_of_each_opset(opset: int) -> None:
    model = build(HEAD + f"{{ y = Conv<{SAME}>(x, k) }}", CONSTANTS, opset=opset)
    result, _, _ = run(model, eager())
    (split,) = (n for n in result.graph.node if n.op_type == "Split")
    assert {a.name for a in split.attribute} == {"axis", "num_outputs"} - ({"num_outputs"} if opset < 18 else set())
    same(model, result, x=X)


def test_not_without_measuring() -> None:
    model = build(HEAD + f"{{ y = Conv<{SAME}>(x, k) }}", CONSTANTS)
    result, outcome, _ = run(model, UnrollFrames())
    assert result is model
    assert "only measuring" in reasons(outcome)[0]


@given(st.data())
@settings(max_examples=60)
def test_any_convolution(data: st.DataObject) -> None:
    kernel = [data.draw(st.integers(1, 3)) for _ in range(3)]
    pads = [data.draw(st.integers(0, 2)) for _ in range(6)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(3)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(3)]
    groups = data.draw(st.sampled_from([1, 2, 4]))
    size = [d * (k - 1) + 1 + data.draw(st.integers(0, 3)) for d, k in zip(dilations, kernel, strict=True)]
    call = f"Conv<pads={pads}, strides={strides}, dilations={dilations}, group={groups}>(x, q, b)"
    constants = {"q": normal(4, 4 // groups, *kernel), "b": normal(4)}
    model = build(f"(double[1,4,{','.join(map(str, size))}] x) => (double[N] y) {{ y = {call} }}", constants)
    result, outcome, _ = run(model, eager())
    frames = result.graph.node[-1].op_type != "Conv"
    assert len(outcome.rewrites) == frames
    assert frames <= any(k > 1 for k in kernel[1:])
    same(model, result, x=normal(1, 4, *size))
