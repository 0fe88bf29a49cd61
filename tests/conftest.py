import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No outcome may depend on how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("untimed")
pytest.register_assert_rewrite("helpers", "judge", "pruning", "branching")
os.environ.setdefault("COLUMNS", "120")
#: Read when numpy is imported. A second thread of a small product waits more than it computes, and takes a core for that.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
#: Decisions of races in tests stay out of the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="pwopt-cache-")
os.environ["PWOPT_CACHE"] = _CACHE.name
#: The gallery is no part of the installed package.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def _no_priors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried must not hang on the processor that tests run on."""
    from pwopt.selecting import priors

    monkeypatch.setattr(priors, "read_table", lambda: {"machines": [], "priors": {}})


@pytest.fixture(autouse=True)
def _no_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shape inference run in this process, as on other systems than Linux, except in tests marked memory_limit.

    A copy of the large process that runs tests takes 20 ms, and one optimisation may need dozens.
    """
    from pwopt.graph import limits

    if request.node.get_closest_marker("memory_limit") is None:
        monkeypatch.setattr(limits, "MEMORY_PAGES", Path("no such file"))


@pytest.fixture(autouse=True)
def _one_page_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system have pages of 4 KiB only, except in tests marked huge_pages.

    Otherwise each measured run starts a second worker and races everything once more, or not: systems differ.
    """
    from pwopt.running import huge_pages

    if request.node.get_closest_marker("huge_pages") is None:
        monkeypatch.setattr(huge_pages, "ENABLED", Path("no such file"))


@pytest.fixture(autouse=True)
def _no_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers run models in this process, and plant cold starts, except in tests marked worker_processes.

    A process that imports onnxruntime takes half a second of the processor, and a measured run starts two or more.
    """
    from helpers import WorkerHere

    from pwopt.optimizing import attempt
    from pwopt.running import worker

    if not any(map(request.node.get_closest_marker, ("worker_processes", "huge_pages"))):
        monkeypatch.setattr(worker, "Child", WorkerHere)
        cold = {"session": 1e-3, "first": 1e-3, "memory": 1e6}
        monkeypatch.setattr(attempt, "measure_cold_starts", lambda paths, *_: [cold] * len(paths))
