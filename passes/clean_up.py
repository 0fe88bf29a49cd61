"""Remove what does nothing, and compute what never changes."""

from __future__ import annotations

import math
import sys

import numpy as np
import onnx

from pwopt.algebra import zeros
from pwopt.algebra.geometry import Refusal
from pwopt.algebra.linear import LinearMap
from pwopt.graph import attributes
from pwopt.graph.constants import MAX_GROWTH_BYTES, NEGLIGIBLE_BYTES, evaluate
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import known
from pwopt.graph.values import Entries, entries, extents
from pwopt.maps import forms
from pwopt.maps.scales import adds_nothing, subtracts_from_nothing
from pwopt.maps.signed_zeros import told_apart
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: Elements of the largest tensor that numpy can describe in 4 bytes each.
LARGEST = sys.maxsize // 4
#: Ends of a Slice from here on mean "to the end", as exporters write it.
FAR = 2**31 - 1

#: Deterministic operators whose result on constants is a constant.
FOLDABLE = frozenset(
    """Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Exp Expand Flatten Floor Gather GatherElements
    GatherND Greater GreaterOrEqual Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Range Reciprocal
    ReduceMax ReduceMin ReduceProd ReduceSum Reshape Shape Size Slice Split Sqrt Squeeze Sub Tile Transpose
    Unsqueeze Where Xor""".split()  # noqa: SIM905
)


#: Operators that store the same numbers otherwise.
REARRANGING = ("Transpose", "Cast", *attributes.VIEWS)
#: Operators of the same result whether an operand is broadcast before them or by them.
BROADCASTING = frozenset(
    """Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where
    Xor""".split()  # noqa: SIM905
)
#: Bytes of the largest Range that is written out: positions of 8,192 tokens.
MAX_RANGE_BYTES = 1 << 16
#: Elements of the largest weight that is compared with the identity: an adjacency of a thousand nodes.
MAX_COMPARED = 1 << 20
#: Operators that may begin a sum with +0: onnx says neither where a sum starts nor in which order it goes on.
SUMS = frozenset({*forms.WEIGHTED_OPS, "AveragePool", "BatchNormalization", "ReduceMean", "ReduceSum"})


class CleanUp(Pass):
    """f(x) = x disappears; f(constant) becomes a constant; what nobody reads goes.

    An operator does nothing if its constants say so (×1, +0, ·I, a full Slice) or its inferred shapes do (a
    Reshape, Expand or Resize to the shape it has). Constants are computed by onnx's reference evaluator,
    never larger than 1 MiB unless their inputs already are. Exporters leave both behind everywhere.
    """

    name = "clean-up"

    def __init__(self) -> None:
        self._growth = MAX_GROWTH_BYTES
        self._told: dict[Tensor, str] | None = None

    def start(self, rw: Rewriter) -> None:
        self._told = None

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if not op:
            return None
        if not any(rw.readers(t) or rw.pinned(t) for t in node.outputs):
            return rw.replace([node], [], "nobody reads its outputs")
        if op == "Constant":
            return None
        reason = does_nothing(rw, node, op)
        if reason:
            return self._bypass(node, rw, reason)
        if op == "Sub" and subtracts_from_nothing(rw, node):
            return self._negated(node, rw)
        if op in ("Expand", "Tile", "ConstantOfShape") and _only_broadcasts(rw, node, op):
            return self._unbroadcast(node, rw, op)
        if op in FOLDABLE:
            return self._fold(node, rw, op)
        return None

    def _told_apart(self, rw: Rewriter) -> dict[Tensor, str]:
        """Who tells −0 from +0, found when it is first asked for; what this pass does leaves that as it is."""
        if self._told is None:
            self._told = told_apart(rw)
        return self._told

    def _negated(self, node: Node, rw: Rewriter) -> Rewrite | Skip:
        teller = self._told_apart(rw).get(node.outputs[0])
        if teller:
            return Skip(f"0 − x is +0 for both zeros, −x is not, and {teller} tells them apart")
        new = Node("Neg", node.name, {}, [node.inputs[1]], list(node.outputs))
        return rw.replace([node], [new], "0 − x is −x")

    def _bypass(self, node: Node, rw: Rewriter, reason: str) -> Rewrite | Skip:
        told, output = {} if _keeps_zeros(rw, node) else self._told_apart(rw), node.outputs[0]
        teller = told.get(output)
        if teller:
            return Skip(f"{reason}, but may make +0 of −0, and {teller} tells them apart")
        source = (
            node.inputs[0]
            if rw.op(node) not in ("Mul", "Add", "MatMul")
            else next(t for t in node.inputs if rw.constant(t) is None)
        )
        done = rw.drop(node, source, reason)
        if self._told and source in self._told:  # of the two, either may be the one that is left
            self._told[output] = self._told[source]
        return done or Skip(f"{reason}, but it joins two tensors that must both stay visible")

    def _unbroadcast(self, node: Node, rw: Rewriter, op: str) -> Rewrite | Skip:
        reason = f"what reads it broadcasts, so {op} need not"
        if op != "ConstantOfShape":
            return self._bypass(node, rw, reason)
        value = node.attrs.get("value")
        number = np.zeros((), np.float32) if value is None else np.asarray(value.values).reshape(())
        return rw.freeze(node, [number], reason)

    def _fold(self, node: Node, rw: Rewriter, op: str) -> Rewrite | Skip | None:
        shape = rw.shape(node.inputs[0]) if node.inputs else None
        sizes = known(shape)
        sizes = sizes if sizes is not None and math.prod(sizes) < LARGEST else None
        inputs = [rw.constant(t) for t in node.inputs if t.name]
        if op in ("Shape", "Size") and sizes is not None:
            values = {node.inputs[0].name: np.broadcast_to(np.float32(0), sizes)}
        elif inputs and all(held is not None for held in inputs):
            values = {t.name: v for t in node.inputs if t.name and (v := rw.raw(t)) is not None}
        else:
            return None
        if any(rw.pinned(t) for t in node.outputs) or any(v.dtype.kind not in "fiub" for v in values.values()):
            return None
        kept = [t.name for t in node.inputs if t.name in values and rw.shared(t)]
        twice = next((name for name in kept if op in REARRANGING and values[name].nbytes > NEGLIGIBLE_BYTES), None)
        if twice is not None:
            return Skip(f"its value never changes, but {twice!r} is read elsewhere too, and would be stored twice")
        growth = self._growth if op != "Range" else min(self._growth, _worth(rw, node))
        outputs = evaluate(node, values, rw.opset, growth, kept)
        if isinstance(outputs, str):
            return Skip(outputs)
        made = sum(v.nbytes for v in outputs)
        if made > NEGLIGIBLE_BYTES:
            self._growth -= max(0, made - sum(v.nbytes for name, v in values.items() if name not in kept))
        return rw.freeze(node, outputs, "its value is the same for every input")


def _only_broadcasts(rw: Rewriter, node: Node, op: str) -> bool:
    """Whether every reader of an Expand, Tile or ConstantOfShape would broadcast what it repeats to the same shape.

    Along each axis the repetition does nothing, or an operand beside it is as wide.
    """
    output = node.outputs[0]
    wide, narrow = _repeated(rw, node, op)
    if rw.opset < 8 or rw.pinned(output) or not rw.readers(output) or wide is None or narrow is None:
        return False
    return all(
        rw.op(reader) in BROADCASTING
        and sum(t is output for t in reader.inputs) == 1
        and any(_covers(extents(rw, t), wide, narrow) for t in reader.inputs if t is not output)
        for reader in rw.readers(output)
    )


def _worth(rw: Rewriter, node: Node) -> int:
    """How many bytes a Range may become: a few numbers stand for all of it, and counting takes no time.

    Nothing at all where its readers broadcast it beside data, since nothing follows from its numbers there.
    """
    readers = rw.readers(node.outputs[0])
    ends = all(rw.op(r) in BROADCASTING and any(rw.constant(t) is None for t in _beside(r, node)) for r in readers)
    return 0 if ends else MAX_RANGE_BYTES


def _beside(reader: Node, node: Node) -> list[Tensor]:
    return [t for t in reader.inputs if t.name and t is not node.outputs[0]]


def _repeated(rw: Rewriter, node: Node, op: str) -> tuple[Entries | None, Entries | None]:
    """The sizes after and before a repetition, as many of both; those before are 1 where nothing is."""
    target = entries(rw, node.inputs[0 if op == "ConstantOfShape" else 1])
    before = () if op == "ConstantOfShape" else extents(rw, node.inputs[0])
    if before is None:
        return None, None
    if target is None and op == "Expand":
        after = extents(rw, node.outputs[0])
        return after, None if after is None else (1,) * (len(after) - len(before)) + before
    if target is None or len(target) < len(before):
        return None, None
    narrow = (1,) * (len(target) - len(before)) + before
    if op == "Tile":
        return tuple(b if t == 1 else t if b == 1 else None for t, b in zip(target, narrow, strict=True)), narrow
    return tuple(t if b == 1 else b if t == 1 or t == b else None for t, b in zip(target, narrow, strict=True)), narrow


def _covers(other: Entries | None, wide: Entries, narrow: Entries) -> bool:
    """Whether an operand is as wide as a repetition wherever that repeats."""
    if other is None or len(other) < len(wide):
        return False
    pairs = zip(other[len(other) - len(wide) :], wide, narrow, strict=True)
    return all(w is not None and (w in (n, 1) or o == w) for o, w, n in pairs)


def does_nothing(rw: Rewriter, node: Node, op: str) -> str:
    """Why a node's first output equals its data input, else ""."""
    if len([t for t in node.outputs if t.name]) > 1:
        return ""
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    if x is None:
        return ""
    if op == "Identity" or (op == "Dropout" and attributes.inactive_dropout(rw, node)):
        return f"{op} passes its input on"
    if op in ("Add", "Sub"):
        return f"{op} by a constant that changes nothing" if adds_nothing(rw, node) else ""
    if op in ("Mul", "Div", "BatchNormalization"):
        reading = forms.linear(rw, node)
        step = reading.load() if reading is not None and reading.kind == "diagonal" else None
        same = isinstance(step, LinearMap) and np.all(step.scale == 1) and not step.geometry.biased
        return f"{op} by a constant that changes nothing" if same else ""
    if op in forms.WEIGHTED_OPS:
        return f"{op} by the identity" if _identity(rw, node) else ""
    if op in ("Concat", "Sum", "Max", "Min", "Mean") and len(node.inputs) == 1:
        return f"{op} of one tensor"
    if op == "Cast":
        to = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]) if node.attrs.get("to") else None
        return "Cast to the type it has" if to is not None and rw.dtype(x) == to else ""
    if op == "Transpose":
        perm = attributes.perm(rw, node)
        return "Transpose that keeps the order" if perm is not None and perm == sorted(perm) else ""
    if op == "Pad":
        found = attributes.pad_parameters(rw, node)
        return "Pad by nothing" if found is not None and not any(found[0]) else ""
    if op == "Slice":
        return _full_slice(rw, node, x)
    if op in ("Resize", "Upsample"):
        return _same_size(rw, node, x, y)
    if op in ("AveragePool", "MaxPool"):
        quiet = not any(node.attrs.get("pads", ())) and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        single = all(v == 1 for v in (*node.attrs["kernel_shape"], *node.attrs.get("strides", ())))
        return f"{op} of single elements" if quiet and single else ""
    before, after = extents(rw, x), extents(rw, y)
    if before is None or after is None or len(before) != len(after):
        return ""
    if op in ("Reshape", "Flatten"):
        return f"{op} to the shape it has" if attributes.same_shape(before, after) else ""
    if op in ("Expand", "Tile"):
        return f"{op} to the shape it has" if before == after else ""
    if op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        since = 13 if op == "ReduceSum" else 18
        axes = attributes.axes_of(rw, node, since)
        single = axes is not None and bool(axes) and all(before[a] == 1 for a in axes)
        return f"{op} over axes of size 1" if single and node.attrs.get("keepdims", 1) else ""
    return ""


def _keeps_zeros(rw: Rewriter, node: Node) -> bool:
    """Whether a node that does nothing leaves even the sign of a zero alone: where it adds something, that is +0."""
    found = adds_nothing(rw, node)
    if found is not None:
        return zeros.keeps(found[1])
    if rw.is_a(node, "Resize", "Upsample"):
        return node.attrs.get("mode", "nearest") in ("nearest", b"nearest")
    return not rw.is_a(node, *SUMS)


def _identity(rw: Rewriter, node: Node) -> bool:
    """Whether a convolution or product maps every channel to itself, as the adjacency of a graph of self-loops does."""
    reading = forms.linear(rw, node)
    if reading is None or reading.geometry.weights > MAX_COMPARED or not reading.geometry.pointwise:
        return False
    g = reading.geometry
    if g.biased or g.in_channels != g.out_channels:
        return False
    linear = reading.load()
    if isinstance(linear, Refusal):
        return False
    width = g.in_channels // g.groups
    return bool(np.all(linear.weight.reshape(g.groups, width, width) == np.eye(width)))


def _full_slice(rw: Rewriter, node: Node, x: Tensor) -> str:
    parameters = attributes.slice_parameters(rw, node)
    if not parameters:
        return ""
    for axis, start, end, step in parameters:
        size = rw.dim(x, axis)
        to_end = end >= FAR or (isinstance(size, int) and end >= size)
        from_start = start == 0 or (isinstance(size, int) and start <= -size)
        if step != 1 or not to_end or not from_start:
            return ""
    return "Slice that keeps everything"


def _same_size(rw: Rewriter, node: Node, x: Tensor, y: Tensor) -> str:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return ""
    before, after = rw.shape(x), rw.shape(y)
    if attributes.resized_by_sizes(rw, node):
        return f"{node.op} to the size it has" if known(before) is not None and before == after else ""
    scales = attributes.resize_scales(rw, node)
    return f"{node.op} by a factor of 1" if scales is not None and all(s == 1 for s in scales.values()) else ""
