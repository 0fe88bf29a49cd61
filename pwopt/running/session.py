"""onnxruntime sessions that run on the requested provider, or fail."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pwopt.errors import ModelError, ProviderError, PwoptError, UsageError
from pwopt.graph.temporary import temporary_folder
from pwopt.inputs.feeds import Feeds
from pwopt.running import providers
from pwopt.running.installation import import_onnxruntime, suggest_wheel
from pwopt.running.provider_libraries import MODULES, find_device, wheel_of
from pwopt.running.providers import Provider

#: Counter for the names of profiles in this process.
PROFILES = itertools.count()


class NodeTime(NamedTuple):
    """The time of a node: its operator and name after onnxruntime's fusions, and seconds per run."""

    op: str
    name: str
    seconds: float


class Session:
    """A model loaded by onnxruntime on exactly one provider (and the CPU for what that cannot run).

    Parameters
    ----------
    path : path
        The model file.
    provider : Provider
    threads : int
        Intra-operator threads; 1 is the least noisy.
    optimise : bool
        Use all graph optimisations, as users do; or none, to see the effect of rounding.
    tf32 : bool
        Whether CUDA may round float32 products to 10 bits, as it does by default. Used for timing only.
    profile : bool
        Record where each node runs, and its time; see `placement` and `nodes`.

    Raises
    ------
    ProviderError
        If the provider is not available, has no memory left, or onnxruntime silently replaced it.
    ModelError
        If onnxruntime cannot load the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        provider: Provider = providers.DEFAULT,
        threads: int = 1,
        *,
        optimise: bool = True,
        tf32: bool = False,
        profile: bool = False,
    ) -> None:
        self.provider = provider
        ort = load_provider(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        if profile:
            options.enable_profiling = True
            # onnxruntime adds the second only; the name must be unique
            options.profile_file_prefix = os.fspath(_profile_folder() / f"profile_{next(PROFILES)}")
        library = providers.find_plugin(provider)
        if library is None:
            chain = provider.chain(tf32)
        else:
            chain = None  # the options hold the provider
            device = find_device(ort, library, provider.name, provider.wanted_device)
            options.add_provider_for_devices([device], provider.plugin_options(threads, tf32))
        try:
            # The fallback would replace the provider, now or in a later run.
            self.session = ort.InferenceSession(os.fspath(path), options, providers=chain, enable_fallback=0)
        except Exception as error:
            raise self._explain_failure(error, path) from error
        if provider.name not in self.session.get_providers():
            why = "; ".join(providers.find_obstacles(ort, provider)) or "its libraries or its device are missing"
            raise ProviderError(f"{provider.name} could not start: {why}; nothing was run")
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self._binding: Any = None
        self._spent: list[float] = []
        #: The clock for `step`. On one thread of the CPU it counts the time of this thread, so that other load on the
        #: machine does not count. Otherwise it is wall-clock time; so on Windows, whose thread time has steps of 16 ms.
        #: Whether it is onnxruntime's own CPU provider that runs the model.
        self.on_cpu = self.provider.name == providers.CPU
        alone = self.on_cpu and threads == 1 and sys.platform != "win32"
        self.clock: Callable[[], float] = time.thread_time if alone else time.perf_counter
        #: Whether threads of this session spin for a while after a run, and so disturb the next one.
        self.spins = self.on_cpu and threads > 1

    def _explain_failure(self, error: Exception, path: str | os.PathLike[str]) -> ProviderError | ModelError:
        """Decide whether the model or the provider is at fault when a model does not load."""
        reason = _first_line(error)
        if self.provider.name == providers.CPU:
            return ModelError(f"onnxruntime does not load the model: {reason}")
        missing = "; ".join(providers.find_obstacles(import_onnxruntime(), self.provider))
        if missing:
            return ProviderError(f"{self.provider.name} could not start: {missing}; nothing was run")
        if providers.is_out_of_memory(reason):
            return ProviderError(f"{self.provider} has no memory left to load this model: {reason}")
        if _loads_on_cpu(path):
            return ProviderError(f"{self.provider} does not run this model: {reason}")
        return ModelError(f"onnxruntime does not load the model: {reason}")

    def run(self, feeds: Feeds, options: Any = None) -> list[Any]:
        """Run the model; returns its outputs in the model's order. `options` are onnxruntime's RunOptions."""
        try:
            if not self.provider.captured:
                return list(self.session.run(None, feeds, options))
            self.bind(feeds)
            self.step()
            return list(self._binding.copy_outputs_to_cpu())
        except Exception as error:
            raise self._explain_run(error) from error

    def _explain_run(self, error: Exception) -> PwoptError:
        """Decide whether the model or the provider is at fault when a run fails."""
        if isinstance(error, PwoptError):
            return error
        reason = _first_line(error)
        if self.provider.name != providers.CPU and providers.is_out_of_memory(reason):
            hint = "give smaller sizes with --shape, or another device"
            return ProviderError(f"{self.provider} ran out of memory on these inputs ({reason}); {hint}")
        return ModelError(f"onnxruntime cannot run the model on these inputs: {reason}")

    def bind(self, feeds: Feeds) -> None:
        """Place inputs and outputs on the provider's device, so that timing does not include copies."""
        self._feeds = feeds
        ort, place = import_onnxruntime(), self.provider.memory
        if place[0] == "cpu" and not self.provider.captured:
            return
        self._binding = self.session.io_binding()
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, *place))
        for name in self.outputs:
            self._binding.bind_output(name, *place)
        if self.provider.captured:  # a replay writes to the addresses of the first run
            self.session.run_with_iobinding(self._binding)
            for name, value in zip(self.outputs, self._binding.get_outputs(), strict=True):
                self._binding.bind_ortvalue_output(name, value)

    def step(self) -> None:
        """Run once on the bound inputs, and wait for the result."""
        try:
            if self._binding is None:
                self.session.run(None, self._feeds)
            else:
                self.session.run_with_iobinding(self._binding)
                self._binding.synchronize_outputs()
        except Exception as error:
            raise self._explain_run(error) from error

    def placement(self) -> dict[str, list[str]]:
        """List the nodes that ran on each provider, as "Op name", from a profiled session; ends the profile."""
        placed: dict[str, dict[str, None]] = {}
        for _, name, arguments, _ in self._read_profile():
            title = f"{arguments.get('op_name', 'unknown')} {name}".strip()
            placed.setdefault(arguments.get("provider", "unknown"), {})[title] = None
        return {provider: list(names) for provider, names in placed.items()}

    def profiled_run(self, feeds: Feeds) -> None:
        """Run once, and record its time by `clock`."""
        begin = self.clock()
        self.run(feeds)
        self._spent.append(self.clock() - begin)

    @property
    def spent(self) -> float:
        """Seconds of all profiled runs so far, by `clock`."""
        return sum(self._spent)

    def nodes(self) -> list[NodeTime]:
        """List the nodes with the median of their times over all profiled runs; ends the profile.

        onnxruntime's profiler uses wall-clock time. If the medians add up to more than the time of a run by `clock`,
        other load on the machine delayed nodes, so all times are scaled down to it.
        """
        times: dict[tuple[str, str], dict[int, float]] = {}
        for run, name, arguments, seconds in self._read_profile():
            seen = times.setdefault((arguments.get("op_name", "unknown"), name), {})
            seen[run] = seen.get(run, 0.0) + seconds
        found = [NodeTime(op, name, float(np.median(list(seen.values())))) for (op, name), seen in times.items()]
        whole = sum(node.seconds for node in found)
        own = min(1.0, float(np.median(self._spent)) / whole) if self._spent and whole else 1.0
        return [NodeTime(node.op, node.name, own * node.seconds) for node in found]

    def runs(self) -> list[list[NodeTime]]:
        """List the times of all nodes in each profiled run except the first, scaled as in `nodes`; ends the profile."""
        seen: dict[int, list[NodeTime]] = {}
        for run, name, arguments, seconds in self._read_profile():
            seen.setdefault(run, []).append(NodeTime(arguments.get("op_name", "unknown"), name, seconds))
        found = []
        for nodes, spent in list(zip(seen.values(), self._spent, strict=False))[1:]:
            whole = sum(node.seconds for node in nodes)
            own = min(1.0, spent / whole) if whole else 1.0
            found.append([NodeTime(node.op, node.name, own * node.seconds) for node in nodes])
        return found

    def _read_profile(self) -> Iterator[tuple[int, str, dict[str, Any], float]]:
        """Generate an entry for each node of each run: the run, the node's name, the profiler's arguments, seconds."""
        path = Path(self.session.end_profiling())
        text = path.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(PermissionError):  # Windows, while a virus scanner has it open
            path.unlink(missing_ok=True)
        run = 0
        for event in _parse_events(text):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                yield run, event["name"].removesuffix("_kernel_time"), event["args"], event["dur"] / 1e6
            run += event.get("cat") == "Session" and event["name"] == "model_run"  # written at the end of a run


@functools.cache
def _profile_folder() -> Path:
    """Create the folder for profiles of this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_folder())


def _parse_events(profile: str) -> list[dict[str, Any]]:
    """Parse the events of a profile; skip those whose names contain quotes that an older onnxruntime did not escape."""
    with contextlib.suppress(json.JSONDecodeError):
        whole: list[dict[str, Any]] = json.loads(profile)
        return whole
    events: list[dict[str, Any]] = []
    for line in profile.splitlines():  # one event per line, between brackets
        with contextlib.suppress(json.JSONDecodeError):
            event = json.loads(line.strip().rstrip(","))
            events += [event] if isinstance(event, dict) else []
    return events


def load_provider(provider: Provider) -> ModuleType:
    """Import onnxruntime and load the libraries of a provider.

    Raises
    ------
    ProviderError
        If onnxruntime lacks the provider.
    """
    ort = import_onnxruntime()
    there = ort.get_available_providers()
    if providers.find_plugin(provider) is None and provider.name not in there:
        raise ProviderError(f"{provider.name} is not in this onnxruntime (it has {', '.join(there)}){_hint(provider)}")
    if provider.name in providers.NVIDIA:
        providers.preload(ort)
    return ort


def _hint(provider: Provider) -> str:
    """Say which wheel to install for a missing provider, or nothing."""
    if provider.name in MODULES:
        return f"; pip install {wheel_of(MODULES[provider.name])}"
    wheel = providers.WHEELS.get(provider.name)
    return f"; {suggest_wheel(wheel)}" if wheel else ""


def _loads_on_cpu(path: str | os.PathLike[str]) -> bool:
    """Whether the CPU loads the model, so that a failure is the provider's."""
    try:
        import_onnxruntime().InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).strip())[:300]


def check_settings(threads: int, rtol: float | None, atol: float | None) -> None:
    """Refuse invalid numbers of threads and tolerances.

    Raises
    ------
    UsageError
    """
    if threads < 1:
        raise UsageError(f"{threads} threads cannot run anything; give 1 or more")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"a tolerance is a number from 0 on, and {name} is {value}")


def nodes_elsewhere(placed: Mapping[str, list[str]], provider: Provider) -> dict[str, list[str]]:
    """Select the part of a placement that is not on `provider`."""
    return {name: nodes for name, nodes in placed.items() if name != provider.name}


def find_fallbacks(
    path: str | os.PathLike[str], provider: Provider, threads: int, feeds: Feeds
) -> dict[str, tuple[str, ...]]:
    """Run a model under the profiler to find nodes that other providers ran, as provider → "Op name".

    The CPU provider runs every node, so the model is not run there.
    """
    if provider.name == providers.CPU:
        return {}
    session = Session(path, provider, threads, profile=True)
    session.run(feeds)
    return {name: tuple(nodes) for name, nodes in nodes_elsewhere(session.placement(), provider).items()}
