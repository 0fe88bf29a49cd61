"""Tuning database: decisions on measured rewrites that one machine records for use on other machines."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pwopt.errors import UsageError
from pwopt.graph.json_files import read_json, read_record
from pwopt.graph.storage import replacing
from pwopt.selecting.autotuning import Decision
from pwopt.selecting.priors import Prior
from pwopt.selecting.tuning_cache import TuningRecord
from pwopt.selecting.tuning_records import NoGainRecords

#: Version of the file's layout.
TUNING_SCHEMA = 2


@dataclass(frozen=True)
class TuningDatabase(NoGainRecords):
    """The results of races of every kind of measured rewrite in some models on one machine.

    Attributes
    ----------
    environment : dict
        Versions, processor, provider and threads of the machine.
    entries : tuple of TuningRecord
    """

    environment: dict[str, Any]
    entries: tuple[TuningRecord, ...]

    origin = "in the profile"
    doubt_advice = "Record the profile anew, with a larger --budget."
    undecided_reason = "the target's profile does not know it; record the profile with this model"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TuningDatabase:
        """Read a profile.

        Raises
        ------
        UsageError
            If the file is not a profile.
        """
        wrong = f"{str(path)!r} is not a profile that `pwopt profile` wrote"
        try:
            content = read_json(Path(path))
            if content["schema"] != TUNING_SCHEMA:
                raise UsageError(f"the profile {str(path)!r} is of layout {content['schema']}; record it again")
            records = tuple(read_record(TuningRecord, each) for each in content["decisions"])
            environment = dict(content["environment"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(wrong) from error
        if not all(record.plausible for record in records):
            raise UsageError(wrong)
        return cls(environment, records)

    def to_json(self) -> str:
        content = {
            "schema": TUNING_SCHEMA,
            "environment": self.environment,
            "decisions": [asdict(e) for e in self.entries],
        }
        return json.dumps(content, indent=1, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile atomically."""
        with replacing(Path(path)) as stream:
            stream.write(self.to_json().encode())

    def recall(self, pass_name: str, signature: str) -> TuningRecord | None:
        return next((e for e in self.entries if (e.pass_name, e.signature) == (pass_name, signature)), None)

    def priors(self, kind: str) -> dict[str, Prior]:
        """Return no priors, because the profile decides."""
        return {}

    def store(self, decision: Decision) -> None:
        """Do nothing: using a profile does not change it."""
