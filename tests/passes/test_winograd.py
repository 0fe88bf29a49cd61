from __future__ import annotations

from fractions import Fraction

import helpers
import numpy as np
import pytest
from helpers import normal, ops, parse, reasons, run, same

from pwopt.passes import Winograd
from pwopt.passes.winograd import FILTER_TRANSFORM, ROWS
from pwopt.rewriting.driver import Pass

WIDE = 48


def eager() -> Pass:
    """The pass on maps of any size."""
    p = helpers.eager(Winograd)
    p.min_gain = 0.0  # type: ignore[attr-defined]
    return p


def side(size: str = "2,48,6,8", kind: str = "double") -> str:
    return f"({kind}[{size}] x) => ({kind}[N] y) "


def test_the_transforms_are_a_polynomial_identity() -> None:
    """Aᵀ((G·w) ⊙ (Bᵀ·x)) = w ∗ x on one axis in exact fractions: for unit vectors, and so for all, since it is bilinear."""
    b = [[0] * 4 for _ in ROWS]
    for row, (first, distance, signs) in zip(b, ROWS, strict=True):
        row[first], row[first + distance] = signs
    a = [[1, 1, 1, 0], [0, 1, -1, -1]]
    g = [[Fraction(v) for v in row] for row in FILTER_TRANSFORM.tolist()]
    for tap in range(3):
        for place in range(4):
            product = [g[k][tap] * b[k][place] for k in range(4)]
            found = [sum(a[o][k] * product[k] for k in range(4)) for o in range(2)]
            assert found == [int(place == o + tap) for o in range(2)]


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 5), (9, 7), (1, 2), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution(size: tuple[int, int], biased: bool) -> None:
    height, width = size
    body = side(f"2,48,{height},{width}") + f"{{ y = Conv<pads=[1,1,1,1]>(x, w{', b' if biased else ''}) }}"
    model = parse(body, w=normal(40, WIDE, 3, 3), **({"b": normal(40)} if biased else {}))
    result, outcome, _ = run(model, eager())
    odd = height % 2 or width % 2
    expected = {
        "Conv": 16 + 16 + 6,
        "Add": 24,
        "Concat": 3,
        "Transpose": 3,
        "Reshape": 3,
        **({"Slice": 1} if odd else {}),
    }
    assert ops(result) == expected
    tiles = -(-height // 2) * -(-width // 2)
    assert outcome.rewrites[0].macs_after == 2 * tiles * 16 * WIDE * (40 + 4) + 2 * tiles * 6 * 40
    same(model, result, x=normal(2, WIDE, height, width))


@pytest.mark.parametrize("body", ["y = Relu(c)", "s = Sigmoid(c) y = Mul(c, s)", "y = Clip(c, low, high)"])
def test_an_activation_comes_before_the_tiles_are_put_together(body: str) -> None:
    bounds = {k: np.float64(v) for k, v in (("low", -1), ("high", 2)) if k in body}
    model = parse(side() + f"{{ c = Conv<pads=[1,1,1,1]>(x, w) {body} }}", w=normal(WIDE, WIDE, 3, 3), **bounds)
    result, _, _ = run(model, eager())
    assert result.graph.node[-1].op_type == "Transpose"
    assert result.graph.node[-1].output[0] == "y"
    same(model, result, x=normal(2, WIDE, 6, 8))


def test_what_others_read_too_is_not_activated() -> None:
    model = parse("(double[2,48,6,8] x) => (double[N] y, double[M] c) { c = Conv<pads=[1,1,1,1]>(x, w) y = Relu(c) }",
                  w=normal(WIDE, WIDE, 3, 3))  # fmt: skip
    result, _, _ = run(model, eager())
    assert ops(result)["Relu"] == 1
    same(model, result, x=normal(2, WIDE, 6, 8))


def test_it_takes_fewer_multiply_adds() -> None:
    model = parse(side() + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(96, WIDE, 3, 3))
    _, outcome, _ = run(model, eager())
    assert outcome.rewrites[0].macs_after < outcome.rewrites[0].macs_before / 1.9


def test_float32_is_as_accurate_as_rounding() -> None:
    pytest.importorskip("onnxruntime")
    import pwopt

    model = parse(side("1,48,14,14", "float") + "{ y = Conv<pads=[1,1,1,1]>(x, w) }",
                  w=normal(WIDE, WIDE, 3, 3, dtype=np.float32))  # fmt: skip
    result, _, _ = run(model, eager())
    output = pwopt.verify(model, result).outputs[0]
    assert output.passed
    assert output.snr_db is not None
    assert output.snr_db > 120


CALLS = [
    "Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)",
    "Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w)",
    "Conv(x, w)",
    "Conv<pads=[1,1,0,0]>(x, w)",
    "Conv<pads=[1,1,1,1], group=2>(x, h)",
    "Conv<pads=[2,2,2,2]>(x, k)",
]


@pytest.mark.parametrize("call", CALLS)
def test_other_convolutions_stay(call: str) -> None:
    """Strided, dilated, otherwise padded and grouped ones, and larger kernels."""
    names = {"w": normal(WIDE, WIDE, 3, 3), "h": normal(WIDE, 24, 3, 3), "k": normal(WIDE, WIDE, 5, 5)}  # fmt: skip
    used = {k: v for k, v in names.items() if f" {k})" in call}
    model = parse(side() + f"{{ y = {call} }}", **used)
    assert run(model, eager())[0] is model


def test_refusals_have_reasons() -> None:
    shared = parse(side() + "{ a = Conv<pads=[1,1,1,1]>(x, w) b = Conv<pads=[1,1,1,1]>(a, w) y = Relu(b) }",
                   w=normal(WIDE, WIDE, 3, 3))  # fmt: skip
    result, outcome, _ = run(shared, eager())
    assert result is shared
    assert "shared" in reasons(outcome)[0]


@pytest.mark.parametrize("size", ["2,48,H,W", "N,48,H,W", "N,48,H,8", "2,48,6,W", "2,48,7,W"])
def test_sizes_that_are_not_known(size: str) -> None:
    """The padding of odd sizes serves even ones too; what lies beyond is cut off."""
    model = parse(side(size) + "{ y = Conv<pads=[1,1,1,1]>(x, w, b) }", w=normal(40, WIDE, 3, 3), b=normal(40))
    result, outcome, _ = run(model, eager(), sizes={"x": (2, WIDE, 6, 8), "y": (2, 40, 6, 8)})
    assert outcome.rewrites[0].macs_after == 2 * 12 * 16 * WIDE * (40 + 4) + 2 * 12 * 6 * 40 or "7" in size
    fixed = size.split(",")
    for h, w in ((6, 8), (7, 8), (6, 9), (9, 5), (1, 1)):
        if fixed[2] in ("H", str(h)) and fixed[3] in ("W", str(w)):
            same(model, result, x=normal(2, WIDE, h, w))


def test_an_old_opset_has_no_sizes_from_the_middle() -> None:
    known = parse(side() + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", 12, w=normal(WIDE, WIDE, 3, 3))
    result, _, _ = run(known, eager())
    assert ops(result)["Conv"] == 38
    same(known, result, x=normal(2, WIDE, 6, 8))
    open_ = parse(side("2,48,H,8") + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", 12, w=normal(WIDE, WIDE, 3, 3))
    assert run(open_, eager())[0] is open_


@pytest.mark.parametrize(("channels", "size", "done"), [(64, 112, False), (256, 4, False), (256, 16, True)])
def test_few_channels_and_small_maps_are_not_worth_a_race(channels: int, size: int, done: bool) -> None:
    model = parse(f"(float[1,{channels},{size},{size}] x) => (float[N] y) {{ y = Conv<pads=[1,1,1,1]>(x, w) }}",
                  w=normal(channels, channels, 3, 3, dtype=np.float32))  # fmt: skip
    _, outcome, _ = run(model, helpers.eager(Winograd), certifier=None)
    assert len(outcome.rewrites) == done


def test_not_without_measuring() -> None:
    model = parse(side() + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(WIDE, WIDE, 3, 3))
    waiting = Winograd()
    waiting.min_gain = 0.0
    result, outcome, _ = run(model, waiting)
    assert result is model
    assert "only measuring" in reasons(outcome)[0]


def test_a_batch_of_any_size() -> None:
    model = parse(side("N,48,6,8") + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(WIDE, WIDE, 3, 3))
    result, _, _ = run(model, eager())
    assert ops(result)["Concat"] == 3
    for n in (1, 3):
        same(model, result, x=normal(n, WIDE, 6, 8))


@pytest.mark.parametrize("size", ["N,48,H,W", "N,48,H,8", "N,48,7,W", "N,48,7,8"])
def test_an_empty_batch(size: str) -> None:
    pytest.importorskip("onnxruntime")
    from judge import widened  # onnx's evaluator has no Flatten of an empty batch

    model = parse(side(size) + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(WIDE, WIDE, 3, 3))
    result, outcome, _ = run(model, eager(), sizes={"x": (2, WIDE, 7, 8), "y": (2, WIDE, 7, 8)})
    assert len(outcome.rewrites) == 1
    assert widened(result)({"x": normal(0, WIDE, 7, 8)})[0].shape == (0, WIDE, 7, 8)


def test_the_rank_follows_from_the_weight() -> None:
    body = "(double[2,48,6,8] x, int64[K] s) => (double[N] y) { h = Reshape(x, s) k = Conv<pads=[1,1,1,1]>(h, w) y = Reshape(k, r) }"
    model = parse(body, w=normal(WIDE, WIDE, 3, 3), r=np.array([-1]))
    result, _, _ = run(model, eager())
    assert ops(result)["Conv"] > 1
    same(model, result, x=normal(2, 48, 6, 8), s=np.array([2, 48, 6, 8]))


def test_half_precision_stays() -> None:
    model = parse(
        side(kind="float16") + "{ y = Conv<pads=[1,1,1,1]>(x, w) }", w=normal(WIDE, WIDE, 3, 3, dtype=np.float16)
    )
    assert run(model, eager())[0] is model
