"""pwopt: makes exported ONNX models faster, exactly.

Folds sequences of operators that are linear across channels, verifies every result against onnxruntime,
and explains what it did and what it left alone.
"""

from __future__ import annotations

from importlib import metadata

from pwopt.bench import benchmark
from pwopt.errors import ModelError, NotEquivalentError, ProviderError, PwoptError, UsageError
from pwopt.inspection import inspect
from pwopt.model import Model, load, save
from pwopt.optimizer import Result, optimize
from pwopt.properties import properties
from pwopt.targets import Profile, profile
from pwopt.verify import verify

__version__ = metadata.version("pwopt")

__all__ = [
    "Model",
    "ModelError",
    "NotEquivalentError",
    "Profile",
    "ProviderError",
    "PwoptError",
    "Result",
    "UsageError",
    "benchmark",
    "inspect",
    "load",
    "optimize",
    "profile",
    "properties",
    "save",
    "verify",
]
