"""The gallery: each system is optimised, and the property it stands for holds before and after."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from helpers import MODELS, evaluate, ops, weight

import pwopt


def builder(name: str) -> ModuleType:
    return importlib.import_module(f"models.{name}")


def both(name: str, **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, pwopt.Result]:
    before = onnx.load(MODELS / f"{name}.onnx")
    result = pwopt.optimize(before, cost="analytic", verify=False, **options)
    return before, result.model, result


def test_linear_sequence_is_one_convolution_with_the_predicted_parameters() -> None:
    before, after, result = both("linear_sequence")
    assert ops(after) == {"Conv": 1}
    assert result.report.after.params == 64 * 32 + 32
    product = np.eye(64)
    for i in range(1, 5):
        product = weight(before, f"conv{i}.weight")[:, :, 0, 0].astype(np.float64) @ product
    np.testing.assert_array_equal(weight(after, "conv4.weight")[:, :, 0, 0], product.astype(np.float32))


def test_hyperspectral_is_the_matrix_product() -> None:
    before, after, _ = both("hyperspectral")
    assert ops(after) == {"Conv": 2, "Relu": 1}
    mean, std, whitening, projection = (np.asarray(v, np.float64) for v in builder("hyperspectral").parameters())
    exact = projection @ whitening / std
    np.testing.assert_allclose(weight(after, "projection.weight")[:, :, 0, 0], exact, rtol=1e-4, atol=1e-5)
    spectra = builder("hyperspectral").spectra(1024).astype(np.float32)
    cube = spectra.T.reshape(1, 200, 32, 32)
    a, b = evaluate(before, cube=cube)[0], evaluate(after, cube=cube)[0]
    reference = (spectra - mean) @ exact.T
    for y in (a, b):
        np.testing.assert_allclose(y[0].reshape(3, -1).T, reference, atol=2e-3)
    np.testing.assert_allclose(a.var((0, 2, 3)), b.var((0, 2, 3)), rtol=1e-4)  # explained variance


def test_hyperspectral_does_not_fold_through_a_relu() -> None:
    """Not even one that comes before the projection, on the components."""
    model = onnx.load(MODELS / "hyperspectral.onnx")
    position = next(i for i, n in enumerate(model.graph.node) if n.name == "/projection/Conv")
    model.graph.node[position].input[0] = "rectified"
    model.graph.node.insert(position, onnx.helper.make_node("Relu", ["components"], ["rectified"]))
    result = pwopt.optimize(model, cost="analytic", verify=False)
    assert ops(result.model) == {"Conv": 3, "Relu": 2}


def test_network_in_network_folds_linear_layers_only() -> None:
    before, after, _ = both("network_in_network")
    assert ops(before)["Relu"] == ops(after)["Relu"] == 4
    assert ops(after)["Conv"] == ops(before)["Conv"] - 1
    assert "BatchNormalization" not in ops(after)


def test_network_in_network_is_translation_equivariant() -> None:
    """Moving an object by the network's stride of 2 moves the last feature maps by 1, away from the border."""
    before, after, _ = both("network_in_network")
    object_ = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    maps = []
    for model in (before, after):
        for shift in (0, 2):
            image = np.zeros((1, 3, 32, 32), np.float32)
            image[0, :, 10 + shift : 18 + shift, 12:20] = object_
            maps.append(evaluate(model, image=image)[1][0])
    for still, moved in (maps[:2], maps[2:]):
        np.testing.assert_allclose(moved[:, 4:13, 3:13], still[:, 3:12, 3:13], atol=1e-4)
    np.testing.assert_allclose(maps[0], maps[2], atol=1e-4)
