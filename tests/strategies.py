"""Random valid models over the operators that pwopt touches, aimed at every pass.

A `Random` decides everything: hypothesis's, which it can shrink, or a seeded one (benchmarks/fuzz.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

#: Tensors stay below this many elements.
LARGEST = 1 << 14
DTYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.DOUBLE: np.dtype(np.float64),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
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
OPSETS = (7, 9, 11, 13, 14, 17, 18, 20, 21)


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


class UnfitError(Exception):
    """What was drawn does not fit; the graph goes on without it."""


@dataclass(frozen=True)
class Sample:
    """A model, and feeds for it: at the sizes it was made for, and at others of its dynamic dimensions."""

    model: onnx.ModelProto
    feeds: tuple[dict[str, np.ndarray], ...]


@dataclass
class Builder:
    """A graph that grows motif by motif; every tensor's shape is what onnx infers."""

    rng: Random
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    pool: list[Tensor] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    count: int = 0

    def __post_init__(self) -> None:
        pick = self.rng.choice
        self.opset = pick(OPSETS) if self.chance(0.5) else 17
        self.code = pick(list(DTYPES)) if self.chance(0.35) else TensorProto.FLOAT
        if self.code == TensorProto.BFLOAT16:
            self.opset = max(self.opset, 18)
        self.dtype = DTYPES[self.code]
        self.numbers = np.random.default_rng(self.rng.randrange(1 << 32))
        self.dynamic = self.chance(0.3)

    # Choices

    def chance(self, p: float) -> bool:
        return self.rng.randrange(1000) < 1000 * p

    def name(self, base: str = "t") -> str:
        self.count += 1
        return f"{base}{self.count}"

    def tensor(self, *ranks: int) -> Tensor:
        """A tensor of one of these ranks, rather a late one; a new input if there is none."""
        found = [t for t in self.pool if t.rank in ranks] if ranks else self.pool
        if not found or self.chance(0.05):
            return self.input(self.rng.choice(ranks or (2, 3, 4, 5)))
        return found[-1] if self.chance(0.6) else self.rng.choice(found)

    def input(self, rank: int, shape: Sequence[int] | None = None) -> Tensor:
        if shape is None:
            space = self.rng.choice([(6,), (6, 5), (3, 4, 5)] if self.chance(0.9) else [(1,), (1, 1), (0, 4)])
            channels = self.rng.choice([4, 6, 8, 12, 16]) if self.chance(0.9) else self.rng.choice([1, 0, 2])
            shape = (self.rng.choice([1, 2, 2]), channels, *space)[:rank]
            shape = (*shape, *[4] * (rank - len(shape)))
        made = Tensor(self.name("x"), tuple(shape))
        self.inputs.append(made)
        self.pool.append(made)
        return made

    # Pieces

    def constant(self, values: Any, dtype: np.dtype[Any] | None = None, shared: bool = True) -> str:
        """An initializer, or now and then a Constant node, an Identity of one, or one shared with an earlier place."""
        values = np.asarray(values, self.dtype if dtype is None else dtype)
        for t in self.constants if shared else ():
            if (
                self.chance(0.05)
                and tuple(t.dims) == values.shape
                and t.data_type == helper.np_dtype_to_tensor_dtype(values.dtype)
            ):
                return str(t.name)
        name = self.name("c")
        if self.chance(0.1):
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, name)))
            return name
        self.constants.append(numpy_helper.from_array(values, name))
        if self.chance(0.05):
            self.nodes.append(helper.make_node("Identity", [name], [f"{name}_same"]))
            return f"{name}_same"
        return name

    def integers(self, values: Sequence[int] | int) -> str:
        name = self.name("i")
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def weights(self, out: int, inn: int, *kernel: int) -> np.ndarray:
        """Weights of a map: dense, or of low rank, or with dead, subnormal or equal rows and columns."""
        fan = max(1, inn * math.prod(kernel))
        w = self.numbers.normal(size=(out, inn, *kernel)) / math.sqrt(fan)
        kind = self.rng.randrange(10)
        if kind == 0 and min(out, inn) > 2 and math.prod(kernel) == 1:
            rank = 1 + min(out, inn) // 4
            left, right = self.numbers.integers(-2, 3, (out, rank)), self.numbers.integers(-2, 3, (rank, inn))
            w = (left @ right / 4.0).reshape(w.shape)
        elif kind == 1 and out and inn:
            w[self.numbers.random(out) < 0.5] = 0
            w[:, self.numbers.random(inn) < 0.3] = 0
        elif kind == 2 and self.dtype == np.float32:
            w[self.numbers.random(w.shape) < 0.3] *= 1e-39
        return w

    def node(
        self, op: str, inputs: Sequence[str | Tensor], outputs: int = 1, domain: str = "", **attrs: Any
    ) -> list[Tensor]:
        """Add a node; its outputs' shapes are inferred from its inputs' alone.

        Raises
        ------
        UnfitError
            If onnx finds it wrong, or its size open.
        """
        names = [i.name if isinstance(i, Tensor) else i for i in inputs]
        message = helper.make_node(op, names, [self.name() for _ in range(outputs)], domain=domain, **attrs)
        if self.chance(0.5):
            message.name = message.output[0] + op
        shapes = self.infer(message)
        if any(math.prod(s) > LARGEST or len(s) > 6 for s in shapes):
            raise UnfitError(op)
        empty = any(0 in i.shape for i in inputs if isinstance(i, Tensor))
        if any(d < 0 or (d == 0 and not empty) for s in shapes for d in s):
            raise UnfitError(op)  # a window larger than what it slides over
        self.nodes.append(message)
        made = [Tensor(n, s) for n, s in zip(message.output, shapes, strict=True)]
        self.pool += made
        return made

    def infer(self, message: onnx.NodeProto) -> list[tuple[int, ...]]:
        known = {t.name: t for t in (*self.pool, *self.inputs)}
        held = {t.name: t for t in self.constants}
        held |= {n.output[0]: n.attribute[0].t for n in self.nodes if n.op_type == "Constant"}
        inputs, tensors = [], []
        for name in dict.fromkeys(message.input):
            if name in known:
                inputs.append(helper.make_tensor_value_info(name, self.code, known[name].shape))
            elif name:
                tensor = TensorProto()
                tensor.CopyFrom(held[name.removesuffix("_same")])
                tensor.name = name
                tensors.append(tensor)
        outputs = [onnx.ValueInfoProto(name=n) for n in message.output]
        graph = helper.make_graph([message], "node", inputs, outputs, tensors)
        try:
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
        except Exception as error:
            raise UnfitError(str(error)) from error
        shapes = []
        for value in inferred.graph.output:
            kind = value.type.tensor_type
            if (
                kind.elem_type != self.code
                or not all(d.HasField("dim_value") for d in kind.shape.dim)
                or not kind.HasField("shape")
            ):
                raise UnfitError(value.name)
            shapes.append(tuple(d.dim_value for d in kind.shape.dim))
        return shapes

    # Operators

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
        elif pads == 0 and "pads" not in attrs:
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
        scales = [1.0, 1.0, *[self.rng.choice([2.0, 2.0, 1.0, 1.5])] * (x.rank - 2)]
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

    # Motifs, one or more for each pass

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

    def m_crop(self) -> None:
        x = self.tensor(4, 4, 3)
        y = self.conv(x, None, self.rng.choice([1, 3, 3]), self.rng.choice([1, 1, 2]))
        if self.chance(0.5):
            y = self.activation(y)
        if self.chance(0.3):
            y = self.pooling(y)
        self.cut(y, range(2, y.rank))

    def m_softmax(self) -> None:
        x = self.tensor(4)
        if self.chance(0.5):
            x = self.node("Transpose", [x], perm=self.rng.choice([[0, 2, 1, 3], [0, 3, 1, 2], [0, 1, 3, 2]]))[0]
        s = self.node("Softmax", [x], axis=1)[0]
        self.conv(s, self.rng.choice([1, 4]), 1, 1, pads=[0] * 4)

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

    def m_wide(self) -> None:
        """3×3 convolutions of many channels."""
        x = self.conv(self.tensor(4), 40, 1, 1, pads=[0] * 4)
        inputs: list[str | Tensor] = [x, self.constant(self.weights(self.rng.choice([40, 48]), 40, 3, 3))]
        if x.shape[1] != 40:
            raise UnfitError("depthwise")
        if self.chance(0.5):
            inputs.append(self.constant(self.numbers.normal(size=self.constants[-1].dims[0])))
        y = self.node("Conv", inputs, pads=[1] * 4)[0]
        if self.chance(0.5):
            y = self.rng.choice([self.activation, self.affine])(y)
        self.conv(y, 4, self.rng.choice([1, 3]))

    def m_space(self) -> None:
        x = self.tensor(3, 4, 4, 5)
        if self.chance(0.5):
            self.rng.choice([self.pooling, self.pooling, self.pad])(self.conv(x, None, 1, 1))
        else:
            self.conv(self.rng.choice([self.upsample, self.upsample, self.pad, self.relayout])(x), None, 1, 1)

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

    def m_channels(self) -> None:
        x = self.tensor(3, 4)
        if x.shape[1] < 4:
            raise UnfitError("few channels")
        y = self.cut(self.pointwise(x, 8), [1]) if self.chance(0.5) else self.relayout(self.pointwise(x, 8))
        self.pointwise(y)

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

    # Between sampling rates

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

    # What pwopt must leave alone

    def m_body(self) -> None:
        """If, Loop or Scan, whose bodies read a tensor and a constant of the outer graph."""
        x = self.tensor(2, 3, 4)
        info = helper.make_tensor_value_info
        captured = self.constant(self.numbers.normal())
        kind = self.rng.choice(["If", "Loop", "Scan"])
        out = self.name("b")
        if kind == "If":
            flag = self.name("c")
            self.constants.append(numpy_helper.from_array(np.array(self.chance(0.5)), flag))
            bodies = [
                helper.make_graph(
                    [helper.make_node(op, [x.name, captured], [f"{out}{op}"])],
                    op,
                    [],
                    [info(f"{out}{op}", self.code, None)],
                )
                for op in ("Add", "Mul")
            ]
            message = helper.make_node("If", [flag], [out], then_branch=bodies[0], else_branch=bodies[1])
            shape = x.shape
        elif kind == "Loop":
            names = [self.name("b") for _ in range(5)]
            nodes = [
                helper.make_node("Identity", [names[1]], [names[3]]),
                helper.make_node("Add", [names[2], x.name], [f"{names[4]}h"]),
                helper.make_node("Mul", [f"{names[4]}h", captured], [names[4]]),
            ]
            ends = [
                info(names[0], TensorProto.INT64, []),
                info(names[1], TensorProto.BOOL, []),
                info(names[2], self.code, None),
            ]
            body = helper.make_graph(
                nodes, "loop", ends, [info(names[3], TensorProto.BOOL, []), info(names[4], self.code, None)]
            )
            go = self.name("c")
            self.constants.append(numpy_helper.from_array(np.array(True), go))
            message = helper.make_node("Loop", [self.integers(2), go, x.name], [out], body=body)
            shape = x.shape
        else:
            names = [self.name("b") for _ in range(4)]
            nodes = [
                helper.make_node("Add", [names[0], names[1]], [names[2]]),
                helper.make_node("Mul", [names[2], captured], [names[3]]),
            ]
            inner = list(x.shape[1:])
            body = helper.make_graph(
                nodes, "scan", [info(names[0], self.code, inner), info(names[1], self.code, inner)],
                [info(names[2], self.code, inner), info(names[3], self.code, inner)],
            )  # fmt: skip
            if not x.shape[0]:
                raise UnfitError("nothing to scan")
            first = self.name("c")
            self.constants.append(numpy_helper.from_array(np.zeros(x.shape[1:], self.dtype), first))
            message = helper.make_node("Scan", [first, x.name], [self.name("b"), out], body=body, num_scan_inputs=1)
            shape = x.shape
        self.nodes.append(message)
        self.pool.append(Tensor(out, shape))

    def m_function(self) -> None:
        x = self.tensor()
        if not self.functions:
            body = [helper.make_node("Mul", ["a", "a"], ["h"]), helper.make_node("Relu", ["h"], ["b"])]
            self.functions.append(
                helper.make_function("local", "Conv", ["a"], ["b"], body, [helper.make_opsetid("", self.opset)])
            )
            self.domains.add("local")
        made = Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("Conv", [x.name], [made.name], domain="local"))
        self.pool.append(made)

    def m_quantised(self) -> None:
        """QuantizeLinear and DequantizeLinear of an input, whose rounding no rewrite can move; of a weight too."""
        if self.dtype != np.float32 or self.opset < 10:
            raise UnfitError("not float32")
        x = self.input(4)
        scale, zero = self.constant(0.05), self.name("z")
        self.constants.append(numpy_helper.from_array(np.uint8(128), zero))
        low, y = self.name("q"), Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("QuantizeLinear", [x.name, scale, zero], [low]))
        self.nodes.append(helper.make_node("DequantizeLinear", [low, scale, zero], [y.name]))
        self.pool.append(y)
        if x.shape[1] and self.chance(0.7):
            whole, w = self.name("w"), Tensor(self.name(), (4, x.shape[1], 1, 1))
            self.constants.append(numpy_helper.from_array(self.numbers.integers(-99, 99, w.shape, np.int8), whole))
            self.nodes.append(helper.make_node("DequantizeLinear", [whole, self.constant(0.01)], [w.name]))
            self.pool.append(w)
            self.node("Conv", [y, w])

    def m_foreign(self) -> None:
        """An operator of another domain, which onnxruntime has."""
        if self.dtype != np.float32:
            raise UnfitError("not float32")
        x = self.tensor()
        made = Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("QuickGelu", [x.name], [made.name], domain="com.microsoft"))
        self.domains.add("com.microsoft")
        self.pool.append(made)

    def m_override(self) -> None:
        """A weight that callers may override."""
        x = self.tensor(2)
        if not x.shape[1]:
            raise UnfitError("no channels")
        made = Tensor(self.name("w"), (x.shape[1], 4))
        self.inputs.append(made)
        self.constants.append(numpy_helper.from_array(self.weights(*made.shape).astype(self.dtype), made.name))
        self.affine(self.node("MatMul", [x, made])[0])

    # The whole

    def grow(self, motifs: int) -> None:
        names = sorted(n for n in dir(self) if n.startswith("m_"))
        seldom = {"m_body", "m_function", "m_quantised", "m_foreign", "m_override"}
        names = [n for n in names for _ in range(1 if n in seldom else 4)]
        self.input(self.rng.choice([4, 4, 4, 3, 2, 5]))
        for _ in range(motifs):
            state = len(self.nodes), len(self.constants), len(self.inputs), len(self.pool)
            try:
                getattr(self, self.rng.choice(names))()
            except UnfitError:
                if self.chance(0.5):  # half of what was begun stays
                    del (
                        self.nodes[state[0] :],
                        self.constants[state[1] :],
                        self.inputs[state[2] :],
                        self.pool[state[3] :],
                    )

    def sample(self) -> Sample:
        read = {name for node in self.nodes for name in node.input}
        made = [t for t in self.pool if t not in self.inputs]
        outputs = [t for t in made if t.name not in read] or self.pool[-1:]
        outputs += [t for t in made if t.name in read and self.chance(0.06)]
        held = {t.name for t in self.constants}
        free = [t for t in self.inputs if t.name in read or t in outputs]
        names = {d: f"D{d}" for t in free for d in t.shape if d and t.name not in held} if self.dynamic else {}
        axes = {(t.name, a) for t in free for a in range(t.rank) if a != 1 and self.chance(0.7)}

        def declared(t: Tensor) -> list[int | str]:
            return [names.get(d, d) if (t.name, a) in axes else d for a, d in enumerate(t.shape)]

        def feeds(grow: int, seed: int) -> dict[str, np.ndarray]:
            numbers = np.random.default_rng(seed)
            sizes = {
                t.name: [d + grow if isinstance(n, str) else d for d, n in zip(t.shape, declared(t), strict=True)]
                for t in free
            }
            return {
                t.name: numbers.normal(size=sizes[t.name]).astype(self.dtype)
                for t in free
                if t.name not in held or seed
            }

        graph = helper.make_graph(
            self.nodes, "random",
            [helper.make_tensor_value_info(t.name, self.code, declared(t)) for t in free],
            [helper.make_tensor_value_info(t.name, self.code, [None] * t.rank) for t in dict.fromkeys(outputs)],
            [t for t in self.constants if t.name in read or t.name in self.captured()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=8 if self.opset < 20 else 10, functions=self.functions
        )
        return Sample(model, (feeds(0, 0), feeds(0, 1), feeds(3, 2)) if names else (feeds(0, 0), feeds(0, 1)))

    def captured(self) -> set[str]:
        bodies = [a.g for node in self.nodes for a in node.attribute if a.HasField("g")]
        return {name for body in bodies for inner in body.node for name in inner.input}


def random_sample(rng: Random, motifs: int = 6) -> Sample:
    """A model of a few motifs, decided by `rng`."""
    builder = Builder(rng)
    builder.grow(1 + rng.randrange(motifs))
    return builder.sample()


@st.composite
def samples(draw: st.DrawFn, motifs: int = 4) -> Sample:
    """Models that hypothesis chooses and shrinks."""
    return random_sample(draw(st.randoms(use_true_random=False)), motifs)
