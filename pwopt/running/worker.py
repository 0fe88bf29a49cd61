"""Models are tried in a process of their own, where native code may crash, hang, or take all memory."""

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
from pathlib import Path
from typing import Any, BinaryIO

from pwopt.errors import PwoptError
from pwopt.running import providers, runtime
from pwopt.running.runtime import Feeds, Session

#: Seconds that a candidate may take to load and run once, at least; and as a multiple of what the original took.
PATIENCE, SLOWER = 20.0, 20.0
#: Bytes of address space that a candidate may take beyond what the original took, and as a multiple of that (Linux).
ROOM, LARGER = 2 << 30, 2.0
#: Length of a message in front of it.
HEADER = struct.Struct("<Q")


class Worker:
    """Loads and runs candidates on the same inputs, each once.

    The first model is the original: what it takes bounds the time and memory of all others. A worker that died is
    replaced at the next question. Where no process can be started, nothing is objected to.

    Parameters
    ----------
    original : path
    provider, threads
        As for `Session`.
    feeds : dict of arrays
    """

    def __init__(self, original: Path, provider: str, threads: int, feeds: Feeds) -> None:
        self._original, self._setting = original, (provider, threads, feeds)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[Any] = queue.Queue()
        self._limit = PATIENCE
        self._usable = True

    def fault(self, model: Path) -> str:
        """Why a model cannot be used, as a clause ("it crashes onnxruntime (SIGFPE)"), else ""."""
        if self._process is None and self._usable:
            self._start()
        if self._process is None:
            return ""
        answer = self._ask(str(model), self._limit)
        return answer if isinstance(answer, str) else ""

    def _start(self) -> None:
        command = [sys.executable, "-m", "pwopt.running.worker"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._usable = False
            return
        self._answers = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        begin = time.perf_counter()
        answer = self._ask((*self._setting, str(self._original)), 3600.0)
        if answer != "":  # the original does not survive either: this tells nothing of candidates
            self.close()
            self._usable = False
        self._limit = max(PATIENCE, SLOWER * (time.perf_counter() - begin))

    def _ask(self, question: Any, seconds: float) -> Any:
        """The answer, or a clause on what became of the worker, which is gone then."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            _send(process.stdin, question)
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
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
    return f"exit code {code}"


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
    status = Path("/proc/self/status")
    if not status.exists():
        return
    import resource

    taken = next((int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmPeak:")), 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(LARGER * taken * 1024) + ROOM
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))


def _tried(path: str, provider: str, threads: int, feeds: Feeds) -> str:
    try:
        Session(path, provider, threads).run(feeds)
    except PwoptError as error:
        return str(error)
    except MemoryError:
        return "it takes more memory than the original by far"
    return ""


def _main() -> None:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write where answers go
    provider, threads, feeds, original = _receive(sys.stdin.buffer)
    runtime.silence()
    _send(answers, _tried(original, provider, threads, feeds))
    if runtime.provider_name(provider) == providers.CPU:
        _bound_memory()
    while (path := _receive(sys.stdin.buffer)) is not None:
        _send(answers, _tried(path, provider, threads, feeds))


if __name__ == "__main__":
    _main()
