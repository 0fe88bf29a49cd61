"""Certificates: what is right passes, one wrong number does not, and nothing is sampled from the model's inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MODELS, normal, ops, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.evidence import certify as certification
from pwopt.evidence.certify import certify
from pwopt.evidence.evaluation import Side
from pwopt.graph.changes import Change
from pwopt.graph.files import from_proto
from pwopt.graph.journal import State
from pwopt.graph.view import View
from pwopt.optimizing.optimizer import optimize
from pwopt.passes import (
    CleanUp,
    DropDead,
    FactorRanks,
    FoldAffine,
    FoldChains,
    HoistStride,
    NameActivations,
    SettleShapes,
)
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Certificate, Rewrite, Skip
from pwopt.selecting.candidate_base import run_passes
from pwopt.selecting.pass_list import resolve_passes

Fault = Callable[[gs.Node], bool]


class Faulty(Pass):
    """Another pass, of whose results one number is wrong."""

    name = "faulty"

    def __init__(self, inner: Pass, fault: Fault) -> None:
        self.inner, self.fault, self.context = inner, fault, inner.context  # type: ignore[misc]

    def start(self, rw: Rewriter) -> None:
        self.inner.start(rw)

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | Skip | None:
        before = set(rw.nodes())
        result = self.inner.match_and_rewrite(node, rw)
        if isinstance(result, Rewrite):
            assert any(self.fault(n) for n in rw.nodes() if n not in before)
        return result


def off_by(index: int, place: int, error: float) -> Fault:
    """One number of constant input `index` is off by `error` times the largest."""

    def fault(node: gs.Node) -> bool:
        if len(node.inputs) <= index or not isinstance(node.inputs[index], gs.Constant):
            return False
        values = node.inputs[index].values
        values.flat[place % values.size] += error * np.abs(values).max()
        return True

    return fault


def certificates(model: onnx.ModelProto, p: Pass) -> list[Certificate]:
    loaded = from_proto(model)
    rewrites = Pipeline([p]).run(loaded.graph, reserved=loaded.names(), certifier=certify).rewrites
    return [r.certificate for r in rewrites if r.certificate is not None]


def chain(*widths: int, seed: int = 0, dtype: type = np.float32, kernel: int = 1) -> onnx.ModelProto:
    """1×1 convolutions with biases, the last of them k×k."""
    kind = {np.float32: "float", np.float64: "double", np.float16: "float16"}[dtype]
    text, weights = [], {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        k = kernel if i == 0 else 1
        text.append(f"x{i + 1} = Conv(x{i}, w{i}, b{i})")
        weights |= {
            f"w{i}": normal(b, a, k, k, seed=seed + 2 * i, dtype=dtype),
            f"b{i}": normal(b, seed=seed + 2 * i + 1, dtype=dtype),
        }
    last = len(widths) - 1
    return parse(f"({kind}[1,{widths[0]},9,7] x0) => ({kind}[N] x{last}) {{ {' '.join(text)} }}", **weights)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_fold_is_certified_within_its_bound(dtype: type) -> None:
    (found,) = certificates(chain(4, 6, 5, dtype=dtype, kernel=3), FoldChains())
    assert found.status == "certified"
    assert found.residual <= found.bound
    assert 0 < found.probability < 1e-8


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(2, 6), min_size=3, max_size=4), seed=st.integers(0, 99), place=st.integers(0, 999),
    bias=st.booleans(), error=st.sampled_from([1e-4, -1e-3, 0.1, -1.0, 10.0]), kernel=st.sampled_from([1, 3]),
)  # fmt: skip
def test_one_wrong_number_of_a_fold_is_refused(
    widths: list[int], seed: int, place: int, bias: bool, error: float, kernel: int
) -> None:
    model = chain(max(widths), *[*widths, max(widths)], min(widths), seed=seed, kernel=kernel)
    right = certificates(model, FoldChains())
    assert {c.status for c in right} == {"certified"}
    wrong = certificates(model, Faulty(FoldChains(), off_by(2 if bias else 1, place, error)))
    assert wrong[0].status == "failed"
    assert wrong[0].residual > wrong[0].bound


@settings(max_examples=30)
@given(seed=st.integers(0, 99), place=st.integers(0, 99), index=st.sampled_from([1, 2]))
def test_one_wrong_number_of_a_folded_normalisation_is_refused(seed: int, place: int, index: int) -> None:
    stats = {name: normal(5, seed=seed + i, dtype=np.float32) for i, name in enumerate("sbmv")}
    model = parse(
        "(float[1,3,8,8] x) => (float[N] y) { c = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization(c, s, b, m, v) }",
        w=normal(5, 3, 3, 3, seed=seed, dtype=np.float32), **{**stats, "v": stats["v"] ** 2 + 0.1},
    )  # fmt: skip
    (right,) = certificates(model, FoldAffine())
    assert right.status == "certified"
    (wrong,) = certificates(model, Faulty(FoldAffine(), off_by(index, place, 1e-3)))
    assert wrong.status == "failed"


def test_a_region_of_few_numbers_is_evaluated_on_a_basis() -> None:
    model = parse(
        "(double[1,4] x) => (double[N] y) { h = MatMul(x, a) y = MatMul(h, b) }", a=normal(4, 6), b=normal(6, 3)
    )
    (found,) = certificates(model, FoldChains())
    assert (found.status, found.reason, found.probability) == ("certified", "a basis of 5", 0.0)


def test_a_region_that_is_not_affine_is_tested_and_says_so() -> None:
    body = (
        "(float[1,4,9,9] x) => (float[N] y) { a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six) }"
    )
    model = parse(body, three=np.float32(3), zero=np.float32(0), six=np.float32(6))
    (found,) = certificates(model, NameActivations())
    assert found.status == "tested"
    assert found.probability == 1.0
    assert "not affine" in found.reason


def test_a_wrong_activation_is_refused() -> None:
    body = (
        "(float[1,4,9,9] x) => (float[N] y) { a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six) }"
    )
    model = parse(body, three=np.float32(3), zero=np.float32(0), six=np.float32(6))

    def fault(node: gs.Node) -> bool:
        node.op = "Elu"
        return True

    (found,) = certificates(model, Faulty(NameActivations(), fault))
    assert found.status == "failed"


@pytest.mark.parametrize("stride", [[1, 1], [3, 3]])
def test_a_wrong_stride_is_refused(stride: list[int]) -> None:
    body = "(float[1,4,12,12] x) => (float[N] y) { a = Conv(x, w) r = Relu(a) y = Conv<strides=[2,2]>(r, u) }"
    model = parse(body, w=normal(8, 4, 1, 1, dtype=np.float32), u=normal(8, 8, 1, 1, seed=1, dtype=np.float32))
    (right,) = certificates(model, HoistStride())
    assert (right.status, right.residual) == ("tested", 0.0)

    def fault(node: gs.Node) -> bool:
        node.attrs["strides"] = stride
        return True

    (wrong,) = certificates(model, Faulty(HoistStride(), fault))
    assert wrong.status == "failed"


def test_a_wrong_number_in_a_pruned_network_is_refused() -> None:
    first, second = normal(16, 4, 1, 1, dtype=np.float32), normal(8, 16, 1, 1, seed=1, dtype=np.float32)
    first[8:], bias = 0, normal(16, seed=2, dtype=np.float32)
    body = "(float[1,4,9,9] x) => (float[N] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, u, c) }"
    model = parse(body, w=first, u=second, b=bias, c=normal(8, seed=3, dtype=np.float32))
    assert [c.status for c in certificates(model, DropDead())] == ["tested"]
    assert [c.status for c in certificates(model, Faulty(DropDead(), off_by(2, 3, 0.01)))] == ["failed"]


def test_a_split_at_the_rank_is_certified() -> None:
    thin = normal(48, 4) @ normal(4, 40, seed=1)
    thin[0] *= 1e-6  # a row far below the others, of which the split loses digits
    model = parse("(float[1,40,6,6] x) => (float[N] y) { y = Conv(x, w) }", w=thin.astype(np.float32)[:, :, None, None])
    (right,) = certificates(model, FactorRanks())
    assert right.status == "certified"
    (wrong,) = certificates(model, Faulty(FactorRanks(), off_by(1, 7, 1e-3)))
    assert wrong.status == "failed"


def test_edits_in_place_are_noticed() -> None:
    class Careless(Pass):
        """A wrong axis, set in place; becomes visible because the output is renamed."""

        name = "careless"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if node.op != "Softmax" or node.attrs["axis"] != 1:
                return None
            rw.set_attributes(node, axis=2)
            return Rewrite("wrong")

    model = parse("(float[2,3,4] x) => (float[N] y) { h = Softmax<axis=1>(x) y = Neg(h) }")
    (found,) = certificates(model, Careless())
    assert found.status == "failed"


def test_what_nothing_makes_any_more_is_noticed() -> None:
    class Greedy(Pass):
        """Becomes less than it should."""

        name = "greedy"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if node.op != "Neg":
                return None
            rw.remove(node)
            return Rewrite("wrong")

    model = parse("(float[2,3] x) => (float[N] y) { h = Exp(x) k = Neg(h) y = Abs(k) }")
    (found,) = certificates(model, Greedy())
    assert (found.status, found.residual) == ("failed", math.inf)
    assert "'k' is needed" in found.reason


def test_shape_arithmetic_is_certified_at_the_models_own_sizes() -> None:
    body = "(float[1,64,40,40] x) => (float[N] y) { s = Shape(x) h = Relu(x) y = Reshape(h, s) }"
    found = certificates(parse(body), CleanUp())
    assert [(c.status, c.residual) for c in found] == [("certified", 0), ("tested", 0)]


def test_the_shape_of_a_large_tensor_is_certified() -> None:
    body = """(float[1,3,90000,90000] x) => (float[N] y) {
        a = GlobalAveragePool(x) s = Shape(x) f = Cast<to=1>(s) m = ReduceMax(f) b = Mul(a, m) y = Mul(b, k) }"""
    found = certificates(parse(body, k=np.float32(2)), CleanUp())
    assert {c.status for c in found} == {"certified"}


def test_what_only_reads_the_result_is_not_evaluated() -> None:
    model = parse("(float[2,3] x) => (float[2,3] y) { h = Identity(x) y = Neg(h) }")
    model.graph.node[1].op_type, model.graph.node[1].domain = "Magic", "custom"
    model.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    loaded = from_proto(model)
    (found,) = CleanUp().run(loaded.graph, certifier=certify).rewrites
    assert found.certificate is not None
    assert found.certificate.status == "certified"


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(monkeypatch, 1000)
    (found,) = certificates(chain(4, 6, 5), FoldChains())
    assert found.status == "none"
    assert found.reason == "too large: over 1,000 multiply-adds"


def bounded(monkeypatch: pytest.MonkeyPatch, work: int) -> None:
    """As if no evaluation could take more."""
    for name in ("FULL_PLAN", "REDUCED_PLAN"):
        monkeypatch.setattr(f"pwopt.evidence.certify.{name}", replace(getattr(certification, name), work=work))


def test_what_would_take_long_is_tried_on_less(monkeypatch: pytest.MonkeyPatch) -> None:
    full = certificates(chain(4, 6, 5), FoldChains())[0]
    monkeypatch.setattr("pwopt.evidence.certify.FULL_PLAN", replace(certification.FULL_PLAN, work=1000))
    few = certificates(chain(4, 6, 5), FoldChains())[0]
    assert [full.status, few.status] == ["certified"] * 2
    assert [full.reason, few.reason] == ["3 random probes", "1 random probe"]
    assert few.probability == pytest.approx(full.probability ** (1 / 3))


@pytest.mark.parametrize(("stride", "status"), [([2, 2], "tested"), ([1, 1], "failed")])
def test_what_is_not_affine_is_tried_on_less(monkeypatch: pytest.MonkeyPatch, stride: list[int], status: str) -> None:
    """A single probe shows a wrong stride as well."""
    monkeypatch.setattr("pwopt.evidence.certify.FULL_PLAN", replace(certification.FULL_PLAN, work=100))
    body = "(float[1,4,12,12] x) => (float[N] y) { a = Conv(x, w) r = Relu(a) y = Conv<strides=[2,2]>(r, u) }"
    model = parse(body, w=normal(8, 4, 1, 1, dtype=np.float32), u=normal(8, 8, 1, 1, seed=1, dtype=np.float32))

    def fault(node: gs.Node) -> bool:
        node.attrs["strides"] = stride
        return True

    (found,) = certificates(model, Faulty(HoistStride(), fault))
    assert found.status == status
    assert status == "failed" or found.reason == "not affine: 1 probe of size 1"


def test_facts_from_above_let_a_region_be_evaluated() -> None:
    """A Reshape to sizes that come from a Shape takes no other numbers: those are taken along from above."""
    body = """(float[N,8,16] x) => (float[A,B,C,D] y, float[A,B,C,D] z) {
        s = Shape(x) r = Relu(x) a = Gather<axis=0>(s, zero) b = Gather<axis=0>(s, one)
        ua = Unsqueeze(a, axis) ub = Unsqueeze(b, axis) t = Concat<axis=0>(ua, ub, four, four) y = Reshape(r, t)
        z = Reshape(x, t) }"""
    numbers = {"zero": np.int64(0), "one": np.int64(1), "axis": np.array([0]), "four": np.array([4])}
    found = certificates(parse(body, **numbers), SettleShapes())
    assert found
    assert {c.status for c in found} == {"certified", "tested"}


def test_small_planes_stand_for_large_ones() -> None:
    body = "(float[1,8,4000,4000] x) => (float[N] y) { h = Conv(x, w) y = Conv<strides=[2,2]>(h, u) }"
    model = parse(body, w=normal(8, 8, 1, 1, dtype=np.float32), u=normal(4, 8, 1, 1, seed=1, dtype=np.float32))
    (found,) = certificates(model, FoldChains())
    assert found.status == "certified"


def test_refused_rewrites_are_dropped_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def distrustful(region: Change, view: View) -> Certificate:
        wrong = any(t.name == "y" for s in region.after for t in s.outputs)
        return Certificate("failed", "planted", 1.0, 0.0) if wrong else certify(region, view)

    monkeypatch.setattr("pwopt.optimizing.preparation.certify", distrustful)
    result = optimize(MODELS / "linear_sequence.onnx", cost="analytic", shapes={"x": (1, 64, 8, 8)})
    assert ops(result.model)["Conv"] > 1
    assert [str(s.site) for s in result.report.skips if "refused by its certificate" in s.reason] == ["fold-chains:y"]
    assert any("please report" in n for n in result.report.notes)


def test_without_verification_there_are_no_certificates() -> None:
    report = optimize(MODELS / "linear_sequence.onnx", cost="analytic", verify=False).report
    assert {r.certificate.status for r in report.rewrites if r.certificate} == {"none"}
    assert [o.op for o in report.rewrites[0].before] == ["Conv"] * 4
    assert [o.op for o in report.rewrites[0].after] == ["Conv"]


@pytest.mark.parametrize("name", ["fcn", "fpn", "network_in_network", "rgbd_fusion"])
def test_every_rewrite_of_real_models_is_certified(name: str) -> None:
    model = from_proto(onnx.load(MODELS / f"{name}.onnx"))
    outcome = run_passes(model, resolve_passes(), (), {}, None, certify)
    assert outcome.rewrites
    assert {r.certificate.status for r in outcome.rewrites if r.certificate} <= {"certified", "tested"}


@pytest.mark.parametrize("name", ["fcn", "fpn", "hyperspectral", "network_in_network", "rgbd_fusion"])
def test_no_constant_of_any_rewrite_of_real_models_may_be_wrong(name: str) -> None:
    """One number of each constant that a rewrite makes, off by a hundredth of the largest, for as long as it takes."""
    wrong: list[Certificate] = []
    rng = np.random.default_rng(0)

    def doubtful(region: Change, view: View) -> Certificate:
        old = {t for s in region.before for t in s.inputs}
        for t in [t for s in region.after for t in s.inputs if isinstance(t, gs.Constant) and t not in old]:
            values = t.values
            if values.dtype.kind != "f" or not values.size:
                continue
            place = rng.integers(values.size)
            right = values.flat[place]
            values.flat[place] += 0.01 * (np.abs(values).max() or 1.0)
            wrong.append(certify(region, view))
            values.flat[place] = right
        return certify(region, view)

    model = from_proto(onnx.load(MODELS / f"{name}.onnx"))
    outcome = run_passes(model, resolve_passes(), (), {}, None, doubtful)
    assert all(r.certificate is not None and r.certificate.passed for r in outcome.rewrites)
    assert len(wrong) > 3
    assert {c.status for c in wrong} == {"failed"}


def test_constants_beside_data_count_by_their_size() -> None:
    body = "(float[1,2,5,5] x) => (float[N] y) { j = Concat<axis=1>(x, c) h = Conv(j, w) y = Mul(h, k) }"
    negative = -np.abs(normal(1, 3, 5, 5, dtype=np.float32))
    model = parse(body, c=negative, w=normal(4, 5, 1, 1, dtype=np.float32), k=normal(4, 1, 1, seed=1, dtype=np.float32))
    (found,) = certificates(model, FoldAffine())
    assert (found.status, found.bound) == ("certified", 2.0**-24)


def test_every_tap_of_a_large_window_counts() -> None:
    """Even where a few positions would do for the others."""
    body = "(float[1,2,60,60] x) => (float[N] y) { h = Conv<pads=[7,7,7,7]>(x, w) y = Mul(h, k) }"
    model = parse(body, w=normal(3, 2, 15, 15, dtype=np.float32), k=normal(3, 1, 1, seed=1, dtype=np.float32))
    assert [c.status for c in certificates(model, FoldAffine())] == ["certified"]
    for corner in (0, 14, 15 * 15 - 1):
        wrong = certificates(model, Faulty(FoldAffine(), off_by(1, corner, 0.01)))
        assert [c.status for c in wrong] == ["failed"]


@pytest.mark.parametrize(("start", "status"), [(300, "tested"), (301, "failed")])
def test_positions_are_held_to_the_models_own_sizes(start: int, status: str) -> None:
    class Crop(Pass):
        """Relu(Slice(x)) becomes Slice(Relu(x)), perhaps elsewhere."""

        name = "crop"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if node.op != "Relu" or rw.producer(node.inputs[0]) is None:
                return None
            crop = rw.producer(node.inputs[0])
            assert crop is not None
            middle = rw.new_variable("middle", crop.inputs[0])
            bounds = [rw.new_constant(n, np.array([v])) for n, v in (("s", start), ("e", start + 20), ("a", 2))]
            new = [
                gs.Node("Relu", "", {}, [crop.inputs[0]], [middle]),
                gs.Node("Slice", "", {}, [middle, *bounds], list(node.outputs)),
            ]
            return rw.replace([crop, node], new, "")

    body = "(float[1,2,400,400] x) => (float[N] y) { h = Slice(x, f, t, u) y = Relu(h) }"
    model = parse(body, f=np.array([300]), t=np.array([320]), u=np.array([2]))
    assert [c.status for c in certificates(model, Crop())] == [status]


#: Operators that are spelled out for certificates, against onnx's reference: text, and inputs.
OPERATORS = {
    "grouped": "y = Conv<group=2,strides=[2,1],dilations=[1,2],pads=[1,0,2,3]>(x, w, b)",
    "same upper": 'y = Conv<group=2,strides=[2,2],auto_pad="SAME_UPPER">(x, w, b)',
    "same lower": 'y = Conv<group=2,strides=[2,2],auto_pad="SAME_LOWER">(x, w, b)',
    "transposed": "y = ConvTranspose<strides=[2,3],pads=[1,0,0,2],output_padding=[1,0],dilations=[1,2]>(x, t, c)",
    "max": "y = MaxPool<kernel_shape=[3,2],strides=[2,1],pads=[1,0,1,1],dilations=[1,2]>(x)",
    "average": "y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(x)",
    "average with padding": "y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],count_include_pad=1>(x)",
    "ceil": "y = MaxPool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(x)",
    "nearest": 'y = Resize<mode="nearest",coordinate_transformation_mode="asymmetric",nearest_mode="floor">(x, , s)',
    "linear": 'y = Resize<mode="linear",coordinate_transformation_mode="half_pixel">(x, , s)',
    "aligned": 'y = Resize<mode="linear",coordinate_transformation_mode="align_corners">(x, , , z)',
    "normalised": "y = BatchNormalization<epsilon=0.01>(x, v, v, v, v)",
    "gemm": "f = Flatten(x) y = Gemm<alpha=0.5,beta=2.0,transB=1>(f, g, h)",
    "places": "y = GatherND(x, i)",
    "places in batches": "y = GatherND<batch_dims=1>(x, j)",
    "wide": "f = Transpose<perm=[0,2,3,1]>(x) y = MatMul(f, m)",
}


@pytest.mark.parametrize("text", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_evaluated_as_onnx_defines_them(text: str) -> None:
    model = parse(
        f"(double[2,4,7,6] x) => (double[N] y) {{ {text} }}", w=normal(6, 2, 3, 3), b=normal(6), t=normal(4, 3, 2, 3),
        c=normal(3), s=np.array([1, 1, 2, 3], np.float32), z=np.array([2, 4, 9, 8], np.int64), v=normal(4) ** 2,
        g=normal(5, 168), h=normal(5), m=normal(4, 5), i=np.array([[[1, -1], [0, 2]]]),
        j=np.array([[[3, 1, -2], [0, 6, 5]], [[-1, 0, 0], [2, 2, 2]]]),
    )  # fmt: skip
    graph = from_proto(model).graph
    view = View(graph)
    x = normal(2, 4, 7, 6, seed=9)
    side = Side(view, [State.of(n) for n in graph.nodes])
    found = side.run({graph.inputs[0]: x}, None)[graph.outputs[0]]
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_grouped_transposed_convolutions_are_two_beside_each_other() -> None:
    text = "y = ConvTranspose<group={}>(x, w)"
    w, x = normal(4, 3, 2, 2), normal(1, 4, 5, 5, seed=1)
    whole = _evaluated(text.format(2), x, w)
    halves = [_evaluated(text.format(1), x[:, i : i + 2], w[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(halves, axis=1), rtol=1e-12)


def _evaluated(text: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    graph = from_proto(parse(f"(double[1,{x.shape[1]},5,5] x) => (double[N] y) {{ {text} }}", w=w)).graph
    side = Side(View(graph), [State.of(n) for n in graph.nodes])
    return side.run({graph.inputs[0]: x}, None)[graph.outputs[0]]


def test_the_bound_follows_from_types_and_depths_alone() -> None:
    """One map in float32, stored once."""
    (found,) = certificates(chain(4, 6, 5), FoldChains())
    assert found.bound == 2.0**-24
