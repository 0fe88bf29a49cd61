"""docs/quantise.md as it stands: an optimised model is quantised, before and after cross-layer equalisation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build, normal

import pwopt

pytest.importorskip("onnxruntime.quantization")
ROOT = Path(__file__).parent.parent.parent


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "quantise.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "fcn.onnx", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/quantise.md", "exec"), names)
    shown = re.findall(r"^(\S+\.onnx): [\d.]+ dB$", page, re.M)
    assert list(names["ratios"]) == shown == ["original.onnx", "fast.onnx", "even.onnx"]
    assert min(names["ratios"].values()) > 10
    assert (tmp_path / "int8_even.onnx").exists()


def test_no_new_constant_takes_a_name_of_the_quantiser(tmp_path: Path) -> None:
    """The quantiser calls the scale of a tensor `…_scale`, and takes a constant of that name for it."""
    weights = {"w": normal(4, 3, 1, 1, dtype=np.float32), "v": normal(5, 4, 1, 3, seed=1, dtype=np.float32),
               "m": normal(4, 1, 1, seed=2, dtype=np.float32), "a": normal(4, 1, 1, seed=3, dtype=np.float32),
               "c": normal(5, seed=4, dtype=np.float32)}  # fmt: skip
    model = build(
        "(float[1,3,8,8] x) => (float[1,5,8,8] y) { h = Conv(x, w) r = Tanh(h) p = Mul(r, m) q = Add(p, a) "
        "k = MaxPool <kernel_shape = [1,1]> (q) s = Sigmoid(q) t = Mul(k, s) y = Conv <pads = [0,1,0,1]> (t, v, c) }",
        weights,
    )
    result = pwopt.optimize(model, cost="analytic").model
    assert any(n.op_type == "BatchNormalization" for n in result.graph.node)
    assert not [t.name for t in result.graph.initializer if t.name.endswith(("_scale", "_zero_point", "_quantized"))]
