"""Build graphs node by node, spelled as by the exporters of torch, TensorFlow and Paddle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Spelling:
    """How an exporter names a node and its output: {name} is the layer, {op} the operator, {n} its running number."""

    node: str
    tensor: str


#: torch.onnx, tf2onnx and paddle2onnx.
TORCH = Spelling("/{name}/{op}", "/{name}/{op}_output_0")
TENSORFLOW = Spelling("{name}/{op}", "{name}/{op}:0")
PADDLE = Spelling("p2o.{op}.{n}", "p2o.{op}.{n}.0")


class Exporter:
    """Collects nodes and seeded weights, then builds the model.

    Parameters
    ----------
    seed : int
        Seed of all random weights: the same seed gives the same file.
    spelling : Spelling
    """

    def __init__(self, seed: int, spelling: Spelling = TORCH) -> None:
        self.rng = np.random.default_rng(seed)
        self.spelling = spelling
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._count: Counter[str] = Counter()

    def constant(self, name: str, values: ArrayLike) -> str:
        """Add an initializer, as float32, or as int64 for integers, and return its name."""
        array = np.asarray(values)
        kept = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        self.weights.append(numpy_helper.from_array(kept, name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, output: str = "", **attrs: Any) -> str:
        """Add an operator and return its output, which the exporter names unless `output` is given."""
        called = self.spelling.node.format(name=name, op=op, n=self._count[op])
        output = output or self.spelling.tensor.format(name=name, op=op, n=self._count[op])
        self._count[op] += 1
        self.nodes.append(helper.make_node(op, inputs, [output], called, **attrs))
        return output

    def conv(
        self,
        x: str,
        name: str,
        inn: int,
        out: int,
        k: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool | float = 0.05,
        rank: int = 2,
        weight: ArrayLike | None = None,
        gain: float = 1.0,
        output: str = "",
    ) -> str:
        """Add a convolution with odd kernel k and padding k//2.

        Weights have the variance gain / fan-in. `bias` is the standard deviation of the bias.
        """
        kernel = (k,) * rank
        fan = inn // groups * k**rank
        values = self.rng.normal(0, (gain / fan) ** 0.5, (out, inn // groups, *kernel)) if weight is None else weight
        inputs = [x, self.constant(f"{name}.weight", np.reshape(values, (out, inn // groups, *kernel)))]
        inputs += [self.constant(f"{name}.bias", self.rng.normal(0, bias, out))] if bias else []
        attrs: dict[str, Any] = {
            "dilations": [1] * rank,
            "group": groups,
            "kernel_shape": list(kernel),
            "pads": [k // 2] * 2 * rank,
            "strides": [stride] * rank,
        }
        return self.node("Conv", inputs, name, output, **attrs)

    def norm(self, x: str, name: str, channels: int, epsilon: float = 1e-5, output: str = "") -> str:
        """Add a BatchNormalization with statistics such as training produces."""
        values = {
            "weight": self.rng.uniform(0.5, 1.5, channels),
            "bias": self.rng.normal(0, 0.1, channels),
            "running_mean": self.rng.normal(0, 0.1, channels),
            "running_var": self.rng.uniform(0.5, 1.5, channels),
        }
        inputs = [x, *(self.constant(f"{name}.{key}", v) for key, v in values.items())]
        return self.node("BatchNormalization", inputs, name, output, epsilon=epsilon, momentum=0.9)

    def resize(self, x: str, name: str, factor: int, *, mode: str, coordinates: str) -> str:
        """Add torch's interpolate, which enlarges both spatial axes by `factor`."""
        attrs: dict[str, Any] = {
            "coordinate_transformation_mode": coordinates,
            "cubic_coeff_a": -0.75,
            "mode": mode,
            "nearest_mode": "floor",
        }
        scales = self.constant(f"{name}.scales", [1.0, 1.0, factor, factor])
        return self.node("Resize", [x, "", scales], name, **attrs)

    def dense(self, x: str, name: str, inn: int, out: int, *, bias: bool = True, output: str = "") -> str:
        """Add torch's Linear on more than two axes: a MatMul along the last axis, and an Add."""
        held = self.constant(f"{name}.weight", self.rng.normal(0, inn**-0.5, (inn, out)))
        product = self.node("MatMul", [x, held], name, "" if bias else output)
        if not bias:
            return product
        shift = self.constant(f"{name}.bias", self.rng.normal(0, 0.05, out))
        return self.node("Add", [shift, product], name, output)

    def gemm(self, x: str, name: str, inn: int, out: int, output: str = "") -> str:
        """Add torch's Linear on two axes."""
        held = self.constant(f"{name}.weight", self.rng.normal(0, inn**-0.5, (out, inn)))
        shift = self.constant(f"{name}.bias", self.rng.normal(0, 0.05, out))
        return self.node("Gemm", [x, held, shift], name, output, alpha=1.0, beta=1.0, transB=1)

    def model(
        self,
        name: str,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        integers: Sequence[str] = (),
    ) -> onnx.ModelProto:
        """Build the model. Inputs and outputs have names and shapes; they are float32, and int64 in `integers`."""

        def info(tensor: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
            kind = TensorProto.INT64 if tensor in integers else TensorProto.FLOAT
            return helper.make_tensor_value_info(tensor, kind, shape)

        graph = helper.make_graph(
            self.nodes,
            name,
            [info(*item) for item in inputs.items()],
            [info(*item) for item in outputs.items()],
            self.weights,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pwopt"
        )


def orthogonal(rng: np.random.Generator, out: int, inn: int) -> np.ndarray:
    """A random matrix (out, in) with WᵀW = I (out ≥ in), by QR decomposition."""
    q: np.ndarray = np.linalg.qr(rng.normal(size=(out, inn)))[0]
    return q
