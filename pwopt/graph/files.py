"""Reads, checks and writes models."""

from __future__ import annotations

import contextlib
import graphlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx_graphsurgeon.logger import G_LOGGER

from pwopt.algebra import Values
from pwopt.errors import ModelError, PwoptError, UsageError
from pwopt.graph.constants import MAX_FOLDED_BYTES
from pwopt.graph.dtypes import is_floating
from pwopt.graph.importing import import_graph
from pwopt.graph.ir import Constant, Node, Variable
from pwopt.graph.model import Model, StoredValues, read_declared
from pwopt.graph.model import declare as declare
from pwopt.graph.model import snapshot as snapshot
from pwopt.graph.moved_weights import has_moved, move_weights, write_inline
from pwopt.graph.references import names_in_annotations, names_in_training
from pwopt.graph.repetitions import STANDARD, drop_repetitions
from pwopt.graph.shapes import OVERRIDABLE_SINCE_IR, Shape, as_fixed, find_objection, infer
from pwopt.graph.sources import Source as Source
from pwopt.graph.sources import unwrap
from pwopt.graph.storage import (
    check_external,
    externalise,
    find_data_files,
    find_data_folder,
    find_locations,
    replacing,
    share_external,
)
from pwopt.graph.temporary import temporary_folder

#: Since this IR version, a model names its opsets; before, it uses opset 1.
OPSETS_SINCE_IR = 3


def load(source: Source, weights: Path | None = None) -> Model:
    """Read a model for optimisation.

    Parameters
    ----------
    source : path, bytes, onnx.ModelProto, torch.onnx.ONNXProgram, onnx_ir.Model or Model
        A file (its external data is checked and left where it is), or a model in memory; of a Model, a copy.
    weights : Path, optional
        A folder into which the weights of a large model are moved (`pwopt.graph.moved_weights`). It must exist for as
        long as the model is used.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file is not a valid ONNX model, or refers to data outside its own folder.

    Examples
    --------
    >>> import pwopt
    >>> model = pwopt.load("models/linear_sequence.onnx")
    >>> [node.op for node in model.graph.nodes]
    ['Conv', 'Conv', 'Conv', 'Conv']
    """
    folder: Path | None
    target: Path | None = None
    given = unwrap(source)
    if isinstance(given, Model):
        return from_proto(*_move(given.to_proto(), given.folder, weights))
    if isinstance(given, onnx.ModelProto):
        proto, folder = given, None
    else:
        proto = _read(given)
        folder = find_data_folder(proto, given)
        target = Path(os.path.realpath(given)).parent
    proto = drop_repetitions(proto)
    _check(proto)
    check_external(proto, folder, target)
    proto, folder = _move(proto, folder, weights)
    with blame_model(proto):
        return from_proto(proto, folder)


def _move(proto: onnx.ModelProto, folder: Path | None, weights: Path | None) -> tuple[onnx.ModelProto, Path | None]:
    """Move large weights into the folder `weights`, if there is one; also return the folder of external data."""
    if weights is None:
        return proto, folder
    moved = move_weights(proto, weights)
    return (proto, folder) if moved is proto else (moved, weights)


@contextlib.contextmanager
def blame_model(proto: onnx.ModelProto) -> Iterator[None]:
    """Turn an error into a `ModelError` if onnx's checker rejects the model.

    The checker runs only after an error, since onnxruntime runs models that it rejects.
    """
    try:
        yield
    except PwoptError:
        raise
    except MemoryError as error:
        raise ModelError("there is not enough memory for this model; optimise it on a larger machine") from error
    except Exception as error:
        reason = find_objection(proto)
        if not reason:
            raise
        raise ModelError(f"the model is not valid: {reason}") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        if not path.exists():
            raise UsageError(f"there is no file {str(path)!r}; give the path of an ONNX model")
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ModelError(f"{str(path)!r} is {what}; give the path of an ONNX model")
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{str(path)!r} is not an ONNX model ({error}); give the path of an .onnx file, or export it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if not proto.HasField("graph"):
        raise ModelError(
            f"{str(path)!r} is not an ONNX model (it has no graph); give the path of an .onnx file, or export it again"
        )
    return proto


def _check(proto: onnx.ModelProto) -> None:
    """Check versions, single assignment and defined inputs. The runtime checks the rest."""
    newest = onnx.defs.onnx_opset_version()
    opsets = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    if not proto.opset_import and proto.ir_version >= OPSETS_SINCE_IR:
        raise ModelError("the model names no opset of ONNX; export it again")
    if opsets and not 1 <= opsets[0] <= newest:
        raise ModelError(f"the model uses opset {opsets[0]}, and the installed onnx knows 1 to {newest}; upgrade onnx")
    if not 1 <= proto.ir_version <= onnx.IR_VERSION:
        known_versions = f"the installed onnx knows 1 to {onnx.IR_VERSION}"
        raise ModelError(f"the model has IR version {proto.ir_version}, and {known_versions}; upgrade onnx")
    graph = proto.graph
    if not graph.output:
        raise ModelError("the model has no outputs, so nothing that it computes can be used; export it with outputs")
    for group in (graph.initializer, graph.input):
        names = [v.name for v in group]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ModelError(f"tensor {twice!r} is defined twice; export the model again")
    start = {v.name for v in graph.input} | {v.name for v in graph.initializer}
    start |= {s.values.name for s in graph.sparse_initializer}
    produced = [name for node in graph.node for name in node.output if name]
    defined = start.union(produced)
    if len(defined) < len(start) + len(produced):
        seen = set(start)
        twice = next(name for name in produced if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ModelError(f"tensor {twice!r} is defined twice; export the model again")
    for name in [name for node in graph.node for name in node.input] + [v.name for v in graph.output]:
        if name and name not in defined:
            raise ModelError(f"tensor {name!r} is used but nothing defines it; export the model again")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("strides", "dilations") and min(attribute.ints, default=1) < 1:
                # onnx before 1.22 divides by them
                at = node.name or (node.output[0] if node.output else node.op_type)
                raise ModelError(f"node {at!r} has {attribute.name} below 1; export the model again")
    name = _find_cycle(graph)
    if name is not None:
        raise ModelError(f"node {name!r} depends on its own output; export the model again")


def _find_cycle(graph: onnx.GraphProto) -> str | None:
    """The name of a node that depends on its own output."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reads = {i: [producer[n] for n in node.input if n in producer] for i, node in enumerate(graph.node)}
    try:
        graphlib.TopologicalSorter(reads).prepare()
    except graphlib.CycleError as error:
        node: onnx.NodeProto = graph.node[min(error.args[1])]
        return str(node.name or node.output[0])
    return None


def from_proto(proto: onnx.ModelProto, folder: Path | None = None) -> Model:
    """Build the graph, with weights as views of their messages, and shapes by inference."""
    listed = {v.name for v in proto.graph.input}
    fixed = proto.ir_version < OVERRIDABLE_SINCE_IR
    trained = names_in_training(proto)
    constants = {
        t.name: t for t in proto.graph.initializer if (fixed or t.name not in listed) and t.name not in trained
    }

    severity, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        graph = import_graph(proto, constants.keys())
    except Exception as error:
        raise ModelError(f"the graph cannot be read: {find_objection(proto) or error}") from error
    finally:
        G_LOGGER.severity = severity

    graph.trained, graph.annotated = trained, names_in_annotations(proto)
    model = Model(graph, proto, folder)
    for node, message in zip(graph.nodes, proto.graph.node, strict=True):
        if node.op == "Constant":
            _read_constant(node, message, folder)
        model._nodes[node] = (message, snapshot(node.attrs))
    tensors = {t.name: t for node in graph.nodes for t in (*node.inputs, *node.outputs)}
    tensors.update({t.name: t for t in (*graph.inputs, *graph.outputs)})
    for name, tensor in constants.items():
        if name in tensors:
            constant = tensors[name].to_constant(StoredValues(tensor, folder))
            model._constants[name] = (constant, tensor)
    annotate(model, infer(proto))
    return model


def _read_constant(node: Node, message: onnx.NodeProto, folder: Path | None) -> None:
    """Give a Constant node its tensor, with values of every type; a small sparse tensor is written out."""
    if isinstance(node.attrs.get("value"), Constant):
        node.attrs["value"].stored = StoredValues(message.attribute[0].t, folder)
    sparse = next((a.sparse_tensor for a in message.attribute if a.name == "sparse_value"), None)
    dense = None if sparse is None or (node.domain or "") not in STANDARD else _write_out(sparse)
    if dense is not None:
        node.attrs["value"] = Constant(f"{message.output[0]}_value", dense)


def _write_out(sparse: onnx.SparseTensorProto) -> Values | None:
    """All elements of a sparse tensor; None if it is large, stored elsewhere, or contradicts itself."""
    sizes, stored = tuple(sparse.dims), (sparse.values, sparse.indices)
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in stored) or min(sizes, default=0) < 0:
        return None
    try:
        values, places = (onnx.numpy_helper.to_array(t) for t in stored)
        numeric = values.dtype.kind in "iub" or is_floating(values.dtype)
        if not numeric or math.prod(sizes) * values.itemsize > MAX_FOLDED_BYTES or places.dtype != np.int64:
            return None
        flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), sizes)
        dense = np.zeros(math.prod(sizes), values.dtype)
        if flat.shape != values.shape or np.any((flat < 0) | (flat >= dense.size)) or len(set(flat)) < len(flat):
            return None
        dense[flat] = values
    except (ValueError, TypeError):
        return None
    return dense.reshape(sizes)


def annotate(model: Model, types: Mapping[str, tuple[int, Shape | None]]) -> None:
    """Give every variable of the graph its inferred type and shape, None where unknown."""
    graph, declared = model.graph, read_declared(model.proto)
    dtypes: dict[int, object] = {0: None}
    for tensor in dict.fromkeys(t for node in graph.nodes for t in (*node.inputs, *node.outputs)):
        if isinstance(tensor, Variable) and tensor.name:
            code, shape = types.get(tensor.name, (0, None))
            if code not in dtypes:
                dtypes[code] = onnx.helper.tensor_dtype_to_np_dtype(code)
            tensor.annotate(dtypes[code], shape, declared.get(tensor.name))


def fix_inputs(proto: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """Fix the input shapes of a model, and the declared shapes that depend on them.

    Raises
    ------
    UsageError
        If an input keeps a dimension that is not fixed.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    initialized = {t.name for t in proto.graph.initializer}
    types = infer(proto, inputs)
    for value in model.graph.input:
        if value.name in initialized or not value.type.HasField("tensor_type"):
            continue
        shape = as_fixed(types[value.name][1])
        if shape is None:
            raise UsageError(f"--static needs every size of input {value.name!r}; give --shape {value.name}=…")
        declare(value, shape)
    for value in [*model.graph.output, *model.graph.value_info]:
        shape = as_fixed(types.get(value.name, (0, None))[1])
        if shape is not None and value.type.HasField("tensor_type"):
            declare(value, shape)
    return model


def save(
    model: Model | onnx.ModelProto,
    path: str | os.PathLike[str],
    source: Model | None = None,
    *,
    lasting: bool = True,
) -> None:
    """Write a model atomically: the file appears complete, or not at all.

    External data stays external, in as many files as before, named after the new model. Moved weights are written into
    the file (`pwopt.graph.moved_weights`).

    Parameters
    ----------
    model : Model or onnx.ModelProto
    path : path
        The file to write; an existing file is replaced.
    source : Model, optional
        The model from which an `onnx.ModelProto` was made. It knows the files of external data.
    lasting : bool
        Wait until the file is on the disk, so that a power failure cannot leave an incomplete file.

    Raises
    ------
    UsageError
        If the file cannot be written.
    ModelError
        If the model is too large for one file.
    """
    path = Path(path)
    if isinstance(model, Model):
        model, source = model.to_proto(), model
    try:
        leftover = find_data_files(path)
        folder, layout = (source.folder, source.layout) if source is not None else (None, {})
        inline = folder is not None and source is not None and has_moved(source.proto)
        proto = model if inline else externalise(model, path, folder, layout)
        with replacing(path, lasting=lasting) as stream:
            if inline and folder is not None:
                write_inline(model, folder, stream)
            else:
                stream.write(proto.SerializeToString(deterministic=True))
        for name in leftover.difference(find_locations(proto).values()):
            with contextlib.suppress(PermissionError):  # Windows, while somebody has it open
                (path.parent / name).unlink(missing_ok=True)
    except EncodeError as error:
        raise ModelError(f"{str(path)!r} cannot be written: over 2 GB without external data") from error
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def save_temporary(model: onnx.ModelProto, path: Path, source: Model) -> None:
    """Write a model made from `source` into a temporary folder; it shares the files of external data.

    Raises
    ------
    UsageError
        If the file cannot be written.
    ModelError
        If the model is too large for one file.
    """
    if source.folder is None or not source.layout:
        save(model, path, source, lasting=False)
        return
    try:
        proto = share_external(model, path, source.folder)
        with replacing(path, lasting=False) as stream:
            stream.write(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def as_file(model: Source) -> Iterator[Path]:
    """Give the model's own file, or a temporary file of a model in memory while the context lasts."""
    given = unwrap(model)
    if isinstance(given, Path):
        yield given
        return
    with temporary_folder() as folder:
        path = folder / "model.onnx"
        save(given, path)
        yield path
