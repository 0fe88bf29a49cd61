"""Definitions in float64 of operators of onnxruntime's own domain, from onnxruntime's docs/ContribOperators.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pwopt.algebra import Array, Values
from pwopt.evidence.evaluation import DEFINITIONS, RUNTIME_DEFINITIONS, Definition, Side, UnfitError
from pwopt.graph.journal import State


def define_fused(*ops: str) -> Callable[[Definition], Definition]:
    """Register the decorated function as the definition of operators of onnxruntime's own domain."""

    def register(function: Definition) -> Definition:
        RUNTIME_DEFINITIONS.update(dict.fromkeys(ops, function))
        return function

    return register


def _activate(name: str, numbers: list[float], x: Array) -> Array:
    if name == "Relu":
        return np.maximum(x, 0)
    if name == "Sigmoid":
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))
    if name == "Tanh":
        return np.tanh(x)
    if name == "LeakyRelu":
        return np.where(x < 0, numbers[0] * x, x)
    if name == "HardSigmoid":
        return np.clip(numbers[0] * x + numbers[1], 0, 1)
    if name == "Clip":
        return np.clip(x, numbers[0], numbers[1])
    raise UnfitError(f"the activation {name} has no definition")


@define_fused("FusedConv")
def _fused_conv(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Convolve, add the fourth input, and apply the activation."""
    (total,) = DEFINITIONS["Conv"](side, state, inputs[:3], absolute)
    total = total if len(inputs) < 4 else total + inputs[3]
    return [_activate(str(state.attrs["activation"]), list(state.attrs.get("activation_params", ())), total)]


@define_fused("FusedGemm")
def _fused_gemm(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    (total,) = DEFINITIONS["Gemm"](side, state, inputs, absolute)
    numbers = [state.attrs[name] for name in ("activation_alpha", "activation_beta") if name in state.attrs]
    return [_activate(str(state.attrs["activation"]), numbers, total)]


@define_fused("FusedMatMul")
def _fused_matmul(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if state.attrs.get("transBatchA") or state.attrs.get("transBatchB"):
        raise UnfitError("FusedMatMul with transposed batches has no definition")
    a, b = (
        value.swapaxes(-1, -2) if state.attrs.get(flag) else value
        for value, flag in zip(inputs, ("transA", "transB"), strict=True)
    )
    side.spend(a.size * b.shape[-1])
    alpha = float(state.attrs.get("alpha", 1.0))
    return [(abs(alpha) if absolute else alpha) * (a @ b)]
