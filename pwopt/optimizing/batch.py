"""Optimise many models, one after another or in several processes. A batch can be resumed after it was stopped.

A model that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
import runpy
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath

import onnx

from pwopt.errors import PwoptError, UsageError
from pwopt.graph.json_files import read_json, read_record
from pwopt.graph.storage import find_data_folder, find_locations, name_beside, replacing
from pwopt.graph.temporary import temporary_folder
from pwopt.optimizing.optimizer import run_request
from pwopt.optimizing.preparation import resolve
from pwopt.optimizing.request import Request
from pwopt.reporting.report import REPORT_SCHEMA, Report, to_json
from pwopt.running import installation, turn
from pwopt.running.child_process import Channel, Child, EndedError
from pwopt.running.pool import FileLock, ask_all
from pwopt.running.progress import Progress, ignore_progress, track_run
from pwopt.running.signals import signals_interrupt
from pwopt.selecting.plugins import fingerprint
from pwopt.version import __version__

#: The file that lists the finished models. The next batch in the same folder skips them.
INDEX = "index.json"
#: Seconds between two updates of the index while models are optimised.
INDEX_SECONDS = 10.0
#: Exit code of a defect of pwopt itself, or of a process that died.
DEFECT_CODE = 5


@dataclass(frozen=True)
class Job:
    """A model, the file of its result, and a key that identifies model and options."""

    model: Path
    output: Path
    key: str = ""

    @property
    def report(self) -> Path:
        return name_beside(self.output, ".report.json")

    @property
    def page(self) -> Path:
        return name_beside(self.output, ".report.html")


@dataclass(frozen=True)
class BatchRow:
    """The outcome for one model.

    Attributes
    ----------
    model, output : str
        Files. The output is relative to the index.
    status : {"done", "unchanged", "failed"}
        Unchanged means that an earlier batch did it with the same options, and neither file has changed.
    sentence : str
        The error, or the notes of the report.
    code : int
        The exit code of `pwopt optimize` for this model alone.
    speedup, low, high : float or None
        None if nothing was measured.
    faster : bool
        Whether that is clear (`Latency.faster`).
    small_pages : tuple of float, or None
        The speed-up with pages of 4 KiB, and both ends of its interval; None where programs cannot choose. Then
        `speedup` was measured with huge pages.
    start : tuple of float, or None
        The time to create a session of the original over that of the result, and both ends of its interval.
    nodes, macs : (int, int)
        Before and after.
    seconds : float
        The time that it took.
    key, written : str
        Digests of model and options, and of the output.
    """

    model: str
    output: str
    status: str
    sentence: str = ""
    code: int = 0
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    nodes: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    key: str = ""
    written: str = ""
    faster: bool = False
    small_pages: tuple[float, float, float] | None = None
    start: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class JobResult:
    """The row of a job, and its report and page as text; "" if there is none."""

    row: BatchRow
    report: str = ""
    page: str = ""


#: Runs jobs and yields their results in any order.
Runner = Callable[[Sequence[Job], Request, Progress], Iterator[JobResult]]


def find_jobs(models: Iterable[str | os.PathLike[str]], folder: Path, request: Request) -> list[Job]:
    """Find files, the .onnx files of folders, and the matches of patterns, each with its result in `folder`.

    Raises
    ------
    UsageError
        If no model is found, or two models would be written to one file.
    """
    found: dict[Path, Path] = {}
    for given in [os.fspath(m) for m in models]:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.onnx") if not p.resolve().is_relative_to(folder.resolve()))
            pairs = [(p, folder / p.relative_to(path)) for p in inside]
        elif not path.exists() and glob.has_magic(given):
            pairs = [(p, folder / p.name) for p in map(Path, sorted(glob.glob(given, recursive=True)))]
        else:
            pairs = [(path, folder / path.name)]
        if not pairs:
            raise UsageError(f"there is no .onnx file in {given!r}; give models, folders of them, or patterns")
        for model, output in pairs:
            if found.setdefault(output, model).resolve() != model.resolve():
                raise UsageError(f"{str(found[output])!r} and {str(model)!r} would both be {str(output)!r}; rename one")
            if model.resolve() == output.resolve():
                raise UsageError(f"the folder {str(folder)!r} holds the model {str(model)!r}; choose another folder")
    if sys.platform in ("darwin", "win32"):
        _check_distinct_names(found)
    return [Job(model, output, compute_key(model, request)) for output, model in found.items()]


def _check_distinct_names(outputs: Iterable[Path]) -> None:
    """Refuse names that differ in case only, because they are the same file on macOS and Windows."""
    seen: dict[str, Path] = {}
    for output in outputs:
        twin = seen.setdefault(os.fspath(output).casefold(), output)
        if twin != output:
            raise UsageError(f"{str(twin)!r} and {str(output)!r} would be one file on this system; rename one model")


def compute_key(model: Path, request: Request) -> str:
    """Compute a digest of model, options and versions; "" if there is no such file."""
    request = replace(request, output=None, inputs=None, writing=replace(request.writing, force=False))
    options = {f.name: repr(getattr(request, f.name)) for f in dataclasses.fields(request) if f.compare}
    machine = installation.describe_machine(request.execution_provider, request.first_threads)
    versions = (__version__, machine["onnxruntime"])
    passes = [(p.name, fingerprint(p)) for p in resolve(request, model)]
    profile = request.measuring.target_profile
    with contextlib.suppress(OSError):
        database = b"" if profile is None else Path(profile).read_bytes()
        return hashlib.sha256(
            f"{options} {versions} {passes} {database!r} {digest_content(model)}".encode()
        ).hexdigest()
    return ""


def digest_content(model: Path) -> str:
    """Return the digest of a model's file, and the sizes and dates of its external data."""
    data = model.read_bytes()
    found = [hashlib.sha256(data).hexdigest()]
    with contextlib.suppress(Exception):  # optimising the model reports what cannot be read
        proto = onnx.ModelProto.FromString(data)
        folder = find_data_folder(proto, model)
        stats = [(name, (folder / name).stat()) for name in sorted(set(find_locations(proto).values()))]
        found += [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]
    return " ".join(found)


def optimize_many(
    models: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    request: Request | None = None,
    *,
    workers: int = 1,
    runner: Runner | None = None,
    progress: Progress = ignore_progress,
    report_row: Callable[[BatchRow], None] = lambda _row: None,
) -> list[BatchRow]:
    """Optimise many models into a folder, with a report for each; skip what an earlier batch finished.

    Parameters
    ----------
    models : iterable of paths
        Files, folders (searched for .onnx files), or patterns such as ``"*.onnx"``.
    folder : path
        Receives results, reports (``NAME.report.json``, .html with pwopt[report]) and the index (.json and .html).
    request : Request, optional
        The request for each model.
    workers : int
        Number of processes. Only one of them measures at a time.
    runner : callable, optional
        Runs the jobs elsewhere, such as `pwopt.optimizing.cluster.Fleet`.
    progress, report_row : callable, optional
        Called with (stage, fraction done), and with each row as soon as it is known.

    Returns
    -------
    list of BatchRow
        In the order of the models. A model that fails does not stop the others.

    Raises
    ------
    UsageError
        If there is no model, the folder cannot be created, or `workers` is below 1.
    """
    run = runner or (_run_in_turn if workers == 1 else Processes(workers))
    request, where = request or Request(), _make_folder(Path(folder))
    listed, earlier = find_jobs(models, where, request), _read(where / INDEX)
    rows = {job.output: row for job in listed if (row := _find_unchanged(job, where, earlier)) is not None}
    for row in rows.values():
        report_row(row)
    todo = {os.fspath(job.output): job for job in listed if job.output not in rows}
    written = time.monotonic()

    def write_index() -> None:
        _write_index(where, [rows[job.output] for job in listed if job.output in rows], earlier)

    try:
        for done in run(list(todo.values()), request, progress):
            job = todo[done.row.output]
            rows[job.output] = _store_result(job, done, where)
            report_row(rows[job.output])
            if time.monotonic() - written > INDEX_SECONDS:
                write_index()
                written = time.monotonic()
    finally:
        write_index()
    return [rows[job.output] for job in listed]


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {str(folder)!r} cannot be created: {error.strerror}") from error
    return folder


def _find_unchanged(job: Job, where: Path, earlier: Mapping[str, BatchRow]) -> BatchRow | None:
    """Return the row of a job that an earlier batch finished, if its model, options and output are unchanged."""
    row = earlier.get(os.path.relpath(job.output, where))
    same = row is not None and job.key and row.key == job.key and row.written == _hash_output(job.output)
    return replace(row, status="unchanged") if row is not None and same else None


def _store_result(job: Job, done: JobResult, where: Path) -> BatchRow:
    """Write the report and the page of a job, and return its row."""
    row = replace(done.row, output=os.path.relpath(job.output, where), key=job.key)
    if row.status == "done":
        row = replace(row, written=_hash_output(job.output))
    for path, text in ((job.report, done.report), (job.page, done.page)):
        if text:
            with replacing(path) as stream:
                stream.write(text.encode())
    return row


def _hash_output(output: Path) -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(output.read_bytes()).hexdigest()
    return "nothing"


def _read(index: Path) -> dict[str, BatchRow]:
    """Read the rows of earlier batches by output; empty without an index, or with a damaged one."""
    try:
        rows = [read_record(BatchRow, content) for content in read_json(index)["rows"]]
        return {row.output: row for row in rows if row.status != "failed"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def format_index(rows: Sequence[BatchRow]) -> str:
    """Format the index of all models as JSON."""
    return to_json({"schema": REPORT_SCHEMA, "pwopt": __version__, "rows": [asdict(r) for r in rows]})


def _write_index(where: Path, rows: Sequence[BatchRow], earlier: dict[str, BatchRow]) -> None:
    """Write both indices, including the models of earlier batches that are not part of this one."""
    mine = {r.output for r in rows}
    everything = [*rows, *(r for r in earlier.values() if r.output not in mine and (where / r.output).exists())]
    with replacing(where / INDEX) as stream:
        stream.write(format_index(everything).encode())
    with contextlib.suppress(ImportError):
        from pwopt.reporting.index import render_index

        with replacing(where / "index.html") as stream:
            stream.write(render_index(everything, where).encode())


def run_job(job: Job, request: Request, called: tuple[PurePath, PurePath] | None = None) -> JobResult:
    """Optimise one model. The row reports any error. `called` gives the file names for the row and the report."""
    start = time.perf_counter()
    model, output = map(os.fspath, called or (job.model, job.output))
    row = BatchRow(model, output, "failed")
    report: Report | None = None
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        report = run_request(job.model, replace(request, output=job.output)).report
        row = replace(summarize(row, report), status="done")
    except PwoptError as error:
        report = getattr(error, "report", None)
        row = replace(row, sentence=str(error), code=error.exit_code)
    except Exception as error:
        row = replace(row, sentence=f"internal error ({type(error).__name__}: {error})", code=DEFECT_CODE)
    row = replace(row, seconds=time.perf_counter() - start)
    if report is None:
        return JobResult(row)
    report = replace(report, model=model, output=output)
    return JobResult(row, report.to_json(), render_page(report))


def summarize(row: BatchRow, report: Report) -> BatchRow:
    """Add the figures of a report to a row."""
    a, b, t = report.before, report.after, report.latency
    row = replace(row, nodes=(a.nodes, b.nodes), macs=(a.macs, b.macs), sentence=" ".join(report.notes))
    if t is None:
        return row
    small = next((c.latency for c in report.conditions if c.small_pages), None)
    return replace(
        row, speedup=t.speedup, low=t.interval[0], high=t.interval[1], faster=t.faster,
        small_pages=None if small is None else (small.speedup, *small.interval),
        start=None if t.start is None else (t.start.speedup, *t.start.interval),
    )  # fmt: skip


def render_page(report: Report) -> str:
    """Render a report as HTML; "" if pwopt[report] is not installed."""
    try:
        from pwopt.reporting.document import render_document

        return render_document(report, "html")
    except ImportError:
        return ""


def _run_in_turn(todo: Sequence[Job], request: Request, progress: Progress) -> Iterator[JobResult]:
    for i, job in enumerate(todo):

        def show_stage(stage: str, done: float, i: int = i, name: str = job.model.name) -> None:
            progress(f"{name}: {stage}", (i + done) / len(todo))

        yield run_job(job, replace(request, progress=track_run(show_stage)))


@dataclass(frozen=True)
class Processes:
    """Runs jobs in child processes. Only one of them measures at a time."""

    workers: int

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"{self.workers} workers are too few; give 1 or more")

    def __call__(self, todo: Sequence[Job], request: Request, progress: Progress) -> Iterator[JobResult]:
        plain = replace(request, progress=ignore_progress)
        with temporary_folder() as folder:

            def start() -> Child:
                return Child(serve_jobs, os.fspath(folder / "clock"), _main_module(request))

            progress(f"0 of {len(todo)} models", 0.0)
            for count, (index, answer) in enumerate(ask_all(start, [(job, plain) for job in todo], self.workers), 1):
                progress(f"{count} of {len(todo)} models", count / len(todo))
                yield answer if isinstance(answer, JobResult) else _fail(todo[index], answer)


def _fail(job: Job, error: PwoptError) -> JobResult:
    """Return the result of a job whose process did not start, or died."""
    died = f"the process died ({error}), perhaps because memory ran out; try it alone, or on a larger machine"
    sentence = died if isinstance(error, EndedError) else str(error)
    return JobResult(BatchRow(os.fspath(job.model), os.fspath(job.output), "failed", sentence, DEFECT_CODE))


def _main_module(request: Request) -> str:
    """Return the file of the running program if it defines a pass of the request, so that a child can import it."""
    passes = [p if isinstance(p, type) else type(p) for p in (*(request.passes or ()), *request.plugins)]
    path = getattr(sys.modules["__main__"], "__file__", None)
    return os.path.abspath(path) if path and any(p.__module__ == "__main__" for p in passes) else ""


def serve_jobs(clock: str, program: str) -> None:
    """In a child: optimise one model after another."""
    channel = Channel()
    if program:  # multiprocessing uses this name too; a program that tests for "__main__" does not start again
        module = types.ModuleType("__mp_main__")
        module.__dict__.update(runpy.run_path(program, run_name="__mp_main__"))
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    installation.silence_onnxruntime()
    turn.share_turn(FileLock(Path(clock)))
    with signals_interrupt():
        while (question := channel.receive()) is not None:
            channel.send(run_job(*question))
