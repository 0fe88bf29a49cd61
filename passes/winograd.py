"""Winograd convolution (minimal filtering): a 3×3 convolution becomes pointwise maps of sums of neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pwopt.algebra.geometry import Geometry
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor, Variable
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import Dim
from pwopt.maps.cost import ELEMENT
from pwopt.maps.forms import Reading
from pwopt.maps.positions import stencil
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.interleaving import Interleaving, check_interleaving
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, read_activation

#: The filter transform.
FILTER_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
#: The rows of Bᵀ, with two taps each: the place of the first in a tile, the distance of the second, and their signs.
ROWS = ((0, 2, (1, -1)), (1, 1, (1, 1)), (1, 1, (-1, 1)), (1, 2, (1, -1)))
#: Outputs of a tile along each axis. It reads two more inputs.
TILE = 2
#: Elements read and written per tile, for each input channel and for each output channel. 16 sums of neighbours are
#: written and read. 16 products go through 24 sums and 6 changes of sign, and then the tile is interleaved.
MOVED_IN, MOVED_OUT = 32, 64
#: The fixed cost of about 65 operators in multiply-adds: 5 µs each, at 50 G multiply-adds per second.
OPERATOR_OVERHEAD = 65 * 250_000
#: Types with convolutions that are fine enough for sums of neighbours, which are larger than the neighbours.
FINE = ("float32", "float64")


class Winograd(Pass):
    """w ∗ x = Aᵀ((G·w·Gᵀ) ⊙ (Bᵀ·x·B))A on tiles of 4×4 inputs and 2×2 outputs

    F(2×2, 3×3): ⊙ is a pointwise map for each of the 16 places of a tile. It takes 16 multiply-adds per four outputs
    and pair of channels instead of 36.

        Bᵀ = | 1  0 −1  0 |    G = | 1    0    0  |    Aᵀ = | 1  1  1  0 |
             | 0  1  1  0 |        | 1/2  1/2 1/2 |         | 0  1 −1 −1 |
             | 0 −1  1  0 |        | 1/2 −1/2 1/2 |
             | 0  1  0 −1 |        | 0    0    1  |

    * The convolution is dense, 3×3, with stride 1, dilation 1 and padding 1. Its weight is not shared.
    * The type is float32 or float64.
    * It saves more multiply-adds than the additional operators cost, which needs about a hundred channels.

    The identity is polynomial, and therefore exact (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and
    Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). It is hardly less accurate, because G·w·Gᵀ is
    computed in float64, and A and B only add. Bᵀ·x·B is 16 depthwise convolutions with four taps and stride 2, and
    Aᵀ·m·A consists of sums. All of them stay in the provider's blocked layout.
    """

    name = "winograd"
    operators = frozenset({"Conv"})
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout
    #: The smallest ratio of saved to additional cost for a race.
    min_gain: ClassVar[float] = 1.0

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = stencil(rw, node)
        g = None if reading is None else reading.geometry
        if reading is None or g is None or g.kernel != (3, 3) or g.groups > 1:
            return None
        if g.strides != (1, 1) or g.dilations != (1, 1) or g.pads != (1, 1, 1, 1):
            return None
        tiles = math.prod(_count_tiles(d) or 1 for d in (rw.size_of(reading.source) or ())[2:])
        saved = (TILE**2 * 9 - 16) * g.in_channels * g.out_channels * tiles
        moved = ELEMENT * (MOVED_IN * g.in_channels + MOVED_OUT * g.out_channels) * tiles
        if saved <= self.min_gain * (moved + OPERATOR_OVERHEAD):
            return None
        size = [d if isinstance(d := rw.dim(reading.source, axis), int) else None for axis in (2, 3)]
        what, even = f"3×3 {reading.channels}", all(d is not None and d % TILE == 0 for d in size)
        sized = even or rw.opset >= 15  # older Shapes have no start
        if str(rw.dtype(reading.source)) not in FINE or 0 in size or not sized:
            return None
        if not self.eager:
            return Skip(f"{what} could be 16 pointwise maps; only measuring can tell")
        if rw.is_shared(reading.weight_input):
            return Skip(Reason("the weight {!r} is shared", reading.weight_input.name))
        linear, step = reading.load(), read_activation(rw, reading.output)
        refusal = check_interleaving(rw, reading.output if step is None else step.output)
        if refusal is not None:
            return Skip(refusal.reason)
        filtering = _Filtering(rw, reading, linear, (size[0], size[1]), step)
        filtering.write()
        reason = f"{what} runs as 16 pointwise maps, by Winograd's minimal filtering"
        done = rw.replace(
            [node, *(step.nodes if step is not None else ())], filtering.nodes, reason, filtering.residual
        )
        return done.with_signature(f"minimal filtering of {what} at {rw.size_of(reading.source)}")


def _count_tiles(size: Dim) -> int | None:
    """The number of tiles along an axis; None if it is not known."""
    return -(-size // TILE) if isinstance(size, int) else None


@dataclass
class _Filtering(Builder):
    """The operators that replace one convolution."""

    reading: Reading
    linear: LinearMap
    size: tuple[int | None, int | None]
    step: Step | None

    @property
    def output(self) -> Tensor:
        return self.reading.output if self.step is None else self.step.output

    def write(self) -> None:
        """Fill `nodes`; the last one makes the output of the convolution, or of the activation that follows it."""
        matrices = np.einsum("pa,oiab,qb->pqoi", FILTER_TRANSFORM, self.linear.weight, FILTER_TRANSFORM)
        products: list[list[Tensor]] = []
        for p, q in np.ndindex(4, 4):
            bias = self.linear.bias if p == q == 1 else None  # this place is in all four outputs, once
            linear = LinearMap.pointwise(matrices[p, q], bias, rank=2)
            around = self._sum_neighbours(p, q)
            product = self._new_tensor(f"product{p}{q}", linear.geometry.out_channels)
            self.add_map(linear, self.reading, around, product)
            products += [[]] if q == 0 else []
            products[-1].append(product)
        columns = [list(self._transform_output([row[q] for row in products])) for q in range(4)]
        outputs = [t for p in range(TILE) for t in self._transform_output([column[p] for column in columns])]
        together = Interleaving(self.rw, self.output, (TILE, TILE), self.reading.source)
        self.nodes += together.write(outputs, self.step)

    def _sum_neighbours(self, p: int, q: int) -> Tensor:
        """Apply row p of Bᵀ to the rows of every tile and row q to its columns, by a depthwise 2×2 convolution."""
        channels = self.linear.geometry.in_channels
        begins, ends, dilations = [], [], []
        for row, size in zip((ROWS[p], ROWS[q]), self.size, strict=True):
            first, second, _ = row
            odd = size is None or size % TILE  # the padding of odd sizes adds no tile to even ones
            begins.append(1 - first)  # a tile begins one before its outputs
            ends.append(first + second - (1 if odd else 2))
            dilations.append(second)
        taps = np.outer(ROWS[p][2], ROWS[q][2])
        geometry = Geometry(
            channels, channels, channels, (2, 2), (TILE, TILE), (dilations[0], dilations[1]), (*begins, *ends)
        )
        around = self._new_tensor(f"neighbours{p}{q}", channels)
        self.add_map(LinearMap.of(geometry, np.tile(taps, (channels, 1, 1))), self.reading, self.reading.source, around)
        return around

    def _transform_output(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Aᵀ along one axis of a tile: a + b + c and b − (c + d) of the four parts a, b, c, d."""
        yield self._add(self._add(parts[0], parts[1]), parts[2])
        yield self._add(parts[1], self._negate(self._add(parts[2], parts[3])))

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        total = self._new_tensor("sum", self.linear.geometry.out_channels)
        self.add_node("Add", [a, b], total)
        return total

    def _negate(self, tensor: Tensor) -> Tensor:
        """Change the sign by a depthwise convolution, because the blocked layout has no Neg and no Sub."""
        channels = self.linear.geometry.out_channels
        negative = self._new_tensor("negative", channels)
        self.add_map(LinearMap.diagonal(-np.ones(channels), rank=2), self.reading, tensor, negative)
        return negative

    def _new_tensor(self, role: str, channels: int) -> Variable:
        """A tensor with one element for each tile."""
        return self.rw.new_variable(
            f"{self.output.name}_{role}",
            self.output,
            lambda s: (s[0], channels, _count_tiles(s[2]), _count_tiles(s[3])),
        )
