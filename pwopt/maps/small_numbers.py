"""Which operators tell a tiny number from zero: ⌈10⁻³⁹⌉ is 1, but ⌈0⌉ is 0.

A pass that replaces tiny numbers by zero must know what happens to them later. Most operators keep tiny numbers tiny.
Some hide them: a bias, or Sigmoid, gives an ordinary number, and adding a tiny one does not change it. Others reveal
them: a step or a pole at zero (Ceil, Sign, Log), a normalisation without epsilon, or a large factor.

`find_limits` gives each tensor the size below which a deviation from zero has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from pwopt.algebra import Array
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import (
    ARITHMETIC,
    BIAS_INPUTS,
    ELEMENTWISE,
    FIRST_ZERO_KEEPING,
    HIDES_ZERO,
    MOVES,
    TELLS_ZERO,
    ZERO_BLIND,
    ZERO_KEEPING,
)
from pwopt.graph.reasons import Reason
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.forms import Reading
from pwopt.maps.scans import LARGEST_INPUT, Mask, Scan, Scanner, flush_subnormals, vanishing
from pwopt.maps.signed_zeros import read_bounds

#: Adding a number smaller by this factor does not change a float32 number.
ROUNDING = 2.0**-25
#: Products with weights and normalisations that amplify by no more than this do not count. Trained networks have many
#: of them, one after the other, and still keep their activations at an ordinary size.
ORDINARY_GAIN = 2.0**20
#: The normalisations with an epsilon, and its default value.
EPSILON = {
    "BatchNormalization": 1e-5,
    "GroupNormalization": 1e-5,
    "InstanceNormalization": 1e-5,
    "LayerNormalization": 1e-5,
    "RMSNormalization": 1e-5,
}


@dataclass(frozen=True)
class Limit:
    """The size below which a deviation from zero has no effect, and the operator that reveals larger ones."""

    size: float
    observer: str

    def divide(self, gain: float, node: Node) -> Limit:
        """The limit before an operator that amplifies by at most `gain`."""
        if not gain > 1:
            return self
        if gain <= ORDINARY_GAIN or not self.size:
            return Limit(self.size / gain, self.observer)
        return Limit(self.size / gain, f"{_name(node)} multiplies them by up to {gain:.1g}")

    def hide(self, value: float) -> Limit:
        """The limit before an operator that gives at least `value` for zero."""
        return Limit(max(self.size, ROUNDING * abs(value)), self.observer)


NEVER = Limit(math.inf, "")


def find_limits(view: View) -> dict[Tensor, Limit]:
    """The limit of each tensor; one pass over the graph in reverse order.

    Unknown operators, such as those of other domains, and bodies of control flow are assumed to reveal every deviation.
    """
    found: dict[Tensor, Limit] = {}

    def note(tensor: Tensor, limit: Limit) -> None:
        if limit.size < found.setdefault(tensor, NEVER).size:
            found[tensor] = limit

    for node in reversed(view.nodes()):
        for tensor in node.outputs:
            note(tensor, _at_output(view, tensor))
        reading = forms.weighted(view, node) or forms.linear(view, node)
        if reading is not None and (reading.weighted or reading.kind == "diagonal") and reading.nodes[0] is node:
            behind = found.get(reading.output, NEVER)
            note(reading.source, behind if behind is NEVER else _before_map(reading, behind))
            continue
        behind = min((found.get(t, NEVER) for t in node.outputs), key=lambda limit: limit.size, default=NEVER)
        for i, tensor in enumerate(node.inputs):
            if tensor.name and view.constant(tensor) is None:
                note(tensor, _before(view, node, i, behind))
    return found


def _at_output(view: View, tensor: Tensor) -> Limit:
    reason = view.must_keep(tensor) if tensor.name else ""
    if not reason:
        return NEVER
    return Limit(0.0 if view.is_captured(tensor) else ROUNDING, reason)


def _name(node: Node) -> str:
    return f"{node.op} {node.name}".strip()


def find_limit_of_rows(limit: Limit, bias: Array) -> Array:
    """The limit of each output channel of a map: a bias hides small deviations."""
    return np.maximum(limit.size, ROUNDING * np.abs(bias))


def _before_map(reading: Reading, behind: Limit) -> Limit:
    linear = reading.try_load()
    if linear is None:
        return Limit(0.0, f"the weights of {_name(reading.node)} are not finite")
    gain = np.abs(linear.weight).reshape(len(linear.weight), -1).sum(1)
    if reading.weighted:
        gain = np.where(gain > ORDINARY_GAIN, gain, 1.0)
    limits = find_limit_of_rows(behind, linear.bias) / np.maximum(gain, 1.0)
    row = int(np.argmin(limits))
    return behind.hide(float(linear.bias[row])).divide(float(gain[row]), reading.node)


def _before(view: View, node: Node, index: int, behind: Limit) -> Limit:
    """The limit of input `index`; `behind` is the lowest of the outputs."""
    op = view.op(node)
    known = op in ZERO_KEEPING or op in ZERO_BLIND or op in HIDES_ZERO or op == "Pow"
    known = known or (index == 0 and op in FIRST_ZERO_KEEPING)
    if op in ("Div", "Mod"):
        known = index == 0
    if not known or _reveals(view, node, op, index):
        return Limit(0.0, f"{_name(node)} distinguishes them from zero")
    if op == "Sqrt":
        return Limit(behind.size**2, behind.observer)
    value = max(_find_values_at_zero(view, node, op, index), default=0.0)
    return behind.hide(value).divide(_find_gain(view, node, op, index), node)


def _reveals(view: View, node: Node, op: str, index: int) -> bool:
    """Whether the operator has a step or a pole at zero."""
    if op == "Where":
        return index == 0
    if op == "TopK":
        return index == 0 and bool(view.readers(node.outputs[1]) or view.must_keep(node.outputs[1]))
    if op == "MaxPool":
        return len([t for t in node.outputs if t.name]) > 1
    if op in ("Cast", "CastLike"):  # a cast to an integer truncates, so it gives 0 for tiny numbers too
        kind = view.dtype(node.outputs[0])
        return node.attrs.get("to") == TensorProto.BOOL or kind is None or kind == np.bool_
    if op == "Pow":
        exponent = view.value(node.inputs[1]) if index == 0 else np.ones(1)
        return exponent is None or not np.all((exponent == 0) | (exponent >= 1))
    if op in EPSILON and index == 0 and op != "BatchNormalization":
        return not float(node.attrs.get("epsilon", EPSILON[op])) > 0
    return op in TELLS_ZERO


def _find_values_at_zero(view: View, node: Node, op: str, index: int) -> Iterator[float]:
    """Magnitudes below which the result for zero cannot lie."""
    if op in HIDES_ZERO:
        yield 0.5
    others = [view.value(t) for i, t in enumerate(node.inputs) if i != index and t.name]
    if op in ("Add", "Sub", "Sum"):
        yield max((_smallest(o) for o in others), default=0.0) if len(others) == 1 else 0.0
    if op in ("Max", "Min"):
        sign = 1 if op == "Max" else -1
        yield max((_smallest(np.maximum(sign * o, 0)) for o in others if o is not None), default=0.0)
    if op == "Clip" and index == 0:
        low, high = read_bounds(view, node)
        yield max(low, -high, 0.0)
    if op == "HardSigmoid":
        yield abs(float(node.attrs.get("beta", 0.5)))
    if op in BIAS_INPUTS and index == 0 and len(node.inputs) > BIAS_INPUTS[op]:
        yield _smallest(view.value(node.inputs[BIAS_INPUTS[op]]))


def _smallest(value: Array | None) -> float:
    return 0.0 if value is None else float(np.min(np.abs(value), initial=math.inf))


def _find_gain(view: View, node: Node, op: str, index: int) -> float:
    """How much the operator may amplify a number near zero."""
    values = [view.value(t) for i, t in enumerate(node.inputs) if i != index and t.name]
    sizes = [np.abs(v) for v in values if v is not None and v.size]
    if op == "Div" and index == 0 and sizes:
        smallest = float(sizes[0].min())
        return 1 / smallest if smallest > 0 else math.inf
    if op == "Mul" and sizes:
        return float(sizes[0].max())
    if op in ("LeakyRelu", "Elu", "Selu", "HardSigmoid"):
        return max((abs(float(node.attrs.get(a, 1.0))) for a in ("alpha", "gamma")), default=1.0)
    gain = 1.0
    if op in EPSILON and index == 0:
        gain = 1 / math.sqrt(float(node.attrs.get("epsilon", EPSILON[op])) or 1.0)
    if op in EPSILON or op in ("PRelu", "MatMul", "Gemm", "Conv", "ConvTranspose", "GRU", "LSTM", "RNN", "Einsum"):
        gain *= max((float(s.max()) for s in sizes), default=1.0)
    return gain if gain > ORDINARY_GAIN else 1.0


#: How many tensors `find_pole` follows.
MAX_TENSORS = 64


def find_pole(view: View, tensor: Tensor) -> Node | None:
    """The operator that divides by a tensor, or takes its logarithm or root, directly or after elementwise operators.

    Such an operator depends on the relative error of a number near zero; most others depend on the absolute error.
    """
    pending, seen = [tensor], {tensor}
    while pending and len(seen) <= MAX_TENSORS:
        source = pending.pop()
        for node in view.readers(source):
            op, index = view.op(node), next(i for i, t in enumerate(node.inputs) if t is source)
            if _is_pole(view, node, op, source):
                return node
            through = op in ELEMENTWISE | ARITHMETIC | MOVES | {"Max", "Min", "PRelu", "Pow"}
            if through and not any(_find_values_at_zero(view, node, op, index)):
                pending += [t for t in node.outputs if t not in seen]
                seen.update(node.outputs)
    return None


def _is_pole(view: View, node: Node, op: str, tensor: Tensor) -> bool:
    if op == "Div":
        return tensor is node.inputs[1]
    return op in ("Log", "Reciprocal", "Sqrt") or (op == "Pow" and _reveals(view, node, op, 0))


class SmallNumbers:
    """Which small weights of a graph count as zeros. The limits are found when first needed.

    Attributes
    ----------
    view : View
    exact : set of Tensor
        Outputs of maps whose subnormal weights do not count as zeros, because a later operator reveals them.
    refused : dict of Tensor to str
        Why filters matter that would be too small to matter elsewhere.
    """

    def __init__(self, view: View, scan: Scanner) -> None:
        self.view, self._scan = view, scan
        self.exact: set[Tensor] = set()
        self.refused: dict[Tensor, str] = {}
        self._limits: dict[Tensor, Limit] = {}

    def find_limit(self, tensor: Tensor) -> Limit:
        if tensor not in self._limits:  # for the first time, or it is new
            self._limits = find_limits(self.view)
        return self._limits.get(tensor, NEVER)

    def find_observer(self, reading: Reading) -> str:
        """What reveals the subnormal weights of a map, as a clause, or ""."""
        scan = self._scan(self.view, reading)
        if scan is None:
            return "the weights are not finite"
        revealed = np.any(self._find_revealed(reading, scan.flushed))
        return self.find_limit(reading.output).observer if revealed else ""

    def scan(self, reading: Reading) -> Scan | None:
        """The magnitudes of a map's weights; subnormals count as zeros unless a later operator reveals them."""
        scan = self._scan(self.view, reading)
        if scan is None or not scan.subnormal or not self.find_observer(reading):
            return scan
        self.exact.add(reading.output)
        return self._scan(self.view, reading, flush=False)

    def flush(self, reading: Reading, weight: Array) -> Array:
        """The weight of a map, with zeros in place of the subnormals that count as zeros."""
        if reading.output in self.exact:
            return weight
        return flush_subnormals(weight, self.view.dtype(reading.weight or reading.source))

    def find_vanishing(self, reading: Reading, scan: Scan) -> Mask:
        """The output channels that are too small to matter."""
        tiny = vanishing(scan.rows)
        if not np.any(scan.rows[tiny]):
            return tiny
        revealed = self._find_revealed(reading, np.where(tiny, scan.rows, 0.0))
        if revealed.any():
            observer = self.find_limit(reading.output).observer
            self.refused[reading.output] = Reason("{:,} filters are almost zero, but {}", int(revealed.sum()), observer)
        return np.asarray(tiny & ~revealed, np.bool_)

    def _find_revealed(self, reading: Reading, sizes: Array) -> Mask:
        """The output channels in which deviations of these sizes, for inputs of magnitude one, may have an effect."""
        if not np.any(sizes):
            return np.zeros(len(sizes), np.bool_)
        limits = find_limit_of_rows(self.find_limit(reading.output), reading.load().bias)
        return np.asarray((sizes > 0) & (sizes * LARGEST_INPUT >= limits), np.bool_)
