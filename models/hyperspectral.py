"""Hyperspectral projection: 200 bands per pixel, normalised, whitened by PCA, and projected to 3 channels.

A pixel of an imaging spectrometer is a spectrum, and a pointwise layer mixes its bands. Remote-sensing pipelines put
such steps in front of a network (Rodarmel and Shan, "Principal Component Analysis for Hyperspectral Image
Classification", 2002). Here there are three: band normalisation (x − μ)/σ, whitening Λ^(−1/2)·Vᵀ on the leading 32
components, and a learned 32→3 projection. A ReLU and a classifier of every pixel follow.

Rewritten: all three steps are linear across bands, so they become one 200→3 convolution, P·Λ^(−1/2)·Vᵀ·diag(1/σ), with
the mean in its bias. It equals the matrix product computed outside pwopt, and the features explain the same variance.
The deviation is larger than before, for a reason. The original model subtracts the mean from each band first. The new
model computes Wx and Wμ, which nearly cancel. The absolute values of the terms of Wx add up to 300 times the result,
and the rounding error is proportional to the terms. It is still only 4 in a million.

Left alone: the classifier is linear too, but a ReLU lies in between.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Kept, Law, Refusal, System, outputs
from pwopt.running.session import Session

BANDS, COMPONENTS, CHANNELS, CLASSES = 200, 32, 3, 9


class Parameters(NamedTuple):
    """The projection: mean, std (bands,); whitening (components, bands); projection (channels, components)."""

    mean: np.ndarray
    std: np.ndarray
    whitening: np.ndarray
    projection: np.ndarray


def spectra(pixels: int = 4096, seed: int = 2) -> np.ndarray:
    """Synthetic spectra (pixels, bands): linear mixtures of smooth endmembers, with sensor noise."""
    rng = np.random.default_rng(seed)
    wave = np.linspace(0, 1, BANDS)
    endmembers = [
        np.exp(-(((wave - c) / w) ** 2)) for c, w in zip(rng.random(12), rng.uniform(0.05, 0.4, 12), strict=True)
    ]
    abundance = rng.dirichlet(np.full(12, 0.5), pixels)
    return np.asarray(0.1 + abundance @ np.array(endmembers) + rng.normal(0, 0.01, (pixels, BANDS)))


def parameters() -> Parameters:
    """PCA of the synthetic spectra, and a seeded stand-in for the learned projection.

    All values are rounded to 14 bits, so that the file does not depend on the rounding of the eigensolver.
    """
    x = spectra()
    mean, std = x.mean(0), x.std(0)
    values, vectors = np.linalg.eigh(np.cov(((x - mean) / std).T))
    leading = np.argsort(values)[::-1][:COMPONENTS]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(BANDS)])  # eigenvectors have no sign of their own
    whitening = (vectors * signs)[:, leading].T / np.sqrt(values[leading])[:, None]
    projection = np.random.default_rng(3).normal(0, COMPONENTS**-0.5, (CHANNELS, COMPONENTS))
    return Parameters(*(_coarse(v).astype(np.float32) for v in (mean, std, whitening, projection)))


def _coarse(values: np.ndarray, bits: int = 14) -> np.ndarray:
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits))


def build() -> onnx.ModelProto:
    """The model: cube (batch, 200, height, width) float32 → features (batch, 3, …) and classes (batch, 9, …)."""
    e, p = Exporter(2), parameters()
    x = e.node("Sub", ["cube", e.constant("mean", p.mean.reshape(BANDS, 1, 1))], "centre")
    x = e.node("Div", [x, e.constant("std", p.std.reshape(BANDS, 1, 1))], "normalise")
    x = e.conv(x, "whitening", BANDS, COMPONENTS, bias=False, weight=p.whitening, output="components")
    x = e.conv(x, "projection", COMPONENTS, CHANNELS, bias=False, weight=p.projection, output="features")
    e.conv(e.node("Relu", [x], "classify"), "classify", CHANNELS, CLASSES, output="classes")
    space = ["height", "width"]
    return e.model(
        "hyperspectral",
        {"cube": ["batch", BANDS, *space]},
        {"features": ["batch", CHANNELS, *space], "classes": ["batch", CLASSES, *space]},
    )


def features(session: Session) -> np.ndarray:
    """The features of 1024 spectra: (pixels, channels)."""
    cube = spectra(1024).astype(np.float32).T.reshape(1, BANDS, 32, 32)
    return np.transpose(outputs(session, cube=cube)["features"].reshape(CHANNELS, -1))


def deviation(session: Session) -> float:
    """The relative deviation of the features from the projection computed in float64."""
    mean, std, whitening, projection = (v.astype(np.float64) for v in parameters())
    exact = (spectra(1024).astype(np.float32) - mean) / std @ (projection @ whitening).T
    return float(np.linalg.norm(features(session) - exact) / np.linalg.norm(exact))


SYSTEM = System(
    build,
    {"cube": (1, BANDS, 32, 32)},
    rewrites=("fold-affine", "fold-chains"),
    properties=(
        Law("the features equal the PCA projection computed in float64", deviation, 1e-4),
        Kept("the variance of each feature", lambda s: features(s).var(0, dtype=np.float64), 1e-4),
    ),
    refusals=(Refusal("/classify/Relu", "ReLU is not linear: the classifier does not fold into the projection"),),
)
