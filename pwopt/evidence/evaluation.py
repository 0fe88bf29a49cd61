"""Operators in float64, one tensor at a time, straight from their definitions.

Independent of `pwopt.algebra`, which made what is checked here: a convolution is a sum over its taps, everything that
is not spelled out is onnx's reference evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from pwopt.algebra import Array, Values
from pwopt.graph.dtypes import FLOATS, epsilon
from pwopt.graph.ir import Graph, Node, Tensor, Variable, as_message
from pwopt.graph.journal import State
from pwopt.graph.view import View

#: Multiply-adds and elements that one evaluation may take: some tenths of a second.
MAX_WORK = 400_000_000
#: Smallest positive numbers of each type, below which rounding is absolute; where a pass flushes, the smallest normal.
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
#: Inputs that hold numbers to reckon with, not shapes, axes, limits or exponents.
NUMBERS: dict[str, Sequence[int]] = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "Add": (0, 1), "Sub": (0, 1),
    "Mul": (0, 1), "Div": (0, 1), "Sum": range(64), "Mean": range(64), "Concat": range(64), "Pad": (2,),
    "BatchNormalization": (1, 2, 3, 4), "Clip": (1, 2), "Min": (0, 1), "Max": (0, 1), "PRelu": (1,),
}  # fmt: skip

Tensors = dict[Tensor, Values]
Rule = Callable[["Side", State, list[Any], bool], list[Values]]


class UnfitError(Exception):
    """These operators cannot be evaluated on these inputs; the message is a clause."""


class TooLargeError(Exception):
    """The evaluation would take too long."""


class Side:
    """Operators in order, and the constants that they read.

    Parameters
    ----------
    view : View
    states : sequence of State
    """

    def __init__(self, view: View, states: Sequence[State]) -> None:
        self.view, self.states = view, states
        self.work, self.limit = 0, MAX_WORK
        #: Stand-ins for tensors of which only the shape is read.
        self.shapes: Tensors = {}
        self._constants: Tensors = {}
        self._references: dict[State, ReferenceEvaluator] = {}

    def constant(self, tensor: Tensor) -> Values | None:
        """Value of a constant, floating-point ones in float64."""
        if tensor not in self._constants:
            if (self.view.elements(tensor) or 0) > MAX_WORK // 8:
                raise TooLargeError
            value = self.view.raw(tensor)
            if value is None:
                return None
            self._constants[tensor] = _wide(value)
        return self._constants[tensor]

    def unit(self) -> float:
        """Unit roundoff of the coarsest type that constants and results are stored in."""
        tensors = [t for s in self.states for t in (*s.inputs, *s.outputs)]
        kinds = {str(t.dtype): t.dtype for t in tensors if t.dtype is not None}
        return max((epsilon(np.dtype(d)) for name, d in kinds.items() if name in FLOATS), default=0.0) / 2

    def run(
        self,
        feeds: Mapping[Tensor, Values],
        adjust: Callable[[Array, Tensor], Array] | None,
        absolute: bool = False,
    ) -> Tensors:
        """Values of all tensors, by id.

        Parameters
        ----------
        feeds : mapping
            Values of the tensors that come from outside.
        adjust : callable or None
            Applied to every constant that is reckoned with.
        absolute : bool
            Compute what the sizes of all terms add up to, instead of the terms: |a| + |b| for a − b.
        """
        self.work = 0
        values: Tensors = {**self.shapes, **feeds}
        moving = set(feeds)
        with np.errstate(all="ignore"):
            for state in self.states:
                moves = any(t in moving for t in state.inputs)
                inputs: list[Any] = []
                for i, t in enumerate(state.inputs):
                    value = self.value(t, values) if t.name else None
                    if moves and adjust is not None and t not in moving and i in NUMBERS.get(state.op, ()):
                        value = adjust(value, t) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
                    inputs.append(value)
                if state.op not in ("Shape", "Size"):
                    self.spend(max((v.size for v in inputs if v is not None), default=0))
                outputs = self._apply(state, inputs, absolute)
                for t, result in zip(state.outputs, outputs, strict=False):
                    if t.name or len(state.outputs) == 1:
                        values[t] = result
                        if moves:
                            moving.add(t)
        return values

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > self.limit:
            raise TooLargeError

    def value(self, tensor: Tensor, values: Tensors) -> Values:
        """The value of a tensor after a run: computed, or constant."""
        value = values.get(tensor)
        value = self.constant(tensor) if value is None else value
        if value is None:
            raise UnfitError(f"nothing makes {tensor.name!r}")
        return value

    def _apply(self, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
        rule = RULES.get(state.op) if self.view.op(state.node) else None
        try:
            if rule is not None:
                return rule(self, state, inputs, absolute)
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise UnfitError(f"{state.op} does not take such inputs") from error
        return self.reference(state, inputs)

    def reference(self, state: State, inputs: list[Any]) -> list[Values]:
        """One operator by onnx's reference evaluator."""
        if not self.view.op(state.node):
            raise UnfitError(f"{state.op} is not one of ONNX's own operators")
        if any(isinstance(v, (Graph, list)) and _holds_graph(v) for v in state.attrs.values()):
            raise UnfitError(f"{state.op} has a body")
        if state.op in RANDOM:
            raise UnfitError(f"{state.op} gives other results each time")
        if state not in self._references:
            self._references[state] = _evaluator(state, self.view.opset)
        feeds = {f"i{i}": v for i, v in enumerate(inputs) if v is not None}
        try:
            results = self._references[state].run(None, feeds)
        except Exception as error:  # whatever a reference implementation raises for inputs that do not fit
            raise UnfitError(f"{state.op} does not take such inputs") from error
        return [_wide(np.asarray(r)) for r in results]


#: Operators with a result of their own at each run.
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def _wide(value: Values) -> Values:
    return value.astype(np.float64) if value.dtype.kind in "fV" or str(value.dtype) in FLOATS else value


def _holds_graph(value: Any) -> bool:
    return isinstance(value, Graph) or (isinstance(value, list) and any(isinstance(v, Graph) for v in value))


def _evaluator(state: State, opset: int) -> ReferenceEvaluator:
    inputs = [Variable(f"i{i}" if t.name else "") for i, t in enumerate(state.inputs)]
    outputs = [Variable(f"o{i}" if t.name else "") for i, t in enumerate(state.outputs)]
    message = as_message(Node(state.op, "", dict(state.attrs), inputs, outputs))
    graph = onnx.helper.make_graph(
        [message],
        "operator",
        [onnx.ValueInfoProto(name=t.name) for t in inputs if t.name],
        [onnx.ValueInfoProto(name=t.name) for t in outputs if t.name],
    )
    try:
        return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    except Exception as error:
        raise UnfitError(f"onnx has no reference for {state.op}") from error
