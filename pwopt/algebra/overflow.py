"""Overflow: which combined maps may give infinity where the maps they replace give a number.

Let M be the largest number of a type and ε the distance from 1 to the next number. Let an operator compute W·x and
W·x + b, and round each to the type. A map that was read computes p = W·x and y = p + b in the original model too. A
combined map also ends in a result y of the original, but its product p is a new number, which may overflow.

**Products.** Let all results of the original, computed exactly, be at most (1 − 3ε)·M. Then |p| ≤ (1 − 3ε)·M + moved,
where `LinearMap.moved` is

    0                   of a map that was read, because p is the original's own product;
    moved₂ + |W₂·b₁|    of second ∘ first: p = W₂·(h − b₁) = W₂·h − W₂·b₁, where h is a result of the original, and W₂·h
                        is the product of the second map;
    |b₁ + b₂|           of a sum: p = y − (b₁ + b₂).

So p is finite if moved ≤ ε·M: that leaves 2ε·M for the rounding of weights and products. It is finite too if Σ|W_oj|
≤ 1 in its row o, since then |p| ≤ max |x_j| ≤ M. An example of the opposite: s·(1 − x), the mask of a transformer,
with s = −M. For x = 2 it is M, but s − s·x has the product 2·M.

**Sums.** In which order an operator sums is not known, so no map with several terms is safe in the middle of its sum.
As long as all weights are at most √M, that takes inputs beyond √M/n for n terms. Therefore a combined map with larger
weights and several terms is refused. Likewise, s·(a + b) = s·a + s·b has new results, of which only the sum is known
to be finite. So |s| must be between 1/√M and √M, and 1 in float16, where ordinary data come near to M. The same holds
for s·(a·b) = (s·a)·b, for pooling, for interpolation and for LeakyRelu. If a map takes the scale over, its weights must
stay below √M as well, since its results are new.

**Shifts.** (x + t) + b = (x + b) + t has the new result x + b = y − t, so |t| ≤ ε·M keeps it finite, as above.

The limits are far from the numbers of networks: ε·M is 4·10³¹ in float32 and 64 in float16, √M is 2·10¹⁹ and 256. A
bias in front of a scale has to exceed them to be refused; a normalisation after a convolution without a bias never
does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Array
from pwopt.algebra.geometry import RefusedError
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.summaries import find_magnitude


@dataclass(frozen=True)
class Range:
    """The numbers of a floating-point type.

    Attributes
    ----------
    name : str
    largest : float
        M
    epsilon : float
        ε
    """

    name: str
    largest: float
    epsilon: float

    def allows_shift(self, shift: Array) -> bool:
        """Whether these constants may be added elsewhere than in the original."""
        return find_magnitude(shift) <= self.epsilon * self.largest

    def allows_scale(self, scale: Array) -> bool:
        """Whether elements may be scaled by these factors before they are combined instead of after, or vice versa."""
        sizes, limit = np.abs(scale[scale != 0]), 1.0 if self.name == "float16" else math.sqrt(self.largest)
        return bool(np.all((sizes <= limit) & (sizes >= 1 / limit)))

    def require_shift(self, shift: Array) -> None:
        """Refuse constants that `allows_shift` does not allow.

        Raises
        ------
        RefusedError
        """
        if not self.allows_shift(shift):
            raise RefusedError(f"a folded constant could overflow {self.name} where the original does not")

    def require_weights(self, weights: Array) -> None:
        """Refuse weights above √M of a map that takes over a scale from behind an operator that combines elements.

        Raises
        ------
        RefusedError
        """
        if find_magnitude(weights) > math.sqrt(self.largest):
            raise RefusedError(f"a scale moved into the map could overflow {self.name} where the original does not")

    def check(self, linear: LinearMap) -> None:
        """Refuse a combined map that may overflow where the original does not.

        Raises
        ------
        RefusedError
        """
        if linear.moved is None:
            return
        limit = math.sqrt(self.largest)
        if self.allows_shift(linear.moved) and find_magnitude(linear.weight) <= limit:
            return  # as in every ordinary network
        rows = np.abs(linear.weight.reshape(linear.geometry.out_channels, -1))
        several, grows = np.count_nonzero(rows, axis=1) > 1, rows.sum(axis=1) > 1
        if self.allows_shift(linear.moved[grows]) and rows[several].max(initial=0.0) <= limit:
            return
        raise RefusedError(f"the folded map could overflow {self.name} where the original does not")
