"""Sizes of inputs in a model's metadata, under the keys that exporters and model hubs use."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx

#: Height and width: Ultralytics, timm, Hugging Face's preprocessors and configurations.
IMAGE_KEYS = ("imgsz", "image_size", "img_size", "input_size", "crop_size", "input_shape", "size")
HEIGHT_KEYS, WIDTH_KEYS = (
    ("image_height", "input_height", "img_height", "height"),
    ("image_width", "input_width", "width"),
)
#: A U-Net's latents (diffusers).
LATENT_KEYS = ("sample_size",)
#: Exact lengths, and maximal lengths (Hugging Face).
LENGTH_KEYS = ("sequence_length", "seq_length", "seq_len", "max_length", "max_seq_length", "max_seq_len")
MAX_LENGTH_KEYS = ("max_position_embeddings", "model_max_length", "n_positions", "n_ctx", "max_target_positions")
#: Samples per second of audio.
RATE_KEYS = ("sample_rate", "sampling_rate", "samplerate")
FRAME_KEYS = ("num_frames", "n_frames", "max_frames")
STRIDE_KEYS, BATCH_KEYS, CHANNEL_KEYS = (
    ("stride",),
    ("batch", "batch_size"),
    ("num_channels", "in_channels", "channels", "ch"),
)


class Metadata:
    """The values in a model's metadata, by key in lower case. Keys inside nested JSON count like outer keys."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.values: dict[str, Any] = {}
        for entry in model.metadata_props:
            for key, value in _flat(entry.key.lower(), _read(entry.value)):
                self.values.setdefault(key, value)

    def number(self, keys: tuple[str, ...], low: int = 1, high: int = 1 << 20) -> tuple[int, str] | None:
        """The first whole number between `low` and `high` under one of some keys, and the key."""
        for key in keys:
            value = self.values.get(key)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(value, (int, float)) and value == int(value) and low <= value <= high:
                return int(value), key
        return None

    def image(self, keys: tuple[str, ...] = IMAGE_KEYS) -> tuple[tuple[int, int], str] | None:
        """Height and width of an image, and the key that gives them."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, Mapping):
                value = [
                    value.get("height", value.get("shortest_edge")),
                    value.get("width", value.get("shortest_edge")),
                ]
            numbers = value if isinstance(value, list) else [value, value]
            sizes = [int(v) for v in numbers if isinstance(v, (int, float)) and not isinstance(v, bool) and v == int(v)]
            spatial = [v for v in sizes if v > 4] if len(sizes) > 2 else sizes  # without a batch and channels
            if len(spatial) == 1:
                spatial *= 2
            if len(spatial) == 2 and all(8 <= v <= 1 << 14 for v in spatial):
                return (spatial[0], spatial[1]), key
        high, wide = self.number(HEIGHT_KEYS, 8), self.number(WIDTH_KEYS, 8)
        return ((high[0], wide[0]), f"{high[1]} and {wide[1]}") if high and wide and keys is IMAGE_KEYS else None


def _read(text: str) -> Any:
    """Parse a number, list or mapping that is written as JSON, as Python or as 320x320; return other text as it is."""
    if len(text) > 1 << 16:
        return text
    if re.fullmatch(r"\d+([x×]\d+)+", text.strip()):
        return [int(n) for n in re.split("[x×]", text.strip())]
    for reader in (json.loads, ast.literal_eval):
        try:
            value = reader(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return text


def _flat(key: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, Mapping) and depth < 4:
        for inner, content in value.items():
            yield from _flat(str(inner).lower(), content, depth + 1)
