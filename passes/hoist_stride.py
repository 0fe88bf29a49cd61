"""Positions that every reader skips are not computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pwopt.graph.ir import Node, Tensor
from pwopt.maps.cost import ELEMENT, macs
from pwopt.maps.positions import STRIDED_POOLS, Steps, every, pooling, positionwise, spread, stencil, subsample
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import Region, find_regions
from pwopt.rewriting.wording import counted


class HoistStride(Pass):
    """S(f(x)) = f(Sx) for elementwise f, S(Wx) = (SW)x: if all readers of a tensor read every s-th position only,
    the operators before them compute only those.

    A convolution gets s times its stride; elementwise operators, sums, Concat and normalisations run on what is left;
    an input that others need whole is subsampled by MaxPool with a kernel of 1. Bit for bit the same numbers.
    ResNets with the stride on a block's 1×1 map throw three quarters of the block before away (He et al., 2016, as
    Caffe, Keras and Detectron have it).
    """

    name = "hoist-stride"
    policy = "if cheaper"

    def start(self, rw: Rewriter) -> None:
        self._steps = _demands(rw)
        touched = {n: [t for t in (*n.inputs, *n.outputs) if t in self._steps] for n in rw.nodes()}
        regions = find_regions({n: tensors for n, tensors in touched.items() if tensors})
        self._roots = {r.nodes[0]: r for r in regions}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        region = self._roots.pop(node, None)
        return None if region is None else self._rewrite(rw, region)

    def _rewrite(self, rw: Rewriter, region: Region) -> Rewrite | Skip | None:
        if rw.opset < 8:  # onnxruntime's MaxPool takes float32 only before
            return Skip(f"opset {rw.opset} cannot subsample every type; --opset converts the model")
        saved, spent = self._balance(rw, region)
        name = region.tensors[0].name
        if saved <= spent:
            return Skip(f"only {self._of(region)} of {name!r} is read, but subsampling costs more than that saves")
        pools: dict[tuple[Tensor, Steps], Tensor] = {}
        old: list[Node] = []
        new: list[tuple[Node, list[Node]]] = []
        before = sum(macs(rw, n) or 0 for n in region.nodes)
        for t in region.tensors:
            rw.reshape(t, every(self._steps[t]))
        for node in region.nodes:
            made: list[Node] = []
            step = self._steps.get(node.outputs[0], ())
            inputs, stride = list(node.inputs), _stride(rw, node)
            if stride is not None:
                made.append(_with_stride(rw, node, _ratio(stride, step, self._steps.get(node.inputs[0], ()))))
            else:
                for i, t in enumerate(inputs):
                    ratio = _ratio((1,) * len(step), step, self._steps.get(t, ()))
                    if rw.constant(t) is None and any(r > 1 for r in ratio) and spread(rw, t, len(step)):
                        key = (t, ratio)
                        if key not in pools:
                            pools[key] = rw.new_variable(f"{t.name}_every", t, every(ratio))
                            made.append(subsample(rw, t, pools[key], ratio))
                        inputs[i] = pools[key]
                made.append(Node(node.op, node.name, dict(node.attrs), inputs, list(node.outputs), domain=node.domain))
            old.append(node)
            new.append((node, made))
        records = [rw.replace([node], made, "") for node, made in new]
        renamed = {str(t.name): rw.rename(t, "_strided") for t in region.tensors}
        subsampled = f", {counted(len(pools), 'input')} subsampled" if pools else ""
        reason = (
            f"{self._of(region)} of {name!r} is read, so no other is computed"
            f" ({counted(len(old), 'operator')}{subsampled})"
        )
        return replace(Rewrite.of(reason, records, renamed), macs_before=before)

    def _of(self, region: Region) -> str:
        steps = {self._steps[t] for t in region.tensors}
        return f"one in {' or '.join('×'.join(map(str, s)) for s in sorted(steps))} positions"

    def _balance(self, rw: Rewriter, region: Region) -> tuple[float, float]:
        """Multiply-adds saved in the region, and those that subsampling its inputs is worth."""
        saved = spent = 0.0
        for node in region.nodes:
            out = node.outputs[0]
            step = self._steps.get(out, ())
            size = rw.size_of(out)
            fewer = every(step)(size) if step and size else size
            elements, kept = math.prod(size or (1,)), math.prod(d for d in fewer or (1,) if isinstance(d, int))
            reading = stencil(rw, node)
            per = reading.geometry.weights / reading.geometry.out_channels if reading is not None else ELEMENT
            saved += (elements - kept) * per
            if reading is not None or rw.op(node) in STRIDED_POOLS:
                continue
            for t in node.inputs:
                ratio = _ratio((1,) * len(step), step, self._steps.get(t, ()))
                if rw.constant(t) is None and any(r > 1 for r in ratio) and spread(rw, t, len(step)):
                    spent += kept * 2 * ELEMENT
        return saved, spent


def _stride(rw: Rewriter, node: Node) -> Steps | None:
    """The stride of a convolution or pooling."""
    reading = stencil(rw, node)
    if reading is not None:
        return reading.geometry.strides
    return (
        tuple(node.attrs.get("strides", (1,) * len(node.attrs["kernel_shape"])))
        if rw.op(node) in STRIDED_POOLS
        else None
    )


def _with_stride(rw: Rewriter, node: Node, stride: Steps) -> Node:
    """The same convolution or pooling with another stride; padding that follows from the stride is spelled out."""
    attrs, reading = {**node.attrs, "strides": list(stride)}, stencil(rw, node)
    if reading is not None:
        attrs.pop("auto_pad", None)
        attrs["pads"] = list(reading.geometry.pads)
    return Node(node.op, node.name, attrs, list(node.inputs), list(node.outputs), domain=node.domain)


def _ratio(strides: Sequence[int], step: Sequence[int], have: Sequence[int]) -> Steps:
    """The stride that is left for a reader of every (stride · step)-th position, where every `have`-th exists."""
    rank = len(strides)
    step, have = step or (1,) * rank, have or (1,) * rank
    return tuple(s * t // h for s, t, h in zip(strides, step, have, strict=True))


def _single_tap(rw: Rewriter, node: Node) -> Steps | None:
    """The stride of an operator that reads single positions, every stride-th from the first."""
    if pooling(rw, node) and not any(node.attrs.get("pads", ())) and math.prod(node.attrs["kernel_shape"]) == 1:
        return tuple(node.attrs.get("strides", (1,) * len(node.attrs["kernel_shape"])))
    reading = stencil(rw, node)
    g = None if reading is None else reading.geometry
    return g.strides if g is not None and g.taps == 1 and not g.padded else None


def _demands(rw: Rewriter) -> dict[Tensor, Steps]:
    """Tensors of which no reader looks at more than every s-th position, with s for each spatial axis."""
    steps: dict[Tensor, Steps] = {}
    nodes = rw.nodes()
    for node in reversed(nodes):
        if len(node.outputs) != 1 or rw.pinned(node.outputs[0]):
            continue
        out = node.outputs[0]
        rank = (rw.rank(out) or 0) - 2
        absorbs = stencil(rw, node) is not None or pooling(rw, node)
        if rank < 1 or not (absorbs or positionwise(rw, node)) or not rw.readers(out):
            continue
        wanted = [_wanted(rw, reader, out, rank, steps) for reader in rw.readers(out)]
        step = tuple(math.gcd(*(w[a] for w in wanted)) for a in range(rank))
        if any(s > 1 for s in step):
            steps[out] = step
    return steps


def _wanted(rw: Rewriter, reader: Node, tensor: Tensor, rank: int, steps: dict[Tensor, Steps]) -> Steps:
    """How far apart the positions are that `reader` looks at."""
    after = steps.get(reader.outputs[0], (1,) * rank) if len(reader.outputs) == 1 else (1,) * rank
    stride = _single_tap(rw, reader)
    if stride is not None and reader.inputs[0] is tensor and sum(t is tensor for t in reader.inputs) == 1:
        return tuple(s * a for s, a in zip(stride, after, strict=True)) if len(stride) == rank else (1,) * rank
    passed = len(after) == rank and spread(rw, tensor, rank) and positionwise(rw, reader)
    return after if passed else (1,) * rank
