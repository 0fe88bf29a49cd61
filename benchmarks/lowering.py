#!/usr/bin/env python3
"""Networks that the lowering table and its neighbours serve, and what two versions of pwopt make of them.

    python benchmarks/lowering.py build NETWORKS
    PYTHONPATH=CHECKOUT python benchmarks/lowering.py optimize NETWORKS RESULTS
    python benchmarks/lowering.py race NETWORKS BEFORE AFTER [-o RESULTS.json] [--seconds 20]

The first form writes the networks. The second optimises each one with default options, in a process of its own with an
empty cache, by the pwopt of a checkout. The third races what two checkouts made: the originals and both results, over
fresh pairs of sessions (`answer_time.py --race`). Other models may lie in the folder of networks as well. Set
``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` for the third form, so that sessions agree to about 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from answer_time import raced
from builder import Builder
from onnx import numpy_helper

#: Network → the gain over the result of the version without lowering that its figures lead one to expect.
EXPECTED = {
    "conv_tasnet": 1.7, "prelu_by_channel": 1.15, "repsr": 2.0, "x3d": 2.2, "segmentation": 1.03, "encoder": 1.05,
    "yolo_mish": 1.5, "silu24": 1.0,
}  # fmt: skip
#: What a process runs to optimise one model.
OPTIMIZE = """
import sys, pwopt
report = pwopt.optimize(sys.argv[1], sys.argv[2]).report
print(*dict.fromkeys(r.site.pass_name if hasattr(r, "site") else r.pass_name for r in report.rewrites), sep=", ")
"""


def conv_tasnet(path: Path) -> None:
    """Luo and Mesgarani, "Conv-TasNet" (2019): 3 repeats of 8 blocks on time, without the normalisations."""
    b, x, width, inner = Builder(), "x", 128, 256
    for block in range(24):
        slopes = [b.constant(np.full(1, 0.25)) for _ in range(2)]
        y = b.op("PRelu", b.conv(x, width, inner, rank=1), slopes[0])
        reach = 2 ** (block % 8)
        weight = b.constant(b.rng.normal(0, 0.6, (inner, 1, 3)))
        y = b.op("Conv", y, weight, group=inner, kernel_shape=[3], dilations=[reach], pads=[reach, reach])
        y = b.op("PRelu", y, slopes[1])
        x = b.op("Add", x, b.conv(y, inner, width, rank=1))
    b.save(path, {"x": [1, width, 800]}, [x])


def prelu_by_channel(path: Path) -> None:
    b, x = Builder(), "x"
    for _ in range(4):
        slopes = b.constant(0.1 + 0.4 * b.rng.random((64, 1, 1)))
        x = b.op("PRelu", b.conv(x, 64, 64, 3), slopes)
    b.save(path, {"x": [1, 64, 56, 56]}, [x])


def repsr(path: Path) -> None:
    """Wang et al., "RepSR" (2022), in the form in which it is trained."""
    b, x = Builder(), "x"
    channels = 3
    for _ in range(4):
        slope = b.constant(np.full(1, 0.2))
        y = b.conv(b.conv(x, channels, 48), 48, 24, 3)
        z = b.op("Conv", x, b.constant(b.rng.normal(0, 0.07, (24, channels, 3, 3))), kernel_shape=[3, 3], pads=[1] * 4)
        x, channels = b.op("PRelu", b.op("Add", y, z), slope), 24
    x = b.op("DepthToSpace", b.conv(x, 24, 12, 3), blocksize=2)
    b.save(path, {"x": [1, 3, 128, 128]}, [x])


def x3d(path: Path) -> None:
    """Feichtenhofer, "X3D" (2020): a stage on 8 frames of 112²."""
    b, x, width, inner = Builder(), "x", 24, 54
    for _ in range(2):
        y = b.op("Relu", b.conv(x, width, inner, rank=3))
        y = b.silu(b.conv(y, inner, inner, 3, inner, rank=3))
        x = b.op("Relu", b.op("Add", x, b.conv(y, inner, width, rank=3)))
    b.save(path, {"x": [1, width, 8, 112, 112]}, [x])


def segmentation(path: Path) -> None:
    """The head of DeepLab v3+ (Chen et al., 2018): two bilinear upsamplings."""
    b = Builder()
    deep = b.op("Relu", b.conv(b.op("Relu", b.conv("deep", 128, 64, 3)), 64, 64, 3))
    wide = b.op("Resize", deep, "", "", _sizes(b, [1, 64, 64, 64]), mode="linear")
    fine = b.op("Relu", b.conv("fine", 32, 32, 3))
    y = b.op("Relu", b.conv(b.op("Concat", wide, fine, axis=1), 96, 64, 3))
    y = b.op("Resize", b.conv(y, 64, 21), "", "", _sizes(b, [1, 21, 128, 128]), mode="linear")
    b.save(path, {"deep": [1, 128, 16, 16], "fine": [1, 32, 64, 64]}, [y])


def _sizes(b: Builder, sizes: list[int]) -> str:
    name = b.constant(np.zeros(1))
    b.weights[-1] = numpy_helper.from_array(np.array(sizes, np.int64), name)
    return name


def encoder(path: Path) -> None:
    """Six layers of width 384 that normalise after each sum (Vaswani et al., 2017), for 128 tokens."""
    b, x, width, heads = Builder(), "x", 384, 6

    def matrix(inn: int, out: int) -> str:
        return b.constant(b.rng.normal(0, inn**-0.5, (inn, out)))

    def linear(y: str, inn: int, out: int) -> str:
        return b.op("Add", b.op("MatMul", y, matrix(inn, out)), b.constant(b.rng.normal(0, 0.1, out)))

    def split(y: str, order: list[int]) -> str:
        return b.op("Transpose", b.op("Reshape", y, _sizes(b, [1, 128, heads, width // heads])), perm=order)

    def norm(y: str) -> str:
        return b.op("LayerNormalization", y, b.constant(np.ones(width)), b.constant(np.zeros(width)), axis=-1)

    for _ in range(6):
        q, v = split(linear(x, width, width), [0, 2, 1, 3]), split(linear(x, width, width), [0, 2, 1, 3])
        k = split(linear(x, width, width), [0, 2, 3, 1])
        scores = b.op("Mul", b.op("MatMul", q, k), b.constant(np.array((width // heads) ** -0.5)))
        mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        joined = b.op("Reshape", mixed, _sizes(b, [1, 128, width]))
        x = norm(b.op("Add", x, linear(joined, width, width)))
        hidden = b.op("Relu", linear(x, width, 4 * width))
        x = norm(b.op("Add", x, linear(hidden, 4 * width, width)))
    b.save(path, {"x": [1, 128, width]}, [x])


def yolo_mish(path: Path) -> None:
    """The stages of YOLOv4 (Bochkovskiy et al., 2020): strided convolutions and residual blocks with Mish."""
    b = Builder()

    def mish(y: str) -> str:
        return b.op("Mul", y, b.op("Tanh", b.op("Softplus", y)))

    x, width = mish(b.conv("x", 3, 32, 3)), 32
    for _ in range(3):
        x, width = mish(b.conv(x, width, 2 * width, 3, stride=2)), 2 * width
        for _ in range(2):
            y = mish(b.conv(mish(b.conv(x, width, width // 2)), width // 2, width, 3))
            x = b.op("Add", x, y)
    b.save(path, {"x": [1, 3, 160, 160]}, [x])


def silu24(path: Path) -> None:
    """Branches that sum to one convolution, behind SiLU, at opset 24."""
    b, x = Builder(), "x"
    for _ in range(6):
        x = b.silu(b.op("Add", b.conv(x, 48, 48, 3), b.conv(x, 48, 48)))
    b.save(path, {"x": [1, 48, 56, 56]}, [x], opset=24)


NETWORKS = (conv_tasnet, prelu_by_channel, repsr, x3d, segmentation, encoder, yolo_mish, silu24)


def optimize(networks: Path, results: Path) -> None:
    """Optimise every model of a folder, each with a cache of its own."""
    results.mkdir(parents=True, exist_ok=True)
    for path in sorted(networks.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-c", OPTIMIZE, str(path), str(results / path.name)]
            done = subprocess.run(
                command, env={**os.environ, "PWOPT_CACHE": cache}, capture_output=True, text=True, check=False
            )
        told = done.stdout.strip() if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"{path.stem}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("networks", type=Path)
    second = commands.add_parser("optimize")
    second.add_argument("networks", type=Path)
    second.add_argument("results", type=Path)
    third = commands.add_parser("race")
    third.add_argument("race", type=Path, nargs=3, metavar=("NETWORKS", "BEFORE", "AFTER"))
    third.add_argument("-o", "--output", type=Path)
    third.add_argument("--seconds", type=float, default=20.0, help="to race each network")
    options = parser.parse_args()
    if options.command == "build":
        for network in NETWORKS:
            network(options.networks / f"{network.__name__}.onnx")
    elif options.command == "optimize":
        optimize(options.networks, options.results)
    else:
        rows = raced(options)
        for row in rows:
            expected = EXPECTED.get(Path(row["model"]).stem)
            ratio, low, high = row["after/before"]
            goal = "" if expected is None else f", expected {expected}"
            print(f"{row['model']}: {ratio:.3f} [{low:.3f}, {high:.3f}] over the result before{goal}")
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
