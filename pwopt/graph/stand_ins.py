"""Stand-ins for operators whose shapes onnx cannot infer.

Shape inference knows nothing behind the first operator without an inference function: GroupNormalization,
MeanVarianceNormalization, the operators of onnxruntime's own domain, a custom operator. Before inference, each such
operator is replaced by standard operators whose outputs have the same shapes and types. Only inference sees them. The
behaviour of the operators of com.microsoft is documented in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
from onnx.helper import make_node

from pwopt.graph.operators import MICROSOFT_SAME_SHAPE, SAME_SHAPE

#: onnxruntime's own domain.
MICROSOFT = "com.microsoft"
#: The names of ONNX's own domain.
STANDARD = ("", "ai.onnx")
#: Operators of normalisations that onnxruntime registers in ONNX's domain although ONNX has no such operator there.
RUNTIME_NORMALIZATIONS = ("LayerNormalization", "SimplifiedLayerNormalization")
#: The outputs with the shape of the first input, of operators for which this is not the first output alone.
SAME_OUTPUTS = {"SkipLayerNormalization": (0, 3), "SkipSimplifiedLayerNormalization": (0, 3), "SkipGroupNorm": (0, 1)}

#: A version above that of every operator set of another domain.
NEWEST = 1 << 16


class Skeleton:
    """The constants of a model for inference, and the tensors of known shape that stand-ins read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = next((o.version for o in model.opset_import if o.domain in STANDARD), 1)
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.dims: dict[str, tuple[int, tuple[int, ...]]] = {
            t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer
        }
        for value in model.graph.input:
            sizes = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in sizes):
                self.dims.setdefault(value.name, (value.type.tensor_type.elem_type, tuple(d.dim_value for d in sizes)))
        self.inputs: list[onnx.ValueInfoProto] = []

    def add_sized(self, like: str, dims: Sequence[int]) -> str:
        """Add a tensor of these dimensions, with the element type of a constant; return its name."""
        name = f"{like} as {'x'.join(map(str, dims))}"
        self.inputs.append(onnx.helper.make_tensor_value_info(name, self.dims[like][0], dims))
        return name

    def matrix(self, name: str) -> tuple[int, int] | None:
        """The dimensions of a constant matrix; None for any other tensor."""
        dims = self.dims.get(name, (0, ()))[1]
        return (dims[0], dims[1]) if len(dims) == 2 else None


def _read_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _copy_as(node: onnx.NodeProto, op: str, inputs: Sequence[str], *dropped: str) -> list[onnx.NodeProto]:
    """The node as a standard operator, with other inputs and without some attributes."""
    kept = onnx.NodeProto(op_type=op, name=node.name, input=inputs, output=node.output[:1])
    kept.attribute.extend(a for a in node.attribute if a.name not in dropped)
    return [kept]


StandIn = Callable[[onnx.NodeProto, Skeleton], "list[onnx.NodeProto] | None"]
STAND_INS: dict[str, StandIn] = {}


def _stands_for(*ops: str) -> Callable[[StandIn], StandIn]:
    def register(make: StandIn) -> StandIn:
        STAND_INS.update(dict.fromkeys(ops, make))
        return make

    return register


@_stands_for("FusedConv")
def _fused_conv(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto]:
    return _copy_as(node, "Conv", node.input[:3], "activation", "activation_params")


@_stands_for("FusedGemm")
def _fused_gemm(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto]:
    names = ("activation", "activation_alpha", "activation_beta", "activation_gamma")
    return _copy_as(node, "Gemm", node.input[:3], *names)


@_stands_for("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul")
def _fused_matmul(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    given = _read_attributes(node)
    left, right = node.input[:2]
    if given.get("transBatchA") or given.get("transBatchB"):
        return None
    turned = [bool(given.get(name)) for name in ("transA", "transB")]
    matrix = skeleton.matrix(right)
    if turned[1] and matrix is not None:
        right, turned[1] = skeleton.add_sized(right, matrix[::-1]), False
    if not any(turned):
        return [make_node("MatMul", [left, right], node.output[:1])]
    operands = ("...ji" if turned[0] else "...ij"), ("...kj" if turned[1] else "...jk")
    return [make_node("Einsum", [left, right], node.output[:1], equation=f"{','.join(operands)}->...ik")]


@_stands_for("GemmFastGelu", "DynamicQuantizeMatMul")
def _matmul(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    matrix = skeleton.matrix(node.input[1])
    if matrix is None:
        return None
    scale = node.input[2] if node.op_type == "DynamicQuantizeMatMul" else node.input[1]
    if scale not in skeleton.dims:
        return None
    name = f"{node.input[1]} as numbers"
    skeleton.inputs.append(onnx.helper.make_tensor_value_info(name, skeleton.dims[scale][0], matrix))
    return [make_node("MatMul", [node.input[0], name], node.output[:1])]


@_stands_for("MatMulNBits")
def _matmul_nbits(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    given = _read_attributes(node)
    if node.input[2] not in skeleton.dims:  # the scales have the type of the result
        return None
    weight = skeleton.add_sized(node.input[2], (given["K"], given["N"]))
    return [make_node("MatMul", [node.input[0], weight], node.output[:1])]


@_stands_for("Attention")
def _attention(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    matrix, sizes = skeleton.matrix(node.input[1]), _read_attributes(node).get("qkv_hidden_sizes")
    if matrix is None:
        return None
    width = sizes[2] if sizes else matrix[1] // 3
    weight = skeleton.add_sized(node.input[1], (matrix[0], width))
    return [make_node("MatMul", [node.input[0], weight], node.output[:1])]


@_stands_for("MultiHeadAttention")
def _multi_head_attention(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    """Query (batch, n, width), key (batch, m, width) and value (batch, m, v) give (batch, n, v)."""
    if len(node.input) < 3 or not all(node.input[:3]):  # packed into one tensor
        return None
    read = [node.input[0], node.input[2]]
    return [make_node("Einsum", read, node.output[:1], equation="bsd,btv->bsv")]


@_stands_for("GroupQueryAttention")
def _group_query_attention(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    if len(node.input) < 3 or not all(node.input[:3]):
        return None
    return [make_node("Identity", node.input[:1], node.output[:1])]


@_stands_for("EmbedLayerNormalization")
def _embed_layer_normalization(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto]:
    read = [node.input[2], node.input[0]]
    return [make_node("Gather", read, [node.output[i]]) for i in (0, 2) if len(node.output) > i and node.output[i]]


@_stands_for("QuantizeLinear", "DequantizeLinear")
def _quantize(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    return _copy_as(node, node.op_type, node.input) if skeleton.opset >= 13 else None


@_stands_for("QLinearAdd", "QLinearMul")
def _quantised_arithmetic(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto]:
    """The operands are inputs 0 and 3. Inference of Add accepts their types, although ONNX's Add may not."""
    return [make_node(node.op_type.removeprefix("QLinear"), [node.input[0], node.input[3]], node.output[:1])]


@_stands_for("QLinearGlobalAveragePool")
def _quantised_global_pool(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    if _read_attributes(node).get("channels_last"):
        return None
    return [make_node("GlobalAveragePool", node.input[:1], node.output[:1])]


@_stands_for("QLinearConcat")
def _quantised_concat(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto]:
    return _copy_as(node, "Concat", node.input[2::3])


def _keep_shape(node: onnx.NodeProto, outputs: Iterable[int] = (0,)) -> list[onnx.NodeProto]:
    made = [node.output[i] for i in outputs if len(node.output) > i and node.output[i]]
    return [make_node("Identity", node.input[:1], [name]) for name in made]


def _can_infer(node: onnx.NodeProto, skeleton: Skeleton) -> bool:
    """Whether inference knows the operator: from its schema, from a function of the model, or from its bodies."""
    if (node.domain, node.op_type) in skeleton.functions:
        return True
    standard = node.domain in STANDARD
    return _has_inference(node.op_type, skeleton.opset if standard else NEWEST, "" if standard else node.domain)


@functools.cache
def _has_inference(op: str, version: int, domain: str) -> bool:
    if not onnx.defs.has(op, version, domain):
        return False
    return bool(onnx.defs.get_schema(op, version, domain).has_type_and_shape_inference_function)


def _make_stand_in(node: onnx.NodeProto, skeleton: Skeleton) -> list[onnx.NodeProto] | None:
    """The operators that stand for a node; None if its shapes remain unknown."""
    if node.domain == MICROSOFT and node.op_type in STAND_INS:
        return STAND_INS[node.op_type](node, skeleton)
    kept = SAME_SHAPE.union(RUNTIME_NORMALIZATIONS) if node.domain in STANDARD else frozenset[str]()
    if node.domain == MICROSOFT:
        kept = MICROSOFT_SAME_SHAPE
    if node.op_type in kept and node.input and node.input[0]:
        return _keep_shape(node, SAME_OUTPUTS.get(node.op_type, (0,)))
    return None


def is_foreign(node: onnx.NodeProto, skeleton: Skeleton) -> bool:
    """Whether neither inference nor a stand-in gives the shapes of the outputs of a node."""
    try:
        return not _can_infer(node, skeleton) and _make_stand_in(node, skeleton) is None
    except (IndexError, KeyError):  # it lacks an input or an attribute that it must have
        return True


def insert_stand_ins(light: onnx.ModelProto) -> None:
    """Replace the operators of a model for inference that inference does not know, in place."""
    skeleton = Skeleton(light)
    nodes: list[onnx.NodeProto] = []
    replaced = False
    for node in light.graph.node:
        try:
            found = None if _can_infer(node, skeleton) else _make_stand_in(node, skeleton)
        except (IndexError, KeyError):
            found = None
        nodes += [node] if found is None else found
        replaced = replaced or found is not None
    if not replaced:
        return
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del light.graph.node[:]
    light.graph.node.extend(kept)
    light.graph.input.extend(skeleton.inputs)


def find_implied(light: onnx.ModelProto, unknown: Callable[[str], bool]) -> list[onnx.ValueInfoProto]:
    """Find tensors of unknown rank that operators with constant weights read, and what the weights say of them.

    A Conv with a weight (out, in / groups, *kernel) reads a tensor with as many axes, and `in` channels.

    Parameters
    ----------
    light : onnx.ModelProto
    unknown : callable
        Whether a tensor's shape is unknown.
    """
    dims = Skeleton(light).dims
    found: dict[str, onnx.ValueInfoProto] = {}
    for node in light.graph.node:
        if node.domain not in STANDARD or node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 2:
            continue
        code, weight = dims.get(node.input[1], (0, ()))
        if node.input[0] in found or len(weight) < 2 or not unknown(node.input[0]):
            continue
        given = _read_attributes(node)
        shape: list[int | None] = [None] * len(weight)
        if node.op_type == "Gemm":
            shape[0 if given.get("transA") else 1] = weight[1 if given.get("transB") else 0]
        else:
            shape[1] = weight[1] * given.get("group", 1) if node.op_type == "Conv" else weight[0]
        found[node.input[0]] = onnx.helper.make_tensor_value_info(node.input[0], code, shape)
    return list(found.values())
