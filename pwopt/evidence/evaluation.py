"""Evaluate operators in float64, one tensor at a time.

This is independent of `pwopt.algebra`, whose results it checks. `operators` defines the common operators directly: a
convolution is a sum over its taps. onnx's reference evaluator computes the others, except where it is known to be
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pwopt.algebra import Array, Values
from pwopt.evidence.traits import find_traits
from pwopt.graph.dtypes import FLOATS, epsilon
from pwopt.graph.ir import Graph, Node, Tensor, Variable, as_message
from pwopt.graph.journal import State
from pwopt.graph.view import View

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator

#: Maximum number of multiply-adds and elements of one evaluation: some tenths of a second.
MAX_WORK = 400_000_000
#: The smallest positive number of each type, below which rounding is absolute (the smallest normal number where passes
#: flush subnormal numbers to zero).
SMALLEST_POSITIVE = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}

Tensors = dict[Tensor, Values]
Definition = Callable[["Side", State, list[Any], bool], list[Values]]


class UnfitError(Exception):
    """The operators cannot be evaluated on these inputs; the message is a clause."""


class TooLargeError(Exception):
    """The evaluation would take too long."""


class Side:
    """Operators in topological order, and the constants that they read.

    Parameters
    ----------
    view : View
    states : sequence of State
    """

    def __init__(self, view: View, states: Sequence[State]) -> None:
        self.view, self.states = view, states
        self.work, self.limit = 0, MAX_WORK
        #: Placeholders for tensors of which only the shape is read.
        self.shapes: Tensors = {}
        self._constants: Tensors = {}
        self._references: dict[State, ReferenceEvaluator] = {}

    def constant(self, tensor: Tensor) -> Values | None:
        """Return the value of a constant, in float64 if it is floating point; None if it is not a constant."""
        if tensor not in self._constants:
            if (self.view.elements(tensor) or 0) > MAX_WORK // 8:
                raise TooLargeError
            value = self.view.raw(tensor)
            if value is None:
                return None
            self._constants[tensor] = _wide(value)
        return self._constants[tensor]

    def unit(self) -> float:
        """Unit roundoff of the coarsest type of all constants and results."""
        tensors = [t for s in self.states for t in (*s.inputs, *s.outputs)]
        kinds = {str(t.dtype): t.dtype for t in tensors if t.dtype is not None}
        return max((epsilon(np.dtype(d)) for name, d in kinds.items() if name in FLOATS), default=0.0) / 2

    def run(
        self,
        feeds: Mapping[Tensor, Values],
        adjust: Callable[[Array, Tensor], Array] | None,
        absolute: bool = False,
    ) -> Tensors:
        """Compute all tensors.

        Parameters
        ----------
        feeds : mapping
            Values of the inputs.
        adjust : callable or None
            Applied to every constant that holds numbers to compute with.
        absolute : bool
            Add up the magnitudes of all terms instead of the terms: |a| + |b| for a − b.
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
                    if moves and adjust is not None and t not in moving and i in find_traits(state.op).numbers:
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
        """Return the value of a tensor after a run, computed or constant."""
        value = values.get(tensor)
        value = self.constant(tensor) if value is None else value
        if value is None:
            raise UnfitError(f"nothing makes {tensor.name!r}")
        return value

    def _apply(self, state: State, inputs: list[Any], absolute: bool) -> list[Values]:
        standard, own = self.view.op(state.node), self.view.runtime_op(state.node)
        definition = DEFINITIONS.get(state.op) if standard else RUNTIME_DEFINITIONS.get(own)
        try:
            if definition is not None:
                return definition(self, state, inputs, absolute)
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise UnfitError(f"{state.op} does not take such inputs") from error
        return self.reference(state, inputs)

    def reference(self, state: State, inputs: list[Any]) -> list[Values]:
        """Evaluate one operator with onnx's reference evaluator.

        Raises
        ------
        UnfitError
            If the evaluator cannot evaluate it, or is known to be wrong.
        """
        if not self.view.op(state.node):
            raise UnfitError(f"{state.op} is not one of ONNX's own operators")
        if any(isinstance(v, (Graph, list)) and _holds_graph(v) for v in state.attrs.values()):
            raise UnfitError(f"{state.op} has a body")
        traits = find_traits(state.op)
        if traits.random:
            raise UnfitError(f"{state.op} gives a different result each time")
        if traits.wrong is not None and traits.wrong(state.attrs):
            raise UnfitError(f"onnx's reference evaluator is known to be wrong for {state.op} with these attributes")
        if state not in self._references:
            self._references[state] = _make_evaluator(state, self.view.opset)
        feeds = {f"i{i}": v for i, v in enumerate(inputs) if v is not None}
        try:
            results = self._references[state].run(None, feeds)
        except Exception as error:  # reference implementations raise various errors for invalid inputs
            raise UnfitError(f"{state.op} does not take such inputs") from error
        return [_wide(np.asarray(r)) for r in results]


DEFINITIONS: dict[str, Definition] = {}
#: Of operators of onnxruntime's own domain.
RUNTIME_DEFINITIONS: dict[str, Definition] = {}


def define(*ops: str) -> Callable[[Definition], Definition]:
    """Register the decorated function as the definition of operators."""

    def register(function: Definition) -> Definition:
        DEFINITIONS.update(dict.fromkeys(ops, function))
        return function

    return register


def _wide(value: Values) -> Values:
    return value.astype(np.float64) if value.dtype.kind in "fV" or str(value.dtype) in FLOATS else value


def _holds_graph(value: Any) -> bool:
    return isinstance(value, Graph) or (isinstance(value, list) and any(isinstance(v, Graph) for v in value))


def _make_evaluator(state: State, opset: int) -> ReferenceEvaluator:
    from onnx.reference import ReferenceEvaluator  # loads the schema of every operator

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
