"""Splits the fused operators that onnxruntime's own optimisers write, so that every other pass can read their parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pwopt.algebra.geometry import Refusal
from pwopt.graph.ir import Node, Tensor
from pwopt.maps import emit
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The activations that onnxruntime fuses again while it loads a model, with the names of their parameters.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
#: The opset since which the limits of a Clip are inputs.
CLIP_INPUTS_SINCE = 11


class SplitFused(Pass):
    """FusedConv(x) = f(Conv(x)), FusedGemm(x) = f(Gemm(x)), FusedMatMul(x, w) = x·(αw)

    * The weight is a constant, so that other passes can fold into it.
    * f is an activation that onnxruntime fuses again while it loads the result.
    * α and a transposition are folded into the weight of a FusedMatMul, if nothing else reads it.

    onnxruntime writes these operators of `com.microsoft` when it saves an optimised model.
    """

    name = "split-fused"
    operators = frozenset({"FusedConv", "FusedGemm", "FusedMatMul"})

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.runtime_op(node)
        if op not in ("FusedConv", "FusedGemm", "FusedMatMul") or rw.constant(node.inputs[1]) is None:
            return None
        if op == "FusedMatMul":
            return _split_matmul(rw, node)
        activation = str(node.attrs.get("activation", ""))
        numbers = node.attrs.get("activation_params", ())
        if op == "FusedGemm":
            numbers = [node.attrs[f"activation_{n}"] for n in ("alpha", "beta") if f"activation_{n}" in node.attrs]
        if activation not in PARAMETERS or len(PARAMETERS[activation]) != len(numbers):
            return Skip(f"onnxruntime might not fuse {activation or 'nothing'} with its parameters again")
        return _split_activation(rw, node, activation, list(numbers))


def _split_activation(rw: Rewriter, node: Node, activation: str, numbers: list[float]) -> Rewrite:
    """FusedConv and FusedGemm; a FusedConv may add its fourth input before the activation."""
    op, output, build = node.op.removeprefix("Fused"), node.outputs[0], Builder(rw)
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    linear = rw.new_variable(f"{output.name}_linear", output)
    given = [t for t in node.inputs[:3] if t.name]
    build.nodes.append(Node(op, node.name, attrs, given, [linear]))
    added = rw.optional_input(node, 3)
    if added is not None:
        total = rw.new_variable(f"{output.name}_sum", output)
        build.add_node("Add", [linear, added], total)
        linear = total
    _add_activation(build, activation, numbers, linear, output)
    return rw.replace([node], build.nodes, f"{node.op} is {op} and {activation}, which other passes read")


def _add_activation(build: Builder, activation: str, numbers: list[float], source: Tensor, output: Tensor) -> None:
    attrs: dict[str, Any] = dict(zip(PARAMETERS[activation], numbers, strict=True))
    inputs = [source]
    if activation == "Clip" and build.rw.opset >= CLIP_INPUTS_SINCE:
        dtype = build.rw.dtype(source) or np.dtype(np.float32)
        inputs += [
            build.rw.new_constant(f"{output.name}_{k}", np.array(v, dtype)) for k, v in zip(attrs, numbers, strict=True)
        ]
        attrs = {}
    build.add_node(activation, inputs, output, **attrs)


def _split_matmul(rw: Rewriter, node: Node) -> Rewrite | Skip | None:
    given = node.attrs
    if any(given.get(name) for name in ("transA", "transBatchA", "transBatchB")):
        return None
    weight, alpha, flip = node.inputs[1], float(given.get("alpha", 1.0)), bool(given.get("transB"))
    residual = 0.0
    if flip or alpha != 1:
        values, dtype = rw.value(weight), rw.dtype(weight)
        if values is None or dtype is None or values.ndim < 2:
            return None
        if rw.is_shared(weight):
            return Skip(f"the weight {weight.name!r} is shared")
        exact = alpha * (values.swapaxes(-1, -2) if flip else values)
        low = rw.attempt(emit.round_values, exact, dtype)
        if isinstance(low, Refusal):
            return Skip(low.reason)
        residual = emit.relative_rounding(low, exact)
        weight = rw.new_constant(f"{weight.name}_scaled", low)
    new = Node("MatMul", node.name, {}, [node.inputs[0], weight], [node.outputs[0]])
    folded = [what for what, there in (("its factor", alpha != 1), ("its transposition", flip)) if there]
    reason = f"FusedMatMul is a MatMul{' once ' + ' and '.join(folded) + ' is in the weight' if folded else ''}"
    return rw.replace([node], [new], reason, residual)
