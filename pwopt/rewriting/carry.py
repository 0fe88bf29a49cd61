"""Regions of operators that run on another view of their tensors: one change at each way in, one at each way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from pwopt.algebra import Values
from pwopt.graph import attributes
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import ARITHMETIC, AXES_SINCE, ELEMENTWISE, REDUCTIONS, SOFTMAXES
from pwopt.graph.shapes import Shape
from pwopt.graph.view import View
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.records import Rewrite

Numbers = Callable[[], Values]


@dataclass(frozen=True)
class Arguments:
    """What an operator says once its data is seen otherwise: attributes, constant inputs by index, another name."""

    attrs: dict[str, object]
    constants: dict[int, Numbers] = field(default_factory=dict)
    op: str = ""


class Guise(Protocol):
    """How the tensors of a region are seen, such as (N, C, L) as (N, C, 1, L), or (N, C, H, W) as (N, H, W, C)."""

    @property
    def rank(self) -> int:
        """Of the tensors as they are."""

    @property
    def suffix(self) -> str:
        """Behind the names of tensors that are seen so."""

    def axis(self, axis: int) -> int | None:
        """Where an axis is; None if nowhere."""

    def operand(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape in which a constant broadcasts as before; None if there is none."""

    def turned(self, values: Values) -> Values:
        """A constant in that shape."""

    def shape(self, shape: Shape) -> Shape:
        """What becomes of a tensor's shape."""

    def change(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        """The operators on the way in, or out."""


G = TypeVar("G", bound=Guise)
Member = tuple[Node, G]
#: Sees a tensor as its region does.
See = Callable[[Tensor], Tensor]
#: The operators that compute, on tensors as they are seen, what a member computes; given its outputs.
Writer = Callable[[Node, G, See, list[Tensor]], Sequence[Node]]


def carry(rw: Rewriter, members: Sequence[Member[G]], write: Writer[G], reason: str) -> Rewrite:
    """Run these operators, in an order in which they can run, on their tensors as the region sees them."""
    inside, made = {n for n, _ in members}, dict[Tensor, Tensor]()
    records = []
    for node, guise in members:
        seen = _Seen(rw, guise, made)
        outputs = [seen.name(t) if t.name and rw.rank(t) == guise.rank else t for t in node.outputs]
        nodes = write(node, guise, seen, outputs)
        left = [
            change
            for t in node.outputs
            if t in made and (rw.must_keep(t) or any(r not in inside for r in rw.readers(t)))
            for change in guise.change(rw, made[t], t, enter=False)
        ]
        records.append((node, [*seen.entered, *nodes, *left]))
    done = [rw.replace([node], new, "") for node, new in records]
    joint = Rewrite.of(reason, done)
    carried = {str(t.name): str(made[t].name) for n, _ in members for t in n.outputs if t in made}
    return replace(joint, became=tuple((dict(joint.became) | carried).items()))


@dataclass
class _Seen:
    """Tensors as a region sees them, and the operators that bring in those from outside."""

    rw: Rewriter
    guise: Guise
    made: dict[Tensor, Tensor]
    entered: list[Node] = field(default_factory=list)

    def name(self, tensor: Tensor) -> Tensor:
        made = self.rw.new_variable(f"{tensor.name}{self.guise.suffix}", tensor, self.guise.shape)
        self.made[tensor] = made
        return made

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor not in self.made:
            self.entered += self.guise.change(self.rw, tensor, self.name(tensor), enter=True)
        return self.made[tensor]


def rewritten(
    rw: Rewriter, node: Node, arguments: Arguments, guise: Guise, see: See, outputs: list[Tensor]
) -> list[Node]:
    """The operator with its new arguments."""
    inputs: list[Tensor] = []
    constants: dict[Tensor, Constant] = {}
    for i, t in enumerate(node.inputs):
        if i in arguments.constants and t in constants:
            inputs.append(constants[t])
        elif i in arguments.constants:
            values = arguments.constants[i]()
            names = [t.name] if t.name and rw.sole_reader(t) is node else []
            rw.release_names(names)
            name = t.name if names else f"{node.outputs[0].name}_argument{i}"
            inputs.append(constants.setdefault(t, rw.new_constant(name, values)))
        elif t.name and rw.constant(t) is None and rw.rank(t) == guise.rank:
            inputs.append(see(t))
        else:
            inputs.append(t)
    return [Node(arguments.op or node.op, node.name, arguments.attrs, inputs, outputs, domain=node.domain)]


def data(view: View, node: Node) -> list[Tensor]:
    """What an operator computes from, other than constants."""
    return [t for t in node.inputs if t.name and view.constant(t) is None]


Converter = Callable[[Rewriter, G, Node], Arguments | None]


def registry(table: dict[str, Converter[G]]) -> Callable[..., Callable[[Converter[G]], Converter[G]]]:
    """A decorator that notes in `table` for which operators a converter is."""

    def converts(*ops: str) -> Callable[[Converter[G]], Converter[G]]:
        def register(converter: Converter[G]) -> Converter[G]:
            table.update(dict.fromkeys(ops, converter))
            return converter

        return register

    return converts


#: What operators say that know of no more than axes: the same for every guise.
BY_AXES: dict[str, Converter[Guise]] = {}
converts = registry(BY_AXES)


@converts("Identity", "Dropout", "Cast")
def _unchanged(rw: Rewriter, guise: Guise, node: Node) -> Arguments | None:
    active = node.op == "Dropout" and not attributes.inactive_dropout(rw, node)
    return None if active else Arguments(dict(node.attrs))


@converts(*ELEMENTWISE, *ARITHMETIC, "Max", "Min", "Mean", "Pow", "PRelu")
def _arithmetic(rw: Rewriter, guise: Guise, node: Node) -> Arguments | None:
    if rw.opset < 7 and len(node.inputs) > 1:
        return None  # broadcasting was an attribute
    constants: dict[int, Numbers] = {}
    for i, t in enumerate(node.inputs):
        held = rw.constant(t) if t.name else None
        if held is None:
            continue
        shape = guise.operand(tuple(held.shape)) if len(held.shape) <= guise.rank else None
        if shape is None:
            return None
        if shape != tuple(held.shape):
            constants[i] = turned(rw, guise, held)
    return Arguments(dict(node.attrs), constants) if len(node.outputs) == 1 else None


def turned(rw: Rewriter, guise: Guise, held: Tensor) -> Numbers:
    def numbers() -> Values:
        raw = rw.raw(held)
        assert raw is not None
        return guise.turned(raw)

    return numbers


@converts("Concat", "Split", *SOFTMAXES)
def _along_axis(rw: Rewriter, guise: Guise, node: Node) -> Arguments | None:
    if node.op == "Concat" and any(rw.constant(t) is not None for t in node.inputs):
        return None
    default = {"Concat": 1, "Split": 0}.get(node.op, 1 if rw.opset < 13 else -1)
    axis = guise.axis(node.attrs.get("axis", default))
    return None if axis is None else Arguments({**node.attrs, "axis": axis})


@converts(*REDUCTIONS)
def _reduction(rw: Rewriter, guise: Guise, node: Node) -> Arguments | None:
    axes = attributes.axes_of(rw, node)
    found = [guise.axis(a) for a in axes or ()]
    mapped = sorted({a for a in found if a is not None})
    if not mapped or None in found:
        return None
    return along(rw, node, mapped)


def along(rw: Rewriter, node: Node, axes: Sequence[int]) -> Arguments:
    """A reduction over other axes."""
    if rw.opset < AXES_SINCE[node.op]:
        return Arguments({**node.attrs, "axes": list(axes)})
    return Arguments(dict(node.attrs), {1: array(axes, np.int64)})


def array(values: Iterable[float], dtype: type) -> Numbers:
    listed = list(values)
    return lambda: np.array(listed, dtype)


@converts("Slice")
def _slice(rw: Rewriter, guise: Guise, node: Node) -> Arguments | None:
    parameters = attributes.slice_parameters(rw, node)
    if parameters is None or len(node.inputs) < 4:
        return None
    axes, starts = [guise.axis(a) for a, *_ in parameters], rw.raw(node.inputs[1])
    if any(a is None for a in axes) or starts is None:
        return None
    return Arguments(dict(node.attrs), {3: array([a for a in axes if a is not None], starts.dtype.type)})
