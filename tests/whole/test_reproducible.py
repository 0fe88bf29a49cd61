"""Analytic results are byte for byte the same: in every run, process and order of hashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import onnx
import pytest
from helpers import MODELS

pytest.importorskip("onnxruntime")
from strategies import random_sample

import pwopt

#: Optimises every model of a folder, by default and some times by all passes. Prints digests of each result and report,
#: and of the model afterwards.
DIGESTS = """
import hashlib, pathlib, sys
import onnx, pwopt
from pwopt.passes import PASSES

def digest(content):
    return hashlib.sha256(content if isinstance(content, bytes) else content.SerializeToString(deterministic=True)).hexdigest()

folder, times = sys.argv[1:]
for path in sorted(pathlib.Path(folder).glob("*.onnx")):
    model = onnx.load(path)
    before = digest(model)
    for passes in (None, *[[p.name for p in PASSES]] * int(times)):
        result = pwopt.optimize(model, cost="analytic", verify=False, passes=passes)
        report = result.report
        said = report.to_json() + repr((report.rewrites, report.skips, report.before, report.after))
        print(path.name, len(passes or ()), digest(result.model), digest(said.encode()))
    print(path.name, "as it was" if digest(model) == before else "changed")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for model in MODELS.glob("*.onnx"):
        (path / model.name).write_bytes(model.read_bytes())
    for number in range(8):
        onnx.save(random_sample(Random(number)).model, path / f"random{number}.onnx")
    return path


def digests(folder: Path, hash_seed: str, times: int) -> list[str]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", DIGESTS, str(folder), str(times)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_runs_processes_and_hash_seeds_agree_and_the_source_does_not_change(folder: Path) -> None:
    paths = sorted(folder.glob("*.onnx"))
    first = digests(folder, "0", 2)
    assert len(first) == 4 * len(paths)
    once = list(dict.fromkeys(first))  # two runs in one process give the same
    assert len(once) == 3 * len(paths)
    assert once[2::3] == [f"{path.name} as it was" for path in paths]
    assert digests(folder, "4242", 1) == once


def test_written_files_agree(folder: Path, tmp_path: Path) -> None:
    path = folder / "linear_sequence.onnx"
    contents = set()
    for name in ("a.onnx", "b.onnx"):
        pwopt.optimize(path, tmp_path / name, cost="analytic", shapes={"x": (1, 64, 8, 8)})
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1
