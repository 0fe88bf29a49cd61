#!/usr/bin/env python3
"""Write 3-D models to bench: chains of pointwise convolutions, and blocks like X3D's.

    python benchmarks/video.py FOLDER && python benchmarks/run.py FOLDER

Feichtenhofer, "X3D: Expanding Architectures for Efficient Video Recognition" (CVPR 2020): 1×1×1 expansion, depthwise
3×3×3, squeeze-and-excitation, Swish, 1×1×1 projection, residual; stage 3 of X3D-S on 13 frames of 20×20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from builder import Builder


def chain(path: Path, activation: str, frames: int, side: int) -> None:
    b, x = Builder(), "x"
    for inn, out in ((48, 96), (96, 96), (96, 48)):
        x = b.op(activation, b.conv(x, inn, out, rank=3))
    b.save(path, {"x": [1, 48, frames, side, side]}, [x])


def blocks(path: Path) -> None:
    b, x, width, inner, squeezed = Builder(), "x", 48, 108, 8
    for i in range(4):
        y = b.op("Relu", b.conv(x, width, inner, rank=3))
        y = b.conv(y, inner, inner, 3, inner, rank=3)
        if i % 2 == 0:
            gate = b.op("Relu", b.conv(b.op("GlobalAveragePool", y), inner, squeezed, rank=3))
            y = b.op("Mul", y, b.op("Sigmoid", b.conv(gate, squeezed, inner, rank=3)))
        x = b.op("Relu", b.op("Add", x, b.conv(b.silu(y), inner, width, rank=3)))
    b.save(path, {"x": [1, width, 13, 20, 20]}, [x])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for activation in ("Relu", "HardSwish"):
        for frames, side in ((13, 20), (16, 56)):
            chain(folder / f"pointwise3d_{activation.lower()}_{frames}x{side}x{side}.onnx", activation, frames, side)
    blocks(folder / "x3d_blocks.onnx")
