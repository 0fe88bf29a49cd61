"""The worker: loads, runs and races models in a child process, where native code may crash, hang or use all memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from pwopt.errors import PwoptError
from pwopt.inputs.feeds import Feeds
from pwopt.running import huge_pages, installation, memory, providers, timing
from pwopt.running.child_process import POLL_INTERVAL, Channel, Child, EndedError, StartError, TimeLimitError
from pwopt.running.progress import Progress
from pwopt.running.providers import Provider
from pwopt.running.session import NodeTime, Session
from pwopt.running.stopwatch import Stopwatch, processor_time_of
from pwopt.running.timing import Race, Rules

#: The limit for loading and running a candidate once, in seconds of work (`pwopt.running.stopwatch.Stopwatch`): at
#: least, and as a multiple of the original's.
MIN_TIME_LIMIT, SLOWER = 20.0, 20.0
#: The address space in bytes that a candidate may use beyond the original's, and as a multiple of it (Linux).
ROOM, LARGER = 2 << 30, 4.0
#: Linux's description of a process's memory (proc(5)).
MEMORY_STATUS = Path("/proc/self/status")
#: Runs under the profiler, at most, and in how many fresh sessions of each model.
MAX_PROFILED_RUNS, PROFILED_SESSIONS = 12, 2
#: The time limit in seconds for loading and running the original.
ORIGINAL_TIME_LIMIT = 3600.0


class UnusableError(PwoptError):
    """A model failed while it was timed; the message is a clause."""


class Worker:
    """Loads, runs and races models in a child process.

    The first model is the original: its time and memory set the limits of all others. If the process dies, the next
    question starts another one. If it is killed from outside, the same question is asked again, once. If no process can
    be started, `problem` says why, and no fault is found.

    Parameters
    ----------
    original : path
    provider, threads
        As for `Session`.
    feeds : dict of arrays
    huge : bool
        Whether the process asks for huge pages (`pwopt.running.huge_pages`).
    together : bool
        Whether several sessions are open side by side, as for `timing.race`.
    """

    def __init__(
        self,
        original: Path,
        provider: Provider,
        threads: int,
        feeds: Feeds,
        *,
        huge: bool = True,
        together: bool = True,
    ) -> None:
        self._original, self._setting = original, (provider, threads, feeds, together)
        self._environ = (huge_pages.requesting if huge else huge_pages.refusing)(os.environ)
        self._child: Child | None = None
        self._starting: Future[None] | None = None
        self._limit = MIN_TIME_LIMIT
        #: Why there is no process, as a clause; "" if there may be one.
        self.problem = ""
        #: Seconds that the original took to load, and to run once.
        self.took = (0.0, 0.0)
        #: Bytes of the process's memory that lay in huge pages after the original's first run.
        self.huge_bytes = 0

    def start_early(self, pool: Executor) -> None:
        """Start the process in the background, while this one does something else that is not timed."""
        if self._child is None and not self.problem and self._starting is None:
            self._starting = pool.submit(self._start)

    def await_start(self) -> None:
        """Wait for the process if it starts in the background."""
        if self._starting is not None:
            self._starting.result()
            self._starting = None

    @property
    def ready(self) -> bool:
        """Whether there is a process, after an attempt to start one."""
        self.await_start()
        if self._child is None and not self.problem:
            self._start()
        return self._child is not None

    def fault(self, model: Path) -> str:
        """Say why a model cannot be used, as a clause ("it crashes onnxruntime (SIGFPE)"), else ""."""
        answer = self._ask(("run_once", str(model)), self._limit) if self.ready else ""
        return answer if isinstance(answer, str) else ""

    def race(
        self, models: Sequence[Path], threads: int, feeds: Feeds, seconds: float, rules: Rules, progress: Progress
    ) -> Race:
        """Run `timing.race` in the worker, on models without a fault; the worker must be `ready`.

        Raises
        ------
        UnusableError
            If a model fails now.
        """
        patience = self._limit + timing.MIN_PAIRS * (len(models) + 1) * self._limit / SLOWER + 4 * seconds
        question = ("race", [str(m) for m in models], threads, feeds, seconds, rules)
        answer = self._ask(
            question, patience, lambda spent: progress("racing", min(1.0, spent / max(seconds, spent, 1e-9)))
        )
        if isinstance(answer, Race):
            return answer
        raise UnusableError(str(answer))

    def profiles(
        self, models: Sequence[Path], seconds: float, least: int, sessions: int = PROFILED_SESSIONS
    ) -> tuple[list[list[list[NodeTime]]], float]:
        """Profile models side by side.

        Parameters
        ----------
        models : sequence of Path
        seconds : float
            How long to run all models.
        least : int
            The least number of runs of each model, whatever the time.
        sessions : int
            The number of fresh sessions of each model.

        Returns
        -------
        tuple
            For each model and run, the times of all nodes; and the fraction of the wall time that the models ran.

        Raises
        ------
        UnusableError
            If a model fails now.
        """
        patience = len(models) / 2 * self._limit + 4 * seconds
        answer = self._ask(("profile", [str(m) for m in models], seconds, least, sessions), patience)
        if isinstance(answer, tuple):
            return answer
        raise UnusableError(str(answer))

    def _start(self) -> None:
        try:
            self._child = Child(serve, environ=self._environ)
            watch = Stopwatch(processor_time_of(self._child.pid))
            answer = self._child.ask((*self._setting, str(self._original)), ORIGINAL_TIME_LIMIT)
        except StartError as error:
            self.problem = str(error)
            return
        except (TimeLimitError, EndedError) as error:
            answer = f"it crashes onnxruntime ({error})"
        if isinstance(answer, str):  # then faults of candidates would say nothing about candidates
            self._end()
            self.problem = f"the original model fails there: {answer}"
        else:
            self.took, self.huge_bytes = answer[:2], answer[2]
        self._limit = max(MIN_TIME_LIMIT, SLOWER * watch.elapsed())

    def _ask(self, question: Any, seconds: float, waiting: Callable[[float], None] = lambda _: None) -> Any:
        """Return the answer, or a clause on why there is none. The process has ended in that case."""
        for attempt in ("first", "second"):
            assert self._child is not None
            try:
                return self._child.ask(question, seconds, waiting)
            except TimeLimitError as error:
                self.close()
                return str(error)
            except EndedError as error:
                self.close()
                if not error.killed:
                    return f"it crashes onnxruntime ({error})"
                if attempt == "second" or not self.ready:
                    return f"its process was killed twice ({error})"
        raise AssertionError

    def close(self) -> None:
        """End the worker's process, if there is one, also while it starts."""
        starting, self._starting = self._starting, None
        while starting is not None and not starting.cancel() and not starting.done():
            if self._child is not None:
                self._child.close()
            wait([starting], POLL_INTERVAL)
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _bound_memory() -> None:
    """Limit the address space of this process to a multiple of its peak so far (Linux)."""
    if not MEMORY_STATUS.exists():
        return
    import resource

    lines = MEMORY_STATUS.read_text(encoding="utf-8").splitlines()
    taken = next((int(line.split()[1]) for line in lines if line.startswith("VmPeak:")), 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(LARGER * taken * 1024) + ROOM
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))


class _Sessions:
    """Answers the questions of a `Worker`, with a new session for each."""

    def __init__(self, provider: Provider, threads: int, feeds: Feeds, *, together: bool) -> None:
        self._provider, self._threads, self._feeds, self._together = provider, threads, feeds, together

    def run_once(self, path: str) -> tuple[float, float, int]:
        """Measure the wall seconds to load and to run a model, and the bytes in huge pages while it is loaded."""
        begin = time.perf_counter()
        session = Session(path, self._provider, self._threads, tf32=True)
        loaded = time.perf_counter()
        session.run(self._feeds)
        return loaded - begin, time.perf_counter() - loaded, huge_pages.held_bytes()

    def profile(
        self, paths: Sequence[str], seconds: float, least: int, count: int
    ) -> tuple[list[list[list[NodeTime]]], float]:
        """See `Worker.profiles`."""
        runs: list[list[list[NodeTime]]] = [[] for _ in paths]
        passed = spent = 0.0
        for k in range(count):
            order = range(len(paths)) if k % 2 == 0 else range(len(paths))[::-1]
            sessions: dict[int, Session] = {}
            for i in order:
                sessions[i] = Session(paths[i], self._provider, self._threads, profile=True, tf32=True)
                memory.release_freed()
                if self._together and len(sessions) < len(paths):
                    continue
                share = len(sessions) / len(paths)
                wall = self._profile_in_turn(list(sessions.values()), share * seconds / count, least / count, count)
                passed, spent = passed + wall, spent + sum(session.spent for session in sessions.values())
                for j, session in sessions.items():
                    runs[j] += session.runs()
                sessions.clear()
        return runs, spent / passed

    def _profile_in_turn(self, sessions: Sequence[Session], seconds: float, least: float, count: int) -> float:
        """Run profiled sessions in turn; return the wall seconds."""
        begin, done = time.perf_counter(), 0
        while done <= least or (done <= MAX_PROFILED_RUNS / count and time.perf_counter() - begin < seconds):
            for session in sessions:
                session.profiled_run(self._feeds)
            done += 1
        return time.perf_counter() - begin

    def race(self, paths: Sequence[str], threads: int, feeds: Feeds, seconds: float, rules: Rules) -> Race:
        """See `Worker.race`."""
        openers = [partial(Session, p, self._provider, threads, tf32=True) for p in paths]  # as users run them
        return timing.race(openers, feeds, seconds, rules=rules, together=self._together)


def _answer(sessions: _Sessions, question: str, *arguments: Any) -> Any:
    """Answer a question, or say why that fails, as a clause."""
    try:
        return getattr(sessions, question)(*arguments)
    except PwoptError as error:
        return str(error)
    except MemoryError:
        return "it takes more memory than the original by far"
    finally:
        memory.release_freed()


def serve() -> None:
    """In the child: answer questions until there are no more."""
    channel = Channel()
    if (setting := channel.receive()) is None:
        return
    provider, threads, feeds, together, original = setting
    installation.silence_onnxruntime()
    sessions = _Sessions(provider, threads, feeds, together=together)
    channel.send(_answer(sessions, "run_once", original))
    if provider.name == providers.CPU:
        _bound_memory()
    while (question := channel.receive()) is not None:
        channel.send(_answer(sessions, *question))
