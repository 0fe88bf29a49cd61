"""Interleaves phases into one tensor, in the form that is closest to the blocked layout of the provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra.geometry import Refusal
from pwopt.graph.ir import Constant, Node, Tensor, Variable
from pwopt.graph.shapes import Dim, Shape, as_fixed
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.steps import Step

#: The first opset whose Shape reads some of the sizes only.
SHAPE_HAS_START = 15


def check_interleaving(rw: Rewriter, output: Tensor) -> Refusal | None:
    """Why phases cannot be interleaved into `output`; None if they can."""
    shape = rw.shape(output)
    if shape is None or len(shape) < 3 or not isinstance(shape[1], int):
        return Refusal("the rank of its output is not known")
    if 0 in shape:
        return Refusal("its output is empty")
    return None


@dataclass
class Interleaving(Builder):
    """y[R·q + j] = phase_j[q] along every spatial axis, for phases in row-major order of j.

    The channels move to the last axis, so that whole rows of them are copied. onnxruntime converts its blocked layout
    in one step with such a Transpose, which it does not do for DepthToSpace.

    Attributes
    ----------
    rw : Rewriter
    output : Tensor
    counts : sequence of int
        R for each axis.
    sized : Tensor or None
        A tensor with the spatial sizes of the output, to which the result is cut; None if R divides them.
    nodes : list of Node
        The last one computes the output after a call of `write`.
    """

    output: Tensor
    counts: Sequence[int]
    sized: Tensor | None = None

    @property
    def channels(self) -> int:
        count = self.rw.dim(self.output, 1)
        assert isinstance(count, int)
        return count

    def phase(self, role: str, channels: int) -> Variable:
        """Create a tensor with the spatial sizes of a phase."""
        return self._create(role, lambda s: (channels, *self._short(s)))

    def write(self, phases: Sequence[Tensor], step: Step | None = None) -> list[Node]:
        """Create the operators that compute the output. An activation runs before the channels move."""
        last = self.counts[-1]
        rows = []
        for index, start in enumerate(range(0, len(phases), last)):
            row = phases[start]
            if last > 1:
                row = self.phase(f"row{index}", last * self.channels)
                self.add_node("Concat", phases[start : start + last], row, axis=1)
            if step is not None:
                active = self.phase(f"active{index}", last * self.channels)
                self.add_step(step, row, active)
                row = active
            rows.append(row)
        return self.write_rows(rows)

    def write_rows(self, rows: Sequence[Tensor]) -> list[Node]:
        """The same for phases that are already concatenated along the channels if only their last axis differs.

        With the channels last, rows of positions lie one behind the other in memory. To interleave rows along an axis,
        it is enough to concatenate them along the next one, and to read the result with other sizes at the end. The
        last Concat reads flattened rows, because onnxruntime would move the Transposes behind a Concat of images.
        """
        rank, width = len(self.counts), self.counts[-1] * self.channels
        placed: list[Tensor] = []
        for index, row in enumerate(rows):
            placed.append(self._create(f"last{index}", lambda s: (*self._short(s), width)))
            self.add_node("Transpose", [row], placed[-1], perm=[0, *range(2, rank + 2), 1])
        for axis in range(rank - 2, -1, -1):
            count = self.counts[axis]
            groups = [placed[i : i + count] for i in range(0, len(placed), count)]
            placed = [self._join(group, axis, width) if count > 1 else group[0] for group in groups]
        whole = self._create("whole", lambda s: (*self._long(s), self.channels))
        self.add_node("Reshape", [placed[0], self._find_target(rows[0])], whole)
        self.add_node("Transpose", [self._cut(whole)], self.output, perm=[0, rank + 1, *range(1, rank + 1)])
        return self.nodes

    def _short(self, space: Sequence[Dim]) -> list[Dim]:
        return [-(-d // r) if isinstance(d, int) else None for d, r in zip(space, self.counts, strict=True)]

    def _long(self, space: Sequence[Dim]) -> list[Dim]:
        return [_times(s, r) for s, r in zip(self._short(space), self.counts, strict=True)]

    def _join(self, rows: list[Tensor], axis: int, width: int) -> Tensor:
        """Concatenate rows along the axis after the one along which they alternate."""
        if axis == 0:
            flat = [self._flatten(row) for row in rows]
            joined = self.rw.new_variable(f"{self.output.name}_rows", flat[0], lambda s: (*s[:-1], None))
            self.add_node("Concat", flat, joined, axis=len(self.rw.shape(flat[0]) or ()) - 1)
            return joined

        def sizes(space: Shape) -> tuple[Dim, ...]:
            short = enumerate(self._short(space))
            return (*(d if i <= axis else _times(d, self.counts[i - 1]) for i, d in short), width)

        joined = self._create("rows", sizes)
        self.add_node("Concat", rows, joined, axis=axis + 2)
        return joined

    def _flatten(self, row: Tensor) -> Variable:
        """Flatten a row to a matrix, or to one for each image if its sizes are known. Then the batch stays known."""
        sizes = as_fixed((self.rw.shape(row) or ())[1:])
        if sizes is None:
            matrix = self.rw.new_variable(f"{row.name}_matrix", row, lambda s: (None, None))
            self.add_node("Flatten", [row], matrix, axis=2)
            return matrix
        flat = sizes[0], math.prod(sizes[1:])
        matrix = self.rw.new_variable(f"{row.name}_matrix", row, lambda s: (s[0], *flat))
        self.add_node("Reshape", [row, self._constant("flat", [0, *flat])], matrix)
        return matrix

    def _find_target(self, row: Tensor) -> Tensor:
        """The sizes of all positions; computed if one is not known.

        A −1 takes any batch, even an empty one. As any other size, onnxruntime refuses it for an empty batch.
        """
        rank, batch = len(self.counts), self.rw.dim(self.output, 0)
        sizes = as_fixed(self._long((self.rw.shape(self.output) or ())[2:]))
        if sizes is not None:
            return self._constant("shape", [0, *sizes, self.channels])
        first = batch if isinstance(batch, int) else -1
        short, long, target = (
            Variable(self.rw.unique_name(f"{self.output.name}_{role}"), np.dtype(np.int64), (count,))
            for role, count in (("short", rank), ("long", rank), ("target", rank + 2))
        )
        if self.rw.opset < SHAPE_HAS_START:
            whole = Variable(self.rw.unique_name(f"{self.output.name}_sizes"), np.dtype(np.int64), (rank + 2,))
            self.add_node("Shape", [row], whole)
            self.add_node("Gather", [whole, self._constant("axes", range(2, rank + 2))], short, axis=0)
        else:
            self.add_node("Shape", [row], short, start=2, end=rank + 2)
        self.add_node("Mul", [short, self._constant("counts", self.counts)], long)
        ends = self._constant("batch", [first]), self._constant("channels", [self.channels])
        self.add_node("Concat", [ends[0], long, ends[1]], target, axis=0)
        return target

    def _cut(self, whole: Tensor) -> Tensor:
        """Cut off the positions beyond the size of the output."""
        space = (self.rw.shape(self.output) or ())[2:]
        sizes = as_fixed(space)
        if self.sized is None or (sizes is not None and list(sizes) == self._long(sizes)):
            return whole
        rank = len(space)
        if sizes is not None:
            ends: Tensor = self._constant("ends", sizes)
        else:
            ends = Variable(self.rw.unique_name(f"{self.output.name}_size"), np.dtype(np.int64), (rank,))
            self.add_node("Shape", [self.sized], ends, start=2, end=2 + rank)
        cut = self._create("cut", lambda s: (*s, self.channels))
        starts, axes = self._constant("starts", [0] * rank), self._constant("axes", range(1, rank + 1))
        self.add_node("Slice", [whole, starts, ends, axes], cut)
        return cut

    def _create(self, role: str, sizes: Callable[[Shape], tuple[Dim, ...]]) -> Variable:
        """Create a tensor whose sizes follow from those of the output."""
        return self.rw.new_variable(f"{self.output.name}_{role}", self.output, lambda s: (s[0], *sizes(s[2:])))

    def _constant(self, role: str, values: Sequence[int]) -> Constant:
        return self.rw.new_constant(f"{self.output.name}_{role}", np.array(values, np.int64))


def _times(size: Dim, count: int) -> Dim:
    return size * count if isinstance(size, int) else None


def count_moved(size: Sequence[int]) -> int:
    """Count the elements that are read and written to interleave an output of this size."""
    return 6 * math.prod(size)
