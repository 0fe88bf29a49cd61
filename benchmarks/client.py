"""RapidOCR with its wheel's models and with optimised ones, in turn, on a drawn page.

``python benchmarks/client.py DIR`` optimises the three models into the folder, with default options, unless
they are there, and prints the median of the ratios of runs side by side with its 99 % confidence interval.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

import pwopt
from pwopt.running.installation import cpu_name
from pwopt.running.timing import Race, SessionPair

LINES = ["Invoice 2026-0417", "3 widgets, blue", "1 gear box", "Total: 169.70 EUR", "Thank you for your order!"]


def main(folder: Path, rounds: int = 40, threads: int = 1) -> None:
    import rapidocr_onnxruntime

    picture = Image.new("RGB", (800, 460), "white")
    for i, line in enumerate(LINES):
        ImageDraw.Draw(picture).text((40, 40 + 80 * i), line, "black", font=ImageFont.load_default(size=32))
    page = np.asarray(picture)
    wheel = Path(rapidocr_onnxruntime.__file__).parent / "models"
    for row in pwopt.optimize_many([wheel], folder, pwopt.Request(threads=threads)):
        print(row.output, row.status, row.nodes, row.speedup, row.sentence)
    files = {f"{kind}_model_path": str(next(folder.glob(f"*_{kind}_*.onnx"))) for kind in ("det", "cls", "rec")}
    own = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    readers = [rapidocr_onnxruntime.RapidOCR(**own), rapidocr_onnxruntime.RapidOCR(**own, **files)]
    texts = [[text for _, text, _ in reader(page)[0]] for reader in readers]
    assert texts[0] == texts[1], texts
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        for i in random.sample((0, 1), 2):
            begin = time.perf_counter()
            readers[i](page)
            taken[i].append(time.perf_counter() - begin)
    race = Race(tuple(SessionPair((np.array([a]), np.array([b]))) for a, b in zip(*taken, strict=True)))
    low, high = race.interval()
    print(f"{cpu_name()}, {threads} threads: {race.median(0) * 1e3:.1f} → {race.median(1) * 1e3:.1f} ms,")
    print(f"{race.speedup():.3f}× [{low:.3f}, {high:.3f}] over {rounds} rounds")


if __name__ == "__main__":
    typer.run(main)
