"""ONNX file ↔ graph, with nothing lost either way.

The graph that passes edit is onnx-graphsurgeon's, but it is written back *over the original file's own
messages*: every node, initializer and field that no pass touched is copied verbatim, so metadata,
documentation, denotations, annotations, functions, sparse initializers and foreign attributes survive by
construction. Weights stay where they are (in the file, for external data) until someone reads them.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from pwopt.errors import ModelError, PwoptError, UsageError
from pwopt.shapes import Shape, infer, known, objection
from pwopt.storage import check_external, copy_fields, data_files_of, externalise, locations_of, replacing

#: Since this IR version an initializer that is also an input is a default that callers may override.
OVERRIDABLE_SINCE_IR = 4
#: Since this IR version a model names its opsets; before, it is opset 1.
OPSETS_SINCE_IR = 3


class StoredValues(LazyValues):  # type: ignore[misc]
    """Values of an initializer, read from its message or its file each time they are asked for."""

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        self.tensor, self.folder = tensor, folder
        self.shape = tuple(tensor.dims)
        try:
            self.dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except KeyError:
            raise ModelError(f"initializer {tensor.name!r} has no valid type; export the model again") from None
        elements = math.prod(self.shape)
        inside = tensor.data_location != TensorProto.EXTERNAL
        if min(self.shape, default=0) < 0 or (
            inside and elements > 8 * tensor.ByteSize()
        ):  # no type has less than a bit
            raise ModelError(f"initializer {tensor.name!r} does not hold what its shape says; export the model again")
        self.nbytes = elements * self.dtype.itemsize

    def load(self) -> np.ndarray:
        try:
            return np.array(numpy_helper.to_array(self.tensor, str(self.folder or "")))
        except (ValueError, TypeError, OSError, onnx.checker.ValidationError) as error:
            raise ModelError(f"initializer {self.tensor.name!r} cannot be read: {error}") from error


@dataclass(eq=False)
class Model:
    """A model being optimised.

    Attributes
    ----------
    graph : gs.Graph
        What passes edit. Tensors carry inferred shapes and types. Initializers that callers may
        override are graph inputs here, not constants.
    proto : onnx.ModelProto
        The model as read; external data is not loaded into it.
    folder : Path or None
        Where its external data lies.
    """

    graph: gs.Graph
    proto: onnx.ModelProto
    folder: Path | None = None
    _nodes: dict[int, tuple[gs.Node, onnx.NodeProto, dict[str, Any]]] = field(default_factory=dict, repr=False)
    _constants: dict[str, tuple[gs.Constant, TensorProto]] = field(default_factory=dict, repr=False)

    @property
    def opset(self) -> int:
        return int(self.graph.opset)

    @property
    def layout(self) -> dict[str, str]:
        """Which tensor lies in which external file."""
        return locations_of(self.proto)

    def names(self) -> set[str]:
        """Names that new tensors must not take, though the graph may not show them."""
        return {t.name for t in self.proto.graph.initializer} | {
            s.values.name for s in self.proto.graph.sparse_initializer
        }

    def to_proto(self) -> onnx.ModelProto:
        """The graph as a model: the original's messages wherever the graph still says the same."""
        if self.unchanged():
            return self.proto
        model = onnx.ModelProto()
        copy_fields(self.proto, model, skip={"graph"})
        old, new = self.proto.graph, model.graph
        copy_fields(old, new, skip={"node", "initializer", "input", "value_info", "quantization_annotation"})
        new.node.extend(self._node_protos())

        constants = self._constant_tensors()
        written = set()
        for tensor in old.initializer:
            if tensor.name not in self._constants:  # overridable, or read by nobody from the start
                new.initializer.append(tensor)
            elif tensor.name in constants:
                new.initializer.append(self._constant_proto(constants[tensor.name]))
            else:
                continue
            written.add(tensor.name)
        added = [c for name, c in constants.items() if name not in written]
        new.initializer.extend(self._constant_proto(c) for c in added)
        written.update(c.name for c in added)

        listed_initializers = {t.name for t in old.initializer}
        dims = {t.name: tuple(t.dims) for t in new.initializer}
        stale = {n for n, size in dims.items() if n in self._constants and size != tuple(self._constants[n][1].dims)}
        stale |= {n for n in dims if n not in self._constants}  # a Constant node's, until it became an initializer
        for value in old.input:
            if value.name not in listed_initializers or value.name in written:
                new.input.append(value)
                if value.name in stale:
                    _declare(new.input[-1], dims[value.name])
        if self.proto.ir_version < OVERRIDABLE_SINCE_IR:  # there, every initializer is listed as an input
            new.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
                for t in new.initializer[len(new.initializer) - len(added) :]
            )
        names = {name for node in new.node for name in node.output} | written
        new.value_info.extend(v for v in old.value_info if v.name in names - stale)
        new.quantization_annotation.extend(q for q in old.quantization_annotation if q.tensor_name in names)
        return model

    def unchanged(self) -> bool:
        """Whether the graph still says exactly what the file said."""
        if len(self.graph.nodes) != len(self.proto.graph.node):
            return False
        pairs = zip(self.graph.nodes, self.proto.graph.node, strict=True)
        same = all(_same_edges(node, proto) and self._original(node) is proto for node, proto in pairs)
        held = all(
            name in self._constants and self._constants[name][0] is c and isinstance(c._values, StoredValues)
            for name, c in self._constant_tensors().items()
        )
        return same and held

    def _original(self, node: gs.Node) -> onnx.NodeProto | None:
        """The message a node came from, if its operator and attributes are still those."""
        found = self._nodes.get(id(node))
        if found is None or found[0] is not node:
            return None
        _, proto, attrs = found
        same = (node.op, node.name, node.domain or "") == (proto.op_type, proto.name, proto.domain)
        return proto if same and _snapshot(node.attrs) == attrs else None

    def _node_protos(self) -> Iterator[onnx.NodeProto]:
        for node in self.graph.nodes:
            proto = self._original(node)
            if proto is None:
                yield OnnxExporter.export_node(node)
                continue
            if not _same_edges(node, proto):
                original, proto = proto, onnx.NodeProto()
                proto.CopyFrom(original)
                proto.input[:] = [t.name for t in node.inputs]
                proto.output[:] = [t.name for t in node.outputs]
            yield proto

    def _constant_tensors(self) -> dict[str, gs.Constant]:
        """Constants in use, by name: read by a node or captured by a body, or being a graph output."""
        captured = captured_names(self.proto.graph.node)
        used = {t.name: t for node in self.graph.nodes for t in node.inputs if isinstance(t, gs.Constant)} | {
            t.name: t for t in self.graph.outputs if isinstance(t, gs.Constant)
        }
        for name, (constant, _) in self._constants.items():
            if name in captured:
                used.setdefault(name, constant)
        return used

    def _constant_proto(self, constant: gs.Constant) -> TensorProto:
        held, proto = self._constants.get(constant.name, (None, TensorProto()))
        if held is constant:
            if isinstance(constant._values, StoredValues):
                return proto
            if np.array_equal(StoredValues(proto, self.folder).load(), constant._values):
                return proto
        return numpy_helper.from_array(np.asarray(constant.values), constant.name)


def _same_edges(node: gs.Node, proto: onnx.NodeProto) -> bool:
    return [t.name for t in node.inputs] == list(proto.input) and [t.name for t in node.outputs] == list(proto.output)


def _snapshot(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: tuple(v) if isinstance(v, list) else v if isinstance(v, (int, float, str, bytes)) else id(v)
        for k, v in attrs.items()
    }


def captured_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names that bodies of If, Loop, Scan… refer to at any depth; outer tensors among them must not change."""
    names: set[str] = set()
    pending = [(node, False) for node in nodes]
    while pending:
        node, inside = pending.pop()
        if inside:
            names.update(node.input)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                names.update(output.name for output in body.output)
                pending.extend((inner, True) for inner in body.node)
    return names


def load(source: str | os.PathLike[str] | onnx.ModelProto | Model) -> Model:
    """Read a model for optimisation.

    Parameters
    ----------
    source : path, onnx.ModelProto or Model
        A file (its external data is checked and left where it is), or a model in memory; of a Model, a copy.

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
    if isinstance(source, Model):
        return from_proto(source.to_proto(), source.folder)
    if isinstance(source, onnx.ModelProto):
        proto, folder = source, None
    else:
        path = Path(source)
        proto, folder = _read(path), path.resolve().parent
    _check(proto)
    check_external(proto, folder)
    with blaming(proto):
        return from_proto(proto, folder)


@contextlib.contextmanager
def blaming(proto: onnx.ModelProto) -> Iterator[None]:
    """Where a model that onnx's checker objects to makes pwopt stumble, the error is the model's: a `ModelError`.

    The checker is asked only then, since onnxruntime runs models that it refuses.
    """
    try:
        yield
    except PwoptError:
        raise
    except MemoryError as error:
        raise ModelError("there is not enough memory for this model; optimise it on a larger machine") from error
    except Exception as error:
        reason = objection(proto)
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
        raise ModelError(f"{str(path)!r} is not an ONNX model ({error}); export it again") from error
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise ModelError(f"{str(path)!r} is not an ONNX model (it has no graph with outputs); export it again")
    return proto


def _check(proto: onnx.ModelProto) -> None:
    """Known versions, single assignment, defined inputs; the rest is left to the runtime."""
    newest = onnx.defs.onnx_opset_version()
    opsets = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    if len(opsets) > 1 or (not proto.opset_import and proto.ir_version >= OPSETS_SINCE_IR):
        raise ModelError(f"the model names {len(opsets) or 'no'} opsets of ONNX, not one; export it again")
    if opsets and not 1 <= opsets[0] <= newest:
        raise ModelError(f"the model uses opset {opsets[0]}, and the installed onnx knows 1 to {newest}; upgrade onnx")
    if not 1 <= proto.ir_version <= onnx.IR_VERSION:
        known_versions = f"the installed onnx knows 1 to {onnx.IR_VERSION}"
        raise ModelError(f"the model has IR version {proto.ir_version}, and {known_versions}; upgrade onnx")
    graph = proto.graph
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
    stuck = _first_in_cycle(graph)
    if stuck is not None:
        raise ModelError(f"node {stuck!r} depends on its own output; export the model again")


def _first_in_cycle(graph: onnx.GraphProto) -> str | None:
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    waiting = [0] * len(graph.node)
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(graph.node):
        for name in node.input:
            if name in producer:
                waiting[i] += 1
                readers.setdefault(producer[name], []).append(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    while ready:
        for j in readers.get(ready.pop(), []):
            waiting[j] -= 1
            if waiting[j] == 0:
                ready.append(j)
    stuck = next((i for i, count in enumerate(waiting) if count > 0), None)
    return None if stuck is None else graph.node[stuck].name or graph.node[stuck].output[0]


def from_proto(proto: onnx.ModelProto, folder: Path | None = None) -> Model:
    """Build the graph: nodes through graphsurgeon, weights as views of their messages, shapes from inference."""
    listed = {v.name for v in proto.graph.input}
    fixed = proto.ir_version < OVERRIDABLE_SINCE_IR
    constants = {t.name: t for t in proto.graph.initializer if fixed or t.name not in listed}

    shell = onnx.ModelProto(ir_version=proto.ir_version)
    shell.opset_import.extend(proto.opset_import)
    shell.functions.extend(proto.functions)
    shell.graph.name = proto.graph.name
    shell.graph.input.extend(v for v in proto.graph.input if v.name not in constants)
    shell.graph.output.extend(proto.graph.output)
    shell.graph.node.extend(proto.graph.node)
    for node in shell.graph.node:
        for attribute in [a for a in node.attribute if a.type == a.STRING and not _is_text(a.s)]:
            node.attribute.remove(attribute)  # graphsurgeon decodes strings; the original message keeps them

    severity, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        graph = gs.import_onnx(shell)
    except Exception as error:
        raise ModelError(f"the graph cannot be read: {objection(proto) or error}") from error
    finally:
        G_LOGGER.severity = severity

    model = Model(graph, proto, folder)
    for node, message in zip(graph.nodes, proto.graph.node, strict=True):
        if node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant):
            node.attrs["value"]._values = StoredValues(message.attribute[0].t, folder)  # which knows every type
        model._nodes[id(node)] = (node, message, _snapshot(node.attrs))
    tensors = {t.name: t for node in graph.nodes for t in (*node.inputs, *node.outputs)}
    tensors.update({t.name: t for t in (*graph.inputs, *graph.outputs)})
    for name, tensor in constants.items():
        if name in tensors:
            constant = tensors[name].to_constant(StoredValues(tensor, folder))
            model._constants[name] = (constant, tensor)
    annotate(model, infer(proto))
    return model


def _is_text(value: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return value.decode() is not None
    return False


def annotate(model: Model, types: Mapping[str, tuple[int, Shape | None]]) -> None:
    """Give every variable of the graph its inferred type and shape, None where unknown."""
    graph = model.graph
    for tensor in (t for node in graph.nodes for t in (*node.inputs, *node.outputs)):
        if isinstance(tensor, gs.Variable) and not tensor.is_empty():
            code, shape = types.get(tensor.name, (0, None))
            tensor.shape = shape
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(code) if code else None


def with_fixed_inputs(proto: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The model with its input shapes fixed, and every declared shape that follows from them.

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
        shape = known(types[value.name][1])
        if shape is None:
            raise UsageError(f"--static needs every size of input {value.name!r}; give --shape {value.name}=…")
        _declare(value, shape)
    for value in [*model.graph.output, *model.graph.value_info]:
        shape = known(types.get(value.name, (0, None))[1])
        if shape is not None and value.type.HasField("tensor_type"):
            _declare(value, shape)
    return model


def _declare(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    declared = value.type.tensor_type.shape
    if len(declared.dim) != len(shape):
        del declared.dim[:]
        for _ in shape:
            declared.dim.add()
    for dim, size in zip(declared.dim, shape, strict=True):
        dim.dim_value = size


def save(model: Model | onnx.ModelProto, path: str | os.PathLike[str], source: Model | None = None) -> None:
    """Write a model atomically: the file appears complete, or not at all.

    External data stays external, in as many files as before, named after the new model.

    Parameters
    ----------
    model : Model or onnx.ModelProto
    path : path
        The new file; one that exists is replaced.
    source : Model, optional
        What an `onnx.ModelProto` was made from: it knows where external data lies, and in which files.

    Raises
    ------
    ModelError
        If the file cannot be written.
    """
    path = Path(path)
    if isinstance(model, Model):
        model, source = model.to_proto(), model
    try:
        leftover = data_files_of(path)
        folder, layout = (source.folder, source.layout) if source is not None else (None, {})
        proto = externalise(model, path, folder, layout)
        with replacing(path) as stream:
            stream.write(proto.SerializeToString(deterministic=True))
        for name in leftover.difference(locations_of(proto).values()):
            (path.parent / name).unlink(missing_ok=True)
    except EncodeError as error:
        raise ModelError(f"{str(path)!r} cannot be written: over 2 GB without external data") from error
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def as_file(model: str | os.PathLike[str] | onnx.ModelProto | Model) -> Iterator[Path]:
    """The model as a file for as long as the context lasts: its own, or a temporary one if it is in memory."""
    if not isinstance(model, (onnx.ModelProto, Model)):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        yield path
