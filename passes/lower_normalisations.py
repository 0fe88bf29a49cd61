"""Lowering of normalisations for which onnxruntime's CPU provider has no fast kernel."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Form, Lowering
from pwopt.rewriting.records import Skip

#: The exponents of LRN that square roots and products compute.
LRN_POWERS = (0.5, 0.75, 1.0)
#: A dense 1×1 map of more channels is slower than onnxruntime's kernel.
LRN_MAX_CHANNELS = 512


class LowerLRN(Lowering):
    """LRN(x) = x/d^β with d = bias + α/n·(banded 1×1 map of x²), and d^¾ = √d·√√d

    * The exponent β is ½, ¾ or 1, and bias and α are not negative, with a positive bias.
    * An odd number of neighbours, as onnxruntime requires, in images in float32 with at most 512 channels.
    * The inputs are finite, and so are their squares: infinity meets weights of zero in the map.

    Krizhevsky et al., "ImageNet classification with deep convolutional neural networks" (2012).
    """

    name = "lower-lrn"
    phase = "late"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"LRN"})
    since = 7
    exactness = "rounding, finite inputs"
    figure = "3 to 6.9 on the operator (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        x, output, channels = node.inputs[0], node.outputs[0], rw.dim(node.inputs[0], 1)
        shape = rw.shape(x)
        if shape is None or len(shape) != 4 or str(rw.dtype(x)) != "float32" or not isinstance(channels, int):
            return None
        alpha, bias = node.attrs.get("alpha", 1e-4), node.attrs.get("bias", 1.0)
        beta, size = node.attrs.get("beta", 0.75), int(node.attrs["size"])
        if 0 in shape or channels > LRN_MAX_CHANNELS or beta not in LRN_POWERS:
            return None
        if alpha < 0 or bias <= 0 or size % 2 == 0:
            return None
        build = Builder(rw)
        squares, summed = (rw.new_variable(f"{output.name}_{role}", output) for role in ("squares", "sums"))
        offset = np.arange(channels)[None] - np.arange(channels)[:, None]
        band = np.where(np.abs(offset) <= size // 2, alpha / size, 0.0)
        weight = rw.new_constant(f"{output.name}_band", band.reshape(channels, channels, 1, 1).astype(np.float32))
        shift = rw.new_constant(f"{output.name}_bias", np.full(channels, bias, np.float32))
        build.add_node("Mul", [x, x], squares)
        build.add_node("Conv", [squares, weight, shift], summed, kernel_shape=[1, 1])
        power = _add_power(build, summed, beta, output)
        build.nodes.append(Node("Div", node.name, {}, [x, power], [output]))
        return Form(
            (node,), tuple(build.nodes), f"LRN over {size} of {channels} channels as a 1×1 map and square roots"
        )


def _add_power(build: Builder, base: Tensor, beta: float, output: Tensor) -> Tensor:
    """Add the operators for base^β."""
    if beta == 1.0:
        return base
    root, fourth, product = (
        build.rw.new_variable(f"{output.name}_{role}", output) for role in ("root", "fourth_root", "power")
    )
    build.add_node("Sqrt", [base], root)
    if beta == 0.5:
        return root
    build.add_node("Sqrt", [root], fourth)
    build.add_node("Mul", [root, fourth], product)
    return product


class LowerGroupNorm(Lowering):
    """GroupNormalization(x) = s·InstanceNormalization(x as (N, G, −1)) + b

    * Constant scale and bias in float32, and a known number of channels.

    Before opset 21, scale and bias have one number per group, and the InstanceNormalization applies them. Since opset
    21, they have one number per channel. onnxruntime's CPU provider has no kernel for GroupNormalization and expands it
    by its definition, into more operators than this form has. Wu and He, "Group normalization" (2018).
    """

    name = "lower-group-norm"
    policy = "measured"
    phase = "late"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"GroupNormalization"})
    since = 18
    exactness = "rounding"
    figure = "1.4 to 3.5 on the operator (AMD EPYC with AVX-512)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        x, output, channels = node.inputs[0], node.outputs[0], rw.dim(node.inputs[0], 1)
        groups, shape = int(node.attrs["num_groups"]), rw.shape(x)
        scale, bias = (rw.value(t) for t in node.inputs[1:3])
        if scale is None or bias is None or shape is None or len(shape) < 3 or str(rw.dtype(x)) != "float32":
            return None
        if not isinstance(channels, int) or not 0 < groups <= channels or channels % groups or 0 in shape:
            return None
        build, by_channel = Builder(rw), rw.opset >= 21
        if len(scale) != (channels if by_channel else groups) or len(bias) != len(scale):
            return None
        ones = (np.ones(groups), np.zeros(groups)) if by_channel else (scale, bias)
        rows, normal = (
            rw.new_variable(f"{output.name}_{role}", x, lambda s: (s[0], groups, None)) for role in ("rows", "normal")
        )
        build.add_node("Reshape", [x, rw.new_constant(f"{output.name}_groups", np.array([0, groups, -1]))], rows)
        arguments = [rw.new_constant(f"{output.name}_unit", v.astype(np.float32)) for v in ones]
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        build.add_node("InstanceNormalization", [rows, *arguments], normal, epsilon=epsilon)
        back = rw.new_variable(f"{output.name}_back", x) if by_channel else output
        build.nodes.append(
            Node("Reshape", rw.node_name(node.name, "_back"), {}, [normal, _add_shape(build, x, output)], [back])
        )
        if by_channel:
            scaled = rw.new_variable(f"{output.name}_scaled", x)
            column = (channels, *(1,) * (len(shape) - 2))
            factors = rw.new_constant(f"{output.name}_factors", scale.reshape(column).astype(np.float32))
            shifts = rw.new_constant(f"{output.name}_shifts", bias.reshape(column).astype(np.float32))
            build.add_node("Mul", [back, factors], scaled)
            build.nodes.append(Node("Add", node.name, {}, [scaled, shifts], [output]))
        reason = f"{groups} groups of {channels} channels as rows of their own"
        return Form((node,), tuple(build.nodes), reason, f"{groups} groups of {channels} channels")


def _add_shape(build: Builder, x: Tensor, output: Tensor) -> Tensor:
    """The shape of x for a Reshape, a constant if at most the batch is unknown."""
    shape = build.rw.shape(x)
    assert shape is not None
    if all(isinstance(d, int) for d in shape[1:]):
        return build.rw.new_constant(f"{output.name}_shape", np.array([0, *shape[1:]], np.int64))
    found = build.rw.new_variable(f"{output.name}_shape", x, lambda s: (len(s),))
    found.dtype = np.dtype(np.int64)
    build.add_node("Shape", [x], found)
    return found


class LowerResidual(Lowering):
    """LayerNormalization(a + b) = LayerNormalization(Sum(a, b))

    * Both summands are computed, and have the same shape and the type float32.
    * A layer normalisation reads the sum, as one operator or spelled out.

    onnxruntime fuses Add and LayerNormalization into SkipLayerNormalization, which takes 2.7 to 4.5 times as long on
    the CPU (AVX-512 Xeon). It does not fuse Sum.
    """

    name = "lower-residual"
    policy = "measured"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"Add"})
    since = 8
    exactness = "bit-exact"
    figure = "1.02 to 1.065 on encoders (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        a, b = node.inputs
        if rw.constant(a) is not None or rw.constant(b) is not None or str(rw.dtype(node.outputs[0])) != "float32":
            return None
        if rw.shape(a) is None or rw.shape(a) != rw.shape(b) or not _is_normalised(rw, node.outputs[0]):
            return None
        new = Node("Sum", node.name, {}, [a, b], list(node.outputs))
        return Form((node,), (new,), "a Sum before a layer normalisation is not fused into a slower operator")


def _is_normalised(rw: Rewriter, tensor: Tensor) -> bool:
    """Whether a layer normalisation reads a tensor: as one operator, or as x − ReduceMean(x)."""
    readers = rw.readers(tensor)
    if any(rw.is_a(n, "LayerNormalization") and n.inputs[0] is tensor for n in readers):
        return True
    means = [n.outputs[0] for n in readers if rw.is_a(n, "ReduceMean")]
    return any(rw.is_a(n, "Sub") and n.inputs[0] is tensor and n.inputs[1] in means for n in readers)
