"""Distillation projector: a small student's features, mapped to the width of its teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), compare a student's features with those of its teacher.
Their widths differ, so a learned regressor lies in between. The idea is from Hinton et al., "Distilling the Knowledge
in a Neural Network" (2015). A pointwise layer here is a change of basis between two networks. Models that were exported
for evaluation keep it. As torch writes it, the model has a convolutional student, its last Linear layer, the projector
(another Linear), and the mean squared difference to the teacher's features, which are an input.

Rewritten: the projector follows a linear layer, P(Wx + b) + p = (PW)x + (Pb + p). One map 64→192 takes little more than
a third of the multiply-adds of 64→128→192. The student's BatchNormalizations fold into its convolutions. The loss is a
function of the projector's result, so it does not change.

Left alone: the hint's regressor, a 1×1 convolution in the middle of the student, follows a ReLU.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Kept, Refusal, System, normal, outputs
from pwopt.running.session import Session

SIZE, WIDTHS, EMBEDDING, TEACHER, HINT = 32, (3, 16, 32, 64), 128, 192, 48


def build() -> onnx.ModelProto:
    """The model: image, the teacher's features and its hint → projected (batch, 192), loss and hint_loss."""
    e = Exporter(12)

    def distance(a: str, b: str, name: str, output: str) -> str:
        off = e.node("Sub", [a, b], name)
        squared = e.node("Pow", [off, e.constant(f"{name}.exponent", 2.0)], name)
        return e.node("ReduceMean", [squared], name, output, keepdims=0)

    x, hint = "image", ""
    for i, (inn, out) in enumerate(itertools.pairwise(WIDTHS), 1):
        x = e.conv(x, f"student/layer{i}/conv", inn, out, 3, stride=2, bias=False, gain=2)
        x = e.node("Relu", [e.norm(x, f"student/layer{i}/norm", out)], f"student/layer{i}")
        hint = x if i == 2 else hint
    x = e.node("GlobalAveragePool", [x], "student/pool")
    x = e.node("Flatten", [x], "student", axis=1)
    x = e.gemm(x, "student/embedding", WIDTHS[-1], EMBEDDING)
    x = e.gemm(x, "projector", EMBEDDING, TEACHER, "projected")
    distance(x, "teacher", "loss", "loss")
    hint = e.conv(hint, "hint/regressor", WIDTHS[2], HINT)
    distance(hint, "teacher_hint", "hint/loss", "hint_loss")
    return e.model(
        "distillation_projector",
        {
            "image": ["batch", 3, SIZE, SIZE],
            "teacher": ["batch", TEACHER],
            "teacher_hint": ["batch", HINT, SIZE // 4, SIZE // 4],
        },
        {"projected": ["batch", TEACHER], "loss": [], "hint_loss": []},
    )


def losses(session: Session) -> np.ndarray:
    """Compute both losses for eight random images."""
    shapes = {"image": (8, 3, SIZE, SIZE), "teacher": (8, TEACHER), "teacher_hint": (8, HINT, SIZE // 4, SIZE // 4)}
    found = outputs(session, **{name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})
    return np.array([found["loss"], found["hint_loss"]])


SYSTEM = System(
    build,
    {
        "image": (8, 3, SIZE, SIZE),
        "teacher": (8, TEACHER),
        "teacher_hint": (8, HINT, SIZE // 4, SIZE // 4),
    },
    rewrites=("fold-affine", "fold-chains"),
    properties=(
        Kept("the loss against the teacher", lambda s: losses(s)[0], 1e-6),
        Kept("the loss of the hint", lambda s: losses(s)[1], 1e-6),
    ),
    refusals=(Refusal("/student/layer2/Relu", "the hint's regressor does not fold across the ReLU before it"),),
)
