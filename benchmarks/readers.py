#!/usr/bin/env python3
"""Compare what other runtimes and tools make of the original and of pwopt's result.

    python benchmarks/readers.py FOLDER [-o benchmarks/results/readers.json] [--models a,b] [--readers OpenVINO,tract]
        [--seconds 120] [--others PYTHON]
    python benchmarks/readers.py --render [-o benchmarks/results/readers.json]

FOLDER holds .onnx files and a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}. Each reader runs in a process of
its own. The original and the result have static input sizes, because some readers need them. Readers that are not installed are left out. --others
names a second interpreter for readers that are missing in this one: MNN's converter and onnxconverter-common need
different releases of protobuf.

The deviation is the largest over the outputs of |difference| / |answer| in the L2 norm. The answer is that of onnxruntime
on the original, without graph optimisation, so the original's own rounding is seen in every column.
Both models run alternately on one thread; the ratio is the median over the pairs of the original's processor time over
the result's, with the second smallest and the second largest ratio of 11 pairs (a 98.8 % interval). Runs of a subset of
models or readers update the file. The second form writes the table into docs/readers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Arrays = list[np.ndarray]
Feeds = dict[str, np.ndarray]
Row = dict[str, Any]
#: A reader returns a function that runs the model once.
Reader = Callable[[Path, Feeds], Callable[[], Arrays]]
READERS: dict[str, tuple[str, Reader]] = {}
#: The opset that onnxruntime's quantiser wants at least.
QUANTISED_OPSET = 17
ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "readers.json"
PAGE = ROOT / "docs" / "readers.md"
#: Where the table stands in the page.
START, END = "<!-- readers: start -->\n", "<!-- readers: end -->"
#: The deviation up to which answers count as the same, if the original does not deviate more.
TOLERANCE = 1e-4
#: The same for readers that round: to 11 bits, and to 8 bits.
TOLERANCES = {
    "float16": 1e-2,
    "mixed precision": 5e-2,
    "dynamic quantisation": 0.1,
    "static quantisation": 0.1,
}
#: A deviation may grow by this factor: rounding errors are random.
MARGIN = 2.0
#: Timed pairs, and the longest time for them in seconds.
PAIRS, SECONDS = 11, 4.0
#: Distributions whose versions are recorded.
DISTRIBUTIONS = (
    "onnxruntime", "openvino", "onnx2torch", "torch", "tract", "MNN", "pnnx", "ncnn", "onnxsim", "onnxslim",
    "onnxconverter-common",
)  # fmt: skip


def reads(name: str, module: str) -> Callable[[Reader], Reader]:
    """Register a reader, and the module that it needs."""

    def register(reader: Reader) -> Reader:
        READERS[name] = module, reader
        return reader

    return register


def by_onnxruntime(path: Path, feeds: Feeds, level: str = "ORT_ENABLE_ALL") -> Callable[[], Arrays]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: list(session.run(None, feeds))


reads("onnxruntime", "onnxruntime")(by_onnxruntime)


def _save_session(path: Path, out: Path, level: str, **config: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(out)
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@reads("ORT format", "onnxruntime")
def by_ort_format(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    out = path.with_suffix(".ort")
    _save_session(path, out, "ORT_ENABLE_ALL", save_model_format="ORT")
    return by_onnxruntime(out, feeds)


@reads("offline optimisation", "onnxruntime")
def by_offline_optimisation(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    out = path.with_suffix(".offline.onnx")
    _save_session(path, out, "ORT_ENABLE_EXTENDED")
    return by_onnxruntime(out, feeds)


@reads("OpenVINO", "openvino")
def by_openvino(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda: [np.array(v) for v in request.infer(feeds).values()]


@reads("onnx2torch", "onnx2torch")
def by_torch(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import torch
    from onnx2torch import convert

    torch.set_num_threads(1)
    module = convert(str(path)).eval()
    given = [torch.from_numpy(v) for v in feeds.values()]

    def run() -> Arrays:
        with torch.no_grad():
            found = module(*given)
        return [t.numpy() for t in (found if isinstance(found, (tuple, list)) else [found])]

    return run


@reads("tract", "tract")
def by_tract(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import tract

    runnable = tract.onnx().load(str(path)).into_model().into_runnable()
    return lambda: [v.to_numpy() for v in runnable.run(list(feeds.values()))]


@reads("MNN", "MNN")
def by_mnn(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import MNN

    out, model = path.with_suffix(".mnn"), onnx.load(path, load_external_data=False)
    tool = Path(sys.executable).with_name("mnnconvert")
    command = [str(tool), "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(out), "--bizCode", "pwopt"]
    subprocess.run(command, check=True, capture_output=True)
    names = [o.name for o in model.graph.output]
    net = MNN.nn.load_module_from_file(str(out), list(feeds), names)

    def run() -> Arrays:
        given = []
        for value in feeds.values():
            tensor = MNN.expr.const(value, list(value.shape), MNN.expr.NCHW)
            given.append(tensor)
        return [np.array(MNN.expr.convert(v, MNN.expr.NCHW).read()) for v in net.onForward(given)]

    return run


@reads("pnnx and ncnn", "ncnn")
def by_ncnn(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import ncnn

    tool = Path(sys.executable).with_name("pnnx")
    sizes = ",".join(f"[{','.join(map(str, v.shape))}]" for v in feeds.values())
    subprocess.run([str(tool), str(path), f"inputshape={sizes}"], check=True, capture_output=True, cwd=path.parent)
    net, stem = ncnn.Net(), path.stem.replace(".", "_")
    net.opt.num_threads, net.opt.use_fp16_storage, net.opt.use_bf16_storage = 1, False, False
    if net.load_param(str(path.with_name(f"{stem}.ncnn.param"))) or net.load_model(
        str(path.with_name(f"{stem}.ncnn.bin"))
    ):
        raise RuntimeError("ncnn does not load what pnnx wrote")
    count = len(onnx.load(path, load_external_data=False).graph.output)

    def run() -> Arrays:
        extractor = net.create_extractor()
        for i, value in enumerate(feeds.values()):
            extractor.input(f"in{i}", ncnn.Mat(value[0]))
        return [np.array(extractor.extract(f"out{i}")[1])[None] for i in range(count)]

    return run


@reads("onnxsim", "onnxsim")
def by_onnxsim(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import onnxsim

    out = path.with_suffix(".sim.onnx")
    onnx.save(onnxsim.simplify(onnx.load(path))[0], out)
    return by_onnxruntime(out, feeds)


@reads("OnnxSlim", "onnxslim")
def by_onnxslim(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    import onnxslim

    out = path.with_suffix(".slim.onnx")
    onnx.save(onnxslim.slim(onnx.load(path)), out)
    return by_onnxruntime(out, feeds)


@reads("float16", "onnxconverter_common")
def by_float16(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    from onnxconverter_common import float16

    out = path.with_suffix(".half.onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), out)
    return by_onnxruntime(out, feeds)


@reads("mixed precision", "onnxconverter_common")
def by_mixed_precision(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    from onnxconverter_common import auto_mixed_precision

    out = path.with_suffix(".mixed.onnx")
    mixed = auto_mixed_precision.auto_convert_mixed_precision(
        onnx.load(path), feeds, rtol=0.05, atol=0.05, keep_io_types=True
    )
    onnx.save(mixed, out)
    return by_onnxruntime(out, feeds)


@reads("dynamic quantisation", "onnxruntime.quantization")
def by_dynamic_quantisation(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_suffix(".dynamic.onnx")
    quantize_dynamic(_raise_opset(path), out, weight_type=QuantType.QUInt8)
    return by_onnxruntime(out, feeds)


@reads("static quantisation", "onnxruntime.quantization")
def by_static_quantisation(path: Path, feeds: Feeds) -> Callable[[], Arrays]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        left = iter([feeds])

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    out = path.with_suffix(".static.onnx")
    quantize_static(_raise_opset(path), out, Samples(), quant_format=QuantFormat.QDQ, per_channel=True)
    return by_onnxruntime(out, feeds)


def _raise_opset(path: Path) -> Path:
    from pwopt.graph.files import load
    from pwopt.graph.opset import convert_opset

    model = load(path)
    if model.opset >= QUANTISED_OPSET:
        return path
    out = path.with_suffix(".opset.onnx")
    onnx.save(convert_opset(model, QUANTISED_OPSET), out)
    return out


def draw(shapes: dict[str, list[int]]) -> Feeds:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(-1, 1, size).astype(np.float32) for name, size in shapes.items()}


def deviate(found: Arrays, wanted: Arrays) -> float:
    """The largest relative deviation of an output, in the L2 norm."""
    return max(
        float(np.linalg.norm(a.astype(np.float64).ravel() - b.astype(np.float64).ravel()))
        / max(float(np.linalg.norm(b.astype(np.float64))), 1e-30)
        for a, b in zip(found, wanted, strict=True)
    )


def race(runs: list[Callable[[], Arrays]]) -> list[float]:
    """Run two models alternately; returns the median ratio of processor times, and its interval."""
    ratios: list[float] = []
    end = time.monotonic() + SECONDS
    while len(ratios) < PAIRS and (time.monotonic() < end or len(ratios) < 3):
        times = [0.0, 0.0]
        for i in (0, 1) if len(ratios) % 2 else (1, 0):
            begin = time.process_time()
            runs[i]()
            times[i] = time.process_time() - begin
        ratios.append(times[0] / times[1])
    ratios.sort()
    edge = 1 if len(ratios) == PAIRS else 0
    return [ratios[len(ratios) // 2], ratios[edge], ratios[-1 - edge]]


def read_both(name: str, paths: list[Path], shapes: dict[str, list[int]], answer: Path, timed: bool) -> Row:
    """In a child: let one reader run models, compare with the answer of onnxruntime, and race them."""
    feeds = draw(shapes)
    with np.load(answer) as file:
        wanted = [file[key] for key in file]
    runs, found = [], []
    for path in paths:
        try:
            run = READERS[name][1](path, feeds)
            found.append({"deviation": deviate(run(), wanted)})
            runs.append(run)
        except Exception as error:  # any reader may fail in its own way
            found.append({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"[:200]})
    result: Row = {"found": found}
    if timed and len(runs) == 2:
        result["ratio"] = race(runs)
    return result


def ask(name: str, paths: list[Path], shapes: dict[str, list[int]], answer: Path, given: argparse.Namespace) -> Row:
    """Run one reader in a process of its own; if that process dies, in one process for each model."""
    task = json.dumps([name, [str(p) for p in paths], shapes, str(answer), given.time])
    # MNN's converter installs packages with pip while it runs, and replaces protobuf by an older one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    try:
        done = subprocess.run(
            [given.there[name], __file__, "--task", task], capture_output=True, text=True, check=False,
            timeout=given.seconds, env=environment,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return dict(json.loads(lines[-1]))
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    except subprocess.TimeoutExpired:
        error = f"took more than {given.seconds:.0f} seconds"
    if len(paths) == 1:
        return {"found": [{"error": error}]}
    return {"found": [ask(name, [path], shapes, answer, given)["found"][0] for path in paths]}


def make_static(source: Path, out: Path, shapes: dict[str, list[int]]) -> Path:
    """Copy a model with fixed input sizes."""
    model = onnx.load(source)
    for value in model.graph.input:
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


def judge(name: str, original: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Compare what a reader makes of both models."""
    if "error" in original:
        return "neither" if "error" in result else "only the result"
    if "error" in result:
        return "**only the original**"
    limit = max(MARGIN * original["deviation"], TOLERANCES.get(name, TOLERANCE))
    return "same" if result["deviation"] <= limit else f"**{original['deviation']:.1g} → {result['deviation']:.1g}**"


def format_cell(name: str, cell: Row) -> str:
    """Format one cell of the table: the verdict, and how much less time the result takes, with the interval."""
    verdict = judge(name, *cell["found"])
    if "ratio" not in cell:
        return verdict
    ratio, low, high = cell["ratio"]
    times = f"{ratio:.2f}× [{low:.2f}, {high:.2f}]"
    return times if verdict == "same" else f"{verdict}, {times}"


def render(record: Row) -> str:
    """Format a record as Markdown: one row per model and reader."""
    found = record["models"]
    names = [name for name in READERS if any(name in row for row in found.values())]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"Processor time of the original over that of pwopt's result: {record['cpu']}, 1 thread, {record['date']};",
        f"{versions}.",
        "",
        "| model | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for model, row in found.items():
        lines.append(f"| {model} | " + " | ".join(format_cell(n, row[n]) if n in row else "" for n in names) + " |")
    return "\n".join(lines) + "\n"


def write_page(record: Row) -> None:
    """Write the table into docs/readers.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE.name} has no place for the table: {START.strip()} and {END}")
    PAGE.write_text(before + START + render(record) + END + after, encoding="utf-8")


INSTALLED = """import importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
modules, names = json.loads(sys.argv[1])
print(json.dumps([[m for m in modules if importlib.util.find_spec(m)], {n: find(n) for n in names if find(n)}]))
"""


def find_readers(interpreters: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find the first interpreter that has each reader, and the versions of the packages."""
    there: dict[str, str] = {}
    versions: dict[str, str] = {}
    asked = json.dumps([[module.partition(".")[0] for module, _ in READERS.values()], DISTRIBUTIONS])
    for interpreter in interpreters:
        done = subprocess.run([interpreter, "-c", INSTALLED, asked], capture_output=True, text=True, check=True)
        modules, found = json.loads(done.stdout)
        there |= {n: interpreter for n, (m, _) in READERS.items() if n not in there and m.partition(".")[0] in modules}
        versions = found | versions
    return there, {name: versions[name] for name in DISTRIBUTIONS if name in versions}


def measure(
    folder: Path, model: str, shapes: dict[str, list[int]], readers: list[str], given: argparse.Namespace
) -> Row:
    """Let every reader run a model and what pwopt makes of it."""
    import pwopt

    found: Row = {}
    with tempfile.TemporaryDirectory() as place:
        original = make_static(folder / f"{model}.onnx", Path(place) / "original.onnx", shapes)
        result = Path(place) / "result.onnx"
        pwopt.optimize(folder / f"{model}.onnx", result, shapes=shapes, cost="analytic", static=True)
        answer = Path(place) / "answer.npz"
        np.savez(answer, *by_onnxruntime(original, draw(shapes), "ORT_DISABLE_ALL")())
        for name in readers:
            found[name] = ask(name, [original, result], shapes, answer, given)
            print(f"{model}: {name}: {format_cell(name, found[name])} {found[name]['found']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--models", help="comma-separated; all in shapes.json by default")
    parser.add_argument("--readers", help="comma-separated; all that are installed by default")
    parser.add_argument("--others", help="a second Python interpreter, for readers that this one lacks")
    parser.add_argument("--no-time", dest="time", action="store_false", help="compare the answers only")
    parser.add_argument("--seconds", type=float, default=120.0, help="the longest time for a reader and a model")
    parser.add_argument("--render", action="store_true", help="write the recorded table into docs/readers.md")
    given = parser.parse_args()
    record: Row = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {"models": {}}
    if given.render:
        write_page(record)
        return
    from pwopt.running import installation

    shapes = json.loads((given.folder / "shapes.json").read_text(encoding="utf-8"))
    models = given.models.split(",") if given.models else [name.removesuffix(".onnx") for name in shapes]
    given.there, versions = find_readers([sys.executable, *([given.others] if given.others else [])])
    readers = given.readers.split(",") if given.readers else list(given.there)
    cpu = installation.describe_machine()["cpu"]
    record = {"date": date.today().isoformat(), "cpu": cpu, "versions": versions, "models": record["models"]}
    for model in models:
        found = measure(given.folder, model, shapes[f"{model}.onnx"], readers, given)
        record["models"][model] = record["models"].get(model, {}) | found
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--task":
        task_name, task_paths, task_shapes, task_answer, task_timed = json.loads(sys.argv[2])
        outcome = read_both(task_name, [Path(p) for p in task_paths], task_shapes, Path(task_answer), task_timed)
        print("\n" + json.dumps(outcome))
    else:
        main()
