"""Motifs with thresholds, where a rounding error may turn into a jump: comparisons, rounding, sorting, arg max."""

from __future__ import annotations

from onnx import TensorProto, helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Steps(Operators):
    """Adds operators that are not continuous, mostly behind a linear map."""

    def m_threshold(self) -> None:
        """A mask from a comparison, as a factor or as the condition of a Where."""
        x = self.mapped()
        condition = self.comparison(x)
        if self.chance(0.15):
            self.publish(condition)
        if self.opset >= 9 and self.chance(0.5):
            other = self.constant(self.rng.choice([0.0, -1.0, 4.0])) if self.chance(0.6) else self.same_shape(x)
            y = self.node("Where", [condition, *self.swapped(x, other)])[0]
        else:
            mask = self.node("Cast", [condition], to=self.code)[0]
            y = self.node("Mul", self.swapped(mask, self.same_shape(mask)))[0] if self.chance(0.5) else mask
        self.follow(y)

    def m_rounding(self) -> None:
        x = self.mapped()
        if self.chance(0.7):
            x = self.node("Mul", self.swapped(x, self.constant(self.rng.choice([2.0, 3.5, 10.0]))))[0]
        names = ["Floor", "Ceil", *(["Sign"] if self.opset >= 9 else []), *(["Round"] if self.opset >= 11 else [])]
        y = self.node(self.rng.choice(names), [x])[0]
        if self.chance(0.3):
            y = self.node("Sub", self.swapped(x, y))[0]
        self.follow(y)

    def m_top(self) -> None:
        """The largest values along an axis, and perhaps where they are; either output may be unused."""
        x = self.mapped()
        axis = self.rng.choice([1, x.rank - 1])
        if not x.shape[axis]:
            raise UnfitError("empty axis")
        k = self.rng.randrange(1, min(x.shape[axis], 4) + 1)
        inputs: list[str | Tensor] = [x, self.integers([k])] if self.opset >= 10 else [x]
        attrs = {} if self.opset >= 10 else {"k": k}
        if self.opset >= 11 and self.chance(0.3):
            attrs["largest"] = 0
        values, places = self.node("TopK", inputs, 2, axis=axis, codes=[0, TensorProto.INT64], **attrs)
        if self.chance(0.7):
            self.follow(values)
        else:
            self.pool.remove(values)
        if self.chance(0.5):
            self.indices(places)

    def m_best(self) -> None:
        """Where the largest or smallest value is."""
        x = self.mapped()
        attrs = {"axis": self.rng.choice([0, 1, x.rank - 1]), "keepdims": int(self.chance(0.6))}
        if self.opset >= 12 and self.chance(0.3):
            attrs["select_last_index"] = 1
        self.indices(self.node(self.rng.choice(["ArgMax", "ArgMin"]), [x], codes=[TensorProto.INT64], **attrs)[0])

    def mapped(self) -> Tensor:
        """A tensor, as a rule the result of a linear map."""
        x = self.tensor(2, 3, 4, 4)
        if 0 in x.shape:
            raise UnfitError("empty")
        kind = self.rng.randrange(5)
        if kind < 2:
            return self.pointwise(x)
        if kind == 2:
            return self.affine(self.pointwise(x))
        return self.affine(x) if kind == 3 else x

    def comparison(self, x: Tensor) -> Tensor:
        names = ["Greater", "Less", *(["GreaterOrEqual", "LessOrEqual"] if self.opset >= 12 else [])]
        if self.chance(0.7):
            limit: str | Tensor = self.constant(self.rng.choice([0.0, 0.5, -0.3, 1.0]))
        elif self.chance(0.5) and x.rank > 1:
            limit = self.constant(self.numbers.normal(size=(x.shape[1], *[1] * (x.rank - 2))))
        else:
            limit = self.same_shape(x)
        made = self.node(self.rng.choice(names), self.swapped(x, limit), codes=[TensorProto.BOOL])[0]
        if self.chance(0.2):
            made = self.node("Not", [made], codes=[TensorProto.BOOL])[0]
        return made

    def indices(self, places: Tensor) -> None:
        """Make integers a graph output, or floating-point numbers for what follows."""
        if self.chance(0.3):
            self.publish(places)
        else:
            self.follow(self.node("Cast", [places], to=self.code)[0])

    def publish(self, t: Tensor) -> None:
        if t.name not in {value.name for value in self.results}:
            self.results.append(helper.make_tensor_value_info(t.name, t.code, [None] * t.rank))

    def follow(self, y: Tensor) -> None:
        """Perhaps a map behind the step, so that a jump reaches several elements."""
        if y.rank >= 2 and self.chance(0.5):
            y = self.pointwise(y)
            if self.chance(0.4):
                self.affine(y)
