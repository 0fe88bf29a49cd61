"""`pwopt.profile`: record which measured rewrites pay on this machine, in a tuning database for other machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pwopt.graph.files import as_file, load
from pwopt.graph.storage import workspace
from pwopt.inputs.input_specs import input_specs
from pwopt.optimizing.preparation import define_problem, resolve, start_compilation
from pwopt.optimizing.request import EFFORTS, Measuring, Request
from pwopt.rewriting.driver import Pass
from pwopt.running import installation
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider, as_provider
from pwopt.running.session import check_settings
from pwopt.selecting.rewrite_selection import decide, find_candidates
from pwopt.selecting.tuning_cache import TuningRecord, describe_place
from pwopt.selecting.tuning_database import TuningDatabase
from pwopt.selecting.tuning_records import NoTuningRecords, record_decision


def profile(
    models: Iterable[str | os.PathLike[str]],
    *,
    provider: str | Provider = Request.provider,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    budget: float = EFFORTS["normal"],
    plugins: Sequence[str | type[Pass] | Pass] = (),
    progress: Progress = ignore_progress,
) -> TuningDatabase:
    """Race every kind of measured rewrite in some models on this machine.

    Parameters
    ----------
    models : iterable of paths
        The models that will be optimised elsewhere for this machine, or similar ones.
    provider : str or Provider
    threads : int
    shapes : mapping of input name to sizes, optional
        Sizes of dynamic inputs with these names.
    budget : float
        Seconds for each model.
    plugins : sequence of str, pass classes and passes, optional
        Passes in addition to pwopt's own, as for `optimize`.
    progress : callable, optional
        Called with (stage, fraction done).

    Returns
    -------
    TuningDatabase
        `TuningDatabase.save` writes it for `Measuring(target_profile=…)`.

    Raises
    ------
    UsageError, ModelError, ProviderError
        See `pwopt.errors`.
    """
    check_settings(threads, None, None)
    found: dict[tuple[str, str], TuningRecord] = {}
    records = NoTuningRecords()
    placed = as_provider(provider)
    where = describe_place(placed, threads)
    for path in map(Path, models):
        source = load(path)
        given = {s.name: tuple(shapes[s.name]) for s in input_specs(source.proto) if shapes and s.name in shapes}
        request = Request(
            provider=placed.text, threads=threads, shapes=given, plugins=plugins, progress=progress,
            measuring=Measuring(effort="thorough", budget=budget),
        )  # fmt: skip
        with as_file(path) as original, workspace(None) as folder, contextlib.ExitStack() as stack:
            problem = define_problem(source, original, request).start_worker(stack, races=False)
            compilation = start_compilation(problem, resolve(request, path), request, folder)
            candidates = find_candidates(compilation, records, thorough=True)
            decisions = decide(compilation, candidates, problem.environment, budget, records, progress)
        found |= {(d.group.pass_name, d.group.signature): record_decision(d, where) for d in decisions}
    return TuningDatabase(installation.describe_machine(placed, threads), tuple(found.values()))
