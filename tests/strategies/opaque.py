"""Motifs that pwopt must leave alone: bodies, functions, quantisation, custom operators, overridable weights."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from strategies.builder import Builder, Tensor, UnfitError


class Opaque(Builder):
    """Adds what pwopt must leave alone."""

    def m_body(self) -> None:
        """If, Loop or Scan, whose bodies read a tensor and a constant of the outer graph."""
        x = self.tensor(2, 3, 4)
        info = helper.make_tensor_value_info
        captured = self.constant(self.numbers.normal())
        kind = self.rng.choice(["If", "Loop", "Scan"])
        out = self.name("b")
        if kind == "If":
            flag = self.name("c")
            self.constants.append(numpy_helper.from_array(np.array(self.chance(0.5)), flag))
            bodies = [
                helper.make_graph(
                    [helper.make_node(op, [x.name, captured], [f"{out}{op}"])],
                    op,
                    [],
                    [info(f"{out}{op}", self.code, None)],
                )
                for op in ("Add", "Mul")
            ]
            message = helper.make_node("If", [flag], [out], then_branch=bodies[0], else_branch=bodies[1])
            shape = x.shape
        elif kind == "Loop":
            names = [self.name("b") for _ in range(5)]
            nodes = [
                helper.make_node("Identity", [names[1]], [names[3]]),
                helper.make_node("Add", [names[2], x.name], [f"{names[4]}h"]),
                helper.make_node("Mul", [f"{names[4]}h", captured], [names[4]]),
            ]
            ends = [
                info(names[0], TensorProto.INT64, []),
                info(names[1], TensorProto.BOOL, []),
                info(names[2], self.code, None),
            ]
            body = helper.make_graph(
                nodes, "loop", ends, [info(names[3], TensorProto.BOOL, []), info(names[4], self.code, None)]
            )
            go = self.name("c")
            self.constants.append(numpy_helper.from_array(np.array(True), go))
            message = helper.make_node("Loop", [self.integers(2), go, x.name], [out], body=body)
            shape = x.shape
        else:
            names = [self.name("b") for _ in range(4)]
            nodes = [
                helper.make_node("Add", [names[0], names[1]], [names[2]]),
                helper.make_node("Mul", [names[2], captured], [names[3]]),
            ]
            inner = list(x.shape[1:])
            body = helper.make_graph(
                nodes, "scan", [info(names[0], self.code, inner), info(names[1], self.code, inner)],
                [info(names[2], self.code, inner), info(names[3], self.code, inner)],
            )  # fmt: skip
            if not x.shape[0] or self.opset < 9:
                raise UnfitError("nothing to scan, or no Scan without a batch")
            first = self.name("c")
            self.constants.append(numpy_helper.from_array(np.zeros(x.shape[1:], self.dtype), first))
            message = helper.make_node("Scan", [first, x.name], [self.name("b"), out], body=body, num_scan_inputs=1)
            shape = x.shape
        self.nodes.append(message)
        self.pool.append(Tensor(out, shape))

    def m_function(self) -> None:
        x = self.tensor()
        if "local" not in self.domains:
            body = [helper.make_node("Mul", ["a", "a"], ["h"]), helper.make_node("Relu", ["h"], ["b"])]
            self.functions.append(
                helper.make_function("local", "Conv", ["a"], ["b"], body, [helper.make_opsetid("", self.opset)])
            )
            self.domains.add("local")
        made = Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("Conv", [x.name], [made.name], domain="local"))
        self.pool.append(made)

    def m_quantised(self) -> None:
        """QuantizeLinear and DequantizeLinear of an input, whose rounding no rewrite can move; of a weight too."""
        if self.dtype != np.float32 or self.opset < 10:
            raise UnfitError("not float32")
        x = self.input(4)
        scale, zero = self.constant(0.05), self.name("z")
        self.constants.append(numpy_helper.from_array(np.uint8(128), zero))
        low, y = self.name("q"), Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("QuantizeLinear", [x.name, scale, zero], [low]))
        self.nodes.append(helper.make_node("DequantizeLinear", [low, scale, zero], [y.name]))
        self.pool.append(y)
        if self.chance(0.3):  # once more, by the same numbers or by others
            again, z = self.name("q"), Tensor(self.name(), x.shape)
            read = [y.name, self.rng.choice([scale, self.constant(0.03)]), zero]
            self.nodes.append(helper.make_node("QuantizeLinear", read, [again]))
            self.nodes.append(helper.make_node("DequantizeLinear", [again, *read[1:]], [z.name]))
            self.pool.append(z)
            y = z
        if x.shape[1] and self.chance(0.7):
            whole, w = self.name("w"), Tensor(self.name(), (4, x.shape[1], 1, 1))
            self.constants.append(numpy_helper.from_array(self.numbers.integers(-99, 99, w.shape, np.int8), whole))
            self.nodes.append(helper.make_node("DequantizeLinear", [whole, self.constant(0.01)], [w.name]))
            self.pool.append(w)
            self.node("Conv", [y, w])

    def m_foreign(self) -> None:
        """An operator of another domain, which onnxruntime has."""
        if self.dtype != np.float32:
            raise UnfitError("not float32")
        x = self.tensor()
        made = Tensor(self.name(), x.shape)
        self.nodes.append(helper.make_node("QuickGelu", [x.name], [made.name], domain="com.microsoft"))
        self.domains.add("com.microsoft")
        self.pool.append(made)

    def m_override(self) -> None:
        """A weight that callers may override."""
        x = self.tensor(2)
        if not x.shape[1]:
            raise UnfitError("no channels")
        made = Tensor(self.name("w"), (x.shape[1], 4))
        self.inputs.append(made)
        self.constants.append(numpy_helper.from_array(self.weights(*made.shape).astype(self.dtype), made.name))
        self.affine(self.node("MatMul", [x, made])[0])
