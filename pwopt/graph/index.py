"""An index of a graph that answers questions in constant time.

onnx-graphsurgeon keeps the readers of a tensor in a list that every removal searches, so 16,000 readers of one constant
would take 16,000² steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import onnx

from pwopt.algebra import Array, Values
from pwopt.algebra.summaries import is_finite
from pwopt.graph.dtypes import FLOATING
from pwopt.graph.ir import Constant, Graph, Node, Tensor, Variable, adopt, adopt_tensors, find_bodies, is_constant
from pwopt.graph.journal import Journal
from pwopt.graph.links import count_bytes_held
from pwopt.graph.model import StoredValues
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import Dim, Shape, as_fixed
from pwopt.graph.stand_ins import MICROSOFT

if TYPE_CHECKING:
    from typing_extensions import Self

#: How many operators are followed to find the one that makes a shape unknown.
MAX_EXPLAINED = 64


class GraphIndex:
    """Answers questions about a graph. `pwopt.graph.view.View` adds the edits.

    Parameters
    ----------
    graph : Graph
    sizes : mapping of tensor name to shape, optional
        Representative sizes where the shapes in the graph are dynamic. They serve costs, never proofs.
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
        bodies = find_bodies(graph.nodes)
        for body in bodies:  # which grows
            bodies += find_bodies(body.nodes)
        inner = [t for body in bodies for node in body.nodes for t in (*node.inputs, *node.outputs)]
        inner += [t for body in bodies for t in (*body.inputs, *body.outputs)]
        self._captured = {t.name for t in inner if t.name}
        self._names = {t.name for t in (*self._tensors, *graph.inputs, *inner)}.union(reserved)
        declared = [d for t in graph.inputs for d in t.shape or () if isinstance(d, str)]
        self._doubtful = {d for d in declared if declared.count(d) > 1}
        self._origin: dict[str, str] = {}

    def _index(self, graph: Graph) -> None:
        """Record the producer and the readers of every tensor."""
        self.graph = adopt(graph)
        self._position: dict[Node, tuple[int, ...]] = {node: (i,) for i, node in enumerate(graph.nodes)}
        self._nodes: dict[Node, None] = dict.fromkeys(graph.nodes)
        #: The nodes in the order of the file; None after one was added or removed.
        self._sorted: list[Node] | None = None
        self._producer: dict[Tensor, Node] = {}
        #: Bytes of all constants that a node reads, each counted once.
        self.stored = 0
        self._readers: dict[Tensor, dict[Node, None]] = {}
        self._tensors: dict[Tensor, None] = dict.fromkeys(graph.outputs)
        for node in graph.nodes:
            self._link(node)
        self._outputs = set(graph.outputs)
        self.changed = False
        #: The number of edits.
        self.edits = 0
        #: What `forms.read` found at each node since the last edit.
        self.readings: dict[Node, Any] = {}
        #: What `positions.positionwise` found at each node since the last edit.
        self.positionwise: dict[Node, bool] = {}
        #: Records what each edit changes; None if nobody asks for it.
        self.journal: Journal | None = None

    def branch(self, graph: Graph) -> Self:
        """Continue with a copy of the closed graph. Names in use, sizes and original names are copied."""
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
                self._add_reader(node, t)

    def _add_reader(self, node: Node, tensor: Tensor) -> None:
        readers = self._readers.setdefault(tensor, {})
        if not readers:
            self.stored += count_bytes_held(tensor)
        readers[node] = self._tensors[tensor] = None

    def _remove_reader(self, node: Node, tensor: Tensor) -> None:
        readers = self._readers.get(tensor, {})
        if node in readers:
            del readers[node]
            self.stored -= 0 if readers else count_bytes_held(tensor)

    def nodes(self) -> list[Node]:
        """The nodes of the graph, in the order of the file."""
        if self._sorted is None:
            self._sorted = sorted(self._nodes, key=self._position.__getitem__)
        return list(self._sorted)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def position(self, node: Node) -> tuple[int, ...]:
        """The position of a node, which can be compared, and does not change when other nodes come or go."""
        return self._position[node]

    def op(self, node: Node | None) -> str:
        """The operator's name if it is ONNX's own, else "" (unknown domains and model functions)."""
        if node is None or (node.domain and node.domain != "ai.onnx"):
            return ""
        return "" if self._functions and ("", node.op) in self._functions else node.op

    def runtime_op(self, node: Node) -> str:
        """The operator's name if it is one of onnxruntime's own domain, com.microsoft, else ""."""
        own = node.domain == MICROSOFT and (MICROSOFT, node.op) not in self._functions
        return str(node.op) if own else ""

    def is_a(self, node: Node | None, *ops: str) -> TypeGuard[Node]:
        """Whether `node` is one of ONNX's own operators of these names."""
        return self.op(node) in ops

    def producer(self, tensor: Tensor) -> Node | None:
        """The node that computes `tensor`; None for inputs and initializers."""
        return self._producer.get(tensor)

    def readers(self, tensor: Tensor) -> list[Node]:
        """The nodes that read `tensor`, each once, in the order of the file."""
        found = self._readers.get(tensor, {})
        return sorted(found, key=self.position) if len(found) > 1 else list(found)

    def is_used(self, tensor: Tensor) -> bool:
        """Whether a node reads `tensor`, or its value must stay observable."""
        return bool(self._readers.get(tensor) or self.must_keep(tensor))

    def must_keep(self, tensor: Tensor) -> str:
        """Why the value of `tensor` must stay observable, as a clause, else ""."""
        if tensor in self._outputs:
            return Reason("{!r} is a graph output", tensor.name)
        if tensor.name in self.graph.trained:
            return Reason("{!r} is used by the model's training information", tensor.name)
        return Reason("{!r} is read inside a control-flow body", tensor.name) if self.is_captured(tensor) else ""

    def is_captured(self, tensor: Tensor) -> bool:
        """Whether a control-flow body reads this tensor."""
        return tensor.name in self._captured

    def sole_reader(self, tensor: Tensor) -> Node | None:
        """The only node that reads `tensor`; None if there are several, or if the tensor must be kept."""
        readers = self._readers.get(tensor, {})
        return next(iter(readers)) if len(readers) == 1 and not self.must_keep(tensor) else None

    def other_uses(self, tensor: Tensor) -> str:
        """What uses `tensor` besides one node, as a clause, else ""."""
        count = len(self._readers.get(tensor, {}))
        return self.must_keep(tensor) or (
            Reason("the intermediate {!r} has {} consumers", tensor.name, count) if count > 1 else ""
        )

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a constant has several readers, itself or as the input of the Identity nodes before it."""
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

    def explain_unknown_shape(self, tensor: Tensor) -> str:
        """Say which operator or input makes the shape of `tensor` unknown, as a clause."""
        for _ in range(MAX_EXPLAINED):
            node = self.producer(tensor)
            if node is None:
                return Reason("the input {!r} has no declared shape; declare it", tensor.name)
            unknown = next((t for t in node.inputs if t.name and t.shape is None and not is_constant(t)), None)
            if unknown is None:
                foreign = not self.op(node)
                hint = "; declare it in value_info" if foreign else ", since it depends on values"
                return f"the output shape of {node.op} is unknown{hint}"
            tensor = unknown
        return "the rank of its input is not known"

    def dim(self, tensor: Tensor, axis: int) -> Dim:
        """One dimension; None when the shape or that dimension is unknown."""
        shape = self.shape(tensor)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def is_unambiguous(self, size: str) -> bool:
        """Whether all axes with this name have the same size. Two inputs may use one name for different sizes."""
        return size not in self._doubtful and not self._functions

    def size_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape in numbers, from the graph or else from the representative sizes; None if unknown."""
        found = as_fixed(tensor.shape)
        return as_fixed(self.sizes.get(tensor.name)) if found is None else found

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """Element type; None when unknown."""
        try:
            return None if tensor.dtype is None else np.dtype(tensor.dtype)
        except TypeError:
            return None

    def constant(self, tensor: Tensor) -> Constant | None:
        """The initializer or the value of a Constant node that `tensor` equals, also through Identity; else None."""
        for _ in range(16):
            if isinstance(tensor, Constant):
                return tensor
            if type(tensor) is not Variable and is_constant(tensor):  # a pass has just made it of the foreign class
                adopt_tensors([tensor])
                return tensor
            node = self._producer.get(tensor)
            if node is None or node.op not in ("Identity", "Constant"):
                return None
            op = self.op(node)
            if op != "Identity":
                value = node.attrs.get("value") if op == "Constant" else None
                return value if isinstance(value, Constant) else None
            tensor = node.inputs[0]
        return None

    def stored_value(self, tensor: Tensor) -> object:
        """The object that holds the value of a constant, the same in every copy of the graph; None if not constant."""
        held = self.constant(tensor)
        return None if held is None else held.stored

    def elements(self, tensor: Tensor) -> int | None:
        """Number of elements of a constant, without reading it; None if not constant."""
        held = self.constant(tensor)
        return None if held is None else math.prod(held.shape)

    def raw(self, tensor: Tensor) -> Values | None:
        """The value of a constant in the type of the model; None if not constant."""
        held = self.constant(tensor)
        return None if held is None else _load(held)

    def value(self, tensor: Tensor) -> Array | None:
        """The value of a floating-point constant in float64; None if not constant, not floating point or not finite."""
        held = self.constant(tensor)
        if held is None or held.dtype not in FLOATING:
            return None
        value = _load(held).astype(np.float64)
        return value if is_finite(value) else None

    def integers(self, tensor: Tensor) -> list[int] | None:
        """The entries of a constant integer tensor with at most one axis; None for any other tensor."""
        held = self.constant(tensor)
        if held is None or len(held.shape) > 1 or not np.issubdtype(held.dtype, np.integer):
            return None
        raw = self.raw(tensor)
        return None if raw is None else [int(v) for v in raw.reshape(-1)]

    def uniform(self, tensor: Tensor) -> float | None:
        """The number that all elements of a small floating-point constant equal, else None."""
        count = self.elements(tensor)
        if count is None or not 1 <= count <= 1 << 16:
            return None
        value = self.value(tensor)
        if value is None:
            return None
        first = float(value.flat[0])
        return first if np.all(value == first) else None

    def optional_input(self, node: Node, index: int) -> Tensor | None:
        """The input `index`; None if it is left out."""
        return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None


def _load(held: Constant) -> Values:
    """The array of a constant."""
    values = held.stored
    if isinstance(values, StoredValues):
        return values.load()
    if isinstance(values, np.ndarray):
        return values
    return np.array(onnx.numpy_helper.to_array(values.tensor))
