"""Plug-in execution providers: how they are found, registered and selected. The last tests need onnxruntime-ep-openvino."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, parse

from pwopt.cli import main
from pwopt.errors import ProviderError, UsageError
from pwopt.running import doctor, installation, provider_libraries
from pwopt.running.provider_libraries import ProviderLibrary
from pwopt.running.providers import Provider, find_plugin
from pwopt.running.session import Session, find_fallbacks
from pwopt.selecting import tuning_cache

OPENVINO, RTX = "OpenVINOExecutionProvider", "NvTensorRTRTXExecutionProvider"
WHEEL = """
def get_library_path(): return {path!r}
def get_ep_name(): return "ToyProvider"
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_libraries, "_REGISTERED", set())


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plug-in wheel named onnxruntime-ep-toy-chip; returns its library."""
    library, module = tmp_path / "libtoy.so", tmp_path / "site" / "onnxruntime_ep_toy_chip"
    module.mkdir(parents=True)
    library.write_bytes(b"")
    (module / "__init__.py").write_text(WHEEL.format(path=str(library)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.delitem(sys.modules, module.name, raising=False)
    return library


def device(provider: str, kind: str, **data: str) -> Any:
    hardware = SimpleNamespace(type=SimpleNamespace(name=kind), vendor="ACME", vendor_id=1, device_id=2, metadata={})
    return SimpleNamespace(ep_name=provider, device=hardware, ep_metadata=data)


class Runtime:
    """onnxruntime with some devices, which registering a library adds."""

    __version__ = "1.32.0"

    def __init__(self, *added: Any) -> None:
        self.devices, self.added = [device("CPUExecutionProvider", "CPU")], added
        self.registered: list[str] = []

    def get_ep_devices(self) -> list[Any]:
        return self.devices

    def register_execution_provider_library(self, _name: str, path: str) -> None:
        self.registered.append(path)
        self.devices = [*self.devices, *self.added]


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("webgpu", "WebGpuExecutionProvider", {}),
        ("tensorrt-rtx:1", RTX, {"device_id": "1"}),
        ("Toy_EP:NPU,library=/a/lib.so,k=v", "Toy_EP", {"device_id": "NPU", "k": "v"}),
    ],
)
def test_a_plug_in_provider_as_text(text: str, name: str, options: dict[str, str]) -> None:
    parsed = Provider.parse(text)
    assert (parsed.name, dict(parsed.options)) == (name, options)
    assert parsed.library == ("/a/lib.so" if "library" in text else "")
    assert parsed.with_options({"x": "y"}).library == parsed.library
    assert Provider.parse(parsed.text) == parsed


def test_the_kind_of_a_plug_in_provider() -> None:
    kinds = {name: Provider.parse(name).kind for name in ("openvino", "webgpu", "tensorrt-rtx")}
    assert kinds == {"openvino": "other", "webgpu": "gpu", "tensorrt-rtx": "gpu"}
    with pytest.raises(UsageError, match="the device 'one' of NvTensorRTRTXExecutionProvider is not a number"):
        Provider.parse("tensorrt-rtx:one")


def test_an_installed_wheel_is_found(wheel: Path) -> None:
    assert "onnxruntime_ep_toy_chip" in provider_libraries.find_modules()
    assert Provider.parse("toy-chip").name == "ToyProvider"
    library = find_plugin(Provider.parse("toy-chip"))
    assert library == ProviderLibrary(str(wheel), ("ToyProvider",), "onnxruntime-ep-toy-chip")
    with pytest.raises(ProviderError, match=r"'toy' is not an execution provider; there are cpu, .*, toy-chip"):
        Provider.parse("toy")


def test_a_damaged_wheel(wheel: Path) -> None:
    (wheel.parent / "site" / "onnxruntime_ep_toy_chip" / "__init__.py").write_text("", encoding="utf-8")
    with pytest.raises(ProviderError, match=r"wheel onnxruntime-ep-toy-chip does not name its library \(AttributeErr"):
        Provider.parse("toy-chip")


def test_a_library_is_registered_once() -> None:
    chip = device("Toy", "NPU")
    ort, library = Runtime(chip), ProviderLibrary("/lib.so", ("Toy",))
    for _ in range(2):
        assert provider_libraries.find_device(ort, library, "Toy", "") is chip
    assert ort.registered == ["/lib.so"]
    mine = Runtime()
    mine.devices.append(chip)  # the program has registered another copy itself
    assert provider_libraries.find_device(mine, ProviderLibrary("/other.so", ("Toy",)), "Toy", "") is chip
    assert mine.registered == []


@pytest.mark.parametrize(("wanted", "index"), [("", 0), ("0", 0), ("1", 1), ("GPU", 1), ("gpu", 1), ("GPU.1", 2)])
def test_a_device_is_selected(wanted: str, index: int) -> None:
    found = [
        device(OPENVINO, "CPU"),
        device(OPENVINO, "GPU", ov_device="GPU.0"),
        device(OPENVINO, "GPU", ov_device="GPU.1"),
    ]
    ort, library = Runtime(*found), ProviderLibrary("/lib.so", (OPENVINO,), "onnxruntime-ep-openvino 1.8")
    assert provider_libraries.find_device(ort, library, OPENVINO, wanted) is found[index]


@pytest.mark.parametrize("wanted", ["3", "NPU"])
def test_a_missing_device_is_an_error(wanted: str) -> None:
    found = [device(OPENVINO, "CPU", FULL_DEVICE_NAME="Xeon"), device(OPENVINO, "GPU")]
    with pytest.raises(ProviderError) as raised:
        provider_libraries.find_device(Runtime(*found), ProviderLibrary("/lib.so", (OPENVINO,)), OPENVINO, wanted)
    assert str(raised.value) == f"{OPENVINO} has no device {wanted!r}; it has 0: CPU (Xeon), 1: GPU (ACME)"


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (ProviderLibrary("/lib.so", (OPENVINO,), "onnxruntime-ep-openvino 1.8"),
         f"{OPENVINO} finds no device on this machine (onnxruntime-ep-openvino 1.8); it supports Intel's processors, graphics cards and NPUs"),
        (ProviderLibrary("/lib.so"), f"/lib.so provides no device for {OPENVINO}; the providers with devices are CPUExecutionProvider"),
    ],
)  # fmt: skip
def test_a_library_without_devices_is_an_error(library: ProviderLibrary, message: str) -> None:
    with pytest.raises(ProviderError) as raised:
        provider_libraries.find_device(Runtime(), library, OPENVINO, "")
    assert str(raised.value) == message


def test_an_onnxruntime_without_plug_ins_is_an_error() -> None:
    old: Any = SimpleNamespace(__version__="1.22.0")
    with pytest.raises(ProviderError, match=r"onnxruntime 1.22.0 cannot load /lib.so; pip install 'onnxruntime>=1.23'"):
        provider_libraries.register(old, ProviderLibrary("/lib.so"))


def test_what_a_plug_in_session_is_given() -> None:
    given = Provider.parse("openvino:GPU,cache_dir=/c").plugin_options(2, tf32=False)
    assert given == {
        "load_config": '{"CPU": {"INFERENCE_NUM_THREADS": "2", "INFERENCE_PRECISION_HINT": "f32"}}', "cache_dir": "/c",
    }  # fmt: skip
    assert "PRECISION" not in Provider.parse("openvino").plugin_options(2, tf32=True)["load_config"]
    assert Provider.parse("openvino,load_config={}").plugin_options(1, tf32=False) == {"load_config": "{}"}
    assert Provider.parse("tensorrt-rtx:0,k=v").plugin_options(1, tf32=False) == {"k": "v"}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--provider", "nonsense"], "'nonsense' is not an execution provider; there are cpu, cuda", 4),
        (
            ["--provider", "Toy", "--provider-library", "/nowhere/lib.so"],
            "'/nowhere/lib.so' does not exist; give the",
            4,
        ),
        (["--provider", "Toy", "--provider-library", __file__], "test_provider_libraries.py: [ONNXRuntimeError]", 4),
        (["--provider-library", "/lib.so"], "--provider-library needs the name of a provider in that library", 2),
        (["--provider", "Toy", "--provider-library", "/a,b.so"], "the path '/a,b.so' contains a comma", 2),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    if not hasattr(ort, "register_execution_provider_library"):
        pytest.skip("this onnxruntime has no plug-in providers")
    with pytest.raises(SystemExit) as stopped:
        main(["optimize", "-q", str(MODELS / "fcn.onnx"), "-o", str(tmp_path / "o.onnx"), *arguments])
    assert stopped.value.code == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "o.onnx").exists()


def test_a_provider_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(provider_libraries, "find_modules", list)
    with pytest.raises(
        ProviderError, match=r"WebGpuExecutionProvider is not in this .*; pip install onnxruntime-ep-webgpu"
    ):
        Session(MODELS / "fcn.onnx", Provider.parse("webgpu"))
    (found,) = doctor._check_libraries()
    assert (found.ok, found.detail) == (None, "no wheel named onnxruntime-ep-… is installed")


# With the wheel, on hardware that it supports: `nox -s plugins`.


@pytest.fixture
def openvino() -> Provider:
    pytest.importorskip("onnxruntime_ep_openvino", reason="onnxruntime-ep-openvino is not installed")
    provider = Provider.parse("openvino")
    library = find_plugin(provider)
    assert library is not None
    if not provider_libraries.list_devices(installation.import_onnxruntime(), library):
        pytest.skip("onnxruntime-ep-openvino supports no device of this machine")
    return provider


def test_doctor_lists_the_library(openvino: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--provider", openvino.text])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert f"devices: {OPENVINO} on CPU" in " ".join(listed.split())
    assert "ok  openvino: starts, and runs a model" in listed


def test_sessions_run_on_the_plug_in(openvino: Provider, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parse("(float[2,4] x) => (float[2,4] y) { h = Relu(x) y = Neg(h) }"), path)
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    for _ in range(2):  # onnxruntime then lists the provider as if it were built in
        session = Session(path, openvino)
        assert session.session.get_providers()[0] == OPENVINO
        assert np.array_equal(session.run({"x": x})[0], -np.maximum(x, 0))
    assert find_fallbacks(path, openvino, 1, {"x": x}) == {}
    assert "onnxruntime-ep-openvino" in tuning_cache.describe_place(openvino, 1)
    with pytest.raises(ProviderError, match=f"{OPENVINO} has no device '7'; it has 0: "):
        Session(path, Provider.parse("openvino:7"))


def test_optimize_on_the_plug_in(openvino: Provider, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    with pytest.raises(SystemExit) as stopped:
        main(["optimize", str(MODELS / "linear_sequence.onnx"), "-o", str(out), "--provider", openvino.text,
              "--threads", "1", "--budget", "2", "--no-cache"])  # fmt: skip
    assert stopped.value.code == 0
    assert out.exists()
    assert "latency (openvino, 1 thread)" in " ".join(capsys.readouterr().out.split())
