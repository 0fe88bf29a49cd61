"""Sizes for the dynamic dimensions of a model's inputs."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pwopt.errors import ModelError, UsageError
from pwopt.graph.shapes import Shape, known
from pwopt.running.inputs import InputSpec, check_shapes
from pwopt.running.runtime import Session, available
from pwopt.running.samples import make_feeds

Sizes = dict[str, tuple[int, ...]]

#: Sizes (height, width) to try for dynamic images, in order: classifiers, detectors, text recognisers.
IMAGE_SIZES = ((224, 224), (320, 320), (640, 640), (48, 320), (32, 320), (48, 192), (256, 256), (512, 512))
#: Length to try for any other dynamic axis.
LENGTH = 64
#: Sizes that are tried besides may have this many times the elements of the first ones.
GROWTH = 4


def candidate_shapes(
    specs: Sequence[InputSpec],
    given: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    length: int = LENGTH,
) -> Iterator[Sizes]:
    """Shapes to try for inputs with dynamic dimensions, the likeliest first.

    First axes are batches, images have 3 channels; equal names get equal sizes. `given` shapes are kept.
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
                size = batch if axis == 0 else _guess(spec.shape or (), spec.dtype, axis, image, length)
                guess.append(names.setdefault(d, size) if isinstance(d, str) and d != "?" else size)
            shapes[spec.name] = tuple(guess)
        key = tuple(sorted(shapes.items()))
        if key not in tried:
            tried.add(key)
            yield shapes


def _guess(shape: Shape, dtype: np.dtype[Any], axis: int, image: tuple[int, int], length: int) -> int:
    if len(shape) == 4 and dtype.kind == "f":
        channel = 3 if shape[-1] in (1, 3) else 1  # channels last, or as usual
        spatial = [a for a in (1, 2, 3) if a != channel]
        return 3 if axis == channel else image[spatial.index(axis)]
    return length


def likely_sizes(
    specs: Sequence[InputSpec],
    path: str | os.PathLike[str],
    provider: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    must_run: bool = True,
) -> Sizes:
    """Sizes for every input: the given ones, and the first likely ones on which the model runs.

    Parameters
    ----------
    must_run : bool
        Whether it is an error if it runs on none, or there is no onnxruntime; else the likeliest are taken then.

    Raises
    ------
    UsageError
        If the model runs on none of them.
    """
    likeliest = next(candidate_shapes(specs, shapes))
    settled = all(s.name in (shapes or {}) or known(s.shape) is not None for s in specs)
    if not must_run and (settled or not available()):
        return likeliest
    failure: ModelError | None = None
    try:
        session = Session(path, provider, optimise=False)
    except ModelError:
        if must_run:
            raise
        return likeliest
    for candidate in candidate_shapes(specs, shapes):
        try:
            session.run(make_feeds(specs, candidate))
        except ModelError as error:
            failure = failure or error
            continue
        return candidate
    if not must_run:
        return likeliest
    if settled:
        raise UsageError(f"the model does not run at its sizes: {failure}; give others, or --input FILE.npz")
    names = " ".join(f"--shape {s.name}=…" for s in specs if known(s.shape) is None)
    raise UsageError(f"no likely size runs ({failure}); give {names} or --input FILE.npz")


def other_sizes(
    specs: Sequence[InputSpec], path: str | os.PathLike[str], first: Mapping[str, Sequence[int]], provider: str = "cpu"
) -> Sizes | None:
    """Sizes on which the model runs as well as on `first`, with as many dynamic dimensions changed as possible.

    None if every size is fixed, or no other likely ones of up to `GROWTH` times the elements run.
    """
    session = Session(path, provider, optimise=False)
    tried = [
        sizes
        for batch, length in itertools.product((2, 1), (LENGTH // 2, LENGTH))
        for sizes in candidate_shapes(specs, None, batch, length)
    ]

    def changes(sizes: Sizes) -> int:
        return sum(a != b for name in first for a, b in zip(sizes[name], first[name], strict=True))

    largest = GROWTH * _elements(first)
    for sizes in sorted(tried, key=changes, reverse=True):
        if not changes(sizes) or _elements(sizes) > largest:
            continue
        try:
            session.run(make_feeds(specs, sizes))
        except ModelError:
            continue
        return sizes
    return None


def _elements(sizes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in sizes.values())


def rounds(
    specs: Sequence[InputSpec],
    path: str | os.PathLike[str],
    provider: str = "cpu",
    given: Sequence[Mapping[str, Sequence[int]]] = (),
) -> list[Sizes]:
    """Sizes to compare two models on: the given ones, or the likeliest and other ones.

    Raises
    ------
    UsageError
        If sizes do not fit the inputs, or the model does not run on them.
    """
    for shapes in given:
        check_shapes(specs, shapes)
    if any(given):
        return [likely_sizes(specs, path, provider, shapes) for shapes in given]
    first = likely_sizes(specs, path, provider)
    second = other_sizes(specs, path, first, provider)
    return [first] if second is None else [first, second]


def narrowed(specs: Sequence[InputSpec], other: Sequence[InputSpec]) -> list[InputSpec]:
    """Inputs with the sizes that either of two models fixes, for comparing a model with its fixed variant."""
    fixed = {s.name: s.shape for s in other}

    def narrow(spec: InputSpec) -> InputSpec:
        theirs = fixed.get(spec.name)
        if spec.shape is None or theirs is None or len(theirs) != len(spec.shape):
            return spec
        return replace(
            spec,
            shape=tuple(
                b if isinstance(b, int) and not isinstance(a, int) else a
                for a, b in zip(spec.shape, theirs, strict=True)
            ),
        )

    return [narrow(spec) for spec in specs]
