"""docs/quantise.md as it stands: an optimised model is quantised, before and after cross-layer equalisation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime.quantization")
ROOT = Path(__file__).parent.parent.parent


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quantise.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "fcn.onnx", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/quantise.md", "exec"), names)
    assert set(names["ratios"]) == {"fast.onnx", "even.onnx"}
    assert min(names["ratios"].values()) > 10
    assert (tmp_path / "int8_even.onnx").exists()
