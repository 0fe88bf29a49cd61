"""Many machines: models are handed to a dask.distributed cluster. Needs the extra `pwopt[fleet]`.

Scheduling, retries and the network are dask's (Rocklin, "Dask: Parallel Computation with Blocked algorithms and Task
Scheduling", 2015; distributed.dask.org). What is here: models go as paths where the workers see the same files and as
bytes where not, decisions of races flow into one cache, and clocks run in one process of a machine at a time.
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
from pwopt.running import installation, timing
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider
from pwopt.selecting import tuning_cache
from pwopt.selecting.tuning_database import TuningDatabase
from pwopt.version import __version__

#: How often a model is tried again on another worker where one is lost.
RETRIES = 3
#: Seconds to wait for a scheduler, and for its first worker.
SCHEDULER_SECONDS = 30


def import_distributed() -> Any:
    """The module.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        return import_module("distributed")
    except ImportError as error:
        raise UsageError(f"a scheduler needs {error.name}; pip install 'pwopt[fleet]'") from error


@dataclass(frozen=True)
class JobRequest:
    """What travels with a model: its files as bytes, none where the worker sees them, and known decisions.

    Paths are pure ones, which a worker on another system can read too.
    """

    model: PurePath
    output: PurePath
    files: Mapping[str, bytes]
    known: tuple[tuning_cache.TuningRecord, ...]
    version: str = __version__


@dataclass(frozen=True)
class JobResponse:
    """What comes back: as from a job, the files of the result unless they are in place, and new decisions."""

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
        What its workers call themselves (``dask worker --resources "LABEL=1"``), or else its processor.
    place : str
        What decisions of races are kept for.
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
    target : str or None
        Only on workers that call themselves so: ``dask worker --resources "LABEL=1"``. Each runs one model at a time
        then.
    """

    scheduler: str
    target: str | None = None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """A client of the scheduler.

        Raises
        ------
        UsageError
            If there is no scheduler, no worker, or none of the target.
        """
        dask = import_distributed()
        try:
            client = dask.Client(self.scheduler, timeout=SCHEDULER_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"there is no scheduler at {self.scheduler!r} ({error})") from error
        try:
            client.wait_for_workers(1, timeout=SCHEDULER_SECONDS)
            known = _list_labels(client)
            if self.target is not None and self.target not in known:
                raise UsageError(f"no worker calls itself {self.target!r}; there are {', '.join(known) or 'no labels'}")
            yield client
        except TimeoutError as error:
            raise UsageError(f"the scheduler at {self.scheduler!r} has no worker; start one") from error
        finally:
            client.close()

    def _resources(self) -> dict[str, float] | None:
        return None if self.target is None else {self.target: 1}

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
        """A profile for each kind of machine, by its label; each races the models on one of its workers."""
        paths = [Path(m) for m in models]
        with self.connect() as client:
            kinds = [k for k in _group_workers(client, request) if self.target in (None, k.label)]
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
    """What a worker sent, with its files written and its decisions kept."""
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
    """On a worker: its processor, and what decisions of races there are kept for."""
    return installation.cpu_name(), tuning_cache.describe_place(provider, threads)


def _read_labels(client: Any) -> dict[str, str]:
    """Worker → the first label that it gave itself."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {a: next(iter(sorted(w.get("resources") or {})), "") for a, w in workers.items()}


def _list_labels(client: Any) -> list[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sorted({label for w in workers for label in w.get("resources") or {}})


def _find_shared_models(client: Any, todo: Sequence[Job]) -> set[Path]:
    """Models that every worker sees as they are here, if it also sees the folder for the results."""
    if not todo:
        return set()
    folder = Path(os.path.commonpath([job.output.resolve().parent for job in todo]))
    with tempfile.NamedTemporaryFile(prefix=".marker-", dir=folder) as marker:
        models = [os.fspath(job.model.resolve()) for job in todo]
        answers = client.run(_digest_models, models, marker.name).values()
    here = {job.model: digest_content(job.model) for job in todo if job.model.is_file()}
    return {m for m, told in here.items() if all(a.get(os.fspath(m.resolve())) == told for a in answers)}


def _digest_models(models: Sequence[str], marker: str) -> dict[str, str]:
    """On a worker: what the models that it sees hold; nothing if it does not see the marker."""
    if not os.path.exists(marker):
        return {}
    return {m: digest_content(Path(m)) for m in models if os.path.isfile(m)}


def _pack_files(model: Path) -> dict[str, bytes]:
    """A model and its external data, by name; nothing if it cannot be read, which the worker will say."""
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
    """A lock of all workers of this machine, from dask; none outside a worker."""
    with contextlib.suppress(ValueError, ImportError):
        worker = import_distributed().get_worker()
        del worker
        return import_distributed().Lock(f"pwopt-clock-{socket.gethostname()}")
    return contextlib.nullcontext()


def _find_mismatch(remote: JobRequest, request: Request) -> str:
    """On a worker: return why it cannot do a job as asked, or ""."""
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
    timing.share_turn(_make_clock_lock())
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
    """On a worker: the profile of its machine."""
    installation.silence_onnxruntime()
    timing.share_turn(_make_clock_lock())
    with temporary_folder() as name, timing.exclusive():
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
