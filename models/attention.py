"""Attention: a mixture of tokens that the tokens choose, between layers that treat each token alone.

Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), in the pre-norm block of a vision transformer (Dosovitskiy
et al., ICLR 2021) as torch exports it. It has three Linear layers for queries, keys and values, Reshape and Transpose
into heads, the scale 1/√d split evenly over queries and keys, Softmax, and the output layer. All its Linear layers are
1×1 convolutions over tokens: static mixtures of channels, the same for every input. A second head consists of two
Linear layers only and is the static counterpart (compare Cordonnier, Loukas and Jaggi, "On the Relationship between
Self-Attention and Convolutional Layers", ICLR 2020).

Rewritten: the scales of queries and keys fold into their Linear layers. The static head's two layers become one map.
That map reads the same tensor as queries, keys and values. So the four matrices become one matrix, which has the
columns of all of them, and a Split. Timing decides whether one wide product is faster than four.

Left alone: the products of queries with keys and of attention with values. Both operands depend on the input, so
neither is a constant matrix that could be folded.
"""

from __future__ import annotations

import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, normal
from pwopt.invariants import function_of, permutation

TOKENS, WIDTH, HEADS, HIDDEN, CLASSES = 49, 96, 4, 128, 32


def build() -> onnx.ModelProto:
    """The model: tokens (batch, 49, 96) float32 → attended (batch, 49, 96) and static (batch, 49, 32)."""
    e = Exporter(16)
    scale = e.constant("norm.weight", e.rng.uniform(0.5, 1.5, WIDTH))
    shift = e.constant("norm.bias", e.rng.normal(0, 0.1, WIDTH))
    x = e.node("LayerNormalization", ["tokens", scale, shift], "norm", axis=-1, epsilon=1e-6)
    depth = WIDTH // HEADS
    split = e.constant("attn.heads", [0, TOKENS, HEADS, depth])
    root = e.constant("attn.root", depth**-0.25)

    def heads(name: str, perm: list[int], *, scaled: bool) -> str:
        y = e.node("Reshape", [e.dense(x, f"attn/{name}", WIDTH, WIDTH), split], f"attn/{name}")
        y = e.node("Transpose", [y], f"attn/{name}", perm=perm)
        return e.node("Mul", [y, root], f"attn/{name}") if scaled else y

    query = heads("q", [0, 2, 1, 3], scaled=True)
    key = heads("k", [0, 2, 3, 1], scaled=True)
    value = heads("v", [0, 2, 1, 3], scaled=False)
    weights = e.node("Softmax", [e.node("MatMul", [query, key], "attn/scores")], "attn", axis=-1)
    y = e.node("MatMul", [weights, value], "attn/context")
    y = e.node("Transpose", [y], "attn/join", perm=[0, 2, 1, 3])
    y = e.node("Reshape", [y, e.constant("attn.width", [0, TOKENS, WIDTH])], "attn/join")
    e.node("Add", ["tokens", e.dense(y, "attn/proj", WIDTH, WIDTH)], "residual", "attended")
    e.dense(e.dense(x, "static/0", WIDTH, HIDDEN), "static/1", HIDDEN, CLASSES, output="static")
    return e.model(
        "attention",
        {"tokens": ["batch", TOKENS, WIDTH]},
        {"attended": ["batch", TOKENS, WIDTH], "static": ["batch", TOKENS, CLASSES]},
    )


SYSTEM = System(
    build,
    {"tokens": (4, TOKENS, WIDTH)},
    rewrites=("fold-affine", "fold-chains", "merge-siblings"),
    measured=("merge-siblings",),
    properties=(
        Law(
            "permuting the input tokens permutes the output tokens",
            lambda s: permutation(function_of(s, output="attended"), normal(2, TOKENS, WIDTH)),
            1e-5,
        ),
    ),
    refusals=(
        Refusal("/attn/scores/MatMul", "queries times keys: both depend on the tokens"),
        Refusal("/attn/context/MatMul", "attention times values: both depend on the tokens"),
        Refusal("/attn/Softmax", "softmax is not linear"),
    ),
)
