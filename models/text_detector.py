"""Text detector: the probability of text at every pixel, from maps of four sizes.

Liao, Wan, Yao, Chen and Bai, "Real-time Scene Text Detection with Differentiable Binarization" (AAAI 2020), as
PaddleOCR has it. The levels of a feature pyramid are reduced, repeated to the size of the finest (nearest-neighbour by
2, 4 and 8), concatenated, and mixed by a 3×3 convolution. Two transposed convolutions, each with a kernel of 2 and a
stride of 2, then bring the map to image size. The thresholds have their own head, which ends in a transposed
convolution with a kernel of 4. Names are spelled as by Paddle.

Rewritten: three levels have a repetition by 2 in common, so the 3×3 convolution runs on them at half the size, as a 2×2
convolution for each phase. A transposed convolution without overlap or gaps is a pointwise map to four phases. The next
one and the activations in between run on those phases. At the end, all sixteen phases are interleaved.

Left alone: the transposed convolution with a kernel of 4, because its windows overlap. The one before it, with a kernel
of 2, is rewritten, but its phases are interleaved before the one with a kernel of 4.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import PADDLE, Exporter
from models.system import Kept, Refusal, System, normal, outputs
from pwopt.running.session import Session

STEM, LEVEL, WIDTH, SIZE = 24, 8, 16, 160


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 160, 160) float32 → probability and threshold (batch, 1, 160, 160) in [0, 1]."""
    e = Exporter(19, PADDLE)

    def block(x: str, name: str, inn: int, out: int, stride: int = 1, groups: int = 1, k: int = 3) -> str:
        x = e.conv(x, f"{name}.conv", inn, out, k, stride=stride, groups=groups, bias=False, gain=2)
        return e.node("Relu", [e.norm(x, f"{name}.norm", out)], name)

    def larger(x: str, name: str, inn: int, out: int, k: int = 2, output: str = "") -> str:
        weight = e.constant(f"{name}.weight", e.rng.normal(0, (2 / inn) ** 0.5, (inn, out, k, k)))
        bias, pad = e.constant(f"{name}.bias", e.rng.normal(0, 0.05, out)), (k - 2) // 2
        attrs = {"kernel_shape": [k, k], "strides": [2, 2], "pads": [pad] * 4, "dilations": [1, 1], "group": 1}
        return e.node("ConvTranspose", [x, weight, bias], name, output, **attrs)

    x = block("image", "stem", 3, STEM, 2)
    levels = []
    for i in range(4):
        x = block(block(x, f"stage{i}.depth", STEM, STEM, 2, STEM), f"stage{i}", STEM, STEM, k=1)
        levels.append(block(x, f"reduce{i}", STEM, LEVEL))
    up = [e.resize(p, f"up{i}", 2**i, mode="nearest", coordinates="asymmetric") for i, p in enumerate(levels) if i]
    x = e.node("Concat", [*reversed(up), levels[0]], "fuse", axis=1)
    x = block(x, "fuse", 4 * LEVEL, WIDTH)
    for name, k in (("probability", 2), ("threshold", 4)):
        y = larger(x, f"{name}.up1", WIDTH, WIDTH)
        y = e.node("Relu", [e.norm(y, f"{name}.norm", WIDTH)], name)
        e.node("Sigmoid", [larger(y, f"{name}.up2", WIDTH, 1, k)], name, name)
    whole = ["batch", 1, SIZE, SIZE]
    return e.model("text_detector", {"image": ["batch", 3, SIZE, SIZE]}, {"probability": whole, "threshold": whole})


def mask(session: Session) -> np.ndarray:
    """The pixels of a smooth random image that are classified as text."""
    image = np.kron(normal(1, 3, SIZE // 8, SIZE // 8), np.ones((8, 8), np.float32))
    found = outputs(session, image=image)
    return found["probability"] > found["threshold"]


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "polyphase", "sub-pixel"),
    measured=("polyphase", "sub-pixel"),
    properties=(Kept("which pixels are text", mask, 0.0),),
    refusals=(Refusal("p2o.ConvTranspose.3", "its windows overlap: kernel 4, stride 2"),),
)
