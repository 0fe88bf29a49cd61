"""Motifs of what exporters write in many ways: rearranged channels, products of matrices, constants, Casts."""

from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Canonical(Operators):
    """Adds spellings that have a canonical form."""

    def m_rearranged(self) -> None:
        """Parts of one tensor that are joined in another order, and repeated channels, before a convolution."""
        x = self.tensor(3, 4, 4)
        if self.chance(0.4):
            x = self.conv(x, 1, 1)
            kind = self.rng.choice(["Concat", "Tile", "Expand"])
            repeats, wide = [1, 3, *[1] * (x.rank - 2)], [x.shape[0], 3, *x.shape[2:]]
            if kind == "Concat":
                y = self.node("Concat", [x, x, x], axis=1)[0]
            else:
                y = self.node(kind, [x, self.integers(repeats if kind == "Tile" else wide)])[0]
        else:
            parts = self.split(x)
            self.rng.shuffle(parts)
            y = self.node("Concat", parts, axis=1)[0]
        self.conv(self.activation(y) if self.chance(0.2) else y)

    def m_matrices(self) -> None:
        """Products of two computed matrices, with an addition and transpositions around them."""
        x = self.tensor(2)
        a, b = self.product(x), self.product(x)
        if self.chance(0.5):
            a = self.node("Transpose", [a], perm=[1, 0])[0]
        else:
            b = self.node("Transpose", [b], perm=[1, 0])[0]
        y = self.node("MatMul", [a, b])[0]
        if self.chance(0.6):
            rows, columns = y.shape
            shape = self.rng.choice([(columns,), (rows, 1), (1, columns), (rows, columns), ()])
            y = self.node("Add", self.swapped(y, self.constant(self.numbers.normal(size=shape))))[0]
        if self.chance(0.4):
            self.node("Transpose", [y], perm=[1, 0])

    def m_layer_norm(self) -> None:
        """A LayerNormalization, and a scale and shift behind it."""
        x = self.tensor(2, 3, 4)
        width = x.shape[-1]
        if self.opset < 17 or width < 2:
            raise UnfitError("no LayerNormalization")
        inputs = [self.constant(self.numbers.normal(size=width)) for _ in range(self.rng.choice([1, 2]))]
        y = self.node("LayerNormalization", [x, *inputs], axis=-1)[0]
        for op in self.rng.choice([("Mul",), ("Mul", "Add"), ("Add", "Mul"), ("Div",)]):
            y = self.node(op, [y, self.constant(self.numbers.normal(size=self.rng.choice([(), (width,)])) + 2.0)])[0]
        self.rng.choice([self.activation, self.product])(y)

    def m_constants(self) -> None:
        """A position encoding: operators on constants, added to a tensor."""
        x = self.tensor(3, 4)
        encoding = self.constant(self.numbers.normal(size=x.shape[1:]), shared=False)
        if self.opset >= 11:
            encoding = self.node("CumSum", [encoding, self.integers(0)])[0]
        for op in self.rng.sample(["Sin", "Cos", "Tanh", "Sigmoid", "Softplus"], 2):
            encoding = self.node(op, [encoding])[0]
        self.node("Add", self.swapped(x, encoding))

    def m_equal_terms(self) -> None:
        """A sum of equal terms, beside a convolution or alone."""
        x = self.tensor(3, 4)
        if self.chance(0.4):
            x = self.conv(x)
        op, count = self.rng.choice([("Add", 2), ("Sum", 2), ("Sum", 3), ("Sum", 5)])
        y = self.node(op, [x] * count)[0]
        if self.chance(0.5):
            self.conv(y)

    def m_sparse(self) -> None:
        """A Constant that stores few of its numbers, added to a tensor."""
        x = self.tensor(2, 3, 4)
        if self.opset < 11 or not x.shape[-1]:
            raise UnfitError("no sparse tensors")
        width = x.shape[-1]
        places = sorted(self.rng.sample(range(width), self.rng.randrange(1, width + 1)))
        numbers = self.numbers.normal(size=len(places)).astype(self.dtype)
        values = numpy_helper.from_array(numbers, self.name("v"))
        held = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places), self.name("i")), [width])
        row = Tensor(self.name(), (width,))
        self.nodes.append(helper.make_node("Constant", [], [row.name], sparse_value=held))
        self.pool.append(row)
        self.node("Add", self.swapped(x, self.node("Neg", [row])[0] if self.chance(0.5) else row))

    def m_casts(self) -> None:
        """Casts there and back, of which the first loses nothing, or rounds."""
        x = self.tensor(2, 3, 4)
        wide = self.node("Cast", [x], codes=[11], to=11)[0] if self.dtype != np.float64 else x
        back = self.node("Cast", [wide], to=self.code)[0]
        self.affine(back)
