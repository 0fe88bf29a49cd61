"""Small models from text, and comparisons with onnx's reference evaluator."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from pwopt.cli import main
from pwopt.evidence.certify import certify
from pwopt.graph.files import from_proto
from pwopt.graph.model import Model
from pwopt.rewriting.driver import Pass
from pwopt.rewriting.pipeline import Pipeline
from pwopt.rewriting.records import Outcome
from pwopt.running import worker
from pwopt.running.timing import Race, SessionPair

MODELS = Path(__file__).parent.parent / "models"


def parse(body: str, opset: int = 17, ir: int = 8, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from `(inputs) => (outputs) { nodes }` in onnx's text syntax; weights become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> g {body}')
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return model


def build(body: str, constants: Mapping[str, np.ndarray], head: str = "", opset: int = 17) -> onnx.ModelProto:
    """`parse` with those of `constants` that occur in the body; `head` goes before one that lists no inputs."""
    words = set(re.findall(r"\w+", body))
    text = body if body.startswith("(") else head + body
    return parse(text, opset, **{name: value for name, value in constants.items() if name in words})


def eager(kind: type[Pass]) -> Pass:
    """A measured pass as it acts where it was measured, or asked for by name."""
    made = kind()
    made.scope = "exact"
    return made


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return rng(seed).normal(size=shape).astype(dtype)


def evaluate(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(v) for v in ReferenceEvaluator(model).run(None, feeds)]


def open_session(model: onnx.ModelProto, optimise: bool = True) -> Any:
    """onnxruntime's session of a model on one thread. To start and end more threads takes ten times as long."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, *passes: Pass, **options: object) -> tuple[onnx.ModelProto, Outcome, Model]:
    """Apply passes; returns the new model, what was done, and the edited graph. Every rewrite passes its certificate."""
    loaded = from_proto(model)
    options.setdefault("certifier", certify)
    outcome = Pipeline(passes).run(loaded.graph, reserved=loaded.names(), **options)  # type: ignore[arg-type]
    failed = [(r.site, r.certificate) for r in outcome.rewrites if r.certificate and not r.certificate.passed]
    assert not failed, failed
    result = loaded.to_proto()
    onnx.checker.check_model(result, full_check=True)
    return result, outcome, loaded


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run pwopt's command line in this process, which saves the second that a new process takes to import pwopt."""
    command, before = list(map(str, arguments)), Path.cwd()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    os.chdir(cwd or before)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    finally:
        os.chdir(before)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, code, *texts)


class WorkerHere:
    """Answers the questions of a `pwopt.running.worker.Worker` in this process, without limits; see conftest.py.

    Questions and answers have to survive pickling, as between processes.
    """

    def __init__(self, *_: object, **__: object) -> None:
        self.pid = os.getpid()
        self._sessions: Any = None

    def ask(self, question: Any, _seconds: float, waiting: Callable[[float], None] = lambda _: None) -> Any:
        waiting(0.0)
        question = pickle.loads(pickle.dumps(question))
        if self._sessions is None:  # the first question is what to run, and on what
            *setting, together, original = question
            self._sessions = worker._Sessions(*setting, together=together)
            question = ("run_once", original)
        return pickle.loads(pickle.dumps(worker._answer(self._sessions, *question)))

    def close(self) -> None:
        self._sessions = None


def plant(monkeypatch: pytest.MonkeyPatch, race: Callable[..., object]) -> None:
    """Let a function say what races say, of (environment, models, …), and profiles say nothing; pages have one size."""
    from pwopt.running import huge_pages
    from pwopt.selecting.environment import Environment
    from pwopt.selecting.rewrite_selection import RacingEvaluator

    monkeypatch.setattr(Environment, "race", race)
    monkeypatch.setattr(huge_pages, "system_mode", lambda: "")
    for method in ("bound", "estimate"):
        monkeypatch.setattr(RacingEvaluator, method, lambda *_: {})


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node if n.op_type != "Constant")


def same(
    before: onnx.ModelProto, after: onnx.ModelProto, tolerance: float = 1e-9, **feeds: np.ndarray
) -> list[np.ndarray]:
    """Both give the same outputs, which are returned; with float64 models and feeds, to rounding in float64."""
    expected, found = evaluate(before, **feeds), evaluate(after, **feeds)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
    return found


def outside(model: onnx.ModelProto, op: str, suffix: str) -> bool:
    """Whether operators of this name see no tensor as a region does, which names those with the suffix."""
    found = [n for n in model.graph.node if n.op_type == op]
    return bool(found) and not any(name.endswith(suffix) for n in found for name in (*n.input, *n.output))


def reasons(outcome: Outcome, name: str = "") -> list[str]:
    return [s.reason for s in outcome.skips if not name or s.pass_name == name]


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def planted_race(*times: np.ndarray, own: float = 1.0) -> Race:
    """A race in which each pair of sessions had one round; `times` holds the seconds of each model."""
    return Race(tuple(SessionPair(tuple(np.atleast_1d(t) for t in row)) for row in zip(*times, strict=True)), own)
