"""Motifs with parallel branches: sums, concatenations, splits, gates and residual blocks."""

from __future__ import annotations

from strategies.operators import Operators


class Branches(Operators):
    """Adds parallel branches."""

    def m_branches(self) -> None:
        x = self.tensor(3, 4, 4)
        c = x.shape[1] if self.chance(0.7) else 8
        parts = [self.conv(x, c, 3, 1, pads=[1] * 2 * (x.rank - 2)), self.conv(x, c, 1, 1, pads=[0] * 2 * (x.rank - 2))]
        if c == x.shape[1] and self.chance(0.6):
            parts.append(self.affine(x) if self.chance(0.5) else x)
        parts = [self.affine(p) if self.chance(0.3) else p for p in parts]
        self.rng.shuffle(parts)
        if self.opset >= 8 and self.chance(0.2):
            self.node("Sum", parts)
            return
        total = parts[0]
        for p in parts[1:]:
            total = self.node("Add", [total, p])[0]

    def m_siblings(self) -> None:
        x = self.tensor(2, 3, 4)
        parts = [self.pointwise(x) for _ in range(self.rng.choice([2, 2, 3]))]
        if self.chance(0.5):
            op = self.rng.choice(["Relu", "Sigmoid", "Tanh"])
            parts = [self.node(op, [p])[0] for p in parts]
        if self.chance(0.5):
            self.node("Concat", parts, axis=1 if x.rank > 2 or self.chance(0.5) else -1)

    def m_concat(self) -> None:
        x = self.tensor(3, 4)
        y = self.same_shape(x)
        if self.chance(0.4) and min(x.shape[2:]) >= 2 and self.opset >= 11:
            x, y = self.upsample(self.pooling(x)), y
        z = self.node("Concat", [x, y] if self.chance(0.8) else [x, y, x], axis=1)[0]
        self.conv(self.affine(z) if self.chance(0.2) else z, None, 1)

    def m_sum(self) -> None:
        x = self.tensor(2, 3, 4)
        y, out = self.same_shape(x), self.rng.choice([4, 8])
        self.node("Add", [self.pointwise(x, out), self.pointwise(y, out)])

    def m_gate(self) -> None:
        x = self.tensor(4, 4, 3)
        g = self.node("GlobalAveragePool", [x])[0] if self.chance(0.7) else self.reduce(x, list(range(2, x.rank)))
        if self.chance(0.7):
            g = self.conv(
                self.node("Relu", [self.conv(g, 4, 1, 1, pads=[0] * 2 * (x.rank - 2))])[0],
                x.shape[1],
                1,
                1,
                pads=[0] * 2 * (x.rank - 2),
            )
        gated = self.node("Mul", self.swapped(x, self.node(self.rng.choice(["Sigmoid", "HardSigmoid"]), [g])[0]))[0]
        if self.chance(0.6):
            self.node("Add", self.swapped(x, gated))

    def m_split(self) -> None:
        x = self.tensor(2, 3, 4)
        a, b = self.split(self.pointwise(x, 8))
        if self.chance(0.5):
            self.node("Mul", [a, self.node("Sigmoid", [b])[0]])
        elif self.chance(0.5):
            self.node("Concat", self.swapped(a, b), axis=1)

    def m_merge(self) -> None:
        x = self.tensor()
        self.node(self.rng.choice(["Add", "Mul", "Sub", "Max"]), [x, self.same_shape(x)])

    def m_widths(self) -> None:
        """An inverted residual of odd widths: expansion, depthwise filters, squeeze-and-excitation, projection."""
        x = self.tensor(4)
        wide = self.rng.choice([17, 18, 21, 27, 30])
        y = self.dense(x, wide)
        if self.chance(0.3):
            y = self.affine(y)
        y = self.activation(y) if self.chance(0.7) else y
        if self.chance(0.6):
            y = self.depthwise(y, 1)
        if self.chance(0.2):
            y = self.rng.choice([self.pooling, self.upsample, self.pad, self.relayout])(y)
        if self.chance(0.6):
            g = self.node("GlobalAveragePool", [y])[0] if self.chance(0.5) else self.reduce(y, [2, 3])
            if g.rank == 2:
                squeezed = self.product(g, y.shape[1]) if self.chance(0.5) else g
                g = self.node("Reshape", [squeezed, self.integers([-1, y.shape[1], 1, 1])])[0]
            elif self.chance(0.8):
                g = self.dense(self.activation(self.dense(g, self.rng.choice([3, 4]))), y.shape[1])
            op = self.rng.choice(["Sigmoid", "HardSigmoid", "Tanh"])
            y = self.node(self.rng.choice(["Mul", "Mul", "Add"]), self.swapped(y, self.node(op, [g])[0]))[0]
        if self.chance(0.3):
            other = self.dense(x, y.shape[1])
            y = self.node(self.rng.choice(["Add", "Sub", "Mul"]), self.swapped(y, other))[0]
        y = self.dense(y, x.shape[1] if self.chance(0.5) else self.rng.choice([5, 18]))
        if y.shape == x.shape:
            self.node("Add", self.swapped(x, y))

    def m_stages(self) -> None:
        """A block of a cross-stage partial network: a map's result is split, worked on and joined again."""
        x = self.tensor(4)
        sizes = self.rng.choice([[7, 11], [9, 9], [4, 4], [3, 8, 7]])
        y = self.dense(x, sum(sizes))
        y = self.activation(y) if self.chance(0.7) else y
        y = self.affine(y) if self.chance(0.15) else y
        axis = self.rng.choice([1, 1, -3])
        if self.opset < 13:
            parts = self.node("Split", [y], len(sizes), axis=axis, split=sizes)
        else:
            parts = self.node("Split", [y, self.integers(sizes)], len(sizes), axis=axis)
        joined = [parts[0]] if self.chance(0.7) else []
        joined.append(self.activation(self.dense(parts[1], self.rng.choice([5, parts[1].shape[1]]))))
        if joined[-1].shape == parts[1].shape and self.chance(0.6):
            joined.append(self.node("Add", self.swapped(parts[1], joined[-1]))[0])
        joined += parts[2:] if self.chance(0.7) else []
        z = self.node("Concat", joined, axis=1)[0]
        z = self.pooling(z) if self.chance(0.3) else z
        if z.rank == 4:
            self.dense(z, 6)
