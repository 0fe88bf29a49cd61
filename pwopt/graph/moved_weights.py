"""Keeps the weights of a large model in a temporary file while it is optimised.

Weights in a model's own file would be held several times: in the message, in its serialised form, and by onnxruntime,
which parses the whole file before it copies the weights. Moved weights are external data instead. Every candidate
refers to the same file, and onnxruntime maps it. `write_inline` writes them back into a model's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pwopt.errors import ModelError
from pwopt.graph.storage import align, copy_fields, find_locations, refer

#: Weights are moved if they take this many bytes together; each of them takes at least the second number.
MIN_MODEL_BYTES, MIN_TENSOR_BYTES = 64 << 20, 64 << 10
#: The files of moved weights, without and with an explicit `data_location` in the original message.
MOVED_FILES = ("pwopt-moved-weights", "pwopt-moved-weights-declared")
#: protobuf's limit for one message in bytes.
MAX_MESSAGE_BYTES = (1 << 31) - 1
#: Bytes that are copied at once.
PIECE_BYTES = 1 << 24
#: Field numbers in protobuf's messages: of the graph in a model, an initializer in a graph, the bytes in a tensor.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
#: Fields of a tensor that a moved one has and an inline one has not.
EXTERNAL_FIELDS = frozenset({"external_data", "data_location"})


def move_weights(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Move large weights into files in `folder`, if the model has no external data.

    Returns
    -------
    onnx.ModelProto
        A model that refers to the files, or the given one if its weights are small.
    """
    initializers = model.graph.initializer
    if find_locations(model) or _has_unknown_fields(model):
        return model
    if sum(size for t in initializers if (size := len(t.raw_data)) >= MIN_TENSOR_BYTES) < MIN_MODEL_BYTES:
        return model
    moved = onnx.ModelProto()
    copy_fields(model, moved, skip={"graph"})
    copy_fields(model.graph, moved.graph, skip={"initializer"})
    streams: dict[str, IO[bytes]] = {}
    try:
        for tensor in initializers:
            made, raw = moved.graph.initializer.add(), tensor.raw_data
            if len(raw) < MIN_TENSOR_BYTES or tensor.data_location == TensorProto.EXTERNAL:
                made.CopyFrom(tensor)
                continue
            name = MOVED_FILES[tensor.HasField("data_location")]
            stream = streams.get(name) or streams.setdefault(name, (folder / name).open("wb"))
            copy_fields(tensor, made, skip={"raw_data", *EXTERNAL_FIELDS})
            refer(made, name, align(stream), stream.write(raw))
    finally:
        for stream in streams.values():
            stream.close()
    return moved


def _has_unknown_fields(model: onnx.ModelProto) -> bool:
    from google.protobuf.unknown_fields import UnknownFieldSet

    return any(len(UnknownFieldSet(m)) for m in (model, model.graph, *model.graph.initializer))


def is_moved(tensor: TensorProto) -> bool:
    """Whether the bytes of an initializer were moved by `move_weights`."""
    return uses_external_data(tensor) and ExternalDataInfo(tensor).location in MOVED_FILES


def has_moved(model: onnx.ModelProto) -> bool:
    """Whether `move_weights` moved weights of a model, and it has no other external data."""
    names = set(find_locations(model).values())
    return bool(names) and names.issubset(MOVED_FILES)


def load_moved(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """Return a model with its moved weights in its messages again; the given one if it has none."""
    if folder is None or not has_moved(model):
        return model
    whole = onnx.ModelProto()
    copy_fields(model, whole, skip={"graph"})
    copy_fields(model.graph, whole.graph, skip={"initializer"})
    for tensor in model.graph.initializer:
        made = whole.graph.initializer.add()
        if not is_moved(tensor):
            made.CopyFrom(tensor)
            continue
        piece = _Piece.from_tensor(tensor)
        made.CopyFrom(_restore(tensor, piece))
        made.raw_data = b"".join(piece.read(folder))
    return whole


def write_inline(model: onnx.ModelProto, folder: Path, stream: IO[bytes]) -> None:
    """Serialise a model with its moved weights in its messages, one tensor after the other.

    The bytes are those of ``load_moved(model, folder).SerializeToString(deterministic=True)``.

    Raises
    ------
    ModelError
        If the model is too large for one file.
    """
    before, after = _split(model, GRAPH)
    head, tail = _split(model.graph, INITIALIZER)
    sizes = [_count_tensor(tensor) for tensor in model.graph.initializer]
    size = len(head) + sum(len(_prefix(INITIALIZER, n)) + n for n in sizes) + len(tail)
    if len(before) + size + len(after) > MAX_MESSAGE_BYTES:
        raise ModelError("the result takes over 2 GB; store the model with external data")
    stream.write(before + _prefix(GRAPH, size) + head)
    for tensor, length in zip(model.graph.initializer, sizes, strict=True):
        stream.write(_prefix(INITIALIZER, length))
        if not is_moved(tensor):
            stream.write(tensor.SerializeToString(deterministic=True))
            continue
        first, piece, last = _split_tensor(tensor)
        stream.write(first + _prefix(RAW_DATA, piece.length))
        for content in piece.read(folder):
            stream.write(content)
        stream.write(last)
    stream.write(tail + after)


@dataclass(frozen=True)
class _Piece:
    """Where the bytes of a moved tensor lie."""

    location: str
    offset: int
    length: int

    @classmethod
    def from_tensor(cls, tensor: TensorProto) -> _Piece:
        info = ExternalDataInfo(tensor)
        assert info.offset is not None
        assert info.length is not None
        return cls(info.location, info.offset, info.length)

    def read(self, folder: Path) -> Iterator[bytes]:
        with (folder / self.location).open("rb") as data:
            data.seek(self.offset)
            left = self.length
            while left > 0 and (content := data.read(min(left, PIECE_BYTES))):
                left -= len(content)
                yield content


def _count_tensor(tensor: TensorProto) -> int:
    """Count the bytes of a serialised initializer, its moved bytes included."""
    if not is_moved(tensor):
        return int(tensor.ByteSize())
    first, piece, last = _split_tensor(tensor)
    return len(first) + len(_prefix(RAW_DATA, piece.length)) + piece.length + len(last)


def _restore(tensor: TensorProto, piece: _Piece) -> TensorProto:
    """The original message of a moved tensor, without its bytes."""
    inline = TensorProto()
    copy_fields(tensor, inline, skip=set(EXTERNAL_FIELDS))
    if piece.location == MOVED_FILES[1]:
        inline.data_location = TensorProto.DEFAULT
    return inline


def _split_tensor(tensor: TensorProto) -> tuple[bytes, _Piece, bytes]:
    """Serialise what comes before and after the moved bytes of a tensor; also say where they lie."""
    piece = _Piece.from_tensor(tensor)
    first, last = _split(_restore(tensor, piece), RAW_DATA)
    return first, piece, last


def _split(message: onnx.ModelProto | onnx.GraphProto | TensorProto, number: int) -> tuple[bytes, bytes]:
    """Serialise the fields with smaller and with larger numbers than `number`."""
    parts = type(message)(), type(message)()
    names = {d.name: d.number for d, _ in message.ListFields()}
    copy_fields(message, parts[0], skip={name for name, n in names.items() if n >= number})
    copy_fields(message, parts[1], skip={name for name, n in names.items() if n <= number})
    first, last = (part.SerializeToString(deterministic=True) for part in parts)
    return first, last


def _prefix(number: int, length: int) -> bytes:
    """The key of a field with bytes, and their number, as varints."""
    content = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            content.append(value & 0x7F | 0x80)
            value >>= 7
        content.append(value)
    return bytes(content)
