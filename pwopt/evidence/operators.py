"""Operators in float64, each from its definition."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from pwopt.algebra import Array, Values
from pwopt.evidence.evaluation import Side, TooLargeError, UnfitError, rule
from pwopt.graph.dtypes import FLOATS
from pwopt.graph.ir import Tensor
from pwopt.graph.journal import State


@rule("Identity", "Dropout")
def _identity(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if len([t for t in state.outputs if t.name]) > 1:
        return side.reference(state, inputs)
    return [inputs[0]]


@rule("Cast")
def _cast(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    to = onnx.helper.tensor_dtype_to_np_dtype(int(state.attrs["to"]))
    return [inputs[0].astype(np.float64 if str(to) in FLOATS else to)]


@rule("Constant")
def _constant(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    held = state.attrs.get("value")
    value = side.constant(held) if isinstance(held, Tensor) else None
    return [value] if value is not None else side.reference(state, inputs)


@rule("Size")
def _size(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.array(inputs[0].size, np.int64)]


@rule("Shape")
def _shape(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.array(inputs[0].shape[slice(state.attrs.get("start", 0), state.attrs.get("end"))], np.int64)]


@rule("GatherND")
def _gather_nd(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """All index tuples at once; onnx's reference takes one after another."""
    data, indices = inputs
    shared, depth = state.attrs.get("batch_dims", 0), indices.shape[-1]
    batches = math.prod(data.shape[:shared])
    places = np.moveaxis(indices.reshape(batches, -1, depth), -1, 0)
    whole = data.reshape(batches, *data.shape[shared:])
    found = whole[tuple([np.arange(batches)[:, None], *places])]  # noqa: C409
    return [found.reshape(*indices.shape[:-1], *data.shape[shared + depth :])]


@rule("Add", "Sub", "Mul", "Div", "Sum")
def _arithmetic(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if "axis" in state.attrs and inputs[1].ndim:  # before opset 7, operands are aligned at an axis
        extra = inputs[0].ndim - state.attrs["axis"] - inputs[1].ndim
        inputs = [inputs[0], inputs[1].reshape(inputs[1].shape + (1,) * extra)]
    if state.op == "Div":
        whole = inputs[0].dtype.kind in "iu"
        return [np.trunc(inputs[0] / inputs[1]).astype(inputs[0].dtype) if whole else inputs[0] / inputs[1]]
    if state.op == "Mul":
        return [inputs[0] * inputs[1]]
    if state.op == "Sub" and not absolute:
        return [inputs[0] - inputs[1]]
    return [functools.reduce(np.add, inputs)]


@rule("Neg")
def _neg(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [inputs[0] if absolute else -inputs[0]]


@rule("Relu")
def _relu(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.maximum(inputs[0], 0)]


@rule("Sigmoid")
def _sigmoid(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """(1 + tanh(x / 2)) / 2: the reference evaluator takes a hundred times as long."""
    return [0.5 + 0.5 * np.tanh(0.5 * inputs[0])]


@rule("Concat")
def _concat(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.concatenate(inputs, axis=state.attrs.get("axis", 1))]


@rule("Transpose")
def _transpose(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.transpose(inputs[0], state.attrs.get("perm"))]


@rule("MatMul")
def _matmul(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    side.spend(inputs[0].size * inputs[1].shape[-1])
    return [inputs[0] @ inputs[1]]


@rule("Gemm")
def _gemm(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    a = inputs[0].T if state.attrs.get("transA", 0) else inputs[0]
    b = inputs[1].T if state.attrs.get("transB", 0) else inputs[1]
    if a.ndim != 2:
        raise ValueError
    side.spend(a.size * b.shape[1])
    size = abs if absolute else float
    product = size(state.attrs.get("alpha", 1.0)) * (a @ b)
    held = inputs[2] if len(inputs) > 2 else None
    return [product if held is None else product + size(state.attrs.get("beta", 1.0)) * held]


@rule("BatchNormalization")
def _normalise(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if state.attrs.get("training_mode", 0) or any(t.name for t in state.outputs[1:]) or len(inputs) != 5:
        return side.reference(state, inputs)
    x = inputs[0]
    gamma, beta, mean, variance = (v.reshape(-1, *(1,) * (x.ndim - 2)) for v in inputs[1:])
    scale = gamma / np.sqrt(variance + state.attrs.get("epsilon", float(np.float32(1e-5))))
    return [(x + mean if absolute else x - mean) * scale + beta]


def _windows(
    state: State, size: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, begins and ends of windows over `size` positions."""
    rank = len(kernel)
    strides = list(state.attrs.get("strides", [1] * rank))
    dilations = list(state.attrs.get("dilations", [1] * rank))
    pads = list(state.attrs.get("pads", [0] * 2 * rank))
    auto = state.attrs.get("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * 2 * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    return strides, dilations, pads[:rank], pads[rank:]


def _taps(x: Values, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Values]:
    """What each tap of a window sees, from an input that is padded already."""
    counts = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    if min(counts, default=1) < 1:
        raise ValueError
    views = []
    for tap in np.ndindex(*kernel):
        cuts = [
            slice(t * d, t * d + (c - 1) * s + 1, s) for t, d, c, s in zip(tap, dilations, counts, strides, strict=True)
        ]
        views.append(x[(slice(None),) * 2 + tuple(cuts)])
    return views


@rule("Conv")
def _conv(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    x, weight, groups = inputs[0], inputs[1], state.attrs.get("group", 1)
    kernel = weight.shape[2:]
    strides, dilations, begins, ends = _windows(state, x.shape[2:], kernel)
    if x.shape[1] != weight.shape[1] * groups or x.ndim != weight.ndim or min(*begins, *ends, 0) < 0:
        raise ValueError
    if any(begins) or any(ends):
        x = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
    parts = _taps(x, kernel, strides, dilations)
    batch, space = x.shape[0], parts[0].shape[2:]
    positions = math.prod(space)
    side.spend(batch * positions * weight.size)
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    result = np.zeros((batch, groups, blocks.shape[1], positions))
    for k, part in enumerate(parts):
        seen = part.reshape(batch, groups, weight.shape[1], positions)
        result += blocks[None, :, :, :, k] * seen if weight.shape[1] == 1 else blocks[:, :, :, k] @ seen
    output = result.reshape(batch, weight.shape[0], *space)
    bias = inputs[2] if len(inputs) > 2 else None
    return [output if bias is None else output + bias.reshape(-1, *(1,) * len(space))]


@rule("ConvTranspose")
def _conv_transpose(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    x, weight, groups = inputs[0], inputs[1], state.attrs.get("group", 1)
    if "output_shape" in state.attrs or state.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return side.reference(state, inputs)
    kernel = weight.shape[2:]
    strides, dilations, begins, ends = _windows(state, x.shape[2:], kernel)
    extra = state.attrs.get("output_padding", [0] * len(kernel))
    batch, space = x.shape[0], x.shape[2:]
    side.spend(batch * math.prod(space) * weight.size)
    out = weight.shape[1]
    whole = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(space, strides, dilations, kernel, strict=True)]
    result = np.zeros((batch, groups * out, *(w + e for w, e in zip(whole, extra, strict=True))))
    blocks = weight.reshape(groups, weight.shape[0] // groups, out, -1).swapaxes(1, 2)
    seen = x.reshape(batch, groups, weight.shape[0] // groups, -1)
    for k, tap in enumerate(np.ndindex(*kernel)):
        cuts = [
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, space, strides, strict=True)
        ]
        result[(slice(None),) * 2 + tuple(cuts)] += (blocks[:, :, :, k] @ seen).reshape(batch, -1, *space)
    cuts = [slice(b, n - e) for b, e, n in zip(begins, ends, result.shape[2:], strict=True)]
    output = result[(slice(None),) * 2 + tuple(cuts)]
    bias = inputs[2] if len(inputs) > 2 else None
    return [output if bias is None else output + bias.reshape(-1, *(1,) * len(space))]


@rule("MaxPool", "AveragePool")
def _pool(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if state.attrs.get("ceil_mode", 0) or len([t for t in state.outputs if t.name]) > 1:
        return side.reference(state, inputs)
    x, kernel = inputs[0], list(state.attrs["kernel_shape"])
    strides, dilations, begins, ends = _windows(state, x.shape[2:], kernel)
    around = [(0, 0), (0, 0), *zip(begins, ends, strict=True)]
    side.spend(x.size * math.prod(kernel))
    if state.op == "MaxPool":
        return [
            functools.reduce(np.maximum, _taps(np.pad(x, around, constant_values=-np.inf), kernel, strides, dilations))
        ]
    total = functools.reduce(np.add, _taps(np.pad(x, around), kernel, strides, dilations))
    if state.attrs.get("count_include_pad", 0):
        return [total / math.prod(kernel)]
    inside = np.pad(np.ones((1, 1, *x.shape[2:])), around)
    seen = functools.reduce(np.add, _taps(inside, kernel, strides, dilations))
    return [total / np.maximum(seen, 1)]  # as onnxruntime has it, a window that misses the input gives zero


@rule("Resize", "Upsample")
def _resize(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """One axis after the other: interpolation is separable."""
    x = inputs[0]
    odd = {"axes", "antialias", "keep_aspect_ratio_policy"} & set(state.attrs)
    crop = state.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    scales, sizes = _scales(state, inputs)
    if odd or crop or (scales is None and sizes is None):
        return side.reference(state, inputs)
    if len(scales if scales is not None else sizes) != x.ndim:
        raise ValueError
    attrs = tuple(sorted((k, v) for k, v in state.attrs.items() if isinstance(v, (int, float, str)) and k != "axes"))
    for axis in range(x.ndim):
        scale = float(scales[axis]) if scales is not None else sizes[axis] / x.shape[axis]
        if scale == 1:
            continue
        size = int(sizes[axis]) if sizes is not None else -1
        matrix = _interpolation(x.shape[axis], scale, size, state.op, attrs, side.view.opset)
        side.spend(x.size * len(matrix))
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return [x]


def _scales(state: State, inputs: list[Any]) -> tuple[Any, Any]:
    if state.op == "Upsample" and len(inputs) < 2:
        return state.attrs.get("scales"), None
    given = [v if v is not None and v.size else None for v in (*inputs[1:], None, None, None)]
    if state.op == "Upsample" or len(inputs) == 2:
        return given[0], None
    return given[1], given[2]


@functools.lru_cache(64)
def _interpolation(
    count: int, scale: float, size: int, op: str, attrs: tuple[tuple[str, Any], ...], opset: int
) -> Array:
    """The matrix that resizes an axis of `count` positions, by onnx's reference evaluator on unit vectors."""
    if count > 512:
        raise TooLargeError
    by_sizes = size >= 0 and opset >= 11
    inputs = (
        ["x", "scales"]
        if op == "Upsample" or opset < 11
        else ["x", "", "" if by_sizes else "scales", *(["sizes"] if by_sizes else [])]
    )
    node = onnx.helper.make_node(op, inputs, ["y"], **dict(attrs))
    names = [n for n in inputs if n]
    graph = onnx.helper.make_graph(
        [node], "axis", [onnx.ValueInfoProto(name=n) for n in names], [onnx.ValueInfoProto(name="y")]
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    columns = []
    for i in range(count):
        feeds: dict[str, Values] = {
            "x": np.eye(count)[i],
            "scales": np.array([scale], np.float32),
            "sizes": np.array([size], np.int64),
        }
        try:
            (column,) = evaluator.run(None, {n: feeds[n] for n in names})
            columns.append(np.asarray(column, np.float64))
        except Exception as error:
            raise UnfitError(f"{op} does not take such inputs") from error
    return np.stack(columns, axis=1)
