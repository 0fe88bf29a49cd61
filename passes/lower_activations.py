"""Lowering of activations for which onnxruntime's CPU provider has no fast kernel."""

from __future__ import annotations

import numpy as np

from pwopt.graph.ir import Node, Tensor
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Form, Lowering
from pwopt.rewriting.records import Skip

#: Beyond this argument, Mish(x) equals x in float64, and exp(x) is still far from overflowing in float32.
MISH_LIMIT = 20.0
#: Types in which exp(MISH_LIMIT)² does not overflow.
WIDE_RANGE = ("float32", "float64")


class LowerPRelu(Lowering):
    """PRelu(x, a) = LeakyRelu(x) with the slope a

    * All slopes are the same constant. In other types than float32, it must be a number that float32 holds.

    LeakyRelu fuses into the convolution before it, on every kind of provider.
    """

    name = "lower-prelu"
    operators = frozenset({"PRelu"})
    exactness = "bit-exact"
    figure = "separation networks 1.70 and 2.46, RepSR 1.16 (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        slope = rw.uniform(node.inputs[1])
        if slope is None or str(rw.dtype(node.inputs[0])) not in ("float32", "float16"):
            return None
        if float(np.float32(slope)) != slope:
            return None
        new = Node("LeakyRelu", node.name, {"alpha": slope}, [node.inputs[0]], list(node.outputs))
        return Form((node,), (new,), f"all slopes are {slope:.4g}")


class LowerPReluByChannel(Lowering):
    """PRelu(x, a) = relu(x) − a·relu(−x), with −1 and −a as depthwise 1×1 convolutions

    * One constant slope per channel, images in float32, and a multiple of 4 channels.
    * A convolution computes the input, so that it is in the provider's blocked layout.
    * One of the two terms is zero, so nothing is rounded. Only NaN is treated differently.
    """

    name = "lower-prelu-by-channel"
    policy = "measured"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"PRelu"})
    exactness = "rounding, finite inputs"
    figure = "1.18 to 1.37 behind a 3×3 convolution (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        x, output = node.inputs[0], node.outputs[0]
        slopes, channels = rw.value(node.inputs[1]), rw.dim(x, 1)
        if slopes is None or not isinstance(channels, int) or rw.rank(x) != 4 or str(rw.dtype(x)) != "float32":
            return None
        if slopes.shape not in ((channels, 1, 1), (1, channels, 1, 1)) or channels % 4 or not channels:
            return None
        if not rw.is_a(rw.producer(x), "Conv"):
            return None
        build = Builder(rw)
        positive, flipped, negative, scaled = (
            rw.new_variable(f"{output.name}_{role}", output) for role in ("positive", "flipped", "negative", "scaled")
        )
        build.add_node("Relu", [x], positive)
        _add_scale(build, x, flipped, np.full(channels, -1.0))
        build.add_node("Relu", [flipped], negative)
        _add_scale(build, negative, scaled, -slopes.reshape(-1))
        build.nodes.append(Node("Add", node.name, {}, [scaled, positive], [output]))
        size = "×".join(map(str, rw.size_of(x) or ("?",)))
        return Form((node,), tuple(build.nodes), "slopes per channel, in the blocked layout", size)


def _add_scale(build: Builder, source: Tensor, output: Tensor, factors: np.ndarray) -> None:
    """Add a scale per channel as a depthwise 1×1 convolution in float32."""
    channels = len(factors)
    weight = build.rw.new_constant(f"{output.name}_factors", factors.reshape(channels, 1, 1, 1).astype(np.float32))
    build.add_node("Conv", [source, weight], output, group=channels, kernel_shape=[1, 1])


class LowerSwish(Lowering):
    """Swish(x) = x·Sigmoid(x)

    * The factor inside the sigmoid is 1.

    onnxruntime's CPU provider has no kernel for Swish. It expands the operator by its definition and leaves the blocked
    layout, in which x·Sigmoid(x) stays.
    """

    name = "lower-swish"
    phase = "late"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"Swish"})
    since = 24
    exactness = "rounding"
    figure = "1.54 on a SiLU network (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        if node.attrs.get("alpha", 1.0) != 1.0:
            return None
        x, output = node.inputs[0], node.outputs[0]
        gate = rw.new_variable(f"{output.name}_gate", output)
        new = (
            Node("Sigmoid", rw.node_name(node.name, "_gate"), {}, [x], [gate]),
            Node("Mul", node.name, {}, [x, gate], [output]),
        )
        return Form((node,), new, "onnxruntime's CPU provider has no kernel for Swish")


class LowerMish(Lowering):
    """Mish(x) = x·tanh(log(1 + eˣ)) = x·n/(n + 2) with n = e(e + 2) and e = exp(min(x, 20))

    * Spelled as Mish, or as x·Tanh(Softplus(x)) whose parts nothing else reads.
    * The type is float32 or float64, in which e² does not overflow.

    With e = exp(x), tanh(log(1 + e)) = ((1 + e)² − 1)/((1 + e)² + 1) = n/(n + 2). For x = 20 this is 1 − 8·10⁻¹⁸, which
    rounds to 1 in both types, and so it does for every larger x. Misra, "Mish" (2019).
    """

    name = "lower-mish"
    phase = "late"
    pays_on = frozenset({"cpu"})
    operators = frozenset({"Mish", "Mul"})
    since = 8
    exactness = "rounding"
    figure = "3.4 on a convolution with Mish (AVX-512 Xeon)"

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        found = (node.inputs[0], (node,)) if node.op == "Mish" else _read_mish(rw, node)
        if found is None or str(rw.dtype(node.outputs[0])) not in WIDE_RANGE:
            return None
        x, old = found
        output, dtype = node.outputs[0], rw.dtype(node.outputs[0])
        build = Builder(rw)
        bounded, power, risen, numerator, denominator, ratio = (
            rw.new_variable(f"{output.name}_{role}", output)
            for role in ("bounded", "exp", "risen", "numerator", "denominator", "ratio")
        )
        limit = rw.new_constant(f"{output.name}_limit", np.array(MISH_LIMIT, dtype))
        two = rw.new_constant(f"{output.name}_two", np.array(2, dtype))
        build.add_node("Min", [x, limit], bounded)
        build.add_node("Exp", [bounded], power)
        build.add_node("Add", [power, two], risen)
        build.add_node("Mul", [power, risen], numerator)
        build.add_node("Add", [numerator, two], denominator)
        build.add_node("Div", [numerator, denominator], ratio)
        build.nodes.append(Node("Mul", node.name, {}, [x, ratio], [output]))
        return Form(old, tuple(build.nodes), "Mish by one exponential")


def _read_mish(rw: Rewriter, product: Node) -> tuple[Tensor, tuple[Node, ...]] | None:
    """(x, nodes) of x·Tanh(Softplus(x))."""
    if len(product.inputs) != 2:
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        tanh = rw.producer(gate)
        softplus = rw.producer(tanh.inputs[0]) if rw.is_a(tanh, "Tanh") else None
        if tanh is None or not rw.is_a(softplus, "Softplus") or softplus.inputs[0] is not x:
            continue
        if rw.sole_reader(gate) is product and rw.sole_reader(softplus.outputs[0]) is tanh:
            return x, (softplus, tanh, product)
    return None
