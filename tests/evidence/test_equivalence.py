"""The rule, part by part; where operators ran; invariants of two models side by side."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import normal, parse

from pwopt.errors import UsageError
from pwopt.evidence.comparison import compare
from pwopt.evidence.equivalence import EXCUSED, FLOOR_FACTOR, Difference, Equivalence, judge
from pwopt.evidence.laws import parse_law
from pwopt.evidence.metrics import Agreement
from pwopt.evidence.verify import verify
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.samples import Sample, SampleLabel
from pwopt.rewriting.records import Site
from pwopt.running import installation
from pwopt.running.providers import Provider
from pwopt.running.session import Session, find_fallbacks

pytest.importorskip("onnxruntime")
F = np.float32


def off(deviation: float, within: bool = False, **more: float) -> Agreement:
    return Agreement(max_abs=deviation, within=within, size=9, compared=9, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("candidate", "floor", "moved", "passed", "reason"),
    [
        (off(4.0), off(1.0), off(0.0), True, "noise floor"),
        (off(4.1), off(1.0), off(0.0), False, "beyond the tolerance"),
        (off(4.0), off(0.0), off(1.0), True, "rounding the inputs"),
        (off(EXCUSED, True), off(1.0), off(0.0), True, "within the tolerance"),
        (off(EXCUSED * 1.1, True), off(1.0), off(0.5), False, "within the tolerance, but"),
        (off(EXCUSED, True, resolution=1.0), off(0.0), off(0.0), True, "within the tolerance"),
        (Agreement.disagree("NaN"), off(np.inf), off(np.inf), False, "NaN"),
        (off(1.0), Agreement.disagree("NaN"), off(0.0), False, "beyond"),
    ],
)
def test_the_rule(candidate: Agreement, floor: Agreement, moved: Agreement, passed: bool, reason: str) -> None:
    found = judge(candidate, floor, moved, discrete=False)
    assert found[0] == passed
    assert reason in found[1]


def test_a_tolerance_that_was_asked_for_is_believed() -> None:
    assert judge(off(1.0, True), off(0.0), off(0.0), discrete=False, asked=True)[0]


def test_labels_are_judged_by_their_share() -> None:
    own = Agreement(mismatch=0.01, size=9, compared=9)
    for share, passed in ((0.01 * FLOOR_FACTOR, True), (0.05, False)):
        assert judge(Agreement(mismatch=share, size=9, compared=9), own, Agreement(), discrete=True)[0] == passed


def test_one_bad_sample_is_not_excused_by_another() -> None:
    """Large inputs have a large noise floor, which is none for ordinary ones."""
    body = "(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, w) b = Conv(a, v) y = Add(b, c) }"
    weights = {"w": normal(16, 4, 1, 1, dtype=F), "v": normal(4, 16, 1, 1, seed=1, dtype=F)}
    model, other = parse(body, c=F(0), **weights), parse(body, c=F(1e-3), **weights)
    assert verify(model, other, samples=["large"]).outputs[0].floor * FLOOR_FACTOR > 1e-3
    both = verify(model, other, samples=["normal", "large"])
    assert not both.passed
    assert both.outputs[0].sample.startswith("normal")


def test_strings_booleans_and_integers() -> None:
    body = "(string[N] s, bool[N] b, int32[N] i) => (string[N] p, bool[N] q, int32[N] r) { p = Identity(s) q = Not(b) r = Add(i, one) }"
    model = parse(body, one=np.int32(1))
    result = verify(model, model)
    assert result.passed
    assert [o.mismatch for o in result.outputs] == [0, 0, 0]
    assert [o.ulp for o in result.outputs] == [None] * 3
    wrong = verify(model, parse(body, one=np.int32(2)))
    assert [o.passed for o in wrong.outputs] == [True, True, False]
    assert wrong.outputs[2].max_abs == 1


def stub(values: list[float], *further: list[float]) -> Any:
    """A session that answers with these numbers in turn, as float16."""
    answers = itertools.cycle([np.array(v, np.float16) for v in (values, *further)])
    return SimpleNamespace(inputs=["x"], outputs=["y"], run=lambda _: [next(answers)])


USUAL = [1.0, np.inf, 3.0, 65504.0]


def compared(
    candidate: list[float], *, plain: list[float], nudged: list[float] | None = None, usual: list[float] = USUAL
) -> Equivalence:
    """A candidate's answers against those of an original in three runs."""
    sample = Sample(SampleLabel("given"), {"x": np.ones(1, F)})
    return compare(stub(usual, usual if nudged is None else nudged), stub(plain), stub(candidate), [sample])


def test_where_the_original_disagrees_with_itself_is_no_evidence() -> None:
    """What overflows at one level of optimisation only, or after rounding the inputs, is left out, counted and shown."""
    found = compared([1, 2, 3, 65504], plain=[1, 60000, 3, 65504])
    assert found.passed
    assert (found.outputs[0].left_out, found.outputs[0].compared) == (1, 3)
    assert list(found.remarks()) == [
        "Output 'y': 1 element left out, beside 3 compared; the original is NaN or infinite there in one run and not "
        "in another."
    ]
    assert compared([1, np.nan, 3, 65504], plain=USUAL, nudged=[1, np.nan, 3, 65504]).passed
    assert not compared([1, 2, 3, 65504], plain=USUAL).passed  # it always overflows
    assert not compared([1, 2, 3.5, 65504], plain=[1, 60000, 3, 65504]).passed  # elsewhere there is evidence
    assert list(compared(USUAL, plain=USUAL).remarks()) == []


def test_an_edge_is_judged_by_the_noise() -> None:
    """Infinity instead of 60,000 is a deviation of at least 5,520, more than the tolerance; 1,380 is a quarter of that."""
    usual = [1.0, np.inf, 3.0, 60000.0]
    beyond = [1.0, np.inf, 3.0, np.inf]
    assert compared(beyond, usual=usual, plain=[1, np.inf, 1384, 60000]).passed
    assert not compared(beyond, usual=usual, plain=[1, np.inf, 1382, 60000]).passed
    assert not compared([1, np.inf, 3, -np.inf], usual=usual, plain=[1, np.inf, 1384, 60000]).passed


def test_an_output_that_is_left_out_as_a_whole_proves_nothing() -> None:
    nowhere = [np.nan] * 4
    found = compared([1, 2, 3, 4], plain=nowhere)
    assert not found.passed
    assert "no finite value to compare" in found.outputs[0].reason
    assert found.outputs[0].left_out == 4


def test_what_differs_reads_as_a_sentence() -> None:
    check = compared([1, 2, 3, 65504], plain=USUAL).outputs[0]
    found = Difference("y", "Conv c", (), ("Conv c",), check, (Site("fold-affine", "y"),), 1)
    said = "the first tensor that differs is 'y', made by Conv c; it differs (NaN or infinity at different places); "
    assert found.explain() == f"{said}made by fold-affine:y: try --deny 'fold-affine:y'"
    by_record = replace(found, assumed=True).explain()
    assert by_record == f"{said}if pwopt wrote this model, fold-affine:y made it: try --deny 'fold-affine:y'"


def test_several_rounds_of_sizes() -> None:
    model = parse("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    result = verify(model, model, shapes=[{"x": (2, 3)}, {"x": (5, 3)}], samples=["normal", "zeros"])
    assert tuple(map(str, result.inputs)) == ("normal, x 2×3", "zeros, x 2×3", "normal, x 5×3", "zeros, x 5×3")
    assert result.outputs[0].compared == 2 * (6 + 15)


def test_a_fixed_variant_is_compared_at_its_size() -> None:
    dynamic = parse("(float[N,3,H,W] x) => (float[M] y) { y = Relu(x) }")
    fixed = parse("(float[2,3,8,9] x) => (float[M] y) { y = Relu(x) }")
    result = verify(dynamic, fixed)
    assert result.passed
    assert result.shapes == {"x": (2, 3, 8, 9)}


def fake_profile(folder: Path) -> Path:
    """What onnxruntime writes when a provider leaves a node to the CPU."""

    def event(name: str, op: str, provider: str) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": 5, "args": {"op_name": op, "provider": provider}}

    path = folder / "profile.json"
    events = [
        {"cat": "Session", "name": "session_initialization", "dur": 1, "args": {}},
        event("c1", "Conv", "CUDAExecutionProvider"),
        event("nms", "NonMaxSuppression", "CPUExecutionProvider"),
        event("nms", "NonMaxSuppression", "CPUExecutionProvider"),
        event("", "Shape", "CPUExecutionProvider"),
    ]
    path.write_text(json.dumps(events))
    return path


def test_operators_that_ran_elsewhere_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = fake_profile(tmp_path)

    class Cuda(Session):
        def __init__(self, *arguments: object, profile: bool = False, **options: object) -> None:
            self.session = SimpleNamespace(end_profiling=lambda: str(tmp_path / "profile.json"))
            assert profile

        def run(self, feeds: Feeds) -> list[object]:
            return []

    monkeypatch.setattr("pwopt.running.session.Session", Cuda)
    assert find_fallbacks("m.onnx", Provider.parse("cpu"), 1, {}) == {}
    assert profile.exists()
    found = find_fallbacks("m.onnx", Provider.parse("cuda"), 1, {})
    assert found == {"CPUExecutionProvider": ("NonMaxSuppression nms", "Shape")}
    assert not profile.exists()


def test_the_precision_of_cuda_is_not_lowered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sessions ask for TF32 to be off unless they are timed."""
    ort = installation.import_onnxruntime()
    asked: list[object] = []

    def session(path: str, options: object, providers: list[object], enable_fallback: int) -> object:
        asked.append(providers[0])
        names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return SimpleNamespace(get_providers=lambda: names, get_inputs=list, get_outputs=list)

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    Session("m.onnx", Provider.parse("cuda"))
    Session("m.onnx", Provider.parse("cuda"), tf32=True)
    assert asked == [
        ("CUDAExecutionProvider", {"use_tf32": "0"}),
        ("CUDAExecutionProvider", {"use_tf32": "1"}),
    ]


def test_invariants_of_both_models() -> None:
    body = "(float[1,4,6,6] x) => (float[N] y) { y = Conv(x, w) }"
    q = np.linalg.qr(normal(4, 4))[0]
    model, other = (parse(body, w=w.astype(F)[:, :, None, None]) for w in (q, q * 1.5))
    result = verify(model, other, invariants=[parse_law("isometry"), parse_law("translation:shift=2:margin=2")])
    isometry, translation = result.laws
    assert (isometry.law, translation.law) == ("isometry", "translation:shift=2:margin=2")
    assert isometry.original < 1e-6
    assert isometry.candidate == pytest.approx(0.5)
    assert max(translation.original, translation.candidate) < 1e-5
    assert not result.passed


def test_invariants_that_do_not_fit(tmp_path: Path) -> None:
    model = parse("(float[1,4,6,6] x) => (float[N] y) { y = GlobalAveragePool(x) }")
    np.save(tmp_path / "a.npy", np.ones((1, 4)))
    with pytest.raises(UsageError, match="which the invariant compares, differ"):
        verify(model, model, invariants=[parse_law(f"conservation:matrix={tmp_path / 'a.npy'}")])
    with pytest.raises(UsageError, match="no input 'z'"):
        verify(model, model, invariants=[parse_law("symmetry:input=z")])
    for text, words in (
        ("energy", "'energy' is not an invariant"),
        ("gram", "needs a matrix"),
        ("translation:shift", "not a setting"),
        ("translation:speed=3", "not a setting"),
        ("translation:shift=far", "cannot be read"),
        ("conservation:matrix=none.npy", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_law(text)
