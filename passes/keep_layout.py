"""Layout preservation: operators take the form that stays in the provider's blocked layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pwopt.graph import attributes
from pwopt.graph.ir import Node, Variable
from pwopt.maps.positions import every, stencil, subsample
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

Form = Callable[[Rewriter, Node], "tuple[list[Node], str] | Skip | None"]
MEASURE = "another form would stay in the blocked layout; only measuring can tell"


class KeepLayout(Pass):
    """x·g = x·resize(g) for a gate g; ReduceMean over space = GlobalAveragePool; (WS)x = W(Sx) for a stride S

    * Products and sums with a gate of one position: nearest upsampling first repeats the gate at every position.
    * Means over space: a GlobalAveragePool computes them.
    * Strided 1×1 convolutions: a subsampling takes the stride over.

    onnxruntime's CPU provider keeps feature maps in blocks of channels. It leaves this layout, and returns to it, for
    products of tensors of different shapes (the gates of squeeze-and-excitation) and for ReduceMean. It runs strided
    1×1 convolutions slowly.
    """

    name = "keep-layout"
    operators = frozenset({"Add", "Conv", "Mul", "ReduceMean"})
    policy = "measured"
    pays_on = frozenset({"cpu", "other"})  # graphics cards have no blocked layout

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        form = LAYOUT_RULES.get(rw.op(node))
        found = form(rw, node) if form is not None else None
        if found is None or isinstance(found, Skip):
            return found
        if not self.eager:
            return Skip(MEASURE)
        new, signature = found
        size = "×".join(map(str, rw.size_of(node.outputs[0]) or ("?",)))
        return rw.replace([node], new, f"{node.op} in the blocked layout").with_signature(
            f"{signature}: {node.op} {size}"
        )


def _expand_gate(rw: Rewriter, node: Node) -> tuple[list[Node], str] | Skip | None:
    """Upsample a gate before a product or a sum."""
    shapes = [rw.shape(t) for t in node.inputs]
    if len(shapes) != 2 or any(rw.constant(t) is not None for t in node.inputs):
        return None
    single = [i for i, s in enumerate(shapes) if s is not None and len(s) == 4 and s[2:] == (1, 1)]
    if len(single) != 1:
        return None
    gate, full = node.inputs[single[0]], shapes[1 - single[0]]
    if full is None or len(full) != 4 or rw.dim(gate, 1) != full[1] or rw.dim(gate, 0) != full[0]:
        return None
    if 0 in full or str(rw.dtype(gate)) != "float32":
        return None
    if not all(isinstance(d, int) for d in full[1:]):
        return Skip("its gate cannot be upsampled to an unknown size; make the input sizes static (--static)")
    if rw.opset < 11:
        return Skip("its gate could stay in the blocked layout from opset 11 on; convert the model with --opset")
    over = rw.new_variable(f"{gate.name}_over", gate, lambda s: (*s[:2], *full[2:]))
    scales = rw.new_constant(f"{over.name}_scales", np.array([1, 1, *full[2:]], np.float32))
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    roi = rw.new_constant(f"{over.name}_roi", np.zeros(0, np.float32)) if rw.opset < 13 else Variable.empty()
    spread = Node("Resize", rw.node_name(node.name, "_over"), attrs, [gate, roi, scales], [over])
    inputs = [over if t is gate else t for t in node.inputs]
    return [spread, Node(node.op, node.name, {}, inputs, list(node.outputs))], "gates and means over space"


def _pool_globally(rw: Rewriter, node: Node) -> tuple[list[Node], str] | None:
    """Compute a mean over space by a GlobalAveragePool."""
    axes = attributes.read_axes(rw, node)
    if rw.rank(node.inputs[0]) != 4 or axes is None or sorted(axes) != [2, 3]:
        return None
    if str(rw.dtype(node.inputs[0])) != "float32" or 0 in (rw.shape(node.inputs[0]) or ()):
        return None  # few providers pool other types, and none pools empty tensors
    source, output = node.inputs[0], node.outputs[0]
    if node.attrs.get("keepdims", 1):
        return [Node("GlobalAveragePool", node.name, {}, [source], [output])], "gates and means over space"
    pooled = rw.new_variable(f"{output.name}_pooled", source, lambda s: (*s[:2], 1, 1))
    flat = Node("Flatten", rw.node_name(node.name, "_flat"), {"axis": 1}, [pooled], [output])
    return [Node("GlobalAveragePool", node.name, {}, [source], [pooled]), flat], "gates and means over space"


def _subsample_first(rw: Rewriter, node: Node) -> tuple[list[Node], str] | None:
    """Subsample before a strided 1×1 convolution."""
    reading = stencil(rw, node)
    g = None if reading is None else reading.geometry
    if reading is None or g is None or g.taps > 1 or g.groups > 1 or g.padded or len(g.kernel) != 2:
        return None
    if g.strides == (1, 1):
        return None
    kept = rw.new_variable(f"{reading.source.name}_every", reading.source, every(g.strides))
    attrs = {**node.attrs, "strides": [1, 1]}
    conv = Node("Conv", node.name, attrs, [kept, *node.inputs[1:]], list(node.outputs))
    return [subsample(rw, reading.source, kept, g.strides), conv], "1×1 convolutions with a stride"


LAYOUT_RULES: dict[str, Form] = {
    "Mul": _expand_gate,
    "Add": _expand_gate,
    "ReduceMean": _pool_globally,
    "Conv": _subsample_first,
}
