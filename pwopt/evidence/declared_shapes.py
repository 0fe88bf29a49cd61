"""Check the declared shapes that pwopt trusts, by running the model.

pwopt trusts the declared shapes of the outputs of operators that neither onnx's inference nor pwopt knows
(`pwopt.graph.shapes.find_declared`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from pwopt.errors import ModelError
from pwopt.evidence.localise import ModelCopy
from pwopt.graph.shapes import Shape, find_declared, read_dims
from pwopt.graph.temporary import temporary_folder
from pwopt.inputs.samples import Sample
from pwopt.running.providers import Provider
from pwopt.running.session import Session


def find_wrong_declarations(
    proto: onnx.ModelProto, path: Path, samples: Sequence[Sample], provider: Provider, threads: int
) -> dict[str, tuple[Shape, Shape]] | None:
    """Find declared shapes that the model contradicts when it runs.

    Parameters
    ----------
    proto : onnx.ModelProto
    path : Path
        Its file.
    samples : sequence of Sample
        The inputs to run it on.
    provider : Provider
    threads : int

    Returns
    -------
    dict or None
        Tensor → its declared shape and its true one. None if the model does not run with these tensors as outputs.
    """
    codes = {v.name: v.type.tensor_type.elem_type for v in find_declared(proto)}
    wrong: dict[str, tuple[Shape, Shape]] = {}
    try:
        with temporary_folder() as folder:
            session = Session(ModelCopy.from_path(path, folder / "model").expose(codes), provider, threads)
            for sample in samples:
                declared = _read_declared(proto, sample)
                for name, value in zip(session.outputs, session.run(sample.feeds), strict=True):
                    shape = tuple(value.shape)
                    if not _agrees(declared[name], shape):
                        wrong[name] = declared[name], shape
    except (ModelError, OSError, AttributeError):  # a sequence has no shape
        return None
    return wrong


def _read_declared(proto: onnx.ModelProto, sample: Sample) -> Mapping[str, Shape]:
    """The declared shapes for the sizes of a sample."""
    sizes = {name: value.shape for name, value in sample.feeds.items()}
    return {v.name: read_dims(v.type) or () for v in find_declared(proto, sizes)}


def _agrees(declared: Shape, shape: Shape) -> bool:
    pairs = zip(declared, shape, strict=False)
    return len(declared) == len(shape) and all(not isinstance(d, int) or d == n for d, n in pairs)


def drop_declarations(proto: onnx.ModelProto, names: Mapping[str, object]) -> onnx.ModelProto:
    """Copy a model without the declared shapes of these tensors."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.value_info[:]
    result.graph.value_info.extend(v for v in proto.graph.value_info if v.name not in names)
    for value in result.graph.output:
        if value.name in names:
            value.type.tensor_type.ClearField("shape")
    return result
