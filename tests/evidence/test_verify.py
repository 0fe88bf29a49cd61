from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, parse, planted_race

from pwopt.errors import ModelError, ProviderError, UsageError
from pwopt.evidence.comparison import nudge
from pwopt.evidence.laws import parse_law
from pwopt.evidence.metrics import agreement
from pwopt.evidence.verify import verify
from pwopt.graph.files import load
from pwopt.inputs.input_specs import check_shapes, input_specs, parse_shape
from pwopt.inputs.samples import draw_feeds, read_samples
from pwopt.running import installation, memory
from pwopt.running.providers import Provider
from pwopt.running.session import Session, nodes_elsewhere
from pwopt.running.size_trials import choose_sizes
from pwopt.running.timing import MIN_PAIRS, race

pytest.importorskip("onnxruntime")
F = np.float32


def write(tmp_path: Path, name: str, body: str, **weights: np.ndarray) -> Path:
    path = tmp_path / name
    onnx.save(parse(body, **weights), path)
    return path


def test_a_model_is_equivalent_to_itself() -> None:
    result = verify(MODELS / "network_in_network.onnx", MODELS / "network_in_network.onnx")
    assert result.passed
    assert all(o.max_abs == 0 for o in result.outputs)
    assert next(o.name for o in result.outputs) == "logits"


@pytest.mark.parametrize(("factor", "passed"), [(1 + 1e-7, True), (1 + 1e-3, False)])
def test_a_wrong_weight_is_seen(tmp_path: Path, factor: float, passed: bool) -> None:
    body = "(float[1,4,6,6] x) => (float[N] y) { y = Conv(x, w) }"
    w = normal(4, 4, 3, 3, dtype=F)
    a, b = write(tmp_path, "a.onnx", body, w=w), write(tmp_path, "b.onnx", body, w=(w * factor).astype(F))
    assert verify(a, b).passed == passed


def test_discrete_outputs_are_compared_by_mismatch(tmp_path: Path) -> None:
    body = "(float[1,9] x) => (int64[N] y) { y = %s<axis=1>(x) }"
    a, b = write(tmp_path, "a.onnx", body % "ArgMax"), write(tmp_path, "b.onnx", body % "ArgMin")
    assert verify(a, a).passed
    result = verify(a, b)
    assert not result.passed
    assert "elements differ" in result.outputs[0].reason


def test_nan_and_infinity_must_agree(tmp_path: Path) -> None:
    body = "(float[2,9] x) => (float[N] y) { y = %s(x) }"
    a, b = write(tmp_path, "a.onnx", body % "Log"), write(tmp_path, "b.onnx", body % "Abs")
    assert verify(a, a).passed
    assert "NaN" in verify(a, b).outputs[0].reason
    one, other = np.array([1.0, np.nan, np.inf]), np.array([1.0, np.inf, np.inf])
    assert not agreement(one, other).within
    assert agreement(one, one.copy()).within


def test_other_outputs_are_an_error(tmp_path: Path) -> None:
    body = "(float[2,9] x) => (float[N] %s) { %s = Neg(x) }"
    with pytest.raises(ModelError, match="outputs differ"):
        verify(write(tmp_path, "a.onnx", body % ("y", "y")), write(tmp_path, "b.onnx", body % ("z", "z")))


def test_shape_and_type_are_part_of_the_answer() -> None:
    assert "became" in agreement(np.zeros((1, 2), F), np.zeros((2, 1), F)).note
    assert "became" in agreement(np.zeros(2, F), np.zeros(2, np.float64)).note


def test_sensitivity_is_one_unit_in_the_last_place() -> None:
    x = {"x": np.ones(1000, F), "i": np.arange(3)}
    moved = nudge(x)
    assert np.all(np.abs(moved["x"] - 1) <= np.spacing(F(1)))
    assert np.all(moved["x"] != 1)
    assert moved["i"] is x["i"]


def test_default_sizes_are_tried_until_one_runs(tmp_path: Path) -> None:
    """A text recogniser that only takes a height of 48, declared dynamic, as PP-OCR exports are."""
    body = """(float[N,3,H,W] x) => (float[N] y) {
        p = AveragePool<kernel_shape=[48,1], strides=[48,1]>(x) y = Squeeze(p, a)
    }"""
    path = write(tmp_path, "ocr.onnx", body, a=np.array([2]))
    assert verify(path, path).samples == 6
    solved = write(tmp_path, "odd.onnx", body.replace("48", "7"), a=np.array([2]))
    assert verify(solved, solved).passed, "a height of 7 to 13, which the graph says"
    impossible = write(tmp_path, "never.onnx", "(float[L] x) => (float[a] y) { y, i = TopK(x, k) }", k=np.array([777]))
    with pytest.raises(UsageError, match="--shape x="):
        verify(impossible, impossible)
    assert verify(impossible, impossible, shapes={"x": (800,)}).passed


def test_shapes_are_parsed_and_checked() -> None:
    assert parse_shape("a=b:0=1x3x8") == ("a=b:0", (1, 3, 8))
    assert parse_shape("s=") == ("s", ())
    for text in ("x", "x=1x", "=1", "x=ax2"):
        with pytest.raises(UsageError, match="not of the form"):
            parse_shape(text)
    specs = input_specs(parse("(float[N,3,8,8] x) => (float[N] y) { y = Neg(x) }"))
    for shapes, word in (
        ({"z": (1,)}, "no input"),
        ({"x": (1, 4, 8, 8)}, "does not fit"),
        ({"x": (1,)}, "does not fit"),
    ):
        with pytest.raises(UsageError, match=word):
            check_shapes(specs, shapes)


def test_equal_names_get_equal_sizes() -> None:
    model = parse("(float[B,S] x, int64[B,S] m, bool[S] k, string[B] t) => (float[N] y) { y = Neg(x) }")
    specs = input_specs(model)
    shapes = choose_sizes(specs, model, shapes={"x": (3, 5)}).sizes
    assert shapes == {"x": (3, 5), "m": (3, 5), "k": (5,), "t": (3,)}
    feeds = draw_feeds(specs, shapes)
    assert {n: v.dtype.kind for n, v in feeds.items()} == {"x": "f", "m": "i", "k": "b", "t": "O"}


def test_inputs_from_a_file(tmp_path: Path) -> None:
    specs = input_specs(parse("(float[N,3] x) => (float[N] y) { y = Neg(x) }"))
    np.savez(tmp_path / "in.npz", x=np.ones((2, 3)))
    assert read_samples(tmp_path / "in.npz", specs)[0].feeds["x"].dtype == np.float32
    np.savez(tmp_path / "other.npz", z=np.ones((2, 3)))
    with pytest.raises(UsageError, match="lacks the inputs 'x'"):
        read_samples(tmp_path / "other.npz", specs)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "bad.npz", specs)


def test_providers_are_strict() -> None:
    with pytest.raises(ProviderError, match="not in this onnxruntime"):
        Session(MODELS / "linear_sequence.onnx", Provider.parse("cuda"))
    with pytest.raises(ProviderError, match="NoSuchProvider"):
        Session(MODELS / "linear_sequence.onnx", Provider.parse("NoSuchProvider"))


def test_a_silent_fallback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without a GPU lists CUDA, warns, and runs on the CPU."""
    ort = installation.import_onnxruntime()
    real = ort.InferenceSession

    def falls_back(path: str, options: object, providers: object, enable_fallback: int) -> object:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", falls_back)
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider could not start: .*nothing was run"):
        Session(MODELS / "linear_sequence.onnx", Provider.parse("cuda"))


def test_a_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install onnxruntime, or"):
        Session(MODELS / "linear_sequence.onnx")


def test_placement_names_where_nodes_ran() -> None:
    session = Session(MODELS / "linear_sequence.onnx", profile=True, optimise=False)
    specs = input_specs(onnx.load(MODELS / "linear_sequence.onnx"))
    session.run(draw_feeds(specs, {"x": (1, 64, 4, 4)}))
    placed = session.placement()
    assert list(placed) == ["CPUExecutionProvider"]
    assert len(placed["CPUExecutionProvider"]) == 4
    assert not nodes_elsewhere(placed, Provider.parse("cpu"))
    assert nodes_elsewhere(placed, Provider.parse("cuda")) == placed


def test_a_race_runs_every_model_every_round() -> None:
    openers = [partial(Session, MODELS / "linear_sequence.onnx")] * 2
    specs = input_specs(onnx.load(MODELS / "linear_sequence.onnx"))
    result = race(openers, draw_feeds(specs, {"x": (1, 64, 4, 4)}), budget=0.0)
    assert len(result.pairs) == MIN_PAIRS
    assert all(t.min() > 0 for pair in result.pairs for t in pair.times)
    assert min(result.creation(0), result.first_run(1)) > 0


def test_waiting_is_no_time_of_a_single_thread() -> None:
    """Other load on the machine makes a thread wait; several threads, and devices, are timed by the clock."""
    single, several = (Session(MODELS / "linear_sequence.onnx", threads=n) for n in (1, 2))
    spent = []
    for session in (single, several):
        begin = session.clock()
        time.sleep(0.05)
        spent.append(session.clock() - begin)
    assert spent[0] < 0.02 < 0.05 <= spent[1]


def test_statistics_of_a_race() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 200))
    twice = planted_race(2.0 + noise[0], 1.0 + noise[1])
    low, high = twice.interval()
    assert low < twice.speedup() < high
    assert low == pytest.approx(2, rel=0.02)
    assert high == pytest.approx(2, rel=0.02)
    assert twice.minimum(1) < twice.median(1)


def test_slow_spells_hit_both_models_of_a_race() -> None:
    """What slows whole rounds down is in neither the ratio nor its interval."""
    spells = np.random.default_rng(0).uniform(1, 3, 40)
    race = planted_race(2.0 * spells, 1.0 * spells)
    assert (race.speedup(), *race.interval()) == (2.0, 2.0, 2.0)


def test_nothing_finite_is_no_proof(tmp_path: Path) -> None:
    body = "(float[2,9] x) => (float[N] y) { h = Abs(x) k = Neg(h) l = Log(k) y = Mul(l, c) }"
    a, b = write(tmp_path, "a.onnx", body, c=F(2)), write(tmp_path, "b.onnx", body, c=F(5))
    result = verify(a, b)
    assert not result.passed
    assert "no finite value" in result.outputs[0].reason


def test_empty_outputs_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, "a.onnx", "(float[N,3] x) => (float[N,3] y) { y = Neg(x) }")
    assert (
        verify(path, path, shapes={"x": (0, 3)}).outputs[0].reason == "empty in every sample, so nothing was compared"
    )


def test_other_inputs_are_an_error(tmp_path: Path) -> None:
    a = write(tmp_path, "a.onnx", "(float[2,9] x) => (float[N] y) { y = Neg(x) }")
    b = write(tmp_path, "b.onnx", "(float[2,9] z) => (float[N] y) { y = Neg(z) }")
    with pytest.raises(ModelError, match="inputs differ: x against z"):
        verify(a, b)


def test_models_in_memory_can_be_compared() -> None:
    model = parse("(float[2,9] x) => (float[N] y) { y = Neg(x) }")
    assert verify(model, load(model)).passed


def test_an_input_of_unknown_rank_needs_its_shape() -> None:
    model = parse("(float[2,9] x) => (float[N] y) { y = Neg(x) }")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match="declares no shape"):
        verify(model, model)
    assert verify(model, model, shapes={"x": (2, 3)}).passed


def test_settings_that_make_no_sense() -> None:
    path = MODELS / "linear_sequence.onnx"
    for arguments in (
        {"threads": 0},
        {"rtol": -1.0},
        {"atol": float("nan")},
        {"shapes": {"x": "1x64"}},
        {"shapes": {"x": (1, None)}},
    ):
        with pytest.raises(UsageError):
            verify(path, path, **arguments)  # type: ignore[arg-type]


def test_a_law_about_an_axis_that_is_not_there() -> None:
    path = MODELS / "network_in_network.onnx"
    with pytest.raises(UsageError, match=r"output 'logits', 1×100, has not; choose others with .*output=NAME"):
        verify(path, path, invariants=[parse_law("translation:shift=2:stride=2")])
    within = parse_law("translation:shift=2:stride=2:margin=4:output=/block2.relu/Relu_output_0")
    assert verify(path, path, invariants=[within]).laws[0].original < 1e-6


def test_given_arrays_are_cast_and_checked() -> None:
    path = MODELS / "linear_sequence.onnx"
    assert verify(path, path, inputs={"x": np.ones((1, 64, 2, 2))}).passed
    with pytest.raises(UsageError, match="does not fit"):
        verify(path, path, inputs={"x": np.ones((1, 3, 2, 2))})
    with pytest.raises(UsageError, match="not 1×64×4×4"):
        verify(path, path, inputs={"x": np.ones((1, 64, 2, 2))}, shapes={"x": (1, 64, 4, 4)})


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_large_models_are_loaded_one_after_the_other(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Kept answers give the same figures as sessions that stay open."""
    one, other = (
        parse("(float[2,8] x) => (float[2,8] y) { y = MatMul(x, w) }", w=s * normal(8, 8, dtype=np.float32))
        for s in (1.0, factor)
    )
    together = verify(one, other, locate=False)
    monkeypatch.setattr(memory, "MIN_RESIDENT", 0)
    apart = verify(one, other, locate=False)
    assert together.passed == apart.passed == (factor == 1.0)
    assert str(together.outputs) == str(apart.outputs)
