"""Paths of moved channels and positions from an output to an input."""

from __future__ import annotations

import numpy as np
import pytest
from branching import P1, SIDE, U1, B, build

from pwopt.algebra.linear import LinearMap
from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.paths import Path, relative_places, trace


def path_to(body: str) -> tuple[View, Path]:
    """The path to the tensor `e`, which only a Relu reads."""
    view = View(from_proto(build(body.replace(" }", " y = Relu(e) }"))).graph)
    return view, trace(view, next(t for n in view.nodes() for t in n.outputs if t.name == "e"))


def composed(view: View, path: Path) -> LinearMap:
    return path.compose(view)


def test_a_path_ends_at_a_tensor_with_other_readers() -> None:
    side = "(double[2,4,6,6] x) => (double[N] y, double[N] z) "
    view, path = path_to(side + "{ z = Conv(x, w1) a = Conv(z, u1) b = Mul(a, s) e = Add(b, sc) }")
    assert path.source.name == "z"
    assert path.obstacle == "'z' is a graph output"
    assert [n.op for n in path.nodes] == ["Conv", "Mul", "Add"]
    assert path.axis == 1
    np.testing.assert_allclose(composed(view, path).weight, 0.7 * U1)
    np.testing.assert_allclose(composed(view, path).bias, B)


def test_a_path_of_scalars_has_no_axis() -> None:
    view, path = path_to(SIDE + "{ a = Mul(x, s) e = Neg(a) }")
    assert (path.source.name, path.axis, path.obstacle) == ("x", None, "")
    assert composed(view, path).scale.tolist() == [-0.7]


def test_an_empty_path_is_the_identity() -> None:
    view, path = path_to(SIDE + "{ e = Relu(x) }")
    assert path.readings == ()
    assert path.source is path.output
    assert path.obstacle == "Relu is not a linear map with constant numbers"
    assert composed(view, path).scale.tolist() == [1]
    assert path.price(view) == 0


@pytest.mark.parametrize(
    ("body", "source", "obstacle"),
    [
        ("a = MatMul(u, x) b = Mul(a, s) e = MatMul(b, w)", "a", "MatMul acts on axis 1, not 2"),
        ("a = MatMul(x, w) e = MatMul(a, w)", "e", "the weight 'w' is shared"),
        ("a = Mul(x, s) b = Relu(a) c2 = Add(a, b) e = Neg(c2)", "c2", "Add is not a linear map"),
        ("a = Mul(x, s) b = Relu(a) e = MatMul(a, w)", "a", "'a' has 2 consumers"),
        ("a = MatMul(w, u) b = MatMul(x, a) e = Neg(b)", "b", "MatMul is not a linear map"),
    ],
)
def test_where_a_path_begins(body: str, source: str, obstacle: str) -> None:
    _, path = path_to(f"(double[2,4,4] x) => (double[N] y) {{ {body} }}")
    assert path.source.name == source
    assert obstacle in path.obstacle


def test_a_path_ends_at_operators_that_the_runtime_fuses() -> None:
    view, path = path_to(SIDE + "{ a = Mul(x, s) e = Conv(a, w1) }")
    assert path.source.name == "x"
    blocked = trace(view, path.output, {path.nodes[0]})
    assert blocked.source.name == "a"
    assert blocked.obstacle == "Mul belongs to a larger operator that onnxruntime runs as one"


@pytest.mark.parametrize(("size", "places"), [("6,6", [72, 18]), ("H,W", [1, 0.25])])
def test_the_price_is_per_position_of_the_output(size: str, places: list[float]) -> None:
    """4·4 weights at four times as many positions as 4·4·9 weights; scales and pooling are free."""
    side = f"(double[2,4,{size}] x) => (double[N] y) "
    view, path = path_to(side + f"{{ a = Conv(x, w1) b = Conv<{P1}, strides=[2,2]>(a, w3) e = Mul(b, s) }}")
    assert path.price(view) == 4 * 16 + 144
    assert relative_places(view, list(path.readings[:2])) == places
    view, path = path_to(side + "{ a = Conv(x, w1) e = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a) }")
    assert path.price(view) == 4 * 16
