"""Products of two matrices with an addition or a transposition become one Gemm."""

from __future__ import annotations

from pwopt.graph import attributes
from pwopt.graph.dtypes import WIDE
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.values import read_extents
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The first opset whose Gemm broadcasts its third input, and the first that may leave it out.
BROADCASTS_SINCE, OPTIONAL_SINCE = 7, 11


class WriteGemm(Pass):
    """A·B + C = Gemm(A, B, C) and (A·B)ᵀ = Bᵀ·Aᵀ for matrices A and B

    * A and B have two axes, in float32 or float64. Nothing else reads the intermediate results.
    * C broadcasts to the product, and does not enlarge it. Sizes that the model declares by one name are equal: a Gemm
      checks that when it runs.
    * A Gemm absorbs transpositions of its operands. It absorbs one of its result if it adds nothing.
    * The number of operators decreases. onnxruntime makes the same change when it loads a model.

    The pass runs late, because the other passes read the bias of a MatMul in the Add after it.
    """

    name = "write-gemm"
    phase = "late"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        op = rw.op(node)
        if not op or rw.opset < BROADCASTS_SINCE or rw.dtype(node.outputs[0]) not in WIDE:
            return None
        if op in ("Add", "Sum") and len(node.inputs) == 2:
            first = _add_to_product(rw, node, 0)
            return first if isinstance(first, Rewrite) else _add_to_product(rw, node, 1) or first
        if op == "Transpose":
            return _transpose_product(rw, node)
        return _transpose_operand(rw, node) if op in ("MatMul", "Gemm") else None


def _is_product(rw: Rewriter, node: Node | None) -> bool:
    """Whether a node is a product of two matrices to which nothing is added."""
    if node is None or not rw.is_a(node, "MatMul", "Gemm"):
        return False
    return rw.optional_input(node, 2) is None and all(rw.rank(t) == 2 for t in node.inputs[:2])


def _flags(node: Node) -> tuple[bool, bool]:
    return bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))


def _gemm(node: Node, a: Tensor, b: Tensor, turned: tuple[bool, bool], addend: Tensor | None, output: Tensor) -> Node:
    attrs = {k: v for k, v in node.attrs.items() if k == "alpha"}
    attrs.update({k: 1 for k, t in zip(("transA", "transB"), turned, strict=True) if t})
    return Node("Gemm", node.name, attrs, [a, b] if addend is None else [a, b, addend], [output])


def _add_to_product(rw: Rewriter, node: Node, index: int) -> Rewrite | Skip | None:
    """Let a Gemm add the other operand of an Add or Sum."""
    result, addend = node.inputs[index], node.inputs[1 - index]
    product = rw.producer(result)
    if product is None or not _is_product(rw, product) or rw.other_uses(result) or result is addend:
        return None
    whole, part = read_extents(rw, result), read_extents(rw, addend)
    if whole is None or part is None or len(part) > 2:
        return None
    names = zip((rw.shape(addend) or ())[::-1], (rw.shape(result) or ())[::-1], strict=False)
    same = [isinstance(a, str) and a == b for a, b in names]
    if any(p not in (1, w) and not s for p, w, s in zip(part[::-1], whole[::-1], same, strict=False)):
        return Skip(f"{addend.name!r} may enlarge the product: its sizes are not proven to be those of the product")
    new = _gemm(product, product.inputs[0], product.inputs[1], _flags(product), addend, node.outputs[0])
    return rw.replace([product, node], [new], f"{product.op} and {node.op} become one Gemm")


def _transpose_product(rw: Rewriter, node: Node) -> Rewrite | None:
    """(A·B)ᵀ = Bᵀ·Aᵀ"""
    product = rw.producer(node.inputs[0])
    if product is None or not _is_product(rw, product) or rw.other_uses(node.inputs[0]):
        return None
    if rw.opset < OPTIONAL_SINCE or attributes.read_permutation(rw, node) != [1, 0]:
        return None
    (a, b), (turn_a, turn_b) = product.inputs[:2], _flags(product)
    new = _gemm(product, b, a, (not turn_b, not turn_a), None, node.outputs[0])
    return rw.replace([product, node], [new], f"{product.op} and Transpose become one Gemm")


def _transpose_operand(rw: Rewriter, node: Node) -> Rewrite | None:
    """Fold a Transpose of an operand into transA or transB."""
    if node.op == "MatMul" and (rw.opset < OPTIONAL_SINCE or not _is_product(rw, node)):
        return None
    for index, name in enumerate(("transA", "transB")):
        operand = node.inputs[index]
        transpose = rw.producer(operand)
        alone = not rw.other_uses(operand) and sum(t is operand for t in node.inputs) == 1
        if alone and transpose is not None and rw.is_a(transpose, "Transpose") and rw.rank(operand) == 2:
            if attributes.read_permutation(rw, transpose) != [1, 0]:
                continue
            inputs = [transpose.inputs[0] if t is operand else t for t in node.inputs]
            attrs = {**node.attrs, name: 1 - bool(node.attrs.get(name, 0))}
            new = Node("Gemm", node.name, attrs, inputs, list(node.outputs))
            return rw.replace([transpose, node], [new], f"Transpose and {node.op} become one Gemm")
    return None
