"""Commuting with a Gram matrix (code motion): a map moves from every position to small matrices after it."""

from __future__ import annotations

import numpy as np

from pwopt.algebra import Values
from pwopt.algebra.geometry import RefusedError
from pwopt.graph import attributes
from pwopt.graph.ir import Node, Tensor
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import Shape, set_channels
from pwopt.maps import commute, emit, forms
from pwopt.maps.forms import Reading
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip
from pwopt.rewriting.wording import format_increase

#: The largest condition number of W. The rounding error of (Wx)(Wx)ᵀ is proportional to ‖W‖‖x‖·‖Wx‖, and that of
#: W(x·xᵀ)Wᵀ to ‖W‖²‖x‖², which is larger by at most the condition number (Higham, "Accuracy and Stability of Numerical
#: Algorithms", 2002, section 3.5).
MAX_CONDITION = 10.0


class CommuteGram(Pass):
    """(Wx)(Wx)ᵀ = W(x·xᵀ)Wᵀ

    * W is pointwise and has no bias. Only the Gram matrix reads its result, directly or through a Reshape that joins
      the positions.
    * W is well-conditioned: if it almost cancelled its input, the right side would round worse.
    * It takes fewer multiply-adds: with P positions and W from n to m channels, m·n·P + m²·P become
      n²·P + m·n² + m²·n.

    Style transfer (Gatys, Ecker and Bethge, 2016) and covariance pooling compute Gram matrices.
    """

    name = "commute-gram"
    operators = frozenset({"MatMul"})
    policy = "if cheaper"

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        rows = _find_factor(rw, node)
        if rows is None:
            return None
        maker = rw.producer(rows)
        flatten = maker if rw.is_a(maker, "Reshape") else None
        mapped = rows if flatten is None else flatten.inputs[0]
        reading = forms.weighted(rw, rw.producer(mapped))
        if reading is None or reading.output is not mapped or not _along_rows(rw, reading, flatten):
            return None
        g = reading.geometry
        if not g.pointwise or g.groups > 1:
            return None
        refusal = _find_obstacle(rw, reading, node, mapped)
        if refusal:
            return Skip(refusal)
        size = rw.size_of(rows)
        if size is None:
            return Skip("the number of positions is not known; give the input sizes with --shape")
        m, n, places = g.out_channels, g.in_channels, size[-1]
        if not places:
            return None
        before, after = (m * n + m * m) * places, n * n * places + m * n * n + m * m * n
        if after >= before:
            return Skip(f"after the Gram matrix, {n}→{m} would cost {format_increase(before, after)}")
        return _write(rw, node, reading, rows, flatten)


def _find_obstacle(rw: Rewriter, reading: Reading, node: Node, mapped: Tensor) -> str:
    """Why the map cannot move, else ""."""
    rows, columns = node.inputs
    if len(rw.readers(rows)) > 2:
        return Reason("{!r} is read by more than its Gram matrix", rows.name)
    other_uses = rw.must_keep(rows) or rw.other_uses(columns) or (rw.other_uses(mapped) if mapped is not rows else "")
    if other_uses:
        return other_uses
    if rw.is_shared(reading.weight_input):
        return Reason("the weight {!r} is shared", reading.weight_input.name)
    if reading.geometry.biased:
        return "the map before the Gram matrix has a bias, and (Wx + b)(Wx + b)ᵀ is not W(x·xᵀ)Wᵀ"
    if str(rw.dtype(rows)) == "float16":
        return "the Gram matrix of the input could overflow float16"
    return ""


def _find_factor(rw: Rewriter, node: Node) -> Tensor | None:
    """The matrix x of a product x·xᵀ; None if the node is no such product."""
    if rw.op(node) != "MatMul":
        return None
    rows, transpose = node.inputs[0], rw.producer(node.inputs[1])
    if not rw.is_a(transpose, "Transpose") or transpose.inputs[0] is not rows:
        return None
    rank = rw.rank(rows) or 0
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return rows if rank >= 2 and attributes.read_permutation(rw, transpose) == swapped else None


def _along_rows(rw: Rewriter, reading: Reading, flatten: Node | None) -> bool:
    """Whether the channels of a map are the rows of the matrix, and all its positions the columns."""
    rank = rw.rank(reading.output) or 0
    if flatten is None:
        return reading.axis == rank - 2
    rule, axis = commute.rule(rw, flatten), reading.axis
    if rule is None or rule.axes is None or axis is None or rw.rank(flatten.outputs[0]) != axis + 2:
        return False
    return all(rule.axes.get(a) == a for a in range(axis + 1))


def _write(rw: Rewriter, node: Node, reading: Reading, rows: Tensor, flatten: Node | None) -> Rewrite | Skip:
    g, output, axis = reading.geometry, node.outputs[0], (rw.rank(rows) or 2) - 2
    low, residual = _round_matrix(rw, reading)
    shape = None if flatten is None else rw.integers(flatten.inputs[1])
    if flatten is not None and shape is None:
        return Skip("the shape of its Reshape is computed while the model runs; make the input sizes static (--static)")
    transpose = rw.producer(node.inputs[1])
    assert transpose is not None
    new: list[Node] = []
    narrow = reading.source
    if flatten is not None and shape is not None:
        target = flatten.inputs[1]
        if shape[axis] == g.out_channels != g.in_channels:
            sizes = [g.in_channels if a == axis else d for a, d in enumerate(shape)]
            target = rw.new_constant(f"{rows.name}_shape", np.array(sizes, np.int64))
        narrow = rw.new_variable(f"{rows.name}_before", rows, set_channels(axis, g.in_channels))
        new.append(Node("Reshape", flatten.name, dict(flatten.attrs), [reading.source, target], [narrow]))

    def square(shape: Shape) -> Shape:
        return (*shape[:-2], g.in_channels, g.in_channels)

    flipped = rw.new_variable(f"{output.name}_transposed", node.inputs[1], set_channels(axis + 1, g.in_channels))
    inner = rw.new_variable(f"{output.name}_gram", output, square)
    half = rw.new_variable(f"{output.name}_half", output, set_channels(axis + 1, g.in_channels))
    left = rw.new_constant(f"{output.name}_left", low)
    right = rw.new_constant(f"{output.name}_right", low.T)
    new += [
        Node("Transpose", transpose.name, dict(transpose.attrs), [narrow], [flipped]),
        Node("MatMul", node.name, {}, [narrow, flipped], [inner]),
        Node("MatMul", rw.node_name(node.name, "_left"), {}, [left, inner], [half]),
        Node("MatMul", rw.node_name(node.name, "_right"), {}, [half, right], [output]),
    ]
    old = [*reading.nodes, *([flatten] if flatten is not None else []), transpose, node]
    reason = f"{reading.channels} runs after the Gram matrix, on both sides of it, instead of at every position"
    return rw.replace(old, new, reason, residual)


def _round_matrix(rw: Rewriter, reading: Reading) -> tuple[Values, float]:
    """W in the model's element type, and the largest relative rounding error."""
    g, linear, dtype = reading.geometry, reading.load(), rw.dtype(reading.weight_input)
    if dtype is None:
        raise RefusedError("the element type is not known")
    matrix = linear.weight.reshape(g.out_channels, g.in_channels)
    condition = float(np.linalg.cond(matrix)) if g.out_channels >= g.in_channels else float("inf")
    if not condition <= MAX_CONDITION:
        limit = f"the limit is {MAX_CONDITION:g}, because W(x·xᵀ)Wᵀ would round worse"
        raise RefusedError(f"the weights have a condition number of {condition:.2g}; {limit}")
    low = emit.round_values(matrix, dtype)
    return low, emit.relative_rounding(low, matrix)
