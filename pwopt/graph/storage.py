"""Replaces files atomically, and copies external data in pieces without loading it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_tensor,
    set_external_data,
    uses_external_data,
)

from pwopt.errors import ModelError, UsageError
from pwopt.graph.temporary import create_file, temporary_folder

#: Seconds to wait before another attempt if another program has the file open (Windows).
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
#: New tensors from this size on are stored as external data, if the model has any (onnx's default).
EXTERNAL_THRESHOLD = 1024


#: Offsets in an external file are aligned for memory mapping, as onnx and onnxruntime do.
FILE_ALIGNMENT = 4096
#: The longest file name in bytes, less than the 255 of file systems; and that part of a data file's name that is the
#: model's.
MAX_NAME_BYTES, MAX_STEM_BYTES = 250, 160


def copy_fields(source: Any, target: Any, skip: set[str]) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if isinstance(value, (int, float, str, bytes)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).MergeFrom(value)


def find_data_folder(proto: onnx.ModelProto, path: Path) -> Path:
    """Find the folder of a model's external data: beside the file, or beside the file that a link leads to."""
    beside, target = path.absolute().parent, Path(os.path.realpath(path)).parent
    try:
        names = find_locations(proto).values()
    except ValueError:  # `check_external` refuses it
        return target
    return beside if names and all((beside / name).exists() for name in names) else target


def resolve_link(tensor: TensorProto, folder: Path | None) -> tuple[TensorProto, str]:
    """Make a tensor refer to the target if its data file is a link, which onnx refuses; also return the folder."""
    if folder is None or not uses_external_data(tensor):
        return tensor, str(folder or "")
    path = Path(os.path.realpath(folder / ExternalDataInfo(tensor).location))
    direct = TensorProto()
    direct.CopyFrom(tensor)
    for entry in direct.external_data:
        if entry.key == "location":
            entry.value = path.name
    return direct, str(path.parent)


def check_external(proto: onnx.ModelProto, folder: Path | None, target: Path | None = None) -> None:
    """Refuse external data that is missing, or outside the model's folder.

    Data of the main graph's initializers stays where it is. The little that nodes and bodies hold is read.

    Parameters
    ----------
    proto : onnx.ModelProto
    folder : Path or None
    target : Path, optional
        The folder of the file that the model's path is a link to. Caches of model hubs link the model and its data
        there.
    """
    roots = [Path(os.path.realpath(root)) for root in (folder, target) if root is not None]
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor):
            _check_place(tensor, folder, roots)
    for tensor in _inner_tensors(proto):
        if uses_external_data(tensor):
            _check_place(tensor, folder, roots)
            try:
                direct, where = resolve_link(tensor, folder)
                load_external_data_for_tensor(direct, where)
                tensor.CopyFrom(direct)
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise ModelError(f"external data of {tensor.name!r} cannot be read: {error}") from error
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def _check_place(tensor: TensorProto, folder: Path | None, roots: Sequence[Path]) -> None:
    if folder is None:
        raise ModelError("a model in memory has no folder for its external data; give its path instead")
    try:
        info = ExternalDataInfo(tensor)
        if min(info.offset or 0, info.length or 0) < 0:
            raise ValueError("a negative offset or length")
        path = folder / info.location
        real = Path(os.path.realpath(path))
        inside = not Path(info.location).is_absolute() and any(real.is_relative_to(root) for root in roots)
        available = path.stat().st_size - (info.offset or 0) if inside and path.is_file() else None
    except (ValueError, OSError) as error:
        raise ModelError(f"external data of {tensor.name!r} has no valid place ({error}); export it again") from error
    if not inside:
        raise ModelError(f"external data {info.location!r} of {tensor.name!r} lies outside the model's folder; move it")
    if available is None:
        raise ModelError(f"external data {info.location!r} of {tensor.name!r} is missing; put it beside the model")
    if max(info.length or 0, math.prod(tensor.dims) // 8) > available:  # no type has less than a bit
        raise ModelError(f"external data {info.location!r} is too short for {tensor.name!r}; copy it again")


def _inner_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model except the initializers of its main graph."""
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    sparse = list(proto.graph.sparse_initializer)
    while nodes:
        for attribute in nodes.pop().attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else attribute.sparse_tensors
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from body.initializer
                sparse += body.sparse_initializer
                nodes += body.node
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def find_locations(proto: onnx.ModelProto) -> dict[str, str]:
    return {t.name: ExternalDataInfo(t).location for t in _find_external(proto)}


def count_bytes(proto: onnx.ModelProto) -> int:
    """Count the bytes of a model, including its external data."""
    return int(proto.ByteSize()) + sum(ExternalDataInfo(t).length or 0 for t in _find_external(proto))


def _find_external(proto: onnx.ModelProto) -> list[TensorProto]:
    """Find the initializers whose data lies in other files."""
    return [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]


def find_data_files(path: Path) -> set[str]:
    """Find the data files of an earlier model at `path`: those that are named after it."""
    try:
        names = find_locations(onnx.load(path, load_external_data=False)) if path.is_file() else {}
    except (DecodeError, ValueError):
        return set()
    return {
        name
        for name in names.values()
        if name.startswith(_shorten(path.name, MAX_STEM_BYTES) + ".") and not set(name) & set("/\\:")
    }


def externalise(model: onnx.ModelProto, path: Path, folder: Path | None, layout: Mapping[str, str]) -> onnx.ModelProto:
    """Copy external data from `folder` into new files beside `path`, and return the model that refers to them.

    `layout` says which tensor belongs in which of the old files; large new tensors join them.
    """
    layout = {**layout, **find_locations(model)}
    if not layout:
        return model
    if folder is None:
        raise ModelError("a model with external data needs the folder that the data lies in; load it with pwopt.load")
    locations = list(dict.fromkeys(layout[t.name] for t in model.graph.initializer if t.name in layout))
    locations = locations or list(dict.fromkeys(layout.values()))[:1]
    large = {layout.get(t.name, locations[0]) for t in model.graph.initializer if _is_external(t)}
    locations = [old for old in locations if old in large]  # create no empty file
    single = len(locations) == 1
    new_names = {
        old: _free_name(path, "data" if single else f"{k}.{re.sub(r'[^A-Za-z0-9._-]', '_', Path(old).name)[:80]}")
        for k, old in enumerate(locations)
    }
    proto = onnx.ModelProto()
    copy_fields(model, proto, skip={"graph"})
    copy_fields(model.graph, proto.graph, skip={"initializer"})
    with contextlib.ExitStack() as files:
        streams = {old: files.enter_context(replacing(path.parent / name)) for old, name in new_names.items()}
        copied: dict[tuple[str, int | None, int | None], tuple[int, int]] = {}  # tensors may share their bytes
        for tensor in model.graph.initializer:
            kept = proto.graph.initializer.add()
            if uses_external_data(tensor):
                info = ExternalDataInfo(tensor)
                kept.CopyFrom(tensor)
                target, piece = info.location, (info.location, info.offset, info.length)
                if piece not in copied:
                    copied[piece] = _append_file(streams[target], folder / info.location, info)
                offset, length = copied[piece]
            elif _is_external(tensor):
                for descriptor, value in tensor.ListFields():
                    if descriptor.name in ("name", "data_type", "doc_string"):
                        setattr(kept, descriptor.name, value)
                kept.dims.extend(tensor.dims)
                target = layout.get(tensor.name, locations[0])
                offset = align(streams[target])
                length = streams[target].write(tensor.raw_data)
            else:
                kept.CopyFrom(tensor)
                continue
            refer(kept, new_names[target], offset, length)
    return proto


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor refer to bytes in a file, in place of its own."""
    tensor.raw_data = b""  # set_external_data wants the field
    set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")


def share_external(model: onnx.ModelProto, path: Path, folder: Path) -> onnx.ModelProto:
    """Return the model to write to the temporary file `path`: it shares the data files in `folder`.

    Files in other folders are copied beside `path` once. Large new tensors get a data file of their own.
    """
    names = {old: _copy_once(folder / old, path.parent) for old in set(find_locations(model).values())}
    proto = onnx.ModelProto()
    copy_fields(model, proto, skip={"graph"})
    copy_fields(model.graph, proto.graph, skip={"initializer"})
    with contextlib.ExitStack() as files:
        stream: IO[bytes] | None = None
        for tensor in model.graph.initializer:
            kept = proto.graph.initializer.add()
            if uses_external_data(tensor):
                kept.CopyFrom(tensor)
                for entry in kept.external_data:
                    if entry.key == "location":
                        entry.value = names[entry.value]
            elif _is_external(tensor):
                stream = stream or files.enter_context(_open_new(path.parent / f"{path.name}.data"))
                copy_fields(tensor, kept, skip={"raw_data", "data_location"})
                refer(kept, f"{path.name}.data", align(stream), stream.write(tensor.raw_data))
            else:
                kept.CopyFrom(tensor)
    return proto


def _open_new(path: Path) -> IO[bytes]:
    """Open a new file for writing. A session that maps an earlier one of this name keeps that."""
    path.unlink(missing_ok=True)
    return path.open("wb")


def find_free(folder: Path, stem: str) -> Path:
    """A path in a temporary folder for a new model."""
    return next(path for k in itertools.count() if not (path := folder / f"{stem}{k}.onnx").exists())


def _copy_once(source: Path, folder: Path) -> str:
    """Copy a data file into a temporary folder, unless it is there, and return its name.

    onnx refuses symbolic links to data, and files with several hard links.
    """
    real = Path(os.path.realpath(source))
    if real.parent == Path(os.path.realpath(folder)):
        return real.name
    target = folder / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}.shared"
    if not target.exists():
        shutil.copyfile(real, target)
    return target.name


def _is_external(tensor: TensorProto) -> bool:
    """Whether a tensor is stored in a data file, if the model has any."""
    return uses_external_data(tensor) or len(tensor.raw_data) >= EXTERNAL_THRESHOLD


def name_beside(path: Path, suffix: str) -> Path:
    """The path of a file beside another one: its name without the extension, cut if it is too long, and a suffix."""
    return path.parent / (_shorten(path.stem, MAX_NAME_BYTES - len(suffix.encode())) + suffix)


def _shorten(name: str, most: int) -> str:
    """Shorten a name to `most` bytes; a digest of the whole name replaces the end of a longer one."""
    if len(name.encode()) <= most:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[: most - 9].decode(errors="ignore") + f"-{mark}"


def _free_name(path: Path, suffix: str) -> str:
    """A new name for a data file, so that an interrupted write damages no earlier file."""
    stem, k = f"{_shorten(path.name, MAX_STEM_BYTES)}.{suffix}", 0
    name = stem
    while (path.parent / name).exists():
        k += 1
        name = f"{stem}.{k}"
    return name


def align(stream: IO[bytes]) -> int:
    """Write zeros up to the next page, and return the position."""
    stream.write(b"\0" * (-stream.tell() % FILE_ALIGNMENT))
    return stream.tell()


def _append_file(stream: IO[bytes], source: Path, info: ExternalDataInfo) -> tuple[int, int]:
    """Copy the bytes of one tensor in pieces, and return (offset, length) in the new file."""
    start = align(stream)
    begin = info.offset or 0
    left = length = info.length if info.length is not None else source.stat().st_size - begin
    with source.open("rb") as data:
        data.seek(begin)
        while left > 0:
            piece = data.read(min(left, 1 << 24))
            if not piece:
                raise ModelError(f"external data {info.location!r} ended early; copy it again")
            left -= stream.write(piece)
    return start, length


@contextlib.contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[IO[bytes]]:
    """Open a stream whose content replaces the file `path` atomically at the end.

    A link keeps pointing to its file, which is replaced; what is not a regular file is refused.
    """
    path = Path(os.path.realpath(path))  # Path.resolve fails for a link to itself
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a regular file")
    handle, name = create_file(path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            if lasting:
                os.fsync(stream.fileno())
        _move_file(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _move_file(name: Path, path: Path) -> None:
    """Replace a file by another. Windows refuses that while another program has it open, often for a moment."""
    for seconds in WAITS if sys.platform == "win32" else ():
        with contextlib.suppress(PermissionError):
            os.replace(name, path)
            return
        time.sleep(seconds)
    try:
        os.replace(name, path)
    except PermissionError as error:
        if sys.platform == "win32":
            raise PermissionError(errno.EACCES, "another program has it open; close that, and try again") from error
        raise


@contextlib.contextmanager
def workspace(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Create a temporary folder for candidates, beside the output if there is one, because space is needed there."""
    where = None if output is None else Path(os.path.realpath(output)).parent
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(where))
        except OSError as error:
            raise UsageError(f"nothing can be written in {str(where)!r}: {error.strerror}") from error
        yield folder
