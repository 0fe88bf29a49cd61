"""What training information and quantisation annotations refer to keeps its name, its values and its place."""

import numpy as np
import onnx
import pytest
from helpers import build, normal, ops, same
from onnx import helper, numpy_helper

import pwopt
from pwopt.graph.references import names_in_annotations, names_in_training

F = np.float32
INPUT = "(float[N,3,H,W] x) => (float[N,5,H,W] y)"
CONSTANTS = {
    "v": normal(4, 3, 1, 1, dtype=F),
    "w": normal(5, 4, 1, 1, dtype=F),
    "k": normal(4, 1, 1, dtype=F),
    "scale": np.array(0.5, F),
    "zero": np.array(0, np.uint8),
}


def chain() -> onnx.ModelProto:
    return build(f"{INPUT} {{ a = Conv(x, v) y = Conv(a, w) }}", CONSTANTS)


def scaled() -> onnx.ModelProto:
    return build(f"{INPUT} {{ a = Conv(x, v) b = Mul(a, k) c = Relu(b) y = Conv(c, w) }}", CONSTANTS)


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    return pwopt.optimize(model, cost="analytic", verify=False).model


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def trained(model: onnx.ModelProto, *, reads: str = "v", updates: str = "v") -> onnx.ModelProto:
    """With an algorithm that computes `updates` anew from a tensor of the graph."""
    info = model.training_info.add()
    info.algorithm.name = "algorithm"
    info.algorithm.node.append(helper.make_node("Neg", [reads], ["updated"]))
    info.algorithm.output.append(helper.make_tensor_value_info("updated", 1, None))
    info.update_binding.add(key=updates, value="updated")
    return model


def annotated(model: onnx.ModelProto, tensor: str, scale: str = "scale") -> onnx.ModelProto:
    annotation = model.graph.quantization_annotation.add(tensor_name=tensor)
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=scale)
    if scale in CONSTANTS and scale not in values(model):
        model.graph.initializer.append(numpy_helper.from_array(CONSTANTS[scale], scale))
    return model


def test_names() -> None:
    model = annotated(trained(chain(), reads="a"), "w")
    assert names_in_training(model) == {"a", "v"}
    assert names_in_annotations(model) == {"w", "scale"}
    assert not names_in_training(chain()) | names_in_annotations(chain())


def test_a_trained_weight_is_no_constant() -> None:
    model = trained(chain())
    result = optimize(model)
    assert ops(result) == {"Conv": 2}
    np.testing.assert_array_equal(values(result)["v"], CONSTANTS["v"])
    assert ops(optimize(chain())) == {"Conv": 1}


def test_a_trained_weight_stays_where_others_are_folded() -> None:
    model = trained(scaled(), reads="w", updates="w")
    result = optimize(model)
    assert ops(result) == {"Conv": 2, "Relu": 1}  # v and k are no part of the training
    np.testing.assert_array_equal(values(result)["w"], CONSTANTS["w"])
    same(model, result, tolerance=1e-5, x=normal(2, 3, 4, 5, dtype=F))


def test_a_tensor_that_the_training_reads_stays() -> None:
    result = optimize(trained(chain(), reads="a", updates="other"))
    assert ops(result) == {"Conv": 2}
    assert result.graph.node[0].output[0] == "a"


@pytest.mark.parametrize("model", [chain, scaled])
def test_an_annotated_weight_keeps_its_values_or_goes(model: object) -> None:
    original = annotated(model(), "v")  # type: ignore[operator]
    result = optimize(original)
    assert len(result.graph.node) < len(original.graph.node)
    assert "v" not in values(result)
    assert not result.graph.quantization_annotation
    same(original, result, tolerance=1e-5, x=normal(2, 3, 4, 5, dtype=F))


def test_a_weight_that_nothing_refers_to_keeps_its_name() -> None:
    assert "v" in values(optimize(scaled()))


def test_the_parameters_of_an_annotation_stay() -> None:
    body = f"{INPUT} {{ a = Conv(x, v) s = Mul(scale, scale) b = Mul(a, s) c = Relu(b) y = Conv(c, w) }}"
    model = annotated(build(body, CONSTANTS), "c")
    result = optimize(model)
    assert ops(result) == {"Conv": 2, "Relu": 1}
    (annotation,) = result.graph.quantization_annotation
    assert annotation.tensor_name == "c"
    assert values(result)["scale"] == CONSTANTS["scale"]
    same(model, result, tolerance=1e-5, x=normal(2, 3, 4, 5, dtype=F))


def test_an_annotation_of_a_tensor_that_is_gone_goes_with_it() -> None:
    result = optimize(annotated(chain(), "a"))
    assert ops(result) == {"Conv": 1}
    assert not result.graph.quantization_annotation
