"""Read nodes as linear maps: every operator that is linear across channels, in the spelling of every opset.

`read` returns a `Reading` (what the node computes, and where its numbers are), a `Refusal` (the operator is of this
kind, but is not proven linear here), or None (any other operator). `pwopt.maps.emit` writes maps back as nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pwopt.algebra import Array
from pwopt.algebra.geometry import Geometry, Refusal, RefusedError, attempt
from pwopt.algebra.linear import LinearMap
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.view import View

#: The types of the operators that `weighted` reads: an Add is the bias of a MatMul.
WEIGHTED_TYPES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})
#: Operators with a matrix of weights, and the kinds they are read as.
WEIGHTED = ("conv", "conv-transpose", "gemm", "matmul", "left-matmul")


@dataclass(frozen=True)
class Reading:
    """A node (or MatMul + Add) as a linear map of one tensor.

    Attributes
    ----------
    nodes : tuple of Node
        The nodes of the map; the last one produces the output.
    source : Tensor
        The data input.
    geometry : Geometry
        Known without reading large weights.
    axis : int or None
        The channel axis; None for a scalar scale and shift, for which any axis will do.
    kind : str
        The form: conv, conv-transpose, gemm, matmul (x·W), left-matmul (W·x), diagonal, pool, border, selection,
        reduction.
    weight : Tensor or None
        The tensor that holds the matrix; None if there are few numbers or if they follow from attributes.
    load : callable
        Reads the numbers; raises `RefusedError` if they are not finite, or too many to be written out.
    fill : array or None
        For a border: its value per channel, if one is not zero.
    turned : bool
        Whether the operator transposes its data input (transA of a Gemm), so that the channels lie on axis 0. `linear`
        returns such maps only if asked to.
    """

    nodes: tuple[Node, ...]
    source: Tensor
    geometry: Geometry
    axis: int | None
    kind: str
    weight: Tensor | None
    load: Callable[[], LinearMap]
    fill: Array | None = None
    turned: bool = False

    @property
    def node(self) -> Node:
        return self.nodes[-1]

    @property
    def output(self) -> Tensor:
        return self.nodes[-1].outputs[0]

    @property
    def source_axis(self) -> int | None:
        """The channel axis of the data input."""
        return 0 if self.turned else self.axis

    @property
    def weighted(self) -> bool:
        return self.kind in WEIGHTED

    @property
    def weight_input(self) -> Tensor:
        """The input that leads to the weight of a weighted map."""
        return self.nodes[0].inputs[0 if self.kind == "left-matmul" else 1]

    def try_load(self) -> LinearMap | None:
        """The numbers, or None where `load` refuses."""
        loaded = attempt(self.load)
        return loaded if isinstance(loaded, LinearMap) else None

    @property
    def channels(self) -> str:
        return f"{self.geometry.in_channels}→{self.geometry.out_channels}"


Result = Reading | Refusal | None
Reader = Callable[[View, Node], Result]
READERS: dict[str, Reader] = {}


def reads(*ops: str) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(ops, reader))
        return reader

    return register


def read(view: View, node: Node | None) -> Result:
    """Read a node as a linear map across the channels of its data input.

    Parameters
    ----------
    view : View
    node : Node
    """
    reader = READERS.get(view.op(node))
    if reader is None or node is None:
        return None
    if node in view.readings:
        found: Result = view.readings[node]
        return found
    result = reader(view, node)
    if isinstance(result, Reading) and 0 in (result.geometry.in_channels, result.geometry.out_channels):
        result = None
    if node in view:
        view.readings[node] = result
    return result


def linear(view: View, node: Node | None, *, turned: bool = False) -> Reading | None:
    """`read`, with None in place of refusals, and of maps that transpose their input unless `turned` asks for them."""
    reading = read(view, node)
    return reading if isinstance(reading, Reading) and (turned or not reading.turned) else None


def weighted(view: View, node: Node | None) -> Reading | None:
    """Read a node with weights, a MatMul together with the Add of its bias; None for any other node."""
    reading = linear(view, node)
    if reading is None or not reading.weighted or node is None:
        return None
    follower = view.sole_reader(node.outputs[0]) if node.op == "MatMul" else None
    wider = linear(view, follower) if follower is not None and view.op(follower) == "Add" else None
    return wider if wider is not None and wider.nodes[0] is node else reading


def load_owned(view: View, reading: Reading, between: Tensor) -> LinearMap:
    """Load a map if nothing else needs its weight, nor the tensor `between`, which the rewrite removes.

    Raises
    ------
    RefusedError
        If something else needs one of them, or the numbers are refused.
    """
    other_uses = view.other_uses(between)
    if other_uses or view.is_shared(reading.weight_input):
        raise RefusedError(other_uses or Reason("the weight {!r} is shared", reading.weight_input.name))
    return reading.load()


def describe_map(view: View, reading: Reading, widths: str) -> str:
    """Describe everything that the running time of a map depends on."""
    g = reading.geometry
    kernel = "×".join(map(str, g.kernel)) or "1"
    return f"{reading.kind} {widths} kernel {kernel} stride {g.strides} at {view.size_of(reading.source)}"


#: The most weights of a map that is not stored in the model (a selection, a pooling): 128 MiB in float64.
MAX_IMPLIED = 1 << 24


NOT_CONSTANT = Refusal("its weight is not a constant (an input, an overridable initializer, or computed)")
NOT_FINITE = Refusal("its weights are not finite")


def load_implied(geometry: Geometry, make: Callable[[], LinearMap]) -> Callable[[], LinearMap]:
    """A `load` for numbers that follow from a few attributes; it refuses more than `MAX_IMPLIED` of them."""

    def load() -> LinearMap:
        if geometry.weights > MAX_IMPLIED:
            raise RefusedError(f"written out, it has {geometry.weights:,} weights")
        return make()

    return load
