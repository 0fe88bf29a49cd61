"""What is installed here, which execution providers really start, why others do not, and what would mend it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from pwopt.errors import ProviderError, PwoptError
from pwopt.running import installation, providers
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import Session, find_fallbacks

#: What pwopt rests on, besides onnxruntime.
PACKAGES = ("pwopt", "onnx", "numpy", "onnx-graphsurgeon", "ml-dtypes")
#: Wheels that hold what CUDA's provider loads.
CUDA_WHEELS = ("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cufft", "nvidia-curand", "nvidia-cudnn")
#: Seconds that a provider may take to start; TensorRT builds an engine.
PATIENCE = 120


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    subject : str
    ok : bool or None
        None for what is neither good nor bad.
    detail : str
    remedy : str
        What would mend it, or "".
    """

    subject: str
    ok: bool | None
    detail: str
    remedy: str = ""


def examine(provider: str | Provider | None = None) -> list[Finding]:
    """Look at this installation.

    Parameters
    ----------
    provider : str or Provider, optional
        The only provider to start; all that this onnxruntime has by default.

    Returns
    -------
    list of Finding
        Those on providers last, each started on a small model in a process of its own.

    Raises
    ------
    UsageError
        If there is no such provider.
    """
    wanted = None if provider is None else as_provider(provider)
    found = [_machine(), *_packages(), _wheels(), *_cards()]
    try:
        there = installation.import_onnxruntime().get_available_providers()
    except ProviderError as error:
        return [*found, Finding("onnxruntime", False, str(error), "pip install 'pwopt[cpu]'")]
    if wanted is not None:
        return [*found, start(wanted)]
    return [*found, *(start(Provider(name, text=name)) for name in there)]


def _machine() -> Finding:
    system, processor = platform.platform(), installation.cpu_name()
    detail = f"Python {platform.python_version()}, {system}, {processor}, {os.cpu_count()} cores"
    return Finding("machine", None, detail)


def _packages() -> list[Finding]:
    versions = installation.find_distributions()
    own = ", ".join(f"{name} {versions.get(name, '(not installed)')}" for name in PACKAGES)
    cuda = [f"{name} {version}" for name, version in versions.items() if name.startswith(CUDA_WHEELS)]
    return [Finding("packages", None, own)] + ([Finding("CUDA's wheels", None, ", ".join(cuda))] if cuda else [])


def _wheels() -> Finding:
    """onnxruntime's wheels: one works, two overwrite each other."""
    installed = installation.find_wheels()
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) == 1:
        return Finding("onnxruntime", True, listed)
    if not installed:
        return Finding("onnxruntime", False, "no wheel of it is installed", "pip install 'pwopt[cpu]' or 'pwopt[gpu]'")
    remedy = f"pip uninstall {' '.join(installed)}, then pip install one of 'pwopt[cpu]' and 'pwopt[gpu]'"
    return Finding("onnxruntime", False, f"{listed}: they install into one folder, over each other", remedy)


def _cards() -> list[Finding]:
    return [
        Finding(f"card {i}", None, f"{c.name}, driver {c.driver}, {c.used:,.0f} of {c.total:,.0f} MiB in use")
        for i, c in enumerate(providers.cards())
    ]


def start(provider: Provider) -> Finding:
    """Start one provider on a small model, in a process of its own, since native code may crash."""
    command = [sys.executable, "-m", "pwopt.running.doctor", provider.text]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Finding(provider.text, False, f"did not start within {PATIENCE} seconds")
    lines = done.stdout.splitlines()
    if done.returncode < 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(provider.text, False, f"crashed while it started: {last}")
    error, elsewhere = json.loads(lines[-1])
    if elsewhere:
        return Finding(provider.text, None, f"starts, but leaves the model to {', '.join(elsewhere)}")
    detail, sep, remedy = error.removeprefix(f"{provider.name} ").partition("; pip ")
    return Finding(provider.text, not detail, detail or "starts, and runs a model", sep[2:] + remedy)


def _try(provider: Provider) -> tuple[str, list[str]]:
    """Why a provider does not run a small model, else ""; and the providers that run it instead."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="pwopt-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "small.onnx"
        onnx.save(model, path)
        try:
            feeds = {"x": np.array([[-1, 0, 1, 2]], np.float32)}
            (found,) = Session(path, provider).run(feeds)
            elsewhere = list(find_fallbacks(path, provider, 1, feeds))
        except PwoptError as error:
            return str(error), []
    wrong = "" if np.array_equal(found, [[0, 0, 1, 2]]) else f"runs, but computes {found.tolist()} for max(x, 0)"
    return wrong, elsewhere


if __name__ == "__main__":
    installation.silence_onnxruntime()
    sys.stdout.write("\n" + json.dumps(_try(as_provider(sys.argv[1]))) + "\n")
