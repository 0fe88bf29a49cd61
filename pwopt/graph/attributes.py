"""The attributes and constant inputs of nodes, in the form of every opset, with the defaults of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pwopt.algebra.geometry import Refusal
from pwopt.graph.disagreements import correct_end
from pwopt.graph.ir import Node
from pwopt.graph.operators import AXES_SINCE
from pwopt.graph.view import View


class Spatial(NamedTuple):
    """The geometry of a convolution or pooling; `auto_pad` is "" if its padding was resolved."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str


def read_spatial_attributes(view: View, node: Node, kernel: tuple[int, ...]) -> Spatial | Refusal:
    """Read strides, dilations and pads of a convolution or pooling, with the defaults of ONNX.

    SAME padding is resolved where the stride is 1 (it does not depend on the size then) or the size is known. It stays
    automatic where the stride reaches beyond the kernel, so that the padding is negative: it crops the input, and
    runtimes do not agree on which side they crop more.
    """
    rank, attrs = len(kernel), node.attrs
    strides = tuple(attrs.get("strides", (1,) * rank))
    dilations = tuple(attrs.get("dilations", (1,) * rank))
    pads = tuple(attrs.get("pads", (0, 0) * rank))
    auto = attrs.get("auto_pad", "NOTSET")
    if (len(strides), len(dilations), len(pads)) != (rank, rank, 2 * rank):
        return Refusal("its strides, dilations and pads do not fit its kernel")
    if min(pads, default=0) < 0:
        return Refusal("it has negative padding")
    if auto == "VALID":
        return Spatial(strides, dilations, (0, 0) * rank, "")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return Spatial(strides, dilations, pads, "")
    begins, ends = [], []
    for axis in range(rank):
        size = view.dim(node.inputs[0], axis + 2)
        total = dilations[axis] * (kernel[axis] - 1)
        if strides[axis] > 1:
            if not isinstance(size, int):
                return Spatial(strides, dilations, (0, 0) * rank, auto)
            total += (-(-size // strides[axis]) - 1) * strides[axis] + 1 - size
            if total < 0:
                return Spatial(strides, dilations, (0, 0) * rank, auto)
        begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return Spatial(strides, dilations, (*begins, *ends), "")


def is_inactive_dropout(view: View, node: Node) -> bool:
    """Whether a Dropout returns its input. At inference it always does, whatever its ratio is."""
    if view.opset < 7:
        return bool(node.attrs.get("is_test", 0))
    mode = view.optional_input(node, 2)
    if mode is None:
        return True
    raw = view.raw(mode)
    return raw is not None and not raw.any()


def read_axes(view: View, node: Node) -> list[int] | None:
    """Read the axes of a reduction, Squeeze or Unsqueeze: an attribute in older opsets, the second input in newer ones.

    They are non-negative if the rank of the input is known. None if they are not constant, not given, or an empty list.
    """
    if view.opset < AXES_SINCE[node.op]:
        axes = node.attrs.get("axes")
    else:
        tensor = view.optional_input(node, 1)
        axes = None if tensor is None else view.integers(tensor)
    rank = view.rank(node.inputs[0])
    return [a + rank if a < 0 and rank is not None else a for a in axes] if axes else None


def read_slice_parameters(view: View, node: Node) -> list[tuple[int, int, int, int]] | None:
    """Read (axis, start, end, step) of a Slice, axes non-negative; None if not constant or of unknown rank.

    The end of a Slice backwards is what onnxruntime takes it for (`disagreements.correct_end`).
    """
    rank = view.rank(node.inputs[0])
    if view.opset < 10:
        starts, ends = node.attrs.get("starts"), node.attrs.get("ends")
        axes, steps = node.attrs.get("axes"), None
    else:
        given = [view.optional_input(node, i) for i in range(1, 5)]
        starts, ends, axes, steps = (None if t is None else view.integers(t) for t in given)
        if any(t is not None and v is None for t, v in zip(given, (starts, ends, axes, steps), strict=True)):
            return None
    if starts is None or ends is None or rank is None:
        return None
    axes = list(range(len(starts))) if axes is None else [a + rank if a < 0 else a for a in axes]
    steps = steps or [1] * len(starts)
    ends = [correct_end(end, step) for end, step in zip(ends, steps, strict=True)]
    return list(zip(axes, starts, ends, steps, strict=True))


def read_permutation(view: View, node: Node) -> list[int] | None:
    """Read the permutation of a Transpose, by default the reverse; None if that needs a rank that is unknown."""
    given, rank = node.attrs.get("perm"), view.rank(node.inputs[0])
    return list(given) if given is not None else None if rank is None else list(range(rank))[::-1]


def read_concat_axis(view: View, node: Node) -> int | None:
    """Read the axis of a Concat, non-negative; None if it is negative and the rank is unknown."""
    axis, rank = int(node.attrs.get("axis", 1)), view.rank(node.outputs[0])
    return axis if axis >= 0 else axis + rank if rank is not None else None


def read_pad_parameters(view: View, node: Node) -> tuple[list[int], str, float | None] | None:
    """Read (pads of every axis, mode, constant) of a Pad; None if the pads are unknown. The constant may be None."""
    rank = view.rank(node.inputs[0])
    mode = node.attrs.get("mode", "constant")
    if view.opset < 11:
        pads = node.attrs.get("pads", node.attrs.get("paddings"))
        return None if pads is None else (list(pads), mode, float(node.attrs.get("value", 0.0)))
    pads = view.integers(node.inputs[1])
    value, axes = view.optional_input(node, 2), view.optional_input(node, 3)
    if pads is None or rank is None:
        return None
    if axes is not None:
        picked = view.integers(axes)
        if picked is None:
            return None
        full = [0] * (2 * rank)
        for i, a in enumerate(picked):
            full[a % rank], full[a % rank + rank] = pads[i], pads[i + len(picked)]
        pads = full
    return (pads, mode, 0.0 if value is None else view.uniform(value)) if len(pads) == 2 * rank else None


def is_resized_by_sizes(view: View, node: Node) -> bool:
    """Whether a Resize has sizes as an input. Its factor is then exactly the ratio of the sizes."""
    return node.op == "Resize" and view.opset >= 11 and view.optional_input(node, 3) is not None


def read_resize_scales(view: View, node: Node) -> dict[int, float] | None:
    """Read the factor of each axis of a Resize or Upsample with constant factors; None for any other."""
    rank = view.rank(node.inputs[0])
    if node.op == "Upsample" and view.opset < 9:
        scales = node.attrs.get("scales")
    else:
        given = view.optional_input(node, 1 if node.op == "Upsample" or view.opset < 11 else 2)
        value = None if given is None else view.value(given)
        scales = None if value is None or value.size == 0 else value.tolist()
    axes = node.attrs.get("axes", range(len(scales)) if scales is not None else ())
    if scales is None or rank is None or len(axes) != len(scales):
        return None
    return {a % rank: float(s) for a, s in zip(axes, scales, strict=True)}


def is_same_shape(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two shapes (`values.read_extents`) are equal, given that they have the same number of elements.

    They are, if all sizes but one are known to be equal.
    """
    unknown = [x for x, y in zip(a, b, strict=True) if x != y]
    return len(unknown) <= 1 and not any(
        isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a, b, strict=True)
    )
