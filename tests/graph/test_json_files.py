"""JSON files that are damaged or hostile: every reader of pwopt refuses them with one sentence or ignores them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from helpers import MODELS

from pwopt.cli import main
from pwopt.errors import UsageError
from pwopt.graph.json_files import read_json, read_record
from pwopt.optimizing import batch
from pwopt.optimizing.batch import BatchRow
from pwopt.reporting.report import read_rewrites
from pwopt.selecting import tuning_cache
from pwopt.selecting.tuning_cache import TuningRecord
from pwopt.selecting.tuning_database import TuningDatabase

RECORD = TuningRecord("p", "s", "here", 20.0, 1.0, 0.1, "", "n", "d")
DAMAGED = {
    "nested": "[" * 200_000,
    "not an object": "[1]",
    "no JSON": "{",
    "binary": "\x00\xff",
    "infinite": json.dumps({**asdict(RECORD), "pairs": float("inf")}),
    "beyond floats": json.dumps(asdict(RECORD)).replace("20.0", "1e999"),
    "implausible": json.dumps({**asdict(RECORD), "pairs": 1.0, "total": 1e6}),
    "negative squares": json.dumps({**asdict(RECORD), "squares": -1.0}),
    "a list for a name": json.dumps({**asdict(RECORD), "name": [1]}),
    "an object for a word": json.dumps({**asdict(RECORD), "profiled": {"a": 1}}),
    "another word": json.dumps({**asdict(RECORD), "profiled": "perhaps"}),
    "a number for a date": json.dumps({**asdict(RECORD), "date": 3}),
    "a truth for a number": json.dumps({**asdict(RECORD), "total": True}),
    "an unknown field": json.dumps({**asdict(RECORD), "more": 1}),
}


@dataclass(frozen=True)
class Fields:
    text: str
    number: float
    pair: tuple[int, int] = (0, 0)
    words: tuple[str, ...] = ()
    maybe: float | None = None


def test_a_record_has_the_types_of_its_fields() -> None:
    content = {"text": "a", "number": 1, "pair": [2, 3], "words": ["x"], "maybe": None}
    assert read_record(Fields, content) == Fields("a", 1.0, (2, 3), ("x",))
    for wrong in (
        {"text": 1}, {"number": "1"}, {"number": True}, {"pair": [1]}, {"pair": [1, 2.5]}, {"words": "x"}, {"words": [1]},
        {"maybe": "1"}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="field"):
            read_record(Fields, {**content, **wrong})
    with pytest.raises(ValueError, match="number"):
        read_record(Fields, {"text": "a"})


@pytest.mark.parametrize("text", ["[" * 200_000, "NaN", "-Infinity", "1e999", "{"])
def test_json_is_finite_and_flat(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_holds_no_decision(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path))
    path = tuning_cache._find_path(("p", "s", "here", ""))
    path.write_text(text)
    assert tuning_cache.look_up("p", "s", "here", "m") is None
    assert list(tuning_cache.read_decisions()) == []
    for action in ("show", "clear"):
        with pytest.raises(SystemExit) as end:
            main(["cache", action])
        assert end.value.code == 0
    assert not path.exists()
    tuning_cache.store(RECORD)
    assert tuning_cache.look_up("p", "s", "here") == RECORD


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tuning_database_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in (text, f'{{"schema": 2, "environment": {{}}, "decisions": [{text}]}}'):
        path.write_text(content)
        with pytest.raises(UsageError, match="not a profile"):
            TuningDatabase.load(path)


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    model = str(MODELS / "linear_sequence.onnx")
    for content in (text, f'{{"rewrites": [{text}]}}', '{"rewrites": [{"site": 1}]}', '{"rewrites": 3}'):
        path.write_text(content)
        with pytest.raises(UsageError, match="not a JSON report"):
            read_rewrites(path)
    with pytest.raises(SystemExit) as end:
        main(["verify", model, model, "--rewrites", str(path), "--quiet"])
    assert end.value.code == 2


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_index_is_ignored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    row = asdict(BatchRow("a", "a", "done"))
    for content in (text, f'{{"rows": [{text}]}}', json.dumps({"rows": [{**row, "speedup": "fast"}]}), '{"rows": 1}'):
        path.write_text(content)
        assert batch._read(path) == {}
    path.write_text(json.dumps({"rows": [row]}))
    assert list(batch._read(path)) == ["a"]
