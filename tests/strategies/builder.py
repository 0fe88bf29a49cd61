"""A random graph: its tensors, constants and nodes, and the choices that make it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Tensors stay below this many elements.
LARGEST = 1 << 14
DTYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.DOUBLE: np.dtype(np.float64),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
OPSETS = (7, 9, 11, 13, 14, 17, 18, 20, 21)


class Tensor(NamedTuple):
    """A tensor of the graph; its type is that of the graph's floating-point numbers, or `code` if that is not 0."""

    name: str
    shape: tuple[int, ...]
    code: int = 0

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
    """A graph that grows motif by motif; every tensor's shape is what onnx infers.

    Attributes
    ----------
    pool : list of Tensor
        Floating-point tensors that later motifs may read.
    discrete : list of Tensor
        Integer and bool tensors, which only the motif that made them reads.
    results : list of ValueInfoProto
        Graph outputs that are not in the pool.
    """

    rng: Random
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    pool: list[Tensor] = field(default_factory=list)
    discrete: list[Tensor] = field(default_factory=list)
    results: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    declared: list[onnx.ValueInfoProto] = field(default_factory=list)
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
        self,
        op: str,
        inputs: Sequence[str | Tensor],
        outputs: int = 1,
        domain: str = "",
        codes: Sequence[int] = (),
        **attrs: Any,
    ) -> list[Tensor]:
        """Add a node; its outputs' shapes are inferred from its inputs' alone.

        Parameters
        ----------
        codes : sequence of int
            The outputs' types, if they are not all those of the graph's floating-point numbers (0).

        Raises
        ------
        UnfitError
            If onnx finds it wrong, or its size open.
        """
        codes = codes or [0] * outputs
        names = [i.name if isinstance(i, Tensor) else i for i in inputs]
        message = helper.make_node(op, names, [self.name() for _ in range(outputs)], domain=domain, **attrs)
        if self.chance(0.5):
            message.name = message.output[0] + op
        shapes = self.infer(message, codes)
        if any(math.prod(s) > LARGEST or len(s) > 6 for s in shapes):
            raise UnfitError(op)
        empty = any(0 in i.shape for i in inputs if isinstance(i, Tensor))
        if any(d < 0 or (d == 0 and not empty) for s in shapes for d in s):
            raise UnfitError(op)  # a window larger than what it slides over
        self.nodes.append(message)
        made = [Tensor(n, s, c) for n, s, c in zip(message.output, shapes, codes, strict=True)]
        self.pool += [t for t in made if not t.code]
        self.discrete += [t for t in made if t.code]
        return made

    def infer(self, message: onnx.NodeProto, codes: Sequence[int]) -> list[tuple[int, ...]]:
        known = {t.name: t for t in (*self.pool, *self.inputs, *self.discrete)}
        held = {t.name: t for t in self.constants}
        held |= {n.output[0]: n.attribute[0].t for n in self.nodes if n.op_type == "Constant"}
        inputs, tensors = [], []
        for name in dict.fromkeys(message.input):
            if name in known:
                inputs.append(helper.make_tensor_value_info(name, known[name].code or self.code, known[name].shape))
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
        for value, code in zip(inferred.graph.output, codes, strict=True):
            kind = value.type.tensor_type
            if (
                kind.elem_type != (code or self.code)
                or not all(d.HasField("dim_value") for d in kind.shape.dim)
                or not kind.HasField("shape")
            ):
                raise UnfitError(value.name)
            shapes.append(tuple(d.dim_value for d in kind.shape.dim))
        return shapes
