#!/usr/bin/env python3
"""Run onnx's own backend tests through pwopt: rewritten models must give the outputs that the suite expects.

    python benchmarks/conformance.py [-o benchmarks/results/conformance.json] [--kinds node,real,…] [--only PART]

The suite comes with the onnx wheel: a model for every operator and attribute, models converted from PyTorch, and light
versions of well-known networks. Each case runs four times: as it is and with all inputs but the first as constants
(as exporters write weights), by the default passes and by all passes wherever they are exact. A case counts only if
onnxruntime runs the original and gives what the suite expects; it *fails* if the result then does not, or if pwopt
stumbles over it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from judge import runtime

import pwopt
from pwopt.passes import PASSES
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted", "real")
DATA = Path(onnx.backend.test.__file__).parent / "data"
OUTCOMES = ("not run", "unchanged", "rewritten", "refused", "failed")


@dataclass(frozen=True)
class Case:
    """A model with inputs and expected outputs, as lists of what onnxruntime takes and gives."""

    name: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float


def cases(kind: str, only: str) -> Iterator[Case]:
    for test in load_model_tests(kind=kind):
        if not re.search(only, test.name):
            continue
        if test.model is not None:
            yield Case(test.name, test.model, list(test.data_sets), test.rtol, test.atol)
        elif test.model_dir is not None:
            model = onnx.load(Path(test.model_dir) / "model.onnx")
            sets = [_read_set(model, folder) for folder in sorted(Path(test.model_dir).glob("test_data_set*"))]
            yield Case(test.name, model, sets, test.rtol, test.atol)
        elif test.url is not None and "/light/" in test.url:
            path = DATA / "light" / Path(test.url).name
            model = onnx.load(path)
            held = {t.name for t in model.graph.initializer}
            inputs = [
                Runner.generate_dummy_data(v, seed=0, name=test.model_name, random=False)
                for v in model.graph.input
                if v.name not in held
            ]
            expected = [_tensor(p) for p in sorted(path.parent.glob(f"{path.stem}_output_*.pb"))]
            yield Case(test.name, model, [(inputs, expected)], test.rtol, test.atol)


def _read_set(model: onnx.ModelProto, folder: Path) -> tuple[list[Any], list[Any]]:
    def all_of(role: str, values: Any) -> list[Any]:
        found: list[Any] = []
        for i in range(len(list(folder.glob(f"{role}_*.pb")))):
            Runner._load_proto(None, str(folder / f"{role}_{i}.pb"), found, values[i].type)
        return found

    return all_of("input", model.graph.input), all_of("output", model.graph.output)


def _tensor(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load_tensor(path))


def frozen(case: Case) -> Case | None:
    """The case with every input but the first as a constant; None if that is no tensor, or there are none."""
    if len(case.data) != 1 or len(case.model.graph.input) < 2 or case.model.graph.initializer:
        return None
    inputs, outputs = case.data[0]
    if len(inputs) != len(case.model.graph.input) or not all(isinstance(v, (np.ndarray, np.generic)) for v in inputs):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value, array in zip(case.model.graph.input[1:], inputs[1:], strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
    if model.ir_version >= 4:
        del model.graph.input[1:]
    return Case(case.name, model, [(inputs[:1], outputs)], case.rtol, case.atol)


def agrees(case: Case, run: Callable[[dict[str, Any]], list[Any]]) -> str:
    """Why a model does not give what the suite expects, else ""."""
    held = {t.name for t in case.model.graph.initializer}
    names = [v.name for v in case.model.graph.input if v.name not in held]
    for inputs, outputs in case.data:
        try:
            found = run(dict(zip(names, inputs, strict=False)))
            Runner.assert_similar_outputs(outputs, found, case.rtol, case.atol)
        except Exception as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
    return ""


def outcome(case: Case, passes: list[str] | None) -> tuple[str, str, Counter[str]]:
    """What became of a case, why, and the rewrites by pass."""
    nothing: Counter[str] = Counter()
    try:
        reason = agrees(case, runtime(case.model))
    except Exception as error:
        reason = str(error)
    if reason:
        return "not run", reason, nothing
    try:
        result = pwopt.optimize(case.model, cost="analytic", verify=False, passes=passes)
    except pwopt.PwoptError as error:
        return "refused", str(error), nothing
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", nothing
    rewrites = Counter(r.pass_name for r in result.report.rewrites)
    if result.model is case.model:
        return "unchanged", "", rewrites
    try:
        reason = agrees(case, runtime(result.model))
    except Exception as error:
        reason = f"does not load: {error}"
    return ("failed" if reason else "rewritten"), reason, rewrites


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The suite's models make onnxruntime's C++ and numpy talk."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name this regular expression finds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    failed, refused = [], []
    for kind in options.kinds.split(","):
        counts: dict[tuple[str, str], Counter[str]] = {}
        rewrites: Counter[str] = Counter()
        for case in cases(kind, options.only):
            for form, variant in (("as given", case), ("with constants", frozen(case))):
                for mode, passes in (("default", None), ("all passes", [p.name for p in PASSES])):
                    if variant is None:
                        continue
                    with quiet():
                        what, why, done = outcome(variant, passes)
                    counts.setdefault((form, mode), Counter())[what] += 1
                    rewrites.update(done)
                    where = {"case": case.name, "form": form, "passes": mode, "reason": why}
                    if what == "failed":
                        failed.append(where)
                        print(where, flush=True)
                    elif what == "refused":
                        refused.append(where)
        for (form, mode), count in counts.items():
            row = {"kind": kind, "form": form, "passes": mode, "run": sum(count.values())}
            rows.append(row | {what: count[what] for what in OUTCOMES})
            print(*(f"{k}: {v}" for k, v in rows[-1].items()), sep="  ", flush=True)
        print("  ".join(f"{name} {n}" for name, n in sorted(rewrites.items())), flush=True)
    if options.output:
        content = {"environment": describe_machine(), "table": rows, "failed": failed, "refused": refused}
        options.output.write_text(to_json(content))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
