"""Execution providers: their names and options, and why one does not start on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from pwopt.errors import ProviderError, UsageError
from pwopt.running import provider_libraries
from pwopt.running.provider_libraries import MODULES, PREFIX, ProviderLibrary

#: Short name → onnxruntime's name of an execution provider; other names are taken literally.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
CPU, CUDA, TENSORRT = PROVIDERS["cpu"], PROVIDERS["cuda"], PROVIDERS["tensorrt"]
OPENVINO, RTX = PROVIDERS["openvino"], PROVIDERS["tensorrt-rtx"]
#: The package to install instead of this onnxruntime when a provider is missing.
WHEELS = {CPU: "onnxruntime", CUDA: "onnxruntime-gpu[cuda,cudnn]", TENSORRT: "onnxruntime-gpu[cuda,cudnn]"}
#: Providers for NVIDIA's cards, each with its library in onnxruntime's wheel.
NVIDIA = {CUDA: "onnxruntime_providers_cuda", TENSORRT: "onnxruntime_providers_tensorrt"}
#: Providers for any graphics card.
GPUS = (*NVIDIA, PROVIDERS["dml"], PROVIDERS["rocm"], PROVIDERS["webgpu"], RTX)
#: The option of each that holds the device, which the user gives after a colon.
DEVICE_OPTION = dict.fromkeys(GPUS, "device_id") | {OPENVINO: "device_type"}
#: The key in a provider's text that names the file of its library.
LIBRARY = "library"
#: Parts of onnxruntime's messages when a device runs out of memory (BFCArena, CUDA error 2, cuDNN, cuBLAS).
EXHAUSTED = (
    "out of memory",
    "failed to allocate memory",
    "cudaerrormemoryallocation",
    "cuda failure 2",
    "alloc_failed",
)


@dataclass(frozen=True)
class Provider:
    """An execution provider of onnxruntime, with its options.

    Attributes
    ----------
    name : str
        onnxruntime's name.
    options : tuple of (str, str)
        As onnxruntime documents them for this provider, including the device.
    library : str
        The file of a plug-in provider's library, if the user named it; otherwise "".
    text : str
        As the user wrote it, for reports.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    library: str = ""
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Provider:
        """Parse ``NAME[:DEVICE][,KEY=VALUE…]``, such as ``cuda``, ``cuda:1`` or ``cuda:1,prefer_nhwc=1``.

        The key `library` names the file of a plug-in provider's library. NAME is then the provider's own name.

        Raises
        ------
        ProviderError
            If there is no such provider.
        UsageError
            If the text has another form, or names a device of a provider that has none.
        """
        head, *pairs = text.split(",")
        given = dict(map(_parse_pair, pairs))
        library = given.pop(LIBRARY, "")
        short, colon, device = head.partition(":")
        name = _find_name(short, library)
        options: dict[str, str] = {}
        if colon:
            key = DEVICE_OPTION.get(name, "" if name in PROVIDERS.values() else "device_id")
            if not key or not device:
                raise UsageError(f"{text!r} names no device of {name}; write cuda:0, say, or leave the colon out")
            if name in GPUS and not device.isdecimal():
                raise UsageError(f"the device {device!r} of {name} is not a number; write {short}:0, say")
            options[key] = device
        options |= given
        if options and name == CPU:
            raise UsageError(f"{CPU} takes no options, and {', '.join(options)} was given")
        return cls(name, tuple(options.items()), library, text)

    def with_options(self, options: Mapping[str, str]) -> Provider:
        """Add options; a new value replaces an old one."""
        own = {LIBRARY: self.library} if self.library else {}
        merged = {**dict(self.options), **own, **options}
        return self.parse(",".join((self.name, *(f"{k}={v}" for k, v in merged.items())))) if options else self

    @property
    def device(self) -> int:
        """The number of the card; 0 unless the options say otherwise."""
        number = dict(self.options).get("device_id", "0")
        return int(number) if number.isdecimal() else 0

    @property
    def memory(self) -> tuple[str, int]:
        """The device of its tensors, as onnxruntime's bindings name it."""
        return ("cuda", self.device) if self.name in NVIDIA else ("cpu", 0)

    @property
    def kind(self) -> str:
        """The kind of provider, for passes that pay on some kinds only: "cpu" (onnxruntime's own), "gpu" or "other"."""
        return "cpu" if self.name == CPU else "gpu" if self.name in GPUS else "other"

    @property
    def wanted_device(self) -> str:
        """The device as the user named it; "" for the provider's default."""
        return dict(self.options).get(DEVICE_OPTION.get(self.name, "device_id"), "")

    def plugin_options(self, threads: int, tf32: bool) -> dict[str, str]:
        """Return the options of a session on this provider as a plug-in, where the device is no option.

        `tf32` says whether the provider may round float32 products, unless an option does. OpenVINO rounds them to
        bfloat16 by default where the processor can, and does not read the number of threads from the session.
        """
        own = {"INFERENCE_NUM_THREADS": str(threads), **({} if tf32 else {"INFERENCE_PRECISION_HINT": "f32"})}
        config = {"load_config": json.dumps({"CPU": own})} if self.name == OPENVINO else {}
        device = DEVICE_OPTION.get(self.name, "device_id")
        return {**config, **{key: value for key, value in self.options if key != device}}

    @property
    def captured(self) -> bool:
        """Whether a run is captured once as a graph and replayed, with inputs and outputs at fixed addresses."""
        on = ("1", "true")
        return any(key in ("enable_cuda_graph", "trt_cuda_graph_enable") and v.lower() in on for key, v in self.options)

    def __str__(self) -> str:
        library = (f"{LIBRARY}={self.library}",) if self.library else ()
        return " ".join((self.name, *(f"{key}={value}" for key, value in self.options), *library))

    def chain(self, tf32: bool) -> list[tuple[str, dict[str, str]]]:
        """List the providers of a session: this one with its options, then those for operators that it lacks.

        `tf32` says whether CUDA may round float32 products to 10 bits, unless an option does.
        """
        precision = {"use_tf32": str(int(tf32))}
        own = precision if self.name == CUDA else {}
        chain = [(self.name, {**own, **dict(self.options)})]
        if self.name == TENSORRT:
            chain.append((CUDA, {"device_id": str(self.device), **precision}))
        return chain if self.name == CPU else [*chain, (CPU, {})]


def _parse_pair(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise UsageError(f"the provider option {pair!r} is not of the form KEY=VALUE")
    return key, value


def _find_name(short: str, library: str) -> str:
    """Find onnxruntime's name of a provider: from the table, from an installed plug-in wheel, or as it was given."""
    if short.lower() in PROVIDERS:
        return PROVIDERS[short.lower()]
    if library or short.endswith("ExecutionProvider"):
        return short
    installed = provider_libraries.find_modules()
    module = PREFIX + short.lower().replace("-", "_")
    if module in installed:
        return provider_libraries.open_module(module).providers[0]
    others = (m.removeprefix(PREFIX).replace("_", "-") for m in installed if m not in MODULES.values())
    raise ProviderError(f"{short!r} is not an execution provider; there are {', '.join([*PROVIDERS, *others])}")


#: onnxruntime's own provider, which runs every model.
DEFAULT = Provider(CPU, text="cpu")


def as_provider(provider: str | Provider) -> Provider:
    """Parse a provider if it is given as text.

    Raises
    ------
    ProviderError, UsageError
        As `Provider.parse`.
    """
    return Provider.parse(provider) if isinstance(provider, str) else provider


def is_out_of_memory(message: str) -> bool:
    """Whether onnxruntime's message says that a device has no memory left."""
    return any(sign in message.lower() for sign in EXHAUSTED)


@functools.cache
def preload(ort: ModuleType) -> None:
    """Load CUDA's and cuDNN's libraries from their wheels, once, before the first session that needs them."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; `find_obstacles` reports that
            ort.preload_dlls()


def find_plugin(provider: Provider) -> ProviderLibrary | None:
    """Find the library of a provider; None if the provider is built into onnxruntime, or is missing.

    An installed wheel takes precedence over a provider of the same name in onnxruntime. (The list of onnxruntime's
    providers does not tell which are built in: it also contains those of registered libraries.)

    Raises
    ------
    ProviderError
        As `provider_libraries.find_library`.
    """
    return provider_libraries.find_library(provider.name, provider.library)


def find_obstacles(ort: ModuleType, provider: Provider) -> Iterator[str]:
    """Find out why a provider for NVIDIA's cards does not start: one clause for each missing thing."""
    library = NVIDIA.get(provider.name)
    if library is None or sys.platform == "darwin":
        return
    yield from _find_driver_obstacles(provider.device)
    folder, windows = Path(str(ort.__file__)).parent / "capi", sys.platform == "win32"
    named = ("{}.dll" if windows else "lib{}.so").format
    preload(ort)
    try:
        ctypes.CDLL(str(folder / named("onnxruntime_providers_shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / named(library)))
    except OSError as error:
        missing = str(error).partition(": cannot open")[0]
        wheels = f"its wheels come with pip install '{WHEELS[CUDA]}'"
        brings = wheels if library == NVIDIA[CUDA] else "install TensorRT"
        yield f"{named(library)} cannot be loaded, since dlopen fails on {missing} ({brings})"


def _find_driver_obstacles(device: int) -> Iterator[str]:
    """Check NVIDIA's driver (CUDA driver API: cuInit, cuDeviceGetCount)."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        yield f"dlopen fails on {name} (NVIDIA's driver is not installed, or the container does not see it)"
        return
    code, count = driver.cuInit(0), ctypes.c_int()
    if code or driver.cuDeviceGetCount(ctypes.byref(count)):
        yield f"NVIDIA's driver finds no device that it can use (cuInit returns {code})"
    elif device >= count.value:
        yield f"there is no device {device}; this machine has {count.value}, counted from 0"


@dataclass(frozen=True)
class Card:
    """An NVIDIA card: its name, its driver, and its memory in MiB."""

    name: str
    driver: str
    used: float
    total: float


def list_cards() -> list[Card]:
    """List NVIDIA's cards in the driver's order, by nvidia-smi; none without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=name,driver_version,memory.used,memory.total"
    done = subprocess.run([tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False)
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, driver, used, total = (part.strip() for part in line.split(","))
        found.append(Card(name, driver, _number(used), _number(total)))
    return found


def _number(text: str) -> float:
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0


def find_card(provider: Provider) -> Card | None:
    """Find the card of a provider; None if it is not NVIDIA's, or is unknown."""
    found = list_cards() if provider.name in NVIDIA else []
    return found[provider.device] if provider.device < len(found) else None
