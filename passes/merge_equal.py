"""Common subexpression elimination and constant deduplication."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from pwopt.algebra import Values
from pwopt.graph.constants import NEGLIGIBLE_BYTES
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import MOVES, RANDOM
from pwopt.graph.provenance import credit
from pwopt.graph.reasons import Reason
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip


class MergeEqual(Pass):
    """f(x), f(x) = f(x) read twice

    Common subexpression elimination.

    * The operators belong to ONNX itself, are not random, and have the same attributes and inputs. Two small constants
      are the same input if their values are equal. Inputs that are left out at the end do not count.
    * If both results must stay visible, one becomes an Identity of the other, unless the operator only moves numbers.

    Exporters write the same Shape and Gather anew at each place, and code calls the same layer twice on a tensor.
    docs/architecture.md says why pwopt does not use the pass of onnx_ir.
    """

    name = "merge-equal"
    context = 1  # the operator that remains is not part of the change

    def start(self, rw: Rewriter) -> None:
        self._first: dict[Hashable, Node] = {}
        self._small: dict[Tensor, Hashable] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        inputs = self._identities(rw, node)
        attrs = _freeze_attributes(node)
        if not op or op in RANDOM or op == "Constant" or not inputs or attrs is None:
            return None
        key = (op, attrs, tuple(inputs), tuple(bool(t.name) for t in node.outputs))
        other = self._first.get(key)
        if other is None or other is node or other not in rw or self._has_changed(rw, other, key):
            self._first[key] = node
            return None
        first, second = sorted((other, node), key=rw.position)
        self._first[key] = first
        return _merge(rw, first, second)

    def _has_changed(self, rw: Rewriter, other: Node, key: tuple[Hashable, ...]) -> bool:
        """Whether a node has changed since it was recorded under a key."""
        inputs = tuple(self._identities(rw, other))
        return (rw.op(other), _freeze_attributes(other), inputs, tuple(bool(t.name) for t in other.outputs)) != key

    def _identities(self, rw: Rewriter, node: Node) -> list[Hashable]:
        """The keys of the inputs, without those that are left out at the end."""
        keys = [self._identity(rw, t) for t in node.inputs]
        while keys and keys[-1] is None:
            del keys[-1]
        return keys

    def _identity(self, rw: Rewriter, tensor: Tensor) -> Hashable:
        """A key that is equal for tensors with equal values."""
        constant = rw.constant(tensor) if tensor.name else None
        if constant is None:
            return tensor if tensor.name else None
        if constant not in self._small:
            small = (rw.elements(constant) or 0) * np.dtype(constant.dtype).itemsize <= NEGLIGIBLE_BYTES
            raw = rw.raw(constant) if small and np.dtype(constant.dtype).kind != "O" else None
            self._small[constant] = constant if raw is None else (str(raw.dtype), raw.shape, raw.tobytes())
        return self._small[constant]


def _freeze_attributes(node: Node) -> Hashable | None:
    """The attributes of a node in hashable form; None if one is a graph or a large tensor."""
    frozen = []
    for name, value in sorted(node.attrs.items()):
        if isinstance(value, Constant) and value.values.nbytes <= NEGLIGIBLE_BYTES:
            value = (str(value.values.dtype), value.values.shape, value.values.tobytes())
        elif isinstance(value, list) and all(isinstance(v, (int, float, str, bytes)) for v in value):
            value = tuple(value)
        elif not isinstance(value, (int, float, str, bytes)):
            return None
        frozen.append((name, repr(value)))
    return tuple(frozen)


def _merge(rw: Rewriter, first: Node, second: Node) -> Rewrite | Skip:
    reason = f"{describe(first)} computes the same"
    pairs = [(a, b) for a, b in zip(first.outputs, second.outputs, strict=True) if a.name]
    visible = [(a, b) for a, b in pairs if rw.must_keep(b)]
    if visible and (len(pairs) > 1 or rw.must_keep(pairs[0][0])):
        return _merge_visible(rw, pairs, visible, second, reason)
    removed, readers = (describe(second),), [r for _, b in pairs for r in rw.readers(b)]
    credit(first, [second])
    if len(pairs) == 1:
        rw.bypass(second, pairs[0][0])
    else:
        for a, b in pairs:
            rw.reroute(b, a)
        rw.remove(second)
    for reader in readers:
        rw.enqueue(reader)  # its inputs are others now, unlike those of its neighbours
    return Rewrite(reason, removed, became=tuple((b.name, a.name) for a, b in pairs))


def _merge_visible(
    rw: Rewriter, pairs: list[tuple[Tensor, Tensor]], visible: list[tuple[Tensor, Tensor]], second: Node, reason: str
) -> Rewrite | Skip:
    """Copy results that must stay visible, and let the readers of the others read the first operator."""
    moves = second.op in MOVES
    read = [(a, b) for a, b in pairs if rw.readers(b) and (a, b) not in visible]
    if moves and not read:
        return Skip(Reason("{}, but both results must stay visible", reason))
    around = [r for _, b in read for r in rw.readers(b)]
    for a, b in read:
        rw.reroute(b, a)
    for reader in around:
        rw.enqueue(reader)
    if moves:
        return Rewrite(reason, became=tuple((b.name, a.name) for a, b in read))
    copies = [
        Node("Identity", rw.node_name(second.name, f"_copy{i}"), {}, [a], [b]) for i, (a, b) in enumerate(visible)
    ]
    return rw.replace([second], copies, Reason("{}; the result that must stay visible is a copy", reason))


class ShareConstants(Pass):
    """w, w = w read twice

    Constant deduplication: equal weights are stored once. It runs last, because no pass folds a shared weight.
    """

    name = "share-constants"
    phase = "late"

    def start(self, rw: Rewriter) -> None:
        self._first: dict[Hashable, Constant] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if not rw.op(node):
            return None
        shared = []
        for tensor in dict.fromkeys(t for t in node.inputs if isinstance(t, Constant)):
            raw = rw.raw(tensor)
            if raw is None or raw.nbytes <= NEGLIGIBLE_BYTES or raw.dtype.kind == "O" or rw.must_keep(tensor):
                continue
            key = (str(raw.dtype), raw.shape, hash(raw.tobytes()))
            first = self._first.setdefault(key, tensor)
            if first is not tensor and np.array_equal(_view_as_bytes(rw.raw(first)), _view_as_bytes(raw)):
                rw.reroute(tensor, first, [node])
                shared.append(first.name)
        return Rewrite(Reason("it reads {}, which holds equal values", Reason.list_names(shared))) if shared else None


def _view_as_bytes(values: Values | None) -> Values:
    """The stored bytes. Comparing them distinguishes the signs of zeros, and finds NaNs equal to themselves."""
    assert values is not None
    return np.frombuffer(values.tobytes(), np.uint8)
