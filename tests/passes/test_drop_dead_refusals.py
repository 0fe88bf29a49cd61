"""What drop-dead leaves alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import normal, parse, reasons, run, same, weight
from pruning import CONSTANTS, SIDE, TWO, V, W, X, build, dead, pruned, subnormal, untouched

from pwopt.passes import DropDead
from pwopt.rewriting.records import Site

# Filters too small to matter


def test_filters_too_small_to_matter_count_as_constant() -> None:
    """1e-30 of what stands beside them: for inputs up to 2²⁰ their sum is below the rounding of all others."""
    small = dead(normal(7, 4, 1, 1), (1, 4), scale=1e-30)
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    _, reason = pruned(body, {"w": (5, 4, 1, 1), "v": (5, 5, 1, 1)}, w=small)
    found = re.search(r"2 are constant \(to within (\S+) for inputs up to 1e\+06\) and now part of its bias", reason)
    assert found is not None, reason
    assert float(found[1]) == pytest.approx(0.25 * 2**20 * np.abs(small[[1, 4]]).sum((1, 2, 3)).max(), rel=0.1)


def test_filters_that_are_only_small_stay() -> None:
    untouched(
        SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }", w=dead(normal(7, 4, 1, 1), (1, 4), scale=1e-15)
    )


LARGE = dead(V, columns=(1, 4), scale=1e30)
AMPLIFIED = {
    "their reader": (SIDE + "{ a = Conv(x, w) r = Relu(a) y = Conv(r, v) }", {"v": LARGE}),
    "a scale": (SIDE + "{ a = Conv(x, w) r = Mul(a, k) y = Conv(r, v) }", {"k": np.array([1, 1e30, 1, 1, 1e30, 1, 1]).reshape(7, 1, 1)}),
    "a stencil": (
        SIDE + "{ a = Conv(x, w) r = Conv<group=7>(a, stencil) y = Conv(r, v) }",
        {"stencil": dead(normal(7, 1, 3, 3), (1, 4), scale=1e30)},
    ),
    "a scale of their sum": (
        SIDE + "{ a = Conv(x, w) e = Conv(x, f) s = Add(a, e) r = Mul(s, k) y = Conv(r, v) }",
        {"f": dead(normal(7, 4, 1, 1, seed=1), (1, 4), scale=1e-30), "k": np.array([1, 1e30, 1, 1, 1e30, 1, 1]).reshape(7, 1, 1)},
    ),
    "a scale where all that their reader reads is small": (
        SIDE + "{ a = Conv(x, small) e = Conv(a, f) y = Mul(e, k) }",
        {
            "small": dead(dead(normal(7, 4, 1, 1), (1,), scale=1e-19), (2,), scale=1e-20),
            "f": np.stack([np.eye(7)[1] + np.eye(7)[2], np.eye(7)[3]])[..., None, None],
            "k": np.array([1e19, 1]).reshape(2, 1, 1),
        },
    ),
    "a scale behind their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) y = Mul(e, k) }",
        {"f": np.eye(7)[1:3, :, None, None], "k": np.array([1e30, 1]).reshape(2, 1, 1)},
    ),
    "the reader of their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) r = Relu(e) y = Conv(r, o) }",
        {"f": np.eye(7)[1:4, :, None, None], "o": np.array([1e30, 1, 1]).reshape(1, 3, 1, 1)},
    ),
    "a norm behind their reader": (
        SIDE + "{ a = Conv(x, w) e = Conv(a, f) n = ReduceMax<axes=[2,3]>(e) y = Div(e, n) }",
        {"f": np.eye(7)[1:3, :, None, None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "weights"), AMPLIFIED.values(), ids=AMPLIFIED)
def test_what_makes_them_large_again_keeps_them(body: str, weights: dict[str, np.ndarray]) -> None:
    model = build(body, w=dead(normal(7, 4, 1, 1), (1, 4), scale=1e-30), **weights)
    result, _, _ = run(model, DropDead())
    same(model, result, x=X)


# What is left alone


def test_a_shared_weight_is_left_alone() -> None:
    untouched(TWO + "{ a = Conv(x, w, b) y = Conv(a, v) e = Conv(x, w) z = Relu(e) }")
    untouched(TWO + "{ a = Conv(x, w, b) e = Conv(x, f) y = Conv(a, v) z = Conv(e, v) }", f=normal(7, 4, 1, 1))


def test_a_shared_bias_is_no_obstacle() -> None:
    pruned(
        TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Conv(x, f, b) }",
        {"w": (5, 4, 1, 1), "b": (7,)},
        f=normal(7, 4, 1, 1),
    )


def test_an_overridable_weight_is_left_alone() -> None:
    for name, shape in {"w": "7,4,1,1", "b": "7", "v": "5,7,1,1"}.items():
        untouched(
            f"(double[2,4,6,6] x, double[{shape}] {name}) => (double[N] y) {{ a = Conv(x, w, b) y = Conv(a, v) }}"
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["w", "v", "b"])
def test_numbers_that_are_not_finite_are_left_alone(name: str, value: float) -> None:
    held = CONSTANTS[name].copy()
    held.reshape(-1)[0] = value
    untouched(SIDE + "{ a = Conv(x, w, b) y = Conv(a, v) }", **{name: held})


def test_a_bias_that_would_overflow() -> None:
    half = {"w": W.astype(np.float16), "b": np.full(7, 6e4, np.float16), "v": np.full((5, 7, 1, 1), 100, np.float16)}
    model = build("(float16[2,4,6,6] x) => (float16[N] y) { a = Conv(x, w, b) y = Conv(a, v) }", **half)
    result, outcome, loaded = run(model, DropDead())
    assert result is model
    assert reasons(outcome) == ["dead channels could be removed, but the folded weights overflow float16"]
    assert loaded.graph.nodes[0].outputs[0].shape == (2, 7, 6, 6)


def test_operators_that_do_not_broadcast() -> None:
    body = SIDE + "{ a = Conv(x, w, b) q = BatchNormalization<is_test=1>(a, gamma, beta, mean, var) y = Conv(q, v) }"
    assert "opset 6 do not broadcast; --opset converts" in untouched(body, 6)


def test_a_denied_site_is_left_alone() -> None:
    body = TWO + "{ a = Conv(x, w, b) y = Conv(a, v) e = Conv(x, w2, b2) z = Conv(e, o) }"
    model = build(body, o=normal(5, 7, 1, 1))
    _, free, _ = run(model, DropDead())
    assert [str(r.site) for r in free.rewrites] == ["drop-dead:a", "drop-dead:e"]
    result, outcome, _ = run(model, DropDead(), denied=[Site("drop-dead", "a")])
    assert [str(r.site) for r in outcome.rewrites] == ["drop-dead:e"]
    assert "denied by the user" in reasons(outcome)
    np.testing.assert_array_equal(weight(result, "w"), W)
    np.testing.assert_array_equal(weight(result, "v"), V)
    assert weight(result, "w2").shape == (5, 4, 1, 1)
    same(model, result, x=X)
    assert run(model, DropDead(), denied=[Site("drop-dead", "a"), Site("drop-dead", "e")])[0] is model


def test_a_denied_subnormal_weight_is_left_alone() -> None:
    model = parse("(float[2,4,6,6] x) => (float[N] y) { a = Conv(x, w) y = Relu(a) }", w=subnormal())
    assert run(model, DropDead(), denied=[Site("drop-dead", "a")])[0] is model
