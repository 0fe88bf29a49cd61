#!/usr/bin/env python3
"""Write models whose widths and forms fall out of onnxruntime's blocked layout, to bench.

    python benchmarks/layout.py FOLDER && python benchmarks/run.py FOLDER

* odd_widths: inverted residuals (Sandler et al., "MobileNetV2", 2018) of 27, 38, 50 and 61 channels, six times that
  inside, with squeeze-and-excitation and SiLU, as in scaled EfficientNets and ReXNet.
* patch_embedding: depthwise convolutions that double the channels, as in patch embeddings of hybrid transformers.
* gates: the 1×1 convolutions of SE-ResNet-50's squeeze-and-excitations, at batch 32.
* norms: normalisations over channels between convolutions, nine operators each as frameworks export them, in blocks as
  NAFNet's (Chen et al., "Simple Baselines for Image Restoration", 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from builder import Builder


def odd_widths(path: Path) -> None:
    b = Builder()
    x, width = b.silu(b.conv("x", 3, 27, 3, stride=2)), 27
    for out, stride in ((27, 1), (38, 2), (38, 1), (50, 2), (50, 1), (61, 1), (61, 1)):
        inner = 6 * width
        y = b.silu(b.conv(x, width, inner))
        y = b.silu(b.conv(y, inner, inner, 3, inner, stride))
        y = b.conv(b.gate(y, inner, width // 4), inner, out)
        x, width = (b.op("Add", x, y) if stride == 1 and width == out else y), out
    b.save(path, {"x": [1, 3, 160, 160]}, [b.conv(x, width, 64)])


def patch_embedding(path: Path) -> None:
    b = Builder()
    x, width = b.conv("x", 3, 32, 3, stride=2), 32
    for _ in range(3):
        y = b.op("Relu", b.conv(x, width, 2 * width, 3, width, 2))
        x, width = b.op("Relu", b.conv(y, 2 * width, 2 * width)), 2 * width
    b.save(path, {"x": [1, 3, 256, 256]}, [x])


def gates(path: Path) -> None:
    b, inputs, outputs = Builder(), {}, []
    for width in (256, 512, 1024, 2048):
        inputs[f"pooled{width}"] = [32, width, 1, 1]
        squeezed = b.op("Relu", b.conv(f"pooled{width}", width, width // 16))
        outputs.append(b.op("Sigmoid", b.conv(squeezed, width // 16, width)))
    b.save(path, inputs, outputs)


def norms(path: Path) -> None:
    b, width = Builder(), 32
    x = b.conv("x", 3, width, 3)
    for _ in range(4):
        y = b.conv(b.norm(x, width), width, 2 * width)
        y = b.gate(b.op("Relu", b.conv(y, 2 * width, 2 * width, 3, 2 * width)), 2 * width, width // 2)
        x = b.op("Add", x, b.conv(y, 2 * width, width))
        y = b.op("Relu", b.conv(b.norm(x, width), width, 2 * width))
        x = b.op("Add", x, b.conv(y, 2 * width, width))
    b.save(path, {"x": [1, 3, 128, 128]}, [b.conv(x, width, 3, 3)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    odd_widths(folder / "odd_widths.onnx")
    patch_embedding(folder / "patch_embedding.onnx")
    gates(folder / "gates.onnx")
    norms(folder / "norms.onnx")
