"""Many models: resumable, in processes, on a cluster, and no failure stops the rest."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import SpawnContext
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, ops, parse

import pwopt
from pwopt.cli import main
from pwopt.errors import UsageError
from pwopt.optimizing import batch
from pwopt.optimizing.batch import BatchRow, Job, optimize_many
from pwopt.optimizing.request import Request

pytest.importorskip("onnxruntime")

ANALYTIC = Request(cost="analytic")
#: For what does not depend on verification, which starts a process for each model.
UNVERIFIED = Request(cost="analytic", verify=False)


def chain(seed: int) -> onnx.ModelProto:
    return parse(
        "(float[1,4,6,6] x) => (float[N] y) { a = Conv(x, w) b = Conv(a, v) y = Relu(b) }",
        w=normal(6, 4, 1, 1, seed=seed).astype(np.float32), v=normal(4, 6, 1, 1, seed=seed + 99).astype(np.float32),
    )  # fmt: skip


def written(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"m{k}.onnx" for k in range(count)]
    for k, path in enumerate(paths):
        onnx.save(chain(k), path)
    return paths


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    written(tmp_path / "a", 2)
    written(tmp_path / "a" / "inner", 1)
    out = tmp_path / "a" / "out"
    rows = optimize_many([tmp_path / "a"], out, UNVERIFIED)
    assert [r.output for r in rows] == ["inner/m0.onnx", "m0.onnx", "m1.onnx"]
    assert {r.status for r in rows} == {"done"}
    assert all(ops(onnx.load(out / r.output)) == {"Conv": 1, "Relu": 1} for r in rows)
    assert len(optimize_many([tmp_path / "a"], out, UNVERIFIED)) == 3  # results are not models
    assert len(optimize_many([f"{tmp_path}/a/*.onnx"], tmp_path / "b", UNVERIFIED)) == 2
    for given, words in (
        ([tmp_path / "a" / "m0.onnx", tmp_path / "a" / "inner" / "m0.onnx"], "would both be"),
        ([f"{tmp_path}/none*.onnx"], "there is no .onnx file"),
        ([tmp_path / "a" / "m0.onnx"], "holds the model"),
    ):
        with pytest.raises(UsageError, match=words):
            optimize_many(given, tmp_path / "a" if "holds" in words else tmp_path / "c", UNVERIFIED)


def test_what_is_done_and_unchanged_is_skipped(tmp_path: Path) -> None:
    models = written(tmp_path / "in", 3)
    out = tmp_path / "out"
    statuses = lambda request=UNVERIFIED: [r.status for r in optimize_many(models, out, request)]  # noqa: E731
    assert statuses() == ["done"] * 3
    assert statuses() == ["unchanged"] * 3
    onnx.save(chain(50), models[0])  # another model
    (out / "m1.onnx").write_bytes(b"")  # a damaged result
    assert statuses() == ["done", "done", "unchanged"]
    assert statuses(replace(UNVERIFIED, deny="fold-chains:b")) == ["done"] * 3
    (out / "index.json").write_text("{")
    assert statuses() == ["done"] * 3
    optimize_many(models[:1], out, UNVERIFIED)
    index = json.loads((out / "index.json").read_text())
    assert sorted(r["output"] for r in index["rows"]) == ["m0.onnx", "m1.onnx", "m2.onnx"]
    assert json.loads((out / "m2.report.json").read_text())["model"] == str(models[2])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_fails_does_not_stop_the_rest(tmp_path: Path, workers: int) -> None:
    models = written(tmp_path / "in", 3)
    models[1].write_text("hello")
    told: list[BatchRow] = []
    rows = optimize_many(models, tmp_path / "out", UNVERIFIED, workers=workers, report_row=told.append)
    assert [r.status for r in rows] == ["done", "failed", "done"]
    assert rows[1].code == 3
    assert "not an ONNX model" in rows[1].sentence
    assert sorted(map(str, told)) == sorted(map(str, rows))
    onnx.save(chain(1), models[1])
    assert [r.status for r in optimize_many(models, tmp_path / "out", UNVERIFIED)] == ["unchanged", "done", "unchanged"]


FATAL = """
import os, signal
from pwopt.rewriting import Pass

class Fatal(Pass):
    "Dies, as a library that breaks does, on a model whose output is called so."
    name = "fatal"

    def match_and_rewrite(self, node, rw):
        if node.outputs[0].name == "fatal":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_dies_costs_its_own_model_only(tmp_path: Path) -> None:
    models = written(tmp_path / "in", 3)
    (tmp_path / "in" / "fatal.py").write_text(FATAL)
    proto = chain(1)
    proto.graph.node[-1].output[0] = proto.graph.output[0].name = "fatal"
    onnx.save(proto, models[1])
    request = Request(cost="analytic", plugins=["fatal:Fatal"], verify=False)
    rows = optimize_many(models, tmp_path / "out", request, workers=2)
    assert [r.status for r in rows] == ["done", "failed", "done"]
    assert "the process died" in rows[1].sentence


def test_processes_share_one_clock(tmp_path: Path) -> None:
    models = written(tmp_path / "in", 2)
    measuring = pwopt.Measuring(race_seconds=0.05, budget=0.2, layers=False)
    rows = optimize_many(models, tmp_path / "out", Request(measuring=measuring), workers=2)
    assert {r.status for r in rows} == {"done"}
    assert all(r.speedup is not None for r in rows)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = written(tmp_path / "in", 2)
    models[1].write_text("hello")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["optimize", *map(str, models), *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    code, out, _ = run("-d", tmp_path / "out", "--cost", "analytic")
    assert code == 3
    assert "1 of 2 models" in out
    code, out, err = run("-d", tmp_path / "out", "--cost", "analytic", "--json", "-q")
    assert [r["status"] for r in json.loads(out)["rows"]] == ["unchanged", "failed"]
    assert "not an ONNX model" in err
    for arguments, words in (
        ((), "add -d OUT"),
        (("-d", tmp_path / "o", "-o", "x.onnx"), "-o applies to a single model"),
        (("-d", tmp_path / "o", "--report", "x.html"), "--report applies to a single model"),
        (("-d", tmp_path / "o", "--worker-label", "x"), "add --scheduler"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert words in err
    code, out, _ = run("-d", tmp_path / "o", "--dry-run")
    assert code == 0
    assert "m0.onnx → " in out
    assert not (tmp_path / "o").exists()


def test_processes_that_do_not_start_fail_their_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwopt.running.child_process.child_command", lambda *_: ["/no/such/python"])
    rows = optimize_many(written(tmp_path / "in", 2), tmp_path / "out", ANALYTIC, workers=2)
    assert [r.status for r in rows] == ["failed"] * 2
    assert all("no process could be started" in r.sentence for r in rows)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, resources={"small": 1}
    ) as made:
        yield made


def test_a_cluster_gives_what_one_machine_gives(scheduler: Any, tmp_path: Path) -> None:
    from pwopt.optimizing.cluster import Fleet

    models = written(tmp_path / "in", 4)
    models[3].write_text("hello")
    fleet = Fleet(scheduler.scheduler_address)
    rows = optimize_many(models, tmp_path / "out", ANALYTIC, runner=fleet)
    alone = optimize_many(models, tmp_path / "alone", ANALYTIC)
    assert [(r.status, r.code, r.nodes) for r in rows] == [(r.status, r.code, r.nodes) for r in alone]
    for k in range(3):
        assert (tmp_path / "out" / f"m{k}.onnx").read_bytes() == (tmp_path / "alone" / f"m{k}.onnx").read_bytes()
    again = optimize_many(models[:3], tmp_path / "out", ANALYTIC, runner=fleet)
    assert {r.status for r in again} == {"unchanged"}


def test_models_travel_as_bytes_where_no_folder_is_shared(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pwopt.optimizing import cluster

    (model,) = written(tmp_path / "in", 1)
    proto = onnx.load(model)
    onnx.save(proto, model, save_as_external_data=True, location="m0.bin", size_threshold=0)
    monkeypatch.setattr(cluster, "_find_shared_models", lambda *_: set())
    (row,) = optimize_many([model], tmp_path / "out", UNVERIFIED, runner=cluster.Fleet(scheduler.scheduler_address))
    assert row.status == "done", row.sentence
    assert ops(onnx.load(tmp_path / "out" / "m0.onnx")) == {"Conv": 1, "Relu": 1}
    report = json.loads((tmp_path / "out" / "m0.report.json").read_text())
    assert (report["model"], report["output"]) == (str(model), str(tmp_path / "out" / "m0.onnx"))


def test_targets_are_labels_of_workers(scheduler: Any, tmp_path: Path) -> None:
    from pwopt.optimizing.cluster import Fleet

    models = written(tmp_path / "in", 1)
    address = scheduler.scheduler_address
    (row,) = optimize_many(models, tmp_path / "out", UNVERIFIED, runner=Fleet(address, "small"))
    assert row.status == "done"
    with pytest.raises(UsageError, match="no worker has the label 'large'; there are small"):
        optimize_many(models, tmp_path / "other", UNVERIFIED, runner=Fleet(address, "large"))


def test_decisions_and_profiles_come_home(scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwopt.optimizing.cluster import Fleet
    from pwopt.selecting import tuning_cache

    model = tmp_path / "m.onnx"
    body = "(float[1,6,5,7] x, float[1,4,1,1] g) => (float[N] p, float[N] q) { a = Conv(x, w) p, r = Split<axis=1>(a, n) q = Mul(r, g) }"
    onnx.save(parse(body, w=normal(8, 6, 1, 1).astype(np.float32), n=np.array([4, 4])), model)
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))  # the workers have another folder
    for path in Path(os.environ["PWOPT_CACHE"]).glob("*"):
        path.unlink()
    fleet = Fleet(scheduler.scheduler_address)
    (row,) = optimize_many(
        [model],
        tmp_path / "out",
        Request(measuring=pwopt.Measuring(race_seconds=0.1, effort="thorough", budget=20.0)),
        runner=fleet,
    )
    assert row.status == "done", row.sentence
    learnt = {e.pass_name for e in tuning_cache.read_decisions()}
    assert learnt
    profiles = fleet.record_profiles([model], Request(measuring=pwopt.Measuring(budget=20.0)))
    assert {e.pass_name for e in profiles["small"].entries} & learnt  # which races there are is up to the clock


def test_a_killed_worker_costs_a_retry(scheduler: Any, tmp_path: Path) -> None:
    from pwopt.optimizing.cluster import Fleet

    models = written(tmp_path / "in", 6)
    told: list[BatchRow] = []

    def kill(row: BatchRow) -> None:
        told.append(row)
        if len(told) == 2:
            os.kill(next(iter(scheduler.workers.values())).pid, signal.SIGKILL)

    rows = optimize_many(
        models, tmp_path / "out", UNVERIFIED, runner=Fleet(scheduler.scheduler_address), report_row=kill
    )
    assert [r.status for r in rows] == ["done"] * 6
    alone = optimize_many(models, tmp_path / "alone", UNVERIFIED)
    assert [r.written for r in rows] == [r.written for r in alone]


def test_no_scheduler_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pytest.importorskip("pwopt.optimizing.cluster")
    monkeypatch.setattr(cluster, "SCHEDULER_SECONDS", 1)
    with pytest.raises(UsageError, match=r"there is no scheduler at 'tcp://127\.0\.0\.1:9'"):
        optimize_many(written(tmp_path / "in", 1), tmp_path / "out", runner=cluster.Fleet("tcp://127.0.0.1:9"))


def test_public() -> None:
    assert pwopt.optimize_many is optimize_many


def test_a_model_that_two_paths_lead_to_is_done_for_each(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    model = tmp_path / "a" / "sub" / "m.onnx"
    shutil.copy(MODELS / "linear_sequence.onnx", model)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        rows = optimize_many([tmp_path / "a", model], out, UNVERIFIED, workers=workers)
        assert [r.status for r in rows] == ["done", "done"]
        assert (out / "m.onnx").exists()
        assert (out / "sub" / "m.onnx").exists()


def test_the_index_is_not_written_after_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for i in range(4):
        shutil.copy(MODELS / "linear_sequence.onnx", tmp_path / f"{i}.onnx")
        models.append(tmp_path / f"{i}.onnx")
    written: list[int] = []
    monkeypatch.setattr(batch, "_write_index", lambda _, rows, __: written.append(len(rows)))
    optimize_many(models, tmp_path / "out", UNVERIFIED)
    assert written == [4]
    monkeypatch.setattr(batch, "INDEX_SECONDS", -1.0)
    optimize_many(models, tmp_path / "again", UNVERIFIED)
    assert written == [4, 1, 2, 3, 4, 4]


def test_an_interrupted_batch_leaves_its_index(tmp_path: Path) -> None:
    def runner(todo: Sequence[Job], *_: object) -> Iterator[batch.JobResult]:
        yield batch.JobResult(BatchRow(str(todo[0].model), str(todo[0].output), "done"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize_many([MODELS / "linear_sequence.onnx"], tmp_path, ANALYTIC, runner=runner)
    assert json.loads((tmp_path / "index.json").read_text())["rows"][0]["status"] == "done"


def test_workers_need_neither_semaphores_nor_a_process_that_may_have_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is no /dev/shm, and inside a daemonic process of multiprocessing."""

    def lock(_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    monkeypatch.setattr(SpawnContext, "Lock", lock)
    rows = optimize_many(written(tmp_path / "in", 2), tmp_path / "out", UNVERIFIED, workers=2)
    assert [r.status for r in rows] == ["done"] * 2


def test_workers_know_passes_of_the_running_program(tmp_path: Path) -> None:
    """As with multiprocessing, whose children import the program, too."""
    written(tmp_path / "in", 2)
    program = """
        import pathlib, sys
        import pwopt
        from pwopt.rewriting import Pass

        class Mine(Pass):
            "nothing"
            name = "mine"
            def match_and_rewrite(self, node, rw):
                return None

        if __name__ == "__main__":
            here = pathlib.Path(__file__).parent
            request = pwopt.Request(cost="analytic", verify=False, plugins=[Mine])
            print([r.status for r in pwopt.optimize_many([here / "in"], here / "out", request, workers=2)])
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=True)
    assert done.stdout == "['done', 'done']\n"


def test_a_worker_that_is_not_as_asked_fails_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwopt.optimizing import cluster

    path = PurePath("m.onnx")
    job = cluster.JobRequest(path, path, {}, (), "0.0.0")
    row = cluster.run_remote_job(job, ANALYTIC).done.row
    assert (row.status, row.code) == ("failed", 2)
    assert "has pwopt" in row.sentence
    assert "not 0.0.0" in row.sentence
    monkeypatch.setattr(cluster.installation, "is_available", lambda: False)
    row = cluster.run_remote_job(replace(job, version=cluster.__version__), ANALYTIC).done.row
    assert (row.status, row.code) == ("failed", 2)
    assert "has no onnxruntime" in row.sentence
