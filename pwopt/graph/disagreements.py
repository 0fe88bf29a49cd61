"""Where onnx's inference and onnxruntime disagree on a shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from pwopt.graph.operators import POOLS

#: The element type and the shape of tensors.
Types = Mapping[str, tuple[int, Sequence[int | str | None] | None]]
#: The domain of operators whose shapes inference must not guess.
UNKNOWN = "pwopt.unknown"


def correct_nodes(light: onnx.ModelProto) -> None:
    """Change Squeezes, Unsqueezes and Slices of a model for inference to what onnxruntime takes them for, in place."""
    _correct_axes(light)
    _correct_ends(light)


def _correct_axes(light: onnx.ModelProto) -> None:
    """Change Squeezes and Unsqueezes where inference disagrees with onnxruntime.

    * onnxruntime takes an empty list of axes of a Squeeze as if none were given.
    * Before opset 11, inference expects ascending axes, and ignores negative ones. Those operators become unknown ones,
      so that the shapes after them are unknown.
    """
    graph = light.graph
    nodes = [n for n in graph.node if n.op_type in ("Squeeze", "Unsqueeze") and n.domain in ("", "ai.onnx")]
    if not nodes:
        return
    old = all(o.version < 11 for o in light.opset_import if o.domain in ("", "ai.onnx"))
    empty = {t.name for t in graph.initializer if 0 in t.dims}
    empty.update(n.output[0] for n in graph.node if n.op_type == "Constant" and 0 in n.attribute[0].t.dims)
    for node in nodes:
        if node.op_type == "Squeeze" and len(node.input) > 1 and node.input[1] in empty:
            del node.input[1:]
        for attribute in [a for a in node.attribute if a.name == "axes"]:
            if node.op_type == "Squeeze" and not attribute.ints:
                node.attribute.remove(attribute)
            elif old and min(attribute.ints, default=0) < 0:
                node.op_type, node.domain = "Unknown", UNKNOWN
            elif old:
                attribute.ints[:] = sorted(attribute.ints)
    if any(n.domain == UNKNOWN for n in nodes):
        light.opset_import.add(domain=UNKNOWN, version=1)


def correct_end(end: int, step: int) -> int:
    """The end of a Slice, if onnxruntime takes another one.

    Of a Slice backwards, onnxruntime takes the largest number of int32 and int64 for "to the end", as of one forwards,
    and returns all positions down to the first. By the definition of ONNX, none is left.
    """
    return -(2**63) if step < 0 and end in (2**31 - 1, 2**63 - 1) else end


def _correct_ends(light: onnx.ModelProto) -> None:
    """Change the ends of Slices where inference disagrees with onnxruntime."""
    nodes = [n for n in light.graph.node if n.op_type == "Slice" and n.domain in ("", "ai.onnx") and len(n.input) > 4]
    if not nodes:
        return
    held = {t.name: t for t in light.graph.initializer}
    held |= {n.output[0]: n.attribute[0].t for n in light.graph.node if n.op_type == "Constant" and n.attribute}
    for node in nodes:
        if node.input[2] not in held or node.input[4] not in held:
            continue
        ends, steps = (onnx.numpy_helper.to_array(held[node.input[i]]).ravel().tolist() for i in (2, 4))
        corrected = [correct_end(end, step) for end, step in zip(ends, steps, strict=False)]
        if corrected != ends:
            name = f"{node.output[0]} ends"
            light.graph.initializer.append(onnx.numpy_helper.from_array(np.array(corrected, np.int64), name))
            node.input[2] = name


def _has_ceil_mode(node: onnx.NodeProto) -> bool:
    return any(a.name == "ceil_mode" and a.i for a in node.attribute)


def _is_miscounted(node: onnx.NodeProto, types: Types) -> bool:
    """Whether inference counts a last window of a ceil_mode pooling that starts beyond the input.

    onnxruntime, like the frameworks, drops it: such a window would see padding only.
    """
    if node.op_type not in POOLS or not _has_ceil_mode(node):
        return False
    before, after = types.get(node.input[0], (0, None))[1], types.get(node.output[0], (0, None))[1]
    if before is None or after is None:
        return False
    given = {a.name: list(a.ints) for a in node.attribute}
    rank = len(before) - 2
    strides, pads = given.get("strides", [1] * rank), given.get("pads", [0] * 2 * rank)
    sizes = list(zip(before[2:], after[2:], strides, pads[:rank], strict=False))
    return any(
        isinstance(size, int) and isinstance(count, int) and (count - 1) * stride >= size + begin
        for size, count, stride, begin in sizes
    )


def is_ambiguous(count: int, factor: float) -> bool:
    """Whether the size of `count` positions times a factor of a Resize depends on how a runtime multiplies.

    onnx's inference rounds down the product in float64, and onnxruntime's kernel the one in float32. The factor 1.4 is
    slightly less than 7/5 in float32, so 10 positions become 13 or 14.
    """
    exact = count * float(np.float32(factor))
    with np.errstate(all="ignore"):
        rounded = float(np.float32(count) * np.float32(factor))
    return not math.isfinite(rounded) or math.floor(exact) != math.floor(rounded)


def find_wrong_sizes(light: onnx.ModelProto, types: Types) -> dict[str, tuple[int, Sequence[int]]]:
    """Find outputs for which inference gives other sizes than onnxruntime, with their rank and the axes in doubt."""
    nodes = light.graph.node
    found: dict[str, tuple[int, Sequence[int]]] = {}
    if any(_is_miscounted(node, types) for node in nodes):
        for node in nodes:
            if node.op_type in POOLS and _has_ceil_mode(node):
                rank = 2 + len(next(a.ints for a in node.attribute if a.name == "kernel_shape"))
                found[node.output[0]] = rank, range(2, rank)
    resizes = [n for n in nodes if n.op_type in ("Resize", "Upsample") and n.domain in ("", "ai.onnx")]
    if not resizes:
        return found
    held = {t.name: t for t in light.graph.initializer}
    held |= {n.output[0]: a.t for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    for node in resizes:
        before = types.get(node.input[0], (0, None))[1] or ()
        rank, factors = len(before), _read_factors(node, held)
        axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), range(len(factors)))
        sizes = [(a % rank, before[a], s) for a, s in zip(axes, factors, strict=False) if -rank <= a < rank]
        doubtful = [a for a, d, s in sizes if isinstance(d, int) and is_ambiguous(d, s)]
        if doubtful:
            found[node.output[0]] = rank, doubtful
    return found


def _read_factors(node: onnx.NodeProto, held: Mapping[str, onnx.TensorProto]) -> list[float]:
    """The factors of a Resize or an Upsample; empty if they are unknown, or sizes are given instead."""
    given = [a.floats for a in node.attribute if a.name == "scales"]
    names = node.input[2:3] if len(node.input) > 2 else node.input[1:2]
    tensors = [held[name] for name in names if name in held]
    if given or not tensors or tensors[0].data_type != onnx.TensorProto.FLOAT:
        return list(given[0]) if given else []
    return [float(v) for v in onnx.numpy_helper.to_array(tensors[0]).ravel()]


def hide_sizes(model: onnx.ModelProto, opaque: Mapping[str, tuple[int, Sequence[int]]]) -> onnx.ModelProto:
    """Hide the sizes of these outputs along these axes behind a Concat with a tensor of unknown size."""
    graph = model.graph
    originals = list(graph.node)
    del graph.node[:]
    ranks: set[int] = set()
    for node in originals:
        graph.node.append(node)
        if not node.output or node.output[0] not in opaque:
            continue
        name = node.output[0]
        rank, axes = opaque[name]
        if rank not in ranks:
            ranks.add(rank)
            graph.input.append(onnx.helper.make_tensor_value_info(f"{rank} unknown sizes", 1, [None] * rank))
        graph.node[-1].output[0] = part = f"{name} alone"
        for axis in axes:
            target = name if axis == axes[-1] else f"{name} axis {axis}"
            graph.node.append(onnx.helper.make_node("Concat", [part, f"{rank} unknown sizes"], [target], axis=axis))
            part = target
    return model
