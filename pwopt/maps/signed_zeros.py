"""Which operators depend on the sign of a zero: 1/(−0) is −∞, and 1/(+0) is +∞.

Since −0 = +0, most operators give the same number for both, or results that differ only in the sign of a zero. Only a
division or a similar operator turns the sign into another number. Outputs of the graph do not count: there, −0 equals
+0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pwopt.algebra import Array, zeros
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import (
    BIAS_INPUTS,
    FIRST_ZERO_KEEPING,
    REDUCTIONS,
    VIEWS,
    ZERO_BLIND,
    ZERO_BLIND_INPUTS,
    ZERO_KEEPING,
)
from pwopt.graph.reasons import Reason
from pwopt.graph.view import View

#: Operators whose results are neither negative nor −0, whatever they read.
NEVER_NEGATIVE = ("Abs", "ReduceL1", "ReduceL2", "ReduceSumSquare")
#: How many operators above a tensor are read.
MAX_CLIMB = 8


def find_zero_sensitive(view: View) -> dict[Tensor, str]:
    """Tensors in which −0 instead of +0 could change a number, each with the operator that depends on the sign.

    One pass over the graph in reverse order. Unknown operators, such as those of other domains, and bodies of control
    flow are assumed to depend on the sign.
    """
    found: dict[Tensor, str] = {}
    for node in reversed(view.nodes()):
        behind = next((found[t] for t in node.outputs if t in found), "")
        captured = next((t.name for t in node.outputs if t.name and view.is_captured(t)), "")
        behind = behind or (Reason("a control-flow body that reads {!r}", captured) if captured else "")
        for i, tensor in enumerate(node.inputs):
            operator = _find_sensitive(view, node, i, behind)
            if operator:
                found.setdefault(tensor, operator)
    return found


def is_never_negative(view: View, tensor: Tensor, depth: int = 0) -> bool:
    """Whether no element of a tensor is negative or −0, as far as a few operators above it prove.

    Squares and absolute values are not, and neither are their sums, means, extremes and roots.
    """
    node = view.producer(tensor)
    op = view.op(node)
    if node is None or depth > MAX_CLIMB:
        return False
    if op == "Mul" and node.inputs[0] is node.inputs[1]:
        return True
    if op == "Pow":
        exponent = view.value(node.inputs[1])
        return exponent is not None and bool(np.all(np.fmod(exponent, 2) == 0))
    if op in ("Add", "Mul", "Sum"):
        return all(is_never_negative(view, t, depth + 1) for t in node.inputs)
    kept = op in REDUCTIONS or op in VIEWS or op in ("Identity", "Sqrt", "Transpose")
    return op in NEVER_NEGATIVE or (kept and is_never_negative(view, node.inputs[0], depth + 1))


def _find_sensitive(view: View, node: Node, index: int, behind: str) -> str:
    """The operator that depends on the sign of zeros in input `index`, or ""; `behind` is the one that depends on it in
    the outputs."""
    op = view.op(node)
    if op in ZERO_BLIND or ZERO_BLIND_INPUTS.get(op) == index or any(_find_reasons(view, node, op, index)):
        return ""
    if op in ZERO_KEEPING or (op in FIRST_ZERO_KEEPING and index == 0) or (op == "Pow" and _positive(view, node)):
        return behind
    return f"{node.op} {node.name}".strip()


def _find_reasons(view: View, node: Node, op: str, index: int) -> Iterator[bool]:
    """For each reason that lies in the constants: whether the operator therefore gives the same number for both
    zeros."""
    others = [view.value(t) for i, t in enumerate(node.inputs) if i != index and t.name]
    if op in ("Add", "Sub") and len(others) == 1 and others[0] is not None:
        yield zeros.joins(-others[0] if op == "Sub" and index == 0 else others[0])
    if op == "Mul":
        yield node.inputs[0] is node.inputs[1]
    if op in ("Max", "Min"):
        yield any(o is not None and bool(np.all(o > 0 if op == "Max" else o < 0)) for o in others)
    if op == "Clip" and index == 0:
        low, high = read_bounds(view, node)
        yield low > 0 or high < 0
    if op == "HardSigmoid":
        yield node.attrs.get("beta", 0.5) != 0
    if op in BIAS_INPUTS and index == 0 and len(node.inputs) > BIAS_INPUTS[op]:
        bias = view.value(node.inputs[BIAS_INPUTS[op]])
        yield bias is not None and zeros.joins(bias)
    if op == "Pow" and index == 0:
        exponent = view.value(node.inputs[1])
        yield exponent is not None and not np.any(_odd(exponent))


def read_bounds(view: View, node: Node) -> tuple[float, float]:
    """The lower and the upper bound of a Clip; infinite if unknown."""
    bounds = [node.attrs.get("min"), node.attrs.get("max")]
    if view.opset >= 11:
        held = [view.optional_input(node, i) for i in (1, 2)]
        bounds = [None if t is None else view.uniform(t) for t in held]
    return (-np.inf if bounds[0] is None else bounds[0]), (np.inf if bounds[1] is None else bounds[1])


def _odd(exponent: Array) -> Array:
    """The exponents for which powers of −0 and +0 differ (C17, F.10.4.4)."""
    odd: Array = np.abs(np.fmod(exponent, 2)) == 1
    return odd


def _positive(view: View, node: Node) -> bool:
    """Whether zero to the power of this exponent is a zero."""
    exponent = view.value(node.inputs[1])
    return exponent is not None and bool(np.all(exponent > 0))
