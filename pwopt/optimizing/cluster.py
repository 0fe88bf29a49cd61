"""Optimise models on a dask.distributed cluster. Needs the extra `pwopt[fleet]`.

dask does the scheduling, the retries and the networking (Rocklin, "Dask: Parallel Computation with Blocked algorithms
and Task Scheduling", 2015; distributed.dask.org). This module sends models as paths if the workers see the same files,
and as bytes otherwise. It collects the decisions of races in one cache, and lets one process per machine measure at a
time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import onnx

from pwopt.errors import PwoptError, UsageError
from pwopt.graph.storage import find_data_folder, find_locations, replacing
from pwopt.graph.temporary import temporary_folder
from pwopt.optimizing.batch import DEFECT_CODE, BatchRow, Job, JobResult, digest_content, run_job
from pwopt.optimizing.record_tuning import profile
from pwopt.optimizing.request import Request
from pwopt.running import installation, turn
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider
from pwopt.selecting import tuning_cache
from pwopt.selecting.tuning_database import TuningDatabase
from pwopt.version import __version__

#: How often a model is tried again on another worker after its worker died.
RETRIES = 3
#: Seconds to wait for a scheduler, and for its first worker.
SCHEDULER_SECONDS = 30


def import_distributed() -> Any:
    """Import the module `distributed`.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        return import_module("distributed")
    except ImportError as error:
        raise UsageError(f"a scheduler needs {error.name}; pip install distributed") from error


@dataclass(frozen=True)
class JobRequest:
    """A job for a worker: the model's files as bytes, none if the worker sees them, and the known decisions.

    Paths are pure, so that a worker on another operating system can unpickle them.
    """

    model: PurePath
    output: PurePath
    files: Mapping[str, bytes]
    known: tuple[tuning_cache.TuningRecord, ...]
    version: str = __version__


@dataclass(frozen=True)
class JobResponse:
    """The answer of a worker: the result of the job, its files unless they are in place, and new decisions."""

    done: JobResult
    files: Mapping[str, bytes]
    learnt: tuple[tuning_cache.TuningRecord, ...]
    where: str


@dataclass(frozen=True)
class Hardware:
    """A kind of machine in a cluster, and the addresses of the workers on it.

    Attributes
    ----------
    label : str
        The label of its workers (``dask worker --resources "LABEL=1"``), or else the name of its processor.
    place : str
        The place of its tuning records.
    workers : tuple of str
    """

    label: str
    place: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class Fleet:
    """Runs the jobs of `pwopt.optimize_many` on a dask.distributed cluster.

    Parameters
    ----------
    scheduler : str
        Its address, such as ``tcp://10.0.0.1:8786``.
    label : str or None
        Use only workers with this label (``dask worker --resources "LABEL=1"``). Each then runs one model at a time.
    """

    scheduler: str
    label: str | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """Connect to the scheduler.

        Raises
        ------
        UsageError
            If there is no scheduler, no worker, or no worker with the label.
        """
        dask = import_distributed()
        try:
            client = dask.Client(self.scheduler, timeout=SCHEDULER_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"there is no scheduler at {self.scheduler!r} ({error})") from error
        try:
            client.wait_for_workers(1, timeout=SCHEDULER_SECONDS)
            known = _list_labels(client)
            if self.label is not None and self.label not in known:
                raise UsageError(f"no worker has the label {self.label!r}; there are {', '.join(known) or 'no labels'}")
            yield client
        except TimeoutError as error:
            raise UsageError(f"the scheduler at {self.scheduler!r} has no worker; start one") from error
        finally:
            client.close()

    def _resources(self) -> dict[str, float] | None:
        return None if self.label is None else {self.label: 1}

    def __call__(self, todo: Sequence[Job], request: Request, progress: Progress) -> Iterator[JobResult]:
        plain = replace(request, progress=ignore_progress, output=None)
        dask = import_distributed()
        with self.connect() as client:
            seen = _find_shared_models(client, todo)
            known = tuple(tuning_cache.read_records()) if request.cache else ()
            jobs: dict[Any, Job] = {}
            for job in todo:
                files = {} if job.model in seen else _pack_files(job.model)
                remote = JobRequest(PurePath(job.model), PurePath(job.output), files, known)
                options = {"resources": self._resources(), "retries": RETRIES, "pure": False}
                jobs[client.submit(run_remote_job, remote, plain, **options)] = job
            for i, future in enumerate(dask.as_completed(jobs, loop=client.loop)):
                job = jobs[future]
                done = _receive_response(future, job, request)
                progress(f"{i + 1} of {len(todo)} models", (i + 1) / len(todo))
                future.release()
                yield done

    def record_profiles(
        self, models: Iterable[str | os.PathLike[str]], request: Request, progress: Progress = ignore_progress
    ) -> dict[str, TuningDatabase]:
        """Record a profile for each kind of machine, by its label. One worker of each kind races the models."""
        paths = [Path(m) for m in models]
        with self.connect() as client:
            kinds = [k for k in _group_workers(client, request) if self.label in (None, k.label)]
            packed = {p.name: _pack_files(p) for p in paths}
            waiting = {
                client.submit(
                    record_remotely, packed, replace(request, progress=ignore_progress), workers=list(k.workers),
                    retries=RETRIES, pure=False,
                ): k
                for k in kinds
            }  # fmt: skip
            found: dict[str, TuningDatabase] = {}
            for i, future in enumerate(import_distributed().as_completed(waiting, loop=client.loop)):
                progress(f"recording on {waiting[future].label}", i / len(kinds))
                found[waiting[future].label] = future.result()
            return dict(sorted(found.items()))


def _receive_response(future: Any, job: Job, request: Request) -> JobResult:
    """Write the files that a worker sent, store its decisions, and return its result."""
    try:
        response: JobResponse = future.result()
        for name, data in response.files.items():
            job.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(job.output.parent / name) as stream:
                stream.write(data)
    except Exception as error:
        lost = type(error).__name__ == "KilledWorker"
        sentence = f"it killed {RETRIES + 1} workers; try it alone" if lost else f"{type(error).__name__}: {error}"
        return JobResult(BatchRow(os.fspath(job.model), os.fspath(job.output), "failed", sentence, DEFECT_CODE))
    if request.cache:
        for entry in response.learnt:
            tuning_cache.store(entry)
    return response.done


def _group_workers(client: Any, request: Request) -> list[Hardware]:
    machines: dict[str, tuple[str, str]] = client.run(
        _describe_machine, request.execution_provider, request.first_threads
    )
    labels = _read_labels(client)
    kinds: dict[tuple[str, str], list[str]] = {}
    for address, (processor, place) in machines.items():
        kinds.setdefault((labels.get(address) or processor, place), []).append(address)
    return [Hardware(label, place, tuple(sorted(a))) for (label, place), a in sorted(kinds.items())]


def _describe_machine(provider: Provider, threads: int) -> tuple[str, str]:
    """On a worker: return its processor and the place of its tuning records."""
    return installation.cpu_name(), tuning_cache.describe_place(provider, threads)


def _read_labels(client: Any) -> dict[str, str]:
    """Map the address of each worker to its first label; "" if it has none."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {a: next(iter(sorted(w.get("resources") or {})), "") for a, w in workers.items()}


def _list_labels(client: Any) -> list[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sorted({label for w in workers for label in w.get("resources") or {}})


def _find_shared_models(client: Any, todo: Sequence[Job]) -> set[Path]:
    """Find the models of which every worker sees the same file, if all workers also see the folder for results."""
    if not todo:
        return set()
    folder = Path(os.path.commonpath([job.output.resolve().parent for job in todo]))
    with tempfile.NamedTemporaryFile(prefix=".marker-", dir=folder) as marker:
        models = [os.fspath(job.model.resolve()) for job in todo]
        answers = client.run(_digest_models, models, marker.name).values()
    here = {job.model: digest_content(job.model) for job in todo if job.model.is_file()}
    return {m for m, told in here.items() if all(a.get(os.fspath(m.resolve())) == told for a in answers)}


def _digest_models(models: Sequence[str], marker: str) -> dict[str, str]:
    """On a worker: digest the models that it sees; empty if it does not see the marker."""
    if not os.path.exists(marker):
        return {}
    return {m: digest_content(Path(m)) for m in models if os.path.isfile(m)}


def _pack_files(model: Path) -> dict[str, bytes]:
    """Read a model and its external data, by name; empty if it cannot be read, which the worker then reports."""
    try:
        data = model.read_bytes()
    except OSError:
        return {}
    files = {model.name: data}
    with contextlib.suppress(Exception):
        proto = onnx.ModelProto.FromString(data)
        folder = find_data_folder(proto, model)
        roots = [os.path.realpath(folder), os.path.dirname(os.path.realpath(model))]
        for name in set(find_locations(proto).values()):
            path = Path(os.path.realpath(folder / name))
            if any(path.is_relative_to(root) for root in roots):
                files[name] = path.read_bytes()
    return files


def _unpack_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UsageError(f"the file {name!r} lies outside the model's folder; move it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _make_clock_lock() -> Any:
    """Create a dask lock that the workers of this machine share; no lock outside a worker."""
    with contextlib.suppress(ValueError, ImportError):
        worker = import_distributed().get_worker()
        del worker
        return import_distributed().Lock(f"pwopt-clock-{socket.gethostname()}")
    return contextlib.nullcontext()


def _find_mismatch(remote: JobRequest, request: Request) -> str:
    """On a worker: return why it cannot run a job, or ""."""
    host = socket.gethostname()
    if remote.version != __version__:
        return f"the worker on {host} has pwopt {__version__}, not {remote.version}; install the same version there"
    if request.verify and not installation.is_available():
        return f"the worker on {host} has no onnxruntime; install it there, or pass --no-verify"
    return ""


def run_remote_job(remote: JobRequest, request: Request) -> JobResponse:
    """On a worker: optimise one model."""
    mismatch = _find_mismatch(remote, request)
    if mismatch:
        row = BatchRow(os.fspath(remote.model), os.fspath(remote.output), "failed", mismatch, UsageError.exit_code)
        return JobResponse(JobResult(row), {}, (), "")
    installation.silence_onnxruntime()
    turn.share_turn(_make_clock_lock())
    for entry in remote.known:
        tuning_cache.store(entry)
    before = set(tuning_cache.read_records())
    with temporary_folder() as name:
        files = dict[str, bytes]()
        if remote.files:
            source, target = name / "source", name / "target"
            source.mkdir()
            target.mkdir()
            _unpack_files(remote.files, source)
            here = Job(source / remote.model.name, target / remote.output.name)
            done = run_job(here, request, (remote.model, remote.output))
            files = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        else:
            here = Job(Path(remote.model).resolve(), Path(remote.output).resolve())
            done = run_job(here, request, (remote.model, remote.output))
    learnt = tuple(set(tuning_cache.read_records()) - before)
    return JobResponse(
        done, files, learnt, tuning_cache.describe_place(request.execution_provider, request.first_threads)
    )


def record_remotely(models: Mapping[str, Mapping[str, bytes]], request: Request) -> TuningDatabase:
    """On a worker: record the profile of its machine."""
    installation.silence_onnxruntime()
    turn.share_turn(_make_clock_lock())
    with temporary_folder() as name, turn.exclusive():
        paths = []
        for i, (model, files) in enumerate(models.items()):
            folder = name / str(i)
            _unpack_files(files, folder)
            paths.append(folder / model)
        try:
            return profile(
                paths, provider=request.provider, threads=request.first_threads,
                shapes=request.rounds[0] if request.rounds else None,
                budget=request.measuring.seconds, plugins=request.plugins,
            )  # fmt: skip
        except PwoptError as error:
            raise RuntimeError(str(error)) from error
