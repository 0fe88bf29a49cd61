"""Protein distance map: every pair of residues, as a pixel of an image.

Yang et al., "Improved protein structure prediction using predicted interresidue orientations" (trRosetta, PNAS 2020),
lay out the features of residues i and j over the rows and columns of an L×L map, and join them with features of the
pair. A 1×1 convolution on that map applies one function to every pair. A residual network with InstanceNormalization
and ELU follows. Distances have no direction, so its features are averaged with their transpose. Pointwise layers then
classify the distance of each pair into bins. As torch writes it, Unsqueeze and Expand create the layout.

Rewritten: in W·concat(sᵢ, sⱼ, pᵢⱼ) = Wₐsᵢ + W_b sⱼ + W_c pᵢⱼ, the first two terms are constant along a whole row or
column. So they are computed for L residues instead of L² pairs, and laid out afterwards. At the beginning and at the
end, two consecutive linear layers become one.

Left alone: InstanceNormalization uses the statistics of the map itself, so it is not a fixed map. ELU is not linear.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, normal, outputs
from pwopt.invariants import symmetry
from pwopt.running.session import Session

LENGTH, SINGLE, PAIR, EMBEDDED, WIDTH, HIDDEN, BINS = 48, 42, 24, 96, 32, 64, 37


def build() -> onnx.ModelProto:
    """The model: single (batch, 42, 48) and pair (batch, 24, 48, 48) float32 → distances (batch, 37, 48, 48)."""
    e = Exporter(13)
    laid = []
    for side, axis, shape in (("rows", 3, [1, 1, 1, LENGTH]), ("columns", 2, [1, 1, LENGTH, 1])):
        x = e.node("Unsqueeze", ["single", e.constant(f"{side}.axes", [axis])], side)
        laid.append(e.node("Expand", [x, e.constant(f"{side}.shape", shape)], side))
    x = e.node("Concat", [*laid, "pair"], "pairs", axis=1)
    x = e.conv(x, "embed/0", 2 * SINGLE + PAIR, EMBEDDED)
    x = e.conv(x, "embed/1", EMBEDDED, WIDTH, bias=False)

    def instance_norm(x: str, name: str) -> str:
        scale = e.constant(f"{name}.weight", e.rng.uniform(0.5, 1.5, WIDTH))
        shift = e.constant(f"{name}.bias", e.rng.normal(0, 0.1, WIDTH))
        return e.node("InstanceNormalization", [x, scale, shift], name, epsilon=1e-6)

    x = start = e.node("Elu", [instance_norm(x, "embed/norm")], "embed", alpha=1.0)
    for i in (1, 2):
        x = instance_norm(e.conv(x, f"block/conv{i}", WIDTH, WIDTH, 3, bias=False), f"block/norm{i}")
        x = e.node("Elu", [x], f"block/act{i}", alpha=1.0) if i == 1 else x
    x = e.node("Elu", [e.node("Add", [x, start], "block")], "block", alpha=1.0)
    flipped = e.node("Transpose", [x], "symmetrise", perm=[0, 1, 3, 2])
    x = e.node("Add", [x, flipped], "symmetrise")
    x = e.node("Mul", [x, e.constant("symmetrise.half", 0.5)], "symmetrise")
    x = e.conv(e.conv(x, "head/0", WIDTH, HIDDEN), "head/1", HIDDEN, BINS)
    e.node("Softmax", [x], "head", "distances", axis=1)
    space = [LENGTH, LENGTH]
    return e.model(
        "protein_distance_map",
        {"single": ["batch", SINGLE, LENGTH], "pair": ["batch", PAIR, *space]},
        {"distances": ["batch", BINS, *space]},
    )


def asymmetry(session: Session) -> float:
    """The asymmetry of the distances of a random protein."""
    pair = normal(1, PAIR, LENGTH, LENGTH)
    return symmetry(lambda x: outputs(session, single=x, pair=pair)["distances"], normal(1, SINGLE, LENGTH, seed=1))


SYSTEM = System(
    build,
    {"single": (1, SINGLE, LENGTH), "pair": (1, PAIR, LENGTH, LENGTH)},
    rewrites=("clean-up", "fold-affine", "fold-chains", "commute-spatial"),
    properties=(Law("the map is symmetric in (i, j)", asymmetry, 1e-6),),
    refusals=(
        Refusal("/embed/norm/InstanceNormalization", "its statistics depend on the data"),
        Refusal("/embed/Elu", "ELU is not linear"),
    ),
)
