"""Selections of channels are read in every spelling, and fold."""

import numpy as np
import pytest
from helpers import build, normal, ops, run, same

from pwopt.graph.files import annotate, from_proto
from pwopt.graph.shapes import infer
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.passes import FoldChains

SELECTIONS = [
    ("a, b, c = Split<axis=1>(x) h = Concat<axis=1>(c, b, a)", 3),
    ("a = Slice(x, zero, one, one) b = Slice(x, one, three, one) h = Concat<axis=1>(b, a)", 3),
    ("a = Slice(x, three, zero, one, minus) h = Concat<axis=1>(a, a)", 3),
    ("h = Concat<axis=1>(x, x, x)", 1),
    ("h = Tile(x, thrice)", 1),
    ("h = Tile(x, thrice)", 2),
    ("h = Expand(x, wide)", 1),
]
ENTRIES = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "three": np.array([3]),
    "minus": np.array([-1]),
    "thrice": np.array([1, 3, 1, 1]),
    "wide": np.array([1, 3, 5, 6]),
}


@pytest.mark.parametrize(("body", "channels"), SELECTIONS)
def test_rearranged_and_repeated_channels_fold_into_a_convolution(body: str, channels: int) -> None:
    """Reversed colours and repeated grey images."""
    width = {"Tile": 3 * channels, "Expand": 3}.get(next((o for o in ("Tile", "Expand") if o in body), ""), 3)
    width = 4 if "minus" in body else width
    weights = {"w": normal(4, width, 3, 3)}
    ends = f"(double[2,{channels},5,6] x) => (double[A,B,C,D] y)"
    model = build(f"{ends} {{ {body} y = Conv(h, w) }}", {**ENTRIES, **weights})
    result, outcome, _ = run(model, FoldChains())
    assert ops(result) == {"Conv": 1}
    assert all(r.certificate is not None and r.certificate.status != "failed" for r in outcome.rewrites)
    same(model, result, x=normal(2, channels, 5, 6, seed=1))


@pytest.mark.parametrize(
    ("ends", "body"),
    [
        ("double[2,3,5,6] x", "a, b, c = Split<axis=1>(x) h = Concat<axis=1>(c, b, a) z = Neg(b)"),  # read elsewhere
        ("double[2,3,5,6] x", "a, b, c = Split<axis=1>(x) h = Concat<axis=2>(c, b, a) z = Neg(h)"),  # another axis
        ("double[2,1,5,6] x, double[2,1,5,6] v", "h = Concat<axis=1>(x, v, x) z = Neg(x)"),  # two sources
        ("double[2,1,5,6] x", "h = Tile(x, twice) z = Neg(x)"),  # repeats positions
        ("double[J,1,5,6] x", "h = Expand(x, both) z = Neg(x)"),  # may repeat the batch, too
        ("double[2,K,5,6] x", "h = Tile(x, thrice) z = Neg(x)"),  # an unknown number of channels
    ],
)
def test_what_is_not_a_selection_of_channels(ends: str, body: str) -> None:
    given = {**ENTRIES, "twice": np.array([1, 3, 2, 1]), "both": np.array([2, 3, 5, 6])}
    model = from_proto(build(f"({ends}) => (double[A,B,C,D] h, double[E,F,G,H] z) {{ {body} }}", given))
    annotate(model, infer(model.to_proto()))
    view = View(model.graph)
    node = next(n for n in view.nodes() if n.outputs[0].name == "h")
    reading = forms.read(view, node)
    assert reading is None or (node.op == "Concat" and reading.axis == 2)
