"""What a model is run on; a worker imports this without onnx, and so starts sooner."""

from __future__ import annotations

from pwopt.algebra import Values

#: Input name → array.
Feeds = dict[str, Values]
