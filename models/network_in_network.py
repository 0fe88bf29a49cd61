"""Network in Network: a small network of 1×1 convolutions, slid over the image.

Lin, Chen and Yan, "Network In Network" (ICLR 2014), introduced 1×1 convolutions. A k×k convolution and two 1×1
convolutions, each with a ReLU, form a multilayer perceptron that is applied to every patch. At the end, the maps, one
per class, are averaged over the image (100 of them, as for CIFAR-100). Here the last block's 1×1 layers are linear, as
in a bottleneck classifier, and end in a BatchNormalization.

Rewritten: the BatchNormalizations fold. The last block's linear 1×1 layers become one 1×1 convolution, which then moves
behind the average pooling: the average of W·x + b over all pixels is W·(average of x) + b. So it runs once instead of
256 times.

Left alone: 1×1 layers with a ReLU between them are not a product of matrices.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation

CLASSES, SIZE = 100, 32
#: The last feature maps before the classes.
MAPS = "/block2.relu/Relu_output_0"


def build() -> onnx.ModelProto:
    """The model: image (batch, 3, 32, 32) float32 → logits (batch, 100) and the last feature maps."""
    e = Exporter(1)

    def relu(x: str, name: str) -> str:
        return e.node("Relu", [x], name)

    x = relu(e.norm(e.conv("image", "block1.conv", 3, 96, 5, gain=2), "block1.norm", 96), "block1.relu")
    x = relu(e.conv(x, "block1.mlp1", 96, 80, gain=2), "block1.relu1")
    x = relu(e.conv(x, "block1.mlp2", 80, 48, gain=2), "block1.relu2")
    x = e.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = relu(e.norm(e.conv(x, "block2.conv", 48, 64, 3, gain=2), "block2.norm", 64), "block2.relu")
    x = e.conv(x, "block2.mlp1", 64, 64, gain=2)
    x = e.conv(x, "block2.mlp2", 64, CLASSES, gain=2)
    x = e.node("GlobalAveragePool", [e.norm(x, "block2.norm2", CLASSES)], "pool")
    e.node("Flatten", [x], "flatten", "logits", axis=1)
    half = SIZE // 2
    return e.model(
        "network_in_network",
        {"image": ["batch", 3, SIZE, SIZE]},
        {"logits": ["batch", CLASSES], MAPS: ["batch", 64, half, half]},
    )


SYSTEM = System(
    build,
    {"image": (1, 3, SIZE, SIZE)},
    rewrites=("fold-affine", "fold-chains", "commute-spatial"),
    properties=(
        Law(
            "moving the image by the stride of 2 moves the maps by 1",
            lambda s: translation(
                function_of(s, output=MAPS), object_in(1, 3, SIZE, SIZE, size=8, start=10), 2, stride=2, margin=3
            ),
            1e-5,
        ),
    ),
    refusals=(Refusal("/block1.relu1/Relu", "ReLU is not linear: the layers before and after it stay separate"),),
)
