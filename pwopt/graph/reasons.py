"""Reasons: clauses for the user that keep the names in them apart, so that equal reasons can be counted together."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any


class Reason(str):
    """A clause such as "the weight 'w' is shared".

    Parameters
    ----------
    template : str
        As `str.format` takes it. A value with the conversion `!r` is a name in the model.
    *values : object
        A `Reason` among them keeps its own names apart.

    Examples
    --------
    >>> Reason("{} stays: {}", "Gemm", Reason("the weight {!r} is shared", "w")).general
    'Gemm stays: the weight … is shared'
    """

    _template: str
    _values: tuple[object, ...]

    def __new__(cls, template: str, *values: object) -> Reason:
        clause = super().__new__(cls, template.format(*values))
        clause._template, clause._values = template, values
        return clause

    @classmethod
    def list_names(cls, names: Iterable[str]) -> Reason:
        """Names in the model, separated by commas."""
        listed = tuple(names)
        return cls(", ".join(["{!r}"] * len(listed)), *listed)

    @property
    def general(self) -> str:
        """The clause with "…" in place of each name."""
        return _Anonymous().vformat(self._template, self._values, {})

    def __reduce__(self) -> tuple[type[Reason], tuple[object, ...]]:
        return Reason, (self._template, *self._values)


class _Anonymous(string.Formatter):
    """Formats names as "…"."""

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return "…" if conversion == "r" else generalize(value) if isinstance(value, str) else value


def generalize(reason: str) -> str:
    """The clause with "…" in place of each name that it keeps apart."""
    return reason.general if isinstance(reason, Reason) else reason
