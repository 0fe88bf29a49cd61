"""Inception module: four parallel branches, each of which squeezes its channels by a 1×1 convolution.

Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015). The 1×1 convolutions of the branches read the same tensor.
A pointwise layer here means "choose a few mixtures of the channels before the expensive 3×3". The module is TF-slim's
InceptionV1 Mixed_3b at half width, as tf2onnx writes it: channels-last input and output with a Transpose on either
side, BatchNormalization with epsilon 0.001, and names with slashes. The squeeze of the last 3×3 branch is linear, as in
later linear bottlenecks.

Rewritten: each BatchNormalization is a scale and a shift per channel, and folds into the convolution before it. The 1×1
convolutions of three branches share their input. They become one convolution, which has the rows of all of them, and a
Split. Every row is computed as before. Only timing can tell whether one wide convolution and a Split run faster, so
pwopt races this rewrite before it keeps it.

Left alone: the linear squeeze and its 3×3 convolution could become one 3×3 convolution of 96 channels, exactly, but
that would take seven times the multiply-adds. pwopt never increases the number of multiply-adds.
"""

from __future__ import annotations

from typing import Any

import onnx

from models.exporter import TENSORFLOW, Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation

WIDTH, SIZE = 96, 28
DIRECT, SQUEEZED, WIDE, LINEAR, NARROW, POOLED = 32, 48, 64, 8, 16, 16


def build() -> onnx.ModelProto:
    """The model: input:0 (batch, 28, 28, 96) float32 → output:0 (batch, 28, 28, 128)."""
    e = Exporter(10, TENSORFLOW)
    scope = "InceptionV1/Mixed_3b/Branch_"

    def unit(x: str, name: str, inn: int, out: int, k: int = 1) -> str:
        x = e.conv(x, f"{scope}{name}", inn, out, k, bias=False, gain=2)
        x = e.norm(x, f"{scope}{name}/BatchNorm", out, epsilon=1e-3)
        return e.node("Relu", [x], f"{scope}{name}")

    x = e.node("Transpose", ["input:0"], "InceptionV1/input", perm=[0, 3, 1, 2])
    direct = unit(x, "0/Conv2d_0a_1x1", WIDTH, DIRECT)
    wide = unit(unit(x, "1/Conv2d_0a_1x1", WIDTH, SQUEEZED), "1/Conv2d_0b_3x3", SQUEEZED, WIDE, 3)
    squeeze = e.conv(x, f"{scope}2/Conv2d_0a_1x1", WIDTH, LINEAR, bias=False)
    narrow = unit(squeeze, "2/Conv2d_0b_3x3", LINEAR, NARROW, 3)
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1]}
    pooled = unit(e.node("MaxPool", [x], f"{scope}3/MaxPool_0a_3x3", **window), "3/Conv2d_0b_1x1", WIDTH, POOLED)
    x = e.node("Concat", [direct, wide, narrow, pooled], "InceptionV1/Mixed_3b/concat", axis=1)
    e.node("Transpose", [x], "InceptionV1/output", "output:0", perm=[0, 2, 3, 1])
    channels = DIRECT + WIDE + NARROW + POOLED
    return e.model(
        "inception", {"input:0": ["batch", SIZE, SIZE, WIDTH]}, {"output:0": ["batch", SIZE, SIZE, channels]}
    )


SYSTEM = System(
    build,
    {"input:0": (1, SIZE, SIZE, WIDTH)},
    rewrites=("fold-affine", "merge-siblings"),
    measured=("merge-siblings",),
    properties=(
        Law(
            "moving the input moves the output",
            lambda s: translation(
                lambda x: function_of(s)(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
                object_in(1, WIDTH, SIZE, SIZE, size=10, start=8),
                shift=3,
                margin=3,
            ),
            1e-5,
        ),
    ),
    refusals=(
        Refusal(
            "InceptionV1/Mixed_3b/Branch_2/Conv2d_0b_3x3/Conv",
            "squeeze before 3×3 stays: as one convolution it would cost 7.2 times the multiply-adds",
            "would cost 7.20× the multiply-adds",
        ),
    ),
)
