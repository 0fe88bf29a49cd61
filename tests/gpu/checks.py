"""The checks of run.py, each by its name: `python checks.py NAME --provider P --scratch FOLDER` prints one line of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import suite
from onnx import TensorProto, helper

import pwopt
from pwopt.graph.files import load
from pwopt.inputs.input_specs import input_specs
from pwopt.inputs.samples import draw_feeds
from pwopt.passes import PASSES, Winograd
from pwopt.running import installation, providers
from pwopt.running.providers import as_provider
from pwopt.running.session import Session, find_fallbacks

ROOT = Path(__file__).resolve().parent.parent.parent
Found = dict[str, Any]
Check = Callable[["Setting"], Found]
CHECKS: dict[str, Check] = {}
#: Batches that models are optimised at.
BATCHES = (1, 16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where to run, and how much."""

    provider: str
    scratch: Path
    models: Path | None
    wheels: Path | None
    quick: bool

    @property
    def gpu(self) -> bool:
        return as_provider(self.provider).kind == "gpu"

    def suite(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        return suite.collected(self.scratch / "models", self.models, self.wheels)

    def one(self, name: str) -> tuple[Path, dict[str, tuple[int, ...]]]:
        """A built model, and the sizes to run it at: smaller ones to be quick."""
        path, x, size = self.suite()[name]
        return path, {x: (1, *self.smaller(size))}

    def smaller(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of a built model, less of an image to be quick."""
        return (size[0], *(min(s, 32) for s in size[1:])) if self.quick and len(size) == 3 else size


class FailedError(Exception):
    """A check found something wrong; the message is a sentence."""


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def require(fact: bool, otherwise: str) -> None:
    if not fact:
        raise FailedError(otherwise)


def command(*arguments: str, setup: str = "", **environment: str) -> tuple[int, str]:
    """The command line in a process of its own: exit code, and what it said last on stderr."""
    code = f"{setup}\nimport sys\nfrom pwopt.cli import main\nmain(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@check
def doctor(setting: Setting) -> Found:
    """The provider starts, and the machine is known."""
    from pwopt.running.doctor import check_installation

    found = check_installation(setting.provider)
    require(bool(found[-1].ok), f"{found[-1].subject} {found[-1].detail}")
    environment = installation.describe_machine(as_provider(setting.provider))
    return {**environment, "findings": [dataclasses.asdict(f) for f in found]}


@check
def strictness(setting: Setting) -> Found:
    """What runs elsewhere is told: nothing of a plain model, one operator of another, all of a third."""
    relu, unique = helper.make_node("Relu", ["x"], ["r"], "relu"), helper.make_node("Unique", ["x"], ["u"], "unique")
    mixed = [relu, helper.make_node("Unique", ["r"], ["u"], "unique")]
    kinds = {
        "all": ([relu], {"r": TensorProto.FLOAT}),
        "some": (mixed, {"u": TensorProto.FLOAT, "r": TensorProto.FLOAT}),
        "none": ([unique], {"u": TensorProto.FLOAT}),
    }
    feeds = {"x": np.array([[3, -1, 2, 2]], np.float32)}
    found: Found = {}
    for name, (nodes, outputs) in kinds.items():
        path = suite.small(nodes, setting.scratch / f"{name}.onnx", outputs)
        session = Session(path, as_provider(setting.provider), profile=True)
        session.run(feeds)
        placed = session.placement()
        found[f"placed_{name}"] = placed
        copies = [n for nodes in placed.values() for n in nodes if n.startswith("Memcpy")]
        found[f"copies_{name}"] = len(copies)
        found[f"elsewhere_{name}"] = sum(
            map(len, find_fallbacks(path, as_provider(setting.provider), 1, feeds).values())
        )
    require(found["elsewhere_all"] == 0, f"a Relu ran elsewhere: {found['placed_all']}")
    if setting.gpu:
        require(found["elsewhere_some"] >= 1, f"Unique is not told to run elsewhere: {found['placed_some']}")
        require(found["elsewhere_none"] >= 1, f"Unique is not told to run elsewhere: {found['placed_none']}")
        require(found["copies_some"] >= 1, f"no copy between card and memory is told: {found['placed_some']}")
    return found


@check
def verification(setting: Setting) -> Found:
    """Models that pwopt rewrote pass on the provider, in float32 with TF32 off and in float16; a wrong one does not."""
    found: Found = {}
    for name in ("mobileone", "generator"):
        path, shapes = setting.one(name)
        for kind, source in (("float32", path), ("float16", suite.half(path, setting.scratch / f"{name}_half.onnx"))):
            out = setting.scratch / f"{name}_{kind}_out.onnx"
            pwopt.optimize(source, out, cost="analytic", verify=False, shapes=shapes)
            told = pwopt.verify(source, out, provider=setting.provider, shapes=shapes, locate=False)
            worst = told.worst()
            require(told.passed, f"{name} in {kind}: {worst.explain() if worst else 'no output'}")
            found[f"{name}_{kind}"] = f"{worst.max_abs:.2g} / {worst.floor:.2g}" if worst else ""
    return found


@check
def against_cpu(setting: Setting) -> Found:
    """The provider's answers on the original, held against the CPU's."""
    found: Found = {}
    for name in ("mobileone", "generator"):
        path, shapes = setting.one(name)
        feeds = draw_feeds(input_specs(load(path).proto), shapes)
        theirs, ours = (Session(path, as_provider(p)).run(feeds)[0] for p in ("cpu", setting.provider))
        scale = float(np.max(np.abs(theirs)))
        found[name] = float(np.max(np.abs(ours - theirs))) / scale
        require(found[name] < 1e-3, f"{name} is {found[name]:.2g} of its largest value off the CPU's answer")
    return found


@check
def clock(setting: Setting) -> Found:
    """Synchronised single runs add up to what a wall clock says of many."""
    path, shapes = setting.one("resnet50_v1" if not setting.quick else "mobileone")
    session = Session(path, as_provider(setting.provider), tf32=True)
    session.bind(draw_feeds(input_specs(load(path).proto), shapes))
    for _ in range(5):
        session.step()
    count, single = 20 if setting.quick else 100, []
    begin = time.perf_counter()
    for _ in range(count):
        start = session.clock()
        session.step()
        single.append(session.clock() - start)
    wall = time.perf_counter() - begin
    ratio = float(np.sum(single)) / wall
    found = {"single_ms": float(np.median(single)) * 1e3, "wall_ms": wall / count * 1e3, "ratio": ratio}
    if setting.gpu:
        require(0.9 < ratio <= 1.01, f"single runs add up to {ratio:.2f} of the wall clock")
    return found


def _optimise(name: str, batch: int) -> Check:
    def optimise(setting: Setting) -> Found:
        collected = setting.suite()
        if name not in collected:
            return {"status": "not run", "reason": "the model is not at hand; give its wheel or --models"}
        path, x, size = collected[name]
        size = setting.smaller(size) if name in suite.BUILT else size
        seconds, budget = (0.5, 3.0) if setting.quick else (3.0, 25.0)
        out = setting.scratch / f"{name}_{batch}_fast.onnx"
        done = pwopt.optimize(
            path, out, provider=setting.provider, shapes={x: (batch, *size)}, measuring=pwopt.Measuring(race_seconds=seconds, budget=budget),
        ).report  # fmt: skip
        worst = done.equivalence.worst() if done.equivalence else None
        kept: dict[str, int] = {}
        for r in done.rewrites:
            kept[r.pass_name] = kept.get(r.pass_name, 0) + 1
        found = {
            "operators": f"{done.before.nodes} → {done.after.nodes}",
            "deviation": f"{worst.max_abs:.2g} / {worst.floor:.2g}" if worst else "unchanged",
            "kept": kept,
            "dropped": sorted({f"{s.pass_name}: {s.reason}" for s in done.skips if "measured" in s.reason}),
            "notes": list(done.notes),
        }
        latency = done.latency if done.candidate is None else done.candidate.latency
        if latency is not None:
            low, high = latency.interval
            found["latency"] = f"{latency.before_ms:.3f} → {latency.after_ms:.3f} ms"
            found["ratio"] = f"{latency.speedup:.3f} [{low:.3f}, {high:.3f}]"
            found["copy"], found["faster"] = f"{latency.control:.3f}", latency.faster
            returned = bool(done.rewrites)
            require(high >= 1.0 or not returned, f"a slower model was returned: {found['ratio']}")
        return found

    return optimise


for _batch in BATCHES:
    for _name in (
        "resnet50_v1",
        "generator",
        "mobileone",
        "lora_encoder",
        "ppocr_det",
        "ppocr_rec",
        "ppocr_cls",
        "yolov8n",
    ):
        CHECKS[f"optimise_{_name}_{_batch}"] = _optimise(_name, _batch)


@check
def passes(setting: Setting) -> Found:
    """Every pass by itself, wherever it is exact, on models of the gallery and random ones: certified, and verified."""
    from strategies import random_sample

    gallery = [p for p in sorted((ROOT / "models").glob("*.onnx")) if not p.name.endswith(".pwopt.onnx")]
    rng = Random(0)
    drawn = [random_sample(rng) for _ in range(4 if setting.quick else 40)]
    models: list[tuple[Any, Any]] = [(path, None) for path in gallery[: 6 if setting.quick else None]]
    models += [(sample.model, sample.feeds[0]) for sample in drawn]
    models.append((suite.uneven_half(setting.scratch / "uneven.onnx"), None))
    Winograd.min_gain = 0.0  # on small models too
    found: Found = {}
    wrong: list[str] = []
    for p in PASSES:
        fired = 0
        for model, inputs in models:
            if fired:
                break
            done = pwopt.optimize(model, passes=["clean-up", p.name], cost="analytic", verify=False)
            count = sum(r.pass_name == p.name for r in done.report.rewrites)
            if not count:
                continue
            try:
                told = pwopt.verify(model, done.model, provider=setting.provider, inputs=inputs, locate=False)
            except (pwopt.ModelError, pwopt.ProviderError, pwopt.UsageError):  # no kernel for a type, or no such sizes
                continue
            fired += count
            if not told.passed:
                wrong.append(f"{p.name}: {told.worst().explain() if told.worst() else ''}")
        found[p.name] = fired
    require(not wrong, "; ".join(wrong))
    return found


@check
def graphs(setting: Setting) -> Found:
    """Latency with and without CUDA graphs, and memory on the card."""
    path, shapes = setting.one("resnet50_v1" if not setting.quick else "mobileone")
    seconds = 0.3 if setting.quick else 3.0
    rows = pwopt.benchmark([path], provider=setting.provider, shapes=shapes, seconds=seconds)
    found: Found = {"plain_ms": rows[0].median_ms, "memory_mb": rows[0].memory_mb}
    if rows[0].device_mb is not None:
        found["device_mb"] = rows[0].device_mb
    if as_provider(setting.provider).name == providers.CUDA:
        captured = as_provider(setting.provider).with_options({"enable_cuda_graph": "1"})
        found["captured_ms"] = pwopt.benchmark([path], provider=captured, shapes=shapes, seconds=seconds)[0].median_ms
    return found


def _exits(found: Found, name: str, expected: int, *arguments: str, setup: str = "", **environment: str) -> None:
    code, said = command(*arguments, setup=setup, **environment)
    found[name] = f"exit {code}: {said}"
    require(code == expected, f"{name}: exit {code}, not {expected}: {said}")


@check
def failures(setting: Setting) -> Found:
    """No such card, no memory, no libraries: exit 4 with a sentence, and nothing written."""
    path, shapes = setting.one("resnet50_v1" if not setting.quick else "mobileone")
    sizes = [f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    out = setting.scratch / "never.onnx"
    base = ["optimize", str(path), "-o", str(out), "--cost", "analytic", "--shape", *sizes]
    found: Found = {}
    if as_provider(setting.provider).name == providers.CUDA:
        _exits(found, "no_such_card", 4, *base, "--provider", "cuda:99")
        _exits(found, "no_memory", 4, *base, "--provider", "cuda", "--provider-option", "gpu_mem_limit=1048576")
        hidden = "import onnxruntime\nonnxruntime.preload_dlls = lambda *a, **k: None"
        _exits(found, "no_libraries", 4, *base, "--provider", "cuda", setup=hidden, LD_LIBRARY_PATH="")
    elif providers.find_plugin(as_provider(setting.provider)) is not None:
        short = setting.provider.partition(",")[0].partition(":")[0]
        _exits(found, "no_such_device", 4, *base, "--provider", f"{short}:99")
        _exits(found, "no_such_library", 4, *base, "--provider", "Toy", "--provider-library", "/nowhere/libtoy.so")
    else:
        _exits(found, "not_in_the_wheel", 4, *base, "--provider", "tensorrt")
        _exits(found, "no_such_option", 2, *base, "--provider", "cpu", "--provider-option", "a=1")
    require(not out.exists(), "something was written")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plant", action="append", default=[])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print("\n".join(ordered(given.quick)))
        return
    installation.silence_onnxruntime()
    setting = Setting(given.provider, given.scratch, given.models, given.wheels, given.quick)
    try:
        require(given.name in CHECKS, f"there is no check {given.name!r}; there are {', '.join(CHECKS)}")
        require(given.name not in given.plant, "this failure was planted")
        with redirect_stdout(io.StringIO()):
            found = CHECKS[given.name](setting)
        result = {"status": "passed", **found}
    except FailedError as error:
        result = {"status": "failed", "reason": str(error)}
    except ModuleNotFoundError as error:
        if (error.name or "pwopt").startswith("pwopt"):
            raise
        result = {"status": "not run", "reason": f"{error.name} is not installed; add its wheel to --wheels"}
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(result, default=str))


def ordered(quick: bool) -> list[str]:
    """The checks in order of worth: what must hold first, then figures at batch 1, then at the larger one."""
    first = ["doctor", "strictness", "verification", "against_cpu", "clock"]
    figures = [name for name in CHECKS if name.startswith("optimise_")]
    if quick:
        figures = ["optimise_generator_1"]
    ones = [name for name in figures if name.endswith("_1")]
    return [*first, *ones, "failures", "passes", "graphs", *(name for name in figures if name not in ones)]


if __name__ == "__main__":
    main()
