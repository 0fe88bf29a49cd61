"""Motifs that move, drop or restate positions and channels, and shape arithmetic."""

from __future__ import annotations

import math

from onnx import helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Positions(Operators):
    """Adds operators that move, drop or restate positions and channels."""

    def m_stride(self) -> None:
        x = self.tensor(4, 4, 3)
        y = self.conv(x, None, self.rng.choice([1, 3]), 1)
        if self.chance(0.7):
            y = self.activation(y)
        if self.chance(0.3):
            y = self.node("Add", [y, self.same_shape(y)])[0]
        if self.chance(0.6):
            self.conv(y, None, 1, 2, pads=[0] * 2 * (y.rank - 2))
        elif self.chance(0.5):
            self.node("MaxPool", [y], kernel_shape=[1] * (y.rank - 2), strides=[2] * (y.rank - 2))
        else:
            self.cut(y, range(2, y.rank), 2)

    def m_skip(self) -> None:
        """A stride beyond the kernel, for which SAME padding is negative: it crops."""
        x = self.tensor(3, 4)
        y = self.conv(x, None, 1, 1, pads=[0] * 2 * (x.rank - 2)) if self.chance(0.7) else self.affine(x)
        pad = self.rng.choice(["SAME_UPPER", "SAME_LOWER"])
        z = self.conv(y, None, self.rng.choice([1, 1, 2]), self.rng.choice([3, 4, 5]), auto_pad=pad)
        if self.chance(0.5):
            self.conv(z, None, 1, 1, pads=[0] * 2 * (x.rank - 2))

    def m_crop(self) -> None:
        x = self.tensor(4, 4, 3)
        y = self.conv(x, None, self.rng.choice([1, 3, 3]), self.rng.choice([1, 1, 2]))
        if self.chance(0.5):
            y = self.activation(y)
        if self.chance(0.3):
            y = self.pooling(y)
        self.cut(y, range(2, y.rank))

    def m_space(self) -> None:
        x = self.tensor(3, 4, 4, 5)
        if self.chance(0.5):
            self.rng.choice([self.pooling, self.pooling, self.pad])(self.conv(x, None, 1, 1))
        else:
            self.conv(self.rng.choice([self.upsample, self.upsample, self.pad, self.relayout])(x), None, 1, 1)

    def m_channels(self) -> None:
        x = self.tensor(3, 4)
        if x.shape[1] < 4:
            raise UnfitError("few channels")
        y = self.cut(self.pointwise(x, 8), [1]) if self.chance(0.5) else self.relayout(self.pointwise(x, 8))
        self.pointwise(y)

    def m_shuffle(self) -> None:
        x = self.tensor(4)
        n, c = x.shape[:2]
        if c % 2 or not c:
            raise UnfitError("not even")
        y = self.conv(x, c, 1, 1, pads=[0] * 4)
        wide = self.node("Reshape", [y, self.integers([n, 2, c // 2, *y.shape[2:]])])[0]
        back = self.node("Transpose", [wide], perm=[0, 2, 1, 3, 4])[0]
        self.conv(self.node("Reshape", [back, self.integers([n, c, *y.shape[2:]])])[0], None, 1)

    def m_shapes(self) -> None:
        """Shape arithmetic as exporters leave it."""
        x = self.tensor(3, 4)
        size, name = self.name("s"), self.name
        self.nodes.append(helper.make_node("Shape", [x.name], [size]))
        picks = [name("s") for _ in range(2)]
        for i, p in enumerate(picks):
            self.nodes.append(helper.make_node("Gather", [size, self.integers([i])], [p], axis=0))
        target = name("s")
        self.nodes.append(helper.make_node("Concat", [*picks, self.integers([-1])], [target], axis=0))
        y = Tensor(name(), (*x.shape[:2], math.prod(x.shape[2:])))
        if 0 in x.shape:
            raise UnfitError("-1 of nothing")
        self.nodes.append(helper.make_node("Reshape", [x.name, target], [y.name]))
        self.pool.append(y)
        if self.chance(0.6):
            self.affine(y)
