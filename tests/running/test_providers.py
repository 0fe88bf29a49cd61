"""Providers by text, what they are given, and what is said of those that do not start."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, evaluate, normal, ops, parse, run

from pwopt.cli import main
from pwopt.errors import ModelError, ProviderError, UsageError
from pwopt.graph.files import from_proto
from pwopt.maps.cost import Cost
from pwopt.passes import LOWERING, PASSES, FillTensorCores, PadChannels
from pwopt.reporting import notes
from pwopt.reporting.report import Latency, Report
from pwopt.running import doctor, installation, providers
from pwopt.running.providers import Card, Provider
from pwopt.running.session import Session
from pwopt.selecting import tuning_cache
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cpu", CPU, {}),
        ("CUDA", CUDA, {}),
        ("cuda:1", CUDA, {"device_id": "1"}),
        ("cuda:1,prefer_nhwc=1", CUDA, {"device_id": "1", "prefer_nhwc": "1"}),
        ("CUDAExecutionProvider,a=b=c", CUDA, {"a": "b=c"}),
        ("openvino:GPU", "OpenVINOExecutionProvider", {"device_type": "GPU"}),
        ("XnnpackExecutionProvider,k=v", "XnnpackExecutionProvider", {"k": "v"}),
    ],
)
def test_a_provider_as_text(text: str, name: str, options: dict[str, str]) -> None:
    parsed = Provider.parse(text)
    assert (parsed.name, dict(parsed.options)) == (name, options)
    assert str(parsed) == " ".join([name, *(f"{k}={v}" for k, v in options.items())])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gpu", "'gpu' is not an execution provider; there are cpu, cuda"),
        ("cpu:0", "names no device of CPUExecutionProvider"),
        ("cuda:", "names no device of CUDAExecutionProvider"),
        ("cuda:one", "the device 'one' of CUDAExecutionProvider is not a number"),
        ("cuda,fast", "the provider option 'fast' is not of the form KEY=VALUE"),
        ("cpu,a=1", "CPUExecutionProvider takes no options, and a was given"),
    ],
)
def test_what_is_no_provider(text: str, reason: str) -> None:
    with pytest.raises(ProviderError if text == "gpu" else UsageError, match=reason):
        Provider.parse(text)


def test_what_a_session_is_given() -> None:
    assert Provider.parse("cpu").chain(tf32=True) == [(CPU, {})]
    assert Provider.parse("cuda").chain(tf32=False) == [(CUDA, {"use_tf32": "0"}), (CPU, {})]
    asked = Provider.parse("cuda:2,use_tf32=1")
    assert asked.chain(tf32=False)[0] == (CUDA, {"use_tf32": "1", "device_id": "2"})
    engine = Provider.parse("tensorrt:1,trt_fp16_enable=1").chain(tf32=False)
    assert [name for name, _ in engine] == ["TensorrtExecutionProvider", CUDA, CPU]
    assert engine[0][1] == {"device_id": "1", "trt_fp16_enable": "1"}
    assert engine[1][1] == {"device_id": "1", "use_tf32": "0"}


def test_later_options_count() -> None:
    assert Provider.parse("cuda").with_options({}).text == "cuda"
    more = Provider.parse("cuda:1,a=1").with_options({"a": "2", "b": "3"})
    assert more == Provider(CUDA, (("device_id", "1"), ("a", "2"), ("b", "3")))
    assert more == Provider.parse(more.text)


def test_decisions_hold_for_one_card_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        providers, "list_cards", lambda: [Card("H100", "580.1", 1.0, 2.0), Card("T4", "580.1", 1.0, 2.0)]
    )
    plain, other, option = (
        tuning_cache.describe_place(Provider.parse(p), 1) for p in ("cuda", "cuda:1", "cuda,prefer_nhwc=1")
    )
    assert len({plain, other, option}) == 3
    assert "H100, driver 580.1" in plain
    assert "T4" in other
    assert "prefer_nhwc=1" in option
    assert installation.describe_machine(Provider.parse("cuda:1"))["device"] == "T4, driver 580.1"
    assert installation.describe_machine()["device"] is None


class Driver:
    """libcuda.so.1 of a machine with some cards."""

    def __init__(self, cards: int, code: int = 0) -> None:
        self.cards, self.code = cards, code

    def cuInit(self, _flags: int) -> int:  # noqa: N802
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.cards
        return 0


@pytest.mark.parametrize(
    ("driver", "library", "text", "told"),
    [
        (None, "", "cuda", ["dlopen fails on libcuda.so.1 (NVIDIA's driver is not installed"]),
        (Driver(0, 100), "", "cuda", ["NVIDIA's driver finds no device that it can use (cuInit returns 100)"]),
        (Driver(2), "", "cuda:2", ["there is no device 2; this machine has 2, counted from 0"]),
        (Driver(1), "libcudnn.so.9: cannot open shared object file: No such file", "cuda",
         ["libonnxruntime_providers_cuda.so cannot be loaded, since dlopen fails on libcudnn.so.9 (its wheels come"]),
        (Driver(1), "libnvinfer.so.10: cannot open shared object file", "tensorrt",
         ["libonnxruntime_providers_tensorrt.so cannot be loaded, since dlopen fails on libnvinfer.so.10 (install"]),
        (Driver(1), "", "cuda", []),
        (None, "", "openvino", []),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    driver: Driver | None, library: str, text: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, **_: Any) -> Any:
        if name == "libcuda.so.1" and driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        if library and "shared" not in name and name != "libcuda.so.1":
            raise OSError(library)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", opened)
    monkeypatch.setattr(providers.sys, "platform", "linux")
    ort = ModuleType("onnxruntime")
    ort.__file__ = "/site/onnxruntime/__init__.py"
    found = list(providers.find_obstacles(ort, Provider.parse(text)))
    assert len(found) == len(told)
    assert all(f.startswith(t) for f, t in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        (
            "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer",
            ProviderError,
            "ran out of memory",
        ),
        ("CUDA failure 2: out of memory", ProviderError, "give smaller sizes with --shape"),
        ("Got invalid dimensions for input: x", ModelError, "cannot run the model on these inputs"),
    ],
)
def test_no_memory_on_a_card_is_no_fault_of_the_model(
    message: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    session = Session(MODELS / "fcn.onnx")

    def fails(*_: Any) -> None:
        raise RuntimeError(message)

    session.provider = Provider.parse("cuda")
    session.session = SimpleNamespace(run=fails)
    with pytest.raises(kind, match=said):
        session.run({})


def test_what_is_replayed_writes_to_the_same_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx.save(parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"), tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    monkeypatch.setattr(Provider, "captured", True)
    x = normal(2, 4, dtype=np.float32)
    session.bind({"x": x})
    session.step()
    first = session._binding.get_outputs()[0]
    session.step()
    assert session._binding.get_outputs()[0].data_ptr() == first.data_ptr()
    assert np.array_equal(session.run({"x": x})[0], np.maximum(x, 0))


def test_passes_say_where_they_may_pay(tmp_path: Path) -> None:
    model = from_proto(parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))

    def names(kind: str, passes: list[str] | None = None) -> set[str]:
        return {p.name for p in Compilation(model, model, resolve_passes(passes), (), {}, tmp_path, kind).candidates()}

    blocked = {
        "pad-channels",
        "fill-blocks",
        "keep-layout",
        "split-multiplier",
        "winograd",
        "sub-pixel",
        "frames",
        "unroll-frames",
    }
    lowered = {p.name for p in LOWERING} | {"declare-shapes", "fold-interpolation"}
    everything = {p.name for p in PASSES} - {"equalise-channels"}  # by name only
    assert names("cpu") == everything - {"fill-tensor-cores", "name-swish"}
    assert names("other") == everything - lowered - {"fill-tensor-cores", "name-hard-sigmoid"}
    assert names("gpu") == everything - blocked - lowered
    assert names("gpu", ["winograd"]) == {"winograd"}
    assert set(Compilation(model, model, resolve_passes(), (), {}, tmp_path, "gpu").unfit()) == blocked | lowered
    assert Compilation(model, model, resolve_passes(), (), {}, tmp_path, "cpu").unfit() == []


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", [16, 16]), ("float", [12, 12])])
def test_tensor_cores_get_multiples_of_8(dtype: str, wanted: list[int]) -> None:
    kind = np.float16 if dtype == "float16" else np.float32
    model = parse(
        f"({dtype}[N,16,8,8] x) => ({dtype}[N,5,8,8] y) {{ h = Conv(x, w) r = Relu(h) y = Conv(r, v) }}",
        w=normal(12, 16, 1, 1, dtype=kind), v=normal(5, 12, 1, 1, seed=1, dtype=kind),
    )  # fmt: skip
    p = FillTensorCores()
    p.scope = "exact"
    result, _, _ = run(model, p)
    weights = [tuple(t.dims) for t in result.graph.initializer]
    assert [weights[0][0], weights[1][1]] == wanted
    assert ops(result) == {"Conv": 2, "Relu": 1}
    if wanted == [16, 16]:
        x = normal(1, 16, 8, 8, seed=2, dtype=kind)
        before, after = (evaluate(m, x=x)[0] for m in (model, result))
        assert np.array_equal(before, after)
        assert not run(model, FillTensorCores())[1].rewrites


def test_padding_for_blocks_asks_for_other_multiples() -> None:
    assert (PadChannels.multiple, FillTensorCores.multiple) == (4, 8)


@pytest.mark.parametrize(
    ("milliseconds", "provider", "told"), [(0.05, "cuda", True), (0.5, "cuda", False), (0.05, "cpu", False)]
)
def test_what_only_starts_operators_is_told(milliseconds: float, provider: str, told: bool) -> None:
    latency = Latency(1.0, milliseconds, 1.0, (0.9, 1.1), 1.0, milliseconds, 20)
    report = Report("m", None, provider, {}, {}, latency=latency, after=Cost(10, 0, 0, 0))
    found = list(notes.explain_launches(report, Provider.parse(provider).kind))
    assert bool(found) == told
    if told:
        assert found[0].startswith("5.0 µs for each of 10 operators is what it takes to start them")


@pytest.mark.parametrize(
    ("wheels", "ok", "detail", "remedy"),
    [
        ({"onnxruntime": "1.30"}, True, "onnxruntime 1.30", ""),
        ({}, False, "no wheel of it is installed", "pip install onnxruntime, or 'onnxruntime-gpu[cuda,cudnn]' for CUDA"),
        ({"onnxruntime": "1.30", "onnxruntime-gpu": "1.29"}, False,
         "onnxruntime 1.30, onnxruntime-gpu 1.29: they install into one folder, over each other",
         "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime, or 'onnxruntime-gpu[cuda,cudnn]' for CUDA"),
    ],
)  # fmt: skip
def test_wheels_are_told_apart(
    wheels: dict[str, str], ok: bool, detail: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwopt.running.installation.find_wheels", lambda: wheels)
    found = doctor._check_wheels()
    assert (found.ok, found.detail, found.remedy) == (ok, detail, remedy)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--provider", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert found[-1] == {"subject": "cpu", "ok": True, "detail": "starts, and runs a model", "remedy": ""}
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--provider", "tensorrt:3"])
    said = capsys.readouterr().out
    assert stopped.value.code == 4
    assert "no  tensorrt:3: is not in this onnxruntime (it has" in said
    assert "pip uninstall onnxruntime" in said


def test_a_site_that_ends_in_a_letter_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["optimize", "fold-chains:x:b:.onnx"])
    assert "'fold-chains:x:b:.onnx'" in capsys.readouterr().err
