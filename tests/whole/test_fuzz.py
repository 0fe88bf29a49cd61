"""A few random models of a fixed seed through every pass; benchmarks/fuzz.py runs many."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

pytest.importorskip("onnxruntime")

import onnx
from hypothesis import HealthCheck, given, seed, settings
from judge import WrongError, choose, judge, optimised, runtime
from strategies import Sample, random_sample, samples

from pwopt.passes import PASSES

EVERY = [p.name for p in PASSES]
#: Seeds of random models on which all passes act. New motifs change the models: choose other seeds then.
SEEDS = (25, 28, 212, 230, 236, 245, 361, 376, 491, 547, 647, 665, 700, 736, 749, 2725)


def check(sample: Sample) -> Counter[str]:
    make, expected = choose(sample.model, sample.feeds)
    if make is None:
        return Counter()
    return judge(sample, None, expected, make) + judge(sample, EVERY, expected, make)


@seed(0)
@settings(
    max_examples=40, database=None, derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip
@given(samples())
def test_random_models_keep_their_answers(sample: Sample) -> None:
    check(sample)


def test_every_pass_acts_on_random_models() -> None:
    applied: Counter[str] = Counter()
    for number in SEEDS:
        applied += check(random_sample(Random(number)))
    assert set(applied) == set(EVERY) - {"lower-swish", "name-swish"}  # which need opset 24


def test_measured_rewrites_list_every_operator_that_they_replace() -> None:
    """Profiles find the times of a rewrite's operators by these lists."""
    measured = {p.name for p in PASSES if p.policy == "measured"}
    made = [r for number in SEEDS for r in optimised(random_sample(Random(number)), EVERY)[1]]
    assert {r.pass_name for r in made} >= measured
    assert not [r for r in made if r.pass_name in measured and len(dict(r.became)) < len(r.removed)]


def test_the_judge_sees_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests rely on."""
    import pwopt

    real = pwopt.optimize

    def wrong(*arguments: object, **options: object) -> object:
        result = real(*arguments, **options)  # type: ignore[arg-type]
        if result.model is not sample.model:
            for tensor in result.model.graph.initializer:
                if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
                    values = onnx.numpy_helper.to_array(tensor) * 1.01
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), tensor.name))
        return result

    monkeypatch.setattr(pwopt, "optimize", wrong)
    seen = 0
    for number in range(12):
        sample = random_sample(Random(number))
        make, expected = choose(sample.model, sample.feeds)
        if make is not runtime:
            continue
        try:
            judge(sample, None, expected, make)
        except WrongError:
            seen += 1
    assert seen >= 3
