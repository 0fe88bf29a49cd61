"""RGB-D fusion: colour and depth, two branches summed late, which are one convolution of both if both are linear.

Hazirbas et al., "FuseNet" (ACCV 2016), sum the feature maps of a depth branch and a colour branch; Couprie et al.,
"Indoor Semantic Segmentation using Depth Information" (ICLR 2013), give one network colour and depth together. Late
fusion of linear branches of one geometry is early fusion: W_c c + W_d d = (W_c W_d)·concat(c, d). Two heads: `scores`
sums a 3×3 convolution and a BatchNormalization of each modality, then has a ReLU and 1×1 layers; `edges` does the
same, but smooths the depth, which is the noisier of the two, with a 5×5 convolution.
Expected of fold-affine and join-concat: the branches of `scores` become one 3×3 convolution of the concatenated image;
those of `edges` stay two, since their kernels differ. So would they if depth were rectified or thresholded before the
sum, as FuseNet's is; a depth denoised by a MaxPool before its convolution is an input like any other. By default only
the BatchNormalizations fold: one convolution of both takes as many multiply-adds as two, and is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN, CLASSES = 32, 48, 13


def build() -> onnx.ModelProto:
    """The model: rgb (batch, 3, 48, 48) and depth (batch, 1, 48, 48) float32 → scores and edges."""
    rng = np.random.default_rng(6)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(x: str, name: str, inn: int, out: int, k: int, output: str = "") -> str:
        inputs = [
            x,
            constant(f"{name}.weight", rng.normal(0, (inn * k * k) ** -0.5, (out, inn, k, k))),
            constant(f"{name}.bias", rng.normal(0, 0.05, out)),
        ]
        attrs: dict[str, Any] = {
            "dilations": [1, 1],
            "group": 1,
            "kernel_shape": [k, k],
            "pads": [k // 2] * 4,
            "strides": [1, 1],
        }
        output = output or f"/{name}/Conv_output_0"
        nodes.append(helper.make_node("Conv", inputs, [output], f"/{name}/Conv", **attrs))
        return output

    def norm(x: str, name: str, channels: int) -> str:
        values = {
            "weight": rng.uniform(0.5, 1.5, channels),
            "bias": rng.normal(0, 0.1, channels),
            "running_mean": rng.normal(0, 0.1, channels),
            "running_var": rng.uniform(0.5, 1.5, channels),
        }
        inputs = [x, *(constant(f"{name}.{key}", v) for key, v in values.items())]
        output = f"/{name}/BatchNormalization_output_0"
        nodes.append(helper.make_node("BatchNormalization", inputs, [output], f"/{name}/Norm", epsilon=1e-5))
        return output

    def branch(x: str, name: str, inn: int, k: int) -> str:
        return norm(conv(x, f"{name}.conv", inn, WIDTH, k), f"{name}.norm", WIDTH)

    def simple(op: str, inputs: list[str], name: str) -> str:
        nodes.append(helper.make_node(op, inputs, [f"/{name}/{op}_output_0"], f"/{name}/{op}"))
        return f"/{name}/{op}_output_0"

    sums = {
        "scores": [branch("rgb", "scores.rgb", 3, 3), branch("depth", "scores.depth", 1, 3)],
        "edges": [branch("rgb", "edges.rgb", 3, 3), branch("depth", "edges.depth", 1, 5)],
    }
    for name, summands in sums.items():
        x = simple("Relu", [simple("Add", summands, f"{name}.fuse")], f"{name}.fuse")
        x = norm(conv(x, f"{name}.mix", WIDTH, HIDDEN, 1), f"{name}.mixnorm", HIDDEN)
        conv(simple("Relu", [x], f"{name}.mix"), f"{name}.classify", HIDDEN, CLASSES, 1, name)
    space = [48, 48]
    graph = helper.make_graph(
        nodes,
        "rgbd_fusion",
        [
            helper.make_tensor_value_info("rgb", TensorProto.FLOAT, ["batch", 3, *space]),
            helper.make_tensor_value_info("depth", TensorProto.FLOAT, ["batch", 1, *space]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES, *space]) for name in sums],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
