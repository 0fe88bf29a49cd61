"""Interleaves phases into one tensor, in the form that is closest to the blocked layout of the provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    _targets: dict[int, Tensor] = field(default_factory=dict, init=False)

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
        """The same for phases that are already concatenated along the channels if only their last axis differs."""
        rank = len(self.counts)
        placed = [self._place(row, i) for i, row in enumerate(rows)]
        for axis in range(rank - 2, -1, -1):
            count = self.counts[axis]
            placed = [self._merge(placed[i : i + count], axis) for i in range(0, len(placed), count)]
        self.add_node("Transpose", [self._cut(placed[0])], self.output, perm=[0, rank + 1, *range(1, rank + 1)])
        return self.nodes

    def _short(self, space: Sequence[Dim]) -> list[Dim]:
        return [-(-d // r) if isinstance(d, int) else None for d, r in zip(space, self.counts, strict=True)]

    def _long(self, space: Sequence[Dim]) -> list[Dim]:
        return [s * r if isinstance(s, int) else None for s, r in zip(self._short(space), self.counts, strict=True)]

    def _place(self, row: Tensor, index: int) -> Tensor:
        """Interleave the phases of a row along the last axis: (N, S₀, …, 1, L, C)."""
        rank, width = len(self.counts), self.counts[-1] * self.channels
        last = self._create(f"last{index}", lambda s: (*self._short(s), width))
        self.add_node("Transpose", [row], last, perm=[0, *range(2, rank + 2), 1])
        if rank == 1:
            row = self._create("whole", lambda s: (*self._long(s), self.channels))
            return self._reshape(last, 0, ([0], [self.channels]), row)
        row = self._create(f"place{index}", lambda s: (*self._short(s)[:-1], 1, self._long(s)[-1], self.channels))
        return self._reshape(last, rank - 1, ([*[0] * rank, 1], [self.channels]), row)

    def _merge(self, rows: list[Tensor], axis: int) -> Tensor:
        """Interleave along one more axis: (N, S₀, …, Sₐ, 1, …) to (N, S₀, …, 1, Lₐ, …); no 1 for the first axis."""
        rank, joined = len(self.counts), rows[0]
        if len(rows) > 1:
            joined = self._create(
                "rows",
                lambda s: (*self._short(s)[: axis + 1], len(rows), *self._long(s)[axis + 1 :], self.channels),
            )
            self.add_node("Concat", rows, joined, axis=axis + 2)
        if axis:
            made = self._create("plane", lambda s: (*self._short(s)[:axis], 1, *self._long(s)[axis:], self.channels))
            around = ([*[0] * (axis + 1), 1], [*[0] * (rank - 1 - axis), self.channels])
            return self._reshape(joined, axis, around, made)
        whole = self._create("whole", lambda s: (*self._long(s), self.channels))
        sizes = as_fixed(self._long((self.rw.shape(self.output) or ())[2:])[1:])
        if sizes is not None:
            return self._reshape(joined, 0, ([0], [*sizes, self.channels]), whole)
        # a zero takes a size over from the same place: others stay there, and move up then
        flat = self._create("flat", lambda s: (self._long(s)[0], 1, *self._long(s)[1:], self.channels))
        self._reshape(joined, 0, ([0], [1, *[0] * (rank - 1), self.channels]), flat)
        if self.rw.opset < 13:
            self.add_node("Squeeze", [flat], whole, axes=[2])
        else:
            self.add_node("Squeeze", [flat, self._constant("axis", [2])], whole)
        return whole

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

    def _reshape(
        self, source: Tensor, axis: int, around: tuple[Sequence[int], Sequence[int]], output: Variable
    ) -> Variable:
        """Reshape to the whole size of a spatial axis and the entries around it."""
        size = self._long((self.rw.shape(self.output) or ())[2:])[axis]
        if isinstance(size, int) or isinstance(self.rw.dim(self.output, 0), int):
            target: Tensor = self._constant("shape", [*around[0], size if isinstance(size, int) else -1, *around[1]])
        else:
            target = self._compute_target(source, axis, around)
        self.add_node("Reshape", [source, target], output)
        return output

    def _compute_target(self, source: Tensor, axis: int, around: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """Compute the target of a Reshape, because an empty batch does not take a −1."""
        if axis not in self._targets:
            place, rank = axis + 1, sum(map(len, around)) + 1
            short, long, target = (
                Variable(self.rw.unique_name(f"{self.output.name}_{role}"), np.dtype(np.int64), (count,))
                for role, count in (("short", 1), ("long", 1), ("target", rank))
            )
            if self.rw.opset < SHAPE_HAS_START:
                sizes = Variable(self.rw.unique_name(f"{self.output.name}_sizes"), np.dtype(np.int64), (None,))
                self.add_node("Shape", [source], sizes)
                self.add_node("Gather", [sizes, self._constant("axis", [place])], short, axis=0)
            else:
                self.add_node("Shape", [source], short, start=place, end=place + 1)
            self.add_node("Mul", [short, self._constant("count", [self.counts[axis]])], long)
            before, after = (self._constant(role, part) for role, part in zip(("before", "after"), around, strict=True))
            self.add_node("Concat", [before, long, after], target, axis=0)
            self._targets[axis] = target
        return self._targets[axis]

    def _create(self, role: str, sizes: Callable[[Shape], tuple[Dim, ...]]) -> Variable:
        """Create a tensor whose sizes follow from those of the output."""
        return self.rw.new_variable(f"{self.output.name}_{role}", self.output, lambda s: (s[0], *sizes(s[2:])))

    def _constant(self, role: str, values: Sequence[int]) -> Constant:
        return self.rw.new_constant(f"{self.output.name}_{role}", np.array(values, np.int64))


def count_moved(size: Sequence[int]) -> int:
    """Count the elements that are read and written to interleave an output of this size."""
    return 6 * math.prod(size)
