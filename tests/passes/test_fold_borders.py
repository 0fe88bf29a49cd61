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


#: A branch with a bias before padding, and others that meet it in a sum.
BLOCK = "m1 = Conv(x, u, c) m2 = Conv<pads=[1,1,1,1]>(m1, w, d)"
SUMS = {
    "with another": f"{BLOCK} b1 = Conv<pads=[1,1,1,1]>(x, k) y = Add(m2, b1)",
    "turned": f"{BLOCK} b1 = Conv<pads=[1,1,1,1]>(x, k, d) y = Add(b1, m2)",
    "with a 1×1": f"{BLOCK} b1 = Conv(x, one, d) y = Add(m2, b1)",
    "with another channel of ones": f"{BLOCK} b1 = Conv(x, u7, c7) b2 = Conv<pads=[1,1,1,1]>(b1, w7) y = Add(m2, b2)",
    "with two": f"{BLOCK} b1 = Conv<pads=[1,1,1,1]>(x, k) b2 = Conv(x, one) m3 = Add(m2, b1) y = Add(m3, b2)",
}
BRANCHES = (
    WEIGHTS
    | {"u7": normal(16, 4, 1, 1, seed=9), "c7": normal(16), "w7": normal(5, 16, 3, 3)}
    | {"k": normal(5, 4, 3, 3, seed=7), "one": normal(5, 4, 1, 1, seed=8)}
)


@pytest.mark.parametrize("body", SUMS.values(), ids=SUMS)
def test_branches_that_meet_are_one_map(body: str) -> None:
    model = build(f"{{ {body} }}", BRANCHES, FIXED)
    result, outcome, _ = run(model, eager(FoldBorders))
    assert ops(result) == {"Pad": 1, "Conv": 1}, reasons(outcome)
    assert len({r.signature.partition(": ")[0] for r in outcome.rewrites}) == 1
    same(model, result, x=X)


def test_an_input_that_is_added_is_a_branch() -> None:
    model = build(
        "{ m1 = Conv(x, u, c) m2 = Conv<pads=[1,1,1,1]>(m1, w4) y = Add(m2, x) }",
        {**WEIGHTS, "w4": normal(4, 16, 3, 3)},
        FIXED,
    )
    result, _, _ = run(model, eager(FoldBorders))
    assert ops(result) == {"Pad": 1, "Conv": 1}
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (
            f"{BLOCK} b1 = Conv<pads=[1,1,1,1]>(x, k) m3 = Relu(b1) y = Add(m2, m3)",
            {"Pad": 1, "Conv": 2, "Relu": 1, "Add": 1},
        ),
        (
            f"{BLOCK} b0 = Relu(x) b1 = Conv<pads=[1,1,1,1]>(b0, k) y = Add(m2, b1)",
            {"Pad": 1, "Conv": 2, "Relu": 1, "Add": 1},
        ),
        (f"{BLOCK} y = Add(m2, m2)", {"Pad": 1, "Conv": 1, "Add": 1}),
    ],
)
def test_other_sums_stay(body: str, left: dict[str, int]) -> None:
    model = build(f"{{ {body} }}", BRANCHES, FIXED)
    result, _, _ = run(model, eager(FoldBorders))
    assert ops(result) == left
    same(model, result, x=X)


KEEP_ONE = {
    "none": "i = Conv<pads=[1,1,1,1]>(x, w2)",
    "Relu": "r = Conv(x, square, c4) i = Relu(r)",
    "LeakyRelu": "r = Conv<pads=[1,1,0,0]>(x, w2) i = LeakyRelu<alpha=0.2>(r)",
    "Clip": "r = Conv<strides=[2,2]>(x, square, c4) i = Clip(r, zero, six)",
}
NUMBERS = {"zero": np.array(0.0), "six": np.array(6.0), "half": np.array(0.5)}
AFTER = "m1 = Conv(i, u, c) y = Conv<pads=[1,1,1,1]>(m1, w, d)"


@pytest.mark.parametrize("start", KEEP_ONE.values(), ids=KEEP_ONE)
def test_the_convolution_before_computes_the_ones(start: str) -> None:
    model = build(f"{{ {start} {AFTER} }}", WEIGHTS | NUMBERS, FIXED)
    result, outcome, _ = run(model, eager(FoldBorders))
    assert ops(result)["Pad"] == 0, reasons(outcome)
    assert ops(result)["Conv"] == 2
    same(model, result, x=X)


@pytest.mark.parametrize(
    "start",
    [
        "r = Conv(x, square, c4) i = Sigmoid(r)",
        "r = Conv(x, square, c4) i = Clip(r, zero, half)",
        "r = Conv<group=2>(x, two, c4) i = Relu(r)",
        "r = Relu(x) i = Abs(r)",
    ],
)
def test_ones_that_no_convolution_can_compute_stay_a_pad(start: str) -> None:
    model = build(f"{{ {start} {AFTER} }}", WEIGHTS | NUMBERS | {"two": normal(4, 2, 1, 1)}, FIXED)
    result, _, _ = run(model, eager(FoldBorders))
    assert ops(result)["Pad"] == 1
    same(model, result, x=X)


def test_a_tensor_with_other_readers_keeps_its_channels() -> None:
    model = build(
        f"{{ r = Conv(x, square, c4) i = Relu(r) {AFTER.replace('y =', 'z =')} m3 = Conv(i, one) q = Sigmoid(m3) y = Mul(z, q) }}",
        BRANCHES,
        FIXED,
    )
    result, _, _ = run(model, eager(FoldBorders))
    assert ops(result)["Pad"] == 1
    same(model, result, x=X)


def test_a_network_of_such_blocks_has_one_pad() -> None:
    """RepSR: only the first block reads an input that no convolution computes."""
    weights = {f"{n}{i}": v for i in range(3) for n, v in {
        "u": normal(8, 4, 1, 1, seed=i), "c": normal(8, seed=i), "w": normal(4, 8, 3, 3, seed=i), "k": normal(4, 4, 3, 3, seed=i),
    }.items()}  # fmt: skip
    body, x = "", "x"
    for i in range(3):
        body += f"e{i} = Conv({x}, u{i}, c{i}) f{i} = Conv<pads=[1,1,1,1]>(e{i}, w{i}) g{i} = Conv<pads=[1,1,1,1]>({x}, k{i}) "
        body += f"s{i} = Add(f{i}, g{i}) r{i} = LeakyRelu<alpha=0.25>(s{i}) "
        x = f"r{i}"
    model = build(f"{{ {body} y = Neg({x}) }}", weights, FIXED)
    result, _, _ = run(model, eager(FoldBorders))
    assert ops(result) == {"Pad": 1, "Conv": 3, "LeakyRelu": 3, "Neg": 1}
    same(model, result, x=X)
