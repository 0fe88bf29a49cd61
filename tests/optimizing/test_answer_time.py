"""The benchmark of answer times names functions that exist, and keeps a model's own records from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "answer_time.py"


@pytest.fixture
def script() -> ModuleType:
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("answer_time", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_stage_names_existing_functions(script: ModuleType) -> None:
    for places in script.STAGES.values():
        for place in places:
            owner, name = script.find_function(place)
            assert callable(getattr(owner, name)), place


def test_a_model_gets_the_records_of_all_others(script: ModuleType, tmp_path: Path) -> None:
    for model in ("a", "b", "c"):
        (tmp_path / "caches" / model).mkdir(parents=True)
        (tmp_path / "caches" / model / f"{model}.json").write_text("{}")
    cache = tmp_path / "cache"
    script.copy_other_records(tmp_path / "caches", "b", cache)
    assert sorted(p.name for p in cache.iterdir()) == ["a.json", "c.json"]
