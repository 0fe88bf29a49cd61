"""Decoder: a coarse map, enlarged step by step by repeating its pixels and convolving them.

Ronneberger, Fischer and Brox, "U-Net" (MICCAI 2015), with the upsampling of later decoders and generators, which leaves
no checkerboard pattern (Odena, Dumoulin and Olah, "Deconvolution and Checkerboard Artifacts", Distill 2016). Each step
is nearest-neighbour upsampling by 2, a Concat with the encoder's map of that size, and a 3×3 convolution. The model
accepts any image whose sides are multiples of 4. Besides the labels it has four small heads, each spelled in another
way. As torch writes it.

Rewritten: several of the nine taps read the same repeated pixel. So each of the four phases of the output (even and odd
rows and columns) is a 2×2 convolution of the small map. The other map of the Concat is read with a stride of 2. On the
upsampled channels, this takes 16 multiply-adds instead of 36. At the end, the phases are interleaved.

Left alone: the four heads. The first follows bilinear upsampling, where no two pixels are equal. The second crops
before it convolves, and so shifts the repeated pixels. The third enlarges to the size of another tensor, so the factor
is unknown until the model runs. The enlarged map of the fourth is read by two convolutions.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation

WIDTHS, CLASSES, SIZE = (16, 32, 48), 4, 64


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, h, w) float32 → labels (batch, 4, h, w) and the maps of four heads."""
    e = Exporter(18)

    def block(x: str, name: str, inn: int, out: int, stride: int = 1) -> str:
        x = e.conv(x, f"{name}.conv", inn, out, 3, stride=stride, bias=False, gain=2)
        return e.node("Relu", [e.norm(x, f"{name}.norm", out)], name)

    def twice(x: str, name: str, mode: str = "nearest") -> str:
        return e.resize(x, name, 2, mode=mode, coordinates="asymmetric" if mode == "nearest" else "half_pixel")

    fine = block("image", "encoder0", 3, WIDTHS[0])
    middle = block(fine, "encoder1", WIDTHS[0], WIDTHS[1], 2)
    coarse = block(middle, "encoder2", WIDTHS[1], WIDTHS[2], 2)
    x = coarse
    for i, (skip, inn, out) in enumerate(((middle, WIDTHS[2], WIDTHS[1]), (fine, WIDTHS[1], WIDTHS[0])), 1):
        x = e.node("Concat", [twice(x, f"decoder{i}.up"), skip], f"decoder{i}", axis=1)
        x = block(x, f"decoder{i}", inn + out, out)
    e.conv(x, "labels", WIDTHS[0], CLASSES, output="labels")

    e.conv(twice(coarse, "smooth.up", "linear"), "smooth", WIDTHS[2], 2, 3, output="smooth")
    ends = [e.constant(f"crop.{k}", v) for k, v in (("starts", [1, 1]), ("ends", [2**31 - 1] * 2), ("axes", [2, 3]))]
    e.conv(e.node("Slice", [twice(middle, "crop.up"), *ends], "crop"), "crop", WIDTHS[1], 2, 3, output="cropped")
    space = e.node("Shape", [middle], "matched", start=2)
    size = e.node("Concat", [e.node("Shape", [coarse], "matched.batch", end=2), space], "matched.size", axis=0)
    attrs = {"coordinate_transformation_mode": "asymmetric", "mode": "nearest", "nearest_mode": "floor"}
    e.conv(
        e.node("Resize", [coarse, "", "", size], "matched.up", **attrs), "matched", WIDTHS[2], 2, 3, output="matched"
    )
    shared = twice(fine, "shared.up")
    for name in ("first", "second"):
        e.conv(shared, name, WIDTHS[0], 2, 3, output=name)
    half = ["batch", 2, "h/2", "w/2"]
    outputs = dict.fromkeys(("smooth", "matched", "first", "second"), half)
    return e.model(
        "decoder",
        {"image": ["batch", 3, "h", "w"]},
        {"labels": ["batch", CLASSES, "h", "w"], **outputs, "cropped": ["batch", 2, "h-1", "w-1"]},
    )


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "polyphase"),
    measured=("polyphase",),
    properties=(
        Law(
            "moving the image by 4 moves the labels by 4",
            lambda s: translation(
                function_of(s, output="labels"), object_in(1, 3, SIZE, SIZE, size=16, start=20), 4, margin=10
            ),
            1e-5,
        ),
    ),
    refusals=(
        Refusal("/smooth/Conv", "bilinear upsampling makes no two pixels equal"),
        Refusal("/crop/Conv", "a crop by one pixel lies in between"),
        Refusal("/matched/Conv", "the factor depends on an unknown size"),
        Refusal(
            "/first/Conv", "another convolution reads the enlarged map too, so it is computed anyway", "has 2 consumers"
        ),
    ),
)
