"""Sums of maps of different inputs become one map of their Concat."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import eager, normal, ops, parse, run, same
from test_split_concat import SIDE, A, B, C

from pwopt.passes import JoinConcat


def test_a_sum_of_maps() -> None:
    body = SIDE + "{ p = Conv<pads=[1,1,1,1]>(a, u, z) q = Conv<pads=[1,1,1,1]>(b, v) y = Add(q, p) }"
    model = parse(body, u=normal(5, 3, 3, 3), v=normal(5, 4, 3, 3, seed=1), z=normal(5))
    result, _, _ = run(model, eager(JoinConcat))
    assert ops(result) == {"Concat": 1, "Conv": 1}
    same(model, result, a=A, b=B, c=C)


def test_sums_of_old_opsets_are_joined() -> None:
    model = parse(
        SIDE + "{ p = Conv(a, u) q = Conv(b, v) y = Add(q, p) }", 6, u=normal(5, 3, 1, 1), v=normal(5, 4, 1, 1)
    )
    result, _, _ = run(model, eager(JoinConcat))
    assert ops(result) == {"Concat": 1, "Conv": 1}
    same(model, result, a=A, b=B, c=C)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("{ p = Conv(a, u) q = Conv<pads=[1,1,1,1]>(b, v) y = Add(q, p) }",
         {"u": normal(5, 3, 1, 1), "v": normal(5, 4, 3, 3)}),
        ("{ p = Conv(a, u) q = Conv(b, v) r = Relu(p) s = Add(q, p) y = Add(r, s) }",
         {"u": normal(5, 3, 1, 1), "v": normal(5, 4, 1, 1)}),
        ("{ p = Conv(a, u) q = Conv(b, v) y = Sub(q, p) }", {"u": normal(5, 3, 1, 1), "v": normal(5, 4, 1, 1)}),
        ("{ p = Conv(a, u) q = Conv(b, v) y = Max(q, p) }", {"u": normal(5, 3, 1, 1), "v": normal(5, 4, 1, 1)}),
        ("{ p = Conv(a, u) y = Add(p, p) }", {"u": normal(5, 3, 1, 1)}),
        ("{ p = ConvTranspose(a, u) q = ConvTranspose(b, v) y = Add(q, p) }", {"u": normal(3, 5, 2, 2), "v": normal(4, 5, 2, 2)}),
        ("{ p = Conv(a, u) q = Conv(b, v) s = Add(q, p) t = Conv(a, u) r = Relu(t) y = Add(r, s) }",
         {"u": normal(5, 3, 1, 1), "v": normal(5, 4, 1, 1)}),
        ("{ p = Conv(a, u) q = Conv(a, v) y = Add(q, p) }", {"u": normal(5, 3, 1, 1), "v": normal(5, 3, 1, 1, seed=1)}),
        ("{ p = Conv(a, u) q = Conv<group=2>(b, v) y = Add(q, p) }",
         {"u": normal(4, 3, 1, 1), "v": normal(4, 2, 1, 1)}),
    ],
)  # fmt: skip
def test_refusals_to_join(body: str, weights: dict[str, np.ndarray]) -> None:
    model = parse(SIDE + body, **weights)
    assert run(model, eager(JoinConcat))[0] is model


def test_inputs_that_broadcast_are_not_joined() -> None:
    body = "(double[2,3,1,7] a, double[2,4,5,7] b) => (double[N] y) { p = Conv(a, u) q = Conv(b, v) y = Add(q, p) }"
    model = parse(body, u=normal(5, 3, 1, 1), v=normal(5, 4, 1, 1))
    assert run(model, eager(JoinConcat))[0] is model
