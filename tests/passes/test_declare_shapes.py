from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import eager, normal, ops, parse, reasons, run

from pwopt.graph.shapes import read_dims
from pwopt.passes import DeclareShapes

HEAD = "(float[N,4,H,W] x) => (float[A,B,C,D] y) "
BLOCK = "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w) d = Add(c, a) y = Neg(d)"
WEIGHT = normal(4, 4, 3, 3, dtype=np.float32)


def declared(model: onnx.ModelProto) -> dict[str, object]:
    return {v.name: read_dims(v.type) for v in model.graph.value_info}


#: Bounds of slices.
NUMBERS = {"zero": 0, "one": 1, "two": 2, "four": 4}


def test_summands_and_sums_behind_convolutions_are_declared() -> None:
    model = parse(f"{HEAD} {{ {BLOCK} }}", w=WEIGHT)
    result, outcome, _ = run(model, eager(DeclareShapes))
    assert declared(result) == dict.fromkeys("acd", ("N", 4, "H", "W"))
    assert list(result.graph.node) == list(model.graph.node)
    (rewrite,) = outcome.rewrites
    assert rewrite.signature == "declared shapes: sums and products behind convolutions"
    assert rewrite.certificate is not None
    assert rewrite.certificate.passed
    assert run(result, eager(DeclareShapes))[0] is result  # what is declared is not declared again


def test_products_of_two_convolutions_are_declared() -> None:
    gates = "a = Conv<pads=[1,1,1,1]>(x, w) b = Tanh(a) c = Conv<pads=[1,1,1,1]>(x, w) d = Sigmoid(c) e = Mul(b, d)"
    model = parse(f"{HEAD} {{ {gates} y = Neg(e) }}", w=WEIGHT)
    result, outcome, _ = run(model, eager(DeclareShapes))
    assert declared(result) == dict.fromkeys("bde", ("N", 4, "H", "W"))
    assert outcome.rewrites[0].signature == "declared shapes: sums and products behind convolutions"
    for other in ("c = Neg(x) d = Sigmoid(c) e = Mul(b, d)", "d = Sigmoid(a) e = Mul(a, d)", "e = Mul(b, b)"):
        text = f"{HEAD} {{ {gates.partition('c = ')[0]} {other} y = Neg(e) }}"
        one = parse(text, w=WEIGHT)
        assert run(one, eager(DeclareShapes))[0] is one


@pytest.mark.parametrize(
    "cut", ["p, q = Split<axis=1>(a, k)", "p = Slice(a, zero, two, one) q = Slice(a, two, four, one)"]
)
def test_products_of_two_parts_of_a_convolution_are_declared(cut: str) -> None:
    """After split-siblings, two convolutions compute them."""
    model = parse(
        f"{HEAD} {{ a = Conv<pads=[1,1,1,1]>(x, w) {cut} b = Tanh(p) d = Sigmoid(q) e = Mul(b, d) y = Neg(e) }}",
        w=WEIGHT,
        **({"k": np.array([2, 2])} if "k" in cut else {k: np.array([v]) for k, v in NUMBERS.items()}),
    )
    result, _, _ = run(model, eager(DeclareShapes))
    assert declared(result) == dict.fromkeys("bde", ("N", 2, "H", "W"))


@pytest.mark.parametrize(
    "rest",
    [
        "c = Neg(x) p, q = Split<axis=1>(c, k) b = Tanh(p) d = Sigmoid(q) e = Mul(b, d)",  # parts of no convolution
        "c = Neg(x) p, q = Split<axis=1>(a, k) r, s = Split<axis=1>(c, k) b = Tanh(p) d = Sigmoid(r) e = Mul(b, d)",
        "p, q = Split<axis=1>(a, k) d = Sigmoid(p) e = Mul(p, d)",  # a gate of its own
        "p, q = Split<axis=1>(a, k) e = Mul(p, q)",  # one operator makes both
        "p, q = Split<axis=1>(a, k) b = Relu(p) c = Relu(b) d = Sigmoid(q) e = Mul(c, d)",  # two operators behind a part
        "c = Neg(x) p, q = Split<axis=1>(a, k) r, s = Split<axis=1>(c, k) e = Add(p, r)",  # a sum is not of parts
    ],
)
def test_other_parts_are_not_declared(rest: str) -> None:
    text = f"{HEAD} {{ a = Conv<pads=[1,1,1,1]>(x, w) {rest} y = Neg(e) }}"
    model = parse(text, w=WEIGHT, k=np.array([2, 2]))
    assert run(model, eager(DeclareShapes))[0] is model


def test_unequal_shapes_are_not_declared() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w) p = GlobalAveragePool(a) d = Add(a, p) y = Neg(d)"
    model = parse(f"{HEAD} {{ {body} }}", w=WEIGHT)
    assert run(model, eager(DeclareShapes))[0] is model


@pytest.mark.parametrize(
    "text",
    [
        f"(float[2,4,8,8] x) => (float[A,B,C,D] y) {{ {BLOCK} }}",  # inference knows static shapes
        f"(float[N,4,8,8] x) => (float[A,B,C,D] y) {{ {BLOCK} }}",
        HEAD + "{ a = MaxPool<kernel_shape=[3,3]>(x) b = Relu(a) d = Add(a, b) y = Neg(d) }",
        HEAD + "{ a = MaxPool<kernel_shape=[3,3]>(x) s = Softmax<axis=1>(a) y = Neg(s) }",  # of unknown size
    ],
)
def test_nothing_else_is_declared(text: str) -> None:
    model = parse(text, **({"w": WEIGHT} if "w)" in text else {}))
    assert run(model, eager(DeclareShapes))[0] is model


def test_a_large_softmax_is_declared() -> None:
    body = "a = MaxPool<kernel_shape=[3,3]>(x) b = Relu(a) s = Softmax<axis=1>(b) y = Neg(s)"
    model = parse(f"{HEAD} {{ {body} }}")
    assert run(model, eager(DeclareShapes))[0] is model
    result, _, _ = run(model, eager(DeclareShapes), sizes={"s": (1, 4, 128, 128)})
    assert set(declared(result)) == {"b", "s"}
    assert ops(result) == ops(model)


def test_it_waits_for_a_race() -> None:
    model = parse(f"{HEAD} {{ {BLOCK} }}", w=WEIGHT)
    result, outcome, _ = run(model, DeclareShapes())
    assert result is model
    assert "only measuring can tell" in reasons(outcome)[0]
