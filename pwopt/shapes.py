"""Shapes and types of every tensor of a model, by onnx's own inference, without touching its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, shape_inference

Dim = int | str | None
Shape = tuple[Dim, ...]

#: Initializers up to this many elements may be shapes, axes or sizes, whose values inference reads.
SMALL = 1024


def dims(value: onnx.TypeProto) -> Shape | None:
    """Dimensions of a tensor type: an int where fixed, a str where named, None where unknown."""
    if not value.HasField("tensor_type") or not value.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in value.tensor_type.shape.dim)


def known(shape: Sequence[Dim] | None) -> tuple[int, ...] | None:
    """The shape if every dimension is a number, else None."""
    if shape is None or not all(isinstance(d, int) and d >= 0 for d in shape):
        return None
    return tuple(d for d in shape if isinstance(d, int))


def skeleton(model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]] | None = None) -> onnx.ModelProto:
    """A copy of `model` for inference: large weights become inputs, declared inner shapes are dropped.

    Exporters' ``value_info`` is sometimes stale, so only the inputs are believed. `inputs` replaces
    the shapes of graph inputs by fixed ones.
    """
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    initialized = set()
    for tensor in model.graph.initializer:
        initialized.add(tensor.name)
        size = 1
        for d in tensor.dims:
            size *= d
        if size <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
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
                shape.dim.add(dim_value=d)
    for value in model.graph.output:
        graph.output.append(value)
        if value.type.HasField("tensor_type"):
            graph.output[-1].type.tensor_type.ClearField("shape")
    graph.node.extend(model.graph.node)
    return light


def infer(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, Shape | None]]:
    """Element type (``onnx.TensorProto.DataType``) and shape of every tensor that inference settles.

    Parameters
    ----------
    inputs : mapping of input name to fixed shape, optional
        Sizes to assume; without them the result holds for every input the model accepts.
    """
    light = skeleton(model, inputs)
    try:
        inferred = shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # inference stops at what it does not understand; what is declared still holds
        inferred = light
    graph = inferred.graph
    types: dict[str, tuple[int, Shape | None]] = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.HasField("tensor_type"):
            types[value.name] = (value.type.tensor_type.elem_type, dims(value.type))
    return types
