"""Check the installation: versions, execution providers that start, and remedies for those that do not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from pwopt.errors import ProviderError, PwoptError
from pwopt.graph.temporary import temporary_folder
from pwopt.running import installation, provider_libraries, providers
from pwopt.running.child_process import child_command
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import Session, find_fallbacks

#: pwopt's dependencies whose versions are listed, besides onnxruntime.
PACKAGES = ("pwopt", "onnx", "numpy", "onnx-graphsurgeon", "ml-dtypes")
#: Wheels with the libraries that the CUDA provider loads.
CUDA_WHEELS = ("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cufft", "nvidia-curand", "nvidia-cudnn")
#: Seconds that a provider may take to start; TensorRT builds an engine.
PROVIDER_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    subject : str
    ok : bool or None
        None for information that is neither good nor bad.
    detail : str
    remedy : str
        What to do, or "".
    """

    subject: str
    ok: bool | None
    detail: str
    remedy: str = ""


class ProviderFinding(Finding):
    """Whether an execution provider starts."""


@dataclass(frozen=True)
class LibraryFinding(Finding):
    """The result of loading a library with plug-in providers, and onnxruntime's names of those providers."""

    providers: tuple[str, ...] = ()


def check_installation(provider: str | Provider | None = None) -> list[Finding]:
    """Check this installation.

    Parameters
    ----------
    provider : str or Provider, optional
        The only provider to check. By default, all providers of this onnxruntime are started.

    Returns
    -------
    list of Finding
        Those on providers come last. Each provider runs a small model in a process of its own.

    Raises
    ------
    UsageError
        If there is no such provider.
    """
    wanted = None if provider is None else as_provider(provider)
    found = [_check_machine(), *_check_packages(), _check_wheels(), *_list_cards()]
    try:
        there = installation.import_onnxruntime().get_available_providers()
    except ProviderError as error:
        return [*found, Finding("onnxruntime", False, str(error), installation.INSTALL)]
    if wanted is not None:
        return [*found, *_check_libraries(wanted.library), check_provider(wanted)]
    libraries = _check_libraries()
    built_in = (Provider(name, text=name) for name in there)
    plugins = (Provider(name, text=name) for library in libraries for name in library.providers if name not in there)
    return [*found, *libraries, *map(check_provider, (*built_in, *plugins))]


def _check_machine() -> Finding:
    system, processor = platform.platform(), installation.cpu_name()
    detail = f"Python {platform.python_version()}, {system}, {processor}, {os.cpu_count()} cores"
    return Finding("machine", None, detail)


def _check_packages() -> list[Finding]:
    versions = installation.find_distributions()
    own = ", ".join(f"{name} {versions.get(name, '(not installed)')}" for name in PACKAGES)
    cuda = [f"{name} {version}" for name, version in versions.items() if name.startswith(CUDA_WHEELS)]
    return [Finding("packages", None, own)] + ([Finding("CUDA's wheels", None, ", ".join(cuda))] if cuda else [])


def _check_wheels() -> Finding:
    """Check onnxruntime's wheels: one works, two overwrite each other."""
    installed = installation.find_wheels()
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) == 1:
        return Finding("onnxruntime", True, listed)
    if not installed:
        return Finding("onnxruntime", False, "no wheel of it is installed", installation.INSTALL)
    remedy = f"pip uninstall {' '.join(installed)}, then {installation.INSTALL}"
    return Finding("onnxruntime", False, f"{listed}: they install into one folder, over each other", remedy)


def _list_cards() -> list[Finding]:
    return [
        Finding(f"card {i}", None, f"{c.name}, driver {c.driver}, {c.used:,.0f} of {c.total:,.0f} MiB in use")
        for i, c in enumerate(providers.list_cards())
    ]


def _check_libraries(path: str = "") -> list[LibraryFinding]:
    """Load each library with plug-in providers, by default those of the installed wheels, in processes of their own."""
    modules = [] if path else provider_libraries.find_modules()
    found = [_check_library(provider_libraries.wheel_of(module), module) for module in modules]
    if path:
        found.append(_check_library(path, path))
    return found or [LibraryFinding("plug-in providers", None, "no wheel named onnxruntime-ep-… is installed")]


def _check_library(subject: str, library: str) -> LibraryFinding:
    command = child_command(_answer_library, library)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROVIDER_SECONDS)
    except subprocess.TimeoutExpired:
        return LibraryFinding(subject, False, f"did not load within {PROVIDER_SECONDS} seconds")
    lines = done.stdout.splitlines()
    if done.returncode < 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return LibraryFinding(subject, False, f"crashed while it loaded: {last}")
    ok, detail, names = json.loads(lines[-1])
    return LibraryFinding(subject, ok, detail, "", tuple(names))


def _describe_library(library: str) -> tuple[bool | None, str, tuple[str, ...]]:
    """Load a library, given by its module or its path. Returns whether that works, its devices, and its providers."""
    try:
        module = library in provider_libraries.find_modules()
        opened = provider_libraries.open_module(library) if module else provider_libraries.find_library("", library)
        assert opened is not None
        devices = provider_libraries.list_devices(installation.import_onnxruntime(), opened)
    except PwoptError as error:
        return False, str(error), ()
    names = opened.providers or tuple(dict.fromkeys(device.ep_name for device in devices))
    listed = [f"{device.ep_name} on {provider_libraries.describe_device(device)}" for device in devices]
    place = f"{opened}, {opened.path}" if opened.package else opened.path
    return (True if listed else None), f"{place}; devices: {', '.join(listed) or 'none on this machine'}", names


def _answer_library(library: str) -> None:
    """In the child: print the result of `_describe_library`."""
    installation.silence_onnxruntime()
    sys.stdout.write("\n" + json.dumps(_describe_library(library)) + "\n")


def check_provider(provider: Provider) -> Finding:
    """Run a small model on one provider, in a process of its own, since native code may crash."""
    command = child_command(_answer, provider.text)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROVIDER_SECONDS)
    except subprocess.TimeoutExpired:
        return ProviderFinding(provider.text, False, f"did not start within {PROVIDER_SECONDS} seconds")
    lines = done.stdout.splitlines()
    if done.returncode < 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return ProviderFinding(provider.text, False, f"crashed while it started: {last}")
    error, elsewhere = json.loads(lines[-1])
    if elsewhere:
        return ProviderFinding(provider.text, None, f"starts, but leaves the model to {', '.join(elsewhere)}")
    detail, sep, remedy = error.removeprefix(f"{provider.name} ").partition("; pip ")
    return ProviderFinding(provider.text, not detail, detail or "starts, and runs a model", sep[2:] + remedy)


def _run_small_model(provider: Provider) -> tuple[str, list[str]]:
    """Run a small model on a provider. Returns why that fails (else ""), and the providers that ran it instead."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with temporary_folder() as folder:
        path = folder / "small.onnx"
        onnx.save(model, path)
        try:
            feeds = {"x": np.array([[-1, 0, 1, 2]], np.float32)}
            (found,) = Session(path, provider).run(feeds)
            elsewhere = list(find_fallbacks(path, provider, 1, feeds))
        except PwoptError as error:
            return str(error), []
    wrong = "" if np.array_equal(found, [[0, 0, 1, 2]]) else f"runs, but computes {found.tolist()} for max(x, 0)"
    return wrong, elsewhere


def _answer(provider: str) -> None:
    """In the child: print the result of `_run_small_model`."""
    installation.silence_onnxruntime()
    sys.stdout.write("\n" + json.dumps(_run_small_model(as_provider(provider))) + "\n")
