"""What a model computes twice, or stores twice, is there once."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from pwopt.algebra import Values
from pwopt.graph.constants import NEGLIGIBLE_BYTES
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import RANDOM
from pwopt.graph.provenance import credit
from pwopt.rewriting.driver import Pass, Rewriter, describe
from pwopt.rewriting.records import Rewrite, Skip


class MergeEqual(Pass):
    """f(x), f(x) = f(x) read twice: common subexpressions

    For operators of ONNX's own that are not random, with the same attributes and the same inputs; small constants are
    the same if their values are. Exporters write Shape and Gather anew at each place, and code calls the same layer
    twice on the same tensor. (onnx_ir has such a pass; docs/architecture.md says why it is not this one.)
    """

    name = "merge-equal"
    context = 1  # the operator that stays is no part of what changes

    def start(self, rw: Rewriter) -> None:
        self._first: dict[Hashable, Node] = {}
        self._small: dict[int, Hashable] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        inputs = [self._identity(rw, t) for t in node.inputs]
        attrs = _frozen(node)
        if not op or op in RANDOM or op == "Constant" or not inputs or attrs is None:
            return None
        given = tuple(bool(t.name) for t in node.outputs)
        key = (op, attrs, tuple(inputs), given)
        other = self._first.get(key)
        if other is None or other is node or other not in rw or self._changed(rw, other, key):
            self._first[key] = node
            return None
        first, second = sorted((other, node), key=rw.position)
        self._first[key] = first
        return _merge(rw, first, second)

    def _changed(self, rw: Rewriter, other: Node, key: tuple[Hashable, ...]) -> bool:
        """Whether a node that was noted under a key is another one since."""
        inputs = tuple(self._identity(rw, t) for t in other.inputs)
        return (rw.op(other), _frozen(other), inputs, tuple(bool(t.name) for t in other.outputs)) != key

    def _identity(self, rw: Rewriter, tensor: Tensor) -> Hashable:
        """Equal for tensors of the same value."""
        held = rw.constant(tensor) if tensor.name else None
        if held is None:
            return tensor if tensor.name else None
        if id(held) not in self._small:
            small = (rw.elements(held) or 0) * np.dtype(held.dtype).itemsize <= NEGLIGIBLE_BYTES
            raw = rw.raw(held) if small and np.dtype(held.dtype).kind != "O" else None
            self._small[id(held)] = id(held) if raw is None else (str(raw.dtype), raw.shape, raw.tobytes())
        return self._small[id(held)]


def _frozen(node: Node) -> Hashable | None:
    """A node's attributes as something to compare; None if there is a tensor or a graph among them."""
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
    if any(rw.must_keep(b) for _, b in pairs) and (len(pairs) > 1 or rw.must_keep(pairs[0][0])):
        return Skip(f"{reason}, but both results must stay visible")
    removed, around = (describe(second),), [r for _, b in pairs for r in rw.readers(b)]
    credit(first, [second])
    if len(pairs) == 1:
        rw.bypass(second, pairs[0][0])
    else:
        for a, b in pairs:
            rw.reroute(b, a)
        rw.remove(second)
    for reader in around:
        rw.enqueue_around(reader)
    return Rewrite(reason, removed, became=tuple((b.name, a.name) for a, b in pairs))


class ShareConstants(Pass):
    """w, w = w read twice: equal initializers

    Last of all, since a weight that is shared folds nowhere; what folds has gone into others by then.
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
            if first is not tensor and np.array_equal(_bits(rw.raw(first)), _bits(raw)):
                rw.reroute(tensor, first, [node])
                shared.append(first.name)
        return Rewrite(f"it reads {', '.join(map(repr, shared))}, which holds the same") if shared else None


def _bits(values: Values | None) -> Values:
    """Values as they are stored: zeros have signs, and no NaN equals itself."""
    assert values is not None
    return np.frombuffer(values.tobytes(), np.uint8)
