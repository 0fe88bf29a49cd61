"""Canonicalisation, constant folding and dead code elimination."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import onnx

from pwopt.algebra import Values, zeros
from pwopt.algebra.summaries import has_nonzero
from pwopt.graph import attributes
from pwopt.graph.constants import MAX_GROWTH_BYTES, NEGLIGIBLE_BYTES, evaluate
from pwopt.graph.dtypes import is_floating
from pwopt.graph.ir import Constant, Node, Tensor
from pwopt.graph.operators import BROADCASTS, FOLDABLE, SUMS, VIEWS, WEIGHTED_OPERATORS
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import as_fixed
from pwopt.graph.values import Entries, read_entries, read_extents
from pwopt.maps import forms
from pwopt.maps.scales import adds_nothing, subtracts_from_nothing
from pwopt.maps.signed_zeros import find_zero_sensitive, is_never_negative
from pwopt.rewriting.canonical_forms import rewrite_canonically, undoes_dequantising
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: Elements of the largest float32 tensor that numpy can describe.
MAX_ELEMENTS = sys.maxsize // 4
#: Exporters write ends of a Slice from here on to mean "to the end".
FAR = 2**31 - 1

#: Operators that store the same numbers in another order, shape or type.
REARRANGING = ("Transpose", "Cast", *VIEWS)
#: Bytes of the largest Range that is stored as a constant: the positions of 8,192 tokens.
MAX_RANGE_BYTES = 1 << 16
#: Elements of the largest weight that is compared with the identity: the adjacency matrix of a graph of 1,024 nodes.
MAX_COMPARED = 1 << 20


class CleanUp(Pass):
    """f(x) = x is removed; f(constant) becomes a constant; an operator whose outputs nothing reads is removed

    * Canonicalisation: an operator has no effect if its constants prove it (×1, +0, ·I, a full Slice), if its inferred
      shapes do (a Reshape, Expand or Resize to the shape of its input), or if its readers broadcast anyway. An addition
      of zero stays where a later division distinguishes −0 from +0. A QuantizeLinear undoes the DequantizeLinear before
      it, if both have the same scale and zero point.
    * Constant folding: the operator is deterministic and its inputs are constants. The result takes at most 1 MiB, or
      no more than its inputs. onnx's reference evaluator computes it in float64. Quantised weights stay quantised.
    * Dead code elimination: no operator and no graph output reads the results. Custom operators stay, because they may
      have effects.

    Exporters leave all three behind everywhere.
    """

    name = "clean-up"

    def __init__(self) -> None:
        self._growth = MAX_GROWTH_BYTES
        self._observers: dict[Tensor, str] | None = None

    def start(self, rw: Rewriter) -> None:
        self._observers = None

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if not op:
            return None
        if not any(map(rw.is_used, node.outputs)):
            return rw.replace([node], [], "nothing reads its outputs")
        if op == "Constant":
            return rewrite_canonically(rw, node)
        reason = _explain_no_effect(rw, node, op)
        if reason:
            return self._bypass(node, rw, reason)
        if op == "Sub" and subtracts_from_nothing(rw, node):
            return self._rewrite_as_negation(node, rw)
        if op in ("Expand", "Tile", "ConstantOfShape") and _only_broadcasts(rw, node, op):
            return self._remove_broadcast(node, rw, op)
        folded = self._fold(node, rw, op) if op in FOLDABLE else None
        return folded if isinstance(folded, Rewrite) else rewrite_canonically(rw, node) or folded

    def _find_observers(self, rw: Rewriter) -> dict[Tensor, str]:
        """Tensors whose zeros an operator distinguishes by sign, with that operator.

        Computed at the first call. The rewrites of this pass do not change it.
        """
        if self._observers is None:
            self._observers = find_zero_sensitive(rw)
        return self._observers

    def _rewrite_as_negation(self, node: Node, rw: Rewriter) -> Rewrite | Skip:
        observer = self._find_observers(rw).get(node.outputs[0])
        if observer:
            return Skip(Reason("0 − x is +0 for x = +0, but −x is −0, and {} distinguishes them", observer))
        new = Node("Neg", node.name, {}, [node.inputs[1]], list(node.outputs))
        return rw.replace([node], [new], "0 − x is −x")

    def _bypass(self, node: Node, rw: Rewriter, reason: str) -> Rewrite | Skip:
        output = node.outputs[0]
        observer = None if _keeps_zeros(rw, node) else self._find_observers(rw).get(output)
        if observer and not (rw.is_a(node, "Add", "Sub") and is_never_negative(rw, _find_source(rw, node))):
            return Skip(Reason("{}, but it may turn −0 into +0, and {} distinguishes them", reason, observer))
        source = _find_source(rw, node)
        done = rw.drop(node, source, reason)
        if self._observers and source in self._observers:  # either of the two tensors may be the one that remains
            self._observers[output] = self._observers[source]
        if done is None and rw.constant(source) is not None and not rw.is_shared(source):
            raw = rw.raw(source)
            done = None if raw is None else _write_constant(rw, node, [raw])
        return done or Skip(Reason("{}, but its input and its output must both stay visible", reason))

    def _remove_broadcast(self, node: Node, rw: Rewriter, op: str) -> Rewrite | Skip:
        reason = f"{op} is not needed, because its readers broadcast"
        if op != "ConstantOfShape":
            return self._bypass(node, rw, reason)
        value = node.attrs.get("value")
        number = np.zeros((), np.float32) if value is None else np.asarray(value.values).reshape(())
        return rw.replace_by_constants(node, [number], reason)

    def _fold(self, node: Node, rw: Rewriter, op: str) -> Rewrite | Skip | None:
        sizes = as_fixed(rw.shape(node.inputs[0])) if op in ("Shape", "Size") and node.inputs else None
        constants = [rw.constant(t) for t in node.inputs if t.name]
        if sizes is not None and math.prod(sizes) < MAX_ELEMENTS:
            values = {node.inputs[0].name: np.broadcast_to(np.float32(0), sizes)}
        elif constants and all(c is not None for c in constants):
            values = {t.name: v for t in node.inputs if t.name and (v := rw.raw(t)) is not None}
        else:
            return None
        if any(v.dtype.kind not in "fiub" and not is_floating(v.dtype) for v in values.values()):
            return None
        kept = [t.name for t in node.inputs if t.name in values and rw.is_shared(t)]
        twice = next((name for name in kept if op in REARRANGING and values[name].nbytes > NEGLIGIBLE_BYTES), None)
        if twice is not None:
            return Skip(
                Reason("its value never changes, but other operators read {!r}, so it would be stored twice", twice)
            )
        growth = self._growth if op != "Range" else min(self._growth, _limit_range(rw, node))
        outputs = evaluate(node, values, rw.opset, growth, kept)
        if isinstance(outputs, str):
            return Skip(outputs)
        size = sum(v.nbytes for v in outputs)
        if size > NEGLIGIBLE_BYTES:
            self._growth -= max(0, size - sum(v.nbytes for name, v in values.items() if name not in kept))
        if any(rw.must_keep(t) for t in node.outputs):
            return _write_constant(rw, node, outputs)
        return rw.replace_by_constants(node, outputs, "its value is the same for every input")


def _write_constant(rw: Rewriter, node: Node, outputs: Sequence[Values]) -> Rewrite | None:
    """Replace an operator whose result must stay visible by a Constant."""
    if len(outputs) != 1:
        return None
    value = Constant(f"{node.outputs[0].name}_value", outputs[0])
    new = Node("Constant", node.name, {"value": value}, [], list(node.outputs))
    return rw.replace([node], [new], "its value is the same for every input")


def _only_broadcasts(rw: Rewriter, node: Node, op: str) -> bool:
    """Whether every reader of an Expand, Tile or ConstantOfShape broadcasts its input to the same shape anyway.

    Along each axis, the operator repeats nothing, or another operand of the reader has the repeated size.
    """
    output = node.outputs[0]
    wide, narrow = _find_repetition(rw, node, op)
    if rw.opset < 8 or rw.must_keep(output) or not rw.readers(output) or wide is None or narrow is None:
        return False
    return all(
        rw.op(reader) in BROADCASTS
        and sum(t is output for t in reader.inputs) == 1
        and any(_covers(read_extents(rw, t), wide, narrow) for t in reader.inputs if t is not output)
        for reader in rw.readers(output)
    )


def _limit_range(rw: Rewriter, node: Node) -> int:
    """How many bytes the constant for a Range may take.

    A Range is cheap to store as three numbers and cheap to compute. If all its readers combine it with computed
    tensors, no further constant could follow from it, and the limit is 0.
    """

    def combines(reader: Node) -> bool:
        others = (t for t in reader.inputs if t.name and t is not node.outputs[0])
        return rw.op(reader) in BROADCASTS and any(rw.constant(t) is None for t in others)

    return 0 if all(map(combines, rw.readers(node.outputs[0]))) else MAX_RANGE_BYTES


def _find_repetition(rw: Rewriter, node: Node, op: str) -> tuple[Entries | None, Entries | None]:
    """The shapes after and before a repetition, padded with leading ones to the same rank."""
    target = read_entries(rw, node.inputs[0 if op == "ConstantOfShape" else 1])
    before = () if op == "ConstantOfShape" else read_extents(rw, node.inputs[0])
    if before is None:
        return None, None
    if target is None and op == "Expand":
        after = read_extents(rw, node.outputs[0])
        return after, None if after is None else (1,) * (len(after) - len(before)) + before
    if target is None or len(target) < len(before):
        return None, None
    narrow = (1,) * (len(target) - len(before)) + before
    if op == "Tile":
        return tuple(b if t == 1 else t if b == 1 else None for t, b in zip(target, narrow, strict=True)), narrow
    return tuple(t if b == 1 else b if t == 1 or t == b else None for t, b in zip(target, narrow, strict=True)), narrow


def _covers(other: Entries | None, wide: Entries, narrow: Entries) -> bool:
    """Whether an operand has the repeated size along every axis that is repeated."""
    if other is None or len(other) < len(wide):
        return False
    pairs = zip(other[len(other) - len(wide) :], wide, narrow, strict=True)
    return all(w is not None and (w in (n, 1) or o == w) for o, w, n in pairs)


def _find_source(rw: Rewriter, node: Node) -> Tensor:
    """The tensor that a node without effect returns."""
    if rw.is_a(node, "Mul", "Add", "MatMul"):
        return next(t for t in node.inputs if rw.constant(t) is None)
    before = rw.producer(node.inputs[0])
    return before.inputs[0] if before is not None and rw.is_a(node, "QuantizeLinear") else node.inputs[0]


def _explain_no_effect(rw: Rewriter, node: Node, op: str) -> str:
    """Why the first output of a node equals its data input; "" if it may differ."""
    if any(t.name and rw.is_used(t) for t in node.outputs[1:]):
        return ""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if x is None:
        return ""
    if op == "Identity" or (op == "Dropout" and attributes.is_inactive_dropout(rw, node)):
        return f"{op} returns its input"
    if op in ("Add", "Sub"):
        return f"{op} by a constant that changes nothing" if adds_nothing(rw, node) else ""
    if op in ("Mul", "Div", "BatchNormalization"):
        reading = forms.linear(rw, node)
        step = reading.try_load() if reading is not None and reading.kind == "diagonal" else None
        same = step is not None and not step.geometry.biased and not has_nonzero(step.scale != 1)
        return f"{op} by a constant that changes nothing" if same else ""
    if op in WEIGHTED_OPERATORS:
        return f"{op} by the identity" if _is_identity(rw, node) else ""
    if op in ("Concat", "Sum", "Max", "Min", "Mean") and len(node.inputs) == 1:
        return f"{op} of one tensor"
    if op == "Split" and len(node.outputs) == 1:
        return "Split into one part"
    if op == "QuantizeLinear":
        return "QuantizeLinear undoes DequantizeLinear" if undoes_dequantising(rw, node) else ""
    if op == "Cast":
        to = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]) if node.attrs.get("to") else None
        return "Cast to the type of its input" if to is not None and rw.dtype(x) == to else ""
    if op == "Transpose":
        perm = attributes.read_permutation(rw, node)
        return "Transpose that keeps the order of the axes" if perm is not None and perm == sorted(perm) else ""
    if op == "Pad":
        found = attributes.read_pad_parameters(rw, node)
        return "Pad by zero positions" if found is not None and not any(found[0]) else ""
    if op == "Slice":
        return _explain_full_slice(rw, node, x)
    if op in ("Resize", "Upsample"):
        return _explain_same_size(rw, node, x, y)
    if op in ("AveragePool", "MaxPool"):
        unpadded = not any(node.attrs.get("pads", ())) and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        single = all(v == 1 for v in (*node.attrs["kernel_shape"], *node.attrs.get("strides", ())))
        return f"{op} of single elements" if unpadded and single else ""
    before, after = read_extents(rw, x), read_extents(rw, y)
    if before is None or after is None or len(before) != len(after):
        return ""
    if op in ("Reshape", "Flatten"):
        return f"{op} to the shape of its input" if attributes.is_same_shape(before, after) else ""
    if op in ("Expand", "Tile"):
        return f"{op} to the shape of its input" if before == after else ""
    if op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        axes = attributes.read_axes(rw, node)
        single = axes is not None and bool(axes) and all(before[a] == 1 for a in axes)
        return f"{op} over axes of size 1" if single and node.attrs.get("keepdims", 1) else ""
    return ""


def _keeps_zeros(rw: Rewriter, node: Node) -> bool:
    """Whether a node without effect also keeps the sign of zeros."""
    addition = adds_nothing(rw, node)
    if addition is not None:
        return zeros.keeps(addition[1])
    if rw.is_a(node, "Resize", "Upsample"):
        return node.attrs.get("mode", "nearest") in ("nearest", b"nearest")
    return not rw.is_a(node, *SUMS)


def _is_identity(rw: Rewriter, node: Node) -> bool:
    """Whether a convolution or product maps every channel to itself (the adjacency matrix of isolated nodes does)."""
    reading = forms.linear(rw, node)
    if reading is None or reading.geometry.weights > MAX_COMPARED or not reading.geometry.pointwise:
        return False
    g = reading.geometry
    if g.biased or g.in_channels != g.out_channels:
        return False
    raw = None if reading.weight is None or reading.kind == "gemm" else rw.raw(reading.weight)  # a Gemm has a factor
    if raw is not None and raw.flat[0] != 1:
        return False
    linear = reading.try_load()
    if linear is None:
        return False
    width = g.in_channels // g.groups
    return bool(np.all(linear.weight.reshape(g.groups, width, width) == np.eye(width)))


def _explain_full_slice(rw: Rewriter, node: Node, x: Tensor) -> str:
    parameters = attributes.read_slice_parameters(rw, node)
    if not parameters:
        return ""
    for axis, start, end, step in parameters:
        size = rw.dim(x, axis)
        to_end = end >= FAR or (isinstance(size, int) and end >= size)
        from_start = start == 0 or (isinstance(size, int) and start <= -size)
        if step != 1 or not to_end or not from_start:
            return ""
    return "Slice that keeps everything"


def _explain_same_size(rw: Rewriter, node: Node, x: Tensor, y: Tensor) -> str:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return ""
    before, after = rw.shape(x), rw.shape(y)
    if attributes.is_resized_by_sizes(rw, node):
        return f"{node.op} to the size of its input" if as_fixed(before) is not None and before == after else ""
    scales = attributes.read_resize_scales(rw, node)
    return f"{node.op} by a factor of 1" if scales is not None and all(s == 1 for s in scales.values()) else ""
