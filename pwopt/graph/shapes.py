"""Infers the shapes and types of all tensors of a model with onnx, without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import onnx
from onnx import TensorProto, shape_inference

from pwopt.graph.disagreements import correct_nodes, find_wrong_sizes, hide_sizes
from pwopt.graph.functions import count_expanded
from pwopt.graph.limits import run_isolated
from pwopt.graph.memo import memoize
from pwopt.graph.operators import BOUNDED
from pwopt.graph.stand_ins import Skeleton, find_implied, insert_stand_ins, is_foreign

Dim = int | str | None
Shape = tuple[Dim, ...]
#: A function from a shape to another one; None if that is unknown.
ShapeChange = Callable[[Shape], Shape | None]

#: The longest one-dimensional tensor whose elements inference may propagate.
MAX_PROPAGATED_LENGTH = 1 << 16
#: Bytes that inference may use, and more for each byte of the graph. It needs a tenth of both.
INFERENCE_MEMORY, INFERENCE_COPIES = 1 << 28, 64

#: Inference needs no memory limit up to this many elements; the largest number of axes.
UNLIMITED_ELEMENTS, MAX_RANK = 1 << 22, 32

#: Since this IR version, an initializer that is also an input is a default that callers may override.
OVERRIDABLE_SINCE_IR = 4
#: Initializers up to this many elements may be shapes, axes or sizes, whose values inference reads.
MAX_SHAPE_VALUES = 1024


def read_dims(value: onnx.TypeProto) -> Shape | None:
    """Read the dimensions of a tensor type: an int if fixed, a str if named, None if unknown or negative."""
    if not value.HasField("tensor_type") or not value.tensor_type.HasField("shape"):
        return None
    return tuple(
        (d.dim_value if d.dim_value >= 0 else None) if d.HasField("dim_value") else (d.dim_param or None)
        for d in value.tensor_type.shape.dim
    )


def set_channels(axis: int | None, count: int) -> ShapeChange:
    """Return a function that sets the number of channels of a shape."""
    return lambda shape: tuple(count if a == axis else d for a, d in enumerate(shape))


def as_fixed(shape: Sequence[Dim] | None) -> tuple[int, ...] | None:
    """Return the shape if every dimension is a number, else None."""
    if shape is None:
        return None
    for d in shape:
        if not isinstance(d, int) or d < 0:
            return None
    return cast("tuple[int, ...]", tuple(shape))


def format_shape(shape: Sequence[object]) -> str:
    """Format a shape for people, with "?" for an unknown dimension."""
    return "×".join("?" if d is None else str(d) for d in shape) or "a scalar"


def make_skeleton(model: onnx.ModelProto, inputs: Mapping[str, Sequence[Dim]] | None = None) -> onnx.ModelProto:
    """Copy a model for inference: large weights become inputs, and declared shapes of inner tensors are dropped.

    Initializers that callers may override are inputs only: shapes that follow from their values are not certain.

    Exporters' ``value_info`` is sometimes stale, so only the inputs are believed, and what is declared of the outputs
    of operators whose shapes nothing else tells (`find_declared`). `inputs` replaces the shapes of graph inputs, by
    numbers or by names that can be followed through the graph.
    """
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    if model.functions and count_expanded(model) is not None:  # inference goes through a function anew at each call
        light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    initialized = set()
    overridable = {v.name for v in model.graph.input} if model.ir_version >= OVERRIDABLE_SINCE_IR else set()
    for tensor in model.graph.initializer:
        if tensor.name in overridable:
            continue
        initialized.add(tensor.name)
        size = 1
        for d in tensor.dims:
            size *= d
        if size <= MAX_SHAPE_VALUES and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in model.graph.input:
        if value.name in initialized:
            continue
        graph.input.append(value)
        if inputs and value.name in inputs:
            shape = graph.input[-1].type.tensor_type.shape
            del shape.dim[:]
            for d in inputs[value.name]:
                added = shape.dim.add()
                if isinstance(d, str):
                    added.dim_param = d
                elif d is not None:
                    added.dim_value = int(d)
    for value in model.graph.output:
        graph.output.append(value)
        if value.type.HasField("tensor_type"):
            graph.output[-1].type.tensor_type.ClearField("shape")
    graph.node.extend(model.graph.node)
    graph.value_info.extend(find_declared(model, inputs))
    correct_nodes(light)
    return light


def find_declared(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[Dim]] | None = None
) -> list[onnx.ValueInfoProto]:
    """Find what is declared of the outputs of operators whose shapes neither inference nor a stand-in gives.

    These declarations are the only knowledge of such shapes, so pwopt relies on them. A named size counts only if the
    model's inputs have a size of that name; `inputs` may replace it.
    """
    declared = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    skeleton = Skeleton(model)
    names = [n for node in model.graph.node if is_foreign(node, skeleton) for n in node.output if n in declared]
    if not names:
        return []
    sizes: dict[str, set[Dim]] = {}
    for value in model.graph.input:
        before = read_dims(value.type) or ()
        after = (inputs or {}).get(value.name, before)
        for old, new in zip(before, after, strict=False):
            if isinstance(old, str):
                sizes.setdefault(old, set()).add(new)
    known = {name: found.pop() for name, found in sizes.items() if len(found) == 1}
    result = []
    for name in names:
        shape = read_dims(declared[name].type)
        if shape is not None:
            dims = [known.get(d) if isinstance(d, str) else d for d in shape]
            code = declared[name].type.tensor_type.elem_type
            result.append(onnx.helper.make_tensor_value_info(name, code, dims))
    return result


def infer(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[Dim]] | None = None
) -> dict[str, tuple[int, Shape | None]]:
    """Infer the element type (``onnx.TensorProto.DataType``) and the shape of every tensor.

    Parameters
    ----------
    inputs : mapping of input name to shape, optional
        Sizes to assume; without them the result holds for every input the model accepts.
    """
    return dict(_infer_exactly(make_skeleton(model, inputs)))


@memoize
def _infer_exactly(light: onnx.ModelProto) -> dict[str, tuple[int, Shape | None]]:
    insert_stand_ins(light)
    types = _infer(light)
    implied = find_implied(light, lambda name: types.get(name, (0, None))[1] is None)
    if implied:
        _declare(light, implied)
        types = _infer(light)
    wrong = find_wrong_sizes(light, types)
    return _infer(hide_sizes(light, wrong)) if wrong else types


def _declare(light: onnx.ModelProto, values: Sequence[onnx.ValueInfoProto]) -> None:
    """Declare shapes of inputs and of inner tensors, in place."""
    given = {v.name: v for v in light.graph.input}
    for value in values:
        if value.name in given:
            given[value.name].type.tensor_type.shape.CopyFrom(value.type.tensor_type.shape)
        else:
            light.graph.value_info.append(value)


def _infer(light: onnx.ModelProto) -> dict[str, tuple[int, Shape | None]]:
    """Infer without data propagation first, and with it if a shape is still unknown.

    Data propagation stores every element of a one-dimensional tensor. A model can make these terabytes.
    """
    try:
        types = _read_types(shape_inference.infer_shapes(light))
    except Exception:  # inference stops at an unknown construct; the declared shapes still hold
        return _read_types(light)
    outputs = {name for node in light.graph.node for name in node.output if name}
    if all(as_fixed(types.get(name, (0, None))[1]) is not None for name in outputs):
        return types
    if _is_too_wide(light, types):
        return types
    if _is_bounded(light):
        return _read_types(shape_inference.infer_shapes(light, data_prop=True))
    content = light.SerializeToString()
    found = run_isolated(
        lambda: shape_inference.infer_shapes(content, data_prop=True).SerializeToString(),
        INFERENCE_MEMORY + INFERENCE_COPIES * len(content),
    )
    return types if found is None else _read_types(onnx.load_from_string(found))


def infer_alone(light: onnx.ModelProto) -> dict[str, Shape | None]:
    """Infer the shapes of a model of one operator and the shapes of the targets that it reads."""
    correct_nodes(light)
    insert_stand_ins(light)
    stores = any(_propagates(node) for node in light.graph.node if node.op_type != "Shape")  # maybe very many elements
    try:
        types = _read_types(shape_inference.infer_shapes(light, data_prop=not stores))
    except Exception:  # inference raises many types
        return {}
    wrong = find_wrong_sizes(light, types)
    return {name: shape for name, (_, shape) in types.items() if name not in wrong}


def find_contradiction(model: onnx.ModelProto, inputs: Mapping[str, Sequence[Dim]] | None = None) -> str:
    """Return why onnx's strict inference rejects a model with these input sizes, in one line, or ""."""
    light = make_skeleton(model, inputs)
    types = _infer_exactly(make_skeleton(model, inputs))
    light = hide_sizes(light, find_wrong_sizes(light, types))
    data_prop = not _is_too_wide(light, types)
    content = light.SerializeToString()

    def find_message() -> bytes:
        try:
            shape_inference.infer_shapes(content, strict_mode=True, data_prop=data_prop)
        except Exception as error:  # inference raises many types
            return " ".join(str(error).split())[:300].encode()
        return b""

    if not data_prop or _is_bounded(light):  # needs no limit, and a copy of a large process takes long to create
        message: bytes | None = find_message()
    else:
        message = run_isolated(find_message, INFERENCE_MEMORY + INFERENCE_COPIES * len(content))
    return (message or b"").decode(errors="replace")


def _is_too_wide(light: onnx.ModelProto, types: Mapping[str, tuple[int, Shape | None]]) -> bool:
    """Whether data propagation would use too much memory."""
    inputs = {name for node in light.graph.node if _propagates(node) for name in node.input}
    sizes = (as_fixed(types.get(name, (0, None))[1]) for name in inputs)
    return any(size is not None and len(size) == 1 and size[0] > MAX_PROPAGATED_LENGTH for size in sizes)


def _is_bounded(light: onnx.ModelProto) -> bool:
    """Whether data propagation uses little memory, so that it needs no limit.

    This holds if no value or attribute determines the size of a tensor, no operator flattens a larger tensor to one
    axis, and inputs and concatenated shapes have ordinary sizes.
    """
    held = {t.name: math.prod(t.dims) for t in light.graph.initializer}
    planes = {name for name, size in held.items() if size > 1}  # used as shapes, these have two axes or more
    inputs = [read_dims(v.type) or () for v in light.graph.input]
    if any(math.prod(d for d in shape if isinstance(d, int)) > UNLIMITED_ELEMENTS for shape in inputs):
        return False
    total = 0
    for node in light.graph.node:
        read = [held.get(name, 0) for name in node.input]
        size = max((math.prod(a.t.dims) for a in node.attribute if a.HasField("t")), default=0)
        largest = max((max(map(abs, (a.i, *a.ints))) for a in node.attribute if a.type in (a.INT, a.INTS)), default=0)
        flat = node.op_type == "Reshape" and len(read) > 1 and node.input[1] not in planes
        if node.domain or node.op_type not in BOUNDED or flat or largest > MAX_PROPAGATED_LENGTH:
            return False
        if node.op_type in ("Shape", "Size"):
            size = MAX_RANK
        elif _propagates(node):
            size = sum(read) if node.op_type == "Concat" else max(read, default=0)
        if (node.op_type == "Concat" and len(read) > 1) or (node.op_type == "Constant" and size > 1):
            planes.update(node.output)
        held.update(dict.fromkeys(node.output, size))
        total += size
    return total <= UNLIMITED_ELEMENTS


def _propagates(node: onnx.NodeProto) -> bool:
    return onnx.defs.has(node.op_type) and onnx.defs.get_schema(node.op_type).has_data_propagation_function


def _read_types(model: onnx.ModelProto) -> dict[str, tuple[int, Shape | None]]:
    """Read the types of all tensors that the model declares."""
    graph = model.graph
    types: dict[str, tuple[int, Shape | None]] = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.HasField("tensor_type"):
            types[value.name] = (value.type.tensor_type.elem_type, read_dims(value.type))
    return types


def find_objection(model: onnx.ModelProto) -> str:
    """Return why onnx's checker or its strict inference rejects a model, in one line, or ""."""
    light = make_skeleton(model)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = light.ir_version
    context.opset_imports = {o.domain: o.version for o in light.opset_import}
    try:
        for node in light.graph.node:
            if not any(a.HasField("g") or a.graphs for a in node.attribute):  # to the checker, captures are undefined
                onnx.checker.check_node(node, context)
        shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except Exception as error:  # both raise many types
        return " ".join(str(error).split())[:300]
    return ""
