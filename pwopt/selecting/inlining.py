"""Inline the functions of a model whose operators a rewrite would change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pwopt.graph import calls
from pwopt.graph.files import from_proto
from pwopt.graph.functions import count_expanded, functions
from pwopt.graph.model import Model
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.records import Site
from pwopt.selecting.candidate_base import run_passes


def inline_functions(
    model: Model, passes: Sequence[Pass], deny: Iterable[Site], sizes: Mapping[str, Sequence[int]]
) -> Model:
    """Inline the functions whose operators a rewrite would change, and the functions that call them.

    All functions are inlined for a trial run of every pass that needs no measurement. Nothing is inlined if the
    functions would become too many operators.
    """
    listed = functions(model.proto)
    if not listed or count_expanded(model.proto) is None:
        return model
    try:
        whole = calls.inline(model.proto, listed.keys(), tagged=True)
    except Exception:  # the inliner refuses a model in several ways; the runtime may still accept it
        return model
    candidate = from_proto(whole, model.folder)
    result = run_passes(candidate, passes, tuple(deny), sizes, frozenset())
    replaced = frozenset(old for r in result.rewrites for old, _ in r.became)
    chosen = calls.find_touched_functions(model.proto, whole, candidate.to_proto(), replaced)
    return from_proto(calls.inline(model.proto, chosen), model.folder) if chosen else model
