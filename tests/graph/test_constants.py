"""Constant folding computes what onnxruntime computes, or refuses."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from helpers import open_session, ops, same
from onnx import TensorProto, helper, numpy_helper

import pwopt
from pwopt.graph.constants import _count_einsum, evaluate
from pwopt.graph.ir import Constant, Node, Variable, as_message
from pwopt.graph.operators import FOLDABLE
from pwopt.graph.shapes import infer

F, D, H, L = np.float32, np.float64, np.float16, np.int64
OPSETS = (1, 6, 7, 9, 10, 11, 12, 13, 14, 17, 18, 20, 21)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(F)
SPECIAL = np.array([0.0, -0.0, 1.5, -1.5, 2.5, np.inf, -np.inf, np.nan, 1e30, 3e9, -3e9, 300], F)
INTEGERS = np.array([-7, -3, -1, 0, 1, 2, 7, -8], L)
DIVISORS = np.array([2, -2, 3, -3, 5, -5, 7, 2], L)
AXES: tuple[list[int], ...] = ([0], [-1], [0, 2], [2, 0], [-2, -1], [1, 0], [1, -1], [])
Inputs = Sequence[np.ndarray]


def runtime(op: str, attrs: dict[str, object], inputs: Inputs, opset: int, count: int) -> list[np.ndarray] | None:
    """What onnxruntime computes; None if it does not take the operator."""
    names = [f"i{k}" for k in range(len(inputs))]
    node = helper.make_node(op, names, [f"o{k}" for k in range(count)])
    node.attribute.extend(as_message(Node(op, "n", attrs)).attribute)
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "one", values, [onnx.ValueInfoProto(name=n) for n in node.output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    try:
        return list(open_session(model, optimise=False).run(None, dict(zip(names, inputs, strict=True))))
    except Exception:  # whatever the runtime raises for types and opsets that it does not take
        return None


def check(
    op: str, attrs: dict[str, object], *inputs: np.ndarray, count: int = 1, opsets: Sequence[int] = OPSETS
) -> int:
    """Compare folding with onnxruntime at some opsets; returns how often both computed something."""
    compared = 0
    for opset in opsets:
        constants = [Constant(f"i{k}", v) for k, v in enumerate(inputs)]
        node = Node(op, "n", dict(attrs), constants, [Variable(f"o{k}") for k in range(count)])
        found = evaluate(node, {c.name: c.values for c in constants}, opset)
        expected = None if isinstance(found, str) else runtime(op, attrs, inputs, opset, count)
        if expected is None:
            continue
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (op, attrs, opset)
            np.testing.assert_allclose(
                a.astype(D), b.astype(D), 2e-3 if a.dtype == H else 1e-5, 1e-5 if op == "Resize" else 1e-6
            )
        compared += 1
    return compared


CASES: dict[str, list[tuple[dict[str, object], tuple[np.ndarray, ...]]]] = {
    **{op: [({}, (SPECIAL,)), ({}, (X.astype(H),)), ({}, (INTEGERS,))] for op in ("Abs", "Neg")},
    **{op: [({}, (SPECIAL,)), ({}, (X,))] for op in ("Ceil", "Exp", "Floor", "Log", "Reciprocal", "Sqrt")},
    **{
        op: [({}, (X, X[:, :1])), ({}, (SPECIAL, SPECIAL[::-1].copy())), ({}, (INTEGERS, DIVISORS))]
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")
    },
    "Mod": [({}, (INTEGERS, DIVISORS)), ({"fmod": 1}, (INTEGERS, DIVISORS)), ({"fmod": 1}, (X, X[:1]))],
    "Pow": [({}, (np.abs(X), X)), ({}, (INTEGERS, np.array(2, F))), ({}, (INTEGERS[4:6], -DIVISORS[:2]))],
    **{
        op: [({}, (INTEGERS, DIVISORS)), ({}, (SPECIAL, SPECIAL[::-1].copy()))]
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{op: [({}, (X > 0, X[:1] > 0.5))] for op in ("And", "Or", "Xor")},
    "Not": [({}, (X > 0,))],
    "Where": [({}, (X > 0, X, X[:1]))],
    "Cast": [({"to": to}, (v,)) for to in (1, 6, 7, 9, 10, 11) for v in (SPECIAL[:5], INTEGERS, X > 0, X.astype(H))],
    "Concat": [({"axis": a}, (X, X)) for a in (0, 2, -1)],
    "ConstantOfShape": [({}, (np.array(s, L),)) for s in ([2, 3], [0, 2], [])],
    "Expand": [({}, (X[:, :1], np.array(s, L))) for s in ([2, 3, 4], [5, 1, 3, 1], [1])],
    "Flatten": [({"axis": a}, (X,)) for a in (0, 1, 3, -1)],
    "Gather": [({"axis": a}, (X, np.array(i, L))) for a in (0, 1, -1) for i in (1, [0, -1], [[1]])],
    "GatherElements": [({"axis": 1}, (X[0, :2], np.array([[0, 2], [1, -1]], L)))],
    "GatherND": [({}, (X, np.array([[0, 1], [1, -1]], L))), ({"batch_dims": 1}, (X, np.array([[1], [-1]], L)))],
    "Range": [({}, tuple(np.array(v, t) for v in (0, 1, 0.3))) for t in (F, D)]
    + [({}, tuple(np.array(v, L) for v in (9, 0, -2)))],
    **{
        op: [
            case
            for axes in AXES
            for keep in (0, 1)
            for case in (
                ({"axes": axes, "keepdims": keep}, (X,)),
                ({"keepdims": keep}, (X, np.array(axes, L))),
                ({"noop_with_empty_axes": keep}, (INTEGERS.reshape(2, 2, 2), np.array(axes, L))),
            )
        ]
        + [({"keepdims": 0}, (SPECIAL,))]
        for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")
    },
    "Reshape": [({}, (X, np.array(s, L))) for s in ([6, 4], [0, -1], [2, 0, 2, 2])]
    + [({"allowzero": a}, (X[:, :0], np.array([[0, 0, 4], [3, 0]][a], L))) for a in (0, 1)],
    "Shape": [({}, (X,)), ({"start": -2}, (X,)), ({"start": 0, "end": -1}, (X,))],
    "Size": [({}, (X,))],
    "Slice": [({"starts": [1], "ends": [3], "axes": [-1]}, (X,)), ({"starts": [-2], "ends": [100]}, (X,))]
    + [
        ({}, (X, *(np.array([v], L) for v in limits)))
        for limits in ((0, 2, 0, 1), (-2, 100, 1, 1), (3, -100, 2, -1), (-1, -5, 2, -2), (2, 0, 2, 1))
    ],
    "Squeeze": [({"axes": a}, (X.reshape(1, 6, 1, 4, 1),)) for a in ([2], [2, 0], [-1], [0, -1], [])]
    + [({}, (X.reshape(1, 6, 1, 4, 1), np.array(a, L))) for a in ([2, 0], [-1, -3], [])]
    + [({}, (X[None],))],
    "Split": [({"axis": 1}, (X,)), ({"axis": 0, "num_outputs": 3}, (X.reshape(6, 4),))],
    "Tile": [({}, (X, np.array(r, L))) for r in ([2, 1, 1], [1, 0, 2])],
    "Transpose": [({}, (X,)), ({"perm": [2, 0, 1]}, (X,))],
    "Unsqueeze": [case for a in AXES[:-1] for case in (({"axes": a}, (X,)), ({}, (X, np.array(a, L))))],
}
#: Images, kernels and the bias of a convolution.
IMAGES, KERNELS = RNG.normal(size=(2, 4, 7, 6)).astype(F), RNG.normal(size=(6, 2, 3, 3)).astype(F)
BIAS = RNG.normal(size=6).astype(F)
MEMBERS = np.array([[1, 0, -1], [0, 1, 0]], L)
CASES |= {
    **{
        op: [({}, (X,)), ({}, (X.astype(H),)), ({}, (np.array([0.0, -0.0, 30.0, -30.0], F),))]
        for op in (
            "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Erf", "Gelu", "HardSwish", "Mish",
            "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh",
        )
    },
    **{op: [({}, (X,)), ({"alpha": 0.5}, (X,))] for op in ("Celu", "Elu", "HardSigmoid", "LeakyRelu", "Selu")},
    "ThresholdedRelu": [({"alpha": 0.5}, (X,))],
    "PRelu": [({}, (X, X[:1, :, :1]))],
    "Clip": [({}, (X, np.array(-0.5, F), np.array(0.5, F))), ({"min": -0.5, "max": 0.25}, (X,)), ({}, (X, np.array(0.1, F)))],
    **{op: [({}, (SPECIAL,))] for op in ("IsInf", "IsNaN")},
    **{op: [({"axis": a}, (X,)) for a in (0, 1, -1)] + [({}, (X,))] for op in ("LogSoftmax", "Softmax")},
    "CumSum": [({"exclusive": e, "reverse": r}, (X, np.array(1, np.int32))) for e in (0, 1) for r in (0, 1)]
    + [({}, (INTEGERS, np.array(0, L)))],
    "Conv": [
        ({"group": 2}, (IMAGES, KERNELS, BIAS)),
        ({"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}, (IMAGES, KERNELS)),
        ({"group": 2, "dilations": [2, 1], "auto_pad": "SAME_UPPER"}, (IMAGES, KERNELS)),
        ({"group": 2, "strides": [2, 2], "auto_pad": "SAME_LOWER"}, (IMAGES, KERNELS)),
        ({"group": 2, "strides": [3, 5], "dilations": [1, 2], "auto_pad": "SAME_LOWER"}, (IMAGES, KERNELS)),
        ({}, (X, X[:, :, :1])),
    ],
    "MatMul": [({}, (X, X.transpose(0, 2, 1).copy())), ({}, (X, X[0, 0])), ({}, (X[0, 0], X[0].T.copy()))],
    "Gemm": [
        ({}, (X[0], X[1].T.copy(), X[0, :, 0])),
        ({"transA": 1, "alpha": 0.5, "beta": 2.0}, (X[0], X[1], X[0, 0])),
        ({"transB": 1}, (X[0], X[1])),
    ],
    **{
        op: [({"axes": [-1], "keepdims": k}, (X,)) for k in (0, 1)] + [({}, (X, np.array([0, 2], L))), ({"keepdims": 0}, (X,))]
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSumSquare")
    },
    "ReduceLogSum": [({"axes": [1]}, (np.abs(X),)), ({"keepdims": 0}, (np.abs(X), np.array([0], L)))],
    **{op: [({}, (X, X)), ({}, (X, X, X))] for op in ("Mean", "Sum")},
    **{op: [({"axis": a, "keepdims": k, "select_last_index": k}, (X,)) for a in (0, -1) for k in (0, 1)] for op in ("ArgMax", "ArgMin")},
    "TopK": [({"largest": g, "axis": a}, (X, np.array([2], L))) for g in (0, 1) for a in (1, -1)],
    "AveragePool": [
        ({"kernel_shape": [3, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}, (IMAGES,)),
    ],
    "MaxPool": [
        ({"kernel_shape": [3, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}, (IMAGES,)),
        ({"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}, (IMAGES,)),
    ],
    **{op: [({}, (IMAGES,)), ({}, (X,))] for op in ("GlobalAveragePool", "GlobalMaxPool")},
    "LayerNormalization": [({"axis": a}, (X, X[0, 0], X[1, 0])) for a in (-1, 2)],
    "DepthToSpace": [({"blocksize": 2, "mode": m}, (IMAGES,)) for m in ("DCR", "CRD")],
    "SpaceToDepth": [({"blocksize": 2}, (IMAGES[:, :, :6],))],
    "Pad": [({"mode": m}, (X, np.array([0, 1, 2, 0, 2, 1], L))) for m in ("constant", "reflect", "edge", "wrap")]
    + [({"pads": [0, 1, 2, 0, -1, 1], "value": 2.0}, (X,)), ({}, (X, np.array([1, 1], L), np.array(3, F), np.array([1], L)))],
    "Resize": [
        ({"mode": m, "coordinate_transformation_mode": c}, (IMAGES, np.zeros(0, F), np.array([1, 1, 2, 1.5], F)))
        for m in ("linear", "cubic")
        for c in ("half_pixel", "asymmetric", "pytorch_half_pixel")
    ]
    + [({"mode": m}, (IMAGES, np.zeros(0, F), np.zeros(0, F), np.array([2, 4, 5, 9], L))) for m in ("linear", "cubic")],
    "Trilu": [({"upper": u}, (X, np.array(k, L))) for u in (0, 1) for k in (-1, 0, 1)],
    "EyeLike": [({"k": k}, (X[0],)) for k in (0, 1)] + [({"dtype": 1}, (INTEGERS.reshape(2, 4),))],
    "NonZero": [({}, (X > 0,)), ({}, (INTEGERS,)), ({}, (np.zeros((2, 2), F),))],
    "OneHot": [({"axis": a}, (MEMBERS, np.array(2, L), np.array([0, 1], F))) for a in (-1, 0)],
    "ScatterElements": [({"axis": 1}, (X[0], MEMBERS, np.ones((2, 3), F))), ({}, (X[0], MEMBERS, np.ones((2, 3), F)))],
    "ScatterND": [({}, (X, np.array([[0, 1], [1, -1]], L), np.ones((2, 4), F)))],
    "CastLike": [({}, (X, INTEGERS)), ({}, (INTEGERS, X))],
    "ConvTranspose": [
        ({"pads": [1, 0, 0, 1], "strides": [2, 1]}, (IMAGES, RNG.normal(size=(4, 3, 3, 3)).astype(F), BIAS[:3])),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (IMAGES, RNG.normal(size=(4, 3, 3, 3)).astype(F))),
    ],
    "Einsum": [
        ({"equation": "bij,bjk->bik"}, (X, X.transpose(0, 2, 1).copy())),
        ({"equation": "...j, j -> ..."}, (X, X[0, 0])),
        ({"equation": "i,j->ij"}, (X[0, 0], X[0, 1])),
    ],
    "InstanceNormalization": [({"epsilon": 0.01}, (IMAGES, BIAS[:4], BIAS[2:]))],
    "Hardmax": [({"axis": a}, (X,)) for a in (1, -1)],
    "ReverseSequence": [({"batch_axis": b, "time_axis": 1 - b}, (X, np.array([2, 1, 2][: 2 + b], L))) for b in (0, 1)],
    **{f"{name}Window": [({"periodic": p}, (np.array(10, L),)) for p in (0, 1)] for name in ("Blackman", "Hamming", "Hann")},
    "MelWeightMatrix": [({}, (np.array(8, L), np.array(32, L), np.array(8000, L), np.array(20, F), np.array(3800, F)))],
    "Shrink": [({"lambd": 0.5, "bias": 0.25}, (X,)), ({}, (X.astype(H),))],
    "Det": [({}, (X[:, :, :3].copy(),))],
    "CenterCropPad": [({}, (X, np.array([3, 2, 4], L))), ({"axes": [1]}, (X, np.array([5], L)))],
    "AffineGrid": [({"align_corners": a}, (np.array([[[1, 0, 0.1], [0, 0.5, 0]]], F), np.array([1, 2, 3, 4], L))) for a in (0, 1)],
    "DFT": [({"onesided": o}, (X[..., None].copy(),)) for o in (0, 1)] + [({"inverse": 1}, (X.reshape(2, 6, 2),))],
    "BitShift": [({"direction": "LEFT"}, (np.arange(4, dtype=np.uint32), np.ones(4, np.uint32)))],
    "BitwiseNot": [({}, (INTEGERS,))],
    **{op: [({}, (INTEGERS, DIVISORS))] for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(FOLDABLE))
def test_folding_computes_what_onnxruntime_computes(op: str) -> None:
    count = {"Split": 3, "TopK": 2}.get(op, 1)
    assert sum(check(op, attrs, *inputs, count=count) for attrs, inputs in CASES[op])


@pytest.mark.parametrize(
    ("op", "attrs", "inputs", "words"),
    [
        ("ReduceMax", {"keepdims": 0}, (SPECIAL,), "NaN"),
        ("ReduceMin", {"keepdims": 0}, (SPECIAL,), "NaN"),
        ("ArgMax", {}, (SPECIAL,), "NaN"),
        ("Clip", {}, (SPECIAL,), "infinity"),
        ("PRelu", {}, (np.zeros(2, F), np.array([np.inf, 1], F)), "infinity"),
        ("ReduceLogSumExp", {}, (np.full(2, -np.inf, F),), "infinity"),
        ("LogSoftmax", {}, (np.array([0, -1000], F),), "far apart"),
        ("ReduceMean", {}, (np.zeros((2, 0), F),), "mean of nothing"),
        ("ReduceMean", {}, (np.zeros((2, 0), L),), "mean of nothing"),
        ("ReduceSum", {}, (np.array([2**31 - 1, 1], np.int32),), "large integers"),
        ("ReduceSum", {}, (np.array([2**53, 1], L),), "large integers"),
        ("ReduceL2", {}, (np.array([2**27, 1], L),), "large integers"),
        ("ReduceProd", {}, (np.array([2**16, 2**15], np.int32),), "large integers"),
        ("NonZero", {}, (np.array(3, F),), "a scalar"),
        ("Slice", {}, tuple(np.array(v, L) for v in ([4, 5, 6], [2], [2**63 - 1], [0], [-1])), "Slice backwards"),
        ("Slice", {}, tuple(np.array(v, L) for v in ([4, 5, 6], [2], [2**31 - 1], [0], [-1])), "Slice backwards"),
        ("Squeeze", {}, (X[None], np.zeros(0, L)), "empty list of axes"),
        ("Squeeze", {"axes": []}, (X[None],), "empty list of axes"),
        ("Softmax", {"axis": 1}, (X,), "one axis"),
        ("LogSoftmax", {}, (X,), "one axis"),
        ("Conv", {"auto_pad": "SAME_LOWER", "strides": [1, 4], "group": 2}, (IMAGES, KERNELS), "beyond the kernel"),
        (
            "MaxPool",
            {"auto_pad": "SAME_UPPER", "strides": [3, 3], "kernel_shape": [3, 2]},
            (IMAGES,),
            "beyond the kernel",
        ),
        ("Resize", {}, (IMAGES, np.array([1, 1, 2, 2], F)), "nearest"),
        (
            "Resize",
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            (IMAGES, np.zeros(0, F), np.array([1, 1, 2, 2], F)),
            "corners",
        ),
    ],
)
def test_where_runtimes_disagree_nothing_is_folded(
    op: str, attrs: dict[str, object], inputs: tuple[np.ndarray, ...], words: str
) -> None:
    constants = [Constant(f"i{k}", v) for k, v in enumerate(inputs)]
    node = Node(op, "n", attrs, constants, [Variable("o")])
    found = evaluate(node, {c.name: c.values for c in constants}, 13 if len(inputs) > 1 else 11)
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize(
    ("equation", "shapes", "work"),
    [("ij,jk->ik", [(2, 3), (3, 5)], 30), ("ij, ij", [(4, 5), (4, 5)], 20), ("...i,i->...", [(7, 2), (2,)], 28)],
)
def test_the_work_of_an_einsum(equation: str, shapes: list[tuple[int, ...]], work: int) -> None:
    assert _count_einsum(equation, shapes) == work


def test_an_einsum_that_takes_long_stays() -> None:
    a, b = Constant("a", np.ones((1 << 12, 1 << 10), F)), Constant("b", np.ones((1 << 10, 1 << 5), F))
    node = Node("Einsum", "n", {"equation": "ij,jk->ik"}, [a, b], [Variable("o")])
    found = evaluate(node, {"a": a.values, "b": b.values}, 17)
    assert isinstance(found, str)
    assert "operations to compute" in found


def around(
    nodes: list[onnx.NodeProto], shape: Sequence[int | str], opset: int, **constants: np.ndarray
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "around",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def compute(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    session = open_session(model)
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("opset", "axes", "shape"),
    [(11, [-2, -1], (1, 4, 5, 6)), (11, [-2, -1], (1, 4, 4, 4)), (11, [1, 0], (2, 3, 4)), (7, [1, 0], (2, 3, 4))],
)
def test_a_constant_gets_several_axes(opset: int, axes: list[int], shape: tuple[int, ...]) -> None:
    nodes = [helper.make_node("Unsqueeze", ["w"], ["u"], axes=axes), helper.make_node("Mul", ["x", "u"], ["y"])]
    model = around(nodes, shape, opset, w=np.arange(1, 5, dtype=F))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"Mul": 1}
    x = RNG.normal(size=shape).astype(F)
    np.testing.assert_array_equal(compute(result, x=x), compute(model, x=x))


@pytest.mark.parametrize("opset", [7, 11, 13])
def test_a_squeeze_with_an_empty_list_of_axes_squeezes_all(opset: int) -> None:
    attributes = as_message(Node("Squeeze", "s", {"axes": []})).attribute if opset < 13 else []
    squeeze = helper.make_node("Squeeze", ["x"] if opset < 13 else ["x", "none"], ["s"])
    squeeze.attribute.extend(attributes)
    model = around([squeeze, helper.make_node("Relu", ["s"], ["y"])], (1, 3, 1, 4), opset, none=np.zeros(0, L))
    assert infer(model)["y"][1] == (3, 4)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    x = RNG.normal(size=(1, 3, 1, 4)).astype(F)
    np.testing.assert_array_equal(compute(result, x=x), compute(model, x=x))


@pytest.mark.parametrize("end", [2**31 - 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("size", [4, "W"])
def test_a_slice_backwards_may_end_at_the_largest_number(end: int, size: int | str) -> None:
    """Inference finds it empty, but onnxruntime goes through to the first position."""
    nodes = [
        helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["s"]),
        helper.make_node("Concat", ["s", "x"], ["c"], axis=1),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    numbers = {"start": -1, "end": end, "axis": 1, "step": -1}
    model = around(nodes, (2, size), 13, **{k: np.array([v], L) for k, v in numbers.items()})
    assert 0 not in (infer(model)["s"][1] or ())
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    x = RNG.normal(size=(2, 4)).astype(F)
    found = compute(result, x=x)
    np.testing.assert_array_equal(found, np.maximum(np.concatenate([x[:, ::-1], x], 1), 0))


def test_shapes_that_old_inference_gets_wrong_are_corrected_or_unknown() -> None:
    relu = helper.make_node("Relu", ["s"], ["y"])
    unordered = around([helper.make_node("Squeeze", ["x"], ["s"], axes=[2, 0]), relu], (1, 3, 1, 4), 7)
    assert infer(unordered)["y"][1] == (3, 4)
    negative = around([helper.make_node("Squeeze", ["x"], ["s"], axes=[-2]), relu], (1, 3, 1, 4), 7)
    assert infer(negative).get("y", (0, None))[1] is None
    assert infer(around([helper.make_node("Squeeze", ["x"], ["s"], axes=[-2]), relu], (1, 3, 1, 4), 11))["y"][1] == (
        1,
        3,
        4,
    )


def test_an_empty_list_survives_a_rewrite() -> None:
    reduce = helper.make_node("ReduceSum", ["a"], ["y"], keepdims=0)
    reduce.attribute.add(name="axes", type=onnx.AttributeProto.INTS)
    nodes = [helper.make_node("Identity", ["x"], ["a"]), reduce]
    model = around(nodes, (2, 3), 11)
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    assert ops(result) == {"ReduceSum": 1}
    same(model, result, tolerance=1e-6, x=X[0, :2, :3])
    assert as_message(Node("Upsample", "u", {"scales": []})).attribute[0].type == onnx.AttributeProto.FLOATS
    assert as_message(Node("Mine", "u", {"list": []}, domain="mine")).attribute[0].type == onnx.AttributeProto.INTS


@pytest.mark.parametrize(
    ("op", "attrs", "shapes", "words"),
    [
        ("Conv", {}, ((1, 64, 64, 64), (64, 64, 9, 9)), "operations"),
        ("MatMul", {}, ((512, 1024), (1024, 512)), "operations"),
        ("AveragePool", {"kernel_shape": [99, 99], "pads": [49] * 4}, ((1, 1, 256, 256),), "operations"),
        ("NonZero", {}, ((1 << 20,),), "bytes (limit"),
    ],
)
def test_what_takes_long_is_not_computed(
    op: str, attrs: dict[str, object], shapes: tuple[tuple[int, ...], ...], words: str
) -> None:
    constants = [Constant(f"i{k}", np.zeros(s, F)) for k, s in enumerate(shapes)]
    node = Node(op, "n", attrs, constants, [Variable("o")])
    found = evaluate(node, {c.name: c.values for c in constants}, 17)
    assert isinstance(found, str)
    assert words in found


def test_floating_point_numbers_are_rounded_once() -> None:
    """In float32, the sums would lose the small terms one by one."""
    values = np.array([2.0**24] + [1.0] * 8, F)
    held = Constant("v", values)
    axis = Constant("a", np.array(0, L))
    node = Node("CumSum", "n", {}, [held, axis], [Variable("o")])
    found = evaluate(node, {"v": values, "a": axis.values}, 14)
    assert not isinstance(found, str)
    assert found[0].dtype == F
    assert found[0].tolist() == np.cumsum(values.astype(D)).astype(F).tolist() != np.cumsum(values).tolist()
