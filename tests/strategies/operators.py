"""Single operators with random attributes, weights and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from strategies.builder import Builder, Tensor, UnfitError

ACTIVATIONS = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "Elu",
    "Softplus",
    "HardSigmoid",
    "Abs",
    "Neg",
    "Identity",
    "Exp",
)


class Operators(Builder):
    """Adds single operators with random attributes and weights."""

    def conv(
        self, x: Tensor, out: int | None = None, kernel: int | None = None, stride: int | None = None, **attrs: Any
    ) -> Tensor:
        rank, inn = x.rank - 2, x.shape[1]
        if inn == 0 or rank < 1:
            raise UnfitError("no channels")
        out = out or self.rng.choice([2, 4, 6, 8, 12, 16, 24])
        kernel = kernel or self.rng.choice([1, 1, 1, 2, 3])
        stride = stride or self.rng.choice([1, 1, 1, 1, 2])
        group = self.rng.choice([1, 1, 1, 1, inn, 2])
        if inn % group or out % group:
            group = 1
        if group == inn and group > 1:
            out = inn * self.rng.choice([1, 1, 2])
        attrs = {"kernel_shape": [kernel] * rank} | attrs if self.chance(0.7) else attrs
        pads = self.rng.randrange(8)
        if kernel > 1 and "auto_pad" not in attrs and "pads" not in attrs:
            if pads < 4:
                attrs["pads"] = [kernel // 2] * 2 * rank
            elif pads < 5:
                attrs["auto_pad"] = self.rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
            elif pads < 6:
                attrs["pads"] = [self.rng.randrange(kernel) for _ in range(2 * rank)]
        elif pads == 0 and "auto_pad" not in attrs and "pads" not in attrs:
            attrs["pads"] = [1] * 2 * rank
        if stride > 1:
            attrs["strides"] = [stride] * rank
        if kernel > 1 and "auto_pad" not in attrs and self.chance(0.15):
            attrs["dilations"] = [2] * rank
        inputs: list[str | Tensor] = [x, self.constant(self.weights(out, inn // group, *[kernel] * rank))]
        if self.chance(0.5):
            inputs.append(self.constant(self.numbers.normal(size=out)))
        return self.node("Conv", inputs, group=group, **attrs)[0]

    def pointwise(self, x: Tensor, out: int | None = None) -> Tensor:
        """A 1×1 convolution, or a matrix product for what has no space."""
        if x.rank >= 3 and self.chance(0.85):
            return self.conv(x, out, 1, 1, pads=[0] * 2 * (x.rank - 2))
        return self.product(x, out)

    def product(self, x: Tensor, out: int | None = None) -> Tensor:
        out = out or self.rng.choice([2, 4, 6, 8, 12])
        if x.rank < 1 or 0 in x.shape:
            raise UnfitError("no matrix")
        if x.rank == 2 and self.chance(0.5):
            flip, turn = self.chance(0.5), self.chance(0.2)
            rows, inn = x.shape[::-1] if turn else x.shape
            w = self.weights(out, inn)
            inputs: list[str | Tensor] = [x, self.constant(w if flip else w.T)]
            bias = self.rng.choice([(out,), (1, out), (), (rows, out)])
            if self.opset < 11 or self.chance(0.6):
                inputs.append(self.constant(self.numbers.normal(size=bias)))
            extra = {"alpha": 0.5, "beta": 2.0} if self.chance(0.2) else {}
            extra |= {"transA": 1} if turn else {}
            return self.node("Gemm", inputs, transB=int(flip), **extra)[0]
        if x.rank >= 2 and self.chance(0.2):
            return self.node("MatMul", [self.constant(self.weights(out, x.shape[-2])), x])[0]
        y = self.node("MatMul", [x, self.constant(self.weights(out, x.shape[-1]).T)])[0]
        return (
            self.node("Add", self.swapped(y, self.constant(self.numbers.normal(size=out))))[0]
            if self.chance(0.5)
            else y
        )

    def swapped(self, a: str | Tensor, b: str | Tensor) -> list[str | Tensor]:
        return [a, b] if self.chance(0.6) else [b, a]

    def scalar_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shapes that broadcast: scalars of any rank, per channel, per position, full, and some that raise the rank."""
        channels = x.shape[1] if x.rank > 1 else 1
        space = (1,) * max(0, x.rank - 2)
        shapes = [(), (1,), (1,) * x.rank, (channels, *space), (1, channels, *space), (channels, *space)]
        if self.chance(0.2):
            shapes += [
                x.shape,
                x.shape[-1:],
                (1,) * (x.rank + 1),
                (2, *x.shape) if x.rank < 5 else (),
                (*x.shape[:-1], 1),
            ]
        return self.rng.choice(shapes)

    def affine(self, x: Tensor) -> Tensor:
        kind = self.rng.choice(
            ["Mul", "Add", "Sub", "Div", "Mul", "Add", "BatchNormalization", "BatchNormalization", "Neg"]
        )
        if kind == "Neg":
            return self.node("Neg", [x])[0]
        if kind == "BatchNormalization":
            if x.rank < 2:
                raise UnfitError("no channels")
            c = x.shape[1]
            values = [
                self.numbers.normal(size=c),
                self.numbers.normal(size=c),
                self.numbers.normal(size=c),
                self.numbers.random(c) + 0.5,
            ]
            if self.chance(0.15):
                values[0] *= self.numbers.random(c) < 0.5
            return self.node(kind, [x, *(self.constant(v, shared=i < 3) for i, v in enumerate(values))])[0]
        values = self.numbers.normal(size=self.scalar_shape(x)) + 0.1
        if kind == "Div" or self.chance(0.3):
            values = np.abs(values) + 0.5
        if self.chance(0.1):
            values = np.full_like(values, {"Mul": 1, "Div": 1}.get(kind, 0))
        return self.node(kind, self.swapped(x, self.constant(values)))[0]

    def activation(self, x: Tensor) -> Tensor:
        kind = self.rng.randrange(9)
        if kind < 5:
            op = self.rng.choice(ACTIVATIONS)
            if op == "Exp":
                x = self.node("Tanh", [x])[0]
            return self.node(op, [x])[0]
        one = [self.constant(v) for v in (3.0, 0.0, 6.0, 1.0)]
        if kind == 5:  # hard-swish and hard-sigmoid, in several spellings
            shifted = self.node("Add", self.swapped(x, one[0]))[0]
            if self.opset >= 11 and self.chance(0.5):
                bounded = self.node("Clip", [shifted, one[1], one[2]])[0]
            else:
                bounded = self.node("Min", self.swapped(self.node("Max", [shifted, one[1]])[0], one[2]))[0]
            if self.chance(0.5):
                return self.node("Mul", self.swapped(x, self.node("Div", [bounded, one[2]])[0]))[0]
            return self.node("Div", [self.node("Mul", self.swapped(x, bounded))[0], one[2]])[0]
        if kind == 6:
            return self.node("Mul", self.swapped(x, self.node("Sigmoid", [x])[0]))[0]
        if kind == 7:  # Gelu
            inner = self.node("Div", [x, self.constant(math.sqrt(2))])[0]
            risen = self.node("Add", self.swapped(self.node("Erf", [inner])[0], one[3]))[0]
            return self.node("Mul", self.swapped(self.node("Mul", self.swapped(x, risen))[0], self.constant(0.5)))[0]
        slope = self.constant(self.numbers.normal(size=(x.shape[1], *[1] * (x.rank - 2)) if x.rank > 1 else ()))
        return self.node("PRelu", [x, slope])[0]

    def pooling(self, x: Tensor) -> Tensor:
        rank, kind = x.rank - 2, self.rng.randrange(5)
        if rank < 1 or 0 in x.shape:
            raise UnfitError("no space")
        if kind == 0:
            return self.node(self.rng.choice(["GlobalAveragePool", "GlobalMaxPool"]), [x])[0]
        if kind == 1:
            return self.reduce(x, self.rng.choice([list(range(2, x.rank)), [1], [x.rank - 1]]))
        kernel, op = self.rng.choice([1, 2, 2, 3]), self.rng.choice(["AveragePool", "MaxPool"])
        attrs: dict[str, Any] = {"kernel_shape": [kernel] * rank, "strides": [self.rng.choice([1, 2])] * rank}
        if kernel > 1 and self.chance(0.4):
            attrs["pads"] = [kernel // 2] * 2 * rank
            if op == "AveragePool" and self.chance(0.5):
                attrs["count_include_pad"] = 1
        if self.opset >= 10 and self.chance(0.2):
            attrs["ceil_mode"] = 1
        return self.node(op, [x], **attrs)[0]

    def reduce(self, x: Tensor, axes: list[int]) -> Tensor:
        return self.over(self.rng.choice(["ReduceMean", "ReduceSum", "ReduceMax"]), x, axes, int(self.chance(0.8)))

    def over(self, op: str, x: Tensor, axes: list[int], keep: int = 1) -> Tensor:
        since = 13 if op == "ReduceSum" else 18
        if self.opset >= since:
            return self.node(op, [x, self.integers(axes)], keepdims=keep)[0]
        return self.node(op, [x], axes=axes, keepdims=keep)[0]

    def upsample(self, x: Tensor) -> Tensor:
        if x.rank < 3 or 0 in x.shape or self.opset < 11:
            raise UnfitError("no space")
        scales = [1.0, 1.0, *[self.rng.choice([2.0, 2.0, 1.0, 1.5, 1.3, 1.4])] * (x.rank - 2)]
        mode = self.rng.choice(["nearest", "nearest", "linear"])
        attrs: dict[str, Any] = {"mode": mode}
        if self.chance(0.4):
            attrs["coordinate_transformation_mode"] = self.rng.choice(
                ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"]
            )
        if mode == "nearest" and self.chance(0.5):
            attrs["nearest_mode"] = "floor"
        region = "" if self.opset >= 13 else self.constant([], np.dtype(np.float32))
        return self.node("Resize", [x, region, self.constant(scales, np.dtype(np.float32))], **attrs)[0]

    def pad(self, x: Tensor) -> Tensor:
        if x.rank < 3 or self.opset < 11:
            raise UnfitError("no space")
        mode = self.rng.choice(["constant", "constant", "edge", "reflect"])
        ends = [[0] * x.rank, [0] * x.rank]
        axes = [1] if self.chance(0.25) else range(2, x.rank)
        for end in ends:
            for axis in axes:
                end[axis] = self.rng.choice([0, 1, 1, 2])
        value = [self.constant(self.rng.choice([0.0, 0.0, 1.5]))] if mode == "constant" and self.chance(0.6) else []
        return self.node("Pad", [x, self.integers(ends[0] + ends[1]), *value], mode=mode)[0]

    def cut(self, x: Tensor, axes: Sequence[int], step: int = 1) -> Tensor:
        if self.opset < 10 or any(x.shape[a] < 2 for a in axes):
            raise UnfitError("nothing to cut")
        starts = [self.rng.randrange(x.shape[a] // 2) for a in axes]
        ends = [self.rng.choice([x.shape[a], (1 << 63) - 1, x.shape[a] - 1, -1]) for a in axes]
        if self.chance(0.1):
            starts = [0] * len(axes)
            ends = [(1 << 31) - 1] * len(axes)
        return self.node("Slice", [x, *(self.integers(list(v)) for v in (starts, ends, axes, [step] * len(axes)))])[0]

    def split(self, x: Tensor) -> list[Tensor]:
        axis = 1 if x.rank > 1 else 0
        if x.rank < 2 or x.shape[axis] % 2 or not x.shape[axis]:
            raise UnfitError("not even")
        half = x.shape[axis] // 2
        extra: dict[str, Any] = (
            {"num_outputs": 2} if self.opset >= 18 else {"split": [half, half]} if self.opset < 13 else {}
        )
        if self.opset >= 13 and self.chance(0.6):
            return self.node("Split", [x, self.integers([half, half])], 2, axis=axis)
        return self.node("Split", [x], 2, axis=axis, **extra)

    def relayout(self, x: Tensor) -> Tensor:
        kind = self.rng.randrange(9)
        if kind < 2 and x.rank > 1:
            perm = list(range(x.rank))
            if self.chance(0.8):
                self.rng.shuffle(perm)
            return self.node("Transpose", [x], perm=perm)[0]
        if kind == 2:
            return self.node("Flatten", [x], axis=self.rng.randrange(x.rank + 1))[0]
        if kind == 3 and x.rank > 2:
            target = [0, x.shape[1], -1] if self.chance(0.5) else [x.shape[0], -1]
            return self.node("Reshape", [x, self.integers(target)])[0]
        if kind == 4:
            axes = [self.rng.randrange(x.rank + 1)]
            return (
                self.node("Unsqueeze", [x, self.integers(axes)])[0]
                if self.opset >= 13
                else self.node("Unsqueeze", [x], axes=axes)[0]
            )
        if kind == 5 and 1 in x.shape:
            axes = [x.shape.index(1)]
            return (
                self.node("Squeeze", [x, self.integers(axes)])[0]
                if self.opset >= 13
                else self.node("Squeeze", [x], axes=axes)[0]
            )
        if kind == 6:
            return self.node(
                "Expand",
                [x, self.integers([self.rng.choice([1, d]) if d != 1 else self.rng.choice([1, 2]) for d in x.shape])],
            )[0]
        if kind == 7 and self.opset >= 13:
            return self.node("Tile", [x, self.integers([self.rng.choice([1, 1, 2]) for _ in x.shape])])[0]
        if x.rank > 1 and x.shape[1]:
            picks = [self.rng.randrange(x.shape[1]) for _ in range(self.rng.randrange(1, 9))]
            return self.node("Gather", [x, self.integers(picks if self.chance(0.8) else picks[0])], axis=1)[0]
        raise UnfitError("no layout")

    def same_shape(self, x: Tensor) -> Tensor:
        """Another tensor of the shape of `x`: one there is, a map of it, or a new input."""
        found = [t for t in self.pool if t.shape == x.shape and t is not x]
        if found and self.chance(0.5):
            return self.rng.choice(found)
        if x.rank >= 3 and self.chance(0.7):
            return self.pointwise(x, x.shape[1])
        return self.input(x.rank, x.shape) if self.chance(0.4) else self.activation(x)

    def dense(self, x: Tensor, out: int | None = None) -> Tensor:
        """A convolution of one group that keeps all positions; now and then with a stride."""
        if x.rank < 3 or not x.shape[1]:
            raise UnfitError("no channels")
        rank, out = x.rank - 2, out or self.rng.choice([3, 6, 8])
        kernel, stride = self.rng.choice([1, 1, 3]), 2 if self.chance(0.1) else 1
        inputs: list[str | Tensor] = [x, self.constant(self.weights(out, x.shape[1], *[kernel] * rank))]
        if self.chance(0.6):
            inputs.append(self.constant(self.numbers.normal(size=out)))
        return self.node("Conv", inputs, pads=[kernel // 2] * 2 * rank, strides=[stride] * rank)[0]

    def depthwise(self, x: Tensor, multiplier: int) -> Tensor:
        if x.rank < 3 or not x.shape[1]:
            raise UnfitError("no channels")
        rank, (c, out) = x.rank - 2, (x.shape[1], x.shape[1] * multiplier)
        inputs: list[str | Tensor] = [x, self.constant(self.weights(out, 1, *[3] * rank))]
        if self.chance(0.6):
            inputs.append(self.constant(self.numbers.normal(size=out)))
        return self.node("Conv", inputs, group=c, pads=[1] * 2 * rank)[0]
