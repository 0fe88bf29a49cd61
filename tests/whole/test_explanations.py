"""Every linear map is rewritten, or the report says why not."""

from __future__ import annotations

from pathlib import Path
from random import Random

import onnx
import pytest
from helpers import MODELS, normal
from onnx import TensorProto, helper, numpy_helper
from strategies import random_sample

import pwopt
from pwopt.algebra.geometry import Refusal
from pwopt.graph.files import from_proto
from pwopt.graph.operators import WEIGHTED_OPERATORS
from pwopt.graph.view import View
from pwopt.maps import forms


def find_unexplained(model: onnx.ModelProto) -> list[str]:
    """The operators with weights that the result keeps from the original without a reason.

    An operator needs a reason if it has a constant weight but is not read as a map, or if it reads the result of
    another map.
    """
    result = pwopt.optimize(model, cost="analytic", verify=False)
    explained = {s.tensor for s in result.report.skips}
    kept = {name for node in model.graph.node for name in node.output} - explained
    view = View(from_proto(result.model).graph)
    found = []
    for node in view.nodes():
        if view.op(node) not in WEIGHTED_OPERATORS or node.outputs[0].name not in kept:
            continue
        reading = forms.read(view, node)
        if isinstance(reading, Refusal) and reading is not forms.NOT_CONSTANT:
            found.append(f"{node.op} {node.outputs[0].name}: {reading.reason}")
        whole = forms.weighted(view, node)
        if whole is None or whole.output.name not in kept:
            continue
        before = forms.weighted(view, view.producer(whole.source))
        if before is not None and before.output.name in kept:
            found.append(f"{before.node.op} {before.output.name} → {node.op} {node.outputs[0].name}")
    return found


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_the_repositorys_models(path: Path) -> None:
    assert not find_unexplained(onnx.load(path))


@pytest.mark.parametrize("seed", range(40))
def test_random_models(seed: int) -> None:
    assert not find_unexplained(random_sample(Random(seed)).model)


@pytest.mark.parametrize(
    ("domain", "reason"),
    [
        ("my", "MatMul stays: the output shape of NonZero is unknown; declare it in value_info"),
        ("com.microsoft", "MatMul stays: the output shape of NonZero is unknown; declare it in value_info"),
    ],
)
def test_maps_behind_an_unknown_shape(domain: str, reason: str) -> None:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("NonZero", ["x"], ["d"], domain=domain),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "v"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(normal(3, 3).astype("float32"), n) for n in ("v", "w")]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [6, 3])], [info("y", TensorProto.FLOAT, None)], weights
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert not find_unexplained(model)
    skips = pwopt.optimize(model, cost="analytic", verify=False).report.skips
    assert {(s.tensor, s.reason) for s in skips} == {("a", reason), ("y", reason)}
