"""A machine's decisions on measured rewrites, recorded there to be used elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pwopt import runtime, tune
from pwopt.cache import Entry, place
from pwopt.errors import UsageError
from pwopt.inputs import check_shapes, input_specs
from pwopt.model import as_file, load
from pwopt.samples import random_samples
from pwopt.selection import Arena, Forgetful, Progress, Work, decide, entry
from pwopt.sizes import rounds
from pwopt.storage import replacing, workspace

#: Version of the file's layout.
SCHEMA = 1


@dataclass(frozen=True)
class Profile:
    """What races on one machine said of every kind of measured rewrite in some models.

    Attributes
    ----------
    environment : dict
        Versions, processor, provider and threads of the machine.
    entries : tuple of Entry
    """

    environment: dict[str, Any]
    entries: tuple[Entry, ...]

    undecided = "the target's profile does not know it; record the profile with this model"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile.

        Raises
        ------
        UsageError
            If the file is not one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise UsageError(f"the profile {str(path)!r} is of layout {content['schema']}; record it again")
            return cls(dict(content["environment"]), tuple(Entry(**e) for e in content["decisions"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{str(path)!r} is not a profile that `pwopt profile` wrote") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile, atomically."""
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "decisions": [asdict(e) for e in self.entries],
        }
        with replacing(Path(path)) as stream:
            stream.write(json.dumps(content, indent=1, ensure_ascii=False).encode())

    def recall(self, pass_name: str, signature: str) -> Entry | None:
        return next((e for e in self.entries if (e.pass_name, e.signature) == (pass_name, signature)), None)

    def keep(self, decision: tune.Decision) -> None:
        """A profile is not changed by those who use it."""


def profile(
    models: Iterable[str | os.PathLike[str]],
    *,
    provider: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    budget: float = 60.0,
    progress: Progress = lambda _stage, _done: None,
) -> Profile:
    """Race every kind of measured rewrite in some models on this machine.

    Parameters
    ----------
    models : iterable of paths
        Models like those that are to be optimised for this machine elsewhere, best the same.
    provider : str
    threads : int
    shapes : mapping of input name to sizes, optional
        For dynamic inputs that have these names.
    budget : float
        Seconds for each model.
    progress : callable, optional
        Called with (stage, fraction done).

    Returns
    -------
    Profile
        `Profile.save` writes it for `optimize(…, target_profile=…)`.

    Raises
    ------
    UsageError, ModelError, ProviderError
        See `pwopt.errors`.
    """
    runtime.check_settings(threads, None, None)
    found: dict[tuple[str, str], Entry] = {}
    where = place(provider, threads)
    for path in models:
        source = load(path)
        specs = input_specs(source.proto)
        given = {s.name: tuple(shapes[s.name]) for s in specs if s.name in (shapes or {}) and shapes is not None}
        check_shapes(specs, given)
        with as_file(path) as original, workspace(None) as folder:
            samples = random_samples(specs, rounds(specs, original, provider, [given] if given else [])[:1])
            sizes = {name: value.shape for name, value in samples[0].feeds.items()}
            work = Work(source, source, None, (), sizes, folder)
            decisions = decide(work, Arena(provider, threads, samples), budget, Forgetful(), progress)
        found |= {(d.group.pass_name, d.group.signature): entry(d, where) for d in decisions}
    return Profile(runtime.environment(provider, threads), tuple(found.values()))
