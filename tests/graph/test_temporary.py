"""Temporary folders of killed processes are removed by the next run, those of living ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest
from helpers import parse

from pwopt.graph import storage, temporary
from pwopt.graph.memo import memoize
from pwopt.graph.temporary import AGE, PREFIX, create_file, remove_stale, temporary_folder

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")

HOLD = """
import pathlib, sys, time
from pwopt.graph.temporary import create_file, temporary_folder
folder = pathlib.Path(sys.argv[1])
with temporary_folder(folder) as own:
    (own / "model.onnx").write_text("candidate")
    create_file(folder)
    print("ready", flush=True)
    time.sleep(600)
"""


@posix
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}mine").mkdir()  # without a lock, so nobody knows whose it is
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    with temporary_folder(tmp_path) as own:
        assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 4
        holder.kill()
        holder.wait()
        remove_stale(tmp_path)
        left = {p.name for p in tmp_path.glob(f"{PREFIX}*")}
        assert {own.name, f"{PREFIX}mine"} < left, "a new file stays for a while, since its lock may be missing"
        (file,) = (tmp_path / name for name in left if name.endswith(".tmp"))
        os.utime(file, (time.time() - 2 * AGE,) * 2)
        remove_stale(tmp_path)
        assert {p.name for p in tmp_path.glob(f"{PREFIX}*")} == {own.name, f"{PREFIX}mine"}


@posix
def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "fcntl", None)
    with temporary_folder(tmp_path) as own:
        assert list(own.iterdir()) == []
        (tmp_path / f"{PREFIX}other").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [f"{PREFIX}other"]


@posix
def test_files_get_the_permissions_of_new_files_without_a_change_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask belongs to all threads"))
    try:
        with storage.replacing(tmp_path / "a.json") as stream:
            stream.write(b"x")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    with storage.replacing(tmp_path / ("n" * 250)) as stream:
        stream.write(b"x")
    handle, path = create_file(tmp_path)
    os.close(handle)
    assert len(path.name) < 40


def test_remembered_results_are_safe_for_threads() -> None:
    models = [parse(f"(float[{i}] x) => (float[N] y) {{ y = Relu(x) }}") for i in range(1, 13)]
    size = memoize(lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    faults: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(400):
                index = (i * (k + 1) + k) % len(models)
                assert size(models[index]) == index + 1
        except BaseException as error:
            faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not faults
    model = onnx.ModelProto()
    assert memoize(lambda _: None)(model) is None
