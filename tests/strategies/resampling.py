"""Motifs between sampling rates: repeated positions, blocks of positions, windows and videos."""

from __future__ import annotations

from typing import Any

import numpy as np

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Resampling(Operators):
    """Adds changes of sampling rate."""

    def repeated(self, x: Tensor) -> Tensor:
        """Positions repeated, by factors that may differ per axis, in the words of an exporter."""
        if x.rank < 3 or 0 in x.shape:
            raise UnfitError("no space")
        scales = [1.0, 1.0, *(self.rng.choice([2.0, 2.0, 3.0, 1.0]) for _ in x.shape[2:])]
        if self.opset < 9:
            return self.node("Upsample", [x], mode="nearest", scales=scales)[0]
        held = self.constant(scales, np.dtype(np.float32))
        if self.opset < 11:
            return self.node("Upsample" if self.opset < 10 else "Resize", [x, held], mode="nearest")[0]
        told = self.rng.choice([{}, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}])
        region = "" if self.opset >= 13 else self.constant([], np.dtype(np.float32))
        return self.node("Resize", [x, region, held], mode="nearest", **told)[0]

    def m_enlarged(self) -> None:
        """A step of a decoder: positions repeated, perhaps joined with others, and a convolution; or nearly that."""
        x = self.tensor(3, 4, 4, 4, 5)
        y = self.upsample(x) if self.chance(0.15) else self.repeated(x)  # which may interpolate
        if self.chance(0.3):
            y = self.activation(y)
        if self.chance(0.15):
            y = self.rng.choice(
                [self.pooling, lambda t: self.cut(t, range(2, t.rank)), lambda t: self.conv(t, 4, 1, 2)]
            )(y)
        other = (
            self.input(y.rank, (y.shape[0], self.rng.choice([3, y.shape[1]]), *y.shape[2:])) if self.chance(0.5) else y
        )
        if other is not y and other.shape == y.shape and self.chance(0.5):
            y = self.node("Add", self.swapped(y, other))[0]
        elif other is not y:
            y = self.node("Concat", self.swapped(y, other), axis=1)[0]
        if self.chance(0.3):
            y = self.node(self.rng.choice(["Relu", "Tanh", "LeakyRelu"]), [y])[0]
        z = self.conv(y, None, self.rng.choice([2, 2, 3, 3]), self.rng.choice([1, 1, 1, 2]))
        if self.chance(0.5):
            z = self.activation(z)
        if self.chance(0.15):
            self.activation(y)  # a second reader

    def m_focus(self) -> None:
        """Blocks of positions side by side as channels, and a convolution; or nearly that."""
        n, c, rank = self.rng.choice([1, 2]), self.rng.choice([1, 3, 4]), self.rng.choice([1, 2, 2, 2])
        space = [2 * self.rng.choice([2, 3, 4]) for _ in range(rank)]
        x = self.input(2 + rank, (n, c, *space))
        x = self.activation(x) if self.chance(0.3) else x
        kind = self.rng.randrange(4) if rank == 2 else 3
        if kind == 0:
            y = self.node("SpaceToDepth", [x], blocksize=2)[0]
        elif kind == 1:
            h, w = (d // 2 for d in space)
            wide = self.node("Reshape", [x, self.integers([n, c, h, 2, w, 2])])[0]
            perm = self.rng.choice([[0, 1, 3, 5, 2, 4], [0, 3, 5, 1, 2, 4], [0, 1, 5, 3, 2, 4]])
            turned = self.node("Transpose", [wide], perm=perm)[0]
            y = self.node("Reshape", [turned, self.integers([n, 4 * c, h, w])])[0]
        else:
            y = self.node("Concat", self.blocks(x), axis=1)[0]
        self.conv(y, None, self.rng.choice([1, 2, 3, 3]))

    def blocks(self, x: Tensor) -> list[Tensor]:
        """Every other position by Slices, from different ones on: of all axes at once, or of one after the other."""
        if self.opset < 10:
            raise UnfitError("no steps")
        axes, size, apart = list(range(2, x.rank)), x.rank - 2, self.chance(0.5)
        places = [[(i >> a) & 1 for a in range(size)] for i in range(2**size)]
        self.rng.shuffle(places)
        places = places[: self.rng.choice([2, len(places), len(places)])]
        found = []
        for place in places:
            y = x
            for chosen in [[a] for a in axes] if apart else [axes]:
                end = (1 << 31) - 1 if self.chance(0.9) else -1
                parts = [[place[a - 2] for a in chosen], [end] * len(chosen), chosen, [2] * len(chosen)]
                y = self.node("Slice", [y, *(self.integers(v) for v in parts)])[0]
            found.append(y)
        if self.chance(0.15):
            self.activation(found[0])  # a second reader
        return found

    def m_video(self) -> None:
        """A block of a network for videos: convolutions over time and space, and what treats frames alike around."""
        x = self.input(5, (self.rng.choice([1, 1, 1, 2]), self.rng.choice([4, 6]), 3, 4, 5))
        y = self.activation(self.conv(x, None, 1, 1)) if self.chance(0.5) else x
        y = self.depthwise(y, 1) if self.chance(0.5) else self.conv(y, None, 3)
        for _ in range(self.rng.randrange(3)):
            y = self.rng.choice([self.activation, self.affine, self.pooling, self.conv])(y)
        if y.shape == x.shape and self.chance(0.5):
            self.node("Add", self.swapped(x, y))

    def m_spread(self) -> None:
        """Windows side by side: transposed convolutions whose kernel is their stride, and pixel shuffles, in a row."""
        x = self.tensor(3, 4, 4)
        for _ in range(self.rng.choice([1, 2, 2])):
            x = self.shuffled(x) if x.rank == 4 and self.chance(0.4) else self.windows(x)
            x = self.activation(x) if self.chance(0.5) else x
            x = self.pointwise(x) if self.chance(0.3) else x

    def windows(self, x: Tensor) -> Tensor:
        if x.rank < 3 or not x.shape[1]:
            raise UnfitError("no channels")
        kernel = [self.rng.choice([2, 2, 1, 3]) for _ in x.shape[2:]]
        strides = kernel if self.chance(0.9) else [max(1, k - 1) for k in kernel]
        group = 2 if self.chance(0.1) and x.shape[1] % 2 == 0 else 1
        extra: dict[str, Any] = {"pads": [0, 1] * len(kernel)} if self.chance(0.05) else {}
        out = self.rng.choice([1, 2, 4])
        inputs: list[str | Tensor] = [x, self.constant(self.weights(x.shape[1], out, *kernel))]
        if self.chance(0.5):
            inputs.append(self.constant(self.numbers.normal(size=group * out)))
        return self.node("ConvTranspose", inputs, strides=strides, group=group, **extra)[0]

    def shuffled(self, x: Tensor) -> Tensor:
        y = self.conv(x, 4 * self.rng.choice([1, 2, 3]), self.rng.choice([1, 3]), 1)
        y = self.activation(y) if self.chance(0.3) else y
        mode = {"mode": self.rng.choice(["DCR", "CRD"])} if self.opset >= 11 else {}
        if y.shape[1] % 4:
            raise UnfitError("not so many channels")
        return self.node("DepthToSpace", [y], blocksize=2, **mode)[0]
