#!/usr/bin/env python3
"""Whether other runtimes and tools read what pwopt writes: the original and the result, through each of them.

    python benchmarks/readers.py FOLDER --out FILE.json [--models a,b] [--readers openvino,tract] [--time] [--seconds 120]

FOLDER holds .onnx files and a shapes.json, {"model.onnx": {"input": [1, 3, 640, 640]}}. Readers that are not installed
are left out. Each one runs in a process of its own, and gets a copy of the model with static input sizes. The deviation
is the largest over the outputs of |difference| / |answer of onnxruntime on the original| in the L2 norm. --time adds the
best of five runs in milliseconds on one thread; use it on a quiet machine only. A Markdown table lies beside the JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Arrays = list[np.ndarray]
Feeds = dict[str, np.ndarray]
#: A reader returns a function that runs the model once.
Reader = Callable[[Path, Feeds], Callable[[], Arrays]]
READERS: dict[str, tuple[str, Reader]] = {}
#: The opset that onnxruntime's quantiser wants at least.
QUANTISED_OPSET = 17


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


def read_once(name: str, path: Path, shapes: dict[str, list[int]], answer: Path, timed: bool) -> dict[str, Any]:
    """In a child: run one reader on one model, and compare with the answer of onnxruntime."""
    feeds = draw(shapes)
    run = READERS[name][1](path, feeds)
    found = run()
    with np.load(answer) as file:
        wanted = [file[key] for key in file]
    worst = max(
        float(np.linalg.norm(a.astype(np.float64).ravel() - b.astype(np.float64).ravel()))
        / max(float(np.linalg.norm(b.astype(np.float64))), 1e-30)
        for a, b in zip(found, wanted, strict=True)
    )
    result: dict[str, Any] = {"deviation": worst}
    if timed:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        result["ms"] = 1e3 * min(times)
    return result


def ask(name: str, path: Path, shapes: dict[str, list[int]], answer: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run one reader in a process of its own."""
    task = json.dumps([name, str(path), shapes, str(answer), given.time])
    # MNN's converter installs packages with pip while it runs, and replaces protobuf by an older one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--task", task], capture_output=True, text=True, check=False,
            timeout=given.seconds, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {given.seconds:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}


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


def judge(original: dict[str, Any], result: dict[str, Any]) -> str:
    """One cell of the table."""
    if "error" in original:
        return "neither" if "error" in result else "only the result"
    if "error" in result:
        return "**only the original**"
    close = result["deviation"] <= max(2 * original["deviation"], 1e-4)
    cell = "same" if close else f"**{original['deviation']:.1g} → {result['deviation']:.1g}**"
    return cell + (f", {original['ms'] / result['ms']:.2f}×" if "ms" in result else "")


def format_table(found: dict[str, dict[str, Any]]) -> str:
    """Format the cells as Markdown: one row per reader, one column per model."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    head = ["| reader |", *(f" {model} |" for model in found)]
    rows = [
        f"| {name} |" + "".join(f" {judge(*row[name]) if name in row else ''} |" for row in found.values())
        for name in names
    ]
    return "\n".join(["".join(head), "|---" * (len(found) + 1) + "|", *rows, ""])


def main() -> None:
    import pwopt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models")
    parser.add_argument("--readers")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    shapes = json.loads((given.folder / "shapes.json").read_text(encoding="utf-8"))
    models = given.models.split(",") if given.models else [name.removesuffix(".onnx") for name in shapes]
    there = [n for n, (module, _) in READERS.items() if importlib.util.find_spec(module) is not None]
    readers = given.readers.split(",") if given.readers else there
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        size = shapes[f"{model}.onnx"]
        with tempfile.TemporaryDirectory() as folder:
            original = make_static(given.folder / f"{model}.onnx", Path(folder) / "original.onnx", size)
            whole = Path(folder) / "whole.onnx"
            pwopt.optimize(given.folder / f"{model}.onnx", whole, shapes=size, cost="analytic")
            result = make_static(whole, Path(folder) / "result.onnx", size)
            answer = Path(folder) / "answer.npz"
            np.savez(answer, *by_onnxruntime(original, draw(size))())
            found[model] = {}
            for name in readers:
                pair = [ask(name, path, size, answer, given) for path in (original, result)]
                found[model][name] = pair
                print(f"{model}: {name}: {judge(*pair)} {pair}", flush=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(format_table(found), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--task":
        task_name, task_path, task_shapes, task_answer, task_timed = json.loads(sys.argv[2])
        outcome = read_once(task_name, Path(task_path), task_shapes, Path(task_answer), task_timed)
        print("\n" + json.dumps(outcome))
    else:
        main()
