#!/usr/bin/env python3
"""Run a model as each runtime or tool reads it: the readers that `readers.py` compares.

    python benchmarks/runtimes.py TASK

TASK is JSON: the reader, the models, the sizes of the inputs, the file with the wanted outputs, and whether two models
are raced. The answer is the last line of the output, as JSON. `readers.py` starts one such process per reader, because a
reader may crash, or need packages of another environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Arrays = list[np.ndarray]
Feeds = dict[str, np.ndarray]
Row = dict[str, Any]
#: A reader returns a function that runs the model once.
Reader = Callable[[Path, Feeds], Callable[[], Arrays]]
#: Reader → the module that it needs, and itself.
READERS: dict[str, tuple[str, Reader]] = {}
#: The opset that onnxruntime's quantiser wants at least.
QUANTISED_OPSET = 17
#: Timed pairs, and the longest time for them in seconds.
PAIRS, SECONDS = 11, 4.0


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


if __name__ == "__main__":
    name, paths, shapes, answer, timed = json.loads(sys.argv[1])
    print("\n" + json.dumps(read_both(name, [Path(p) for p in paths], shapes, Path(answer), timed)))
