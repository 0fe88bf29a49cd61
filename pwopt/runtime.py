"""onnxruntime sessions that run where they were asked to, and inputs for a model."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from pwopt.errors import ModelError, ProviderError, UsageError
from pwopt.shapes import Shape, dims

Feeds = dict[str, np.ndarray]

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
#: What to install when a provider is missing.
WHEELS = {"cpu": "pwopt[cpu]", "cuda": "pwopt[gpu]", "tensorrt": "pwopt[gpu]", "openvino": "onnxruntime-openvino"}

#: Sizes (height, width) to try for dynamic images, in order: classifiers, detectors, text recognisers.
IMAGE_SIZES = ((224, 224), (320, 320), (640, 640), (48, 320), (32, 320), (48, 192), (256, 256), (512, 512))
#: Length to try for any other dynamic axis.
LENGTH = 64


def onnxruntime() -> ModuleType:
    """The onnxruntime module.

    Raises
    ------
    ProviderError
        If none is installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime cannot be imported ({error}); pip install 'pwopt[cpu]' or 'pwopt[gpu]'"
        ) from error
    if not hasattr(ort, "InferenceSession"):  # two wheels overwrote each other
        raise ProviderError(
            "the onnxruntime installation is broken; uninstall every onnxruntime wheel, then install one"
        )
    module: ModuleType = ort
    return module


def silence() -> None:
    """Keep onnxruntime's own log off the terminal; for programs, since it is a setting of the whole process."""
    if available():
        onnxruntime().set_default_logger_severity(4)


def available() -> bool:
    try:
        onnxruntime()
    except ProviderError:
        return False
    return True


def environment(provider: str, threads: int) -> dict[str, Any]:
    """Versions and machine, for reports."""
    try:
        ort = onnxruntime().__version__
    except ProviderError:
        ort = None
    return {
        "pwopt": metadata.version("pwopt"),
        "onnxruntime": ort,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "provider": provider,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Session:
    """A model loaded by onnxruntime on exactly one provider (and the CPU for what that cannot run).

    Parameters
    ----------
    path : path
        The model file.
    provider : str
        A short name from `PROVIDERS`, or an onnxruntime provider's full name.
    threads : int
        Intra-operator threads; 1 is the least noisy.
    optimise : bool
        All graph optimisations, as users run it; or none, to see rounding.
    tf32 : bool
        Whether CUDA may round float32 products to 10 bits, as it does by default. Off unless timing.
    profile : bool
        Record where each node ran; see `placement`.

    Raises
    ------
    ProviderError
        If the provider is not available, or onnxruntime fell back from it without saying so.
    ModelError
        If onnxruntime does not load the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provider: str = "cpu",
        threads: int = 1,
        *,
        optimise: bool = True,
        tf32: bool = False,
        profile: bool = False,
    ) -> None:
        ort = onnxruntime()
        self.provider = provider_name(provider)
        wheel = WHEELS.get(provider.lower())
        hint = f"; pip uninstall the onnxruntime you have, then pip install '{wheel}'" if wheel else ""
        if not self.provider.endswith("ExecutionProvider"):
            raise ProviderError(f"{provider!r} is not an execution provider; there are {', '.join(PROVIDERS)}")
        if self.provider not in ort.get_available_providers():
            listed = ", ".join(ort.get_available_providers())
            raise ProviderError(f"{self.provider} is not in this onnxruntime (it has {listed}){hint}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(tempfile.gettempdir(), "pwopt_profile")
        settings: dict[str, str] = {"use_tf32": str(int(tf32))} if self.provider == "CUDAExecutionProvider" else {}
        providers: list[Any] = [(self.provider, settings)]
        if self.provider != "CPUExecutionProvider":
            providers.append("CPUExecutionProvider")
        try:
            # Its Python fallback would go on with another provider, here or in a later run.
            self.session = ort.InferenceSession(os.fspath(path), options, providers=providers, enable_fallback=0)
        except Exception as error:
            if self.provider != "CPUExecutionProvider" and _loads_on_cpu(path):
                raise ProviderError(f"{self.provider} does not run this model: {_first_line(error)}") from error
            raise ModelError(f"onnxruntime does not load the model: {_first_line(error)}") from error
        if self.provider not in self.session.get_providers():
            raise ProviderError(
                f"{self.provider} could not start and onnxruntime fell back to the CPU; "
                "a device, its driver or the provider's libraries are missing, so nothing was run"
            )
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self._binding: Any = None

    def run(self, feeds: Feeds) -> list[Any]:
        """Outputs as arrays, in the model's order."""
        try:
            return list(self.session.run(None, feeds))
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run the model on these inputs: {_first_line(error)}") from error

    def bind(self, feeds: Feeds) -> None:
        """Place inputs and outputs on the provider's device, so that timing measures no copies."""
        if self.provider == "CUDAExecutionProvider":
            ort = onnxruntime()
            self._binding = self.session.io_binding()
            for name, value in feeds.items():
                self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
            for name in self.outputs:
                self._binding.bind_output(name, "cuda")
        self._feeds = feeds

    def step(self) -> None:
        """One synchronised run on the bound inputs."""
        if self._binding is None:
            self.session.run(None, self._feeds)
        else:
            self.session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()

    def placement(self) -> dict[str, list[str]]:
        """Provider → names of the nodes that ran on it, from a profiled session; ends the profile."""
        placed: dict[str, dict[str, None]] = {}
        for name, arguments, _ in self._profiled():
            placed.setdefault(arguments.get("provider", "unknown"), {})[name] = None
        return {provider: list(names) for provider, names in placed.items()}

    def operators(self) -> dict[str, float]:
        """Operator → seconds per run, the median of each node's times, from a profiled session; ends the profile."""
        times: dict[tuple[str, str], list[float]] = {}
        for name, arguments, seconds in self._profiled():
            times.setdefault((arguments.get("op_name", "unknown"), name), []).append(seconds)
        total: dict[str, float] = {}
        for (op, _), seen in times.items():
            total[op] = total.get(op, 0.0) + float(np.median(seen))
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def _profiled(self) -> Iterator[tuple[str, dict[str, Any], float]]:
        """Each run of each node: its name, what the profiler knows of it, and seconds."""
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink(missing_ok=True)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                yield event["name"].removesuffix("_kernel_time"), event["args"], event["dur"] / 1e6


def _loads_on_cpu(path: str | os.PathLike[str]) -> bool:
    """Whether the model itself is in order, so that a failure is the provider's."""
    try:
        onnxruntime().InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).strip())[:300]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model: its name, numpy type and declared shape (None if not even its rank is declared)."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Inputs a caller must give: those without an initializer.

    Raises
    ------
    UsageError
        If one is not a tensor.
    ModelError
        If one has no valid type.
    """
    initialized = {t.name for t in model.graph.initializer} | {s.values.name for s in model.graph.sparse_initializer}
    specs = []
    for value in model.graph.input:
        if value.name in initialized:
            continue
        if not value.type.HasField("tensor_type"):
            raise UsageError(f"input {value.name!r} is not a tensor; pwopt takes models whose inputs are tensors")
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        except KeyError:
            raise ModelError(f"input {value.name!r} has no valid type; export the model again") from None
        specs.append(InputSpec(value.name, np.dtype(dtype), dims(value.type)))
    return specs


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``NAME=1x3x640x640`` → name and sizes; a scalar is ``NAME=``."""
    name, sep, sizes = text.rpartition("=")
    if not sep or not name or not re.fullmatch(r"(\d+([x,]\d+)*)?", sizes):
        raise UsageError(f"the shape {text!r} is not of the form NAME=1x3x640x640")
    return name, tuple(int(s) for s in re.split("[x,]", sizes) if s)


def written(shape: Sequence[object]) -> str:
    """A shape as people write it; "?" where a dimension is not known."""
    return "×".join("?" if d is None else str(d) for d in shape) or "a scalar"


def check_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse shapes that do not fit the declared inputs."""
    known = {s.name: s for s in specs}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(f"there is no input {name!r}; the model has {', '.join(map(repr, known)) or 'none'}")
        if isinstance(shape, str) or not all(isinstance(d, (int, np.integer)) and d >= 0 for d in shape):
            raise UsageError(f"the shape {shape!r} of input {name!r} is not a sequence of sizes like (1, 3, 640, 640)")
        declared = known[name].shape
        if declared is None:
            continue
        fits = len(shape) == len(declared) and all(
            not isinstance(d, int) or d in (0, s) for d, s in zip(declared, shape, strict=True)
        )
        if not fits:
            raise UsageError(f"the shape {written(shape)} does not fit input {name!r}, which is {written(declared)}")


def check_settings(threads: int, rtol: float | None, atol: float | None) -> None:
    """Refuse numbers that make no sense."""
    if threads < 1:
        raise UsageError(f"{threads} threads cannot run anything; give 1 or more")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"a tolerance is a number from 0 on, and {name} is {value}")


def candidate_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, Sequence[int]] | None = None
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes to try for inputs with dynamic dimensions, the likeliest first.

    Batches are 1, images have 3 channels; equal names get equal sizes. `given` shapes are kept.
    """
    given = given or {}
    for spec in specs:
        if spec.shape is None and spec.name not in given:
            raise UsageError(f"input {spec.name!r} declares no shape; give --shape {spec.name}=…")
    tried = set()
    for image in IMAGE_SIZES:
        names: dict[str, int] = {}
        shapes = {}
        for spec in specs:
            if spec.name in given:
                shapes[spec.name] = tuple(given[spec.name])
                for d, size in zip(spec.shape or (), given[spec.name], strict=False):
                    if isinstance(d, str):
                        names.setdefault(d, size)
                continue
            guess = []
            for axis, d in enumerate(spec.shape or ()):
                if isinstance(d, int) and d > 0:
                    guess.append(d)
                    continue
                size = _guess(spec.shape or (), spec.dtype, axis, image)
                guess.append(names.setdefault(d, size) if isinstance(d, str) and d != "?" else size)
            shapes[spec.name] = tuple(guess)
        key = tuple(sorted(shapes.items()))
        if key not in tried:
            tried.add(key)
            yield shapes


def _guess(shape: Shape, dtype: np.dtype[Any], axis: int, image: tuple[int, int]) -> int:
    if axis == 0:
        return 1
    if len(shape) == 4 and dtype.kind == "f":
        channel = 3 if shape[-1] in (1, 3) else 1  # channels last, or as usual
        spatial = [a for a in (1, 2, 3) if a != channel]
        return 3 if axis == channel else image[spatial.index(axis)]
    return LENGTH


def make_feeds(
    specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]], kind: str = "normal", seed: int = 0
) -> Feeds:
    """Random inputs: "normal" or "uniform" on [0, 1) for floats; 0 and 1 for integers; reproducible."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for spec in specs:
        shape = tuple(shapes[spec.name])
        if spec.dtype.kind in "fV":
            values = rng.random(shape) if kind == "uniform" else rng.standard_normal(shape)
            feeds[spec.name] = np.asarray(values).astype(spec.dtype)
        elif spec.dtype.kind in "iub":
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
        else:
            feeds[spec.name] = np.full(shape, "a", dtype=object)
    return feeds


def as_feeds(
    given: str | os.PathLike[str] | Mapping[str, Any],
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Feeds:
    """Inputs from a dict of arrays, an .npz with one array per input, or an .npy for the only input.

    Raises
    ------
    UsageError
        If an input is missing, or one does not fit the model or the given shapes.
    """
    where = "the given inputs" if isinstance(given, Mapping) else repr(os.fspath(given))
    if isinstance(given, Mapping):
        arrays = {name: np.asarray(value) for name, value in given.items()}
    else:
        try:
            loaded = np.load(given, allow_pickle=False)
            alone = isinstance(loaded, np.ndarray)
            arrays = {specs[0].name: loaded} if alone and len(specs) == 1 else {n: loaded[n] for n in loaded.files}
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{where} cannot be read as .npz ({error}); save one with numpy.savez") from error
    missing = [s.name for s in specs if s.name not in arrays]
    if missing:
        has = f"has {', '.join(map(repr, arrays))}" if arrays else "is empty"
        raise UsageError(f"{where} lacks the inputs {', '.join(map(repr, missing))}; it {has}")
    check_shapes(specs, {s.name: arrays[s.name].shape for s in specs})
    for name, shape in (shapes or {}).items():
        if tuple(shape) != arrays[name].shape:
            raise UsageError(f"input {name!r} in {where} is {written(arrays[name].shape)}, not {written(shape)}")
    try:
        return {s.name: arrays[s.name].astype(s.dtype) for s in specs}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where} does not hold numbers of the model's types: {error}") from error


def provider_name(provider: str) -> str:
    """onnxruntime's name of a provider, from a short name in any case or itself."""
    return PROVIDERS.get(provider.lower(), provider)


def elsewhere(placed: Mapping[str, list[str]], provider: str) -> dict[str, list[str]]:
    """The part of a placement that is not on `provider`."""
    wanted = provider_name(provider)
    return {name: nodes for name, nodes in placed.items() if name != wanted}
