"""Feature pyramid: coarse maps, upsampled and added to finer ones, and a detector's neck that concatenates.

Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017). The backbone has levels of stride 4, 8 and 16
and is mostly depthwise separable. A 1×1 lateral convolution brings each level to a common width, so that the coarse
level can be upsampled (nearest-neighbour) and added to the finer one. A 3×3 convolution at every level reduces
aliasing. The neck is spelled as in YOLOv3 (Redmon and Farhadi, 2018) and PANet (Liu et al., CVPR 2018): a reduced
coarse map is upsampled and concatenated with the finer lateral map, and a 1×1 convolution follows. As torch writes it.

Rewritten: the neck's convolution splits into W·concat(Pa, b) = P(Wₐa) + W_b·b. The part for the upsampled channels runs
before the upsampling, at a quarter of the positions. BatchNormalizations fold.

Left alone: the lateral convolutions, because they already run before the upsampling. The 3×3 convolutions, because they
read neighbours, which differ between a small map and an upsampled one.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation

STEM, LEVELS, WIDTH, NECK, SIZE = 16, (32, 64, 128), 32, 64, 128


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 128, 128) float32 → p2, p3, p4 (batch, 32, …) at strides 4, 8, 16, and neck at 8."""
    e = Exporter(5)

    def norm_relu(x: str, name: str, channels: int, output: str = "") -> str:
        return e.node("Relu", [e.norm(x, f"{name}.norm", channels)], name, output)

    def upsample(x: str, name: str) -> str:
        return e.resize(x, name, 2, mode="nearest", coordinates="asymmetric")

    x = norm_relu(e.conv("image", "stem", 3, STEM, 3, stride=2, bias=False), "stem", STEM)
    levels: list[str] = []
    inn = STEM
    for i, out in enumerate(LEVELS, 2):
        if i == 2:
            x = e.conv(x, f"layer{i}", inn, out, 3, stride=2, bias=False)
        else:
            x = e.conv(x, f"layer{i}.depth", inn, inn, 3, stride=2, groups=inn, bias=False)
            x = e.conv(norm_relu(x, f"layer{i}.depth", inn), f"layer{i}", inn, out, bias=False)
        x = norm_relu(x, f"layer{i}", out)
        levels, inn = [*levels, x], out
    laterals = [e.conv(c, f"lateral{i}", n, WIDTH) for i, (c, n) in enumerate(zip(levels, LEVELS, strict=True), 2)]
    m4 = laterals[2]
    m3 = e.node("Add", [laterals[1], upsample(m4, "topdown3")], "merge3")
    m2 = e.node("Add", [laterals[0], upsample(m3, "topdown2")], "merge2")
    for i, m in enumerate((m2, m3, m4), 2):
        e.conv(m, f"smooth{i}", WIDTH, WIDTH, 3, output=f"p{i}")
    reduced = norm_relu(e.conv(x, "neck.reduce", LEVELS[2], NECK, bias=False), "neck.reduce", NECK)
    x = e.node("Concat", [upsample(reduced, "neck.upsample"), laterals[1]], "neck", axis=1)
    norm_relu(e.conv(x, "neck.mix", NECK + WIDTH, WIDTH, bias=False), "neck.mix", WIDTH, "neck")
    strides = {"p2": 4, "p3": 8, "p4": 16, "neck": 8}
    return e.model(
        "fpn",
        {"image": ["batch", 3, SIZE, SIZE]},
        {name: ["batch", WIDTH, SIZE // s, SIZE // s] for name, s in strides.items()},
    )


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "commute-spatial"),
    properties=(
        Law(
            "moving the image by the coarsest stride of 16 moves the neck's map by 2",
            lambda s: translation(
                function_of(s, output="neck"), object_in(1, 3, SIZE, SIZE, size=24, start=40), 16, stride=8, margin=3
            ),
            1e-5,
        ),
    ),
    refusals=(
        Refusal("/lateral3/Conv", "it already runs before the upsampling"),
        Refusal("/smooth2/Conv", "a 3×3 convolution reads neighbours, which upsampling changes"),
    ),
)
