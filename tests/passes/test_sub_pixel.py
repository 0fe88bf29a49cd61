from __future__ import annotations

import helpers
import numpy as np
import pytest
from helpers import build, normal, ops, reasons, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.passes import SubPixel

HEAD = "(double[2,3,5,7] x) => (double[N] y) "
T = "ConvTranspose<strides=[2,2]>"
CONSTANTS = {
    "u": normal(3, 4, 2, 2), "a": normal(4), "v": normal(4, 1, 2, 2, seed=1), "b": normal(1), "w": normal(8, 3, 3, 3, seed=2),
    "c": normal(8), "p": normal(5, 2, 1, 1, seed=3), "q": normal(6, 4, 1, 1), "d": normal(5, 4, 3, 3), "g": normal(8, 1, 3, 3),
    "h": normal(4, 2, 1, 1),
}  # fmt: skip
X = normal(2, 3, 5, 7)


def eager() -> SubPixel:
    p = helpers.eager(SubPixel)
    assert isinstance(p, SubPixel)
    return p


def test_a_text_detectors_head_is_put_together_at_last() -> None:
    body = f"{{ h1 = {T}(x, u, a) r = Relu(h1) h2 = {T}(r, v, b) y = Sigmoid(h2) }}"
    model = build(HEAD + body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert ops(result) == {"Conv": 6, "Relu": 2, "Sigmoid": 4, "Transpose": 5, "Reshape": 5, "Concat": 1}
    (rewrite,) = outcome.rewrites
    assert rewrite.macs_after == rewrite.macs_before
    assert rewrite.reason == "2 maps to 4×4 phases (3→4→1) are interleaved at the end"
    same(model, result, x=X)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("before", ["k = Relu(m)", "k = Identity(m)", "s = Sigmoid(m) k = Mul(m, s)"])
def test_pixel_shuffles(mode: str, before: str) -> None:
    body = f'{{ m = Conv<pads=[1,1,1,1]>(x, w, c) {before} t = DepthToSpace<blocksize=2, mode="{mode}">(k) e = Conv(t, p) y = Tanh(e) }}'
    model = build(HEAD + body, CONSTANTS)
    from pwopt.passes import CleanUp

    result, outcome, _ = run(model, CleanUp(), eager())
    assert ops(result)["DepthToSpace"] == 0
    assert ops(result)["Conv"] == 4
    assert outcome.rewrites[-1].macs_after == outcome.rewrites[-1].macs_before
    same(model, result, x=X)


@pytest.mark.parametrize(
    "after", ["Relu(h1)", "Conv(h1, q)", "Conv<pads=[1,1,1,1]>(h1, d)", "MaxPool<kernel_shape=[2,2]>(h1)"]
)
def test_what_follows_runs_on_phases_if_it_reads_every_position_alone(after: str) -> None:
    model = build(HEAD + f"{{ h1 = {T}(x, u, a) y = {after} }}", CONSTANTS)
    result, _, _ = run(model, eager())
    alone = "Relu" in after or "q" in after
    assert (result.graph.node[-1].op_type == "Transpose") == alone
    same(model, result, x=X)


@pytest.mark.parametrize("size", ["N,3,H,W", "2,3,H,7"])
def test_sizes_that_are_not_known(size: str) -> None:
    body = f"(double[{size}] x) => (double[N] y) {{ h1 = {T}(x, u, a) r = Relu(h1) h2 = {T}(r, v, b) y = Sigmoid(h2) }}"
    model = build(body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == 1
    for h, w in ((5, 7), (1, 7), (4, 7)):
        same(model, result, x=normal(2, 3, h, w))
    old = build(body, CONSTANTS, opset=12)
    result, outcome, _ = run(old, eager())
    assert len(outcome.rewrites) == 1
    same(old, result, x=normal(2, 3, 4, 7))


@pytest.mark.parametrize("size", ["N,3,H,W", "N,3,H,7", "N,3,5,W", "N,3,5,7"])
@pytest.mark.parametrize("opset", [12, 17])
def test_an_empty_batch(size: str, opset: int) -> None:
    pytest.importorskip("onnxruntime")
    from judge import widened  # onnx's evaluator has no ConvTranspose of an empty batch

    body = f"(double[{size}] x) => (double[N] y) {{ h1 = {T}(x, u, a) r = Relu(h1) h2 = {T}(r, v, b) y = Sigmoid(h2) }}"
    result, outcome, _ = run(build(body, CONSTANTS, opset=opset), eager())
    assert len(outcome.rewrites) == 1
    assert widened(result)({"x": normal(0, 3, 5, 7)})[0].shape == (0, 1, 20, 28)


@pytest.mark.parametrize(
    "call",
    [
        "ConvTranspose<strides=[3,3]>(x, u)",
        "ConvTranspose<strides=[2,2], pads=[0,0,1,1]>(x, u)",
        "ConvTranspose<strides=[2,2], output_padding=[1,1]>(x, u)",
        "ConvTranspose<strides=[2,2], dilations=[2,2]>(x, u)",
        "DepthToSpace<blocksize=2>(j)",
    ],
)
def test_windows_that_overlap_and_shuffles_of_anything_stay(call: str) -> None:
    model = build(f"(double[2,3,5,7] x, double[2,8,5,7] j) => (double[N] y) {{ t = {call} y = Relu(t) }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert result is model
    assert not outcome.skips


@pytest.mark.parametrize(
    "body",
    [
        "m = Conv(x, o) y = SpaceToDepth<blocksize=2>(m)",
        "m = Conv(x, o) y = DepthToSpace<blocksize=3>(m)",  # 8 channels are not so many
        "m = Conv(x, o) k = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(m) y = DepthToSpace<blocksize=2>(k)",
        "m = Conv(x, o) r = Relu(m) k = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r) y = DepthToSpace<blocksize=2>(k)",
        "m = Conv(x, o) k = Add(m, j) y = DepthToSpace<blocksize=2>(k)",
        "m = RandomNormal<dtype=11, shape=[2,8,6,6]>() y = DepthToSpace<blocksize=2>(m)",
    ],
)
def test_what_only_looks_like_a_pixel_shuffle_stays(body: str) -> None:
    model = build(
        f"(double[2,3,6,6] x, double[2,8,6,6] j) => (double[N] y) {{ {body} }}", CONSTANTS | {"o": normal(8, 3, 1, 1)}
    )
    assert run(model, eager())[0] is model


def test_three_axes_stay() -> None:
    """Phases are put together along one or two axes."""
    model = build(
        "(double[1,3,2,3,4] x) => (double[N] y) { t = ConvTranspose<strides=[2,2,2]>(x, k) y = Relu(t) }",
        {"k": normal(3, 4, 2, 2, 2)},
    )
    assert run(model, eager())[0] is model


def test_nothing_is_put_together_of_nothing() -> None:
    model = build(f"(double[0,3,5,7] x) => (double[N] y) {{ y = {T}(x, u, a) }}", CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert result is model
    assert reasons(outcome) == ["its output is empty"]


def test_groups_stay() -> None:
    for body in (
        "m = Conv<pads=[1,1,1,1], group=8>(j, g) y = DepthToSpace<blocksize=2>(m)",
        f"y = {T}<group=3>(x, u)".replace("]><", "], "),
    ):
        model = build(f"(double[2,3,5,7] x, double[2,8,5,7] j) => (double[N] y) {{ {body} }}", CONSTANTS)
        assert run(model, eager())[0] is model
    model = build(HEAD + f"{{ h1 = {T}(x, u) y = Conv<group=2>(h1, h) }}", CONSTANTS)
    result, _, _ = run(model, eager())
    assert result.graph.node[-1].op_type == "Conv"
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "t = Relu(x) y = ConvTranspose<strides=[2,2]>(x, u) z = ConvTranspose<strides=[2,2]>(t, u)",
            "the weight 'u' is shared",
        ),
        (
            "m = ConvTranspose<strides=[16,16]>(x, f) y = Relu(m) z = Relu(x)",
            "1 map to 16×16 phases are too many (the limit is 64)",
        ),
        ("m = ConvTranspose<strides=[2,2]>(x, u) y = Conv(m, i) z = Relu(x)", "its weights are not finite"),
    ],
)
def test_refusals_have_reasons(body: str, reason: str) -> None:
    constants = CONSTANTS | {"f": normal(3, 2, 16, 16), "i": np.full((5, 4, 1, 1), np.inf)}
    model = build(f"(double[2,3,5,7] x) => (double[N] y, double[M] z) {{ {body} }}", constants)
    result, outcome, _ = run(model, eager())
    assert result is model
    assert reasons(outcome)[0] == reason


def test_what_others_read_ends_the_chain() -> None:
    body = f"(double[2,3,5,7] x) => (double[N] y, double[M] z) {{ h1 = {T}(x, u, a) z = Relu(h1) h2 = {T}(z, v, b) y = Relu(h2) }}"
    model = build(body, CONSTANTS)
    result, outcome, _ = run(model, eager())
    assert len(outcome.rewrites) == 2
    same(model, result, x=X)
    body = "(double[2,3,5,7] x) => (double[N] y, double[M] m) { m = Conv<pads=[1,1,1,1]>(x, w) y = DepthToSpace<blocksize=2>(m) }"
    model = build(body, CONSTANTS)
    assert run(model, eager())[0] is model


def test_not_without_measuring() -> None:
    model = build(HEAD + f"{{ y = {T}(x, u, a) }}", CONSTANTS)
    result, outcome, _ = run(model, SubPixel())
    assert result is model
    assert "only measuring" in reasons(outcome)[0]


@given(st.data())
@settings(max_examples=60)
def test_any_chain(data: st.DataObject) -> None:
    """Of transposed convolutions, pointwise maps and activations, over one or two axes."""
    rank, width, count = data.draw(st.integers(1, 2)), 3, data.draw(st.integers(1, 4))
    body, constants, tensor = "", {}, "x"
    for i in range(count):
        kind = data.draw(st.sampled_from(["spread", "pointwise", "activation"] if i else ["spread"]))
        out = data.draw(st.integers(1, 4))
        if kind == "activation":
            body += f"t{i} = {data.draw(st.sampled_from(['Relu', 'Tanh', 'Abs']))}({tensor}) "
        else:
            kernel = [data.draw(st.integers(1, 3)) if kind == "spread" else 1 for _ in range(rank)]
            shape = (width, out) if kind == "spread" else (out, width)
            constants |= {f"w{i}": normal(*shape, *kernel, seed=i), f"b{i}": normal(out, seed=i)}
            call = f"ConvTranspose<strides={kernel}>" if kind == "spread" else "Conv"
            body += f"t{i} = {call}({tensor}, w{i}, b{i}) "
            width = out
        tensor = f"t{i}"
    size = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    model = build(f"(double[2,3,{','.join(map(str, size))}] x) => (double[N] {tensor}) {{ {body} }}", constants)
    result, outcome, _ = run(model, eager())
    assert outcome.rewrites or outcome.skips
    same(model, result, x=normal(2, 3, *size))
