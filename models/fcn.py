"""Fully convolutional network: dense features, brought to image size, classified at every pixel.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015), in the exporter's
spelling: a backbone of stride 8 with BatchNormalizations and ReLUs, the 3×3 layer of torchvision's FCN head, its
features interpolated bilinearly (half_pixel) to the size of the image, and only there the 1×1 classifier with bias.
Interpolation weights sum to one, so classifier and interpolation may change places, bias and all; "Hypercolumns"
(Hariharan et al., CVPR 2015) classify before they upsample for the same reason.
Expected: the BatchNormalizations fold, and the classifier moves before the Resize, to 64 times fewer positions. The
ArgMax stays: every pixel keeps its label. The classifier must not move before a Resize that extrapolates
(tf_crop_and_resize), nor a map with a bias behind an AveragePool that counts its padding: they do not keep constants.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTHS = (3, 16, 32, 64)
CLASSES = 21
STRIDE = 8


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 64, 64) float32 → scores (batch, 21, 64, 64) and labels (batch, 64, 64) int64."""
    rng = np.random.default_rng(4)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def block(x: str, name: str, inn: int, out: int, stride: int) -> str:
        """3×3 convolution without bias, BatchNormalization, ReLU."""
        inputs = [x, constant(f"{name}.conv.weight", rng.normal(0, (2 / (inn * 9)) ** 0.5, (out, inn, 3, 3)))]
        attrs: dict[str, Any] = {
            "dilations": [1, 1],
            "group": 1,
            "kernel_shape": [3, 3],
            "pads": [1] * 4,
            "strides": [stride] * 2,
        }
        nodes.append(helper.make_node("Conv", inputs, [f"/{name}/Conv_output_0"], f"/{name}/Conv", **attrs))
        values = {
            "weight": rng.uniform(0.5, 1.5, out),
            "bias": rng.normal(0, 0.1, out),
            "running_mean": rng.normal(0, 0.1, out),
            "running_var": rng.uniform(0.5, 1.5, out),
        }
        inputs = [f"/{name}/Conv_output_0", *(constant(f"{name}.norm.{key}", v) for key, v in values.items())]
        norm = f"/{name}/BatchNormalization_output_0"
        nodes.append(helper.make_node("BatchNormalization", inputs, [norm], f"/{name}/Norm", epsilon=1e-5))
        nodes.append(helper.make_node("Relu", [norm], [f"/{name}/Relu_output_0"], f"/{name}/Relu"))
        return f"/{name}/Relu_output_0"

    x = "image"
    for i, (inn, out) in enumerate(itertools.pairwise(WIDTHS), 1):
        x = block(x, f"layer{i}", inn, out, 2)
    x = block(x, "head", WIDTHS[-1], WIDTHS[-1], 1)
    resize: dict[str, Any] = {
        "coordinate_transformation_mode": "half_pixel",
        "cubic_coeff_a": -0.75,
        "mode": "linear",
        "nearest_mode": "floor",
    }
    inputs = [x, "", constant("upsample.scales", np.array([1, 1, STRIDE, STRIDE]))]
    nodes.append(helper.make_node("Resize", inputs, ["/upsample/Resize_output_0"], "/upsample/Resize", **resize))
    inputs = [
        "/upsample/Resize_output_0",
        constant("classifier.weight", rng.normal(0, WIDTHS[-1] ** -0.5, (CLASSES, WIDTHS[-1], 1, 1))),
        constant("classifier.bias", rng.normal(0, 0.2, CLASSES)),
    ]
    attrs: dict[str, Any] = {
        "dilations": [1, 1],
        "group": 1,
        "kernel_shape": [1, 1],
        "pads": [0] * 4,
        "strides": [1, 1],
    }
    nodes.append(helper.make_node("Conv", inputs, ["scores"], "/classifier/Conv", **attrs))
    nodes.append(helper.make_node("ArgMax", ["scores"], ["labels"], "/labels/ArgMax", axis=1, keepdims=0))
    graph = helper.make_graph(
        nodes,
        "fcn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES, 64, 64]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", 64, 64]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
