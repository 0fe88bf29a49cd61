"""Definitions of operators in float64.

They follow onnxruntime where onnx's reference evaluator differs from it or is slow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from pwopt.algebra import Array, Values
from pwopt.evidence.evaluation import Side, TooLargeError, UnfitError, define
from pwopt.graph.dtypes import FLOATS
from pwopt.graph.ir import Tensor
from pwopt.graph.journal import State


@define("Identity", "Dropout")
def _identity(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if len([t for t in state.outputs if t.name]) > 1:
        return side.reference(state, inputs)
    return [inputs[0]]


@define("Cast")
def _cast(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    to = onnx.helper.tensor_dtype_to_np_dtype(int(state.attrs["to"]))
    return [inputs[0].astype(np.float64 if str(to) in FLOATS else to)]


@define("Constant")
def _constant(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    held = state.attrs.get("value")
    value = side.constant(held) if isinstance(held, Tensor) else None
    return [value] if value is not None else side.reference(state, inputs)


@define("Size")
def _size(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.array(inputs[0].size, np.int64)]


@define("Shape")
def _shape(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.array(inputs[0].shape[slice(state.attrs.get("start", 0), state.attrs.get("end"))], np.int64)]


@define("GatherND")
def _gather_nd(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Gather all index tuples at once; onnx's reference evaluator loops over them."""
    data, indices = inputs
    shared, depth = state.attrs.get("batch_dims", 0), indices.shape[-1]
    batches = math.prod(data.shape[:shared])
    places = np.moveaxis(indices.reshape(batches, -1, depth), -1, 0)
    whole = data.reshape(batches, *data.shape[shared:])
    found = whole[tuple([np.arange(batches)[:, None], *places])]  # noqa: C409
    return [found.reshape(*indices.shape[:-1], *data.shape[shared + depth :])]


@define("Add", "Sub", "Mul", "Div", "Sum")
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


@define("Neg")
def _neg(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [inputs[0] if absolute else -inputs[0]]


@define("Relu")
def _relu(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.maximum(inputs[0], 0)]


@define("Sigmoid")
def _sigmoid(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """(1 + tanh(x / 2)) / 2: a hundred times as fast as the reference evaluator."""
    return [0.5 + 0.5 * np.tanh(0.5 * inputs[0])]


@define("Concat")
def _concat(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.concatenate(inputs, axis=state.attrs.get("axis", 1))]


@define("Transpose")
def _transpose(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    return [np.transpose(inputs[0], state.attrs.get("perm"))]


def _read_axes(state: State, inputs: list[Any]) -> list[int] | None:
    """The axes of Squeeze or Unsqueeze, an attribute before opset 13 and an input since; None for all."""
    axes = inputs[1] if len(inputs) > 1 else state.attrs.get("axes")
    return None if axes is None or not len(axes) else [int(a) for a in axes]


@define("Squeeze")
def _squeeze(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Without axes, or with an empty list of them as onnxruntime reads it, all axes of size 1."""
    axes = _read_axes(state, inputs)
    return [np.squeeze(inputs[0], None if axes is None else tuple(axes))]


@define("Unsqueeze")
def _unsqueeze(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    axes = _read_axes(state, inputs)
    return [inputs[0] if axes is None else np.expand_dims(inputs[0], tuple(axes))]


@define("Softmax", "LogSoftmax", "Hardmax")
def _softmax(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Normalise one axis; before opset 13, all axes from `axis` on together."""
    x, old = inputs[0], side.view.opset < 13
    axis = state.attrs.get("axis", 1 if old else -1)
    rows = x.reshape(math.prod(x.shape[: axis % x.ndim if x.ndim else 0]), -1) if old else np.moveaxis(x, axis, -1)
    if state.op == "Hardmax":
        result = np.eye(rows.shape[-1])[np.argmax(rows, axis=-1)]
    else:
        shifted = rows - np.max(rows, axis=-1, keepdims=True)
        total = np.sum(np.exp(shifted), axis=-1, keepdims=True)
        result = shifted - np.log(total) if state.op == "LogSoftmax" else np.exp(shifted) / total
    return [result.reshape(x.shape) if old else np.moveaxis(result, -1, axis)]


@define("LpNormalization")
def _lp_normalise(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Divide by the norm along an axis; as in onnxruntime, zero where the norm is zero."""
    x, axis = inputs[0], state.attrs.get("axis", -1)
    norm = np.linalg.norm(x, ord=None, axis=axis, keepdims=True)
    if state.attrs.get("p", 2) == 1:
        norm = np.sum(np.abs(x), axis=axis, keepdims=True)
    return [np.where(norm == 0, 0.0, x / norm)]


@define("LRN")
def _normalise_locally(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Divide by a power of a sum of squares over channels nearby; onnx's evaluator confuses batch and channels."""
    x, size = inputs[0], state.attrs["size"]
    before, after = (size - 1) // 2, size // 2
    squares = np.pad(x * x, [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    total = sum(squares[:, k : k + x.shape[1]] for k in range(size))
    alpha, beta = state.attrs.get("alpha", 1e-4), state.attrs.get("beta", 0.75)
    return [x / (state.attrs.get("bias", 1.0) + alpha / size * total) ** beta]


@define("NonZero")
def _non_zero(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """The indices of elements that are not zero; a scalar is one element with one index."""
    return [np.array(np.nonzero(np.atleast_1d(inputs[0])), np.int64)]


@define("MatMul")
def _matmul(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    side.spend(inputs[0].size * inputs[1].shape[-1])
    return [inputs[0] @ inputs[1]]


@define("Gemm")
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


@define("BatchNormalization")
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
    """Strides, dilations, and pads at the begin and the end of each axis, for windows over `size` positions."""
    rank = len(kernel)
    strides = list(state.attrs.get("strides", [1] * rank))
    dilations = list(state.attrs.get("dilations", [1] * rank))
    pads = list(state.attrs.get("pads", [0] * 2 * rank))
    auto = state.attrs.get("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * 2 * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        total = [(-(-n // s) - 1) * s + r - n for n, s, r in zip(size, strides, reach, strict=True)]
        if min(total, default=0) < 0:  # onnxruntime refuses such pools, and crops such convolutions inconsistently
            raise UnfitError(f"{state.op} with {auto} has a stride that exceeds its kernel, which crops the input")
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    return strides, dilations, pads[:rank], pads[rank:]


def _taps(x: Values, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Values]:
    """The elements that each tap of a window reads, from an input that is already padded."""
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


def _pad(x: Values, begins: Sequence[int], ends: Sequence[int], value: float) -> Values:
    """Pad the spatial axes."""
    around = [(0, 0), (0, 0), *zip(begins, ends, strict=True)]
    return np.pad(x, around, constant_values=value) if np.any(around) else x


@define("Conv")
def _conv(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    x, weight, groups = inputs[0], inputs[1], state.attrs.get("group", 1)
    kernel = weight.shape[2:]
    strides, dilations, begins, ends = _windows(state, x.shape[2:], kernel)
    if x.shape[1] != weight.shape[1] * groups or x.ndim != weight.ndim or min(state.attrs.get("pads", (0,))) < 0:
        raise ValueError
    x = _pad(x, begins, ends, 0.0)
    parts = _taps(x, kernel, strides, dilations)
    batch, space = x.shape[0], parts[0].shape[2:]
    positions = math.prod(space)
    side.spend(batch * positions * weight.size)
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    if weight.shape[1] == 1:
        seen = (part.reshape(batch, groups, 1, positions) for part in parts)
        result = functools.reduce(np.add, (blocks[:, :, k, None] * part for k, part in enumerate(seen)))
    else:  # one product with all taps side by side, since a weight's numbers for one tap are not contiguous
        seen_by_all = np.stack([part.reshape(batch, -1, positions) for part in parts], axis=2)
        result = blocks @ seen_by_all.reshape(batch, groups, -1, positions)
    output = result.reshape(batch, weight.shape[0], *space)
    bias = inputs[2] if len(inputs) > 2 else None
    return [output if bias is None else output + bias.reshape(-1, *(1,) * len(space))]


@define("ConvTranspose")
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


@define("MaxPool", "AveragePool")
def _pool(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    if state.attrs.get("ceil_mode", 0) or len([t for t in state.outputs if t.name]) > 1:
        return side.reference(state, inputs)
    x, kernel = inputs[0], list(state.attrs["kernel_shape"])
    strides, dilations, begins, ends = _windows(state, x.shape[2:], kernel)
    side.spend(x.size * math.prod(kernel))
    if state.op == "MaxPool":
        return [functools.reduce(np.maximum, _taps(_pad(x, begins, ends, -np.inf), kernel, strides, dilations))]
    total = functools.reduce(np.add, _taps(_pad(x, begins, ends, 0.0), kernel, strides, dilations))
    if state.attrs.get("count_include_pad", 0):
        return [total / math.prod(kernel)]
    inside = _pad(np.ones((1, 1, *x.shape[2:])), begins, ends, 0.0)
    seen = functools.reduce(np.add, _taps(inside, kernel, strides, dilations))
    return [total / np.maximum(seen, 1)]  # in onnxruntime, a window outside the input gives zero


@define("Resize", "Upsample")
def _resize(side: Side, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
    """Resize one axis after the other, because interpolation is separable."""
    x = inputs[0]
    odd = {"antialias", "keep_aspect_ratio_policy"} & set(state.attrs)
    crop = state.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    scales, sizes = _scales(state, inputs)
    if odd or crop or (scales is None and sizes is None):
        return side.reference(state, inputs)
    axes = state.attrs.get("axes")
    if axes is not None:
        scales, sizes = (_spread(v, axes, d) for v, d in ((scales, np.ones(x.ndim)), (sizes, np.array(x.shape))))
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


def _spread(values: Any, axes: Sequence[int], full: Values) -> Any:
    """The numbers of some axes among those of all axes; None stays None."""
    if values is None:
        return None
    full[list(axes)] = values
    return full


def _scales(state: State, inputs: list[Any]) -> tuple[Any, Any]:
    if state.op == "Upsample" and len(inputs) < 2:
        return state.attrs.get("scales"), None
    given = [v if v is not None and v.size else None for v in (*inputs[1:], None, None, None)]
    if state.op == "Upsample" or len(inputs) == 2:
        return given[0], None
    return given[1], given[2]


def _interpolate(count: int, scale: np.float32, size: int, settings: dict[str, Any]) -> Array:
    """The matrix of nearest or linear interpolation; the nearest position is chosen in float32, as in onnxruntime."""
    mode = settings.get("mode", "nearest")
    linear = mode == "linear"
    real: type[np.floating[Any]] = np.float32 if mode == "nearest" else np.float64
    half, step = real(0.5), real(scale)
    at = np.arange(size, dtype=real)
    transform = settings.get("coordinate_transformation_mode", "half_pixel")
    x = (at + half) / step - half
    if transform == "asymmetric":
        x = at / step
    elif transform == "align_corners":
        x = at * real(count - 1) / real(size - 1) if size > 1 else np.zeros(1, real)
    elif transform == "pytorch_half_pixel" and size <= 1:
        x = np.zeros(size, real)
    elif transform == "tf_half_pixel_for_nn":
        x = (at + half) / step
    elif transform == "half_pixel_symmetric":
        x = real(count) / real(2) * (real(1) - real(size) / (step * real(count))) + x
    matrix, rows = np.zeros((size, count)), np.arange(size)
    if linear:
        x = np.clip(x, 0, count - 1)
        low = np.floor(x).astype(int)
        np.add.at(matrix, (rows, low), 1.0 - (x - low))
        np.add.at(matrix, (rows, np.minimum(low + 1, count - 1)), x - low)
        return matrix
    if mode == "cubic":
        return _interpolate_cubically(count, x, settings)
    nearest = {
        "round_prefer_floor": np.ceil(x - half),
        "round_prefer_ceil": np.floor(x + half),
        "floor": np.floor(x),
        "ceil": np.ceil(x),
    }[settings.get("nearest_mode", "round_prefer_floor")]
    matrix[rows, np.clip(nearest, 0, count - 1).astype(int)] = 1.0
    return matrix


def _interpolate_cubically(count: int, places: Array, settings: dict[str, Any]) -> Array:
    """The weights of the four neighbours of each place, in powers of its distance from the second one."""
    a, exclude = settings.get("cubic_coeff_a", -0.75), settings.get("exclude_outside", 0)
    powers = np.array([[0, a, -2 * a, a], [1, 0, -a - 3, a + 2], [0, -a, 2 * a + 3, -a - 2], [0, 0, a, -a]])
    matrix = np.zeros((len(places), count))
    for row, place in zip(matrix, places, strict=True):
        second = math.floor(place)
        weights = powers @ (place - second) ** np.arange(4)
        for k, weight in enumerate(weights, second - 1):
            if not exclude or 0 <= k < count:
                row[min(max(k, 0), count - 1)] += weight
        row /= row.sum() if exclude else 1.0
    return matrix


@functools.lru_cache(64)
def _interpolation(
    count: int, scale: float, size: int, op: str, attrs: tuple[tuple[str, Any], ...], opset: int
) -> Array:
    """The matrix that resizes an axis of `count` positions.

    onnx's reference evaluator gives the interpolation of old opsets, from unit vectors.
    """
    if count > 512:
        raise TooLargeError
    settings = dict(attrs)
    mode = settings.get("mode", "nearest")
    if opset >= 11 and op == "Resize" and mode in ("nearest", "linear", "cubic"):
        return _interpolate(count, np.float32(scale), size if size >= 0 else int(count * np.float32(scale)), settings)
    if settings.get("coordinate_transformation_mode") in ("align_corners", "tf_half_pixel_for_nn"):
        raise UnfitError("onnx's reference evaluator is known to be wrong for Resize with these attributes")
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
    from onnx.reference import ReferenceEvaluator

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
