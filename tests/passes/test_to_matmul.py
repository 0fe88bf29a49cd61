from __future__ import annotations

import pytest
from helpers import eager, normal, ops, parse, reasons, run, same

from pwopt.passes import ToMatMul

X = normal(2, 4, 5, 3, seed=50)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batch", ["2", "N"])
def test_a_pointwise_convolution_is_a_product(biased: bool, batch: str) -> None:
    model = parse(
        f"(double[{batch},4,5,3] x) => (double[M] y) {{ y = Conv(x, w{', b' if biased else ''}) }}",
        w=normal(6, 4, 1, 1), **({"b": normal(6, seed=1)} if biased else {}),
    )  # fmt: skip
    result, outcome, _ = run(model, eager(ToMatMul))
    assert ops(result) == {"Reshape": 2, "MatMul": 1} | ({"Add": 1} if biased else {})
    assert outcome.rewrites[0].signature == "products at 5×3: 4→6"
    same(model, result, x=X)


@pytest.mark.parametrize(
    ("shape", "attrs"),
    [
        ("2,4,5,3", "strides=[2,2]"),
        ("2,4,5,3", "pads=[1,1,1,1]"),
        ("2,4,5,3", "group=2"),
        ("2,4,1,1", "group=1"),
        ("2,4,H,3", "group=1"),
        ("2,4,5", "group=1"),
    ],
)
def test_others_are_left_alone(shape: str, attrs: str) -> None:
    kernel = (1,) * (shape.count(",") - 1)
    weight = normal(6, 2 if attrs == "group=2" else 4, *kernel)
    model = parse(f"(double[{shape}] x) => (double[M] y) {{ y = Conv<{attrs}>(x, w) }}", w=weight)
    assert run(model, eager(ToMatMul))[0] is model


def test_a_shared_weight_stays() -> None:
    model = parse(
        "(double[2,4,5,3] x) => (double[M] y) { a = Conv(x, w) r = Relu(a) y = Conv(r, w) }", w=normal(4, 4, 1, 1)
    )
    result, outcome, _ = run(model, eager(ToMatMul))
    assert result is model
    assert "shared" in reasons(outcome)[0]


def test_without_a_clock_nothing_happens() -> None:
    model = parse("(double[2,4,5,3] x) => (double[M] y) { y = Conv(x, w) }", w=normal(6, 4, 1, 1))
    assert run(model, ToMatMul())[0] is model
