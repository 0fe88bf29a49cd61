"""Read Resizes that interpolate an image of fixed size, for `pwopt.algebra.interpolation`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.interpolation import TRANSFORMATIONS, Interpolation
from pwopt.graph.disagreements import is_ambiguous
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.view import View

#: The largest number of positions of an axis.
MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Axis:
    """One interpolated axis: the positions before and after, and the factor that the operator uses."""

    count: int
    size: int
    scale: float


@dataclass(frozen=True)
class Interpolated:
    """resize(X) = A·X·Bᵀ for each channel of an image.

    Attributes
    ----------
    node : Node
    kind : Interpolation
    rows, columns : Axis
        The last two of four axes. At least one of them changes.
    """

    node: Node
    kind: Interpolation
    rows: Axis
    columns: Axis

    @property
    def source(self) -> Tensor:
        return self.node.inputs[0]

    @property
    def what(self) -> str:
        rows, columns = self.rows, self.columns
        return f"{self.kind.mode} interpolation of {rows.count}×{columns.count} to {rows.size}×{columns.size}"

    def matrices(self) -> tuple[Array, Array]:
        """A and B, of shape (positions after, positions before)."""
        row, column = (self.kind.matrix(a.count, a.size, a.scale) for a in (self.rows, self.columns))
        return row, column


def read_interpolated(view: View, node: Node | None) -> Interpolated | None:
    """Read a Resize that two matrices describe: linear or cubic, of fixed sizes, without a region of interest."""
    if not view.is_a(node, "Resize") or view.opset < 11:
        return None
    kind = _read_kind(node)
    axes = None if kind is None else _read_axes(view, node)
    if kind is None or axes is None or all(a.count == a.size for a in axes):
        return None
    return Interpolated(node, kind, *axes)


def _read_kind(node: Node) -> Interpolation | None:
    """The interpolation of a Resize, if matrices without a region of interest describe it."""
    attrs = node.attrs
    mode = attrs.get("mode", "nearest")
    transformation = attrs.get("coordinate_transformation_mode", "half_pixel")
    policy = attrs.get("keep_aspect_ratio_policy", "stretch")
    if transformation not in TRANSFORMATIONS or attrs.get("antialias", 0) or policy != "stretch":
        return None
    if mode == "linear" and not attrs.get("exclude_outside", 0):
        return Interpolation("linear", transformation)
    if mode == "cubic":
        a, outside = attrs.get("cubic_coeff_a", -0.75), bool(attrs.get("exclude_outside", 0))
        return Interpolation("cubic", transformation, float(a), outside)
    return None


def _read_axes(view: View, node: Node) -> tuple[Axis, Axis] | None:
    """The last two of four axes; None if they are not fixed, or if the other axes change."""
    before = view.shape(node.inputs[0])
    if before is None or len(before) != 4:
        return None
    given = node.attrs.get("axes")
    order = list(range(4)) if given is None else [int(a) % 4 for a in given]
    scales, sizes = view.optional_input(node, 2), view.optional_input(node, 3)
    found: dict[int, tuple[int, float]] = {}
    if scales is not None and view.elements(scales) != 0:
        values = view.value(scales)
        if values is None or len(values) != len(order):
            return None
        for axis, scale in zip(order, values, strict=True):
            count = before[axis]
            if axis >= 2 and isinstance(count, int) and not is_ambiguous(count, float(scale)):
                found[axis] = math.floor(np.float32(count) * np.float32(scale)), float(scale)
            elif scale != 1:
                return None
    else:
        wanted = None if sizes is None else view.integers(sizes)
        if wanted is None or len(wanted) != len(order):
            return None
        for axis, size in zip(order, wanted, strict=True):
            count = before[axis]
            if axis >= 2 and isinstance(count, int) and count:
                found[axis] = size, float(np.float32(size / count))
            elif size != count:
                return None
    axes = [Axis(d, *found.get(a, (d, 1.0))) for a, d in enumerate(before) if a >= 2 and isinstance(d, int)]
    usable = len(axes) == 2 and all(0 < n <= MAX_POSITIONS for a in axes for n in (a.count, a.size))
    return (axes[0], axes[1]) if usable else None
