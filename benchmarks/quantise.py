"""Signal-to-noise ratio of int8 models: the original, the optimised one, and the optimised and equalised one.

    python benchmarks/quantise.py MODEL INPUT 1x3x640x640 [MODEL INPUT SIZE…] [--json FILE]

Each model is quantised by onnxruntime (QDQ, scales per channel, calibrated on 8 random inputs, opset 17), and compared
with the original in floating point on 4 other inputs. Random inputs say how three variants of one model compare, not how
accurate a quantised model is on real data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import pwopt
from pwopt.graph.files import load
from pwopt.graph.opset import convert_opset

#: The opset of the quantised models.
OPSET = 17
Feeds = dict[str, np.ndarray]


class Samples(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data for onnxruntime's quantiser."""

    def __init__(self, feeds: list[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def run(model: Path, feeds: list[Feeds]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, feed)[0], np.float64) for feed in feeds]


def measure(model: Path, name: str, size: tuple[int, ...]) -> dict[str, float]:
    """Measure the signal-to-noise ratio in dB of each variant."""
    rng = np.random.default_rng(0)
    feeds = [{name: rng.uniform(-1, 1, size).astype(np.float32)} for _ in range(12)]
    wanted = run(model, feeds[8:])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, fast, even = (Path(folder) / f"{kind}.onnx" for kind in ("original", "optimised", "equalised"))
        source = load(model)
        plain.write_bytes((convert_opset(source, OPSET) if source.opset < OPSET else source.proto).SerializeToString())
        pwopt.optimize(plain, fast, shapes={name: size}, cost="analytic")
        pwopt.optimize(fast, even, shapes={name: size}, cost="analytic", passes=["equalise-channels"])
        for path in (plain, fast, even):
            out = path.with_suffix(".int8.onnx")
            quantize_static(
                path, out, Samples(feeds[:8]), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            pairs = list(zip(run(out, feeds[8:]), wanted, strict=True))
            noise = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
            found[path.stem] = 10 * float(np.log10(sum(float((b**2).sum()) for _, b in pairs) / noise))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="MODEL INPUT SIZE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = {}
    for model, name, size in zip(given.words[::3], given.words[1::3], given.words[2::3], strict=True):
        rows[Path(model).stem] = measure(Path(model), name, tuple(map(int, size.split("x"))))
        print(
            Path(model).stem, *(f"{kind} {ratio:.1f} dB" for kind, ratio in rows[Path(model).stem].items()), flush=True
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
