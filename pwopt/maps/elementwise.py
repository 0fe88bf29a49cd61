"""Operators that act on every element alike."""

from __future__ import annotations

import numpy as np

#: Operators that act on every element alike, each with its Lipschitz constant.
ELEMENTWISE = {
    "Abs": 1.0, "Clip": 1.0, "Elu": 1.0, "Erf": 1.13, "Gelu": 1.13, "HardSigmoid": 1.0, "HardSwish": 1.5,
    "LeakyRelu": 1.0, "Mish": 1.1, "Neg": 1.0, "Relu": 1.0, "Selu": 1.76, "Sigmoid": 0.25, "Softplus": 1.0,
    "Softsign": 1.0, "Swish": 1.1, "Tanh": 1.0, "ThresholdedRelu": np.inf,
    "Celu": 1.0, "Exp": np.inf,
}  # fmt: skip
