"""Which passes run: their names, classes and plugins, resolved into instances."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from pwopt.errors import UsageError
from pwopt.passes import PASSES
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.wording import suggest
from pwopt.selecting import plugins

#: A pass as users name it: by its name, its class or an instance.
PassSpec = str | type[Pass] | Pass


def resolve_passes(
    specs: Sequence[PassSpec] | None = None, extra: Sequence[PassSpec] = (), model: Path | None = None
) -> tuple[Pass, ...]:
    """Create the passes of a run.

    A measured pass that is named by a string acts wherever it is exact. Otherwise races or shapes decide.

    Parameters
    ----------
    specs : sequence of str, pass classes and passes, optional
        In the order in which they run. By default pwopt's own passes, those of installed packages, and `extra`.
    extra : sequence of str, pass classes and passes
        Plugins; a string is ``module:Class`` or ``path/to/module.py:Class``.
    model : Path, optional
        The model. Modules of plugins may lie beside it.

    Raises
    ------
    UsageError
        If a name is unknown, two passes share a name, a plugin cannot be imported, or a class breaks the contract.
    """
    available: dict[str, type[Pass] | Pass] = {}
    for p in (*PASSES, *plugins.find_installed(), *plugins.import_plugins(extra, model)):
        if available.setdefault(_check(p).name, p) is not p:
            raise UsageError(f"two passes are called {p.name!r}; leave one out")
    chosen: dict[str, tuple[PassSpec, Pass]] = {}
    for spec in available.values() if specs is None else specs:
        if isinstance(spec, str) and spec not in available:
            raise UsageError(f"there is no pass {spec!r}; {suggest(spec, available)}")
        kind = available[spec] if isinstance(spec, str) else _check(spec)
        made = plugins.construct(kind) if isinstance(kind, type) else copy.copy(kind)
        if made.eager or isinstance(spec, str):
            made.scope = "requested"
        if chosen.setdefault(made.name, (spec, made))[0] != spec:
            raise UsageError(f"two passes are called {made.name!r}; leave one out")
    return tuple(made for _, made in chosen.values())


def _check(p: type[Pass] | Pass) -> type[Pass] | Pass:
    kind = p if isinstance(p, type) else type(p)
    plugins.check_contract(kind, f"{kind.__module__}.{kind.__qualname__}")
    return p
