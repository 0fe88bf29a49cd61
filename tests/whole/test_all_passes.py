"""All passes together, without a clock: what one pass makes, and what the others make of it."""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
import pytest
from helpers import MODELS, eager, normal, ops, parse, run, same
from strategies import random_sample

from pwopt.graph.files import from_proto
from pwopt.graph.view import View
from pwopt.passes import PASSES, Frames, Polyphase, SubPixel, Winograd
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Outcome

#: A measured pass, a model of float64 on which it acts, and the weights of that model.
MEASURED: dict[type[Pass], tuple[str, dict[str, np.ndarray]]] = {
    Frames: (
        "(double[1,4,5,6,7] x) => (double[N] y) { z = Conv<pads=[1,1,1,1,1,1], group=4>(x, w, b) y = Relu(z) }",
        {"w": normal(4, 1, 3, 3, 3), "b": normal(4)},
    ),
    Polyphase: (
        "(double[2,4,5,7] x) => (double[N] y) { "
        'u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , s) '
        "c = Conv<pads=[1,1,1,1]>(u, w, b) y = Relu(c) }",
        {"s": np.array([1, 1, 2, 2], np.float32), "w": normal(6, 4, 3, 3), "b": normal(6)},
    ),
    SubPixel: (
        "(double[2,3,5,7] x) => (double[N] y) { h = ConvTranspose<strides=[2,2]>(x, w, b) r = Relu(h) "
        "k = ConvTranspose<strides=[2,2]>(r, v, c) y = Sigmoid(k) }",
        {"w": normal(3, 4, 2, 2), "b": normal(4), "v": normal(4, 1, 2, 2, seed=1), "c": normal(1)},
    ),
}


def forced(kind: type[Pass]) -> Pass:
    """The pass on maps of any size."""
    p = eager(kind)
    if hasattr(p, "min_gain"):
        p.min_gain = 0.0
    return p


@pytest.mark.parametrize("kind", MEASURED, ids=lambda k: k.name)
def test_no_pass_undoes_a_measured_rewrite(kind: type[Pass]) -> None:
    body, weights = MEASURED[kind]
    model = parse(body, **weights)
    result, outcome, _ = run(model, *(p() for p in PASSES if p.policy != "measured"), forced(kind))
    assert [r.pass_name for r in outcome.rewrites] == [kind.name]
    again, second, _ = run(result, *(p() for p in PASSES if p.policy != "measured"))
    assert ops(again) == ops(result), second.rewrites
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    same(model, result, x=normal(*shape))


def test_no_pass_undoes_winograd() -> None:
    """Maps of neighbours, products and sums are linear. Folded again, they would be a convolution of 36 taps."""
    body = (
        "(double[2,48,6,8] x) => (double[N] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) "
        "d = Conv<pads=[1,1,1,1]>(r, v) y = Relu(d) }"
    )
    model = parse(body, w=normal(48, 48, 3, 3), b=normal(48), v=normal(48, 48, 3, 3, seed=1))
    result, outcome, _ = run(model, *(forced(p) if p is Winograd else p() for p in PASSES))
    assert len([r for r in outcome.rewrites if r.pass_name == "winograd"]) == 2
    interleaving = {"Concat": 6, "Transpose": 6, "Reshape": 6}
    assert ops(result) == {"Conv": 2 * 38, "Add": 2 * 24, "Relu": 4} | interleaving
    same(model, result, x=normal(2, 48, 6, 8))


def test_automatic_padding_of_unknown_size_does_not_compose_with_a_stencil() -> None:
    body = """(double[2,4,H,W] x) => (double[N] y) {
        h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, a) y = Conv<kernel_shape=[2,2]>(h, b)
    }"""
    model = parse(body, a=normal(30, 4, 3, 3), b=normal(1, 30, 2, 2))
    result, _, _ = run(model, *(p() for p in PASSES))
    assert result is model


def test_a_constant_graph_output_keeps_its_name_and_value() -> None:
    model = parse("(double[2] x) => (double[N] y, double[N] z) { z = Add(p, p) y = Add(x, z) }", p=np.ones(2))
    result, _, _ = run(model, *(p() for p in PASSES))
    assert [o.name for o in result.graph.output] == ["y", "z"]
    onnx.checker.check_model(result, full_check=True)
    same(model, result, tolerance=0, x=normal(2))


def test_skipped_sites_are_unique() -> None:
    model = from_proto(onnx.load(MODELS / "network_in_network.onnx"))
    outcome = Pipeline([p() for p in PASSES]).run(model.graph)
    sites = [str(s.site) for s in outcome.skips]
    assert len(set(sites)) == len(sites)


def test_every_pass_states_its_identity() -> None:
    for p in PASSES:
        identity = (p.__doc__ or "").split("\n\n")[0]
        assert "=" in identity or "becomes" in identity, p
        assert p.name
        assert p.policy in ("always", "if cheaper", "measured")


def test_links_between_nodes_and_tensors_are_consistent_after_all_passes() -> None:
    model = from_proto(onnx.load(MODELS / "network_in_network.onnx"))
    Pipeline([p() for p in PASSES]).run(model.graph)
    for node in model.graph.nodes:
        assert all(any(o is node for o in t.outputs) for t in node.inputs)
        assert all([i is node for i in t.inputs] == [True] for t in node.outputs)
    count = len(model.graph.nodes)
    model.graph.cleanup().toposort()
    assert len(model.graph.nodes) == count


class Forgetful(dict[int, object]):
    """Keeps nothing."""

    def __setitem__(self, key: int, value: object) -> None:
        pass


@pytest.mark.parametrize("start", range(0, 60, 15))
def test_cached_readings_are_never_stale(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings are cached until the next edit. Without the cache, every result is the same, byte for byte."""
    construct = View.__init__

    def forgetful(view: View, *arguments: object, **options: object) -> None:
        construct(view, *arguments, **options)  # type: ignore[arg-type]
        view.readings = Forgetful()

    def rewritten(model: onnx.ModelProto) -> tuple[bytes, Outcome]:
        loaded = from_proto(model)
        outcome = Pipeline([eager(p) for p in PASSES]).run(loaded.graph, reserved=loaded.names())
        return loaded.to_proto().SerializeToString(deterministic=True), outcome

    for number in range(start, start + 15):
        model = random_sample(Random(number)).model
        remembering = rewritten(model)
        with monkeypatch.context() as patch:
            patch.setattr(View, "__init__", forgetful)
            assert rewritten(model) == remembering
