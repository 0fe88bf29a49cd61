"""Several child processes that answer questions side by side, and a lock that they share."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pwopt.errors import PwoptError
from pwopt.running.child_process import Child, EndedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Seconds between two attempts to get a lock (Windows).
LOCK_INTERVAL = 0.1


def ask_all(start: Callable[[], Child], questions: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """Ask children questions, each child one at a time.

    If a child dies, its question is asked once more at the end, when no other child runs.

    Parameters
    ----------
    start : callable
        Starts a child.
    questions : sequence
    workers : int
        How many children there are at most.

    Yields
    ------
    tuple of int and object
        The index of a question and its answer, in the order of the answers. The answer is an error if its child did not
        start, or died twice.
    """
    waiting, answers = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Any]]()
    children: dict[int, Child] = {}
    ended = threading.Event()
    for index in range(len(questions)):
        waiting.put(index)

    def work(place: int) -> None:
        while not ended.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            answers.put((index, _ask(children, place, start, questions[index])))

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(min(workers, len(questions)))]
    again: list[int] = []
    try:
        for thread in threads:
            thread.start()
        for _ in questions:
            index, answer = answers.get()
            if isinstance(answer, EndedError):
                again.append(index)
            else:
                yield index, answer
        for index in again:
            yield index, _ask(children, 0, start, questions[index])
    finally:
        ended.set()
        for child in list(children.values()):
            child.close(gently=True)


def _ask(children: dict[int, Child], place: int, start: Callable[[], Child], question: Any) -> Any:
    """Ask the child at some place, after starting it if necessary; returns the answer or the error."""
    try:
        if place not in children:
            children[place] = start()
        return children[place].ask(question, math.inf)
    except PwoptError as error:
        if place in children:
            children.pop(place).close()
        return error


class FileLock:
    """A lock between processes of one machine, which the system releases when a process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> None:
        self._stream = self._path.open("ab")
        if fcntl is not None:
            fcntl.flock(self._stream, fcntl.LOCK_EX)
            return
        import msvcrt

        while True:
            try:
                self._stream.seek(0)
                msvcrt.locking(self._stream.fileno(), msvcrt.LK_NBLCK, 1)
                return
            except OSError:
                time.sleep(LOCK_INTERVAL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
