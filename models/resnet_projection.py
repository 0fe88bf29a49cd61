"""ResNet projection shortcut: where a block changes width and stride, a 1×1 convolution carries the input over.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), option B. The pointwise layer is a change of
coordinates. If its columns are orthonormal, every pixel that it reads keeps its length. The model has two bottleneck
blocks as Caffe, Detectron and Keras have them. The second block has its stride on its first 1×1 convolution and on its
shortcut. Both therefore read only every second row and column of the first block's result. A second shortcut carries
the network's input past both blocks by two maps with orthonormal columns: a rotation, and a strided projection to twice
the width. It is an output.

Rewritten: nothing reads the odd pixels of the first block's result. So its 3×3 convolution takes over the stride, and
its last 1×1 convolution, its sum and its ReLU compute every second pixel only. That gives the same numbers, bit for
bit, at a quarter of the positions. BatchNormalizations fold into convolutions. The rotation and the projection are
consecutive linear maps and become one map, whose columns are also orthonormal.

Left alone: the first 1×1 convolution and its ReLU, because a 3×3 convolution reads every pixel, whatever its stride.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter, orthogonal
from models.system import Law, Refusal, System, normal
from pwopt.invariants import function_of, isometry

SIZE, WIDTH, MIDDLE, WIDER = 28, 64, 16, 128


def build() -> onnx.ModelProto:
    """The model: x (batch, 64, 28, 28) float32 → features and shortcut (batch, 128, 14, 14)."""
    e = Exporter(14)

    def unit(x: str, name: str, inn: int, out: int, k: int = 1, stride: int = 1, *, relu: bool = True) -> str:
        x = e.conv(x, f"{name}/conv", inn, out, k, stride=stride, bias=False, gain=2)
        x = e.norm(x, f"{name}/bn", out)
        return e.node("Relu", [x], name) if relu else x

    def block(x: str, name: str, inn: int, out: int, stride: int, output: str = "") -> str:
        y = unit(x, f"{name}/a", inn, MIDDLE, stride=stride)
        y = unit(y, f"{name}/b", MIDDLE, MIDDLE, 3)
        y = unit(y, f"{name}/c", MIDDLE, out, relu=False)
        past = x if inn == out else unit(x, f"{name}/shortcut", inn, out, stride=stride, relu=False)
        return e.node("Relu", [e.node("Add", [y, past], name)], name, output)

    block(block("x", "block1", WIDTH, WIDTH, 1), "block2", WIDTH, WIDER, 2, "features")
    x = e.conv("x", "rotation", WIDTH, WIDTH, bias=False, weight=orthogonal(e.rng, WIDTH, WIDTH))
    weight = orthogonal(e.rng, WIDER, WIDTH)
    e.conv(x, "projection", WIDTH, WIDER, stride=2, bias=False, weight=weight, output="shortcut")
    half = [WIDER, SIZE // 2, SIZE // 2]
    return e.model(
        "resnet_projection",
        {"x": ["batch", WIDTH, SIZE, SIZE]},
        {"features": ["batch", *half], "shortcut": ["batch", *half]},
    )


SYSTEM = System(
    build,
    {"x": (1, WIDTH, SIZE, SIZE)},
    rewrites=("fold-affine", "fold-chains", "hoist-stride"),
    properties=(
        Law(
            "the orthogonal shortcut preserves the length of every pixel that it reads",
            lambda s: isometry(function_of(s, output="shortcut"), normal(1, WIDTH, SIZE, SIZE), stride=2),
            1e-6,
        ),
    ),
    refusals=(Refusal("/block1/a/Relu", "a 3×3 convolution needs every pixel of this ReLU"),),
)
