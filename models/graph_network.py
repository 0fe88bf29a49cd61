"""Graph network: features of nodes, mixed along a fixed graph.

Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks" (ICLR 2017), write a layer as H' =
Â·H·W. The weight W acts on the features of each node alone, which is a 1×1 convolution over nodes. The adjacency Â
mixes nodes, feature by feature. If a graph has only self-loops, Â = I and the layer acts on each node alone, as an
"MLP". Wu et al., "Simplifying Graph Convolutional Networks" (ICML 2019), omit the activations between layers. The model
is a fixed sensor network, as for traffic (Yu et al., "STGCN", IJCAI 2018), spelled as torch exports GCNConv with a
dense adjacency. It has an encoder with a ReLU, one head with self-loops only, and one head with two graph layers.

Rewritten: the product with I is removed. On the real graph, Â acts along the nodes and W along the features, so (ÂH)W =
Â(HW) in either order. The second layer's W runs before both adjacencies. There it meets the first layer's W, and both
become one narrow map. Each adjacency then mixes 16 features instead of 96. The biases stay behind the adjacencies, the
first one as b·W, because the rows of Â do not sum to one, so Â would change a bias.

Left alone: nothing folds across the encoder's ReLU. The two products with Â stay separate, because the bias between
them acts on the features and not on the nodes.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, normal
from pwopt.invariants import function_of, locality

NODES, FEATURES, HIDDEN, WIDE, CLASSES = 48, 32, 64, 96, 16


def adjacency() -> np.ndarray:
    """D^(−1/2)·(A + I)·D^(−1/2) of a ring of sensors with a few shortcuts."""
    rng = np.random.default_rng(11)
    a = np.eye(NODES)
    for i in range(NODES):
        a[i, (i + 1) % NODES] = a[(i + 1) % NODES, i] = 1
    for i, j in rng.integers(0, NODES, (NODES // 2, 2)):
        a[i, j] = a[j, i] = 1
    scale = a.sum(1) ** -0.5
    return np.asarray(scale[:, None] * a * scale)


def build() -> onnx.ModelProto:
    """The model: sensors (batch, 48, 32) float32 → alone and mixed (batch, 48, 16)."""
    e = Exporter(11)
    x = e.node("Relu", [e.dense("sensors", "encoder", FEATURES, HIDDEN)], "encoder")
    loops = e.node("MatMul", [e.constant("self_loops", np.eye(NODES)), x], "alone/propagate")
    loops = e.dense(loops, "alone/lin1", HIDDEN, WIDE)
    e.dense(loops, "alone/lin2", WIDE, CLASSES, output="alone")
    graph = e.constant("adjacency", adjacency())
    for layer, inn, out, output in (("conv1", HIDDEN, WIDE, ""), ("conv2", WIDE, CLASSES, "mixed")):
        x = e.dense(x, f"mixed/{layer}/lin", inn, out, bias=False)
        x = e.node("MatMul", [graph, x], f"mixed/{layer}/propagate")
        shift = e.constant(f"mixed/{layer}.bias", e.rng.normal(0, 0.05, out))
        x = e.node("Add", [x, shift], f"mixed/{layer}", output)
    return e.model(
        "graph_network",
        {"sensors": ["batch", NODES, FEATURES]},
        {name: ["batch", NODES, CLASSES] for name in ("alone", "mixed")},
    )


SYSTEM = System(
    build,
    {"sensors": (4, NODES, FEATURES)},
    rewrites=("clean-up", "fold-chains", "commute-spatial"),
    properties=(
        Law(
            "without neighbours, a node's output depends on that node alone",
            lambda s: locality(function_of(s, output="alone"), normal(2, NODES, FEATURES), index=7),
            1e-6,
        ),
    ),
    refusals=(
        Refusal("/encoder/Relu", "the activation stays, and nothing folds across it"),
        Refusal(
            "/mixed/conv2/propagate/MatMul",
            "a bias of features lies between the two adjacencies",
            "acts on axis 1, not 2",
        ),
    ),
)
