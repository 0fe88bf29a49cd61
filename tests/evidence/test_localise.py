"""Planted faults are found, in the layer that they were planted in; equivalent models pass, whoever saved them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import pytest
from helpers import MODELS, normal, parse, weight
from onnx import numpy_helper

import pwopt
from pwopt.errors import NotEquivalentError
from pwopt.evidence import localise
from pwopt.evidence.verify import verify
from pwopt.graph.files import save
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import Sample, SampleLabel
from pwopt.optimizing import attempt
from pwopt.rewriting.records import Rewrite, Site
from pwopt.selecting.candidate_base import Snapshot

ort = pytest.importorskip("onnxruntime")
F = np.float32

#: Layers a, b, c and f in a row, a branch d that joins by a sum, and a softmax: activations and normalisations between.
NET = """(float[2,3,9,9] x) => (float[N] y, float[N] z) {
    a = Conv<pads=[1,1,1,1]>(x, wa, ba) n = BatchNormalization(a, g, h, h, g) r = Relu(n)
    b = Conv(r, wb, bb) s = Sigmoid(b) d = Conv(r, wd) t = Add(s, d)
    c = Conv<pads=[1,1,1,1]>(t, wc, bc) u = Tanh(c)
    p = GlobalAveragePool(u) f = Flatten(p) l = Gemm(f, wf) y = Softmax<axis=1>(l)
    z = GlobalMaxPool(d)
}"""


def net() -> onnx.ModelProto:
    weights = {
        "wa": normal(8, 3, 3, 3), "ba": normal(8, seed=1), "g": normal(8, seed=2) ** 2 + 0.5, "h": normal(8, seed=3),
        "wb": normal(8, 8, 1, 1, seed=4), "bb": normal(8, seed=5), "wd": normal(8, 8, 1, 1, seed=6),
        "wc": normal(12, 8, 3, 3, seed=7) / 9, "bc": normal(12, seed=8), "wf": normal(12, 10, seed=9),
    }  # fmt: skip
    model = parse(NET, **{k: v.astype(F) for k, v in weights.items()})
    for node in model.graph.node:
        node.name = f"node {node.output[0]}"
    return model


def with_weight(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(F), name))
    return changed


@pytest.mark.parametrize(("name", "layer"), [("wa", "a"), ("wb", "b"), ("wd", "d"), ("wc", "c"), ("wf", "l")])
def test_a_wrong_weight_is_named(name: str, layer: str) -> None:
    model = net()
    w = weight(model, name)
    result = verify(model, with_weight(model, name, w * (1 + 1e-3 * normal(*w.shape))))
    assert not result.passed
    assert result.difference is not None
    assert result.difference.tensor == layer
    assert result.difference.node.endswith(f"node {layer}")
    assert result.difference.region == (result.difference.node,)


@pytest.mark.parametrize(("name", "layer"), [("ba", "a"), ("bb", "b"), ("bc", "c")])
def test_one_wrong_bias_entry_is_named(name: str, layer: str) -> None:
    model = net()
    b = weight(model, name).copy()
    b[3] += F(1e-2)
    result = verify(model, with_weight(model, name, b))
    assert not result.passed
    assert result.difference is not None
    assert result.difference.tensor == layer


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_another_optimisation_level_passes(tmp_path: Path, level: str) -> None:
    onnx.save(net(), tmp_path / "a.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "b.onnx")
    ort.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    assert verify(tmp_path / "a.onnx", tmp_path / "b.onnx").passed
    # and where it does differ, the names that its fusions gave to other values accuse nobody
    wrong = onnx.load(tmp_path / "b.onnx")
    for tensor in wrong.graph.initializer:
        if tensor.name == "wf":
            tensor.CopyFrom(numpy_helper.from_array(weight(wrong, "wf") * F(1.01), "wf"))
    result = verify(tmp_path / "a.onnx", wrong)
    assert not result.passed
    assert result.difference is not None
    assert result.difference.tensor == "l"


def test_a_model_saved_by_another_tool_passes(tmp_path: Path) -> None:
    """Another opset, other node names, shapes inferred, weights in an external file."""
    model = net()
    other = onnx.shape_inference.infer_shapes(onnx.version_converter.convert_version(model, 21))
    for i, node in enumerate(other.graph.node):
        node.name = f"renamed {i}"
    save_external(other, tmp_path / "b.onnx")
    assert verify(model, tmp_path / "b.onnx").passed


def save_external(model: onnx.ModelProto, path: Path) -> None:
    onnx.save_model(model, path, save_as_external_data=True, size_threshold=0, location=f"{path.name}.data")


def test_external_data_stays_external(tmp_path: Path) -> None:
    model = net()
    wrong = with_weight(model, "wc", weight(model, "wc") * F(1.001))
    for m, name in ((model, "a.onnx"), (wrong, "b.onnx")):
        save_external(m, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    result = verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert result.difference is not None
    assert result.difference.tensor == "c"
    assert sorted(tmp_path.iterdir()) == before


def test_tensors_are_looked_at_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    wrong = with_weight(model, "wb", weight(model, "wb") * F(1.01))
    monkeypatch.setattr(localise, "TENSORS", 2)
    found = verify(model, wrong).difference
    assert found is not None
    assert found.tensor == "b"
    monkeypatch.setattr(localise, "ELEMENTS", 1)
    assert verify(model, wrong).difference == found


def test_names_that_other_tools_reuse_accuse_nobody() -> None:
    """A normalisation folded into its convolution, whose name now holds another value; the fault is further down."""
    model = net()
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    scale = weight(model, "g") / np.sqrt(weight(model, "g") + 1e-5)
    shift = (weight(model, "ba") - weight(model, "h")) * scale + weight(model, "h")
    folded = with_weight(folded, "wa", weight(model, "wa") * scale[:, None, None, None])
    folded = with_weight(folded, "ba", shift)
    nodes = [n for n in folded.graph.node if n.op_type != "BatchNormalization"]
    nodes[1].input[0] = "a"
    del folded.graph.node[:]
    folded.graph.node.extend(nodes)
    assert verify(model, folded).passed
    wrong = verify(model, with_weight(folded, "wc", weight(model, "wc") * F(1.001)))
    assert not wrong.passed
    assert wrong.difference is not None
    assert wrong.difference.tensor == "c"


def test_a_fault_among_new_names_is_bounded_by_what_agrees() -> None:
    """Nothing of the faulty layer keeps its name: the next tensor that does is reported, with what lies between."""
    model = net()
    other = with_weight(model, "wb", weight(model, "wb") * F(1.01))
    for node in other.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"b": "new b", "s": "new s"}.get(name, name) for name in names]
    found = verify(model, other).difference
    assert found is not None
    assert found.tensor == "t"
    assert found.agreeing == ("d", "r")
    assert found.region == ("Conv node b", "Sigmoid node s", "Add node t")


def test_another_shape_is_found_as_well() -> None:
    model = parse("(float[1,4,6,6] x) => (float[N] y) { a = Relu(x) b = Neg(a) y = ReduceMean<axes=[2,3]>(b) }")
    other = parse(
        "(float[1,4,6,6] x) => (float[N] y) { a = Relu(x) b = Neg(a) y = ReduceMean<axes=[2,3],keepdims=0>(b) }"
    )
    result = verify(model, other)
    assert not result.passed
    assert result.difference is None or result.difference.tensor == "y"
    assert "became" in result.outputs[0].reason


def test_the_sample_that_failed_is_the_one_looked_at() -> None:
    """Only the largest input of the second normal sample shows it, and an output that failed elsewhere is not blamed."""
    body = (
        "(float[1,1000] x) => (float[N] y, float[N] z) { a = Clip(x, low, high) y = Neg(a) b = Abs(x) z = Mul(b, c) }"
    )
    rng = [np.random.default_rng(seed).standard_normal(1000).astype(F).max() for seed in (0, 2)]
    assert rng[1] > rng[0]
    limit = (rng[0] + rng[1]) / 2
    model, other = (parse(body, low=F(-9), high=F(h), c=F(2)) for h in (9, limit))
    result = verify(model, other)
    assert [o.passed for o in result.outputs] == [False, True]
    assert result.outputs[0].sample.startswith("normal 2")
    assert result.difference is not None
    assert result.difference.tensor == "a"


def test_an_output_that_nothing_makes() -> None:
    body = "(float[2,3] x) => (float[2,3] w, float[N] y) { y = Add(x, w) }"
    model, other = parse(body, w=np.ones((2, 3), F)), parse(body, w=np.full((2, 3), 2, F))
    result = verify(model, other)
    assert [o.passed for o in result.outputs] == [False, False]
    assert result.difference is not None
    assert result.difference.tensor == "y"


def test_a_candidate_that_fails_where_the_original_runs() -> None:
    """Its declared inputs are dynamic, but it only takes one size."""
    model = parse("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    fixed = parse("(float[N,3] x) => (float[N,3] y) { r = Relu(x) y = Reshape(r, s) }", s=np.array([1, 3]))
    result = verify(model, fixed)
    assert not result.passed
    assert "fails where the original runs" in result.outputs[0].reason
    assert result.difference is None


def test_noise_that_grows_step_by_step_is_nobodys_fault() -> None:
    nodes = " ".join(f"t{i + 1} = Mul(t{i}, c)" for i in range(30))
    body = f"(float[4,9] t0) => (float[N] y) {{ {nodes} y = Identity(t30) }}"
    model, other = parse(body, c=F(1.25)), parse(body, c=F(1.25 * (1 + 1e-6)))
    result = verify(model, other, rtol=0, atol=0)
    assert not result.passed
    assert result.difference is None


def test_a_fault_that_noise_drowns_is_traced_back_from_where_it_shows() -> None:
    """Pooling averages the noise of a convolution away, but not its wrong bias."""
    body = (
        "(float[1,16,6,6] x) => (float[N] y) { r = Neg(x) a = Conv(r, w, b) p = GlobalAveragePool(a) y = Flatten(p) }"
    )
    w, b = normal(8, 16, 1, 1, dtype=F), np.zeros(8, F)
    w -= w.mean(axis=1, keepdims=True)  # no mean, no noise in it
    for size, tensor in ((7e-6, "a"), (1e-2, "a")):
        wrong = b.copy()
        wrong[2] = size
        result = verify(parse(body, w=w, b=b), parse(body, w=w, b=wrong), rtol=0, atol=0)
        assert not result.passed
        assert result.difference is not None
        assert result.difference.tensor == tensor


def test_the_rewrite_at_fault_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rewrite that went wrong: optimize leaves it out, and says where the answers began to differ."""
    real = Snapshot.finish

    def faulty(snapshot: Snapshot, allowed: frozenset[str] | None = None) -> object:
        result = real(snapshot, allowed)
        for node in snapshot.model.graph.nodes:
            if node.op == "Conv" and node.outputs[0].name == "n":  # into which the normalisation was folded
                node.inputs[1].values = node.inputs[1].values * F(1.001)
        return result

    monkeypatch.setattr(Snapshot, "finish", faulty)
    report = pwopt.optimize(net(), tmp_path / "out.onnx", cost="analytic", passes=["fold-affine"]).report
    assert report.rewrites == ()
    (left,) = (s for s in report.skips if str(s.site) == "fold-affine:n")
    assert left.reason.startswith("left out (output 'z' ")
    assert "BatchNormalization" in {n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node}
    monkeypatch.setattr(attempt, "MAX_ATTEMPTS", 1)
    with pytest.raises(NotEquivalentError, match="--deny 'fold-affine:n'") as failure:
        pwopt.optimize(net(), tmp_path / "none.onnx", cost="analytic", passes=["fold-affine"])
    assert not (tmp_path / "none.onnx").exists()
    found = failure.value.report.equivalence.difference
    assert found.tensor == "n"
    assert found.sites == (Site("fold-affine", "n"),)


def test_rewrites_are_followed_through_later_ones() -> None:
    first = Rewrite("", became=(("a", "b"),), site=Site("fold-affine", "b"))
    second = Rewrite("", became=(("b", "c"), ("k", "c")), site=Site("fold-chains", "c"))
    other = Rewrite("", became=(("p", "q"),), site=Site("fold-affine", "q"))
    assert localise._find_sites([first, other, second], {"c"}) == (Site("fold-affine", "b"), Site("fold-chains", "c"))
    assert localise._find_sites([first, other, second], {"q"}) == (Site("fold-affine", "q"),)


def test_a_model_that_pwopt_made_keeps_its_word(tmp_path: Path) -> None:
    """A name is the original's value or nothing, in every model of the repository."""
    for path in sorted(MODELS.glob("*.onnx")):
        sizes = {s.name: [d if isinstance(d, int) else 4 for d in s.shape or ()] for s in input_specs(onnx.load(path))}
        done = pwopt.optimize(path, cost="analytic", verify=False, shapes=sizes)
        save(done.model, tmp_path / "b.onnx")
        result = verify(path, tmp_path / "b.onnx", samples=["normal"], shapes=sizes)
        assert result.passed
        blamed = replace(result, passed=False, outputs=tuple(replace(o, passed=False) for o in result.outputs))
        feeds = {name: normal(*shape, dtype=F) for name, shape in result.shapes.items()}
        sample = Sample(SampleLabel(result.outputs[0].sample), feeds)
        assert localise.localise(path, tmp_path / "b.onnx", blamed, [sample]) is None
