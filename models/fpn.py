"""Feature pyramid network: coarse maps, upsampled and added to finer ones; and a detector's neck that concatenates.

Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017): backbone levels of stride 4, 8 and 16, a 1×1
lateral convolution each, nearest-neighbour upsampling added from the top down, a 3×3 convolution against aliasing at
every level; narrow, on a mostly depthwise separable backbone, to keep the file small. The neck is spelled as in YOLOv3
(Redmon and Farhadi, 2018) and detectors after PANet (Liu et al., CVPR 2018): a reduced coarse map, upsampled,
concatenated with the finer lateral map, then a 1×1 convolution.
Expected: the BatchNormalizations fold; the neck's 1×1 convolution is split, and its part of the upsampled channels
runs before the upsampling, at a quarter of the positions. The laterals stay where they are: they stand before the
upsampling already, and a sum lies between. A 3×3 convolution in place of the neck's would not be split, since it looks
at neighbours, nor one behind a ReLU, nor one whose upsampled input is read elsewhere too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STEM, LEVELS = 16, (32, 64, 128)
WIDTH, NECK = 32, 64


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 128, 128) float32 → p2, p3, p4 (batch, 32, …) at strides 4, 8, 16, and neck at 8."""
    rng = np.random.default_rng(5)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(
        x: str, name: str, inn: int, out: int, k: int = 1, stride: int = 1, group: int = 1, *, bias: bool = True
    ) -> str:
        fan = inn // group * k * k
        inputs = [x, constant(f"{name}.weight", rng.normal(0, fan**-0.5, (out, inn // group, k, k)))]
        inputs += [constant(f"{name}.bias", rng.normal(0, 0.05, out))] if bias else []
        attrs: dict[str, Any] = {
            "dilations": [1, 1],
            "group": group,
            "kernel_shape": [k, k],
            "pads": [k // 2] * 4,
            "strides": [stride] * 2,
        }
        nodes.append(helper.make_node("Conv", inputs, [f"/{name}/Conv_output_0"], f"/{name}/Conv", **attrs))
        return f"/{name}/Conv_output_0"

    def norm_relu(x: str, name: str, channels: int) -> str:
        values = {
            "weight": rng.uniform(0.8, 1.8, channels),
            "bias": rng.normal(0, 0.1, channels),
            "running_mean": rng.normal(0, 0.1, channels),
            "running_var": rng.uniform(0.5, 1.5, channels),
        }
        inputs = [x, *(constant(f"{name}.norm.{key}", v) for key, v in values.items())]
        norm = f"/{name}/BatchNormalization_output_0"
        nodes.append(helper.make_node("BatchNormalization", inputs, [norm], f"/{name}/Norm", epsilon=1e-5))
        nodes.append(helper.make_node("Relu", [norm], [f"/{name}/Relu_output_0"], f"/{name}/Relu"))
        return f"/{name}/Relu_output_0"

    def upsample(x: str, name: str) -> str:
        scales = constant(f"{name}.scales", np.array([1, 1, 2, 2]))
        attrs: dict[str, Any] = {
            "coordinate_transformation_mode": "asymmetric",
            "cubic_coeff_a": -0.75,
            "mode": "nearest",
            "nearest_mode": "floor",
        }
        nodes.append(
            helper.make_node("Resize", [x, "", scales], [f"/{name}/Resize_output_0"], f"/{name}/Resize", **attrs)
        )
        return f"/{name}/Resize_output_0"

    def binary(op: str, inputs: list[str], name: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"/{name}/{op}_output_0"], f"/{name}/{op}", **attrs))
        return f"/{name}/{op}_output_0"

    x = norm_relu(conv("image", "stem", 3, STEM, 3, 2, bias=False), "stem", STEM)
    levels: list[str] = []
    inn = STEM
    for i, out in enumerate(LEVELS, 2):
        if i == 2:
            x = conv(x, f"layer{i}", inn, out, 3, 2, bias=False)
        else:  # depthwise separable
            x = norm_relu(conv(x, f"layer{i}.depth", inn, inn, 3, 2, inn, bias=False), f"layer{i}.depth", inn)
            x = conv(x, f"layer{i}", inn, out, bias=False)
        x = norm_relu(x, f"layer{i}", out)
        levels, inn = [*levels, x], out
    laterals = [conv(c, f"lateral{i}", n, WIDTH) for i, (c, n) in enumerate(zip(levels, LEVELS, strict=True), 2)]
    m4 = laterals[2]
    m3 = binary("Add", [laterals[1], upsample(m4, "topdown3")], "merge3")
    m2 = binary("Add", [laterals[0], upsample(m3, "topdown2")], "merge2")
    for i, m in enumerate((m2, m3, m4), 2):
        conv(m, f"smooth{i}", WIDTH, WIDTH, 3)
        nodes[-1].output[0] = f"p{i}"
    reduced = norm_relu(conv(x, "neck.reduce", LEVELS[2], NECK, bias=False), "neck.reduce", NECK)
    x = binary("Concat", [upsample(reduced, "neck.upsample"), laterals[1]], "neck", axis=1)
    x = norm_relu(conv(x, "neck.mix", NECK + WIDTH, WIDTH, bias=False), "neck.mix", WIDTH)
    nodes[-1].output[0] = "neck"
    shapes = {f"p{i}": 128 // 2**i for i in (2, 3, 4)} | {"neck": 16}
    graph = helper.make_graph(
        nodes,
        "fpn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 128, 128])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH, size, size])
            for name, size in shapes.items()
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
