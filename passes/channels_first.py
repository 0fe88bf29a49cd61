"""Matrix products between Transposes run as 1×1 convolutions, without them."""

from __future__ import annotations

from dataclasses import replace

from pwopt.algebra.geometry import Refusal
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.shapes import Shape
from pwopt.graph.view import View
from pwopt.maps import emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, activation, repeated

from .channels_last import FIRST, LAST

#: Types that onnxruntime's CPU provider convolves; it multiplies matrices of float64 too.
CONVOLVED = ("float16", "float32")


class ChannelsFirst(Pass):
    """Tᵀ(f((Tx)·W + b)) = f(Wᵀ·x + b) for T, which moves the channels to the end, and elementwise f.

    Frameworks write Linear and Dense layers on feature maps so, with a Transpose on either side: mixers, ConvNeXt-like
    blocks without a normalisation in between (Liu et al., 2022), exports from channels-last frameworks. As 1×1
    convolutions they stay in the provider's blocked layout.
    """

    name = "channels-first"
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        if not _moves(rw, node, LAST):
            return None
        found: list[Reading | Step] = []
        tensor = node.outputs[0]
        while True:
            reader = rw.sole_reader(tensor)
            if _moves(rw, reader, FIRST):
                break
            reading = forms.weighted(rw, reader)
            behind = reading if reading is not None and reading.kind == "matmul" else activation(rw, tensor)
            if behind is None:
                return None
            found.append(behind)
            tensor = behind.output
        maps = [f for f in found if isinstance(f, Reading)]
        if not maps or reader is None:
            return None
        widths = "→".join(map(str, (maps[0].geometry.in_channels, *(m.geometry.out_channels for m in maps))))
        dtype = str(rw.dtype(node.inputs[0]))
        if dtype not in CONVOLVED:
            return Skip(f"{widths} between Transposes stays: onnxruntime has no convolution in {dtype}")
        if 0 in (rw.shape(node.inputs[0]) or ()):
            return Skip(f"{widths} between Transposes stays: onnxruntime does not convolve empty tensors")
        if not self.eager:
            return Skip(f"{widths} between Transposes could be 1×1 convolutions; only measuring can tell")
        new: list[Node] = []
        source, residual = node.inputs[0], 0.0
        for i, step in enumerate(found):
            last = i == len(found) - 1
            result = reader.outputs[0] if last else rw.new_variable(f"{step.output.name}_first", step.output, _first)
            if isinstance(step, Step):
                new += repeated(rw, step, source, result)
            else:
                written = self._conv(rw, step, source, result)
                if isinstance(written, Refusal):
                    return Skip(written.reason)
                new += written.nodes
                residual = max(residual, written.residual)
            source = result
        old = [*(n for step in found for n in step.nodes), reader]
        size = rw.size_of(node.inputs[0])
        done = rw.replace(old, new, f"{widths} runs as convolutions, without the Transposes around it", residual)
        return done.signed(f"products between Transposes: {widths} at {size}")

    @staticmethod
    def _conv(rw: Rewriter, reading: Reading, source: Tensor, output: Tensor) -> emit.Written | Refusal:
        if rw.shared(reading.weight_input):
            return Refusal(f"the weight {reading.weight_input.name!r} is shared")
        linear = reading.load()
        if isinstance(linear, Refusal):
            return linear
        return emit.write(rw, linear.at_rank(2), replace(reading, kind="conv"), source, output, 1, inherit=False)


def _moves(view: View, node: Node | None, perm: tuple[int, ...]) -> bool:
    return view.is_a(node, "Transpose") and tuple(attributes.perm(view, node) or ()) == perm


def _first(shape: Shape) -> Shape:
    return tuple(shape[a] for a in FIRST)
