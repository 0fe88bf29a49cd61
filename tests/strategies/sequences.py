"""Motifs of linear maps, scales and activations one after another."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Sequences(Operators):
    """Adds linear maps, scales and activations one after another."""

    def m_operator(self) -> None:
        x = self.tensor()
        self.rng.choice(
            [self.affine, self.activation, self.pooling, self.relayout, self.pad, self.upsample, self.product]
        )(x)

    def m_activation(self) -> None:
        self.activation(self.activation(self.tensor()))

    def m_chain(self) -> None:
        x = self.tensor(3, 4, 4, 5, 2)
        for _ in range(self.rng.choice([2, 2, 3, 4])):
            x = self.pointwise(x) if self.chance(0.8) else self.conv(x)
            if self.chance(0.2):
                x = self.affine(x)

    def m_affine(self) -> None:
        x = self.tensor(2, 3, 4, 4, 4, 5)
        before = self.chance(0.5)
        if before:
            x = self.affine(x)
        between: list[Callable[[Tensor], Tensor]] = [
            self.pooling,
            self.upsample,
            self.relayout,
            self.activation,
            self.pad,
        ]
        if self.chance(0.3):
            x = self.rng.choice(between)(x)
        x = self.conv(x) if x.rank > 2 else self.product(x)
        if not before or self.chance(0.5):
            if self.chance(0.3):
                x = self.rng.choice(between)(x)
            self.affine(x)

    def m_mask(self) -> None:
        """s·(a − m) of numbers m up to 3 that are as a rule whole, for an s that is large or the largest of the type."""
        x = self.tensor(3, 4)
        wide = self.node("Mul", self.swapped(self.node("Sigmoid", [x])[0], self.constant(3.0)))[0]
        whole = self.node("Round", [wide])[0] if self.opset >= 11 else self.node("Floor", [wide])[0]
        flipped = self.node("Sub", [self.constant(self.rng.choice([1.0, 2.0, 1.5])), whole])[0]
        largest = float(ml_dtypes.finfo(self.dtype).max)
        scale = -self.rng.choice([1e4, largest / 2.1, largest / 4, largest / 100])
        mask = self.node("Mul", self.swapped(flipped, self.constant(scale)))[0]
        if self.chance(0.3):
            mask = self.node("Mul", self.swapped(mask, self.constant(0.5)))[0]
        small = self.node("Tanh", [x])[0]
        self.node("Softmax", [self.node("Add", self.swapped(small, mask))[0]], axis=x.rank - 1)

    def m_transposed(self) -> None:
        x = self.tensor(3, 4)
        if not x.shape[1]:
            raise UnfitError("no channels")
        rank, out = x.rank - 2, self.rng.choice([2, 4, 8])
        if self.chance(0.5):
            x = self.affine(x)
        w = self.weights(x.shape[1], out, *[2] * rank)
        y = self.node("ConvTranspose", [x, self.constant(w)], strides=[self.rng.choice([1, 2])] * rank)[0]
        self.affine(y) if self.chance(0.5) else self.pointwise(y)

    def m_lines(self) -> None:
        """1-D and 3-D convolutions in a row."""
        x = self.tensor(3, 5)
        for _ in range(3):
            x = self.conv(x)
            if self.chance(0.6):
                x = self.activation(x)

    def m_single(self) -> None:
        """1×1 maps of single positions."""
        x = self.tensor(4)
        x = self.node("GlobalAveragePool", [x])[0]
        for _ in range(self.rng.choice([1, 2])):
            x = self.activation(self.conv(x, None, 1, 1, pads=[0] * 4))

    def m_wide(self) -> None:
        """3×3 convolutions of many channels."""
        x = self.conv(self.tensor(4), 40, 1, 1, pads=[0] * 4)
        out = self.rng.choice([40, 48])
        inputs: list[str | Tensor] = [x, self.constant(self.weights(out, 40, 3, 3))]
        if x.shape[1] != 40:
            raise UnfitError("depthwise")
        if self.chance(0.5):
            inputs.append(self.constant(self.numbers.normal(size=out)))
        y = self.node("Conv", inputs, pads=[1] * 4)[0]
        if self.chance(0.5):
            y = self.rng.choice([self.activation, self.affine])(y)
        self.conv(y, 4, self.rng.choice([1, 3]))

    def m_dead(self) -> None:
        """A map with dead filters, what follows channels, and a map that reads them."""
        x = self.tensor(3, 4, 4)
        if not x.shape[1]:
            raise UnfitError("no channels")
        w = self.weights(16, x.shape[1], *[1] * (x.rank - 2))
        w[self.numbers.random(16) < 0.6] = 0
        inputs: list[str | Tensor] = [x, self.constant(w)]
        if self.chance(0.6):
            inputs.append(self.constant(self.numbers.normal(size=16)))
        y = self.node("Conv", inputs)[0]
        for _ in range(self.rng.randrange(3)):
            y = self.rng.choice([self.activation, self.affine, self.pooling])(y)
        if self.chance(0.2):
            y = self.node("Concat", self.swapped(y, self.same_shape(y)), axis=1)[0]
        self.conv(y, None, self.rng.choice([1, 3]))

    def m_multiplier(self) -> None:
        """Depthwise filters, several for each channel, on the way to a map."""
        x = self.tensor(3, 4, 4)
        y = self.depthwise(x, self.rng.choice([2, 2, 3]))
        for _ in range(self.rng.randrange(3)):
            y = self.rng.choice([self.activation, self.affine, self.pooling])(y)
        if self.chance(0.3):
            y = self.depthwise(y, 1)
        if self.chance(0.3):
            y = self.node("Add", self.swapped(y, self.dense(y, y.shape[1])))[0]
        elif self.chance(0.3):
            y = self.node("Concat", self.swapped(y, self.dense(y, 5)), axis=1)[0]
        self.dense(y)

    def m_last(self) -> None:
        """Matrix products between Transposes."""
        x = self.tensor(4)
        y = self.node("Transpose", [x], perm=[0, 2, 3, 1])[0]
        for _ in range(self.rng.choice([1, 2, 2])):
            y = self.product(y)
            y = self.activation(y) if self.chance(0.5) else y
        self.node("Transpose", [y], perm=[0, 3, 1, 2])

    def m_gram(self) -> None:
        """A Gram matrix of a map, whose weights are well-conditioned."""
        x = self.tensor(3, 4, 4)
        n = x.shape[1]
        if not 0 < n <= 16:
            raise UnfitError("channels")
        m = n + self.rng.choice([0, 0, 1, 3])
        w, _ = np.linalg.qr(self.numbers.normal(size=(m, n)))
        w *= self.numbers.uniform(0.5, 2, size=(m, 1))
        if x.rank == 3 and self.chance(0.5):
            y = self.node("MatMul", [self.constant(w), x])[0]
        else:
            y = self.node("Conv", [x, self.constant(w.reshape(m, n, *[1] * (x.rank - 2)))])[0]
        if x.rank == 4:
            target = self.rng.choice([[0, 0, -1], [0, m, -1], [x.shape[0], m, math.prod(x.shape[2:])]])
            y = self.node("Reshape", [y, self.integers(target)])[0]
        self.node("MatMul", [y, self.node("Transpose", [y], perm=[0, 2, 1])[0]])

    def m_norm(self) -> None:
        """A normalisation over channels: to length one, or to mean zero and variance one."""
        x = self.tensor(4, 4, 3)
        if not x.shape[1]:
            raise UnfitError("no channels")
        if self.chance(0.5):
            x = self.activation(x)
        two, small, axes = self.constant(2.0), self.constant(0.1), [1]
        if self.chance(0.3):
            square = self.node("Mul", [x, x])[0]
            total = self.over(self.rng.choice(["ReduceSum", "ReduceMean"]), square, axes)
            y = self.node("Div", [x, self.node("Sqrt", [self.node("Add", [total, small])[0]])[0]])[0]
        else:
            centred = self.node("Sub", [x, self.over("ReduceMean", x, axes)])[0]
            variance = self.over("ReduceMean", self.node("Pow", [centred, two])[0], axes)
            y = self.node("Div", [centred, self.node("Sqrt", [self.node("Add", [variance, small])[0]])[0]])[0]
            for op in ("Mul", "Add"):
                weight = self.constant(self.numbers.normal(size=(x.shape[1], *[1] * (x.rank - 2))))
                y = self.node(op, self.swapped(y, weight))[0]
        for _ in range(self.rng.randrange(3)):
            y = self.rng.choice([self.activation, self.affine, lambda t: self.conv(t, None, 1, 1)])(y)
        if self.chance(0.3):
            self.node("Add", [y, self.same_shape(y)])

    def m_softmax(self) -> None:
        x = self.tensor(4)
        if self.chance(0.5):
            x = self.node("Transpose", [x], perm=self.rng.choice([[0, 2, 1, 3], [0, 3, 1, 2], [0, 1, 3, 2]]))[0]
        s = self.node("Softmax", [x], axis=1)[0]
        self.conv(s, self.rng.choice([1, 4]), 1, 1, pads=[0] * 4)
