"""FCN classifier: dense features, brought to image size, and classified at every pixel.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015), turn the last layer
of a classifier into a 1×1 convolution, which gives every pixel its scores. As torch writes it, the model has a backbone
of stride 8 and the 3×3 layer of torchvision's FCN head. Its features are interpolated bilinearly (half_pixel) to the
size of the image. Only then follows the 1×1 classifier with its bias.

Rewritten: interpolation weights sum to one, so the classifier and the interpolation may change places, including the
bias: P(Wx + b) = W(Px) + b. The classifier then sees 64 times fewer positions. "Hypercolumns" (Hariharan et al., CVPR
2015) are built in this order on purpose. BatchNormalizations fold.

Left alone: the ArgMax. Its labels agree at every pixel of the test image; they may differ where two scores are equal up
to rounding. If the Resize extrapolated (tf_crop_and_resize), the classifier would stay behind it, because an
extrapolated value is a constant that no map has produced.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Kept, Refusal, System, normal, outputs
from pwopt.running.session import Session

WIDTHS, CLASSES, STRIDE, SIZE = (3, 16, 32, 64), 21, 8, 64


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 64, 64) float32 → scores (batch, 21, 64, 64) and labels (batch, 64, 64) int64."""
    e = Exporter(4)

    def block(x: str, name: str, inn: int, out: int, stride: int) -> str:
        x = e.conv(x, f"{name}.conv", inn, out, 3, stride=stride, bias=False, gain=2)
        return e.node("Relu", [e.norm(x, f"{name}.norm", out)], name)

    x = "image"
    for i, (inn, out) in enumerate(itertools.pairwise(WIDTHS), 1):
        x = block(x, f"layer{i}", inn, out, 2)
    x = block(x, "head", WIDTHS[-1], WIDTHS[-1], 1)
    x = e.resize(x, "upsample", STRIDE, mode="linear", coordinates="half_pixel")
    x = e.conv(x, "classifier", WIDTHS[-1], CLASSES, bias=0.2, output="scores")
    e.node("ArgMax", [x], "labels", "labels", axis=1, keepdims=0)
    return e.model(
        "fcn",
        {"image": ["batch", 3, SIZE, SIZE]},
        {"scores": ["batch", CLASSES, SIZE, SIZE], "labels": ["batch", SIZE, SIZE]},
        integers=["labels"],
    )


def labels(session: Session) -> np.ndarray:
    """The labels of a smooth random image."""
    image = np.kron(normal(1, 3, SIZE // 8, SIZE // 8), np.ones((8, 8), np.float32)) + 0.3 * normal(1, 3, SIZE, SIZE)
    return outputs(session, image=image.astype(np.float32))["labels"]


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "commute-spatial"),
    properties=(Kept("the label of every pixel", labels, 0.0),),
    refusals=(Refusal("/labels/ArgMax", "taking the largest score is not linear"),),
)
