"""Layout propagation: a region of operators runs on its tensors in another layout.

A layout may be a permutation of axes, such as (N, C, H, W) to (N, H, W, C), or another rank, such as (N, C, L) to
(N, C, 1, L). One conversion stands at each entry of the region, and one at each exit.
"""

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

#: Computes the values of a constant when they are needed.
LoadValues = Callable[[], Values]


@dataclass(frozen=True)
class Arguments:
    """The arguments of an operator in another layout.

    Attributes
    ----------
    attrs : dict
        All attributes.
    constants : dict
        Index of an input → its new constant value.
    op : str
        The operator to use instead; "" for the same one.
    """

    attrs: dict[str, object]
    constants: dict[int, LoadValues] = field(default_factory=dict)
    op: str = ""


class Layout(Protocol):
    """Another layout of tensors."""

    @property
    def rank(self) -> int:
        """The rank of the tensors in their original layout."""

    @property
    def suffix(self) -> str:
        """Appended to the names of tensors in this layout."""

    def axis(self, axis: int) -> int | None:
        """The index of an axis in this layout; None if it has none."""

    def operand_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape that an operand of this shape needs to broadcast in the same way; None if there is none."""

    def convert(self, values: Values) -> Values:
        """Convert an operand to the shape that `operand_shape` gives."""

    def shape(self, shape: Shape) -> Shape:
        """The shape of a tensor in this layout."""

    def write_conversion(self, rw: Rewriter, source: Tensor, output: Tensor, *, enter: bool) -> list[Node]:
        """Create the operators that convert a tensor to this layout (`enter`), or back."""


G = TypeVar("G", bound=Layout)
Member = tuple[Node, G]
#: Returns a tensor in the layout of its region.
InLayout = Callable[[Tensor], Tensor]
#: Creates the operators that compute a member in the layout, with the given outputs.
Writer = Callable[[Node, G, InLayout, list[Tensor]], Sequence[Node]]


def propagate_layout(rw: Rewriter, members: Sequence[Member[G]], write: Writer[G], reason: str) -> Rewrite:
    """Run the operators of a region in another layout.

    The new operators keep the sites of the old ones, so decisions on other passes hold in every layout.

    Parameters
    ----------
    rw : Rewriter
    members : sequence of (Node, Layout)
        In an order in which they can run.
    write : callable
        Creates the operators that replace a member.
    reason : str

    Returns
    -------
    Rewrite
    """
    inside, converted = {n for n, _ in members}, dict[Tensor, Tensor]()
    records = []
    for node, layout in members:
        in_layout = _Conversions(rw, layout, converted)
        outputs = [in_layout.create(t) if t.name and rw.rank(t) == layout.rank else t for t in node.outputs]
        nodes = write(node, layout, in_layout, outputs)
        exits = [
            conversion
            for t in node.outputs
            if t in converted and (rw.must_keep(t) or any(r not in inside for r in rw.readers(t)))
            for conversion in layout.write_conversion(rw, converted[t], t, enter=False)
        ]
        records.append((node, [*in_layout.entries, *nodes, *exits]))
    for old in (t for n, _ in members for t in n.outputs if t in converted):
        rw.inherit_site(converted[old], old)
    done = [rw.replace([node], new, "") for node, new in records]
    joint = Rewrite.of(reason, done)
    became = {str(t.name): str(converted[t].name) for n, _ in members for t in n.outputs if t in converted}
    return replace(joint, became=tuple((dict(joint.became) | became).items()))


@dataclass
class _Conversions:
    """The tensors of a region in its layout, and the operators that convert those from outside."""

    rw: Rewriter
    layout: Layout
    converted: dict[Tensor, Tensor]
    entries: list[Node] = field(default_factory=list)

    def create(self, tensor: Tensor) -> Tensor:
        made = self.rw.new_variable(f"{tensor.name}{self.layout.suffix}", tensor, self.layout.shape)
        self.converted[tensor] = made
        return made

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor not in self.converted:
            self.entries += self.layout.write_conversion(self.rw, tensor, self.create(tensor), enter=True)
        return self.converted[tensor]


def rewrite_operator(
    rw: Rewriter, node: Node, arguments: Arguments, layout: Layout, in_layout: InLayout, outputs: list[Tensor]
) -> list[Node]:
    """Create the operator with its new arguments, on inputs in the layout."""
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
        elif t.name and rw.constant(t) is None and rw.rank(t) == layout.rank:
            inputs.append(in_layout(t))
        else:
            inputs.append(t)
    return [Node(arguments.op or node.op, node.name, arguments.attrs, inputs, outputs, domain=node.domain)]


def data_inputs(view: View, node: Node) -> list[Tensor]:
    """The inputs of an operator that are not constants."""
    return [t for t in node.inputs if t.name and view.constant(t) is None]


Converter = Callable[[Rewriter, G, Node], Arguments | None]


def register_in(table: dict[str, Converter[G]]) -> Callable[..., Callable[[Converter[G]], Converter[G]]]:
    """A decorator that registers a converter in `table` for the operators that it gets."""

    def converts(*ops: str) -> Callable[[Converter[G]], Converter[G]]:
        def register(converter: Converter[G]) -> Converter[G]:
            table.update(dict.fromkeys(ops, converter))
            return converter

        return register

    return converts


#: Converters for operators whose arguments depend on the layout only through its axes.
BY_AXES: dict[str, Converter[Layout]] = {}
converts = register_in(BY_AXES)


@converts("Identity", "Dropout", "Cast")
def _convert_unchanged(rw: Rewriter, layout: Layout, node: Node) -> Arguments | None:
    active = node.op == "Dropout" and not attributes.is_inactive_dropout(rw, node)
    return None if active else Arguments(dict(node.attrs))


@converts(*ELEMENTWISE, *ARITHMETIC, "Max", "Min", "Mean", "Pow", "PRelu")
def _convert_arithmetic(rw: Rewriter, layout: Layout, node: Node) -> Arguments | None:
    if rw.opset < 7 and len(node.inputs) > 1:
        return None  # broadcasting was an attribute
    constants: dict[int, LoadValues] = {}
    for i, t in enumerate(node.inputs):
        held = rw.constant(t) if t.name else None
        if held is None:
            continue
        shape = layout.operand_shape(tuple(held.shape)) if len(held.shape) <= layout.rank else None
        if shape is None:
            return None
        if shape != tuple(held.shape) or sum(d != 1 for d in shape) > 1:  # equal sizes may still change their order
            constants[i] = convert_constant(rw, layout, held)
    return Arguments(dict(node.attrs), constants) if len(node.outputs) == 1 else None


def convert_constant(rw: Rewriter, layout: Layout, held: Tensor) -> LoadValues:
    """The values of a constant operand in a layout, loaded when they are needed."""

    def numbers() -> Values:
        raw = rw.raw(held)
        assert raw is not None
        return layout.convert(raw)

    return numbers


@converts("Concat", "Split", *SOFTMAXES)
def _convert_axis(rw: Rewriter, layout: Layout, node: Node) -> Arguments | None:
    if node.op == "Concat" and any(rw.constant(t) is not None for t in node.inputs):
        return None
    default = {"Concat": 1, "Split": 0}.get(node.op, 1 if rw.opset < 13 else -1)
    axis = layout.axis(node.attrs.get("axis", default))
    return None if axis is None else Arguments({**node.attrs, "axis": axis})


@converts(*REDUCTIONS)
def _convert_reduction(rw: Rewriter, layout: Layout, node: Node) -> Arguments | None:
    axes = attributes.read_axes(rw, node)
    found = [layout.axis(a) for a in axes or ()]
    mapped = sorted({a for a in found if a is not None})
    if not mapped or None in found:
        return None
    return reduce_axes(rw, node, mapped)


def reduce_axes(rw: Rewriter, node: Node, axes: Sequence[int]) -> Arguments:
    """The arguments of a reduction over other axes."""
    if rw.opset < AXES_SINCE[node.op]:
        return Arguments({**node.attrs, "axes": list(axes)})
    return Arguments(dict(node.attrs), {1: lazy_array(axes, np.int64)})


def lazy_array(values: Iterable[float], dtype: type) -> LoadValues:
    """A function that returns a new array of these values."""
    listed = list(values)
    return lambda: np.array(listed, dtype)


@converts("Slice")
def _convert_slice(rw: Rewriter, layout: Layout, node: Node) -> Arguments | None:
    parameters = attributes.read_slice_parameters(rw, node)
    if parameters is None or len(node.inputs) < 4:
        return None
    axes, starts = [layout.axis(a) for a, *_ in parameters], rw.raw(node.inputs[1])
    if any(a is None for a in axes) or starts is None:
        return None
    return Arguments(dict(node.attrs), {3: lazy_array([a for a in axes if a is not None], starts.dtype.type)})
