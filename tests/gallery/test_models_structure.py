"""What each system's result looks like inside: weights against products computed by hand, and operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from helpers import ops, weight

from models import beamformer, graph_network, physics, resnet_projection, style_transfer
from models.gallery import SYSTEMS
from models.system import System

pytest.importorskip("onnxruntime")
_BY_NAME = {s.name: s for s in SYSTEMS}
_RESULTS: dict[str, onnx.ModelProto] = {}


def both(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    system: System = _BY_NAME[name]
    if name not in _RESULTS:
        _RESULTS[name] = system.optimise().model
    return system.build(), _RESULTS[name]


def matrix(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A 1×1 convolution's weight (out, in), or a product's as it is, in float64."""
    values = weight(model, name).astype(np.float64)
    return values.reshape(values.shape[:2])


def maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    node: onnx.NodeProto = next(n for n in model.graph.node if tensor in n.output)
    return node


def shapes(model: onnx.ModelProto, op: str) -> Counter[tuple[int, ...]]:
    """Shapes of the constant operands of all operators of a kind."""
    held = {t.name: tuple(t.dims) for t in model.graph.initializer}
    return Counter(held[t] for n in model.graph.node if n.op_type == op for t in n.input if t in held)


def test_graph_network_has_one_map_per_head_and_narrow_adjacencies() -> None:
    before, after = both("graph_network")
    assert "self_loops" not in {t.name for t in after.graph.initializer}
    assert shapes(after, "MatMul") == {(32, 64): 1, (64, 16): 2, (48, 48): 2}
    exact = matrix(before, "mixed/conv1/lin.weight") @ matrix(before, "mixed/conv2/lin.weight")
    first = next(n for n in after.graph.node if n.op_type == "MatMul" and n.input[0] == "adjacency")
    narrow = maker(after, first.input[1])
    np.testing.assert_allclose(matrix(after, narrow.input[1]), exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(matrix(after, "adjacency"), graph_network.adjacency().astype(np.float32))


def test_inception_reads_its_input_with_one_convolution_and_one_pooling() -> None:
    before, after = both("inception")
    x = "InceptionV1/input/Transpose:0"
    assert Counter(n.op_type for n in before.graph.node if x in n.input) == {"Conv": 3, "MaxPool": 1}
    assert Counter(n.op_type for n in after.graph.node if x in n.input) == {"Conv": 1, "MaxPool": 1}
    assert shapes(after, "Conv")[(88, 96, 1, 1)] == 1
    assert shapes(after, "Conv")[(16, 8, 3, 3)] == 1


def test_distillation_has_one_map_to_the_teacher() -> None:
    before, after = both("distillation_projector")
    (gemm,) = (n for n in after.graph.node if n.op_type == "Gemm")
    exact = matrix(before, "projector.weight") @ matrix(before, "student/embedding.weight")
    np.testing.assert_allclose(matrix(after, gemm.input[1]), exact, rtol=1e-6, atol=1e-7)


def test_protein_pairs_are_embedded_before_they_are_laid_out() -> None:
    _, after = both("protein_distance_map")
    assert "Concat" not in ops(after)
    assert "Expand" not in ops(after)  # the sums broadcast
    for side in ("rows", "columns"):
        spread = f"/{side}/Unsqueeze_output_0"
        (small,) = (n for n in after.graph.node if spread in n.input)
        assert small.op_type == "Conv"
        (laid,) = (n for n in after.graph.node if small.output[0] in n.input)
        assert laid.op_type == "Add"
    assert shapes(after, "Conv")[(32, 42, 1, 1)] == 2
    assert shapes(after, "Conv")[(32, 24, 1, 1)] == 1


def test_resnet_projection_is_one_isometry() -> None:
    _, after = both("resnet_projection")
    shortcut = maker(after, "shortcut")
    w = matrix(after, shortcut.input[1])
    assert w.shape == (resnet_projection.WIDER, resnet_projection.WIDTH)
    np.testing.assert_allclose(w.T @ w, np.eye(resnet_projection.WIDTH), atol=1e-6)
    assert next(a.ints for a in shortcut.attribute if a.name == "strides") == [2, 2]


def test_squeeze_excitation_has_products_and_the_gate_stays() -> None:
    before, after = both("squeeze_excitation")
    assert ops(before)["Conv"] - ops(after)["Conv"] == 2
    assert ops(after)["Gemm"] == 2
    assert ops(after)["Mul"] == 1
    assert ops(after)["HardSwish"] == 2


def test_attention_asks_once_for_queries_keys_and_values() -> None:
    before, after = both("attention")
    x = "/norm/LayerNormalization_output_0"
    assert sum(x in n.input for n in before.graph.node) == 4
    assert sum(x in n.input for n in after.graph.node) == 1
    assert shapes(after, "MatMul") == {(96, 320): 1, (96, 96): 1}
    assert ops(after)["MatMul"] == 4  # two of them have no constant operand


def test_style_is_transformed_on_both_sides() -> None:
    _, after = both("style_transfer")
    assert shapes(after, "Conv") == {(3, 3, 1, 1): 1, (64, 3, 3, 3): 1, (64,): 2, (64, 64, 3, 3): 1}
    right = maker(after, "style")
    left = maker(after, right.input[0])
    w = style_transfer.palette()
    size = style_transfer.WIDTH * style_transfer.SIZE**2
    np.testing.assert_allclose(matrix(after, left.input[0]), w, atol=1e-7)
    np.testing.assert_allclose(matrix(after, right.input[1]), w.T / size, rtol=1e-5, atol=1e-9)


def test_beamformer_steers_with_one_convolution_in_two_dimensions() -> None:
    _, after = both("beamformer")
    kernels = {shape[2:] for shape in shapes(after, "Conv") if len(shape) > 1}
    assert kernels == {(1, 1), (1, 3), (1, 15), (1, 31)}
    (steering,) = (
        t for t in after.graph.initializer if len(t.dims) == 4 and t.dims[0] == beamformer.BEAMS and 31 in t.dims
    )
    assert list(steering.dims)[:2] == [beamformer.BEAMS, beamformer.MICROPHONES]
    delays = beamformer.shifted_sinc(-beamformer.arrivals()) / beamformer.gains()[:, None] / beamformer.MICROPHONES
    found = onnx.numpy_helper.to_array(steering).reshape(delays.shape)
    np.testing.assert_allclose(found, delays, rtol=1e-5, atol=1e-8)


def test_physics_keeps_its_laws_in_the_weights() -> None:
    """A·W = A for the processes, A·M = 0 for what the network adds."""
    _, after = both("physics")
    total = maker(after, "next")
    state, tendency = (maker(after, t) for t in total.input)
    a = physics.laws()
    np.testing.assert_allclose(a @ matrix(after, state.input[1]), a, atol=1e-6)
    np.testing.assert_allclose(a @ matrix(after, tendency.input[1]), 0, atol=1e-6)
    assert np.abs(matrix(after, tendency.input[1])).max() > 0.1
    assert len(tendency.input) < 3 or np.abs(a @ weight(after, tendency.input[2])).max() < 1e-6
