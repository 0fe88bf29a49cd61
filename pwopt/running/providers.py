"""Execution providers: what they are called, which options they take, and why one does not start here."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from pwopt.errors import ProviderError, UsageError

#: Short names of execution providers; any other is taken literally.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "rocm": "ROCMExecutionProvider",
}
CPU, CUDA, TENSORRT = PROVIDERS["cpu"], PROVIDERS["cuda"], PROVIDERS["tensorrt"]
#: What to install when a provider is missing.
WHEELS = {CPU: "pwopt[cpu]", CUDA: "pwopt[gpu]", TENSORRT: "pwopt[gpu]", PROVIDERS["openvino"]: "onnxruntime-openvino"}
#: Providers on NVIDIA's cards, each with the library in onnxruntime's wheel that it lies in.
NVIDIA = {CUDA: "onnxruntime_providers_cuda", TENSORRT: "onnxruntime_providers_tensorrt"}
#: Providers on any graphics card.
GPUS = (*NVIDIA, PROVIDERS["dml"], PROVIDERS["rocm"])
#: The option by which each is told its device, the number or name after a colon.
DEVICE_OPTION = dict.fromkeys(GPUS, "device_id") | {PROVIDERS["openvino"]: "device_type"}
#: What onnxruntime says when memory on a device runs out (BFCArena, CUDA error 2, cuDNN, cuBLAS).
EXHAUSTED = (
    "out of memory",
    "failed to allocate memory",
    "cudaerrormemoryallocation",
    "cuda failure 2",
    "alloc_failed",
)


@dataclass(frozen=True)
class Provider:
    """Where models run.

    Attributes
    ----------
    name : str
        onnxruntime's name of it.
    options : tuple of (str, str)
        As onnxruntime documents them for this provider; a device among them.
    text : str
        As the user wrote it, for reports.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Provider:
        """``NAME[:DEVICE][,KEY=VALUE…]``, such as ``cuda``, ``cuda:1`` or ``cuda:1,prefer_nhwc=1``.

        Raises
        ------
        ProviderError
            If there is no such provider.
        UsageError
            If it is of another form, or names a device of a provider that has none.
        """
        head, *pairs = text.split(",")
        short, colon, device = head.partition(":")
        name = PROVIDERS.get(short.lower(), short)
        if not name.endswith("ExecutionProvider"):
            raise ProviderError(f"{short!r} is not an execution provider; there are {', '.join(PROVIDERS)}")
        options: dict[str, str] = {}
        if colon:
            if name not in DEVICE_OPTION or not device:
                raise UsageError(f"{text!r} names no device of {name}; write cuda:0, say, or leave the colon out")
            if name in GPUS and not device.isdecimal():
                raise UsageError(f"the device {device!r} of {name} is not a number; write {short}:0, say")
            options[DEVICE_OPTION[name]] = device
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise UsageError(f"the provider option {pair!r} is not of the form KEY=VALUE")
            options[key] = value
        if options and name == CPU:
            raise UsageError(f"{CPU} takes no options, and {', '.join(options)} was given")
        return cls(name, tuple(options.items()), text)

    def with_options(self, options: Mapping[str, str]) -> Provider:
        """The same with more options; where it has one already, the new value counts."""
        merged = {**dict(self.options), **options}
        return self.parse(",".join((self.name, *(f"{k}={v}" for k, v in merged.items())))) if options else self

    @property
    def device(self) -> int:
        """The number of the card, on a provider that has several."""
        number = dict(self.options).get("device_id", "0")
        return int(number) if number.isdecimal() else 0

    @property
    def memory(self) -> tuple[str, int]:
        """Where its tensors lie, as onnxruntime's bindings name it."""
        return ("cuda", self.device) if self.name in NVIDIA else ("cpu", 0)

    @property
    def kind(self) -> str:
        """What rewrites may pay on it: "cpu" (onnxruntime's own, with its blocked layout), "gpu", or "other"."""
        return "cpu" if self.name == CPU else "gpu" if self.name in GPUS else "other"

    @property
    def captured(self) -> bool:
        """Whether a run is captured once and replayed, from and to the same places in memory."""
        on = ("1", "true")
        return any(key in ("enable_cuda_graph", "trt_cuda_graph_enable") and v.lower() in on for key, v in self.options)

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={value}" for key, value in self.options)))

    def chain(self, tf32: bool) -> list[tuple[str, dict[str, str]]]:
        """What a session is given: this provider with its options, and those that run what it cannot.

        `tf32` says whether CUDA may round float32 products to 10 bits, if no option says so.
        """
        precision = {"use_tf32": str(int(tf32))}
        own = precision if self.name == CUDA else {}
        chain = [(self.name, {**own, **dict(self.options)})]
        if self.name == TENSORRT:
            chain.append((CUDA, {"device_id": str(self.device), **precision}))
        return chain if self.name == CPU else [*chain, (CPU, {})]


#: onnxruntime's own provider, which runs every model.
DEFAULT = Provider(CPU, text="cpu")


def as_provider(provider: str | Provider) -> Provider:
    """What a caller gave, parsed if it is text.

    Raises
    ------
    ProviderError, UsageError
        As `Provider.parse`.
    """
    return Provider.parse(provider) if isinstance(provider, str) else provider


def out_of_memory(message: str) -> bool:
    """Whether onnxruntime's message says that a device has no memory left."""
    return any(sign in message.lower() for sign in EXHAUSTED)


@functools.cache
def preload(ort: ModuleType) -> None:
    """Load CUDA's and cuDNN's libraries from their own wheels, once, before the first session that needs them."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; `obstacles` says it
            ort.preload_dlls()


def obstacles(ort: ModuleType, provider: Provider) -> Iterator[str]:
    """Why a provider on NVIDIA's cards does not start here: each thing that is missing, as a clause."""
    library = NVIDIA.get(provider.name)
    if library is None or sys.platform == "darwin":
        return
    yield from _driver_obstacles(provider.device)
    folder, windows = Path(str(ort.__file__)).parent / "capi", sys.platform == "win32"
    named = ("{}.dll" if windows else "lib{}.so").format
    preload(ort)
    try:
        ctypes.CDLL(str(folder / named("onnxruntime_providers_shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / named(library)))
    except OSError as error:
        missing = str(error).partition(": cannot open")[0]
        brings = "its wheels come with pip install 'pwopt[gpu]'" if library == NVIDIA[CUDA] else "install TensorRT"
        yield f"{named(library)} cannot be loaded, since dlopen fails on {missing} ({brings})"


def _driver_obstacles(device: int) -> Iterator[str]:
    """What NVIDIA's driver lacks (CUDA driver API: cuInit, cuDeviceGetCount)."""
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


def cards() -> list[Card]:
    """The cards that NVIDIA's driver knows, in its order, by its own tool; none where there is no driver."""
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


def card(provider: Provider) -> Card | None:
    """The card that a provider runs on; None if it is none of NVIDIA's, or nothing is known of it."""
    found = cards() if provider.name in NVIDIA else []
    return found[provider.device] if provider.device < len(found) else None
