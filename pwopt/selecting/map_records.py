"""Common parts of `inspect` and `properties`: a model at representative sizes, and one record for each map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pwopt.graph.files import Source, load
from pwopt.graph.model import Model
from pwopt.inputs.input_specs import input_specs
from pwopt.running.size_trials import Sizes, choose_sizes

T = TypeVar("T")


@dataclass(frozen=True)
class Listing(Generic[T]):
    """Records of the maps of a model in the file's order, and the input sizes of their figures."""

    maps: tuple[T, ...]
    shapes: Sizes

    def __iter__(self) -> Iterator[T]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)


def load_sized(model: Source, shapes: Mapping[str, Sequence[int]] | None) -> tuple[Model, Sizes]:
    """Load a model, and choose sizes of its inputs without running it.

    Raises
    ------
    UsageError, ModelError
        See `pwopt.errors`.
    """
    original = load(model)
    specs = input_specs(original.proto)
    return original, choose_sizes(specs, original.proto, shapes=shapes).sizes
