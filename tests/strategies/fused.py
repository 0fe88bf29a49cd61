"""Motifs of operators that onnx's inference does not know: normalisations, fused operators, declared shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators

MICROSOFT = "com.microsoft"


class Fused(Operators):
    """Adds such operators, each followed by a scale or shift, or by a map."""

    def _add(
        self, op: str, read: Sequence[Tensor | str], shape: Sequence[int], domain: str = MICROSOFT, **attributes: Any
    ) -> Tensor:
        """Add an operator with one output of this shape."""
        made = Tensor(self.name(), tuple(shape))
        names = [t.name if isinstance(t, Tensor) else t for t in read]
        self.nodes.append(helper.make_node(op, names, [made.name], domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        self.pool.append(made)
        self.affine(made)
        return made

    def _need(self, fits: bool) -> None:
        if not fits:
            raise UnfitError("it has no kernel for this type, opset or shape")

    def m_group_normalization(self) -> None:
        x = self.tensor(3, 4, 5)
        channels = x.shape[1]
        self._need(self.opset >= 18 and self.dtype == np.float32 and channels > 0 and channels % 2 == 0)
        count = 2 if self.opset < 21 else channels
        read = [x, self.constant(self.numbers.normal(size=count)), self.constant(self.numbers.normal(size=count))]
        self._add("GroupNormalization", read, x.shape, "", num_groups=2)

    def m_mean_variance_normalization(self) -> None:
        x = self.tensor(4)
        self._need(self.opset >= 9 and self.dtype == np.float32 and 0 not in x.shape)
        self._add("MeanVarianceNormalization", [x], x.shape, "")

    def m_fused_activation(self) -> None:
        x = self.tensor(2, 3)
        self._need(self.dtype == np.float32 and 0 not in x.shape)
        op = self.rng.choice(["Gelu", "QuickGelu", "FastGelu", "BiasGelu"])
        bias = [self.constant(self.numbers.normal(size=x.shape[-1]))] if op in ("BiasGelu", "FastGelu") else []
        self._add(op, [x, *bias], x.shape)

    def m_skip_normalization(self) -> None:
        x = self.tensor(3)
        self._need(self.dtype == np.float32 and 0 not in x.shape)
        others = [t for t in self.pool if t.shape == x.shape]
        numbers = [self.constant(self.numbers.normal(size=x.shape[-1])) for _ in range(3)]
        self._add("SkipLayerNormalization", [x, self.rng.choice(others), *numbers], x.shape)

    def m_fused_conv(self) -> None:
        x = self.tensor(4)
        self._need(self.dtype == np.float32 and 0 not in x.shape)
        activation, numbers = self.rng.choice(
            [("Relu", []), ("Tanh", []), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.5]), ("HardSigmoid", [0.2, 0.5])]
        )
        size = self.rng.choice([1, 3])
        read: list[Tensor | str] = [x, self.constant(self.weights(8, x.shape[1], size, size))]
        read += [self.constant(self.numbers.normal(size=8))] if self.chance(0.5) else []
        extra = {"activation_params": numbers} if numbers else {}
        shape = (x.shape[0], 8, *x.shape[2:])
        self._add("FusedConv", read, shape, activation=activation, pads=[size // 2] * 4, **extra)

    def m_fused_matmul(self) -> None:
        x = self.tensor(2, 3, 4)
        self._need(self.dtype in (np.float32, np.float64) and 0 not in x.shape)
        flip = self.chance(0.5)
        weight = self.weights(6, x.shape[-1])
        read = [x, self.constant(weight if flip else weight.T)]
        self._add("FusedMatMul", read, (*x.shape[:-1], 6), alpha=self.rng.choice([1.0, 0.5, -3.0]), transB=int(flip))

    def m_fused_gemm(self) -> None:
        x = self.tensor(2)
        self._need(self.dtype == np.float32 and 0 not in x.shape)
        read = [x, self.constant(self.weights(6, x.shape[1])), self.constant(self.numbers.normal(size=6))]
        self._add("FusedGemm", read, (x.shape[0], 6), transB=1, activation=self.rng.choice(["Relu", "Sigmoid", "Tanh"]))

    def m_quantised_weight(self) -> None:
        """A quantised weight that is transposed, as in exports of linear layers."""
        x = self.tensor(2, 3)
        self._need(self.dtype == np.float32 and self.opset >= 13 and 0 not in x.shape)
        q, zero, w = self.name("q"), self.name("z"), Tensor(self.name(), (x.shape[-1], 6))
        scales = self.rng.choice([(), (6,)])
        self.constants.append(numpy_helper.from_array(self.numbers.integers(-99, 99, (6, x.shape[-1]), np.int8), q))
        self.constants.append(numpy_helper.from_array(np.zeros(scales, np.int8), zero))
        read = [q, self.constant(np.full(scales, 0.01) + 0.01 * self.numbers.random(scales), shared=False), zero]
        turned = Tensor(self.name(), (6, x.shape[-1]))
        self.nodes.append(helper.make_node("DequantizeLinear", read, [turned.name], axis=0))
        self.nodes.append(helper.make_node("Transpose", [turned.name], [w.name], perm=[1, 0]))
        self.pool += [turned, w] if self.chance(0.1) else [w]
        self.affine(self.node("MatMul", [x, w])[0])

    def m_declared(self) -> None:
        """An operator whose output shape only the model declares."""
        x = self.tensor(2)
        self._need(self.dtype == np.float32 and 0 not in x.shape and not self.dynamic)
        table = self.constant(self.numbers.normal(size=(5, x.shape[1])))
        made = self._add("CDist", [x, table], (x.shape[0], 5), metric="sqeuclidean")
        self.declared.append(helper.make_tensor_value_info(made.name, TensorProto.FLOAT, made.shape))
