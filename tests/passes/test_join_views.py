from __future__ import annotations

import numpy as np
import pytest
from helpers import normal, ops, parse, run, same

from pwopt.passes import CleanUp, JoinViews


def test_reshapes_in_a_row_are_one() -> None:
    body = "(double[2,12] x) => (double[N] y) { a = Reshape(x, p) b = Reshape(a, q) y = Neg(b) }"
    model = parse(body, p=np.array([2, 3, 4]), q=np.array([6, 4]))
    result, outcome, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == {"Reshape": 1, "Neg": 1}
    assert [r.reason for r in outcome.rewrites] == ["Reshape and Reshape are one Reshape"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("{ t = Transpose<perm=[0,2,1,3]>(x) y = Transpose<perm=[3,0,1,2]>(t) }", {"Transpose": 1}),
        ("{ t = Transpose<perm=[0,2,3,1]>(x) u = Transpose<perm=[0,3,1,2]>(t) y = Neg(u) }", {"Neg": 1}),
        ("{ t = Reshape(x, a) y = Reshape(t, b) }", {"Reshape": 1}),
        ("{ t = Flatten<axis=2>(x) u = Unsqueeze(t, o) y = Reshape(u, b) }", {"Reshape": 1}),
        ("{ t = Transpose<perm=[0,2,1,3]>(x) u = Transpose<perm=[3,0,1,2]>(t) v = Neg(t) y = Sub(u, s) w = Add(v, s) }",
         {"Transpose": 2, "Neg": 1, "Sub": 1, "Add": 1}),  # somebody else reads what is between
        ("{ t = Reshape(x, a) y = Reshape(t, z) }", {"Reshape": 1}),  # a 0 copies a size of t
        ("{ t = Transpose(x) y = Transpose<perm=[3,0,1,2]>(t) }", {"Transpose": 1}),  # an order that is not written down
        ("{ t = Transpose<perm=[0,2,1,3]>(x) y = Reshape(t, b) }", {"Transpose": 1, "Reshape": 1}),
    ],
)  # fmt: skip
def test_what_changes_the_order_or_the_shape_twice(body: str, left: dict[str, int]) -> None:
    names = {
        "a": np.array([6, 20]),
        "b": np.array([5, -1]),
        "o": np.array([1]),
        "z": np.array([0, 4, 5]),
        "s": np.ones(1),
    }
    used = {k: v for k, v in names.items() if any(f" {k}{end}" in body for end in (",", ")"))}
    ends = "(double[2,3,4,5] x) => (double[N] y" + (", double[N] w) " if " w = " in body else ") ")
    model = parse(ends + body, **used)
    result, _, _ = run(model, JoinViews(), CleanUp())
    assert ops(result) == left
    same(model, result, 0.0, x=normal(2, 3, 4, 5))
