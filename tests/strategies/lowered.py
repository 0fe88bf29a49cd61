"""Motifs for the lowering table, and for the rewrites that serve onnxruntime's CPU provider."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Lowered(Operators):
    """Adds operators that runtimes compute slowly."""

    def m_prelu(self) -> None:
        """PRelu behind a convolution, with one slope or one per channel."""
        x = self.conv(self.tensor(3, 4, 4))
        channels = (x.shape[1], *(1,) * (x.rank - 2))
        slope = np.full(self.rng.choice([(), (1,), channels]), self.rng.choice([0.25, -0.5, 0.1]))
        if self.chance(0.5):
            slope = self.numbers.normal(size=channels)
        self.affine(self.node("PRelu", [x, self.constant(slope)])[0])

    def m_mish(self) -> None:
        x = self.pointwise(self.tensor(2, 3, 4))
        if self.opset >= 18 and self.chance(0.5):
            self.node("Mish", [x])
            return
        gate = self.node("Tanh", [self.node("Softplus", [x])[0]])[0]
        self.affine(self.node("Mul", self.swapped(x, gate))[0])

    def m_lrn(self) -> None:
        x = self.tensor(4)
        attrs = {"alpha": self.rng.choice([1e-4, 0.5]), "beta": self.rng.choice([0.75, 0.75, 0.5, 1.0, 0.6])}
        self.affine(self.node("LRN", [x], size=self.rng.choice([1, 3, 5, 9]), **attrs)[0])

    def m_group_norm(self) -> None:
        x = self.tensor(3, 4)
        groups = self.rng.choice([g for g in (1, 2, 3, 4, x.shape[1]) if g and x.shape[1] % g == 0] or [0])
        if self.opset < 21 or not groups or 0 in x.shape:
            raise UnfitError("no GroupNormalization")
        numbers = [self.constant(self.numbers.normal(size=x.shape[1])) for _ in range(2)]
        name = self.raw_node("GroupNormalization", [x.name, *numbers], num_groups=groups, epsilon=0.01)
        self.pool.append(type(x)(name, x.shape))
        self.affine(self.pool[-1])

    def m_interpolation(self) -> None:
        """An interpolated image, perhaps beside others, and a scale or a convolution; or nearly that."""
        y = self.interpolate(self.tensor(4))
        if self.chance(0.4):
            self.affine(y)
            return
        if self.chance(0.4):
            other = self.input(4, (y.shape[0], self.rng.choice([3, y.shape[1]]), *y.shape[2:]))
            y = self.node("Concat", self.swapped(y, other), axis=1)[0]
        self.conv(y, None, self.rng.choice([2, 3, 3]))
        if self.chance(0.15):
            self.activation(y)  # a second reader

    def interpolate(self, x: Tensor) -> Tensor:
        """A linear or cubic Resize by scales or sizes."""
        if self.opset < 13 or 0 in x.shape:
            raise UnfitError("no image")
        attrs: dict[str, Any] = {"mode": self.rng.choice(["linear", "cubic"])}
        attrs["coordinate_transformation_mode"] = self.rng.choice(
            ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
        )
        if attrs["mode"] == "cubic" and self.chance(0.4):
            attrs |= {"exclude_outside": 1, "cubic_coeff_a": -0.5}
        if self.chance(0.5):
            scales = self.constant(
                [1, 1, *(self.rng.choice([0.5, 0.7, 1.3, 1.4, 1.5, 2.0]) for _ in range(2))], np.dtype(np.float32)
            )
            return self.node("Resize", [x, "", scales], **attrs)[0]
        sizes = self.integers([*x.shape[:2], *(self.rng.choice([1, 4, 7]) for _ in range(2))])
        return self.node("Resize", [x, "", "", sizes], **attrs)[0]

    def m_residual_norm(self) -> None:
        """A layer normalisation of a sum."""
        x = self.tensor(2, 3)
        if self.opset < 17 or 0 in x.shape:
            raise UnfitError("no LayerNormalization")
        y = self.product(x, x.shape[-1])
        if y.shape != x.shape:
            raise UnfitError("another shape")
        total = self.node("Add", self.swapped(x, y))[0]
        numbers = [self.constant(self.numbers.normal(size=x.shape[-1])) for _ in range(2)]
        self.affine(self.node("LayerNormalization", [total, *numbers])[0])

    def m_bordered_branches(self) -> None:
        """RepSR: branches with biases before padding that meet in a sum, once or twice."""
        x = self.tensor(4)
        for _ in range(self.rng.choice([1, 2])):
            channels, inner = x.shape[1], self.rng.choice([2, 4]) * max(1, x.shape[1])
            bias = self.constant(self.numbers.normal(size=inner))
            wide = self.node("Conv", [x, self.constant(self.weights(inner, channels, 1, 1), shared=False), bias])[0]
            pads = {"pads": [1, 1, 1, 1]}
            weight = self.constant(self.weights(channels, inner, 3, 3), shared=False)
            y = self.node("Conv", [wide, weight], **pads)[0]
            other = self.constant(self.weights(channels, channels, 3, 3), shared=False)
            z = x if self.chance(0.2) else self.node("Conv", [x, other], **pads)[0]
            y = self.node("Add", self.swapped(y, z))[0]
            x = self.node(self.rng.choice(["Relu", "LeakyRelu", "Sigmoid"]), [y])[0] if self.chance(0.8) else y

    def m_gated(self) -> None:
        """A residual stream of gated convolutions with a scale, as in WaveNet."""
        x = self.tensor(3, 4)
        if x.rank < 3 or x.shape[1] < 2 or 0 in x.shape or self.opset < 10:
            raise UnfitError("no gates")
        channels, scale = x.shape[1], self.rng.choice([0.5, 0.7, 1.3, -1.0])
        for _ in range(self.rng.choice([1, 2, 3])):
            x = self.node("Mul", self.swapped(x, self.constant(scale)))[0]
            padded = {"pads": [1] * 2 * (x.rank - 2), "kernel_shape": [3] * (x.rank - 2)}
            weight = self.constant(self.weights(2 * channels, channels, *[3] * (x.rank - 2)), shared=False)
            both = self.node("Conv", [x, weight], **padded)[0]
            cuts = [(0, channels), (channels, 2 * channels)]
            halves = [self.node("Slice", [both, *(self.integers([i]) for i in (*cut, 1))])[0] for cut in cuts]
            gates = [self.node(op, [h])[0] for op, h in zip(("Tanh", "Sigmoid"), halves, strict=True)]
            gated = self.node("Mul", gates)[0]
            skip = self.constant(self.weights(channels, channels, *[1] * (x.rank - 2)), shared=False)
            x = self.node("Add", self.swapped(x, self.node("Conv", [gated, skip])[0]))[0]
        self.node("Mul", [x, self.constant(scale)])

    def raw_node(self, op: str, inputs: list[str], **attrs: Any) -> str:
        """Add a node whose shape onnx does not infer; return the name of its output."""
        name = self.name("r")
        self.nodes.append(helper.make_node(op, inputs, [name], **attrs))
        return name
