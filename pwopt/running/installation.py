"""The installation: onnxruntime and its wheels, versions of packages, and the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pwopt.errors import ProviderError
from pwopt.running import provider_libraries, providers
from pwopt.running.providers import Provider
from pwopt.version import __version__

#: Linux's description of the processor.
CPUINFO = Path("/proc/cpuinfo")
#: Wheels of onnxruntime; all of them install into one folder.
DISTRIBUTIONS = re.compile(r"onnxruntime(-gpu|-openvino|-directml|-rocm|-training|-qnn)?")
#: How to install onnxruntime, as the end of a sentence.
INSTALL = f"pip install {providers.WHEELS[providers.CPU]}, or '{providers.WHEELS[providers.CUDA]}' for CUDA"


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Raises
    ------
    ProviderError
        If it is not installed, or its installation is broken.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(f"onnxruntime cannot be imported ({error}); {INSTALL}") from error
    if not hasattr(ort, "InferenceSession"):  # two wheels overwrote each other
        wheel = suggest_wheel(providers.WHEELS[providers.CPU])
        raise ProviderError(f"the onnxruntime installation is broken; {wheel}")
    module: ModuleType = ort
    return module


def find_wheels() -> dict[str, str]:
    """Find the wheels of onnxruntime in the folder of the imported one. Several overwrite each other."""
    spec = find_spec("onnxruntime")
    where = [str(Path(spec.origin).parent.parent)] if spec is not None and spec.origin else sys.path
    return {name: version for name, version in find_distributions(where).items() if DISTRIBUTIONS.fullmatch(name)}


def find_distributions(where: Sequence[str] | None = None) -> dict[str, str]:
    """Find distributions in some folders, by default on sys.path. Returns normalised name (PEP 503) → version."""
    found = metadata.distributions(path=list(sys.path if where is None else where))
    named = ((d.metadata["Name"], d.version) for d in found if d.metadata["Name"])
    return dict(sorted((re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in named))


def suggest_wheel(wanted: str) -> str:
    """Say how to replace the installed wheels by one that works."""
    installed = " ".join(find_wheels()) or "onnxruntime"
    return f"pip uninstall {installed}, then pip install {shlex.quote(wanted)}"


def silence_onnxruntime() -> None:
    """Silence onnxruntime's log. This is a setting of the whole process, so only programs call it."""
    if is_available():
        import_onnxruntime().set_default_logger_severity(4)


def is_available() -> bool:
    try:
        import_onnxruntime()
    except ProviderError:
        return False
    return True


def describe_machine(provider: Provider = providers.DEFAULT, threads: int = 1) -> dict[str, Any]:
    """Collect versions, the machine and the settings, for reports."""
    import onnx  # here, so that a worker starts without it

    try:
        ort = import_onnxruntime().__version__
    except ProviderError:
        ort = None
    return {
        "pwopt": __version__,
        "onnxruntime": ort,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "provider": provider.text,
        "device": _describe_device(provider),
    }


def _describe_device(provider: Provider) -> str | None:
    """Describe the card or the plug-in library and device of a provider; None on a processor alone, or if unknown."""
    if provider.name == providers.CPU:
        return None
    card = providers.find_card(provider)
    described = None if card is None else f"{card.name}, driver {card.driver}"
    with contextlib.suppress(ProviderError):
        library = providers.find_plugin(provider)
        if library is not None:
            device = provider_libraries.find_device(
                import_onnxruntime(), library, provider.name, provider.wanted_device
            )
            plugin = f"{provider_libraries.describe_device(device)}, {library}"
            return plugin if described is None else f"{described}, {library}"
    return described


def list_cores() -> set[int]:
    """List the logical cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The processor's name, as detailed as the system gives it."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":  # where `platform.processor` is "arm" for all that Apple makes
        with contextlib.suppress(OSError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
            if done.stdout.strip():
                return done.stdout.strip()
    return platform.processor() or platform.machine()
