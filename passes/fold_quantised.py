"""Folds operators that only move numbers into quantised weights."""

from __future__ import annotations

from pwopt.graph.constants import NEGLIGIBLE_BYTES, evaluate
from pwopt.graph.ir import Node
from pwopt.graph.operators import VIEWS
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: Operators that move the numbers of their first input, which every other input tells where.
MOVING = ("Transpose", "Slice", "Gather", *sorted(VIEWS))


class FoldQuantised(Pass):
    """transpose(dequantise(q)) = dequantise(transpose(q))

    Applies to every operator that only moves numbers: Transpose, Reshape and its relatives, Slice, Gather.

    * q is a constant, and so are the operator's other inputs. Nothing else reads q, or it takes 1 KiB at most.
    * The scale is one number, or there is one number per channel and the operator is a Transpose.

    Exporters write a quantised weight in the order of the framework, and a Transpose behind it. Without the Transpose,
    onnxruntime computes the MatMul with integers.
    """

    name = "fold-quantised"
    operators = frozenset(MOVING)

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        maker = rw.producer(node.inputs[0]) if rw.is_a(node, *MOVING) else None
        if not rw.is_a(maker, "DequantizeLinear") or len(node.outputs) != 1:
            return None
        held = rw.constant(maker.inputs[0])
        if held is None or any(t.name and rw.constant(t) is None for t in node.inputs[1:]):
            return None
        if held.dtype.kind not in "iu" or maker.attrs.get("block_size", 0):
            return Skip("only weights of 8 bits or more with one scale per tensor or channel are moved")
        other_uses = rw.other_uses(node.inputs[0])
        large = held.stored.nbytes > NEGLIGIBLE_BYTES
        if other_uses or (large and rw.is_shared(maker.inputs[0])):
            return Skip(other_uses or f"the weight {maker.inputs[0].name!r} is shared")
        axis = self._find_axis(rw, node, maker)
        if isinstance(axis, Skip):
            return axis
        values = {t.name: v for t in node.inputs[1:] if t.name and (v := rw.raw(t)) is not None}
        raw = rw.raw(held)
        assert raw is not None
        results = evaluate(node, {node.inputs[0].name: raw, **values}, rw.opset)
        if isinstance(results, str):
            return Skip(results)
        moved = rw.new_constant(f"{maker.inputs[0].name}_moved", results[0])
        attrs = {**maker.attrs, **({} if axis is None else {"axis": axis})}
        new = Node("DequantizeLinear", maker.name, attrs, [moved, *maker.inputs[1:]], [node.outputs[0]])
        return rw.replace([maker, node], [new], f"{node.op} is in the order of the quantised weight")

    @staticmethod
    def _find_axis(rw: Rewriter, node: Node, maker: Node) -> int | Skip | None:
        """The axis of the scales after the move; None for one scale."""
        scales, rank = rw.elements(maker.inputs[1]), rw.rank(maker.inputs[0])
        if scales == 1:
            return None
        if scales is None or rank is None or node.op != "Transpose":
            return Skip(f"{node.op} moves the axis along which the scales differ")
        perm = list(node.attrs.get("perm", range(rank)[::-1]))
        return perm.index(int(maker.attrs.get("axis", 1)) % rank)
