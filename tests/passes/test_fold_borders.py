from __future__ import annotations

import numpy as np
import pytest
from helpers import build, eager, normal, ops, reasons, run, same
from linear_maps import apply

from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, homogeneous_geometry
from pwopt.algebra.linear import LinearMap
from pwopt.passes import PASSES, FoldBorders

WEIGHTS = {
    "u": normal(16, 4, 1, 1), "c": normal(16, seed=1), "w": normal(5, 16, 3, 3, seed=2), "d": normal(5, seed=3),
    "g": normal(16, 1, 1, 1, seed=4), "v": normal(16, 5, 3, 3, seed=5), "u2": normal(16, 2, 1, 1), "w2": normal(4, 4, 3, 3),
    "square": normal(4, 4, 1, 1), "wide": normal(5, 4, 3, 3), "c4": normal(4), "p": normal(16, 1, 3, 3),
}  # fmt: skip
HEAD = "(double[N,4,H,W] x) => (double[A,B,C,D] y) "
FIXED = "(double[2,4,7,6] x) => (double[A,B,C,D] y) "
X = normal(2, 4, 7, 6)

FOLDED = {
    "3×3": "h = Conv(x, u, c) y = Conv<pads=[1,1,1,1]>(h, w, d)",
    "one side": "h = Conv(x, u, c) y = Conv<pads=[0,0,2,1]>(h, w)",
    "dilated": "h = Conv(x, u, c) y = Conv<pads=[2,2,2,2], dilations=[2,2]>(h, w)",
    "strides": "h = Conv<strides=[2,2]>(x, u, c) y = Conv<pads=[1,1,1,1], strides=[1,2]>(h, w)",
    "groups": "h = Conv<group=2>(x, u2, c) y = Conv<pads=[1,1,1,1]>(h, w)",
    "of unknown size": 'h = Conv(x, u, c) y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(h, w)',
    "transposed": "h = Conv(x, u, c) y = ConvTranspose<strides=[2,2], output_padding=[1,0]>(h, v)",
}


@pytest.mark.parametrize("head", [HEAD, FIXED])
@pytest.mark.parametrize("case", FOLDED)
def test_a_bias_before_padding_is_a_channel_of_ones(case: str, head: str) -> None:
    model = build(f"{{ {FOLDED[case]} }}", WEIGHTS, head)
    result, outcome, _ = run(model, eager(FoldBorders))
    (op,) = {"Conv", "ConvTranspose"} & {n.op_type for n in model.graph.node[1:]}
    assert ops(result) == {"Pad": 1, op: 1}, reasons(outcome)
    same(model, result, x=X)


@pytest.mark.parametrize("head", [HEAD, FIXED])
def test_without_measuring_where_both_prices_fall(head: str) -> None:
    passes = [p() for p in PASSES]
    model = build("{ h = Conv(x, u, c) y = Conv<pads=[1,1,1,1]>(h, w, d) }", WEIGHTS, head)
    result, outcome, _ = run(model, *passes)
    assert ops(result) == {"Pad": 1, "Conv": 1}
    assert [str(r.site) for r in outcome.rewrites] == ["fold-borders:y"]
    assert outcome.rewrites[0].certificate is not None
    assert outcome.rewrites[0].certificate.status == "certified"
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("h = Conv(x, square, c4) y = Conv<pads=[1,1,1,1]>(h, many)", "would cost"),
        ("h = Conv(x, u, c) y = Conv<pads=[1,1,1,1], group=16>(h, p)", "would cost"),
        ("h = Conv(x, most, c4) y = Conv<pads=[1,1,1,1]>(h, few)", "only measuring"),
        ("h = Conv(x, u, c) k = Relu(h) m = Conv<pads=[1,1,1,1]>(h, w) y = Concat<axis=1>(k, m)", ""),
        ("h = Conv<pads=[0,0,1,1]>(x, u, c) y = Conv<pads=[1,1,1,1]>(h, w)", ""),
        ("h = Conv(x, wide) y = Conv<pads=[1,1,1,1]>(h, five)", ""),
    ],
)
def test_what_stays(body: str, word: str) -> None:
    more = {
        "many": normal(40, 4, 3, 3),
        "most": normal(4, 4, 1, 1),
        "few": normal(1, 4, 1, 1),
        "five": normal(5, 5, 3, 3),
    }
    model = build(f"{{ {body} }}", {**WEIGHTS, **more}, FIXED)
    result, outcome, _ = run(model, FoldBorders())
    assert result is model
    assert word in " ".join(reasons(outcome))
    assert bool(word) == bool(reasons(outcome))


UNTOUCHED = {
    "what is one map already": "h = Conv(x, u, c) y = Conv(h, w, d)",
    "no bias": "h = Conv(x, u) y = Conv<pads=[1,1,1,1]>(h, w, d)",
    "a product along another axis": "m = MatMul(x, sixes) h = Add(m, row) y = Conv<pads=[1,1,1,1]>(h, wide)",
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_is_none_of_its_business(case: str) -> None:
    model = build(f"{{ {UNTOUCHED[case]} }}", {**WEIGHTS, "sixes": normal(6, 6), "row": normal(6)}, FIXED)
    result, outcome, _ = run(model, eager(FoldBorders))
    assert result is model, reasons(outcome)


@pytest.mark.parametrize(("broken", "word"), [("u", "not finite"), ("w", "not finite")])
def test_weights_that_are_not_finite_stay(broken: str, word: str) -> None:
    infinite = {**WEIGHTS, broken: np.full_like(WEIGHTS[broken], np.inf)}
    result, outcome, _ = run(model := build(f"{{ {FOLDED['3×3']} }}", infinite, FIXED), eager(FoldBorders))
    assert result is model
    assert word in " ".join(reasons(outcome))


def test_sums_that_overflow_half_precision_stay() -> None:
    large = {name: np.full(WEIGHTS[name].shape, 200, np.float16) for name in ("u", "c", "w", "d")}
    model = build(f"{{ {FOLDED['3×3']} }}", large, FIXED.replace("double", "float16"))
    result, outcome, _ = run(model, eager(FoldBorders))
    assert result is model
    assert "is cheaper as one map, but" in " ".join(reasons(outcome))


def test_shared_weights_and_old_opsets_stay() -> None:
    shared = "{ h = Conv(x, u, c) k = Conv<pads=[1,1,1,1]>(h, w) j = Conv(x, u) i = Conv<pads=[1,1,1,1]>(j, w) y = Add(k, i) }"
    model = build(shared, WEIGHTS, FIXED)
    result, outcome, _ = run(model, eager(FoldBorders))
    assert result is model
    assert reasons(outcome) == ["the weight 'u' is shared"]
    old = build("{ h = Conv(x, u, c) y = Conv<pads=[1,1,1,1]>(h, w) }", WEIGHTS, FIXED, opset=10)
    assert run(old, eager(FoldBorders))[0] is old


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_homogeneous_coordinates(strides: tuple[int, int]) -> None:
    linear = LinearMap.conv(normal(6, 2, 1, 1), normal(6), groups=2, strides=strides)
    wide = linear.homogeneous()
    assert not wide.geometry.biased
    one = np.concatenate([X, np.ones((2, 1, 7, 6))], axis=1)
    np.testing.assert_allclose(apply(wide, one), apply(linear, X), atol=1e-12)


@pytest.mark.parametrize(
    "linear",
    [
        LinearMap.conv(normal(6, 4, 3, 3), normal(6)),
        LinearMap.conv(normal(6, 4, 1, 1), normal(6), pads=[1, 0, 0, 0]),
        LinearMap.of(Geometry(6, 4, 1, (1, 1), (2, 2), (1, 1), (0, 0, 0, 0), transposed=True), normal(6, 4, 1, 1), normal(6)),
    ],
)  # fmt: skip
def test_maps_that_look_beyond_a_position_are_refused(linear: LinearMap) -> None:
    assert isinstance(homogeneous_geometry(linear.geometry), Refusal)
    with pytest.raises(RefusedError, match="only a map with one tap"):
        linear.homogeneous()
