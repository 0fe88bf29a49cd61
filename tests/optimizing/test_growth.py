"""How much room an optimised model takes, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse

import pwopt
from pwopt.graph.storage import count_bytes
from pwopt.maps.cost import Cost
from pwopt.passes import PASSES
from pwopt.reporting.notes import explain_additions
from pwopt.reporting.report import Report
from pwopt.rewriting.records import Rewrite, Site


def broad() -> onnx.ModelProto:
    """A table of 160 KB that is computed from 800 bytes."""
    body = "(float[N,200] x) => (float[M,200] y) { a = Unsqueeze(p, o) b = Mul(a, p) c = Mod<fmod=1>(b, q) y = MatMul(x, c) }"
    return parse(body, p=100 * normal(200, dtype=np.float32), q=np.float32(1), o=np.array([1]))


def test_growth_is_told() -> None:
    result = pwopt.optimize(broad(), cost="analytic", verify=False)
    assert ops(result.model) == {"MatMul": 1}
    (note,) = [n for n in result.report.notes if "grows" in n]
    assert "(clean-up 0.16 MB); --max-growth bounds that." in note
    assert sum(r.growth for r in result.report.rewrites) > 150_000
    (note,) = [n for n in result.report.notes if "more parameters" in n]
    assert note == "The result has 39,799 more parameters. They come from clean-up, which removes operators."


def test_what_a_result_has_more_of_is_explained() -> None:
    fewer = Rewrite("r", ("Conv a",), ("Conv b", "Add c"), 100, 50, growth=4000, site=Site("polyphase", "a"))
    layout = Rewrite("r", ("Conv d",), ("Conv e", "Add f", "Add g"), site=Site("keep-layout", "d"))
    before = Cost(10, 5000, 100, 0)
    report = Report("m", None, "cpu", {}, {}, (fewer, layout), before=before, after=Cost(13, 6000, 50, 0))
    assert list(explain_additions(report, {"keep-layout"})) == [
        "The result has 3 more operators and 1,000 more parameters. They come from keep-layout, which was measured to "
        "be faster; polyphase, which saves multiply-adds."
    ]
    inlined = replace(report, after=Cost(50, 5000, 50, 0))  # no rewrite added 40 operators
    assert not list(explain_additions(inlined, ()))
    assert not list(explain_additions(replace(report, after=before), ()))


@pytest.mark.parametrize("allowed", [0.0, 0.1, 1000.0])
def test_growth_is_bounded(allowed: float) -> None:
    model = broad()
    result = pwopt.optimize(model, cost="analytic", verify=False, limits=pwopt.Limits(max_growth=allowed))
    assert ops(result.model)["MatMul"] == 1
    assert count_bytes(result.model) <= (1 + allowed) * count_bytes(model) + 1
    refused = [s for s in result.report.skips if "--max-growth" in s.reason]
    assert bool(refused) == (allowed == 0.0 or allowed == 0.1)
    assert ("Mod" in ops(result.model)) == bool(refused)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_no_other_bounds(wrong: float) -> None:
    with pytest.raises(pwopt.UsageError, match="grow"):
        pwopt.optimize(broad(), limits=pwopt.Limits(max_growth=wrong))


def test_a_measured_pass_is_bounded_too() -> None:
    """winograd's weights take 16/9 of the room."""
    model = parse(
        "(float[1,32,32,32] x) => (float[A,B,C,D] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
        w=normal(32, 32, 3, 3, dtype=np.float32),
    )
    passes = [p.name for p in PASSES if p.name == "winograd"]
    grown = pwopt.optimize(model, cost="analytic", verify=False, passes=passes)
    if grown.report.rewrites:  # not on models that are too small for it
        bounded = pwopt.optimize(
            model, cost="analytic", verify=False, passes=passes, limits=pwopt.Limits(max_growth=0.1)
        )
        assert count_bytes(bounded.model) <= 1.1 * count_bytes(model)


def test_no_empty_data_file_is_written(tmp_path: Path) -> None:
    """A weight that became small lies in the model itself."""
    weight = np.zeros((64, 64), np.float32)
    weight[:, 0] = 1
    body = "(float[N,64] x) => (float[M,1] y) { a = MatMul(x, w) y = MatMul(a, u) }"
    model = parse(body, w=weight, u=np.ones((64, 1), np.float32))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    pwopt.optimize(tmp_path / "a.onnx", tmp_path / "b.onnx", cost="analytic")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.data", "a.onnx", "b.onnx"]
    assert pwopt.verify(tmp_path / "a.onnx", tmp_path / "b.onnx").passed


def test_opsets_that_are_named_twice_alike() -> None:
    model = parse("(float[2] x) => (float[N] y) { a = Identity(x) y = Exp(a) }")
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx", 17))
    assert ops(pwopt.optimize(model, cost="analytic", verify=False).model) == {"Exp": 1}
    model.opset_import[-1].version = 16  # the last one counts, as in onnxruntime
    assert versions(pwopt.optimize(model, cost="analytic").model) == [("ai.onnx", 16)]


def versions(model: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(o.domain, o.version) for o in model.opset_import]


def test_opsets_that_nothing_needs_go() -> None:
    model = parse("(float[2] x) => (float[N] y) { a = Identity(x) y = Exp(a) }")
    listed = [("ai.onnx", 17), ("com.example", 1), ("ai.onnx.ml", 3), ("com.example", 1)]
    model.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in listed)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert versions(result) == [("", 17)]
    unchanged = parse("(float[2] x) => (float[N] y) { y = Exp(x) }")
    unchanged.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in listed)
    assert pwopt.optimize(unchanged, cost="analytic", verify=False).model == unchanged


def test_opsets_that_bodies_and_functions_need_stay() -> None:
    model = parse("(float[2] x, bool c) => (float[N] y) { a = Identity(x) b = Exp(a) y = Abs(b) }")
    output = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [2])
    custom = onnx.helper.make_node("Other", ["b"], ["r"], domain="body")
    body = onnx.helper.make_graph([custom], "body", [], [output])
    model.graph.node[2].CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    own = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("inner", 2)]
    node = onnx.helper.make_node("Odd", ["p"], ["q"], domain="inner")
    model.functions.append(onnx.helper.make_function("outer", "F", ["p"], ["q"], [node], own))
    model.opset_import.extend(onnx.helper.make_opsetid(d, 2) for d in ("body", "outer", "inner", "unused"))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert "Identity" not in ops(result)
    assert versions(result) == [("", 17), ("body", 2), ("outer", 2), ("inner", 2)]


def test_two_versions_of_one_custom_domain_stay() -> None:
    """Which of them holds is for whoever loads the model to say."""
    model = parse("(float[2] x) => (float[N] y) { a = Identity(x) b = Exp(a) y = Odd(b) }")
    model.graph.node[2].domain = "mine"
    model.opset_import.extend(onnx.helper.make_opsetid("mine", v) for v in (1, 2, 1))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert versions(result) == [("", 17), ("mine", 1), ("mine", 2)]
