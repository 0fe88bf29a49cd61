"""The graph that passes edit: nodes and tensors with types and identity.

onnx-graphsurgeon is the exchange format, but its classes carry no type annotations, compare field by field and cannot
be hashed. The classes here are subclasses of its own: every onnx-graphsurgeon function accepts them, a misspelt
attribute is a type error, and two nodes or tensors are equal only if they are the same object. `adopt` turns a graph
of onnx-graphsurgeon's classes into one of these, in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues as _LazyValues
from onnx_graphsurgeon.util.misc import SynchronizedList

from pwopt.algebra import Values
from pwopt.graph.shapes import Dim, Shape

if TYPE_CHECKING:
    from typing_extensions import Self

if TYPE_CHECKING:
    # Declarations for the type checker, because onnx-graphsurgeon's classes are not annotated.

    class _Node:
        def __init__(
            self,
            op: str,
            name: str | None = None,
            attrs: dict[str, Any] | None = None,
            inputs: Sequence[Tensor] | None = None,
            outputs: Sequence[Tensor] | None = None,
            domain: str | None = None,
        ) -> None: ...
        def subgraphs(self, recursive: bool = False) -> Iterator[Graph]: ...

    class _Tensor:
        def is_empty(self) -> bool: ...

    class _Variable:
        def __init__(self, name: str, dtype: Any = None, shape: Sequence[Dim] | None = None) -> None: ...

    class _Constant:
        def __init__(self, name: str, values: Values | _LazyValues, *, export_dtype: Any = None) -> None: ...

    class _Graph:
        def __init__(
            self,
            nodes: Sequence[Node] | None = None,
            inputs: Sequence[Tensor] | None = None,
            outputs: Sequence[Tensor] | None = None,
            name: str | None = None,
            doc_string: str | None = None,
            opset: int | None = None,
            import_domains: Any = None,
            *,
            functions: Sequence[Any] | None = None,
            ir_version: int | None = None,
        ) -> None: ...
        def _merge_subgraph_functions(self) -> None: ...

    class LazyValues:
        """Values of a constant that are loaded on demand."""

        tensor: onnx.TensorProto
        shape: tuple[int, ...]
        dtype: np.dtype[Any]
        nbytes: int

        def load(self) -> Values: ...

else:
    _Node, _Tensor, _Variable, _Constant, _Graph = gs.Node, gs.Tensor, gs.Variable, gs.Constant, gs.Graph
    LazyValues = _LazyValues


class Node(_Node):
    """An operator, with its attributes, inputs and outputs. Equal to itself only.

    Attributes
    ----------
    op : str
        ONNX's operator type.
    name, domain : str
    attrs : dict
        Attribute name → int, float, str, list, `Constant` or `Graph`.
    inputs, outputs : list of Tensor
        An empty optional one is a `Variable` without a name.
    replaced : tuple of Node
        The nodes that this one stands for, whose metadata it keeps (`pwopt.graph.provenance`).
    """

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    replaced: tuple[Node, ...] = ()

    if not TYPE_CHECKING:

        def __init__(self, op, name=None, attrs=None, inputs=None, outputs=None, domain=None):
            fields = self.__dict__  # directly, because onnx-graphsurgeon's __setattr__ costs more than all the rest
            fields["op"], fields["name"], fields["domain"] = op, "" if name is None else name, domain
            fields["attrs"] = {} if attrs is None else attrs
            fields["inputs"] = _link(self, "outputs", inputs or ())
            fields["outputs"] = _link(self, "inputs", outputs or ())

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _link(node: Node, field: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """A list of tensors as onnx-graphsurgeon keeps it, with `node` in the list `field` of each of them."""
    made: list[Tensor] = _new_list(node, field)
    list.extend(made, tensors)
    for tensor in made:
        list.append(getattr(tensor, field), node)
    return made


def _new_list(owner: object, field: str) -> Any:
    """An empty list of onnx-graphsurgeon's. Its constructor takes several times as long."""
    made = SynchronizedList.__new__(SynchronizedList)
    made.parent_obj, made.field_name = owner, field
    return made


class _Links:
    """A list of the nodes around a tensor that is made when it is first asked for. Most tensors never need theirs."""

    def __init__(self, name: str, field: str) -> None:
        self._name, self._field = name, field

    def __get__(self, tensor: Tensor | None, owner: object = None) -> Any:
        if tensor is None:
            return self
        made = tensor.__dict__[self._name] = _new_list(tensor, self._field)
        return made


class Tensor(_Tensor):
    """A value in a graph: a `Variable` or a `Constant`. Equal to itself only.

    Attributes
    ----------
    name : str
        "" where an optional input or output is left out.
    shape : sequence of int, str or None; or None
        A number, a symbol or None for each dimension; None if the rank is unknown.
    dtype : numpy dtype, or None
        None if the element type is unknown.
    inputs, outputs : list of Node
        The nodes that produce it and that read it, as onnx-graphsurgeon last knew them. While a graph is edited, only
        its `View` knows: ask `producer` and `readers`.
    declared : tuple of int or str, or None
        The shape that the file declares for it, if the file declares all of it or a pass has proved it.
    """

    declared: tuple[int | str, ...] | None = None
    name: str
    shape: Sequence[Dim] | None
    dtype: Any
    if TYPE_CHECKING:
        inputs: list[Node]
        outputs: list[Node]
    else:
        inputs, outputs = _Links("inputs", "outputs"), _Links("outputs", "inputs")

    def copy(self) -> Tensor:
        """The same tensor for another graph: no node reads or produces it."""
        raise NotImplementedError

    def to_constant(self, values: Values | LazyValues) -> Constant:
        """Turn this tensor into a constant, in place, and let its readers read the constant."""
        for name in ("dtype", "shape"):
            vars(self).pop(name, None)
        constant = cast(Constant, self)
        constant.__class__ = Constant
        constant._values, constant.data_location, constant._export_dtype = values, None, None
        return constant

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Variable(Tensor, _Variable):
    """A tensor whose value is known when the model runs."""

    @staticmethod
    def empty() -> Variable:
        """An optional input or output that is left out."""
        return Variable("")

    if not TYPE_CHECKING:

        def __init__(self, name, dtype=None, shape=None, type="tensor_type"):
            fields = self.__dict__
            fields["name"], fields["dtype"], fields["shape"], fields["type"] = name, dtype, shape, type

    def annotate(self, dtype: object, shape: Shape | None, declared: Shape | None) -> None:
        """Set the type, the shape and the declared shape."""
        self.__dict__.update(dtype=dtype, shape=shape, declared=declared)

    def copy(self) -> Variable:
        twin = Variable(self.name, self.dtype, self.shape)
        if self.declared is not None:
            twin.declared = self.declared
        return twin


class Constant(Tensor, _Constant):
    """A tensor whose value is stored in the model.

    Attributes
    ----------
    values : array
        Loaded when it is first read.
    """

    if TYPE_CHECKING:
        shape: tuple[int, ...]
        dtype: np.dtype[Any]
        values: Values
        data_location: int | None
        _export_dtype: Any
        _values: Values | LazyValues
    else:

        def __init__(self, name, values, data_location=None, export_dtype=None):
            if not isinstance(values, (np.ndarray, _LazyValues)):
                raise TypeError(f"the values of {name!r} are no array, but {type(values).__name__}")
            fields = self.__dict__
            fields["name"], fields["_values"] = name, values
            fields["data_location"], fields["_export_dtype"] = data_location, export_dtype

    @property
    def stored(self) -> Values | LazyValues:
        """The array, or what loads it."""
        return self._values

    @stored.setter
    def stored(self, values: Values | LazyValues) -> None:
        self._values = values

    def copy(self) -> Constant:
        return Constant(self.name, self._values, export_dtype=self._export_dtype)


class Graph(_Graph):
    """Nodes in the file's order, with the graph's inputs and outputs. Equal to itself only.

    Attributes
    ----------
    trained : frozenset of str
        Names of tensors that the model's training information updates or reads.
    annotated : frozenset of str
        Names of tensors that the model's quantisation annotations refer to.
    """

    trained: frozenset[str] = frozenset()
    annotated: frozenset[str] = frozenset()

    if TYPE_CHECKING:
        nodes: list[Node]
        inputs: list[Tensor]
        outputs: list[Tensor]
        name: str
        doc_string: str
        opset: int
        import_domains: Any
        functions: list[Any]
        ir_version: int | None

        def copy(self) -> Self: ...

    __eq__ = object.__eq__
    __hash__ = object.__hash__


_CLASSES = {gs.Node: Node, gs.Variable: Variable, gs.Constant: Constant, gs.Graph: Graph}
#: Classes of tensors that are adopted.
_ADOPTED = (gs.Variable, gs.Constant)


def is_constant(tensor: Tensor) -> TypeGuard[Constant]:
    """Whether a tensor is a constant, also one that a pass has just made of onnx-graphsurgeon's own class."""
    return isinstance(tensor, gs.Constant)


def adopt(graph: Graph | gs.Graph) -> Graph:
    """Give everything in a graph, bodies included, the classes of this module, in place.

    Parameters
    ----------
    graph : Graph or gs.Graph

    Returns
    -------
    Graph
        The same object.
    """
    pending = [graph]
    while pending:
        found = pending.pop()
        _adopt(found)
        adopt_tensors(found.inputs)
        adopt_tensors(found.outputs)
        for node in found.nodes:
            adopt_node(node)
        pending.extend(find_bodies(found.nodes))
    return cast(Graph, graph)


def find_bodies(nodes: Iterable[Node]) -> list[Graph]:
    """Find the graphs in the attributes of nodes, without those inside these graphs."""
    return [value for node in nodes for value in node.attrs.values() if isinstance(value, gs.Graph)]


def adopt_node(node: Node | gs.Node) -> Node:
    """Give a node and its tensors the classes of this module, in place."""
    if type(node) in _CLASSES:
        _adopt(node)
    for tensors in (node.inputs, node.outputs, node.attrs.values()):
        for found in tensors:
            if type(found) in _ADOPTED:
                _adopt(found)
    return cast(Node, node)


def adopt_tensors(tensors: Iterable[Tensor | gs.Tensor]) -> None:
    """Give tensors the classes of this module, in place."""
    for tensor in tensors:
        if type(tensor) in _CLASSES:
            _adopt(tensor)


def _adopt(found: object) -> None:
    """Give an object of onnx-graphsurgeon's the class of this module that corresponds to its own."""
    if type(found) in _CLASSES:
        object.__setattr__(found, "__class__", _CLASSES[type(found)])


def as_message(node: Node) -> onnx.NodeProto:
    """The node as ONNX stores it."""
    attributes = [a for key, value in node.attrs.items() if (a := _as_plain_attribute(key, value)) is not None]
    if len(attributes) == len(node.attrs):
        plain = onnx.NodeProto(op_type=node.op, attribute=attributes)
        plain.input.extend(t.name for t in node.inputs)
        plain.output.extend(t.name for t in node.outputs)
        if node.name:
            plain.name = node.name
        if node.domain is not None:
            plain.domain = node.domain
        return plain
    empty = [key for key, value in node.attrs.items() if isinstance(value, (list, tuple)) and not value]
    filled = {key: value for key, value in node.attrs.items() if key not in empty}
    same = Node(node.op, node.name, filled, domain=node.domain) if empty else node
    message: onnx.NodeProto = OnnxExporter.export_node(same)
    if empty:  # onnx-graphsurgeon finds the type of a list from its entries
        message.input.extend(t.name for t in node.inputs)
        message.output.extend(t.name for t in node.outputs)
        message.attribute.extend(onnx.AttributeProto(name=key, type=_list_type(node, key)) for key in empty)
    return message


def _as_plain_attribute(key: str, value: object) -> onnx.AttributeProto | None:
    """An attribute that holds a number, a text or a list of integers; None for any other, which needs more care."""
    kinds = onnx.AttributeProto
    if type(value) is int:
        return onnx.AttributeProto(name=key, type=kinds.INT, i=value)
    if type(value) is float:
        return onnx.AttributeProto(name=key, type=kinds.FLOAT, f=value)
    if type(value) is str:
        return onnx.AttributeProto(name=key, type=kinds.STRING, s=value.encode())
    if type(value) is list and value and all(type(v) is int for v in value):
        return onnx.AttributeProto(name=key, type=kinds.INTS, ints=value)
    return None


def _list_type(node: Node, key: str) -> onnx.AttributeProto.AttributeType:
    """The type of an attribute that is a list, in the newest version of the operator that has it; else integers."""
    for version in range(onnx.defs.onnx_opset_version(), 0, -1):
        with contextlib.suppress(onnx.defs.SchemaError):
            attribute = onnx.defs.get_schema(node.op, version, node.domain or "").attributes.get(key)
            if attribute is not None:
                return cast(onnx.AttributeProto.AttributeType, cast(Any, attribute.type).value)
    return onnx.AttributeProto.INTS
