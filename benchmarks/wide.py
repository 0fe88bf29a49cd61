#!/usr/bin/env python3
"""CSPDarknet-53 of 27 million weights: how much CPU it takes pwopt to find what could be raced in a wide model.

    python benchmarks/wide.py [FOLDER]

Wang et al., "CSPNet" (CVPR Workshops 2020); Bochkovskiy et al., "YOLOv4" (2020): each stage halves the plane, splits into
two 1×1 convolutions, sends one through residual blocks of 1×1 and 3×3, and joins both. Writes the model into FOLDER and
prints seconds of CPU, the median of five: settling with and without certificates, the search for candidates after it,
and one candidate with every measured rewrite.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from builder import Builder

from pwopt.evidence.certify import certify
from pwopt.graph.files import load
from pwopt.selecting.compilation import Compilation
from pwopt.selecting.pass_list import resolve_passes

#: Channels and residual blocks of each stage.
STAGES = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))


def cspdarknet53(path: Path) -> None:
    b = Builder()

    def unit(x: str, inn: int, out: int, kernel: int = 1, stride: int = 1) -> str:
        return b.silu(b.conv(x, inn, out, kernel, stride=stride))

    x, width = unit("x", 3, 32, 3), 32
    for channels, count in STAGES:
        x, half = unit(x, width, channels, 3, 2), channels // 2
        part, rest = unit(x, channels, half), unit(x, channels, half)
        for _ in range(count):
            part = b.op("Add", part, unit(unit(part, half, half), half, half, 3))
        x = unit(b.op("Concat", unit(part, half, half), rest, axis=1), channels, channels)
        width = channels
    b.save(path, {"x": [1, 3, 224, 224]}, [x])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where to keep the model")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "cspdarknet53.onnx"
        cspdarknet53(path)
        source = load(path)
        print(f"{sum(t.ByteSize() for t in source.proto.graph.initializer) / 4e6:.1f} million weights")
        spent: dict[str, list[float]] = {}

        def timed(name: str, run: Callable[[], object]) -> None:
            begin = time.process_time()
            run()
            spent.setdefault(name, []).append(time.process_time() - begin)

        for _ in range(5):
            shapes = {"x": (1, 3, 224, 224)}
            work = Compilation(source, source, resolve_passes(), (), shapes, Path(temporary))
            timed("settle", lambda work=work: work.snapshot(()))  # type: ignore[misc]
            timed("search", work.find_opportunities)
            sites = frozenset(r.site for r in work.find_opportunities()[0])
            timed("candidate", lambda work=work, sites=sites: work.rewrite(sites))  # type: ignore[misc]
            judged = Compilation(source, source, resolve_passes(), (), shapes, Path(temporary), certifier=certify)
            timed("settle with certificates", lambda judged=judged: judged.snapshot(()))  # type: ignore[misc]
        for name, seconds in spent.items():
            print(f"{name}: {statistics.median(seconds):.2f} s of CPU")


if __name__ == "__main__":
    main()
