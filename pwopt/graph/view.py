"""The graph while it is edited.

While a graph is edited, only `View` changes the links between nodes and tensors. It updates its index in constant time,
and `close` writes the links of onnx-graphsurgeon once at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pwopt.algebra import Values
from pwopt.graph.index import GraphIndex
from pwopt.graph.ir import Constant, Node, Tensor, Variable, adopt_node, adopt_tensors
from pwopt.graph.links import put, relink
from pwopt.graph.shapes import ShapeChange, as_fixed


class View(GraphIndex):
    """Questions about a graph, and the edits that a pass may make."""

    def _mark_edited(self) -> None:
        self.changed = True
        self.edits += 1
        self.readings.clear()
        self.positionwise.clear()

    def _note(self, node: Node | None) -> None:
        if self.journal is not None:
            self.journal.note(node)

    def _note_around(self, tensor: Tensor) -> None:
        if self.journal is not None:
            for node in (self.producer(tensor), *self.readers(tensor)):
                self.journal.note(node)

    def set_attributes(self, node: Node, **attrs: Any) -> None:
        """Set attributes of `node`; None removes one."""
        self._note(node)
        self._mark_edited()
        node.attrs.update(attrs)
        for key in [k for k, v in attrs.items() if v is None]:
            del node.attrs[key]

    def unique_name(self, name: str) -> str:
        """Reserve `name`, or the first of name_1, name_2, … that no tensor has."""
        candidate, k = name, 0
        while candidate in self._names:
            k += 1
            candidate = f"{name}_{k}"
        self._names.add(candidate)
        return candidate

    def node_name(self, base: str, suffix: str) -> str:
        """Reserve a name for a node beside the one called `base`; "" if that has none. Names must be unique."""
        candidate, k = f"{base}{suffix}", 0
        while base and candidate in self._node_names:
            k += 1
            candidate = f"{base}{suffix}_{k}"
        self._node_names.add(candidate)
        return candidate if base else ""

    def new_constant(self, name: str, values: Values) -> Constant:
        """Create a constant with this name, or with one derived from it if it is taken."""
        return Constant(self.unique_name(name), np.asarray(values, order="C"))

    def release_names(self, names: Iterable[str]) -> None:
        """Let new tensors take these names, whose owners are about to be removed.

        A name that a quantisation annotation refers to is not released: it would mean other values then.
        """
        self._names.difference_update(name for name in names if name not in self.graph.annotated)

    def new_variable(self, name: str, like: Tensor, change: ShapeChange = lambda shape: shape) -> Variable:
        """Create a tensor with the type of `like`, and with its shape and representative size after `change`."""
        shape, size = self.shape(like), self.size_of(like)
        made = Variable(self.unique_name(name), dtype=like.dtype, shape=None if shape is None else change(shape))
        numbers = None if size is None else as_fixed(change(size))
        if numbers is not None:
            self.sizes[made.name] = numbers
        return made

    def reshape(self, tensor: Tensor, change: ShapeChange) -> None:
        """Change the shape and the representative size of a tensor."""
        self._note_around(tensor)
        self._mark_edited()
        shape, size = self.shape(tensor), self.size_of(tensor)
        tensor.shape, tensor.declared = None if shape is None else change(shape), None
        numbers = None if size is None else as_fixed(change(size))
        if numbers is not None:
            self.sizes[tensor.name] = numbers

    def declare_shape(self, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
        """Write a shape into the file; equal symbols are equal sizes in every run."""
        self._mark_edited()
        tensor.declared = shape

    def original_name(self, name: str) -> str:
        """The name that a tensor had before it was renamed, or before its layout changed."""
        return self._origin.get(name, name)

    def inherit_site(self, tensor: Tensor, old: Tensor) -> None:
        """Let a new tensor stand at the site of an old one, because it has the same numbers in another layout."""
        self._origin[str(tensor.name)] = self.original_name(str(old.name))

    def rename(self, tensor: Tensor, suffix: str) -> str:
        """Give a new name to a tensor whose value changes: a name always means the value in the original."""
        self._note_around(tensor)
        if self.journal is not None:
            self.journal.changed.setdefault(tensor, str(tensor.name))
        old, first = tensor.name, self.original_name(tensor.name)
        tensor.name, tensor.declared = self.unique_name(f"{first}{suffix}"), None
        self._origin[tensor.name] = first
        if old in self.sizes:
            self.sizes[tensor.name] = self.sizes[old]
        self._mark_edited()
        return str(tensor.name)

    def add(self, node: Node, at: Node) -> Node:
        """Insert `node` at the position of `at`; several insertions at one position keep their order."""
        adopt_node(node)
        if self.journal is not None:
            self.journal.note_new(node)
        self._position[node] = (*self._position[at], len(self._position))
        self._nodes[node], self._sorted = None, None
        self._link(node)
        self._mark_edited()
        return node

    def remove(self, node: Node) -> None:
        """Remove a node, and every node before it whose outputs nothing uses any more."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node not in self:
                continue
            self._note(node)
            del self._nodes[node]
            self._sorted = None
            for t in node.outputs:
                if self._producer.get(t) is node:
                    del self._producer[t]
            for t in node.inputs:
                self._remove_reader(node, t)
                maker = self._producer.get(t)
                if maker is not None and all(not self._readers.get(o) and not self.must_keep(o) for o in maker.outputs):
                    pending.append(maker)
        self._mark_edited()

    def reroute(self, old: Tensor, new: Tensor, readers: Iterable[Node] | None = None) -> None:
        """Make the given readers of `old` (default: all) read `new` instead."""
        adopt_tensors([new])
        for node in list(readers if readers is not None else self.readers(old)):
            self._note(node)
            for i, t in enumerate(node.inputs):
                if t is old:
                    put(node.inputs, i, new)
            self._remove_reader(node, old)
            self._add_reader(node, new)
        self._tensors[new] = None
        self._mark_edited()

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make `tensor` the input `index` of `node`; an optional input may be missing so far."""
        self._note(node)
        adopt_tensors([tensor])
        old = node.inputs[index] if index < len(node.inputs) else None
        put(node.inputs, index, tensor)
        if old is not None and old not in node.inputs:
            self._remove_reader(node, old)
        self._add_reader(node, tensor)
        self._mark_edited()

    def bypass(self, node: Node, source: Tensor, *, keep_output: bool = False) -> bool:
        """Remove a node whose first output equals `source`.

        Parameters
        ----------
        node : Node
        source : Tensor
        keep_output : bool
            Whether the name of the output remains. Otherwise the name of the source remains, unless the output must be
            kept.

        Returns
        -------
        bool
            False if both tensors must be kept. Nothing is changed then.
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
            self._remove_reader(node, source)
            self.reroute(source, output)
        else:
            self.reroute(output, source)
        self.remove(node)
        return True

    def _unlink_output(self, node: Node, index: int) -> None:
        self._producer.pop(node.outputs[index], None)
        put(node.outputs, index, Variable.empty())

    def close(self) -> None:
        """Write the node list and the links of onnx-graphsurgeon from the index."""
        if not self.changed:
            return
        relink(self.graph, self.nodes(), self._tensors, self._position.keys())
        self.changed = False
