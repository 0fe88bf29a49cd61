from __future__ import annotations

import numpy as np
import pytest
from helpers import parse

from pwopt.graph.files import from_proto
from pwopt.graph.values import MAX_READ_DEPTH, read_entries, read_extents
from pwopt.graph.view import View

CONSTANTS = {"zero": np.array(0), "start": np.array([0]), "one": np.array([1]), "two": np.array([2]), "minus": np.array([-1]), "ends": np.array([1, 4]),
             "f": np.array([2.0]), "u": np.array([200], np.uint8)}  # fmt: skip


def told(body: str, inputs: str = "float[N,6,H] x") -> object:
    words = {k: v for k, v in CONSTANTS.items() if any(f"{k}{end}" in body for end in (",", ")"))}
    loaded = from_proto(parse(f"({inputs}) => (int64[A] y) {{ {body} }}", opset=19, **words))
    view = View(loaded.graph)
    return read_entries(view, loaded.graph.outputs[0])


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ("y = Shape(x)", ("N", 6, "H")),
        ("y = Shape<start=-2>(x)", (6, "H")),
        ("s = Shape(x) y = Slice(s, one, ends)", None),
        ("s = Shape(x) g = Gather(s, zero) y = Unsqueeze(g, start)", ("N",)),
        ("s = Shape(x) y = Add(s, one)", (None, 7, None)),
        ("s = Shape(x) y = Mul(one, s)", ("N", 6, "H")),
        ("s = Shape(x) y = Sub(s, two)", (None, 4, None)),
        ("s = Shape(x) y = Concat<axis=0>(minus, s, two)", (-1, "N", 6, "H", 2)),
        ("s = Shape(x) e = Equal(s, minus) y = Where(e, one, s)", ("N", 6, "H")),
        ("s = Shape(x) e = Equal(s, two) y = Where(e, one, s)", (None, 6, None)),
        ("s = Shape(x) e = Equal(s, s) y = Cast<to=7>(e)", (1, 1, 1)),
        ("s = Shape(x) y = Max(s, s)", ("N", 6, "H")),
        ("s = Shape(x) c = Cast<to=1>(s) y = Cast<to=7>(c)", None),
        ("s = Shape(x) c = Cast<to=2>(s) y = Cast<to=7>(c)", None),  # to uint8, which wraps
        ("h = Relu(x) s = Shape(h) y = Min(s, s)", ("N", 6, "H")),
    ],
)
def test_entries(body: str, known: object) -> None:
    assert told(body) == known


def test_sizes_of_one_name_in_two_places_are_not_the_same() -> None:
    found = told("y = Shape(x)", "float[N,N] x")
    assert isinstance(found, tuple)
    assert all(isinstance(e, tuple) for e in found)
    assert found[0] != found[1]


def test_a_long_way_is_given_up() -> None:
    body = "s = Shape(x) h0 = Mul(s, one) " + " ".join(f"h{i + 1} = Mul(h{i}, one)" for i in range(2 * MAX_READ_DEPTH))
    assert told(f"{body} y = Mul(h{2 * MAX_READ_DEPTH}, one)") is None


def test_a_tower_of_doubles_takes_no_time() -> None:
    body = "s = Shape(x) h0 = Max(s, s) " + " ".join(f"h{i + 1} = Max(h{i}, h{i})" for i in range(MAX_READ_DEPTH - 4))
    assert told(f"{body} y = Max(h{MAX_READ_DEPTH - 4}, h{MAX_READ_DEPTH - 4})") == ("N", 6, "H")


def test_extents_name_what_has_no_name() -> None:
    loaded = from_proto(parse("(float[N,6,H] x) => (float[A,B,C] y) { y = MaxPool<kernel_shape=[2]>(x) }"))
    found = read_extents(View(loaded.graph), loaded.graph.outputs[0])
    assert found is not None
    assert found[:2] == ("N", 6)
    assert found[2] not in ("H", None)
