"""The table of operators: its rows are well formed, and they agree with the schemas and the evaluator of ONNX."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from pwopt.graph import operators

#: Opset of the schemas that the tests ask.
OPSET = min(onnx.defs.onnx_opset_version(), 22)


def test_every_row_is_an_operator_of_onnx() -> None:
    for op in operators._TABLE:
        assert onnx.defs.has(op) or op in ("RMSNormalization", "Swish"), op


@pytest.mark.parametrize("rows", ["Relu slop=1", "Relu slope=1\nRelu blind"])
def test_a_row_with_an_unknown_trait_or_a_second_row_is_refused(rows: str) -> None:
    with pytest.raises(ValueError, match="Relu"):
        operators._parse(rows)


@pytest.mark.parametrize("op", sorted(operators.AXES_SINCE))
def test_the_axes_are_an_input_since_that_opset(op: str) -> None:
    since = operators.AXES_SINCE[op]
    before, after = (onnx.defs.get_schema(op, version) for version in (since - 1, since))
    assert "axes" in before.attributes
    assert "axes" not in after.attributes
    assert after.inputs[1].name == "axes"


@pytest.mark.parametrize("op", sorted(operators.BIAS_INPUTS))
def test_the_bias_input_is_a_bias(op: str) -> None:
    assert onnx.defs.get_schema(op).inputs[operators.BIAS_INPUTS[op]].name.lower() in ("b", "bias")


def _apply(op: str, *inputs: np.ndarray) -> np.ndarray:
    names = [f"x{i}" for i in range(len(inputs))]
    node = onnx.helper.make_node(op, names, ["y"])
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True)
    ]
    graph = onnx.helper.make_graph([node], "one", values, [onnx.ValueInfoProto(name="y")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0])


@pytest.mark.parametrize("op", sorted(o for o in operators.ACTIVATIONS if onnx.defs.has(o) and o != "Swish"))
def test_an_activation_is_elementwise_and_no_steeper_than_its_slope(op: str) -> None:
    x = np.linspace(-6, 6, 4001).astype(np.float32)
    y = _apply(op, x).astype(np.float64)
    assert y.shape == x.shape
    np.testing.assert_array_equal(_apply(op, x[::-1].copy()), y[::-1].astype(np.float32))
    if np.isfinite(operators.ACTIVATIONS[op]):
        assert np.abs(np.diff(y) / np.diff(x.astype(np.float64))).max() <= operators.ACTIVATIONS[op] * 1.02


@pytest.mark.parametrize("op", sorted(operators.ZERO_BLIND & operators.ELEMENTWISE))
def test_a_blind_function_gives_one_number_for_both_zeros(op: str) -> None:
    both = _apply(op, np.array([0.0, -0.0], np.float32))
    assert both[0].tobytes() == both[1].tobytes()


@pytest.mark.parametrize("op", sorted(operators.ZERO_KEEPING & operators.ELEMENTWISE))
def test_an_elementwise_function_that_keeps_zeros_differs_at_most_in_the_sign_of_a_zero(op: str) -> None:
    both = _apply(op, np.array([0.0, -0.0], np.float32))
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "op", sorted(operators.BROADCASTS - {"Where", "Mean"})
)  # onnx's evaluator does not broadcast Mean
def test_operands_are_broadcast_to_each_other(op: str) -> None:
    kind = onnx.defs.get_schema(op).type_constraints[0].allowed_type_strs
    dtype = np.float32 if "tensor(float)" in kind and op != "Mod" else bool if "tensor(bool)" in kind else np.int64
    a, b = np.ones((2, 1), dtype), np.ones((1, 3), dtype)
    assert _apply(op, a, b).shape == (2, 3)


def test_traits_do_not_contradict_each_other() -> None:
    assert not operators.RANDOM & operators.FOLDABLE
    assert not operators.ZERO_BLIND & operators.ZERO_KEEPING
    assert operators.VIEWS <= operators.MOVES
    assert operators.ACTIVATIONS.keys() <= operators.ELEMENTWISE <= operators.SAME_SHAPE
