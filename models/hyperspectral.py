"""Hyperspectral projection: 200 bands per pixel, normalised, whitened by PCA, and projected to 3 channels.

Band normalisation (x − μ)/σ, whitening Λ^(−1/2)·Vᵀ on the leading 32 components, and a learned 32→3 map are
each linear across bands, so the preprocessing that remote-sensing pipelines put in front of a network
(Rodarmel and Shan, "Principal Component Analysis for Hyperspectral Image Classification", 2002) is one
200→3 pointwise convolution. Expected: one Conv whose weight equals the matrix product; the variance that the
components explain is unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BANDS, COMPONENTS, CHANNELS = 200, 32, 3


class Parameters(NamedTuple):
    """Of the projection: mean, std (bands,); whitening (components, bands); projection (channels, components)."""

    mean: np.ndarray
    std: np.ndarray
    whitening: np.ndarray
    projection: np.ndarray


def spectra(pixels: int = 4096, seed: int = 2) -> np.ndarray:
    """Synthetic spectra (pixels, bands): smooth endmembers mixed linearly, with sensor noise."""
    rng = np.random.default_rng(seed)
    wave = np.linspace(0, 1, BANDS)
    endmembers = [
        np.exp(-(((wave - c) / w) ** 2)) for c, w in zip(rng.random(12), rng.uniform(0.05, 0.4, 12), strict=True)
    ]
    abundance = rng.dirichlet(np.full(12, 0.5), pixels)
    return 0.1 + abundance @ np.array(endmembers) + rng.normal(0, 0.01, (pixels, BANDS))


def parameters() -> Parameters:
    """PCA of the synthetic spectra, and a seeded stand-in for the learned projection."""
    x = spectra()
    mean, std = x.mean(0), x.std(0)
    values, vectors = np.linalg.eigh(np.cov(((x - mean) / std).T))
    leading = np.argsort(values)[::-1][:COMPONENTS]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(BANDS)])  # eigenvectors have no sign of their own
    whitening = (vectors * signs)[:, leading].T / np.sqrt(values[leading])[:, None]
    projection = np.random.default_rng(3).normal(0, COMPONENTS**-0.5, (CHANNELS, COMPONENTS))
    return Parameters(*(v.astype(np.float32) for v in (mean, std, whitening, projection)))


def build() -> onnx.ModelProto:
    """The model: cube (batch, 200, height, width) float32 → features (batch, 3, height, width)."""
    p = parameters()
    values = {
        "mean": p.mean.reshape(BANDS, 1, 1),
        "std": p.std.reshape(BANDS, 1, 1),
        "whitening": p.whitening.reshape(COMPONENTS, BANDS, 1, 1),
        "projection": p.projection.reshape(CHANNELS, COMPONENTS, 1, 1),
    }
    nodes = [
        helper.make_node("Sub", ["cube", "mean"], ["centred"], "centre"),
        helper.make_node("Div", ["centred", "std"], ["normalised"], "normalise"),
        helper.make_node("Conv", ["normalised", "whitening"], ["components"], "whiten", kernel_shape=[1, 1]),
        helper.make_node("Conv", ["components", "projection"], ["features"], "project", kernel_shape=[1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "hyperspectral",
        [helper.make_tensor_value_info("cube", TensorProto.FLOAT, ["batch", BANDS, "height", "width"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", CHANNELS, "height", "width"])],
        [numpy_helper.from_array(v, name) for name, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
