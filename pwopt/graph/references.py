"""Names of tensors that other parts of a model than its graph refer to."""

from __future__ import annotations

import onnx

from pwopt.graph.functions import nodes_within


def names_in_training(proto: onnx.ModelProto) -> frozenset[str]:
    """Tensors of the graph that the training information updates or reads. Training changes their values."""
    names: set[str] = set()
    for info in proto.training_info:
        names.update(entry.key for entry in (*info.initialization_binding, *info.update_binding))
        for graph in (info.initialization, info.algorithm):
            inside = {v.name for v in (*graph.input, *graph.initializer)}
            inside |= {name for node in nodes_within(graph.node) for name in node.output}
            names.update(name for node in nodes_within(graph.node) for name in node.input if name not in inside)
    return frozenset(filter(None, names))


def names_in_annotations(proto: onnx.ModelProto) -> frozenset[str]:
    """Tensors of the graph that quantisation annotations describe or name as parameters."""
    annotations = proto.graph.quantization_annotation
    parameters = {entry.value for a in annotations for entry in a.quant_parameter_tensor_names}
    return frozenset(parameters.union(a.tensor_name for a in annotations))
