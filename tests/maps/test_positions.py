from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from helpers import build, normal

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.maps.positions import has_positions, pooling, positionwise, stencil

HEAD = "(double[2,4,7,8] x, double[2,4,7,8] z, double[2,4,1,1] g, double[2,4,1,8] h, double[7,8] u, double s) => (double[N] y) "
CONSTANTS = {
    "lo": np.float64(-1), "hi": np.float64(1), "one": normal(1), "each": normal(4, 1, 1), "row": normal(8), "image": normal(7, 8, seed=1),
    "p": np.abs(normal(4, seed=2)), "k": normal(2, 4, 7, 8, seed=3), "w": normal(3, 4, 3, 3, seed=4),
}  # fmt: skip


def last(body: str, opset: int = 17) -> tuple[View, gs.Node]:
    head = HEAD.replace("(double[N] y)", "(double[N] y, int64[M] i)") if "y, i" in body else HEAD
    head = head.replace("(double[N] y)", "(double[N] y, bool[M] m)") if "y, m" in body else head
    graph = from_proto(build(body, CONSTANTS, head, opset)).graph
    return View(graph), graph.nodes[-1]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{ y = Relu(x) }", True),
        ("{ y = Clip(x, lo, hi) }", True),
        ("{ y = Clip(x, s, hi) }", False),
        ("{ y = PRelu(x, image) }", False),
        ("{ y = Relu(u) }", False),
        ("{ y = BatchNormalization(x, p, p, p, p) }", True),
        ("{ y = Mul(x, each) }", True),
        ("{ y = Mul(x, one) }", True),
        ("{ y = Mul(x, row) }", False),
        ("{ y = Mul(x, image) }", False),
        ("{ y = Add(x, z) }", True),
        ("{ y = Add(x, g) }", True),
        ("{ y = Add(x, h) }", False),
        ("{ y = Add(x, u) }", False),
        ("{ y = Max(x, one, z) }", True),
        ("{ y = Max(x, k) }", False),
        ("{ y = Concat<axis=1>(x, z) }", True),
        ("{ y = Concat<axis=-2>(x, z) }", False),
        ("{ y = Concat<axis=1>(x, k) }", False),
        ("{ y = Softmax<axis=1>(x) }", False),
        ("{ y = Pow(x, z) }", False),
        ("{ y, m = Dropout(x) }", False),
    ],
)
def test_positionwise(body: str, expected: bool) -> None:
    view, node = last(body)
    assert positionwise(view, node) == expected


def test_broadcasting_was_an_attribute() -> None:
    view, node = last("{ y = Add<broadcast=1>(x, g) }", 6)
    assert not positionwise(view, node)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("kernel_shape=[3,3],pads=[1,1,1,1]", True),
        ('kernel_shape=[3,3],auto_pad="VALID"', True),
        ('kernel_shape=[3,3],auto_pad="SAME_UPPER"', False),
        ("kernel_shape=[3,3],ceil_mode=1", False),
    ],
)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling(op: str, attributes: str, expected: bool) -> None:
    view, node = last(f"{{ y = {op}<{attributes}>(x) }}")
    assert pooling(view, node) == expected


def test_pooling_whose_indices_are_read() -> None:
    view, node = last("{ y, i = MaxPool<kernel_shape=[2,2]>(x) }")
    assert not pooling(view, node)


def test_a_stencil_has_a_known_padding() -> None:
    body = '{ y = Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x, w) }'
    assert stencil(*last(body)) is not None
    graph = from_proto(build("(double[2,4,H,W] x) => (double[N] y) " + body, CONSTANTS)).graph
    assert stencil(View(graph), graph.nodes[-1]) is None


@pytest.mark.parametrize(("name", "expected"), [("x", True), ("h", True), ("g", False), ("u", False)])
def test_spread(name: str, expected: bool) -> None:
    view, _ = last("{ y = Relu(x) }")
    tensor = next(t for t in view.graph.inputs if t.name == name)
    assert has_positions(view, tensor, 2) == expected
