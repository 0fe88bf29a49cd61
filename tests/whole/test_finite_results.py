"""What is folded gives a number wherever the original gives numbers, for every number of the type."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import evaluate, ops, parse, run
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt.graph.dtypes import range_of
from pwopt.passes import CleanUp, FoldAffine, FoldChains, SumBranches

#: Some finite numbers of float16, and every power of two of float32 with its neighbours.
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
POWERS = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
NUMBERS = {
    np.dtype(np.float16): HALVES[np.isfinite(HALVES)][::7],
    np.dtype(np.float32): np.concatenate(
        [s * np.nextafter(POWERS, np.float32(to)) for s in (1, -1) for to in (0, 1e38)]
        + [
            np.linspace(-4, 4, 33, dtype=np.float32),
            np.finfo(np.float32).max * np.linspace(-1, 1, 99, dtype=np.float32),
        ]
    ),
}
STEPS = {
    "Add": ["x", "c"], "Sub": ["x", "c"], "Sub from": ["c", "x"], "Mul": ["x", "c"], "Div": ["x", "c"], "Relu": ["x"],
    "LeakyRelu": ["x"], "Add to x": ["x", "first"], "Mul by x": ["x", "first"],
}  # fmt: skip
HALF, SINGLE = NUMBERS
#: Steps past which scales move in float32, and up to which numbers nothing overflows by that.
COMBINING, ORDINARY = ("LeakyRelu", "Add to x", "Mul by x"), 1e9
Step = tuple[str, float]


def model(steps: list[Step], dtype: np.dtype) -> onnx.ModelProto:
    """A chain of operators."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    size = [1, 1, len(NUMBERS[dtype])]
    names = ["first", *(f"t{i}" for i in range(len(steps)))]
    nodes, constants = [], []
    for i, (step, value) in enumerate(steps):
        inputs = [{"x": names[i], "c": f"c{i}", "first": "first"}[t] for t in STEPS[step]]
        nodes.append(helper.make_node(step.split()[0], inputs, [names[i + 1]]))
        constants.append(numpy_helper.from_array(np.array([value], dtype), f"c{i}"))
    values = [helper.make_tensor_value_info(name, kind, size) for name in ("first", names[-1])]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def largest_result(steps: list[Step], x: np.ndarray) -> np.ndarray:
    """The largest result of the chain for each number, and what rounding each step once may add to it."""
    first = total = x.astype(np.float64)  # whose own rounding is far smaller
    largest, error = np.abs(first), np.zeros(len(x))
    for step, value in steps:
        c = float(np.array(value, x.dtype))
        total = {
            "Add": lambda t, c: t + c,
            "Sub": lambda t, c: t - c,
            "Sub from": lambda t, c: c - t,
            "Mul": lambda t, c: t * c,
            "Div": lambda t, c: t / c,
            "Relu": lambda t, _: np.maximum(t, 0),
            "LeakyRelu": lambda t, _: np.where(t < 0, t / 100, t),
            "Add to x": lambda t, _: t + first,
            "Mul by x": lambda t, _: t * first,
        }[step](total, c)
        factor = {"Mul": abs(c), "Div": 1 / abs(c) if c else 0, "Mul by x": np.abs(first)}.get(step, 1)
        error = error * factor + range_of(x.dtype).epsilon * np.abs(total)  # a sum of opposite numbers keeps it
        largest = np.maximum(largest, np.abs(total) + error)
    return largest


def check(steps: list[Step], dtype: np.dtype) -> onnx.ModelProto:
    """Fold a chain, and compare where results are finite."""
    after, *_ = run(model(steps, dtype), CleanUp(), FoldAffine(), FoldChains(), SumBranches())
    limits, x = range_of(dtype), NUMBERS[dtype]
    with np.errstate(all="ignore"):
        found = evaluate(after, first=x.reshape(1, 1, -1))[0].reshape(-1)
    lost = x[~np.isfinite(found)]
    if dtype == SINGLE and any(step in COMBINING for step, _ in steps):
        lost = lost[np.abs(lost) <= ORDINARY]
    limit = (1 - limits.epsilon) * limits.largest
    assert not np.any(largest_result(steps, lost) <= limit), [n.op_type for n in after.graph.node]
    return after


MAX = {np.dtype(np.float16): 65504.0, np.dtype(np.float32): float(np.finfo(np.float32).max)}
MANTISSAS = [1.0, -1.0, 0.5, 0.25, -0.75, 1e-2, 1e-3]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Step], np.dtype]:
    dtype = draw(st.sampled_from([*NUMBERS]))
    small = [1.0, -1.0, 2.0, 0.5, 3.0, -10.0, 100.0]
    numbers = st.sampled_from([*small, *(m * MAX[dtype] for m in MANTISSAS)])
    steps = st.one_of(  # the inverse of a large number is subnormal, and rounds by more than ε
        st.tuples(st.just("Div"), st.sampled_from(small)),
        *(st.tuples(st.just(step), numbers) for step in STEPS if step != "Div"),
    )
    return draw(st.lists(steps, min_size=2, max_size=5)), dtype


@settings(max_examples=300, deadline=None)
@given(chains())
@example(([("Sub from", 1.0), ("Mul", -MAX[SINGLE])], SINGLE))
@example(([("Sub from", 1.0), ("Mul", -MAX[HALF])], HALF))
@example(([("Add", -3e4), ("Mul", 2.0), ("Add", 6e4)], HALF))
@example(([("Mul by x", 0.0), ("Mul", -MAX[SINGLE])], SINGLE))
@example(([("Mul", 0.5), ("Add to x", 0.0), ("Mul", 4.0)], HALF))
@example(([("Mul", 65.5), ("Mul", 65.5), ("Add", 32752.0), ("Mul", 65.5)], HALF))  # 65.5·(33,720 − 32,752)
@example(([("Add", -MAX[SINGLE]), ("Add to x", 0.0), ("Add", MAX[SINGLE])], SINGLE))
@example(([("Mul", MAX[SINGLE] / 2), ("LeakyRelu", 1.0), ("Mul", 2.0)], SINGLE))  # of a negative number
def test_a_fold_overflows_only_where_the_original_does(drawn: tuple[list[Step], np.dtype]) -> None:
    after = check(*drawn)
    event("folded" if len(after.graph.node) < len(drawn[0]) else "as it was")


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_a_mask_of_the_largest_number_stays(dtype: np.dtype) -> None:
    after = check([("Sub from", 1.0), ("Mul", -MAX[dtype])], dtype)
    assert ops(after) == {"Sub": 1, "Mul": 1}


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([("Mul", 2.0), ("Sub", 0.5), ("Add", 0.5)], {"Mul": 1}),
        ([("Sub from", 1.0), ("Mul", -50.0), ("Sub", 2.0)], {"BatchNormalization": 1}),
        ([("Add", 3.0), ("Mul", 4.0), ("Sub", 7.0), ("Div", 8.0)], {"BatchNormalization": 1}),
        ([("Mul", 100.0), ("Mul", 600.0)], {"Mul": 1}),
        ([("Mul", 10.0), ("Mul", 2.0), ("Add", 6e4)], {"BatchNormalization": 1}),
        ([("Add", 6e4), ("Mul", 0.5), ("Mul", 0.5)], {"BatchNormalization": 1}),
    ],
)
def test_ordinary_numbers_fold(steps: list[Step], found: dict[str, int], dtype: np.dtype) -> None:
    after = check(steps, dtype)
    assert ops(after) == found


def test_a_mask_of_ten_thousand_folds_in_float32_only() -> None:
    steps = [("Sub from", 1.0), ("Mul", -10000.0)]
    assert ops(check(steps, SINGLE)) == {"BatchNormalization": 1}
    assert ops(check(steps, HALF)) == {"Sub": 1, "Mul": 1}


def test_a_scale_stays_behind_an_operator_that_combines_whatever_lies_before_it() -> None:
    """At x = −2, x·(M/2) is finite and x·M is not, with a Transpose on the way as without."""
    body = "a = Mul(x, c) t = Transpose<perm=[0,2,1]>(a) l = LeakyRelu(t) y = Mul(l, two)"
    values = {"c": np.array([MAX[SINGLE] / 2], SINGLE), "two": np.array([2.0], SINGLE)}
    after, *_ = run(parse(f"(float[1,2,3] x) => (float[N] y) {{ {body} }}", **values), FoldAffine())
    assert ops(after)["Mul"] == 2
    (found,) = evaluate(after, x=np.full((1, 2, 3), -2, SINGLE))
    assert np.isfinite(found).all()
