"""Physics fields: a learned model of clouds that cannot lose water or energy.

Beucler et al., "Enforcing Analytic Constraints in Neural Networks Emulating Physical Systems" (PRL 2021). Channels are
physical quantities of a grid cell: temperature, vapour, cloud water, ice, rain, snow, and tracers. Conservation laws
are rows of a matrix A that says what to sum: A·x is the water and the moist static energy of a cell. A pointwise layer
is a process inside one cell, the same everywhere. The model has two linear processes with A·W = A (phase changes: what
one quantity loses, others gain). It also has a network on normalised fields. The network's tendency passes through P =
I − Aᵀ(AAᵀ)⁻¹A, so that A·P = 0. Whatever the network computes, it can only redistribute.

Rewritten: the two processes become one matrix, A·(W₂W₁) = A·W₁ = A. The normalisation folds into the network's first
layer. Its last layer, the denormalisation and P become one matrix M, and A·M = 0 still holds. P removes two of twelve
dimensions, so M has rank 10. It is stored as two maps, 128→10→12, which take fewer multiply-adds than one. Folding
multiplies exact laws, so they still hold up to the rounding of the weights.

Left alone: the network's ReLUs. The law holds nevertheless, because P comes last.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, normal
from pwopt.invariants import conservation, function_of

SIZE, WIDTH = 24, 128
#: Temperature, vapour, cloud water, cloud ice, rain, snow, and six passive tracers.
QUANTITIES = 12
#: Latent heat of vaporisation and of fusion, relative to the heat capacity of air times the temperature scale used
#: here (2.5e6 and 3.34e5 J/kg; 1004 J/kg/K; 1 g/kg and 1 K).
VAPORISATION, FUSION = 2.5e6 * 1e-3 / 1004, 3.34e5 * 1e-3 / 1004


def laws() -> np.ndarray:
    """A: water (vapour, cloud water, ice, rain, snow) and moist energy (temperature, vapour, ice, snow): (2, 12)."""
    a = np.zeros((2, QUANTITIES))
    a[0, 1:6] = 1
    a[1, 0], a[1, 1], a[1, [3, 5]] = 1, VAPORISATION, -FUSION
    return a


def projector() -> np.ndarray:
    """I − Aᵀ(AAᵀ)⁻¹A, the projection onto the changes that no law forbids: (12, 12)."""
    a = laws()
    return np.asarray(np.eye(QUANTITIES) - a.T @ np.linalg.inv(a @ a.T) @ a)


def build() -> onnx.ModelProto:
    """The model: fields (batch, 12, 24, 24) float32 → next (batch, 12, 24, 24)."""
    e = Exporter(21)

    def process() -> np.ndarray:
        return np.asarray(np.eye(QUANTITIES) + projector() @ e.rng.normal(0, 0.1, (QUANTITIES, QUANTITIES)))

    x = e.conv("fields", "condensation", QUANTITIES, QUANTITIES, bias=False, weight=process())
    x = e.conv(x, "freezing", QUANTITIES, QUANTITIES, bias=False, weight=process())
    shape = (QUANTITIES, 1, 1)
    spread = e.constant("std", e.rng.uniform(0.5, 2.0, shape))
    y = e.node("Sub", [x, e.constant("mean", e.rng.normal(0, 1, shape))], "normalise")
    y = e.node("Div", [y, spread], "normalise")
    y = e.node("Relu", [e.norm(e.conv(y, "network/0", QUANTITIES, WIDTH, gain=2), "network/1", WIDTH)], "network/2")
    y = e.node("Relu", [e.conv(y, "network/3", WIDTH, WIDTH, gain=2)], "network/4")
    y = e.node("Mul", [e.conv(y, "network/5", WIDTH, QUANTITIES), spread], "denormalise")
    y = e.conv(y, "constraint", QUANTITIES, QUANTITIES, bias=False, weight=projector())
    e.node("Add", [x, y], "step", "next")
    fields: list[int | str] = ["batch", QUANTITIES, SIZE, SIZE]
    return e.model("physics", {"fields": fields}, {"next": fields})


def residual(law: int) -> Law:
    """The conservation law of water (0) or energy (1)."""
    names = ("water", "moist energy")
    return Law(
        f"{names[law]} is conserved in every cell",
        lambda s: conservation(function_of(s), normal(1, QUANTITIES, SIZE, SIZE), laws()[law]),
        1e-6,
    )


SYSTEM = System(
    build,
    {"fields": (1, QUANTITIES, SIZE, SIZE)},
    rewrites=("fold-affine", "fold-chains"),
    properties=(residual(0), residual(1)),
    refusals=(
        Refusal("/network/2/Relu", "ReLU is not linear"),
        Refusal("/network/4/Relu", "ReLU is not linear"),
    ),
)
