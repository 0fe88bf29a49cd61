"""Sizes of all tensors in symbols: two equal symbols are proved to be the same size in every run.

onnx's inference gives up a dynamic size at the first convolution. Here, the size after an operator is an expression of
the sizes before it, and equal expressions get the same symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pwopt.algebra.geometry import Refusal
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.operators import BROADCASTS, SAME_SHAPE
from pwopt.graph.view import View

#: A size: a number, or a symbol.
Size = int | str
Sizes = tuple[Size, ...]

#: More operators whose first output has the shape of the first input.
KEEPING = (*SAME_SHAPE, "PRelu", "BatchNormalization", "InstanceNormalization", "LRN", "Softmax", "LogSoftmax")


def infer_symbols(view: View) -> dict[Tensor, Sizes]:
    """The sizes of all tensors of known rank.

    Parameters
    ----------
    view : View
        Its graph. Sizes of inputs that have no name of their own, or share one with another input, get new symbols.
    """
    inference = _Inference(view)
    for tensor in view.graph.inputs:
        inference.add_input(tensor)
    for node in view.nodes():
        inference.add_node(node)
    return inference.sizes


@dataclass
class _Inference:
    view: View
    sizes: dict[Tensor, Sizes] = field(default_factory=dict)
    #: Expression → its symbol.
    symbols: dict[tuple[object, ...], str] = field(default_factory=dict)
    #: Symbol → (symbol, number) whose sum it is.
    sums: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.view.graph
        tensors = (*graph.inputs, *graph.outputs, *(t for n in graph.nodes for t in n.outputs))
        names = (d for t in tensors for d in (*(t.shape or ()), *(t.declared or ())))
        self.taken = {d for d in names if isinstance(d, str)}
        self.given = {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}

    def intern(self, *expression: object) -> str:
        """The symbol of an expression."""
        if expression not in self.symbols:
            number = len(self.symbols)
            while f"pwopt_size_{number}" in self.taken:
                number += 1
            self.taken.add(f"pwopt_size_{number}")
            self.symbols[expression] = f"pwopt_size_{number}"
        return self.symbols[expression]

    def add(self, size: Size, number: int) -> Size:
        """size + number."""
        if isinstance(size, int) or not number:
            return size + number if isinstance(size, int) else size
        base, more = self.sums.get(size, (size, 0))
        total = more + number
        if not total:
            return base
        symbol = self.intern("+", base, total)
        self.sums[symbol] = base, total
        return symbol

    def slide(self, size: Size, span: int, stride: int) -> Size:
        """The number of windows that cover `span` positions: (size − span)/stride + 1, rounded down."""
        if stride == 1:
            return self.add(size, 1 - span)
        return (size - span) // stride + 1 if isinstance(size, int) else self.intern("windows", size, span, stride)

    def add_input(self, tensor: Tensor) -> None:
        shape = self.view.shape(tensor)
        if shape is not None:
            self.sizes[tensor] = tuple(
                d
                if isinstance(d, int) or (d is not None and self.view.is_unambiguous(d))
                else self.intern(tensor, axis)
                for axis, d in enumerate(shape)
            )

    def find(self, tensor: Tensor) -> Sizes | None:
        """The sizes of a tensor that is computed, given or constant."""
        if tensor in self.sizes:
            return self.sizes[tensor]
        shape = self.view.shape(tensor)
        return tuple(d for d in shape if isinstance(d, int)) if shape is not None and _is_fixed(shape) else None

    def add_node(self, node: Node) -> None:
        """Add the sizes of all outputs of a node."""
        found = self.derive(node)
        for index, tensor in enumerate(node.outputs):
            shape = self.view.shape(tensor)
            sizes = found if index == 0 or self.view.is_a(node, "Split") else None
            if shape is None and sizes is None:
                continue
            if shape is None or (sizes is not None and len(sizes) != len(shape)):
                shape = (None,) * len(sizes or ())
            self.sizes[tensor] = tuple(
                d if isinstance(d, int)
                else sizes[axis] if sizes is not None
                else d if d is not None and d in self.given and self.view.is_unambiguous(d)
                else self.intern(tensor, axis)
                for axis, d in enumerate(shape)
            )  # fmt: skip

    def derive(self, node: Node) -> Sizes | None:
        """The sizes of the first output; None if no rule gives them. For a Split, those of all outputs."""
        op = self.view.op(node)
        rule = RULES.get(op)
        if rule is not None:
            return rule(self, node)
        if op in KEEPING and len(node.outputs) == 1:
            return self.find(node.inputs[0])
        if op in BROADCASTS and self.view.opset >= 7:
            return self.broadcast(node, [self.find(t) for t in node.inputs])
        return None

    def broadcast(self, node: Node, operands: Sequence[Sizes | None]) -> Sizes | None:
        known = [s for s in operands if s is not None]
        if len(known) < len(operands):
            return None
        rank = max(map(len, known), default=0)
        result: list[Size] = []
        for axis in range(rank):
            sizes = {s[axis - rank + len(s)] for s in known if axis - rank + len(s) >= 0} - {1}
            numbers = [d for d in sizes if isinstance(d, int)]
            if len(sizes) <= 1:
                result.append(sizes.pop() if sizes else 1)
            elif numbers:  # the symbols are this number, or 1
                result.append(numbers[0])
            else:
                result.append(self.intern(node.outputs[0], axis))
        return tuple(result)


def _is_fixed(shape: Sequence[object]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _convolve(inference: _Inference, node: Node) -> Sizes | None:
    view, x, weight = inference.view, inference.find(node.inputs[0]), inference.find(node.inputs[1])
    if x is None or weight is None or len(weight) != len(x) or not _is_fixed(weight):
        return None
    kernel = tuple(d for d in weight[2:] if isinstance(d, int))
    return _slide_windows(
        inference, node, (x[0], weight[0]), x[2:], kernel, attributes.read_spatial_attributes(view, node, kernel)
    )


def _pool(inference: _Inference, node: Node) -> Sizes | None:
    x, kernel = inference.find(node.inputs[0]), tuple(node.attrs.get("kernel_shape", ()))
    if x is None or len(kernel) != len(x) - 2 or node.attrs.get("ceil_mode", 0):
        return None
    spatial = attributes.read_spatial_attributes(inference.view, node, kernel)
    return _slide_windows(inference, node, x[:2], x[2:], kernel, spatial)


def _slide_windows(
    inference: _Inference, node: Node, first: Sizes, space: Sizes, kernel: Sequence[int], spatial: object
) -> Sizes | None:
    if isinstance(spatial, Refusal) or not isinstance(spatial, attributes.Spatial) or spatial.auto_pad:
        return None
    rank = len(kernel)
    spans = [
        d * (k - 1) + 1 - spatial.pads[a] - spatial.pads[a + rank]
        for a, (k, d) in enumerate(zip(kernel, spatial.dilations, strict=True))
    ]
    windows = zip(space, spans, spatial.strides, strict=True)
    return (*first, *(inference.slide(size, span, stride) for size, span, stride in windows))


def _pool_globally(inference: _Inference, node: Node) -> Sizes | None:
    x = inference.find(node.inputs[0])
    return None if x is None else (*x[:2], *(1,) * (len(x) - 2))


def _concat(inference: _Inference, node: Node) -> Sizes | None:
    operands, axis = [inference.find(t) for t in node.inputs], attributes.read_concat_axis(inference.view, node)
    known = [s for s in operands if s is not None]
    if axis is None or len(known) < len(operands) or len({len(s) for s in known}) != 1 or axis >= len(known[0]):
        return None
    total: Size = 0
    for sizes in known:  # at most one symbol can be added up
        size = sizes[axis]
        if isinstance(size, str) and isinstance(total, str):
            return None
        total = inference.add(size, total) if isinstance(total, int) else inference.add(total, int(size))
    return tuple(total if a == axis else known[0][a] for a in range(len(known[0])))


def _transpose(inference: _Inference, node: Node) -> Sizes | None:
    x, order = inference.find(node.inputs[0]), attributes.read_permutation(inference.view, node)
    return None if x is None or order is None or len(order) != len(x) else tuple(x[a] for a in order)


def _matmul(inference: _Inference, node: Node) -> Sizes | None:
    left, right = (inference.find(t) for t in node.inputs)
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    batch = inference.broadcast(node, [left[:-2], right[:-2]])
    return None if batch is None else (*batch, left[-2], right[-1])


def _slice(inference: _Inference, node: Node) -> Sizes | None:
    """Axes that are not cut keep their sizes."""
    x, cuts = inference.find(node.inputs[0]), attributes.read_slice_parameters(inference.view, node)
    if x is None or cuts is None:
        return None
    cut = {axis for axis, *_ in cuts}
    return tuple(inference.intern(node.outputs[0], a) if a in cut else size for a, size in enumerate(x))


def _split(inference: _Inference, node: Node) -> Sizes | None:
    """All outputs have the sizes of the input, except on an axis on which their sizes are known."""
    x, axis = inference.find(node.inputs[0]), node.attrs.get("axis", 0)
    if x is None or not -len(x) <= axis < len(x):
        return None
    numbers = all(isinstance(inference.view.dim(t, axis % len(x)), int) for t in node.outputs)
    return x if numbers else None


def _pad(inference: _Inference, node: Node) -> Sizes | None:
    x, found = inference.find(node.inputs[0]), attributes.read_pad_parameters(inference.view, node)
    if x is None or found is None or len(found[0]) != 2 * len(x):
        return None
    return tuple(inference.add(size, found[0][a] + found[0][a + len(x)]) for a, size in enumerate(x))


RULES: dict[str, Callable[[_Inference, Node], Sizes | None]] = {
    "Conv": _convolve,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _pool_globally,
    "GlobalMaxPool": _pool_globally,
    "Concat": _concat,
    "Transpose": _transpose,
    "MatMul": _matmul,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
}
