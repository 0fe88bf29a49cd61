"""The judge of random models: it finds wrong numbers behind steps and in sequences, and lets roundings pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import judge as judging
import onnx
from judge import WrongError, check, choose, excessive, judge, overflowing
from onnx import TensorProto, helper, numpy_helper
from strategies import Sample, random_sample

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
#: What follows a convolution `y` and makes the output `z`; the last input of Where and the limits are 0.5.
STEPS: dict[str, list[onnx.NodeProto]] = {
    "comparison": [
        helper.make_node("Greater", ["y", "half"], ["mask"]),
        helper.make_node("Cast", ["mask"], ["z"], to=FLOAT),
    ],
    "where": [
        helper.make_node("Less", ["y", "half"], ["mask"]),
        helper.make_node("Where", ["mask", "y", "big"], ["z"]),
    ],
    "floor": [helper.make_node("Floor", ["y"], ["z"])],
    "round": [helper.make_node("Round", ["y"], ["z"])],
    "best": [
        helper.make_node("Add", ["y", "ramp"], ["a"]),
        helper.make_node("ArgMax", ["a"], ["i"], axis=1, keepdims=1),
        helper.make_node("Cast", ["i"], ["z"], to=FLOAT),
    ],
    "top": [
        helper.make_node("Add", ["y", "ramp"], ["a"]),
        helper.make_node("TopK", ["a", "one"], ["v", "i"], axis=1),
        helper.make_node("Cast", ["i"], ["z"], to=FLOAT),
    ],
    "sequence": [helper.make_node("SequenceConstruct", ["x", "y"], ["z"])],
}


def model_behind(step: str, code: int, factor: float = 1.0) -> onnx.ModelProto:
    """A 1×1 convolution, its weights times `factor`, and a step behind it."""
    rng, kind = np.random.default_rng(0), helper.tensor_dtype_to_np_dtype(code)
    weights = rng.normal(size=(8, 4, 1, 1)) * factor

    def stored(values: Any, name: str) -> TensorProto:
        return numpy_helper.from_array(np.asarray(values, kind), name)

    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in STEPS[step]]
    for attribute in (a for n in nodes for a in n.attribute if a.name == "to"):
        attribute.i = code
    output = helper.make_tensor_value_info("z", code, [None] * 4)
    if step == "sequence":
        element = helper.make_tensor_type_proto(code, None)
        output = helper.make_value_info("z", helper.make_sequence_type_proto(element))
    held = [stored(weights, "w"), stored(0.5, "half"), stored(40.0, "big"),
            stored(np.arange(8).reshape(1, 8, 1, 1), "ramp"), numpy_helper.from_array(np.array([1]), "one")]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), *nodes], "step",
        [helper.make_tensor_value_info("x", code, [1, 4, 16, 16])], [output], held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def give(sample: Sample, changed: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge `changed` as if a pass had made it of the sample."""

    def optimised(sample: Sample, passes: Sequence[str] | None) -> tuple[onnx.ModelProto, list[Any]]:
        return changed, []

    monkeypatch.setattr(judging, "optimised", optimised)
    make, given = choose(sample.model, sample.feeds)
    assert make is not None
    judge(sample, None, given, make)


def sample_behind(step: str, code: int, seed: int = 0) -> Sample:
    kind = helper.tensor_dtype_to_np_dtype(code)
    x = np.random.default_rng(seed).normal(size=(1, 4, 16, 16)).astype(kind)
    return Sample(model_behind(step, code), ({"x": x},))


@pytest.mark.parametrize("code", [FLOAT, HALF])
@pytest.mark.parametrize("step", STEPS)
def test_weights_times_1_3_are_found_behind_a_step(step: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongError):
        give(sample_behind(step, code), model_behind(step, code, 1.3), monkeypatch)


@pytest.mark.parametrize("code", [FLOAT, HALF])
@pytest.mark.parametrize("step", STEPS)
def test_roundings_are_excused_behind_a_step(step: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two roundings of every weight, which move some elements over the step."""
    factor = 1 + 2 * (2.0**-23 if code == FLOAT else 2.0**-10)
    for seed in range(4):
        give(sample_behind(step, code, seed), model_behind(step, code, factor), monkeypatch)


def test_sequences_of_another_length_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = model_behind("sequence", FLOAT)
    del changed.graph.node[1].input[0]
    with pytest.raises(WrongError, match="another length"):
        give(sample_behind("sequence", FLOAT), changed, monkeypatch)


def test_an_evaluator_that_computes_something_else_excuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime crops where SAME padding is negative; onnx's evaluator does not."""

    def cropping(factor: float) -> onnx.ModelProto:
        model = model_behind("comparison", FLOAT, factor)
        del model.graph.node[1:]
        model.graph.node[0].output[0] = "z"
        model.graph.node[0].attribute.extend(
            [helper.make_attribute("auto_pad", "SAME_UPPER"), helper.make_attribute("strides", [5, 5])]
        )
        return model

    sample = Sample(cropping(1.0), sample_behind("comparison", FLOAT).feeds)
    with pytest.raises(WrongError):
        give(sample, cropping(1.3), monkeypatch)
    give(sample, cropping(1 + 2.0**-22), monkeypatch)


def test_one_jump_of_the_original_does_not_excuse_many() -> None:
    own, off = np.zeros(1000), np.zeros(1000)
    own[7] = 1.0
    off[:3] = 1.0
    assert not excessive(off, own, 1e-3)
    off[:80] = 1.0
    assert excessive(off, own, 1e-3)
    off[:] = 1e-4
    assert not excessive(off, own, 1e-3)


def test_elements_that_are_not_numbers_count_as_the_largest_jumps() -> None:
    own, off = np.zeros(100), np.zeros(100)
    off[0] = np.inf
    own[:] = 1.0
    assert excessive(off, own, 1e-3)
    own[5] = np.inf
    assert not excessive(off, own, 1e-3)


def test_a_pole_may_lie_beyond_the_numbers_of_a_type() -> None:
    """Beside a pole, a deviation of 187,000 in float32 is one to infinity in float16."""
    off, own = np.array([np.inf, 0.0]), np.array([1.87e5, 0.0])
    assert excessive(off, overflowing(own, np.dtype(np.float32)), 1.0)
    assert not excessive(off, overflowing(own, np.dtype(np.float16)), 1.0)
    assert excessive(off, overflowing(own / 4, np.dtype(np.float16)), 1.0)
    assert overflowing(own, np.dtype(np.int64)) is own


def test_random_models_are_the_same_in_every_process() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from random import Random; from strategies import random_sample;"
        "sys.stdout.buffer.write(b''.join("
        "random_sample(Random(n)).model.SerializeToString(deterministic=True) for n in range(40)))"
    )
    tests = Path(__file__).parent.parent
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(tests)], env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tests.parent, capture_output=True, check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }  # fmt: skip
    assert len(outputs) == 1
    assert len(outputs.pop()) > 40_000


def test_random_models_have_thresholds_sequences_and_functions_with_defaults() -> None:
    """Among 150 models that onnxruntime runs; each kind is common enough for a campaign of thousands."""
    seen: Counter[str] = Counter()
    for number in range(150):
        sample = random_sample(Random(number))
        if choose(sample.model, sample.feeds)[0] is None:
            continue
        operators = {node.op_type for node in sample.model.graph.node}
        for kind, members in {
            "comparison": {"Greater", "Less", "GreaterOrEqual", "LessOrEqual"},
            "rounding": {"Floor", "Ceil", "Round", "Sign"},
            "place": {"TopK", "ArgMax", "ArgMin"},
            "sequence": {"SequenceAt", "ConcatFromSequence", "SequenceConstruct", "SplitToSequence"},
            "defaults": {"Leaky", "Outer", "Scaled", "Window"},
        }.items():
            seen[kind] += not operators.isdisjoint(members)
        kinds = {output.type.WhichOneof("value") for output in sample.model.graph.output}
        seen["sequence output"] += "sequence_type" in kinds
    assert min(seen.values()) >= 2, seen
    assert len(seen) == 6


@pytest.mark.parametrize(
    "number",
    [7065, 9345, 32, 1728, 754],
    ids=["weights in a Constant", "a mere scalar", "two functions", "Scan of opset 7", "padded in two ways"],
)
def test_random_models_are_valid(number: int) -> None:
    """The models of these seeds once could not be made, or were refused by the checker and by onnxruntime."""
    sample = random_sample(Random(number))
    check(sample.model)
    assert choose(sample.model, sample.feeds)[0] is not None


@pytest.mark.parametrize(("opset", "count"), [(18, 2), (20, 2), (21, 4)])
def test_group_normalisation_of_every_opset_is_checked(opset: int, count: int) -> None:
    def model(op: str) -> onnx.ModelProto:
        graph = onnx.parser.parse_graph(
            f"g (float[2,4,3] x, float[{count}] s, float[{count}] b) => (float[2,4,3] y) "
            f"{{ h = GroupNormalization<num_groups=2>(x, s, b) y = {op}(h) }}"
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)

    check(model("Relu"))
    with pytest.raises(onnx.checker.ValidationError):
        check(model("Rleu"))
