"""Libraries with plug-in execution providers: found in wheels named ``onnxruntime-ep-…``, or given as a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from pwopt.errors import ProviderError, summarize

#: How the modules of plug-in wheels begin; each has `get_library_path`, and `get_ep_names` or `get_ep_name`.
PREFIX = "onnxruntime_ep_"
#: Provider → the module of its wheel, for the wheels known to pwopt.
MODULES = {
    "OpenVINOExecutionProvider": f"{PREFIX}openvino",
    "WebGpuExecutionProvider": f"{PREFIX}webgpu",
    "NvTensorRTRTXExecutionProvider": f"{PREFIX}nv_tensorrt_rtx",
}
#: The hardware that the known providers support, for the message that there is none.
HARDWARE = {
    "OpenVINOExecutionProvider": "Intel's processors, graphics cards and NPUs",
    "WebGpuExecutionProvider": "graphics cards with a driver for Vulkan, Metal or Direct3D 12",
    "NvTensorRTRTXExecutionProvider": "NVIDIA's RTX cards",
}
#: The oldest onnxruntime that loads such libraries from Python.
OLDEST = "1.23"
#: Libraries that this process has registered; onnxruntime refuses to register one twice.
_REGISTERED: set[str] = set()


@dataclass(frozen=True)
class ProviderLibrary:
    """A library with plug-in execution providers.

    Attributes
    ----------
    path : str
    providers : tuple of str
        onnxruntime's names of its providers; empty if only the library knows.
    package : str
        The wheel and its version; "" for a library given as a file.
    """

    path: str
    providers: tuple[str, ...] = ()
    package: str = ""

    def __str__(self) -> str:
        return self.package or self.path


def find_modules() -> list[str]:
    """List the modules of installed plug-in wheels, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules() if module.name.startswith(PREFIX))


def wheel_of(module: str) -> str:
    """The name of the wheel that contains a module."""
    return module.replace("_", "-")


def open_module(module: str) -> ProviderLibrary:
    """Ask the module of a plug-in wheel for its library and its providers.

    Raises
    ------
    ProviderError
        If the wheel is damaged.
    """
    try:
        found: Any = importlib.import_module(module)
        names = found.get_ep_names() if hasattr(found, "get_ep_names") else [found.get_ep_name()]
        path = str(found.get_library_path())
    except Exception as error:
        raise ProviderError(
            f"the wheel {wheel_of(module)} does not name its library ({summarize(error)}); install it again"
        ) from error
    return ProviderLibrary(path, tuple(names), f"{wheel_of(module)} {_find_version(module)}".strip())


def _find_version(module: str) -> str:
    """Find the version of a module's wheel; several variants of a wheel may contain one module."""
    for name in metadata.packages_distributions().get(module, ()):
        return metadata.version(name)
    return ""


def find_library(provider: str, path: str = "") -> ProviderLibrary | None:
    """Find the library of a provider.

    Parameters
    ----------
    provider : str
        onnxruntime's name.
    path : str
        The file, if the user named it; otherwise the installed wheels are searched.

    Raises
    ------
    ProviderError
        If the file does not exist, or a wheel is damaged.
    """
    if path:
        if not Path(path).is_file():
            raise ProviderError(f"the provider library {path!r} does not exist; give the path of an existing file")
        return ProviderLibrary(str(Path(path).resolve()))
    if provider == "CPUExecutionProvider":
        return None
    installed = find_modules()
    known = MODULES.get(provider)
    if known is not None:
        return open_module(known) if known in installed else None
    others = (open_module(module) for module in installed if module not in MODULES.values())
    return next((library for library in others if provider in library.providers), None)


def register(ort: ModuleType, library: ProviderLibrary) -> None:
    """Register a library with onnxruntime, once per process.

    Raises
    ------
    ProviderError
        If onnxruntime is too old, or cannot load the library.
    """
    if library.path in _REGISTERED:
        return
    if not hasattr(ort, "register_execution_provider_library"):
        raise ProviderError(f"onnxruntime {ort.__version__} cannot load {library}; pip install 'onnxruntime>={OLDEST}'")
    taken = {device.ep_name for device in ort.get_ep_devices()}
    if not (library.providers and taken.issuperset(library.providers)):  # the program may have registered it itself
        try:
            ort.register_execution_provider_library(f"pwopt {library.path}", library.path)
        except Exception as error:
            reason = summarize(error).partition(": ")[2]
            raise ProviderError(f"onnxruntime {ort.__version__} cannot load {library}: {reason}") from error
    _REGISTERED.add(library.path)


def list_devices(ort: ModuleType, library: ProviderLibrary) -> list[Any]:
    """List the devices (``OrtEpDevice``) of all providers in a library.

    Raises
    ------
    ProviderError
        As `register`.
    """
    before = {id_of(device) for device in ort.get_ep_devices()} if not library.providers else set()
    register(ort, library)
    if library.providers:
        return [device for device in ort.get_ep_devices() if device.ep_name in library.providers]
    return [device for device in ort.get_ep_devices() if id_of(device) not in before]


def id_of(device: Any) -> tuple[str, str, int, int]:
    """The provider and the hardware of a device, which identify it."""
    return device.ep_name, str(device.device.type), device.device.vendor_id, device.device.device_id


def find_device(ort: ModuleType, library: ProviderLibrary, provider: str, wanted: str) -> Any:
    """Find the device that a session of a plug-in provider will use.

    Parameters
    ----------
    wanted : str
        Its place in onnxruntime's list of the provider's devices, or its kind, such as CPU, GPU or NPU; "" for the
        first device.

    Raises
    ------
    ProviderError
        If the library has no such provider, or the provider no such device.
    """
    register(ort, library)
    everything = ort.get_ep_devices()
    found = [device for device in everything if device.ep_name == provider]
    if not found:
        raise ProviderError(_explain_absence(library, provider, [device.ep_name for device in everything]))
    if not wanted:
        return found[0]
    kinds = [device for device in found if wanted.upper() in _kinds(device)]
    numbered = found[int(wanted) :][:1] if wanted.isdecimal() else []
    if not (numbered or kinds):
        listed = ", ".join(f"{i}: {describe_device(device)}" for i, device in enumerate(found))
        raise ProviderError(f"{provider} has no device {wanted!r}; it has {listed}")
    return (numbered or kinds)[0]


def _explain_absence(library: ProviderLibrary, provider: str, present: Sequence[str]) -> str:
    if library.package:
        supported = f"; it supports {HARDWARE[provider]}" if provider in HARDWARE else ""
        return f"{provider} finds no device on this machine ({library}){supported}"
    others = ", ".join(sorted(set(present)))
    return f"{library} provides no device for {provider}; the providers with devices are {others}"


def _kinds(device: Any) -> set[str]:
    """The names of a device: onnxruntime's kind of hardware, and the provider's own name."""
    return {device.device.type.name, device.ep_metadata.get("ov_device", "").upper()} - {""}


def describe_device(device: Any) -> str:
    """Describe a device: its kind and its name."""
    title = device.ep_metadata.get("FULL_DEVICE_NAME") or device.device.metadata.get("Description")
    return f"{device.device.type.name} ({title or device.device.vendor or 'unknown'})"
