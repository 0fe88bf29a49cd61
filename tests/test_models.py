"""The gallery: each system is optimised, and the property it stands for holds before and after."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, evaluate, ops, weight

import pwopt

NAMES = sorted(p.stem for p in MODELS.glob("*.py"))


def builder(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"models_{name}", MODELS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(name: str, **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, pwopt.Result]:
    before = onnx.load(MODELS / f"{name}.onnx")
    result = pwopt.optimize(before, cost_model="analytic", check=False, **options)
    return before, result.model, result


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_file_is_what_its_builder_makes(name: str) -> None:
    """Weights may differ in the last bits between numpy versions (eigenvectors); everything else is equal."""
    built, committed = builder(name).build(), onnx.load(MODELS / f"{name}.onnx")
    onnx.checker.check_model(built, full_check=True)
    for a, b in zip(built.graph.initializer, committed.graph.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b), rtol=1e-3, atol=1e-4)
    del built.graph.initializer[:], committed.graph.initializer[:]
    assert built == committed
    assert Path(MODELS / f"{name}.onnx").stat().st_size <= 300_000


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_equivalent_on_onnxruntime(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = onnx.load(MODELS / f"{name}.onnx")
    value = model.graph.input[0]
    shape = [d.dim_value or 12 for d in value.type.tensor_type.shape.dim]
    result = pwopt.optimize(model, cost_model="analytic", shapes={value.name: [2, *shape[1:]]})
    assert result.report.equivalence is not None
    assert result.report.equivalence.passed
    assert result.report.rewrites
    assert result.report.after.macs <= result.report.before.macs


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
    assert ops(after) == {"Conv": 1}
    mean, std, whitening, projection = (np.asarray(v, np.float64) for v in builder("hyperspectral").parameters())
    exact = projection @ whitening / std
    np.testing.assert_allclose(weight(after, "projection")[:, :, 0, 0], exact, rtol=1e-4, atol=1e-5)
    spectra = builder("hyperspectral").spectra(1024).astype(np.float32)
    cube = spectra.T.reshape(1, 200, 32, 32)
    (a,), (b,) = evaluate(before, cube=cube), evaluate(after, cube=cube)
    reference = (spectra - mean) @ exact.T
    for y in (a, b):
        np.testing.assert_allclose(y[0].reshape(3, -1).T, reference, atol=2e-3)
    np.testing.assert_allclose(a.var((0, 2, 3)), b.var((0, 2, 3)), rtol=1e-4)  # explained variance


def test_hyperspectral_does_not_fold_through_a_relu() -> None:
    model = onnx.load(MODELS / "hyperspectral.onnx")
    position = next(i for i, n in enumerate(model.graph.node) if n.name == "project")
    model.graph.node[position].input[0] = "rectified"
    model.graph.node.insert(position, onnx.helper.make_node("Relu", ["components"], ["rectified"]))
    result = pwopt.optimize(model, cost_model="analytic", check=False)
    assert ops(result.model) == {"Conv": 2, "Relu": 1}


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
