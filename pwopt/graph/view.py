"""The graph while it is edited: an index that answers and changes in constant time.

onnx-graphsurgeon keeps the readers of a tensor in a list that every removal searches, so 16,000 readers of one constant
would take 16,000² steps. `View` keeps its own index. It alone changes links while a graph is edited, and writes
onnx-graphsurgeon's links once, in `close`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import onnx

from pwopt.algebra import Array, Values
from pwopt.graph.dtypes import FLOATING
from pwopt.graph.ir import Constant, Graph, Node, Tensor, Variable, adopt, adopt_node, adopt_tensors, is_constant
from pwopt.graph.journal import Journal
from pwopt.graph.links import put, relink, stored_bytes
from pwopt.graph.model import StoredValues
from pwopt.graph.shapes import Dim, Shape, ShapeChange, known

if TYPE_CHECKING:
    from typing_extensions import Self


class View:
    """Questions about a graph, and the edits that a pass may make.

    Parameters
    ----------
    graph : Graph
    sizes : mapping of tensor name to shape, optional
        Representative sizes where the graph's own shapes are dynamic; used for costs, never for proofs.
    reserved : names, optional
        Names that new tensors must not take.
    """

    def __init__(
        self,
        graph: Graph,
        sizes: Mapping[str, Sequence[int]] | None = None,
        reserved: Iterable[str] = (),
    ) -> None:
        self.sizes = dict(sizes or {})
        self.opset = int(graph.opset)
        self._functions = {(f.domain or "", f.name) for f in graph.functions}
        self._node_names = {node.name for node in graph.nodes}
        self._index(graph)
        bodies = [body for node in graph.nodes for body in node.subgraphs(recursive=True)]
        inner = [t for body in bodies for node in body.nodes for t in (*node.inputs, *node.outputs)]
        inner += [t for body in bodies for t in (*body.inputs, *body.outputs)]
        self._captured = {t.name for t in inner if t.name}
        self._names = {t.name for t in (*self._tensors, *graph.inputs, *inner)}.union(reserved)
        declared = [d for t in graph.inputs for d in t.shape or () if isinstance(d, str)]
        self._doubtful = {d for d in declared if declared.count(d) > 1}
        self._origin: dict[str, str] = {}

    def _index(self, graph: Graph) -> None:
        """Note who makes and who reads what."""
        self.graph = adopt(graph)
        self._position: dict[Node, tuple[int, ...]] = {node: (i,) for i, node in enumerate(graph.nodes)}
        self._nodes: dict[Node, None] = dict.fromkeys(graph.nodes)
        self._producer: dict[Tensor, Node] = {}
        #: Bytes of the constants that are read, each counted once.
        self.stored = 0
        self._readers: dict[Tensor, dict[Node, None]] = {}
        self._tensors: dict[Tensor, None] = dict.fromkeys(graph.outputs)
        for node in graph.nodes:
            self._link(node)
        self._outputs = set(graph.outputs)
        self.changed = False
        #: How many edits were made.
        self.edits = 0
        #: What `forms.read` found at a node; valid until the next edit.
        self.readings: dict[Node, Any] = {}
        #: Notes what each edit changes, while there is one.
        self.journal: Journal | None = None

    def branch(self, graph: Graph) -> Self:
        """A view of a copy of the graph, as it was closed: what names are taken, sizes and origins go along."""
        twin = copy.copy(self)
        twin.sizes, twin._origin = dict(self.sizes), dict(self._origin)
        twin._names, twin._node_names = set(self._names), set(self._node_names)
        twin._index(graph)
        return twin

    def _link(self, node: Node) -> None:
        for t in node.outputs:
            if t.name:
                self._producer[t] = node
                self._tensors[t] = None
        for t in node.inputs:
            if t.name:
                self._reads(node, t)

    def _reads(self, node: Node, tensor: Tensor) -> None:
        readers = self._readers.setdefault(tensor, {})
        if not readers:
            self.stored += stored_bytes(tensor)
        readers[node] = self._tensors[tensor] = None

    def _leaves(self, node: Node, tensor: Tensor) -> None:
        readers = self._readers.get(tensor, {})
        if node in readers:
            del readers[node]
            self.stored -= 0 if readers else stored_bytes(tensor)

    # Questions

    def nodes(self) -> list[Node]:
        """Nodes still in the graph, in the file's order."""
        return sorted(self._nodes, key=self.position)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def position(self, node: Node) -> tuple[int, ...]:
        """Where a node stands; comparable, and stable while others come and go."""
        return self._position[node]

    def op(self, node: Node | None) -> str:
        """The operator's name if it is ONNX's own, else "" (unknown domains and model functions)."""
        if node is None or (node.domain or "") not in ("", "ai.onnx") or ("", node.op) in self._functions:
            return ""
        return str(node.op)

    def is_a(self, node: Node | None, *ops: str) -> TypeGuard[Node]:
        """Whether `node` is one of ONNX's own operators of these names."""
        return self.op(node) in ops

    def producer(self, tensor: Tensor) -> Node | None:
        return self._producer.get(tensor)

    def readers(self, tensor: Tensor) -> list[Node]:
        """Nodes that read `tensor`, each once, in the file's order."""
        found = self._readers.get(tensor, {})
        return sorted(found, key=self.position) if len(found) > 1 else list(found)

    def must_keep(self, tensor: Tensor) -> str:
        """Why this tensor's value must stay observable, else ""."""
        if tensor in self._outputs:
            return f"{tensor.name!r} is a graph output"
        if tensor.name in self.graph.trained:
            return f"{tensor.name!r} is used by the model's training information"
        return f"{tensor.name!r} is read inside a control-flow body" if self.is_captured(tensor) else ""

    def is_captured(self, tensor: Tensor) -> bool:
        """Whether a control-flow body reads this tensor."""
        return tensor.name in self._captured

    def sole_reader(self, tensor: Tensor) -> Node | None:
        """The only observer of `tensor`, if there is just one and it is a node."""
        readers = self._readers.get(tensor, {})
        return next(iter(readers)) if len(readers) == 1 and not self.must_keep(tensor) else None

    def other_uses(self, tensor: Tensor) -> str:
        """Why `tensor` has other observers than one node, as a clause, else ""."""
        count = len(self._readers.get(tensor, {}))
        return self.must_keep(tensor) or (
            f"the intermediate {tensor.name!r} has {count} consumers" if count > 1 else ""
        )

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a constant has several readers, at any step of its way through Identity nodes."""
        while True:
            if len(self._readers.get(tensor, {})) > 1 or self.must_keep(tensor):
                return True
            node = self.producer(tensor)
            if node is None or self.op(node) != "Identity":
                return False
            tensor = node.inputs[0]

    def shape(self, tensor: Tensor) -> Shape | None:
        shape = tensor.shape
        return None if shape is None else tuple(shape)

    def rank(self, tensor: Tensor) -> int | None:
        return None if tensor.shape is None else len(tensor.shape)

    def dim(self, tensor: Tensor, axis: int) -> Dim:
        """One dimension; None when the shape or that dimension is unknown."""
        shape = self.shape(tensor)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def is_unambiguous(self, size: str) -> bool:
        """Whether all axes of this name have one size: callers may give inputs that share a name different ones."""
        return size not in self._doubtful and not self._functions

    def size_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape in numbers, from the graph or else the representative sizes."""
        for shape in (self.shape(tensor), self.sizes.get(tensor.name)):
            if shape is not None and all(isinstance(d, int) and d >= 0 for d in shape):
                return tuple(int(d) for d in shape if isinstance(d, int))
        return None

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """Element type; None when unknown."""
        try:
            return None if tensor.dtype is None else np.dtype(tensor.dtype)
        except TypeError:
            return None

    def constant(self, tensor: Tensor) -> Constant | None:
        """The tensor that holds `tensor`'s value for good: an initializer or a Constant node's, through Identity."""
        for _ in range(16):
            if isinstance(tensor, Constant):
                return tensor
            if is_constant(tensor):  # a pass has just made it of onnx-graphsurgeon's class
                adopt_tensors([tensor])
                return tensor
            node = self.producer(tensor)
            op = self.op(node)
            if node is None or (op == "Constant" and "value" not in node.attrs):
                return None
            if op == "Constant":
                value = node.attrs["value"]
                return value if isinstance(value, Constant) else None
            if op != "Identity":
                return None
            tensor = node.inputs[0]
        return None

    def stored_value(self, tensor: Tensor) -> object:
        """What holds the numbers of a constant: the same object in every copy of the graph; None if not constant."""
        held = self.constant(tensor)
        return None if held is None else held.stored

    def elements(self, tensor: Tensor) -> int | None:
        """Number of elements of a constant, without reading it; None if not constant."""
        held = self.constant(tensor)
        return None if held is None else math.prod(held.shape)

    def raw(self, tensor: Tensor) -> Values | None:
        """Value of a constant in the model's own type; None if not constant."""
        held = self.constant(tensor)
        if held is None:
            return None
        values = held.stored
        if isinstance(values, StoredValues):
            return values.load()
        if isinstance(values, np.ndarray):
            return values
        return np.array(onnx.numpy_helper.to_array(values.tensor))

    def value(self, tensor: Tensor) -> Array | None:
        """Value of a floating-point constant, in float64; None if not constant, not floating point or not finite."""
        held = self.constant(tensor)
        if held is None or held.dtype not in FLOATING:
            return None
        raw = self.raw(tensor)
        assert raw is not None
        value = raw.astype(np.float64)
        return value if np.isfinite(value).all() else None

    def integers(self, tensor: Tensor) -> list[int] | None:
        """Value of a constant integer tensor of at most one axis; None if it is not one."""
        held = self.constant(tensor)
        if held is None or len(held.shape) > 1 or not np.issubdtype(held.dtype, np.integer):
            return None
        raw = self.raw(tensor)
        return None if raw is None else [int(v) for v in raw.reshape(-1)]

    def uniform(self, tensor: Tensor) -> float | None:
        """The number that every element of a small floating-point constant equals, else None."""
        count = self.elements(tensor)
        if count is None or not 1 <= count <= 1 << 16:
            return None
        value = self.value(tensor)
        if value is None:
            return None
        first = float(value.flat[0])
        return first if np.all(value == first) else None

    def optional_input(self, node: Node, index: int) -> Tensor | None:
        """Input `index`, or None if it is left out or given as ""."""
        return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None

    # Edits

    def _edited(self) -> None:
        self.changed = True
        self.edits += 1
        self.readings.clear()

    def _note(self, node: Node | None) -> None:
        if self.journal is not None:
            self.journal.note(node)

    def _note_around(self, tensor: Tensor) -> None:
        if self.journal is not None:
            for node in (self.producer(tensor), *self.readers(tensor)):
                self.journal.note(node)

    def set_attributes(self, node: Node, **attrs: Any) -> None:
        """Let attributes of `node` have other values; None takes one away."""
        self._note(node)
        self._edited()
        node.attrs.update(attrs)
        for key in [k for k, v in attrs.items() if v is None]:
            del node.attrs[key]

    def unique_name(self, name: str) -> str:
        """`name`, or the first of name_1, name_2, … that no tensor has."""
        candidate, k = name, 0
        while candidate in self._names:
            k += 1
            candidate = f"{name}_{k}"
        self._names.add(candidate)
        return candidate

    def node_name(self, base: str, suffix: str) -> str:
        """A name for a node that stands beside one called `base`; "" if that has none. onnxruntime refuses doubles."""
        candidate, k = f"{base}{suffix}", 0
        while base and candidate in self._node_names:
            k += 1
            candidate = f"{base}{suffix}_{k}"
        self._node_names.add(candidate)
        return candidate if base else ""

    def new_constant(self, name: str, values: Values) -> Constant:
        return Constant(self.unique_name(name), np.asarray(values, order="C"))

    def release_names(self, names: Iterable[str]) -> None:
        """Let new tensors take these names, whose owners are about to be removed.

        A name that a quantisation annotation refers to is not released: it would mean other values then.
        """
        self._names.difference_update(name for name in names if name not in self.graph.annotated)

    def new_variable(self, name: str, like: Tensor, change: ShapeChange = lambda shape: shape) -> Variable:
        """A tensor of the type of `like`, and of its shape and representative size after `change`."""
        shape, size = self.shape(like), self.size_of(like)
        made = Variable(self.unique_name(name), dtype=like.dtype, shape=None if shape is None else change(shape))
        numbers = None if size is None else known(change(size))
        if numbers is not None:
            self.sizes[made.name] = numbers
        return made

    def reshape(self, tensor: Tensor, change: ShapeChange) -> None:
        """Let a tensor have another shape and representative size."""
        self._note_around(tensor)
        self._edited()
        shape, size = self.shape(tensor), self.size_of(tensor)
        tensor.shape = None if shape is None else change(shape)
        numbers = None if size is None else known(change(size))
        if numbers is not None:
            self.sizes[tensor.name] = numbers

    def original_name(self, name: str) -> str:
        """What a tensor was called before it was renamed."""
        return self._origin.get(name, name)

    def rename(self, tensor: Tensor, suffix: str) -> str:
        """A tensor whose value changes gets a new name: a name means the original's value, or nothing."""
        self._note_around(tensor)
        if self.journal is not None:
            self.journal.changed[tensor] = None
        old, first = tensor.name, self.original_name(tensor.name)
        tensor.name = self.unique_name(f"{first}{suffix}")
        self._origin[tensor.name] = first
        if old in self.sizes:
            self.sizes[tensor.name] = self.sizes[old]
        self._edited()
        return str(tensor.name)

    def add(self, node: Node, at: Node) -> Node:
        """Put `node` where `at` stands; several additions at one place keep their order."""
        adopt_node(node)
        if self.journal is not None:
            self.journal.note_new(node)
        self._position[node] = (*self._position[at], len(self._position))
        self._nodes[node] = None
        self._link(node)
        self._edited()
        return node

    def remove(self, node: Node) -> None:
        """Take a node out, and everything that only served it."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node not in self:
                continue
            self._note(node)
            del self._nodes[node]
            for t in node.outputs:
                if self._producer.get(t) is node:
                    del self._producer[t]
            for t in node.inputs:
                self._leaves(node, t)
                maker = self._producer.get(t)
                if maker is not None and all(not self._readers.get(o) and not self.must_keep(o) for o in maker.outputs):
                    pending.append(maker)
        self._edited()

    def reroute(self, old: Tensor, new: Tensor, readers: Iterable[Node] | None = None) -> None:
        """Let the given readers of `old` (default: all) read `new` instead."""
        adopt_tensors([new])
        for node in list(readers if readers is not None else self.readers(old)):
            self._note(node)
            for i, t in enumerate(node.inputs):
                if t is old:
                    put(node.inputs, i, new)
            self._leaves(node, old)
            self._reads(node, new)
        self._tensors[new] = None
        self._edited()

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Let `node` read `tensor` as its input `index`, an optional one perhaps."""
        self._note(node)
        adopt_tensors([tensor])
        old = node.inputs[index] if index < len(node.inputs) else None
        put(node.inputs, index, tensor)
        if old is not None and old not in node.inputs:
            self._leaves(node, old)
        self._reads(node, tensor)
        self._edited()

    def bypass(self, node: Node, source: Tensor, *, keep_output: bool = False) -> bool:
        """Remove a node whose first output equals `source`; False if both ends must stay visible.

        Of the two names, the source's stays, unless the output's must: it is observed, or `keep_output`.
        """
        output = node.outputs[0]
        if keep_output or self.must_keep(output):
            maker = self.producer(source)
            if maker is None or self.must_keep(source) or isinstance(source, Constant):
                return False
            self._note(maker)
            self._note(node)
            index = next(i for i, t in enumerate(maker.outputs) if t is source)
            self._unlink_output(node, 0)
            put(maker.outputs, index, output)
            del self._producer[source]
            self._producer[output] = maker
            output.shape, output.dtype = source.shape or output.shape, source.dtype or output.dtype
            self._leaves(node, source)
            self.reroute(source, output)
        else:
            self.reroute(output, source)
        self.remove(node)
        return True

    def _unlink_output(self, node: Node, index: int) -> None:
        self._producer.pop(node.outputs[index], None)
        put(node.outputs, index, Variable.empty())

    def close(self) -> None:
        """Write the index back into graphsurgeon's own links and node list."""
        if not self.changed:
            return
        relink(self.graph, self.nodes(), self._tensors, self._position.keys())
        self.changed = False
