"""Values of integer inputs: what a graph does with them decides which ones are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from dynamic import encoder
from helpers import parse

import pwopt
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds

TABLE = np.zeros((7, 3), np.float32)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("f = Cast<to=1>(i) y = Neg(f)", (0, 1, 2)),
        ("f = Cast<to=1>(i) m = Sub(one, f) s = Mul(m, big) y = Softmax(s)", (0, 1, 2)),
        ("k = Equal(i, five) y = Cast<to=1>(k)", (0, 1, 2, 4, 5, 6)),
        ("d = Add(i, i) k = Less(five, d) y = Cast<to=1>(k)", (0, 1, 2, 4, 5, 6)),
        ("f = Cast<to=1>(i) k = Greater(f, half) y = Cast<to=1>(k)", (0, 1, 2, 3)),
        ("b = Cast<to=9>(i) y = Cast<to=1>(b)", (0, 1, 2)),
        # what becomes an index, a size or a divisor on some way stays 0 and 1
        ("n = CumSum(i, zero) p = Sub(n, one64) g = Gather(t, p) y = Neg(g)", (0, 1)),
        ("f = Cast<to=1>(i) r = Floor(f) p = Cast<to=7>(r) y = Gather(t, p)", (0, 1)),
        ("y = ConstantOfShape(i)", (0, 1)),
        ("y = Div(five, i)", (0, 1)),
        ("y = Expand(one, i)", (0, 1)),
        ('f = Cast<to=1>(i) y = Resize<mode="nearest">(t4, , f)', (0, 1)),
        # whatever a truth value becomes, it is 0 or 1, and a size or position is bounded as well
        ("b = Cast<to=9>(i) n = Cast<to=7>(b) p = Add(n, zero) y = Gather(t, p)", (0, 1, 2)),
        ("a = ArgMax<axis=0>(i) y = Gather(t, a)", (0, 1, 2)),
        ("s = Shape(i) y = ConstantOfShape(s)", (0, 1, 2)),
    ],
)
def test_the_graph_says_which_values_are_valid(body: str, values: tuple[int, ...]) -> None:
    model = parse(
        f"(int64[3] i) => (float[N] y) {{ {body} }}", one=np.float32(1), big=np.float32(-1e4), five=np.array(5),
        half=np.float32(2.5), zero=np.array(0), one64=np.array(1), t=TABLE, t4=np.zeros((1, 1, 3, 3), np.float32),
    )  # fmt: skip
    (spec,) = input_specs(model)
    assert (spec.largest, spec.values) == (None, values)
    if len(values) > 2:
        assert set(draw_feeds([spec], {"i": (1000,)})["i"]) == set(values)
        assert set(draw_feeds([spec], {"i": (1000,)}, "uniform")["i"]) == {0, 1}


def test_values_that_a_body_reads_stay_small() -> None:
    body = "f = Cast<to=1>(i) y = If(c) <then_branch = g1 () => (float[3] a) { a = Neg(f) }, else_branch = g2 () => (float[3] b) { b = Abs(f) }>"
    (spec, _) = input_specs(parse(f"(int64[3] i, bool c) => (float[N] y) {{ {body} }}"))
    assert spec.values == (0, 1)


def test_pixels_have_every_value_and_types_their_limits() -> None:
    pixels = "(uint8[1,3,4,4] x, int8[3] i) => (float[N] y, bool[M] z) { y = Cast<to=1>(x) z = Greater(i, k) }"
    image, vector = input_specs(parse(pixels, k=np.array(127, np.int8)))
    assert image.values == tuple(range(256))
    assert vector.values == (0, 1, 2, 126, 127)


def test_indices_of_one_hot_are_below_its_depth() -> None:
    model = parse("(int64[3] i) => (float[N] y) { y = OneHot(i, depth, v) }", depth=np.array(9), v=np.float32([0, 1]))
    assert input_specs(model)[0].largest == 8


def test_a_mask_is_no_index() -> None:
    ids, kinds, mask = input_specs(encoder())
    assert (ids.largest, kinds.largest, mask.largest) == (999, 1, None)
    assert mask.values == (0, 1, 2)


@pytest.mark.parametrize("wrong", ["Mul(f, f)", "Clip(f, , one)", "Cast<to=1>(b)"])
def test_a_wrong_model_behind_a_mask_or_a_threshold_is_caught(wrong: str) -> None:
    """All of these are equal for integers of 0 and 1."""
    pytest.importorskip("onnxruntime")
    head, weights = "(int64[8] i) => (float[8] y)", {"one": np.float32(1)}
    right = parse(f"{head} {{ f = Cast<to=1>(i) y = Mul(f, one) }}", **weights)
    other = parse(f"{head} {{ b = Cast<to=9>(i) f = Cast<to=1>(i) y = {wrong} }}", **weights)
    assert pwopt.verify(right, right).passed
    assert not pwopt.verify(right, other).passed


def test_a_wrong_constant_that_integers_are_compared_with_is_caught() -> None:
    pytest.importorskip("onnxruntime")
    bodies = ["(int64[8] i) => (float[8] y) { k = Equal(i, pad) y = Cast<to=1>(k) }"] * 2
    right, wrong = (parse(body, pad=np.array(pad)) for body, pad in zip(bodies, (50, 51), strict=True))
    assert not pwopt.verify(right, wrong).passed
