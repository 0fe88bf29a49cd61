"""Sizes of open inputs: what a model says of itself, what is ruled out, and what is tried."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from dynamic import CASES, Case, attention, encoder, image, undeclared, waveform
from helpers import parse

from pwopt.errors import UsageError
from pwopt.graph.shapes import infer
from pwopt.inputs.footprint import estimate_footprint
from pwopt.inputs.input_specs import InputSpec, input_specs
from pwopt.inputs.metadata import Metadata
from pwopt.inputs.samples import draw_feeds
from pwopt.running.size_trials import ChosenSizes, choose_rounds, choose_sizes

pytest.importorskip("onnxruntime")


def chosen(model: onnx.ModelProto, folder: Path | None = None, **given: tuple[int, ...]) -> ChosenSizes:
    """Sizes of a model, tried if there is a folder to write it to."""
    path = None if folder is None else folder / "m.onnx"
    if path is not None:
        path.write_bytes(model.SerializeToString())
    return choose_sizes(input_specs(model), model, path, shapes=given)


@pytest.mark.parametrize(
    ("shape", "size"), [("N,3,T", (2, 3, 6)), ("A,N,3,T", (5, 2, 3, 6)), ("3,T", (3, 6)), ("K", (3,))]
)
def test_a_vector_times_matrices_leaves_their_batch_open(shape: str, size: tuple[int, ...]) -> None:
    model = parse(f"(float[{shape}] x) => (float[a] y) {{ y = MatMul(k, x) }}", k=np.ones(3, np.float32))
    assert chosen(model, x=size).sizes == {"x": size}


@pytest.mark.parametrize("weights", [(3,), (2, 3), (5, 2, 3)])
def test_the_size_of_a_vector_follows_from_what_multiplies_it(weights: tuple[int, ...], tmp_path: Path) -> None:
    model = parse(
        "(float[K] x) => (float y) { a = MatMul(k, x)  y = ReduceSum <keepdims = 0> (a) }",
        k=np.ones(weights, np.float32),
    )
    assert chosen(model, tmp_path).sizes == {"x": (3,)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_is_run_at_the_sizes_that_it_says(case: Case, tmp_path: Path) -> None:
    model = case.build()
    found = chosen(model, None if "GiB" in case.reason else tmp_path)  # what is large may be too slow where tests run
    assert found.sizes == case.sizes
    assert case.reason in "; ".join(found.why)
    assert {s.name: s.largest for s in input_specs(model) if s.name in case.largest} == case.largest


def test_nothing_is_run_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inference says is enough where nothing is verified: also without any onnxruntime."""
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    for name in (
        "Gemm behind Flatten",
        "attention over pixels",
        "tokens, a segment and a mask",
        "positional table of patches",
    ):
        assert chosen(CASES[name].build()).sizes == CASES[name].sizes


def test_what_the_user_gives_stays_and_spreads_by_name(tmp_path: Path) -> None:
    assert chosen(image(), tmp_path, x=(3, 3, 31, 57)).sizes == {"x": (3, 3, 31, 57)}
    assert chosen(encoder(), tmp_path, mask=(2, 9)).sizes == dict.fromkeys(("ids", "kinds", "mask"), (2, 9))
    found = chosen(CASES["key-value cache by name"].build(), tmp_path, past_key=(2, 4, 5, 8))
    assert found.sizes == {"k": (2, 4, 128, 8), "past_key": (2, 4, 5, 8), "mask": (2, 1, 1, 133)}
    assert chosen(image(), tmp_path, x=(1, 3, 64, 64)).why == ()
    with pytest.raises(UsageError, match="does not fit input 'x', which is N×3×H×W"):
        chosen(image("[N,C,H,W]"), x=(1, 4, 64, 64)) if input_specs(image("[N,C,H,W]"))[0].shape == (
            "N",
            3,
            "H",
            "W",
        ) else None


def test_no_declared_shape_is_refused_only_if_the_graph_is_silent() -> None:
    silent = undeclared(parse("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }"))
    with pytest.raises(UsageError, match="declares no shape; give --shape x="):
        chosen(silent)
    assert chosen(silent, x=(2, 3)).sizes == {"x": (2, 3)}
    product = undeclared(
        parse("(float[N,3] x) => (float[N,7] y) { r = Relu(x) y = MatMul(r, k) }", k=np.zeros((3, 7), np.float32))
    )
    assert input_specs(product)[0].shape == (None, 3)
    assert chosen(product).sizes == {"x": (1, 3)}


def test_a_length_that_rests_on_nothing_grows_until_a_run_says_something(tmp_path: Path) -> None:
    body = "(float[N,L,8] x) => (float[a,b,c] y) { h = MatMul(x, k) y = Sigmoid(h) }"
    model = parse(body, k=np.zeros((8, 8), np.float32))
    assert chosen(model).sizes == {"x": (1, 128, 8)}, "by its name"
    anonymous = parse(body.replace("[N,L,8]", "[?,?,8]"), k=np.zeros((8, 8), np.float32))
    assert chosen(anonymous).sizes == {"x": (1, 64, 8)}
    grown = chosen(anonymous, tmp_path)
    assert grown.sizes["x"][1] in (256, 1024, 4096, 16_384)
    assert "grown until a run takes some milliseconds" in "; ".join(grown.why)
    bounded = parse("(float[?,?,8] x) => (float[a,b,c] y) { y = Add(x, t) }", t=np.zeros((100, 8), np.float32))
    assert chosen(bounded, tmp_path).sizes == {"x": (1, 100, 8)}, "as long as its table"


def test_a_detector_of_speech_that_takes_one_window(tmp_path: Path) -> None:
    """Silero VAD takes 512 samples. With more, it has several windows and squeezes an axis that is not 1."""
    kernel = np.ones((4, 1, 512), np.float32)
    found = chosen(
        parse(
            """(float[batch,sequence] input) => (float[M,4] y) {
            signal = Unsqueeze(input, one) windows = Conv<strides=[512]>(signal, w) y = Squeeze(windows, two) }""",
            w=kernel, one=np.array([1]), two=np.array([2]),
        ),
        tmp_path,
    )  # fmt: skip
    assert found.sizes == {"input": (1, 512)}


def test_a_letter_behind_the_batch_is_no_batch() -> None:
    model = parse("(float[B,N,3] x) => (float[a] y) { y = MatMul(x, k) }", k=np.zeros((3, 512), np.float32))
    assert chosen(model).sizes == {"x": (1, 64, 3)}


def test_names_that_are_computed_from_others() -> None:
    """torch writes 2*s1 where it found out."""
    model = image("[s0,3,s1,wide]")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "2*s1"
    assert chosen(model).sizes == {"x": (1, 3, 224, 448)}
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "s9 // 0"
    assert chosen(model).sizes == {"x": (1, 3, 224, 224)}, "of what nobody knows"


def test_an_input_called_name_is_no_name() -> None:
    model = parse("(float[?,3,?,?] name) => (float[a,b,c,d] y) { y = Relu(name) }")
    assert "axis 2 of 'name' is 224 and axis 3 of 'name' is 224, by their place in 'name'" in chosen(model).why


def test_metadata_are_read_however_they_are_written() -> None:
    model = image()
    for text, sizes in (
        ("[320, 256]", (320, 256)),
        ("(3, 224, 192)", (224, 192)),
        ("320x256", (320, 256)),
        ("96", (96, 96)),
    ):
        onnx.helper.set_model_props(model, {"input_size": text})
        assert Metadata(model).image() == (sizes, "input_size")
    onnx.helper.set_model_props(model, {"p": '{"size": {"height": 30, "width": 40}}'})
    assert Metadata(model).image() == ((30, 40), "size")
    onnx.helper.set_model_props(
        model, {"size": "large", "imgsz": "[1e9]", "stride": "true", "batch": "-1", "height": "[[", "width": "7"}
    )
    said = Metadata(model)
    assert said.image() is None
    assert said.number(("batch",)) is None
    assert chosen(model).sizes == {"x": (1, 3, 224, 224)}


def test_indices_stay_inside_their_table(tmp_path: Path) -> None:
    """Any row of a table, since a wrong row must be seen."""
    specs = input_specs(encoder())
    feeds = draw_feeds(specs, dict.fromkeys(("ids", "kinds", "mask"), (4, 500)))
    assert 900 < feeds["ids"].max() <= 999
    assert set(feeds["kinds"].reshape(-1)) == {0, 1}
    assert not np.any(draw_feeds(specs, dict.fromkeys(("ids", "kinds", "mask"), (4, 5)), "zeros")["ids"])
    small = InputSpec("i", np.dtype(np.uint8), (None,), largest=70_000)
    assert draw_feeds([small], {"i": (1000,)})["i"].max() > 250
    shorter = parse(
        "(int64[N] i) => (float[a,b] y) { p = Gather(t, i) q = GatherElements(u, i) y = Add(p, q) }",
        t=np.zeros(9, np.float32), u=np.zeros(5, np.float32),
    )  # fmt: skip
    assert input_specs(shorter)[0].largest == 4


def test_the_footprint_is_what_is_alive_at_once() -> None:
    """x, and two tensors like it at a time: the first is freed before the third is made, and a view is none."""
    model = parse(
        "(float[10,100] x) => (float[a,b] y) { p = Relu(x) q = Relu(p) v = Reshape(q, s) r = Neg(v) y = Sigmoid(r) }",
        s=np.array([100, 10]),
    )
    assert estimate_footprint(model, infer(model)).bytes == 2 * 4000
    both = parse("(float[10,100] x) => (float[a,b] y) { p = Relu(x) q = Relu(p) r = Neg(q) y = Add(r, p) }")
    assert estimate_footprint(both, infer(both)).bytes == 4 * 4000 - 4000
    product = parse("(float[2,5,7] x) => (float[a] y) { y = MatMul(x, k) }", k=np.zeros((7, 3), np.float32))
    assert estimate_footprint(product, infer(product)).macs == 2 * 5 * 7 * 3
    conv = image("[1,3,32,32]")
    assert estimate_footprint(conv, infer(conv)).macs == 8 * 8 * 8 * 3 * 4 * 4


def test_attention_is_made_small_before_it_runs() -> None:
    model = attention()
    found = chosen(model)
    assert found.bytes <= 1 << 30
    assert estimate_footprint(model, infer(model, {"x": (1, 3, 224, 224)})).bytes > 9 << 30
    side = found.sizes["x"][2]
    assert side == found.sizes["x"][3]
    assert found.bytes >= 2 * 4 * side**4
    assert any("made smaller, since activations would take" in why for why in found.why)


def test_a_second_round_differs_and_fits(tmp_path: Path) -> None:
    for name in ("Ultralytics", "waveform of one channel", "tokens, a segment and a mask", "key-value cache by name"):
        model = CASES[name].build()
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        first, second = choose_rounds(input_specs(model), model, tmp_path / "m.onnx")
        assert first.sizes == CASES[name].sizes
        opened = [
            (a, b)
            for n in first.sizes
            for a, b, d in zip(
                first.sizes[n], second.sizes[n], {s.name: s.shape for s in input_specs(model)}[n], strict=True
            )
            if not isinstance(d, int)
        ]
        assert all(a != b for a, b in opened)
        assert sum(map(math.prod, second.sizes.values())) <= 4 * sum(map(math.prod, first.sizes.values()))


def test_a_run_that_takes_too_long_is_stopped_and_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwopt.running import size_trials, time_limit

    tried = []
    real = time_limit.time_run

    def slow(session: object, feeds: dict[str, np.ndarray], limit: float) -> float:
        tried.append(feeds["x"].shape)
        if feeds["x"].shape[-1] > 100:
            raise time_limit.TooSlowError("a run takes longer than 4 seconds")
        return real(session, feeds, limit)

    monkeypatch.setattr(size_trials, "time_run", slow)
    found = chosen(image(), tmp_path)
    assert found.sizes == {"x": (1, 3, 96, 96)}
    assert [shape[-1] for shape in tried] == [224, 160, 96]
    assert found.why[-1] == "made smaller, since a run took too long"


def test_onnxruntime_is_told_to_stop(tmp_path: Path) -> None:
    from pwopt.running.session import Session
    from pwopt.running.time_limit import TooSlowError, time_run

    products = " ".join(f"h{i} = MatMul(h{i - 1}, h0)" for i in range(1, 400))
    model = parse(f"(float[1500,1500] x) => (float[a,b] y) {{ h0 = Relu(x) {products} y = Relu(h399) }}")
    (tmp_path / "long.onnx").write_bytes(model.SerializeToString())
    session = Session(tmp_path / "long.onnx", optimise=False)
    with pytest.raises(TooSlowError, match="longer than"):
        time_run(session, {"x": np.zeros((1500, 1500), np.float32)}, 0.2)


def test_what_is_tried_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(image().SerializeToString())
    told: list[str] = []
    choose_sizes(input_specs(image()), image(), tmp_path / "m.onnx", progress=lambda stage, _: told.append(stage))
    assert told == ["trying x 1×3×224×224"]
    for declared, sizes in (("[b,t]", (1, 16_000)), ("[?,2,?]", (1, 2, 16_000))):
        model = (
            waveform(declared)
            if "2" not in declared
            else parse(f"(float{declared} x) => (float[a] y) {{ y = Conv(x, k) }}", k=np.zeros((4, 2, 9), np.float32))
        )
        assert chosen(model).sizes == {"x": sizes}
