"""Child processes of Python: started with a clean module path, and asked by messages."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pwopt.errors import PwoptError
from pwopt.graph.temporary import temporary_folder
from pwopt.running.stopwatch import Stopwatch, processor_time_of

#: The folder that pwopt is imported from.
ROOT = str(Path(__file__).resolve().parents[2])
#: Seconds that a child may take to start.
START = 600.0
#: Seconds that it may take to end after it has closed its end of the messages.
END_SECONDS = 10.0
#: Seconds between two calls of `waiting` while a child works.
POLL_INTERVAL = 0.1
#: Each message begins with its length.
HEADER = struct.Struct("<Q")
#: The signals by which users, service managers and the system's memory limit kill a process.
KILLING = tuple(getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))

_READY = "ready"
_NOTHING: Any = object()


class StartError(PwoptError):
    """A child process did not start; the message is a clause."""


class TimeLimitError(PwoptError):
    """A child process exceeded its time limit, and was ended."""


class EndedError(PwoptError):
    """A child process ended before it answered.

    Attributes
    ----------
    killed : bool
        Whether a signal from outside ended it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(describe_exit(code))
        self.killed = -code in KILLING


def child_command(function: Callable[..., None], *arguments: str) -> list[str]:
    """Return the command that calls a function of a module in a new Python process.

    ``python -m`` and ``python -c`` search the current folder first, where a model may lie beside a file ``numpy.py``.
    So the child takes this process's module path without the current folder before it imports anything.

    Parameters
    ----------
    function : callable
        A function at the top of a module. It gets the arguments as strings.
    arguments : str
    """
    code = (
        f"import sys; sys.path[:] = {module_path()!r}; "
        f"from {function.__module__} import {function.__qualname__} as call; call(*sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *arguments]


def module_path() -> list[str]:
    """Return `sys.path` without the current folder, unless pwopt or Python's own packages lie there."""
    here, paths = os.path.abspath(os.curdir), sysconfig.get_paths()
    needed = {ROOT, *(os.path.abspath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
    kept = [os.path.abspath(p) for p in sys.path if p]
    kept = [p for p in kept if p != here or p in needed]
    return kept if ROOT in map(os.path.realpath, kept) else [*kept, ROOT]


class Child:
    """A Python process that answers messages, one after another.

    Parameters
    ----------
    function : callable
        What it runs: a function at the top of a module, which begins with `connect`.
    arguments : str
    environ : mapping, optional
        Environment variables; those of this process by default.

    Raises
    ------
    StartError
        If it does not start.
    """

    def __init__(
        self, function: Callable[..., None], *arguments: str, environ: Mapping[str, str] | None = None
    ) -> None:
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(temporary_folder())  # also for what the child leaves when it is killed
        command = child_command(function, *arguments)
        environ = {**(os.environ if environ is None else environ), "TMPDIR": os.fspath(folder)}
        try:
            with (folder / "stderr").open("wb") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environ
                )
        except OSError as error:
            self._stack.close()
            raise StartError(f"no process could be started ({error.strerror})") from error
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        try:
            self._wait(START, lambda _: None)
        except PwoptError as error:
            lines = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.close()
            raise StartError(f"the process ended while it started ({': '.join([str(error), *lines[-1:]])})") from error

    def ask(self, question: Any, seconds: float, waiting: Callable[[float], None] = lambda _: None) -> Any:
        """Send a message, and wait for the answer.

        Parameters
        ----------
        question : object
            Anything that can be pickled.
        seconds : float
            The time limit, in seconds of work (`pwopt.running.stopwatch.Stopwatch`).
        waiting : callable, optional
            Called with the seconds spent, again and again.

        Raises
        ------
        TimeLimitError, EndedError
            The process has ended then.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a broken pipe, which Windows calls an invalid argument
            _send(self._process.stdin, question)
        return self._wait(seconds, waiting)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def _wait(self, seconds: float, waiting: Callable[[float], None]) -> Any:
        begin, watch, answer = time.perf_counter(), Stopwatch(processor_time_of(self.pid)), _NOTHING
        while answer is _NOTHING:
            waiting(time.perf_counter() - begin)
            try:
                answer = self._answers.get(timeout=POLL_INTERVAL)
            except queue.Empty:
                if watch.elapsed() >= seconds:
                    self._process.kill()
                    raise TimeLimitError(f"it did not finish within {seconds:.0f} seconds") from None
        if answer is None:
            raise EndedError(self._wait_for_end())
        return answer

    def _wait_for_end(self) -> int:
        """Return the exit code of a process that has closed its end of the messages."""
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self, *, gently: bool = False) -> None:
        """End the process; `gently` gives it some seconds to remove its temporary folders."""
        if gently:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._stack.close()


class Channel:
    """The child's side of the messages."""

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # nothing else may write where answers go
        self.send(_READY)

    def receive(self) -> Any:
        """The next question; None at the end."""
        return _receive(sys.stdin.buffer)

    def send(self, answer: Any) -> None:
        _send(self._output, answer)


def describe_exit(code: int) -> str:
    """Name the signal or the exit code that a process ended with."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code:#x}" if code > 255 else f"exit code {code}"  # Windows gives faults in hexadecimal


def _send(stream: BinaryIO | Any, message: Any) -> None:
    content = pickle.dumps(message)
    stream.write(HEADER.pack(len(content)) + content)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    """The next message; None at the end."""
    header = stream.read(HEADER.size)
    return pickle.loads(stream.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


def _listen(stream: BinaryIO | Any, answers: queue.Queue[Any]) -> None:
    """Put every answer into a queue, and None when the process has ended."""
    answer: Any = ""
    while answer is not None:
        try:
            answer = _receive(stream)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError):
            answer = None
        answers.put(answer)
