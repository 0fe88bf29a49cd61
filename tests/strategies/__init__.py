"""Random valid models over the operators that pwopt touches, with motifs for every pass.

A `Random` makes every choice: hypothesis's, which it can shrink, or a seeded one (benchmarks/fuzz.py). The modules of
this package hold one kind of motif each.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from strategies.branches import Branches
from strategies.builder import Sample, Tensor, UnfitError
from strategies.canonical import Canonical
from strategies.fused import Fused
from strategies.lowered import Lowered
from strategies.opaque import Opaque
from strategies.positions import Positions
from strategies.resampling import Resampling
from strategies.sequences import Sequences
from strategies.steps import Steps
from strategies.structures import Structures

__all__ = ["Sample", "random_sample", "samples"]


#: How often a motif is drawn; 4 for all others.
WEIGHTS = dict.fromkeys(
    ("m_body", "m_function", "m_quantised", "m_foreign", "m_override", "m_optional", "m_omitted"), 1
) | {"m_sequence": 12, "m_threshold": 8, "m_defaults": 8}


class Generator(Sequences, Branches, Positions, Resampling, Steps, Structures, Lowered, Canonical, Fused, Opaque):
    """A graph that grows by random motifs: the methods whose names begin with `m_`."""

    def grow(self, motifs: int) -> None:
        names = sorted(n for n in dir(self) if n.startswith("m_"))
        names = [n for n in names for _ in range(WEIGHTS.get(n, 4))]
        self.input(self.rng.choice([4, 4, 4, 3, 2, 5]))
        for _ in range(motifs):
            lists: list[list[Any]] = [self.nodes, self.constants, self.inputs, self.pool, self.results]
            sizes = [len(part) for part in lists]
            try:
                getattr(self, self.rng.choice(names))()
            except UnfitError:
                if self.chance(0.5):  # half of what was begun stays
                    for part, size in zip(lists, sizes, strict=True):
                        del part[size:]

    def sample(self) -> Sample:
        read = {name for node in self.nodes for name in node.input} | self.captured()
        made = [t for t in self.pool if t not in self.inputs]
        outputs = [t for t in made if t.name not in read] or self.pool[-1:]
        outputs += [t for t in made if t.name in read and self.chance(0.06)]
        held = {t.name for t in self.constants}
        free = [t for t in self.inputs if t.name in read or t in outputs]
        names = {d: f"D{d}" for t in free for d in t.shape if d and t.name not in held} if self.dynamic else {}
        axes = {(t.name, a) for t in free for a in range(t.rank) if a != 1 and self.chance(0.7)}

        def declared(t: Tensor) -> list[int | str]:
            return [names.get(d, d) if (t.name, a) in axes else d for a, d in enumerate(t.shape)]

        def feeds(grow: int, seed: int) -> dict[str, np.ndarray]:
            numbers = np.random.default_rng(seed)
            sizes = {
                t.name: [d + grow if isinstance(n, str) else d for d, n in zip(t.shape, declared(t), strict=True)]
                for t in free
            }
            return {
                t.name: numbers.normal(size=sizes[t.name]).astype(self.dtype)
                for t in free
                if t.name not in held or seed
            }

        graph = helper.make_graph(
            self.nodes, "random",
            [helper.make_tensor_value_info(t.name, self.code, declared(t)) for t in free],
            [
                *(helper.make_tensor_value_info(t.name, self.code, [None] * t.rank) for t in dict.fromkeys(outputs)),
                *self.results,
            ],
            [t for t in self.constants if t.name in read],
            value_info=self.declared,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=9 if self.opset < 20 else 10, functions=self.functions
        )
        return Sample(model, (feeds(0, 0), feeds(0, 1), feeds(3, 2)) if names else (feeds(0, 0), feeds(0, 1)))

    def captured(self) -> set[str]:
        bodies = [a.g for node in self.nodes for a in node.attribute if a.HasField("g")]
        return {name for body in bodies for inner in body.node for name in inner.input}


def random_sample(rng: Random, motifs: int = 6) -> Sample:
    """A model of a few motifs, decided by `rng`."""
    generator = Generator(rng)
    generator.grow(1 + rng.randrange(motifs))
    return generator.sample()


@st.composite
def samples(draw: st.DrawFn, motifs: int = 4) -> Sample:
    """Models that hypothesis chooses and shrinks."""
    return random_sample(draw(st.randoms(use_true_random=False)), motifs)
