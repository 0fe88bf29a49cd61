"""Gallery models in which maps meet upsampling, pooling and sums of modalities: what moves, and what must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers import evaluate, normal, ops, weight
from onnx import TensorProto, helper, numpy_helper
from test_models import both, builder

import pwopt
from pwopt.graph.files import fix_inputs, from_proto
from pwopt.graph.view import View
from pwopt.maps.cost import measure

EARLY = ["fold-affine", "join-concat"]


def macs(model: onnx.ModelProto, batch: int = 1) -> int:
    """Multiply-adds, counted anew in the model with its batch fixed."""
    shapes = {i.name: [batch, *(d.dim_value for d in i.type.tensor_type.shape.dim[1:])] for i in model.graph.input}
    cost = measure(View(from_proto(fix_inputs(model, shapes)).graph))
    assert cost.unknown == 0
    return cost.macs


def image(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded noise, smooth over some pixels as photographs are."""
    coarse = normal(*shape[:2], shape[2] // 8, shape[3] // 8, seed=seed)
    fine = np.kron(coarse, np.ones((8, 8))) + 0.3 * normal(*shape, seed=seed + 1)
    return np.asarray(fine, np.float32)


def maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    node: onnx.NodeProto = next(n for n in model.graph.node if tensor in n.output)
    return node


def reader(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The only node that reads `tensor`."""
    found: list[onnx.NodeProto] = [n for n in model.graph.node if tensor in n.input]
    assert len(found) == 1
    return found[0]


def add_weight(model: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    kept = [t for t in model.graph.initializer if t.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(values, np.float32), name)])
    return name


def change(node: onnx.NodeProto, **attrs: Any) -> None:
    kept = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(k, v) for k, v in (kept | attrs).items())


def insert(model: onnx.ModelProto, op: str, tensor: str, before: onnx.NodeProto, **attrs: Any) -> str:
    """Put an operator between `tensor` and its reader `before`; returns the new tensor."""
    position = list(model.graph.node).index(before)
    slot = list(before.input).index(tensor)
    before.input[slot] = f"{tensor}_{op}"
    node = helper.make_node(op, [tensor], [f"{tensor}_{op}"], **attrs)
    model.graph.node.insert(position, node)
    return f"{tensor}_{op}"


def optimised(model: onnx.ModelProto, passes: list[str] | None = None) -> pwopt.Result:
    onnx.checker.check_model(model, full_check=True)
    return pwopt.optimize(model, cost="analytic", verify=False, passes=passes)


def passes_of(result: pwopt.Result) -> set[str]:
    return {r.pass_name for r in result.report.rewrites}


def on_onnxruntime(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, feeds)]


def equal(before: onnx.ModelProto, after: onnx.ModelProto, tolerance: float, **feeds: np.ndarray) -> None:
    """On onnxruntime, to an absolute tolerance; outputs are of order 1."""
    for a, b in zip(on_onnxruntime(before, **feeds), on_onnxruntime(after, **feeds), strict=True):
        assert a.std() > 0.1
        np.testing.assert_allclose(b, a, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["fcn", "fpn", "rgbd_fusion"])
def test_the_report_counts_the_result(name: str) -> None:
    """Of every operator, those that a rewrite has added too."""
    before, after, result = both(name)
    assert result.report.before.macs == macs(before)
    assert result.report.after.unknown == 0
    assert result.report.after.macs == macs(after)


# --- fcn --------------------------------------------------------------------------------------------------------------


def fcn(mode: str = "linear", **attrs: Any) -> onnx.ModelProto:
    """The model with other attributes of its Resize."""
    model: onnx.ModelProto = builder("fcn").build()
    node = next(n for n in model.graph.node if n.op_type == "Resize")
    change(node, mode=mode, **attrs)
    return model


def test_fcn_classifies_before_it_upsamples() -> None:
    before, after, result = both("fcn")
    assert passes_of(result) == {"fold-affine", "commute-spatial"}
    assert maker(before, "scores").op_type == "Conv"
    upsampling = maker(after, "scores")
    assert upsampling.op_type == "Resize"
    classifier = maker(after, upsampling.input[0])
    assert classifier.op_type == "Conv"
    for name in ("classifier.weight", "classifier.bias"):
        assert name in classifier.input
        np.testing.assert_array_equal(weight(before, name), weight(after, name))
    assert ops(before) - ops(after) == {"BatchNormalization": 4}
    assert macs(before, 3) - macs(after, 3) == 3 * 64 * builder("fcn").CLASSES * (64 * 64 - 8 * 8)


def test_fcn_keeps_every_label() -> None:
    before, after, _ = both("fcn")
    x = image(2, 3, 64, 64, seed=6)
    (scores, labels), (moved, relabelled) = evaluate(before, image=x), evaluate(after, image=x)
    np.testing.assert_allclose(moved, scores, atol=1e-4, rtol=0)
    second, first = np.sort(scores, axis=1)[:, -2:].swapaxes(0, 1)
    assert (first - second).min() > 2e-4  # no pixel of this image is undecided to within the tolerance
    assert len(np.unique(labels)) > 5
    np.testing.assert_array_equal(relabelled, labels)


@pytest.mark.parametrize(
    ("mode", "attrs"),
    [
        ("linear", {"coordinate_transformation_mode": "align_corners"}),
        ("cubic", {"exclude_outside": 1}),
        ("nearest", {"coordinate_transformation_mode": "asymmetric"}),
    ],
    ids=["linear, align_corners", "cubic, exclude_outside", "nearest"],
)
def test_fcn_any_interpolation_is_exact(mode: str, attrs: dict[str, Any]) -> None:
    """At the border too: whatever the interpolation weights are there, they sum to one."""
    model = fcn(mode, **attrs)
    result = optimised(model)
    assert maker(result.model, "scores").op_type == ("MatMul" if mode == "cubic" else "Resize")  # lower-resize
    x = image(1, 3, 64, 64)
    (a, _), (b, _) = on_onnxruntime(model, image=x), on_onnxruntime(result.model, image=x)
    assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()
    plain, _ = on_onnxruntime(fcn(), image=x)
    assert np.abs(a - plain).max() > 1e-2 * np.abs(a).max()  # the attributes mean something


def test_fcn_extrapolation_is_not_moved() -> None:
    """Outside its region of interest it gives a constant, to every channel alike, whatever the classifier says."""
    model = fcn(coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=5.0)
    resize = next(n for n in model.graph.node if n.op_type == "Resize")
    resize.input[1] = add_weight(model, "roi", np.array([0, 0, 0.25, 0.25, 1, 1, 1.25, 1.25]))
    result = optimised(model)
    assert passes_of(result) == {"fold-affine"}
    assert maker(result.model, "scores").op_type == "Conv"
    assert reader(result.model, resize.output[0]).output[0] == "scores"
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)  # what a pass would do that took it for an interpolation
    classifier, resize = maker(swapped, "scores"), next(n for n in swapped.graph.node if n.op_type == "Resize")
    classifier.input[0], resize.input[0] = resize.input[0], "small"
    classifier.output[0], resize.output[0] = "small", "scores"
    position = list(swapped.graph.node).index(classifier)
    swapped.graph.node.insert(position - 1, swapped.graph.node.pop(position))
    x = image(1, 3, 64, 64)
    a, b, wrong = (on_onnxruntime(m, image=x)[0] for m in (model, result.model, swapped))
    np.testing.assert_allclose(b, a, atol=1e-4, rtol=0)
    assert np.abs(wrong - a).max() > 1


def pooled(*, bias: bool, counts_padding: bool) -> onnx.ModelProto:
    """The features of the model, mapped 64→64, and pooled with padding; instead of its upsampling."""
    model: onnx.ModelProto = builder("fcn").build()
    features = next(n for n in model.graph.node if n.op_type == "Resize").input[0]
    del model.graph.node[-3:], model.graph.output[:]
    inputs = [features, add_weight(model, "map.weight", normal(64, 64, 1, 1) / 8)]
    inputs += [add_weight(model, "map.bias", normal(64, seed=1))] if bias else []
    attrs: dict[str, Any] = {
        "kernel_shape": [3, 3],
        "strides": [2, 2],
        "pads": [1] * 4,
        "count_include_pad": int(counts_padding),
    }
    model.graph.node.append(helper.make_node("Conv", inputs, ["mapped"], "map", kernel_shape=[1, 1]))
    model.graph.node.append(helper.make_node("AveragePool", ["mapped"], ["pooled"], "pool", **attrs))
    model.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 64, 4, 4]))
    return model


def test_fcn_a_bias_does_not_move_behind_padding_that_counts() -> None:
    """The padding's zeros would have been mapped to the bias."""
    model = pooled(bias=True, counts_padding=True)
    result = optimised(model)
    assert passes_of(result) == {"fold-affine"}
    assert maker(result.model, "pooled").op_type == "AveragePool"
    (reason,) = (s.reason for s in result.report.skips if str(s.site) == "commute-spatial:pooled")
    assert "AveragePool does not keep constants" in reason


@pytest.mark.parametrize(("bias", "counts_padding"), [(False, True), (True, False), (False, False)])
def test_fcn_a_map_moves_behind_pooling(bias: bool, counts_padding: bool) -> None:
    model = pooled(bias=bias, counts_padding=counts_padding)
    result = optimised(model)
    assert passes_of(result) == {"fold-affine", "commute-spatial"}
    moved = maker(result.model, "pooled")
    assert moved.op_type == "Conv"
    assert maker(result.model, moved.input[0]).op_type == "AveragePool"
    assert macs(model) - macs(result.model) == 64 * 64 * (8 * 8 - 4 * 4)
    equal(model, result.model, 1e-4, image=image(2, 3, 64, 64))


# --- fpn --------------------------------------------------------------------------------------------------------------


def test_fpn_outputs_are_equal() -> None:
    before, after, _ = both("fpn")
    equal(before, after, 1e-4, image=image(2, 3, 128, 128))


def test_fpn_the_neck_is_split() -> None:
    """Its weight by input channels: the upsampled ones are mapped before they are upsampled."""
    before, after, result = both("fpn")
    assert passes_of(result) == {"fold-affine", "commute-spatial"}
    assert ops(before)["Concat"] == 1
    assert ops(before) - ops(after) == {"BatchNormalization": 8, "Concat": 1}
    assert ops(after) - ops(before) == {"Conv": 1, "Add": 1}
    coarse = reader(after, "/neck.reduce/Relu_output_0")
    assert coarse.op_type == "Conv"
    assert len(coarse.input) == 2  # one of the two has the bias
    upsampling = reader(after, coarse.output[0])
    assert upsampling.op_type == "Resize"
    total = reader(after, upsampling.output[0])
    assert total.op_type == "Add"
    fine = maker(after, next(t for t in total.input if t != upsampling.output[0]))
    assert (fine.op_type, fine.input[0], len(fine.input)) == ("Conv", "/lateral3/Conv_output_0", 3)
    norm = {k: weight(before, f"neck.mix.norm.{k}").astype(np.float64) for k in ("weight", "running_var")}
    scale = norm["weight"] / np.sqrt(norm["running_var"] + 1e-5)
    exact = weight(before, "neck.mix.weight") * scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(weight(after, coarse.input[1]), exact[:, :64], rtol=1e-6)
    np.testing.assert_allclose(weight(after, fine.input[1]), exact[:, 64:], rtol=1e-6)
    assert macs(before) - macs(after) == 64 * 32 * (16 * 16 - 8 * 8)


def test_fpn_laterals_and_smoothing_stay() -> None:
    before, after, _ = both("fpn")
    for level in (2, 3, 4):
        for name, output in ((f"lateral{level}", f"/lateral{level}/Conv_output_0"), (f"smooth{level}", f"p{level}")):
            assert maker(after, output) == maker(before, output)
            for part in ("weight", "bias"):
                np.testing.assert_array_equal(weight(after, f"{name}.{part}"), weight(before, f"{name}.{part}"))
    for level in (2, 3):
        assert maker(after, f"/merge{level}/Add_output_0") == maker(before, f"/merge{level}/Add_output_0")
        upsampled = f"/topdown{level}/Resize_output_0"
        assert maker(after, upsampled) == maker(before, upsampled)


@pytest.mark.parametrize("variant", ["3×3", "rectified", "visible"])
def test_fpn_the_neck_is_not_split_if(variant: str) -> None:
    """It looks at neighbours; it is not alone behind the Concat; or the upsampled map is read elsewhere."""
    model = builder("fpn").build()
    mix = maker(model, "/neck.mix/Conv_output_0")
    if variant == "3×3":
        add_weight(model, "neck.mix.weight", normal(32, 96, 3, 3) / 30)
        change(mix, kernel_shape=[3, 3], pads=[1] * 4)
    elif variant == "rectified":
        insert(model, "Relu", mix.input[0], mix)
    else:
        name = "/neck.upsample/Resize_output_0"
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64, 16, 16]))
    result = optimised(model)
    assert passes_of(result) == {"fold-affine"}
    assert ops(result.model)["Concat"] == 1
    assert macs(result.model) == macs(model)


# --- rgbd_fusion ------------------------------------------------------------------------------------------------------


def rgbd_feeds(batch: int = 1) -> dict[str, np.ndarray]:
    return {"rgb": image(batch, 3, 48, 48), "depth": np.abs(image(batch, 1, 48, 48, seed=7)) + 1}


def folded(model: onnx.ModelProto, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a branch, its convolution and BatchNormalization composed by hand."""
    w, b = (weight(model, f"{name}.conv.{k}").astype(np.float64) for k in ("weight", "bias"))
    gamma, beta, mean, variance = (
        weight(model, f"{name}.norm.{k}").astype(np.float64) for k in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + 1e-5)
    return w * scale.reshape(-1, 1, 1, 1), beta + (b - mean) * scale


def test_late_fusion_of_linear_branches_is_early_fusion() -> None:
    before, after, result = both("rgbd_fusion", passes=EARLY)
    assert passes_of(result) == set(EARLY)
    fused = maker(after, "/scores.fuse/Add_output_0")
    assert fused.op_type == "Conv"
    joined = maker(after, fused.input[0])
    assert (joined.op_type, list(joined.input)) == ("Concat", ["rgb", "depth"])
    colour, depth = folded(before, "scores.rgb"), folded(before, "scores.depth")
    exact = np.concatenate([colour[0], depth[0]], axis=1)
    assert exact.shape == (32, 4, 3, 3)
    np.testing.assert_allclose(weight(after, fused.input[1]), exact, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(weight(after, fused.input[2]), colour[1] + depth[1], rtol=1e-6, atol=1e-8)
    assert macs(after) == macs(before)
    equal(before, after, 1e-5, **rgbd_feeds(2))


def branches(model: onnx.ModelProto, head: str) -> list[str]:
    """Operators that the summands of a head come from; of one operator, if it has been joined."""
    total = maker(model, f"/{head}.fuse/Add_output_0")
    return [maker(model, t).op_type for t in total.input] if total.op_type == "Add" else [total.op_type]


def test_a_depth_filter_of_another_size_stays_apart() -> None:
    before, after, _ = both("rgbd_fusion", passes=EARLY)
    assert branches(after, "scores") == ["Conv"]
    assert branches(after, "edges") == ["Conv", "Conv"]
    for name, shape in (("rgb", (32, 3, 3, 3)), ("depth", (32, 1, 5, 5))):
        found = weight(after, f"edges.{name}.conv.weight")
        assert found.shape == shape
        np.testing.assert_allclose(found, folded(before, f"edges.{name}")[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("Relu", {}), ("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4})],
)
def test_depth_that_is_not_linear_stays_apart(op: str, attrs: dict[str, Any]) -> None:
    """Between its convolution and the sum, as in FuseNet."""
    model = builder("rgbd_fusion").build()
    depth = "/scores.depth.norm/BatchNormalization_output_0"
    insert(model, op, depth, reader(model, depth), **attrs)
    result = optimised(model, EARLY)
    assert passes_of(result) == {"fold-affine"}
    assert branches(result.model, "scores") == ["Conv", op]
    equal(model, result.model, 1e-5, **rgbd_feeds())


def test_depth_denoised_before_its_convolution_is_an_input_like_any_other() -> None:
    model = builder("rgbd_fusion").build()
    conv = maker(model, "/scores.depth.conv/Conv_output_0")
    clean = insert(model, "MaxPool", "depth", conv, kernel_shape=[3, 3], pads=[1] * 4)
    result = optimised(model, EARLY)
    assert branches(result.model, "scores") == ["Conv"]
    (joined,) = (n for n in result.model.graph.node if n.op_type == "Concat")
    assert list(joined.input) == ["rgb", clean]
    equal(model, result.model, 1e-5, **rgbd_feeds())


def test_fusion_is_left_to_measuring_by_default() -> None:
    before, after, result = both("rgbd_fusion")
    assert passes_of(result) == {"fold-affine"}
    assert ops(before) - ops(after) == {"BatchNormalization": 6}
    (reason,) = (s.reason for s in result.report.skips if s.pass_name == "join-concat")
    assert "only measuring can tell" in reason
    equal(before, after, 1e-5, **rgbd_feeds())
