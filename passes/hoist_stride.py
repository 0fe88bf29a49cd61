"""Stride hoisting (code motion): a stride moves before the operators that compute the positions it skips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.maps.cost import ELEMENT, macs
from pwopt.maps.forms import Reading
from pwopt.maps.positions import STRIDED_POOLS, Steps, every, has_positions, pooling, positionwise, stencil, subsample
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.regions import Region, find_regions
from pwopt.rewriting.wording import format_count


class HoistStride(Pass):
    """S(f(x)) = f(Sx) for elementwise f; S(Wx) = (SW)x, where S keeps every s-th position

    * Every reader of a tensor reads only every s-th position: 1×1 convolutions and poolings with a stride, or
      operators whose own results are read so.
    * A convolution or pooling before it gets s times its stride. Elementwise operators, sums, Concat and
      normalisations run on the remaining positions.
    * An input that others need completely is subsampled by a MaxPool with a kernel of 1. This costs less than it saves.

    The result is bit-identical. ResNets with the stride on the first 1×1 map of a block discard three quarters of the
    block before it (He et al., 2016, as implemented in Caffe, Keras and Detectron).
    """

    name = "hoist-stride"
    policy = "if cheaper"

    def start(self, rw: Rewriter) -> None:
        self._steps = _find_steps(rw)
        touched = {n: [t for t in (*n.inputs, *n.outputs) if t in self._steps] for n in rw.nodes()}
        regions = find_regions({n: tensors for n, tensors in touched.items() if tensors})
        self._roots = {r.nodes[0]: r for r in regions}

    def select_nodes(self, nodes: Sequence[Node]) -> Sequence[Node]:
        return [node for node in nodes if node in self._roots]

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        region = self._roots.pop(node, None)
        return None if region is None else self._rewrite(rw, region)

    def _rewrite(self, rw: Rewriter, region: Region) -> Rewrite | Skip | None:
        if rw.opset < 8:  # onnxruntime's MaxPool of older opsets takes float32 only
            return Skip(f"opset {rw.opset} cannot subsample every type; convert the model with --opset 8 or later")
        saved, spent = self._balance(rw, region)
        name = region.tensors[0].name
        if saved <= spent:
            return Skip(
                Reason(
                    "only {} of {!r} is read, but subsampling would cost more than it saves",
                    self._describe(region),
                    name,
                )
            )
        pools: dict[tuple[Tensor, Steps], Tensor] = {}
        old: list[Node] = []
        new: list[tuple[Node, list[Node]]] = []
        before = sum(macs(rw, n) or 0 for n in region.nodes)
        readings = {n: stencil(rw, n) for n in region.nodes}  # automatic padding depends on the sizes before
        for t in region.tensors:
            rw.reshape(t, every(self._steps[t]))
        for node in region.nodes:
            added: list[Node] = []
            step = self._steps.get(node.outputs[0], ())
            inputs, reading = list(node.inputs), readings[node]
            stride = _read_stride(rw, node, reading)
            if stride is not None:
                kept = self._steps.get(node.inputs[0], ())
                added.append(_set_stride(node, reading, _divide(stride, step, kept)))
            else:
                for i, t in enumerate(inputs):
                    ratio = self._find_ratio(rw, t, step)
                    if ratio is not None:
                        key = (t, ratio)
                        if key not in pools:
                            pools[key] = rw.new_variable(f"{t.name}_every", t, every(ratio))
                            added.append(subsample(rw, t, pools[key], ratio))
                        inputs[i] = pools[key]
                added.append(Node(node.op, node.name, dict(node.attrs), inputs, list(node.outputs), domain=node.domain))
            old.append(node)
            new.append((node, added))
        records = [rw.replace([node], added, "") for node, added in new]
        renamed = {str(t.name): rw.rename(t, "_strided") for t in region.tensors}
        subsampled = f", {format_count(len(pools), 'input')} subsampled" if pools else ""
        reason = Reason(
            "only {} of {!r} is read, so the others are not computed ({}{})",
            self._describe(region),
            name,
            format_count(len(old), "operator"),
            subsampled,
        )
        return replace(Rewrite.of(reason, records, renamed), macs_before=before)

    def _describe(self, region: Region) -> str:
        steps = {self._steps[t] for t in region.tensors}
        return f"one in {' or '.join('×'.join(map(str, s)) for s in sorted(steps))} positions"

    def _balance(self, rw: Rewriter, region: Region) -> tuple[float, float]:
        """The cost that a region saves, and the cost of subsampling its inputs, in multiply-adds."""
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
            spent += kept * 2 * ELEMENT * sum(self._find_ratio(rw, t, step) is not None for t in node.inputs)
        return saved, spent

    def _find_ratio(self, rw: Rewriter, tensor: Tensor, step: Steps) -> Steps | None:
        """By which steps to subsample an input of an elementwise operator; None if it needs no subsampling."""
        ratio = _divide((1,) * len(step), step, self._steps.get(tensor, ()))
        needed = rw.constant(tensor) is None and any(r > 1 for r in ratio) and has_positions(rw, tensor, len(step))
        return ratio if needed else None


def _read_stride(rw: Rewriter, node: Node, reading: Reading | None) -> Steps | None:
    """The stride of a convolution or pooling; None for any other node."""
    if reading is not None:
        return reading.geometry.strides
    return (
        tuple(node.attrs.get("strides", (1,) * len(node.attrs["kernel_shape"])))
        if rw.op(node) in STRIDED_POOLS
        else None
    )


def _set_stride(node: Node, reading: Reading | None, stride: Steps) -> Node:
    """The same convolution or pooling with another stride; padding that depends on the stride becomes explicit."""
    attrs = {**node.attrs, "strides": list(stride)}
    if reading is not None:
        attrs.pop("auto_pad", None)
        attrs["pads"] = list(reading.geometry.pads)
    return Node(node.op, node.name, attrs, list(node.inputs), list(node.outputs), domain=node.domain)


def _divide(strides: Sequence[int], step: Sequence[int], kept: Sequence[int]) -> Steps:
    """The stride of a reader of every (stride · step)-th position, if only every `kept`-th position is computed."""
    ones = (1,) * len(strides)
    return tuple(s * t // k for s, t, k in zip(strides, step or ones, kept or ones, strict=True))


def _read_pointwise_stride(rw: Rewriter, node: Node) -> Steps | None:
    """The stride of a convolution or pooling whose kernel has one position; None for any other node."""
    if pooling(rw, node) and not any(node.attrs.get("pads", ())) and math.prod(node.attrs["kernel_shape"]) == 1:
        return tuple(node.attrs.get("strides", (1,) * len(node.attrs["kernel_shape"])))
    reading = stencil(rw, node)
    g = None if reading is None else reading.geometry
    return g.strides if g is not None and g.taps == 1 and not g.padded else None


def _find_steps(rw: Rewriter) -> dict[Tensor, Steps]:
    """Tensors of which all readers read only every s-th position, with s for each spatial axis."""
    steps: dict[Tensor, Steps] = {}
    nodes = rw.nodes()
    for node in reversed(nodes):
        if len(node.outputs) != 1 or rw.must_keep(node.outputs[0]):
            continue
        out = node.outputs[0]
        rank = (rw.rank(out) or 0) - 2
        distances = [_find_step(rw, reader, out, rank, steps) for reader in rw.readers(out)] if rank > 0 else []
        step = tuple(map(math.gcd, *distances)) if distances else ()
        if max(step, default=1) > 1 and (stencil(rw, node) is not None or pooling(rw, node) or positionwise(rw, node)):
            steps[out] = step
    return steps


def _find_step(rw: Rewriter, reader: Node, tensor: Tensor, rank: int, steps: dict[Tensor, Steps]) -> Steps:
    """The distance between the positions that `reader` reads."""
    after = steps.get(reader.outputs[0], (1,) * rank) if len(reader.outputs) == 1 else (1,) * rank
    stride = _read_pointwise_stride(rw, reader)
    if stride is not None and reader.inputs[0] is tensor and sum(t is tensor for t in reader.inputs) == 1:
        return tuple(s * a for s, a in zip(stride, after, strict=True)) if len(stride) == rank else (1,) * rank
    skips = len(after) == rank and max(after) > 1
    return after if skips and has_positions(rw, tensor, rank) and positionwise(rw, reader) else (1,) * rank
