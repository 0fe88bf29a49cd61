"""Activation recognition (idiom recognition): activations that an exporter spelled out become one operator.

These rows of the lowering table run before the other passes, which handle one operator more easily than several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from pwopt.graph.ir import Node
from pwopt.maps import idioms
from pwopt.rewriting.driver import Rewriter
from pwopt.rewriting.lowering import Form, Lowering
from pwopt.rewriting.records import Skip

#: The opset in which each operator appeared (onnx/docs/Changelog.md).
SINCE = {"HardSigmoid": 1, "HardSwish": 14, "Gelu": 20, "Swish": 24}

#: The newest opset in which onnxruntime 1.32 runs an operator for which it has no kernel, by its function body.
UNTIL = {"Swish": 24}


class NameActivations(Lowering):
    """x·min(max(x + 3, 0), 6)/6 = HardSwish(x), x·(1 + erf(x/√2))/2 = Gelu(x)

    * Every spelling is recognised: the factor before, inside or after the product, Clip with attributes or inputs, Min
      and Max, Relu and Min (`pwopt.maps.idioms`).
    * The operator must exist in the opset of the model. Otherwise the pass reports from which opset on it exists.
    * The number of operators decreases.

    Howard et al., "Searching for MobileNetV3" (2019); Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """

    name = "name-activations"
    operators = frozenset({"Mul", "Div"})
    exactness = "rounding"
    figure = "fewer operators; HardSwish fuses into the convolution before it"
    #: The activations that this row names.
    names: ClassVar[frozenset[str]] = frozenset({"HardSwish", "Gelu"})

    def __init__(self) -> None:
        self._spelled: set[str] = set()

    def lower(self, node: Node, rw: Rewriter) -> Form | Skip | None:
        spelled = idioms.activation(rw, node)
        if spelled is None:
            return None
        available = _is_standard(spelled, rw.dtype(node.outputs[0])) and rw.opset >= SINCE[spelled.op]
        if not self.applies_to(spelled, available):
            return None
        hint = f"{spelled.op} exists from opset {SINCE[spelled.op]}"
        count = len(set(spelled.nodes))
        if available and rw.opset > UNTIL.get(spelled.op, rw.opset):
            return Skip(f"onnxruntime runs {spelled.op} up to opset {UNTIL[spelled.op]} only, not in opset {rw.opset}")
        gated = not available and spelled.op == "HardSwish"
        if not available and not gated:
            return Skip(f"spells {spelled.op}, which this model's opset {rw.opset} does not have; {hint}")
        hint = f"; {hint}" if gated and _is_standard(spelled, rw.dtype(node.outputs[0])) else ""
        if count <= (2 if gated else 1):
            if node.outputs[0].name in self._spelled or not hint:
                return None  # nothing is gained, or this pass wrote and explained it
            return Skip(f"x·HardSigmoid(x) stays as it is{hint}")
        if str(rw.dtype(node.outputs[0])) == "float64" and spelled.op in ("HardSigmoid", "HardSwish"):
            # Also, HardSigmoid stores alpha and beta in float32, which is too coarse.
            return Skip(f"onnxruntime has no {spelled.op} in float64")
        old = sorted(dict.fromkeys(spelled.nodes), key=rw.position)
        if old[-1] is not node:
            return None
        new = tuple(_write(rw, spelled, node, available))
        self._spelled.add(node.outputs[0].name)
        return Form(tuple(old), new, f"{count} operators spell {' and '.join(n.op for n in new)}{hint}")

    def applies_to(self, spelled: idioms.Activation, available: bool) -> bool:
        """Whether this row names an activation; `available` says whether the model's opset has the operator."""
        return spelled.op in self.names and (available or spelled.op != "HardSwish")


class NameHardSigmoid(NameActivations):
    """scale·clip(a·x + b, 0, 1/scale) = HardSigmoid(x)

    * As `name-activations`. Before opset 14, and with other numbers than 1/6 and 1/2, x·HardSigmoid(x) takes the place
      of HardSwish.

    onnxruntime's CPU provider fuses HardSigmoid into a convolution. OpenVINO recognises spelled-out activations itself,
    and runs HardSigmoid separately.
    """

    name = "name-hard-sigmoid"
    pays_on = frozenset({"cpu", "gpu"})
    figure = "fewer operators; HardSigmoid fuses into the convolution before it"
    names = frozenset({"HardSigmoid"})

    def applies_to(self, spelled: idioms.Activation, available: bool) -> bool:
        return spelled.op in self.names or (spelled.op == "HardSwish" and not available)


class NameSwish(NameActivations):
    """x·sigmoid(x) = Swish(x)

    * As `name-activations`.
    * Never for onnxruntime's CPU provider, which has no kernel for Swish (`lower-swish`).

    Ramachandran et al., "Searching for Activation Functions" (2017).
    """

    name = "name-swish"
    pays_on = frozenset({"gpu", "other"})
    figure = "fewer operators"
    names = frozenset({"Swish"})


def _is_standard(spelled: idioms.Activation, dtype: np.dtype[Any] | None) -> bool:
    """Whether an activation has the numbers of the operator; only those of HardSwish are fixed."""
    exact = idioms.is_close(spelled.alpha, 1 / 6, dtype) and idioms.is_close(spelled.beta, 0.5, dtype)
    return spelled.op != "HardSwish" or exact


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
