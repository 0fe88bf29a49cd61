"""docs/rapidocr.md as it stands: a client with its own models and with optimised ones reads the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("rapidocr_onnxruntime")
ROOT = Path(__file__).parent.parent.parent


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rapidocr.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/rapidocr.md", "exec"), names)
    read = [text for _, text, _ in names["reread"]]
    assert [text.replace(" ", "") for text in read] == [line.replace(" ", "") for line in names["LINES"]]
    for kind, file in names["files"].items():
        own = onnx.load(next(names["wheel"].glob(f"*_{kind}_*.onnx")))
        made = onnx.load(file)
        assert len(made.graph.node) < len(own.graph.node)
        assert {p.key: p.value for p in own.metadata_props}.items() <= {
            p.key: p.value for p in made.metadata_props
        }.items()
