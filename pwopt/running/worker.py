"""Models are tried and raced in a process of their own, where native code may crash, hang, or take all memory."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pwopt.errors import PwoptError
from pwopt.inputs.samples import Feeds
from pwopt.running import huge_pages, installation, providers, timing
from pwopt.running.child import child_command
from pwopt.running.progress import Progress
from pwopt.running.providers import Provider
from pwopt.running.session import NodeTime, Session
from pwopt.running.stopwatch import Stopwatch, processor_time_of
from pwopt.running.timing import Race, Rules

#: Seconds of work (`pwopt.running.stopwatch.Stopwatch`) that a candidate may take to load and run once: at least, and
#: as a multiple of what the original took.
PATIENCE, SLOWER = 20.0, 20.0
#: Bytes of address space that a candidate may take beyond what the original took, and as a multiple of that (Linux).
ROOM, LARGER = 2 << 30, 4.0
#: What Linux says of a process's memory (proc(5)).
STATUS = Path("/proc/self/status")
#: Runs under the profiler, at most, and in how many pairs of fresh sessions.
MOST, PROFILED_PAIRS = 12, 2
#: Seconds between two looks at how a race goes.
TICK = 0.1
#: Length of a message in front of it.
HEADER = struct.Struct("<Q")


_NOTHING: Any = object()


class UnusableError(PwoptError):
    """A model that no longer ran when it was timed; the message is a clause."""


class Worker:
    """Loads, runs and races models in a process of its own.

    The first model is the original: what it takes bounds the time and memory of all others. A worker that died is
    replaced at the next question. Where no process can be started, nothing is objected to.

    Parameters
    ----------
    original : path
    provider, threads
        As for `Session`.
    feeds : dict of arrays
    huge : bool
        Whether the process asks for huge pages (`pwopt.running.huge_pages`).
    """

    def __init__(self, original: Path, provider: Provider, threads: int, feeds: Feeds, *, huge: bool = True) -> None:
        self._original, self._setting = original, (provider, threads, feeds)
        self._environ = (huge_pages.requesting if huge else huge_pages.refusing)(os.environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[Any] = queue.Queue()
        self._limit = PATIENCE
        self._usable = True
        #: Seconds that the original took to load, and to run once.
        self.took = (0.0, 0.0)

    @property
    def ready(self) -> bool:
        """Whether there is a process to ask, or could be started."""
        if self._process is None and self._usable:
            self._start()
        return self._process is not None

    def fault(self, model: Path) -> str:
        """Why a model cannot be used, as a clause ("it crashes onnxruntime (SIGFPE)"), else ""."""
        answer = self._ask(("tried", str(model)), self._limit) if self.ready else ""
        return answer if isinstance(answer, str) else ""

    def race(
        self, models: Sequence[Path], threads: int, feeds: Feeds, seconds: float, rules: Rules, progress: Progress
    ) -> Race:
        """`timing.race` there; only of models that had no fault, when the worker is `ready`.

        Raises
        ------
        UnusableError
            If one of them fails now.
        """
        patience = self._limit + timing.MIN_PAIRS * (len(models) + 1) * self._limit / SLOWER + 4 * seconds
        question = ("raced", [str(m) for m in models], threads, feeds, seconds, rules)
        answer = self._ask(
            question, patience, lambda spent: progress("racing", min(1.0, spent / max(seconds, spent, 1e-9)))
        )
        if isinstance(answer, Race):
            return answer
        raise UnusableError(str(answer))

    def profiles(self, models: Sequence[Path], seconds: float, least: int) -> tuple[list[list[list[NodeTime]]], float]:
        """For each model, what every operator took in some runs, side by side with those of the others.

        Besides, which part of the time that passed they had for themselves.

        Raises
        ------
        UnusableError
        """
        answer = self._ask(("profiled", [str(m) for m in models], seconds, least), self._limit + 4 * seconds)
        if isinstance(answer, tuple):
            return answer
        raise UnusableError(str(answer))

    def _start(self) -> None:
        command = child_command(serve)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environ,
            )
        except OSError:
            self._usable = False
            return
        self._answers = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        watch = Stopwatch(processor_time_of(self._process.pid))
        answer = self._ask((*self._setting, str(self._original)), 3600.0)
        if isinstance(answer, str):  # the original does not survive either: this tells nothing of candidates
            self.close()
            self._usable = False
        else:
            self.took = answer
        self._limit = max(PATIENCE, SLOWER * watch.elapsed())

    def _ask(self, question: Any, seconds: float, waiting: Callable[[float], None] = lambda _: None) -> Any:
        """The answer, or a clause on what became of the worker, which is gone then."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # a broken pipe, which Windows calls an invalid argument
            _send(process.stdin, question)
        begin, watch, answer = time.perf_counter(), Stopwatch(processor_time_of(process.pid)), _NOTHING
        while answer is _NOTHING:
            waiting(time.perf_counter() - begin)
            try:
                answer = self._answers.get(timeout=TICK)
            except queue.Empty:
                if watch.elapsed() >= seconds:
                    self.close()
                    return f"it did not finish within {seconds:.0f} seconds"
        if answer is None:
            code = process.wait()
            self.close()
            return f"it crashes onnxruntime ({_ended(code)})"
        return answer

    def close(self) -> None:
        """End the worker's process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()


def _ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code:#x}" if code > 255 else f"exit code {code}"  # Windows has its faults there


def _send(stream: BinaryIO | Any, message: Any) -> None:
    content = pickle.dumps(message)
    stream.write(HEADER.pack(len(content)) + content)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    """The next message; None at the end."""
    header = stream.read(HEADER.size)
    return pickle.loads(stream.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


def _listen(stream: BinaryIO | Any, answers: queue.Queue[Any]) -> None:
    """Put every answer into a queue, and None when the worker has ended."""
    answer: Any = ""
    while answer is not None:
        try:
            answer = _receive(stream)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError):
            answer = None
        answers.put(answer)


def _bound_memory() -> None:
    """Let this process grow to a multiple of what it took so far, and not beyond (Linux)."""
    if not STATUS.exists():
        return
    import resource

    lines = STATUS.read_text(encoding="utf-8").splitlines()
    taken = next((int(line.split()[1]) for line in lines if line.startswith("VmPeak:")), 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(LARGER * taken * 1024) + ROOM
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))


class _Track:
    """Answers the worker's questions, with a fresh session for each."""

    def __init__(self, provider: Provider, threads: int, feeds: Feeds) -> None:
        self._provider, self._threads, self._feeds = provider, threads, feeds

    def tried(self, path: str) -> tuple[float, float]:
        """Wall seconds that a model takes to load and to run."""
        begin = time.perf_counter()
        session = Session(path, self._provider, self._threads, tf32=True)
        loaded = time.perf_counter()
        session.run(self._feeds)
        return loaded - begin, time.perf_counter() - loaded

    def profiled(self, paths: Sequence[str], seconds: float, least: int) -> tuple[list[list[list[NodeTime]]], float]:
        """See `Worker.profiles`."""
        runs: list[list[list[NodeTime]]] = [[] for _ in paths]
        passed = spent = 0.0
        for k in range(PROFILED_PAIRS):
            order = range(len(paths)) if k % 2 == 0 else range(len(paths))[::-1]
            sessions = {i: Session(paths[i], self._provider, self._threads, profile=True, tf32=True) for i in order}
            begin, done = time.perf_counter(), 0
            while done <= least / PROFILED_PAIRS or (
                done <= MOST / PROFILED_PAIRS and time.perf_counter() - begin < seconds / PROFILED_PAIRS
            ):
                for session in sessions.values():
                    session.profiled_run(self._feeds)
                done += 1
            passed += time.perf_counter() - begin
            spent += sum(session.spent for session in sessions.values())
            for i, session in sessions.items():
                runs[i] += session.runs()
        return runs, spent / passed

    def raced(self, paths: Sequence[str], threads: int, feeds: Feeds, seconds: float, rules: Rules) -> Race:
        """See `Worker.race`."""
        openers = [partial(Session, p, self._provider, threads, tf32=True) for p in paths]  # as users run them
        return timing.race(openers, feeds, seconds, rules=rules)


def _answered(track: _Track, question: str, *arguments: Any) -> Any:
    """What a track says, or why it cannot, as a clause."""
    try:
        return getattr(track, question)(*arguments)
    except PwoptError as error:
        return str(error)
    except MemoryError:
        return "it takes more memory than the original by far"


def serve() -> None:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write where answers go
    provider, threads, feeds, original = _receive(sys.stdin.buffer)
    installation.silence_onnxruntime()
    track = _Track(provider, threads, feeds)
    _send(answers, _answered(track, "tried", original))
    if provider.name == providers.CPU:
        _bound_memory()
    while (question := _receive(sys.stdin.buffer)) is not None:
        _send(answers, _answered(track, *question))
