"""Network in Network: mlpconv blocks, a micro network of 1×1 convolutions slid over the image.

Lin, Chen and Yan, "Network In Network" (ICLR 2014): a k×k convolution and two 1×1 convolutions, each with
a ReLU, then global average pooling over one map per class. The last block's 1×1 layers are linear here, as
in its later readings as a bottleneck classifier, and end in a BatchNormalization.
Expected: the BatchNormalizations and the linear 1×1 layers fold; nothing folds across a ReLU. Moving the
input by the network's stride moves every feature map (translation equivariance), before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 10


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 32, 32) float32 → logits (batch, 10) and the last feature maps."""
    rng = np.random.default_rng(1)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(x: str, name: str, inn: int, out: int, k: int) -> str:
        weight = constant(f"{name}.weight", rng.normal(0, (2 / (inn * k * k)) ** 0.5, (out, inn, k, k)))
        bias = constant(f"{name}.bias", rng.normal(0, 0.05, out))
        attrs = {"kernel_shape": [k, k], "pads": [k // 2] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
        nodes.append(helper.make_node("Conv", [x, weight, bias], [f"/{name}/Conv_output_0"], f"/{name}/Conv", **attrs))
        return f"/{name}/Conv_output_0"

    def norm(x: str, name: str, channels: int) -> str:
        values = {
            "weight": rng.uniform(0.5, 1.5, channels),
            "bias": rng.normal(0, 0.1, channels),
            "running_mean": rng.normal(0, 0.1, channels),
            "running_var": rng.uniform(0.5, 1.5, channels),
        }
        inputs = [x, *(constant(f"{name}.{key}", v) for key, v in values.items())]
        nodes.append(
            helper.make_node("BatchNormalization", inputs, [f"/{name}/BatchNormalization_output_0"], epsilon=1e-5)
        )
        return f"/{name}/BatchNormalization_output_0"

    def relu(x: str, name: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"/{name}/Relu_output_0"], f"/{name}/Relu"))
        return f"/{name}/Relu_output_0"

    x = relu(norm(conv("image", "block1.conv", 3, 96, 5), "block1.norm", 96), "block1.relu")
    x = relu(conv(x, "block1.mlp1", 96, 80, 1), "block1.relu1")
    x = relu(conv(x, "block1.mlp2", 80, 48, 1), "block1.relu2")
    nodes.append(
        helper.make_node("MaxPool", [x], ["/pool/MaxPool_output_0"], "/pool", kernel_shape=[2, 2], strides=[2, 2])
    )
    x = relu(norm(conv("/pool/MaxPool_output_0", "block2.conv", 48, 64, 3), "block2.norm", 64), "block2.relu")
    x = conv(x, "block2.mlp1", 64, 64, 1)
    x = conv(x, "block2.mlp2", 64, CLASSES, 1)
    x = norm(x, "block2.norm2", CLASSES)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["/pool/GlobalAveragePool_output_0"], "/pool2"))
    nodes.append(helper.make_node("Flatten", ["/pool/GlobalAveragePool_output_0"], ["logits"], "/flatten", axis=1))
    graph = helper.make_graph(
        nodes,
        "network_in_network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES]),
            helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", CLASSES, 16, 16]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt")


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".onnx"))
