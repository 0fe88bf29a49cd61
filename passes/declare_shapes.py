"""Shape declaration: proved shapes are written into the file where onnxruntime's planner uses them."""

from __future__ import annotations

import math

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.maps.symbols import infer_symbols
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The fewest elements of a Softmax that is worth a declaration.
LARGE = 1 << 16


class DeclareShapes(Pass):
    """shape(x) = shape(y), written into the file

    * Sums: one operand comes from a convolution, directly or through one operator. onnxruntime computes a sum together
      with the convolution in its blocked layout, but only if it knows that both operands have the same shape.
    * Products: the operands come from two convolutions in this way, as in gated units. Without the shapes, onnxruntime
      leaves the blocked layout for the product. (x·sigmoid(x) needs no declaration.) Two parts of one convolution count
      too, because `split-siblings` makes them two. Sums and products are decided together, because one reordering
      between them costs what the others gain.
    * Softmax with at least 65,536 elements: onnxruntime computes it in place if it knows that the shape stays.
    * A size is dynamic, and onnx's inference does not know the shape. The sizes are proved equal
      (`pwopt.maps.symbols`).

    No operator changes. The shapes of the operands and of the result become `value_info` with common symbols. Other
    tensors get no declaration, because that costs time: with all 158 tensors of a separation network it was 0.99×
    (AVX-512 Xeon).
    """

    name = "declare-shapes"
    operators = frozenset({"Add", "Sum", "Mul", "Softmax"})
    policy = "measured"
    pays_on = frozenset({"cpu"})

    def start(self, rw: Rewriter) -> None:
        self._given = {d for t in rw.graph.inputs for d in t.shape or () if isinstance(d, str)}
        asked = any(rw.is_a(n, *self.operators) and not self._is_known(rw, n.outputs[0]) for n in rw.nodes())
        self._sizes = infer_symbols(rw) if asked else {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if not self._sizes or not rw.is_a(node, *self.operators):
            return None
        softmax = rw.is_a(node, "Softmax")
        if softmax:
            size = rw.size_of(node.outputs[0])
            wanted, kind = size is not None and math.prod(size) >= LARGE, "Softmax in place"
        else:
            convolved = [_is_convolved(rw, t) for t in node.inputs]
            wanted = len(convolved) == 2 and (_is_gated(rw, node) if rw.is_a(node, "Mul") else any(convolved))
            kind = "sums and products behind convolutions"
        tensors = [*node.inputs[: 1 if softmax else 2], node.outputs[0]]
        sizes = [self._sizes.get(t) for t in tensors]
        if not wanted or sizes[0] is None or any(s != sizes[0] for s in sizes):
            return None
        unknown = [t for t in tensors if self._can_declare(rw, t)]
        if not unknown:
            return None
        if not self.eager:
            return Skip(f"declared shapes may help onnxruntime ({kind}); only measuring can tell")
        for tensor in unknown:
            rw.declare_shape(tensor, sizes[0])
        what = "×".join(map(str, sizes[0]))
        reason = Reason("the shape {} is declared for {}", what, Reason.list_names(t.name for t in unknown))
        return Rewrite(reason).with_signature(f"declared shapes: {kind}")

    def _is_known(self, rw: Rewriter, tensor: Tensor) -> bool:
        """Whether inference gives every size as a number or as a name that an input declares.

        Other names are inference's own, which a file does not keep.
        """
        shape = rw.shape(tensor)
        return shape is not None and all(isinstance(d, int) or d in self._given for d in shape)

    def _can_declare(self, rw: Rewriter, tensor: Tensor) -> bool:
        """Whether a tensor is computed, its shape is not known to inference, and neither is it declared."""
        inner = rw.producer(tensor) is not None and tensor not in rw.graph.outputs
        return inner and tensor.declared is None and not self._is_known(rw, tensor) and rw.dtype(tensor) is not None


def _is_gated(rw: Rewriter, node: Node) -> bool:
    """Whether a product has operands from two convolutions, or from two parts of one."""
    makers = [rw.producer(t) for t in node.inputs]
    own = any(m is not None and t in m.inputs for m in makers for t in node.inputs)
    return not own and makers[0] is not makers[1] and all(_is_convolved(rw, t, part=True) for t in node.inputs)


def _is_convolved(rw: Rewriter, tensor: Tensor, *, part: bool = False) -> bool:
    """Whether a convolution computes a tensor, or what it is a `part` of, directly or before a unary operator."""
    node = rw.producer(tensor)
    if node is not None and len(node.inputs) == 1 and not rw.is_a(node, "Split"):
        node = rw.producer(node.inputs[0])
    if part and rw.is_a(node, "Slice", "Split"):
        node = rw.producer(node.inputs[0]) if node is not None else None
    return rw.is_a(node, "Conv")
