#!/usr/bin/env python3
"""How often the rule of equivalence errs: false alarms over equivalent pairs, misses over planted faults of known size.

    python benchmarks/error_rates.py [-o RESULTS.json] [--pairs 200]

Random networks of convolutions, normalisations and activations with a classifier, a softmax, a sigmoid map or a label
at the end. An equivalent pair is a network and the same function computed otherwise: channels permuted, filters
rescaled, normalisations folded in float32, a convolution split in two, optimised by pwopt, or saved by onnxruntime at
a lower optimisation level. A fault is a relative error in every weight of one layer or in one filter, or one wrong
bias entry, given relative to the norm of its filter. Faults that are found are located as well.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pwopt.evidence.verify import verify
from pwopt.graph.files import save
from pwopt.optimizing.optimizer import optimize
from pwopt.reporting.report import to_json
from pwopt.running.installation import describe_machine, import_onnxruntime, silence_onnxruntime

SIZES = (1e-2, 1e-3, 1e-4, 1e-5)
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "")
HEADS = ("logits", "softmax", "map", "label")
#: Of the faults that were found, as many per kind and size are located.
LOCATED = 20
COLUMNS = (
    "faults",
    "missed",
    "missed without tolerance",
    "missed with unlimited tolerance",
    "searched",
    "right layer",
    "wrong layer",
)
NO_TOLERANCE = {"rtol": 0.0, "atol": 0.0}


@dataclass(frozen=True)
class Layer:
    """A convolution, a normalisation (scale, shift, mean, variance) or none, an activation or none; in `parts`."""

    weight: np.ndarray
    bias: np.ndarray
    norm: tuple[np.ndarray, ...] | None
    activation: str
    parts: int = 1


@dataclass(frozen=True)
class Net:
    layers: tuple[Layer, ...]
    head: str

    def model(self) -> onnx.ModelProto:
        nodes, weights = [], []

        def constant(name: str, value: np.ndarray) -> str:
            weights.append(numpy_helper.from_array(value.astype(np.float32), name))
            return name

        last = "x"
        for i, layer in enumerate(self.layers):
            taps, channels = layer.weight.shape[2], layer.weight.shape[1]
            pads = [taps // 2] * 4
            cuts = np.array_split(np.arange(channels), layer.parts)
            sources = [last]
            if layer.parts > 1:
                sources = [f"cut{i}_{j}" for j in range(layer.parts)]
                sizes = numpy_helper.from_array(np.array([len(c) for c in cuts]), f"sizes{i}")
                weights.append(sizes)
                nodes.append(helper.make_node("Split", [last, sizes.name], sources, axis=1))
            sums = []
            for j, (source, cut) in enumerate(zip(sources, cuts, strict=True)):
                name = f"conv{i}" if j == layer.parts - 1 == 0 else f"conv{i}_{j}"
                inputs = [source, constant(f"{name}.weight", layer.weight[:, cut])]
                inputs += [constant(f"{name}.bias", layer.bias)] if j == 0 else []
                nodes.append(helper.make_node("Conv", inputs, [name], name=name, pads=pads))
                sums.append(name)
            if layer.parts > 1:
                nodes.append(helper.make_node("Sum", sums, [f"conv{i}"]))
            last = f"conv{i}"
            if layer.norm is not None:
                held = [constant(f"norm{i}.{k}", value) for k, value in enumerate(layer.norm)]
                nodes.append(helper.make_node("BatchNormalization", [last, *held], [f"norm{i}"]))
                last = f"norm{i}"
            if layer.activation:
                nodes.append(helper.make_node(layer.activation, [last], [f"act{i}"]))
                last = f"act{i}"
        if self.head == "map":
            nodes.append(helper.make_node("Sigmoid", [last], ["y"]))
        else:
            nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
            nodes.append(helper.make_node("Flatten", ["pooled"], ["y" if self.head == "logits" else "flat"]))
            if self.head == "softmax":
                nodes.append(helper.make_node("Softmax", ["flat"], ["y"], axis=1))
            if self.head == "label":
                nodes.append(helper.make_node("ArgMax", ["flat"], ["y"], axis=1))
        kind = TensorProto.INT64 if self.head == "label" else TensorProto.FLOAT
        shape = [4, self.layers[0].weight.shape[1], 12, 12]
        graph = helper.make_graph(
            nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", kind, None)], weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random_net(rng: np.random.Generator, heads: Sequence[str] = HEADS) -> Net:
    widths = [3, *rng.integers(4, 33, int(rng.integers(3, 9)))]
    layers = []
    for channels, out in itertools.pairwise(widths):
        taps = int(rng.choice([1, 1, 3, 5]))
        weight = rng.normal(0, np.sqrt(2 / (channels * taps * taps)), (out, channels, taps, taps))
        scale, shift, mean = rng.uniform(0.5, 1.5, out), rng.normal(0, 0.2, out), rng.normal(0, 0.2, out)
        norm = (scale, shift, mean, rng.uniform(0.5, 2, out)) if rng.random() < 0.5 else None
        layers.append(Layer(weight, rng.normal(0, 0.1, out), norm, str(rng.choice(ACTIVATIONS))))
    return Net(tuple(layers), str(rng.choice(heads)))


def _between(net: Net, change: Callable[[Layer, Layer], tuple[Layer, Layer]]) -> Net:
    layers = list(net.layers)
    for i in range(len(layers) - 1):
        layers[i], layers[i + 1] = change(layers[i], layers[i + 1])
    return replace(net, layers=tuple(layers))


def permuted(net: Net, rng: np.random.Generator) -> Net:
    """Inner channels in another order."""

    def change(first: Layer, second: Layer) -> tuple[Layer, Layer]:
        order = rng.permutation(len(first.bias))
        norm = None if first.norm is None else tuple(v[order] for v in first.norm)
        first = replace(first, weight=first.weight[order], bias=first.bias[order], norm=norm)
        return first, replace(second, weight=second.weight[:, order])

    return _between(net, change)


def rescaled(net: Net, rng: np.random.Generator) -> Net:
    """Filters times s, the weights that read them times 1/s, past activations that let positive scales through."""

    def change(first: Layer, second: Layer) -> tuple[Layer, Layer]:
        if first.norm is not None or first.activation not in ("Relu", "LeakyRelu", ""):
            return first, second
        s = np.exp(rng.normal(0, 1, len(first.bias)))
        first = replace(first, weight=first.weight * s[:, None, None, None], bias=first.bias * s)
        return first, replace(second, weight=second.weight / s[None, :, None, None])

    return _between(net, change)


def folded(net: Net, rng: np.random.Generator) -> Net:
    """Normalisations folded into their convolutions, in float32, as converters do."""

    def fold(layer: Layer) -> Layer:
        if layer.norm is None:
            return layer
        scale, shift, mean, variance = (np.float32(v) for v in layer.norm)
        factor = scale / np.sqrt(variance + np.float32(1e-5))
        weight = np.float32(layer.weight) * factor[:, None, None, None]
        return replace(layer, weight=weight, bias=(np.float32(layer.bias) - mean) * factor + shift, norm=None)

    return replace(net, layers=tuple(map(fold, net.layers)))


def split(net: Net, rng: np.random.Generator) -> Net:
    """Every convolution as the sum of two, over half the channels each."""
    return replace(net, layers=tuple(replace(layer, parts=2) for layer in net.layers))


def by_pwopt(net: Net, path: Path, rng: np.random.Generator) -> None:
    save(optimize(net.model(), cost="analytic", verify=False).model, path)


def by_onnxruntime(net: Net, path: Path, rng: np.random.Generator) -> None:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = rng.choice([level.ORT_ENABLE_BASIC, level.ORT_ENABLE_EXTENDED])
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(net.model().SerializeToString(), options, providers=["CPUExecutionProvider"])


REWRITTEN: tuple[Callable[[Net, np.random.Generator], Net], ...] = (permuted, rescaled, folded, split)
SAVED: tuple[Callable[[Net, Path, np.random.Generator], None], ...] = (by_pwopt, by_onnxruntime)


def every_weight(layer: Layer, size: float, rng: np.random.Generator) -> Layer:
    return replace(layer, weight=layer.weight * (1 + size * rng.standard_normal(layer.weight.shape)))


def one_filter(layer: Layer, size: float, rng: np.random.Generator) -> Layer:
    weight = layer.weight.copy()
    weight[rng.integers(len(weight))] *= 1 + size
    return replace(layer, weight=weight)


def one_bias(layer: Layer, size: float, rng: np.random.Generator) -> Layer:
    bias, i = layer.bias.copy(), rng.integers(len(layer.bias))
    bias[i] += size * np.linalg.norm(layer.weight[i])
    return replace(layer, bias=bias)


FAULTS = (every_weight, one_filter, one_bias)


def false_alarms(pairs: int, folder: Path) -> list[dict[str, object]]:
    """Equivalent pairs, as many of each kind in turn."""
    a, b = folder / "a.onnx", folder / "b.onnx"
    kinds = [*REWRITTEN, *SAVED]
    alarms: Counter[str] = Counter()
    strict: Counter[str] = Counter()
    for seed in range(pairs):
        rng = np.random.default_rng(seed)
        net, kind = random_net(rng), kinds[seed % len(kinds)]
        onnx.save(net.model(), a)
        if kind in REWRITTEN:
            onnx.save(kind(net, rng).model(), b)  # type: ignore[call-arg, arg-type, union-attr]
        else:
            kind(net, b, rng)  # type: ignore[call-arg, arg-type]
        alarms[kind.__name__] += not verify(a, b, locate=False).passed
        strict[kind.__name__] += not verify(a, b, locate=False, **NO_TOLERANCE).passed
    return [
        {
            "kind": k.__name__, "pairs": len(range(i, pairs, len(kinds))), "false alarms": alarms[k.__name__],
            "false alarms without tolerance": strict[k.__name__],
        }
        for i, k in enumerate(kinds)
    ]  # fmt: skip


def misses(count: int, folder: Path, size: float) -> list[dict[str, object]]:
    """`count` faults of one size, as many of each kind in turn, in networks whose output is not just a label."""
    a, b = folder / "a.onnx", folder / "b.onnx"
    rows = []
    for k, fault in enumerate(FAULTS):
        seen: Counter[str] = Counter()
        for seed in range(k, count, len(FAULTS)):
            rng = np.random.default_rng((1, seed))
            net = random_net(rng, HEADS[:-1])
            at = int(rng.integers(len(net.layers)))
            layers = list(net.layers)
            layers[at] = fault(layers[at], size, rng)
            onnx.save(net.model(), a)
            onnx.save(replace(net, layers=tuple(layers)).model(), b)
            found = verify(a, b, locate=seen["searched"] < LOCATED)
            seen["faults"] += 1
            seen["missed"] += found.passed
            seen["missed without tolerance"] += verify(a, b, locate=False, **NO_TOLERANCE).passed
            seen["missed with unlimited tolerance"] += all("but beyond" in o.reason or o.passed for o in found.outputs)
            if not found.passed and seen["searched"] < LOCATED:
                named = found.difference.node if found.difference is not None else ""
                seen["searched"] += 1
                seen["right layer"] += named == f"Conv conv{at}"
                seen["wrong layer"] += named not in ("", f"Conv conv{at}")
        rows.append({"fault": fault.__name__, "size": size, **{what: seen[what] for what in COLUMNS}})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--pairs", type=int, default=200, help="equivalent pairs, and faults per size")
    options = parser.parse_args()
    silence_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        alarms = false_alarms(options.pairs, Path(folder))
        for row in alarms:
            print(row, flush=True)
        missed = [row for size in SIZES for row in misses(options.pairs, Path(folder), size)]
    if options.output:
        content = {"environment": describe_machine(), "false alarms": alarms, "misses": missed}
        options.output.write_text(to_json(content))


if __name__ == "__main__":
    main()
