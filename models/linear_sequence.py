"""Linear sequence: 1×1 convolutions with nothing between them, 64→128→192→128→32.

This is the smallest system. A pointwise convolution multiplies the channels of every pixel by one matrix, so a sequence
of them multiplies by the product of their matrices. ExpandNets (Guo, Alvarez and Salzmann, NeurIPS 2020) train such
expansions on purpose and contract them afterwards. pwopt finds them in exports where the contraction was forgotten.

Rewritten: W₄(W₃(W₂(W₁x + b₁) + b₂) + b₃) + b₄ becomes one convolution of 64·32 weights and 32 biases, multiplied in
float64 and rounded once.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Law, System, normal
from pwopt.invariants import function_of
from pwopt.running.session import Session

WIDTHS = (64, 128, 192, 128, 32)


def build() -> onnx.ModelProto:
    """The model: x (batch, 64, height, width) float32 → y (batch, 32, height, width)."""
    e, x = Exporter(0), "x"
    for i, (inn, out) in enumerate(itertools.pairwise(WIDTHS), 1):
        x = e.conv(x, f"conv{i}", inn, out, bias=0.1, output="y" if i == len(WIDTHS) - 1 else f"h{i}")
    space = ["height", "width"]
    return e.model("linear_sequence", {"x": ["batch", WIDTHS[0], *space]}, {"y": ["batch", WIDTHS[-1], *space]})


def nonlinearity(session: Session) -> float:
    """‖f(a + b) − f(a) − f(b) + f(0)‖ / ‖f(a + b)‖ for two random images."""
    f = function_of(session)
    a, b = normal(1, WIDTHS[0], 16, 16), normal(1, WIDTHS[0], 16, 16, seed=1)
    both = f(a + b)
    return float(np.linalg.norm(both - f(a) - f(b) + f(np.zeros_like(a))) / np.linalg.norm(both))


SYSTEM = System(
    build,
    {"x": (1, WIDTHS[0], 32, 32)},
    rewrites=("fold-chains",),
    properties=(Law("f(a + b) = f(a) + f(b) − f(0)", nonlinearity, 1e-6),),
)
