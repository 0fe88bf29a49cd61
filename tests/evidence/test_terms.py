"""Repetitions are certified by their structure; whatever differs is evaluated."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, parse

from pwopt.evidence.certify import certify
from pwopt.graph.files import from_proto
from pwopt.passes import MergeEqual
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Certificate, Rewrite

HEAD = "(float[2,3,4] x, float[2,3,4] z) => (float[N] y)"


class Merge(Pass):
    """Takes 'a' for 'b', whatever they are."""

    name = "merge"
    context = 1

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if node.outputs[0].name != "b":
            return None
        (first,) = (n for n in rw.nodes() if n.outputs[0].name == "a")
        rw.reroute(node.outputs[0], first.outputs[0])
        rw.remove(node)
        return Rewrite("taken for the other")


def certify_with(p: Pass, model: onnx.ModelProto) -> Certificate:
    loaded = from_proto(model)
    (rewrite,) = Pipeline([p]).run(loaded.graph, reserved=loaded.names(), certifier=certify).rewrites
    assert rewrite.certificate is not None
    return rewrite.certificate


def test_equal_operators_need_no_evaluation() -> None:
    model = parse(f"{HEAD} {{ a = Softmax<axis=1>(x) b = Softmax<axis=1>(x) y = Sub(a, b) }}")
    found = certify_with(MergeEqual(), model)
    assert (found.status, found.reason, found.probability) == (
        "certified",
        "the same operators on the same inputs",
        0.0,
    )


def test_equal_small_constants_are_the_same_input() -> None:
    model = parse(f"{HEAD} {{ a = Mul(x, v) b = Mul(x, w) y = Sub(a, b) }}", v=np.float32([2]), w=np.float32([2]))
    assert certify_with(Merge(), model).reason == "the same operators on the same inputs"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("a = Softmax<axis=1>(x) b = Softmax<axis=2>(x)", "failed"),
        ("a = Sub(x, z) b = Sub(z, x)", "failed"),
        ("a = Mul(x, v) b = Mul(x, w)", "failed"),
        ("a = LeakyRelu<alpha=0.0>(x) b = LeakyRelu<alpha=-0.0>(x)", "tested"),  # attributes of other bits
        (
            "s = Shape(x) a = ConstantOfShape<value=float[1] {1}>(s) b = ConstantOfShape<value=float[1] {2}>(s)",
            "failed",
        ),
        ("a = RandomNormalLike(x) b = RandomNormalLike(x)", "none"),
    ],
)
def test_other_operators_are_evaluated(text: str, status: str) -> None:
    values = {"v": normal(4, dtype=np.float32), "w": normal(4, seed=1, dtype=np.float32)} if "w)" in text else {}
    found = certify_with(Merge(), parse(f"{HEAD} {{ {text} y = Sub(a, b) }}", **values))
    assert found.status == status
    assert found.reason != "the same operators on the same inputs"
