"""Changes that only drop repetitions: both versions apply the same operators to the same inputs, so nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from pwopt.evidence.traits import find_traits
from pwopt.graph.changes import Change
from pwopt.graph.ir import Tensor
from pwopt.graph.journal import State
from pwopt.graph.view import View

#: Constants up to so many elements are compared by value, others by identity.
COMPARED = 1024


def has_equal_terms(region: Change, view: View) -> bool:
    """Whether every claim of a change compares two tensors that are equal terms over its inputs.

    A term is an input, or an operator of ONNX with plain attributes that is not random, applied to terms. Equal terms
    have equal numbers (value numbering: Cocke and Schwartz, "Programming Languages and Their Compilers", 1970).
    """
    numbers: dict[Hashable, int] = {}

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    before, after = (_number_terms(states, view, number) for states in (region.before, region.after))
    claims = region.claims()
    return bool(claims) and all(
        before.get(old, number(_describe_input(old, view))) == after.get(new, number(_describe_input(new, view)))
        for old, new in claims
    )


def _number_terms(states: Sequence[State], view: View, number: Callable[[Hashable], int]) -> dict[Tensor, int]:
    """Number the terms that operators compute, which stand in an order in which they can run."""
    found: dict[Tensor, int] = {}
    made = {t for s in states for t in s.outputs}

    def find(tensor: Tensor) -> int | None:
        if tensor in made:
            return found[tensor] if tensor in found else number(object())  # a later operator makes it: no term
        return number(_describe_input(tensor, view)) if tensor.name else None

    for state in states:
        inputs = tuple(map(find, state.inputs))
        known = (
            bool(view.op(state.node)) and not find_traits(state.op).random and all(map(_is_plain, state.attrs.values()))
        )
        named = tuple(bool(t.name) for t in state.outputs)
        operator = (state.op, repr(sorted(state.attrs.items())), named) if known else object()
        for i, tensor in enumerate(state.outputs):
            found[tensor] = number((operator, inputs, i))
    return found


def _is_plain(attribute: object) -> bool:
    """Whether an attribute holds numbers or texts, so that it has an exact representation."""
    values = attribute if isinstance(attribute, list) else [attribute]
    return all(isinstance(v, (int, float, str, bytes)) for v in values)


def _describe_input(tensor: Tensor, view: View) -> Hashable:
    """A key that is equal for inputs with equal values."""
    constant = view.constant(tensor)
    value = view.raw(tensor) if constant is not None and (view.elements(constant) or 0) <= COMPARED else None
    return tensor if value is None or value.dtype.kind == "O" else (str(value.dtype), value.shape, value.tobytes())
