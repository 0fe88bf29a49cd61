"""Values for a model's inputs: drawn at random, or read from files."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from pwopt.algebra import Values
from pwopt.errors import UsageError
from pwopt.graph.dtypes import is_floating
from pwopt.graph.shapes import format_shape
from pwopt.inputs.feeds import Feeds
from pwopt.inputs.input_specs import InputSpec, check_shapes

#: Distributions of floating-point inputs, each with a description.
SAMPLE_KINDS = {
    "normal": "standard normal",
    "uniform": "uniform on [0, 1)",
    "zeros": "zeros",
    "large": "normal with a standard deviation of 1000",
}
#: Distributions of every comparison by default; one that is listed twice is drawn twice.
DEFAULT_KINDS = ("normal", "uniform", "normal")
#: Standard deviation of "large" inputs: beyond raw 8-bit pixels, far from the largest float16.
LARGE = 1000.0
#: What numpy raises for a damaged file, or one with Python objects. numpy advises to load the latter unsafely.
DAMAGED_ARCHIVE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)

#: The smallest and largest value of an input, both included.
Range = tuple[float, float]


class SampleLabel(NamedTuple):
    """The distribution or file of a sample, and the sizes of a random one, for reports."""

    source: str
    sizes: str = ""

    def __str__(self) -> str:
        return f"{self.source}, {self.sizes}" if self.sizes else self.source


@dataclass(frozen=True)
class Sample:
    """One set of inputs, with a label for reports."""

    label: SampleLabel
    feeds: Feeds


def parse_range(text: str) -> tuple[str, Range]:
    """Parse ``NAME=0:255`` to a name, a smallest and a largest value."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.fullmatch(rf"(.+)=({number}):({number})", text)
    if found is None or float(found[2]) > float(found[3]):
        raise UsageError(f"the range {text!r} is not of the form NAME=0:255, smallest value first")
    return found[1], (float(found[2]), float(found[3]))


def check_kinds(kinds: Sequence[str], specs: Sequence[InputSpec], ranges: Mapping[str, Range]) -> None:
    """Refuse unknown distributions, and ranges of unknown inputs.

    Raises
    ------
    UsageError
    """
    for kind in kinds:
        if kind not in SAMPLE_KINDS:
            raise UsageError(f"there is no distribution {kind!r}; there are {', '.join(SAMPLE_KINDS)}")
    if not kinds:
        raise UsageError(f"no distribution was named; there are {', '.join(SAMPLE_KINDS)}")
    names = [s.name for s in specs if s.dtype.kind != "O"]
    for name in ranges:
        if name not in names:
            raise UsageError(f"there is no numeric input {name!r}; the model has {', '.join(map(repr, names))}")


def draw_feeds(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]],
    kind: str = "normal",
    seed: int = 0,
    ranges: Mapping[str, Range] | None = None,
) -> Feeds:
    """Draw random inputs, reproducibly.

    Parameters
    ----------
    kind : str
        One of `SAMPLE_KINDS`, for floating point. Integers that index a table are valid indices. Other integers have
        values that the graph admits (see `pwopt.inputs.integer_values`), or 0 and 1 for "uniform". Booleans and strings
        are 0 and 1. All are 0 for "zeros".
    seed : int
    ranges : mapping of input name to (low, high), optional
        These inputs are uniform there instead, whatever the kind; for integers, both ends are included.
    """
    rng = np.random.default_rng(seed)
    return {s.name: _draw(s, tuple(shapes[s.name]), kind, rng, (ranges or {}).get(s.name)) for s in specs}


def _draw(spec: InputSpec, shape: tuple[int, ...], kind: str, rng: np.random.Generator, given: Range | None) -> Values:
    if spec.dtype.kind == "O":
        texts = np.asarray(rng.integers(0, kind != "zeros", shape, endpoint=True)).astype(str)
        return np.asarray(texts.astype(object))
    if is_floating(spec.dtype):
        if given is not None:
            values = rng.uniform(*given, shape)
        elif kind == "uniform":
            values = rng.random(shape)
        elif kind == "zeros":
            values = np.zeros(shape)
        else:
            values = rng.standard_normal(shape) * (LARGE if kind == "large" else 1.0)
        return np.asarray(values).astype(spec.dtype)
    if given is None and spec.dtype.kind in "iu" and spec.largest is None and kind not in ("zeros", "uniform"):
        return np.asarray(rng.choice(spec.values, shape)).astype(spec.dtype)
    likely = 1 if spec.largest is None else min(spec.largest, np.iinfo(spec.dtype).max)
    low, high = given if given is not None else (0, 0 if kind == "zeros" else likely)
    return np.asarray(rng.integers(int(np.ceil(low)), int(np.floor(high)), shape, endpoint=True)).astype(spec.dtype)


def draw_samples(
    specs: Sequence[InputSpec],
    rounds: Sequence[Mapping[str, Sequence[int]]],
    kinds: Sequence[str] = DEFAULT_KINDS,
    ranges: Mapping[str, Range] | None = None,
) -> list[Sample]:
    """Draw each distribution at each round of sizes."""
    names = [kind if kind not in kinds[:i] else f"{kind} {kinds[:i].count(kind) + 1}" for i, kind in enumerate(kinds)]
    return [
        Sample(SampleLabel(names[seed], _format_sizes(sizes)), draw_feeds(specs, sizes, kind, seed, ranges))
        for sizes in rounds
        for seed, kind in enumerate(kinds)
    ]


def _format_sizes(sizes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name} {format_shape(shape)}" for name, shape in sizes.items())


def read_samples(
    given: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Sample]:
    """Read inputs from memory or from files.

    Parameters
    ----------
    given : mapping of input name to array, path, or a sequence of those
        A path is one of these: an .npz with one array per input; an .npy or .pb, if the model has one input; a folder
        of .npz files; a folder with one .npy per input, named after it (or any .npy files, if the model has one input);
        a folder with ``input_0.pb``, ``input_1.pb``… in the order of the inputs; a folder of such folders
        (``test_data_set_0``…), as published beside ONNX models.
    shapes : mapping of input name to sizes, optional
        Sizes that the inputs must have.

    Raises
    ------
    UsageError
        If an input is missing or cannot be read, or one does not fit the model or the given shapes.
    """
    if isinstance(given, Mapping):
        return [Sample(SampleLabel("given"), check_feeds(given, specs, shapes))]
    if not isinstance(given, (str, os.PathLike)):
        return [sample for one in given for sample in read_samples(one, specs, shapes)]
    found = list(_read_sets(Path(given), specs))
    if not found:
        raise UsageError(f"there are no inputs in the folder {str(given)!r}; it needs .npz, .npy or input_0.pb files")
    return [
        Sample(SampleLabel(str(path)), check_feeds(arrays, specs, shapes, repr(str(path)))) for path, arrays in found
    ]


def _read_sets(path: Path, specs: Sequence[InputSpec]) -> list[tuple[Path, dict[str, Values]]]:
    """Read every set of inputs under a path."""
    if not path.exists():
        raise UsageError(f"there is no file or folder {str(path)!r}; give an .npz file, or a folder of .npz files")
    if not path.is_dir():
        return [(path, _read(path, specs))]
    protos = sorted(path.glob("input_*.pb"), key=lambda p: (len(p.stem), p.stem))
    if protos:
        named = [_read_tensor(p) for p in protos]
        names = {s.name for s in specs}
        if all(t.name in names for t in named):
            return [(path, {t.name: _to_array(t, p) for t, p in zip(named, protos, strict=True)})]
        if len(protos) != len(specs):
            raise UsageError(f"{str(path)!r} has {len(protos)} inputs, and the model {len(specs)}")
        return [(path, {s.name: _to_array(t, p) for s, t, p in zip(specs, named, protos, strict=True)})]
    arrays = sorted(path.glob("*.npy"))
    if arrays and {s.name for s in specs} <= {p.stem for p in arrays}:
        return [(path, {s.name: load_array_file(path / f"{s.name}.npy") for s in specs})]
    files = sorted([*arrays, *path.glob("*.npz")])
    if files:
        return [(p, _read(p, specs)) for p in files]
    folders = sorted((p for p in path.iterdir() if p.is_dir()), key=lambda p: (len(p.name), p.name))
    return [s for folder in folders for s in _read_sets(folder, specs)]


def _read(path: Path, specs: Sequence[InputSpec]) -> dict[str, Values]:
    if path.suffix == ".pb":
        alone = _to_array(_read_tensor(path), path)
    else:
        loaded = load_array_file(path)
        if not isinstance(loaded, np.ndarray):
            try:
                return {name: loaded[name] for name in loaded.files}
            except DAMAGED_ARCHIVE as error:
                raise _read_error(path, error) from error
        alone = loaded
    if len(specs) != 1:
        names = ", ".join(repr(s.name) for s in specs)
        raise UsageError(f"{str(path)!r} holds one array, and the model takes {names}; save an .npz with those names")
    return {specs[0].name: alone}


def load_array_file(path: Path) -> Any:
    """Open a .npy or .npz file, without Python objects.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        return np.load(path, allow_pickle=False)
    except DAMAGED_ARCHIVE as error:
        raise _read_error(path, error) from error


def _read_error(path: Path, error: Exception) -> UsageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged, or holds Python objects"
    return UsageError(f"{str(path)!r} cannot be read as .npz ({why}); save one with numpy.savez")


def _read_tensor(path: Path) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as a tensor ({error})") from error
    return tensor


def _to_array(tensor: onnx.TensorProto, path: Path) -> Values:
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{str(path)!r} does not hold a tensor ({error})") from error


def check_feeds(
    given: Mapping[str, Any],
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]] | None = None,
    where: str = "the given inputs",
) -> Feeds:
    """Check arrays, and convert them to the model's types.

    Raises
    ------
    UsageError
        If an input is missing, or one does not fit the model or the given shapes.
    """
    arrays = {name: np.asarray(value) for name, value in given.items()}
    missing = [s.name for s in specs if s.name not in arrays]
    if missing:
        has = f"has {', '.join(map(repr, arrays))}" if arrays else "is empty"
        raise UsageError(f"{where} lacks the inputs {', '.join(map(repr, missing))}; it {has}")
    check_shapes(specs, {s.name: arrays[s.name].shape for s in specs})
    for name, shape in (shapes or {}).items():
        if tuple(shape) != arrays[name].shape:
            raise UsageError(
                f"input {name!r} in {where} is {format_shape(arrays[name].shape)}, not {format_shape(shape)}"
            )
    return {s.name: _cast(arrays[s.name], s, where) for s in specs}


def _cast(array: Values, spec: InputSpec, where: str) -> Values:
    try:
        with np.errstate(invalid="ignore"):
            cast = array.astype(spec.dtype)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where} does not hold numbers of the model's types: {error}") from error
    if spec.dtype.kind in "iub" and not np.array_equal(cast, array):
        raise UsageError(f"input {spec.name!r} in {where} holds {array.dtype} that do not fit {spec.dtype}")
    return cast
