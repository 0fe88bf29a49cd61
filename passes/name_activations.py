"""Activation recognition (idiom recognition): activations that an exporter spelled out become one operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pwopt.graph.ir import Node
from pwopt.maps import idioms
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The opset in which each operator appeared (onnx/docs/Changelog.md).
SINCE = {"HardSigmoid": 1, "HardSwish": 14, "Gelu": 20, "Swish": 24}

#: The newest opset in which onnxruntime 1.32 runs an operator for which it has no kernel, by its function body.
UNTIL = {"Swish": 24}


class NameActivations(Pass):
    """x·min(max(x + 3, 0), 6)/6 = HardSwish(x), scale·clip(a·x + b, 0, 1/scale) = HardSigmoid(x),
    x·sigmoid(x) = Swish(x), x·(1 + erf(x/√2))/2 = Gelu(x)

    * Every spelling is recognised: the factor before, inside or after the product, Clip with attributes or inputs, Min
      and Max, Relu and Min (`pwopt.maps.idioms`).
    * The operator must exist in the opset of the model. Otherwise the pass reports from which opset on it exists.
    * The number of operators decreases.

    Howard et al., "Searching for MobileNetV3" (2019); Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016);
    Ramachandran et al., "Searching for Activation Functions" (2017).
    """

    name = "name-activations"
    pays_on = frozenset({"cpu", "gpu"})  # OpenVINO recognises them itself, and runs HardSigmoid separately

    def __init__(self) -> None:
        self._spelled: set[str] = set()

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        spelled = idioms.activation(rw, node)
        if spelled is None:
            return None
        dtype = rw.dtype(node.outputs[0])
        standard = spelled.op != "HardSwish" or (
            idioms.is_close(spelled.alpha, 1 / 6, dtype) and idioms.is_close(spelled.beta, 0.5, dtype)
        )
        available = standard and rw.opset >= SINCE[spelled.op]
        count = len(set(spelled.nodes))
        hint = "" if available or not standard else f"; {spelled.op} exists from opset {SINCE[spelled.op]}"
        if available and rw.opset > UNTIL.get(spelled.op, rw.opset):
            return Skip(f"onnxruntime runs {spelled.op} up to opset {UNTIL[spelled.op]} only, not in opset {rw.opset}")
        if not available and spelled.op in ("Swish", "Gelu"):
            return Skip(f"spells {spelled.op}, which this model's opset {rw.opset} does not have{hint}")
        needed = 1 if available else 2
        if count <= needed and node.outputs[0].name in self._spelled:
            return None  # this pass wrote and explained it
        if count <= needed:
            return Skip(f"x·HardSigmoid(x) stays as it is{hint}") if hint else None
        if str(dtype) == "float64" and spelled.op in ("HardSigmoid", "HardSwish"):
            # Also, HardSigmoid stores alpha and beta in float32, which is too coarse.
            return Skip(f"onnxruntime has no {spelled.op} in float64")
        old = sorted(dict.fromkeys(spelled.nodes), key=rw.position)
        if old[-1] is not node:
            return None
        new = list(_write(rw, spelled, node, available))
        self._spelled.add(node.outputs[0].name)
        return rw.replace(old, new, f"{count} operators spell {' and '.join(n.op for n in new)}{hint}")


def _write(rw: Rewriter, spelled: idioms.Activation, node: Node, available: bool) -> Iterator[Node]:
    x, y = spelled.source, node.outputs[0]
    if available and spelled.op != "HardSigmoid":
        yield Node(spelled.op, node.name, {}, [x], [y])
        return
    attrs = {"alpha": float(np.float32(spelled.alpha)), "beta": float(np.float32(spelled.beta))}
    if spelled.op == "HardSigmoid":
        yield Node("HardSigmoid", node.name, attrs, [x], [y])
        return
    gate = rw.new_variable(f"{y.name}_gate", y)
    yield Node("HardSigmoid", rw.node_name(node.name, "_gate"), attrs, [x], [gate])
    yield Node("Mul", node.name, {}, [x, gate], [y])
