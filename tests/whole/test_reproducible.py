"""Analytic results are byte for byte the same: in every run, process and order of hashes."""

from __future__ import annotations

import hashlib
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
from pwopt.passes import PASSES

#: Optimises every model of a folder, by default and by all passes, and prints a digest of each result and report.
DIGESTS = """
import hashlib, pathlib, sys
import pwopt
from pwopt.passes import PASSES
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    for passes in (None, [p.name for p in PASSES]):
        result = pwopt.optimize(path, cost="analytic", verify=False, passes=passes)
        report = repr((result.report.rewrites, result.report.skips, result.report.before, result.report.after))
        content = result.model.SerializeToString(deterministic=True) + report.encode()
        print(path.name, hashlib.sha256(content).hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for model in MODELS.glob("*.onnx"):
        (path / model.name).write_bytes(model.read_bytes())
    for number in range(8):
        onnx.save(random_sample(Random(number)).model, path / f"random{number}.onnx")
    return path


def digests(folder: Path, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", DIGESTS, str(folder)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_processes_and_hash_seeds_agree(folder: Path) -> None:
    first = digests(folder, "0")
    assert len(first.splitlines()) == 2 * len(list(folder.glob("*.onnx")))
    assert digests(folder, "4242") == first


def test_runs_in_one_process_agree_and_the_source_does_not_change(folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        model = onnx.load(path)
        before = model.SerializeToString(deterministic=True)
        made = {
            hashlib.sha256(
                pwopt.optimize(model, cost="analytic", verify=False, passes=[p.name for p in PASSES])
                .model.SerializeToString(deterministic=True)
            ).digest()
            for _ in range(2)
        }  # fmt: skip
        assert len(made) == 1
        assert model.SerializeToString(deterministic=True) == before


def test_written_files_agree(folder: Path, tmp_path: Path) -> None:
    path = folder / "linear_sequence.onnx"
    contents = set()
    for name in ("a.onnx", "b.onnx"):
        pwopt.optimize(path, tmp_path / name, cost="analytic", shapes={"x": (1, 64, 8, 8)})
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


def test_the_same_input_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys, pwopt; r = pwopt.optimize(sys.argv[1], cost='analytic', verify=False);"
        "sys.stdout.buffer.write(r.model.SerializeToString(deterministic=True) + r.report.to_json().encode())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(MODELS / "network_in_network.onnx")],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin"},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
