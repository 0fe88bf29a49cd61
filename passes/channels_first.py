"""Channels-first layout: matrix products between two Transposes become 1×1 convolutions, without the Transposes."""

from __future__ import annotations

from dataclasses import replace

from pwopt.algebra.geometry import RefusedError
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import Shape
from pwopt.graph.view import View
from pwopt.maps import forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.builder import Builder
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.steps import Step, read_activation

from .channels_last import FIRST, LAST

#: Types for which onnxruntime's CPU provider has convolutions. It also multiplies float64 matrices.
CONVOLVED = ("float16", "float32")


class ChannelsFirst(Pass):
    """Tᵀ(f((Tx)·W + b)) = f(Wᵀ·x + b) where T moves the channels to the last axis and f is elementwise

    * A Transpose to channels-last, matrix products and activations, and a Transpose back follow each other.
    * Nothing else reads the tensors between them, and no weight is shared.
    * onnxruntime has convolutions of the element type, and the input is not known to be empty.

    Frameworks write Linear and Dense layers on feature maps in this form: mixers, ConvNeXt-like blocks without a
    normalisation (Liu et al., 2022), exports from channels-last frameworks. As 1×1 convolutions, the layers stay in
    the provider's blocked layout.
    """

    name = "channels-first"
    operators = frozenset({"Transpose"})
    policy = "measured"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        chain = _find_chain(rw, node)
        if chain is None:
            return None
        steps, back = chain
        maps = [s for s in steps if isinstance(s, Reading)]
        widths = "→".join(map(str, (maps[0].geometry.in_channels, *(m.geometry.out_channels for m in maps))))
        dtype = str(rw.dtype(node.inputs[0]))
        if dtype not in CONVOLVED:
            return Skip(f"{widths} between Transposes stays: onnxruntime has no convolution in {dtype}")
        if 0 in (rw.shape(node.inputs[0]) or ()):
            return Skip(f"{widths} between Transposes stays: onnxruntime does not convolve empty tensors")
        if not self.eager:
            return Skip(f"{widths} between Transposes could be 1×1 convolutions; only measuring can tell")
        builder = _write(rw, steps, node.inputs[0], back.outputs[0])
        old = [*(n for step in steps for n in step.nodes), back]
        size = rw.size_of(node.inputs[0])
        reason = f"{widths} runs as convolutions, without the Transposes around it"
        done = rw.replace(old, builder.nodes, reason, builder.residual)
        return done.with_signature(f"products between Transposes: {widths} at {size}")


def _find_chain(rw: Rewriter, node: Node) -> tuple[list[Reading | Step], Node] | None:
    """The matrix products and activations after a Transpose to channels-last, and the Transpose back."""
    if not _is_transpose(rw, node, LAST):
        return None
    steps: list[Reading | Step] = []
    tensor = node.outputs[0]
    while True:
        reader = rw.sole_reader(tensor)
        if reader is not None and _is_transpose(rw, reader, FIRST):
            return (steps, reader) if any(isinstance(s, Reading) for s in steps) else None
        reading = forms.weighted(rw, reader)
        step = reading if reading is not None and reading.kind == "matmul" else read_activation(rw, tensor)
        if step is None:
            return None
        steps.append(step)
        tensor = step.output


def _is_transpose(view: View, node: Node, perm: tuple[int, ...]) -> bool:
    return view.is_a(node, "Transpose") and tuple(attributes.read_permutation(view, node) or ()) == perm


def _write(rw: Rewriter, steps: list[Reading | Step], source: Tensor, output: Tensor) -> Builder:
    """The chain in channels-first layout, from `source` to `output`."""
    builder = Builder(rw)
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        result = output if last else rw.new_variable(f"{step.output.name}_first", step.output, _move_channels_first)
        if isinstance(step, Step):
            builder.add_step(step, source, result)
        else:
            if rw.is_shared(step.weight_input):
                raise RefusedError(Reason("the weight {!r} is shared", step.weight_input.name))
            builder.add_map(step.load().at_rank(2), replace(step, kind="conv"), source, result)
        source = result
    return builder


def _move_channels_first(shape: Shape) -> Shape:
    return tuple(shape[a] for a in FIRST)
