"""RGB-D fusion: two summed linear branches, for colour and depth, are one convolution of both.

Hazirbas et al., "FuseNet" (ACCV 2016), sum the feature maps of a depth branch and a colour branch. Couprie et al.,
"Indoor Semantic Segmentation using Depth Information" (ICLR 2013), give one network colour and depth together. In
pointwise terms, late fusion of linear branches with the same geometry is early fusion: W_c·c + W_d·d = (W_c
W_d)·concat(c, d). As torch writes it, the model has two heads. `scores` sums a 3×3 convolution and a BatchNormalization
of each modality; a ReLU and 1×1 layers follow. `edges` does the same, but uses a 5×5 convolution to smooth the depth,
which is noisier than the colour.

Rewritten: the branches of `scores` become one 3×3 convolution of the concatenated image. It takes as many multiply-adds
as the two, so only timing can tell whether it pays. BatchNormalizations fold.

Left alone: the branches of `edges`, because their filters differ in size. Branches with a ReLU or a threshold before
the sum would stay as well, as in FuseNet itself.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Kept, Refusal, System, normal, outputs
from pwopt.running.session import Session

WIDTH, HIDDEN, CLASSES, SIZE = 32, 48, 13, 48


def build() -> onnx.ModelProto:
    """The model: rgb (batch, 3, 48, 48) and depth (batch, 1, 48, 48) float32 → scores and edges."""
    e = Exporter(6)

    def branch(x: str, name: str, inn: int, k: int) -> str:
        return e.norm(e.conv(x, f"{name}.conv", inn, WIDTH, k), f"{name}.norm", WIDTH)

    sums = {
        "scores": [branch("rgb", "scores.rgb", 3, 3), branch("depth", "scores.depth", 1, 3)],
        "edges": [branch("rgb", "edges.rgb", 3, 3), branch("depth", "edges.depth", 1, 5)],
    }
    for name, summands in sums.items():
        x = e.node("Relu", [e.node("Add", summands, f"{name}.fuse")], f"{name}.fuse")
        x = e.norm(e.conv(x, f"{name}.mix", WIDTH, HIDDEN), f"{name}.mixnorm", HIDDEN)
        e.conv(e.node("Relu", [x], f"{name}.mix"), f"{name}.classify", HIDDEN, CLASSES, output=name)
    space = [SIZE, SIZE]
    return e.model(
        "rgbd_fusion",
        {"rgb": ["batch", 3, *space], "depth": ["batch", 1, *space]},
        {name: ["batch", CLASSES, *space] for name in sums},
    )


def scores(session: Session) -> np.ndarray:
    """The scores of a random image."""
    return outputs(session, rgb=normal(1, 3, SIZE, SIZE), depth=normal(1, 1, SIZE, SIZE, seed=1))["scores"]


SYSTEM = System(
    build,
    {"rgb": (1, 3, SIZE, SIZE), "depth": (1, 1, SIZE, SIZE)},
    rewrites=("fold-affine", "join-concat"),
    measured=("join-concat",),
    properties=(Kept("early fusion gives the scores of late fusion", scores, 1e-5),),
    refusals=(
        Refusal("/edges.depth.conv/Conv", "its 5×5 filter differs from the colour branch's 3×3"),
        Refusal("/scores.fuse/Relu", "ReLU is not linear"),
    ),
)
