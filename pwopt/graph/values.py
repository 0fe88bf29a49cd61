"""The entries of small integer tensors: shapes with unknown sizes, and arithmetic on them.

onnx's inference propagates such values and infers shapes from them, but it does not return them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from pwopt.graph import attributes
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.view import View

#: An unknown size: the name of an axis, or a tensor and one of its axes.
Symbol = str | tuple[Tensor, int]
#: A number, a symbol, or None if nothing is known.
Entry = int | Symbol | None
Entries = tuple[Entry, ...]

#: The largest number of entries; longer tensors are not shapes.
MAX_ENTRIES = 64
#: The largest depth and the largest number of operators for one question; shape arithmetic has a handful.
MAX_READ_DEPTH, MAX_VISITED = 24, 256
#: The end of the range of int32. Results beyond it are unknown, whatever their type.
END = 2**31


def read_entries(view: View, tensor: Tensor) -> Entries | None:
    """Read the entries of an integer or boolean tensor with at most one axis; None if nothing is known.

    Booleans are 0 and 1. An entry that is a `Symbol` equals that size for all inputs of the model.
    """
    return _Reader(view).read(tensor, 0)


def read_extents(view: View, tensor: Tensor) -> Entries | None:
    """Read the shape of a tensor as entries, each a number or a symbol; None if the rank is unknown."""
    shape = view.shape(tensor)
    if shape is None:
        return None
    named = (d if isinstance(d, int) or (d is not None and view.is_unambiguous(d)) else None for d in shape)
    return tuple((tensor, axis) if d is None else d for axis, d in enumerate(named))


class _Reader:
    """Answers one question by following the operators above a tensor, within limits."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.seen: dict[Tensor, Entries | None] = {}

    def read(self, tensor: Tensor, depth: int) -> Entries | None:
        key = tensor
        if key not in self.seen:
            if depth > MAX_READ_DEPTH or len(self.seen) > MAX_VISITED:
                return None
            self.seen[key] = None  # for recursive questions
            self.seen[key] = self._read(tensor, depth)
        return self.seen[key]

    def _read(self, tensor: Tensor, depth: int) -> Entries | None:
        held = self.view.constant(tensor)
        if held is not None:
            return _read_numbers(self.view, held)
        node, rank = self.view.producer(tensor), self.view.rank(tensor)
        rule = RULES.get(self.view.op(node))
        if node is None or rule is None or rank is None or rank > 1:
            return None
        found = rule(self, node, depth + 1)
        return found if found is not None and len(found) <= MAX_ENTRIES else None

    def operands(self, node: Node, depth: int) -> list[Entries] | None:
        """The entries of all inputs, repeated to the same length if there is only one."""
        found = [self.read(t, depth) for t in node.inputs if t.name]
        listed = [f for f in found if f is not None]
        if len(listed) < len(found):
            return None
        wide = max(map(len, listed), default=0)
        return [f * wide if len(f) == 1 else f for f in listed] if all(len(f) in (1, wide) for f in listed) else None


def _read_numbers(view: View, held: Constant) -> Entries | None:
    if (
        len(held.shape) > 1
        or (view.elements(held) or 0) > MAX_ENTRIES
        or str(held.dtype) not in ("int32", "int64", "bool")
    ):
        return None
    raw = view.raw(held)
    return None if raw is None else tuple(int(v) for v in raw.reshape(-1))


Rule = Callable[[_Reader, Node, int], Entries | None]
RULES: dict[str, Rule] = {}


def _rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


@_rule("Shape")
def _shape(reader: _Reader, node: Node, depth: int) -> Entries | None:
    found = read_extents(reader.view, node.inputs[0])
    return None if found is None else found[node.attrs.get("start", 0) : node.attrs.get("end", len(found))]


@_rule("Size")
def _size(reader: _Reader, node: Node, depth: int) -> Entries | None:
    found = read_extents(reader.view, node.inputs[0])
    numbers = [f for f in found or () if isinstance(f, int)]
    product = int(np.prod(numbers, dtype=object)) if found is not None and len(numbers) == len(found) else END
    return (product,) if product < END else None


@_rule("Identity", "Squeeze", "Unsqueeze", "Reshape")
def _same(reader: _Reader, node: Node, depth: int) -> Entries | None:
    """A tensor with at most one axis before and after keeps its entries."""
    return reader.read(node.inputs[0], depth)


@_rule("Cast")
def _cast(reader: _Reader, node: Node, depth: int) -> Entries | None:
    """Casts between integers keep the entries, since none exceeds int32."""
    found, to = reader.read(node.inputs[0], depth), node.attrs.get("to")
    if found is not None and to == onnx.TensorProto.BOOL:
        return tuple(int(e != 0) if isinstance(e, int) else None for e in found)
    return found if to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) else None


@_rule("Concat")
def _concat(reader: _Reader, node: Node, depth: int) -> Entries | None:
    parts = [reader.read(t, depth) for t in node.inputs]
    listed = [p for p in parts if p is not None]
    return tuple(e for p in listed for e in p) if len(listed) == len(parts) else None


@_rule("Gather")
def _gather(reader: _Reader, node: Node, depth: int) -> Entries | None:
    data, at = reader.read(node.inputs[0], depth), reader.read(node.inputs[1], depth)
    if data is None or at is None or reader.view.rank(node.inputs[0]) != 1:
        return None
    picks = [i for i in at if isinstance(i, int) and -len(data) <= i < len(data)]
    return tuple(data[i] for i in picks) if len(picks) == len(at) else None


@_rule("Slice")
def _slice(reader: _Reader, node: Node, depth: int) -> Entries | None:
    data, parameters = reader.read(node.inputs[0], depth), attributes.read_slice_parameters(reader.view, node)
    if data is None or parameters is None or len(parameters) != 1 or parameters[0][3] == 0:
        return None
    _, start, end, step = parameters[0]
    return data[start:end:step] if step > 0 else None


@_rule("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "Greater", "And", "Or")
def _arithmetic(reader: _Reader, node: Node, depth: int) -> Entries | None:
    operands = reader.operands(node, depth) if reader.view.opset >= 7 else None
    if operands is None or len(operands) != 2 or node.attrs.get("fmod", 0):
        return None
    found = tuple(_combine(str(node.op), a, b) for a, b in zip(*operands, strict=True))
    return found if all(not isinstance(f, int) or -END <= f < END for f in found) else None


#: Operators on two numbers. Runtimes round quotients of negative numbers differently.
NUMERIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
    "Mod": operator.mod,
    "Min": min,
    "Max": max,
    "Equal": operator.eq,
    "Less": operator.lt,
    "Greater": operator.gt,
    "And": operator.and_,
    "Or": operator.or_,
}


def _combine(op: str, a: Entry, b: Entry) -> Entry:
    """Combine two entries. Adding 0 and multiplying by 1 keep a symbol, and a size is never negative."""
    if isinstance(a, int) and isinstance(b, int):
        return None if op in ("Div", "Mod") and (a < 0 or b <= 0) else int(NUMERIC[op](a, b))
    if (b == 0 and op in ("Add", "Sub")) or (b == 1 and op in ("Mul", "Div")):
        return a
    if (a == 0 and op == "Add") or (a == 1 and op == "Mul"):
        return b
    if op == "Equal" and None not in (a, b):
        number = next((e for e in (a, b) if isinstance(e, int)), None)
        return 1 if a == b else 0 if number is not None and number < 0 else None
    if op in ("Min", "Max") and a is not None and a == b:
        return a
    return None


@_rule("Not")
def _not(reader: _Reader, node: Node, depth: int) -> Entries | None:
    found = reader.read(node.inputs[0], depth)
    return None if found is None else tuple(1 - e if isinstance(e, int) else None for e in found)


@_rule("Where")
def _where(reader: _Reader, node: Node, depth: int) -> Entries | None:
    operands = reader.operands(node, depth)
    if operands is None or len(operands) != 3:
        return None
    return tuple(_choose(c, a, b) for c, a, b in zip(*operands, strict=True))


def _choose(condition: Entry, a: Entry, b: Entry) -> Entry:
    return (a if condition else b) if isinstance(condition, int) else a if a is not None and a == b else None


@_rule("ConstantOfShape")
def _fill(reader: _Reader, node: Node, depth: int) -> Entries | None:
    count, value = reader.read(node.inputs[0], depth), node.attrs.get("value")
    held = None if value is None else np.asarray(value.values)
    if count is None or len(count) > 1 or held is None or held.dtype.kind not in "iu":
        return None
    number = count[0] if count else 1
    return (int(held.reshape(-1)[0]),) * number if isinstance(number, int) and number <= MAX_ENTRIES else None


def as_numbers(found: Sequence[Entry] | None) -> tuple[int, ...] | None:
    """Return the entries if all are numbers, else None."""
    numbers = tuple(e for e in found or () if isinstance(e, int))
    return numbers if found is not None and len(numbers) == len(found) else None
