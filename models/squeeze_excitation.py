"""Squeeze-and-excitation: an image decides for itself how much each of its channels counts.

Hu, Shen and Sun, "Squeeze-and-Excitation Networks" (CVPR 2018), in the inverted residual of MobileNetV3 (Howard et al.,
ICCV 2019), as paddle2onnx spells it. Hard-swish is written as Add, Clip, Mul and Div. The gate consists of two 1×1
convolutions on a pooled 1×1 map, a HardSigmoid, and a Mul that broadcasts the gate. On a map of one pixel, a 1×1
convolution is just a matrix product.

Rewritten: BatchNormalizations fold, and the four operators become HardSwish. The gate's two 1×1 convolutions become
matrix products (Gemm). They compute the same sums in another order, which pays for larger batches. Timing decides.

Left alone: the product of the gate and the features. Both depend on the image, so there is no constant matrix to fold.
For a single image, the matrix would be diagonal.
"""

from __future__ import annotations

import onnx

from models.exporter import PADDLE, Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation

SIZE, WIDTH, EXPANDED, SQUEEZED = 20, 40, 120, 32


def build() -> onnx.ModelProto:
    """The model: x (batch, 40, 20, 20) float32 → y of the same shape."""
    e = Exporter(15, PADDLE)

    def hard_swish(x: str, name: str) -> str:
        shifted = e.node("Add", [x, e.constant(f"{name}.offset", [3.0])], name)
        bounds = [e.constant(f"{name}.min", 0.0), e.constant(f"{name}.max", 6.0)]
        gate = e.node("Clip", [shifted, *bounds], name)
        return e.node("Div", [e.node("Mul", [x, gate], name), e.constant(f"{name}.scale", [6.0])], name)

    x = e.norm(e.conv("x", "conv2d_expand", WIDTH, EXPANDED, bias=False, gain=2), "batch_norm_expand", EXPANDED)
    x = hard_swish(x, "hardswish_0")
    x = e.conv(x, "conv2d_depthwise", EXPANDED, EXPANDED, 3, groups=EXPANDED, bias=False, gain=2)
    x = hard_swish(e.norm(x, "batch_norm_depthwise", EXPANDED), "hardswish_1")
    gate = e.node("GlobalAveragePool", [x], "pool2d")
    gate = e.node("Relu", [e.conv(gate, "conv2d_squeeze", EXPANDED, SQUEEZED, gain=4)], "relu")
    gate = e.conv(gate, "conv2d_excite", SQUEEZED, EXPANDED, gain=4)
    gate = e.node("HardSigmoid", [gate], "hardsigmoid", alpha=0.2, beta=0.5)
    x = e.node("Mul", [x, gate], "elementwise_mul")
    x = e.norm(e.conv(x, "conv2d_project", EXPANDED, WIDTH, bias=False), "batch_norm_project", WIDTH)
    e.node("Add", ["x", x], "elementwise_add", "y")
    shape: list[int | str] = ["batch", WIDTH, SIZE, SIZE]
    return e.model("squeeze_excitation", {"x": shape}, {"y": shape})


SYSTEM = System(
    build,
    {"x": (8, WIDTH, SIZE, SIZE)},
    rewrites=("name-activations", "fold-affine", "lower-rank"),
    measured=("lower-rank",),
    properties=(
        Law(
            "moving the input moves the output, and does not change the gate",
            lambda s: translation(function_of(s), object_in(1, WIDTH, SIZE, SIZE, size=8, start=4), shift=3, margin=3),
            1e-5,
        ),
    ),
    refusals=(Refusal("p2o.Mul.2", "the gate depends on the image"),),
)
