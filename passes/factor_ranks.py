"""Low-rank factorisation: a map whose weights have a low rank becomes two thin maps."""

from __future__ import annotations

from pwopt.algebra.geometry import Refusal, attempt
from pwopt.algebra.linear import LinearMap
from pwopt.algebra.ranks import factor, low_rank
from pwopt.graph.dtypes import epsilon
from pwopt.graph.ir import Node
from pwopt.graph.reasons import Reason
from pwopt.graph.shapes import set_channels
from pwopt.maps import emit, forms
from pwopt.rewriting.driver import Pass, Rewriter
from pwopt.rewriting.records import Rewrite, Skip

#: The largest number of rows or columns, because a singular value decomposition of more takes long.
MAX_FACTORED_SIZE = 4096


class FactorRanks(Pass):
    """W = UV, where U and V together have fewer weights than W, to within half a unit in the last place of W

    * The map is dense, is no transposed convolution, and does not share its weight.
    * Its weights are float32 or float64: in coarser types, rounding noise could look like a low rank.

    Compressed models whose factors were multiplied out, merged low-rank adapters and pruned models have such maps.
    Trained maps rarely have a low rank. The factors come from a singular value decomposition (Eckart and Young, 1936).
    It is computed only if a random sketch does not rule out a low rank (`ranks.low_rank`).
    Rows and columns count alike, whatever their sizes. An entry is rounded relative to its row and its column, so a
    zero between other numbers may become as large as their rounding.
    """

    name = "factor-ranks"
    operators = forms.WEIGHTED_TYPES
    policy = "if cheaper"

    def __init__(self) -> None:
        #: Weights that were looked at, by id. Holding them keeps their ids from being reused.
        self._visited: dict[int, object] = {}

    def match_and_rewrite(self, node: Node, rw: Rewriter) -> Rewrite | Skip | None:
        reading = forms.weighted(rw, node)
        if reading is None or reading.nodes[0] is not node or reading.weight is None:
            return None
        content, g = rw.stored_value(reading.weight), reading.geometry
        if content is None or id(content) in self._visited or g.groups > 1 or g.transposed:
            return None
        self._visited[id(content)] = content
        small = min(g.out_channels, g.weights // g.out_channels)
        if small < 4 or small > MAX_FACTORED_SIZE or rw.is_shared(reading.weight_input):
            return None
        dtype = rw.dtype(reading.weight)
        if str(dtype) not in ("float32", "float64"):
            return None
        linear, precision = reading.try_load(), epsilon(dtype) / 2
        if linear is None or not low_rank(linear.weight.reshape(g.out_channels, -1), precision):
            return None
        parts = attempt(factor, linear, precision)
        if isinstance(parts, Refusal):
            return None
        done = rw.attempt(self._write, rw, reading, parts)
        if isinstance(done, Refusal):
            return Skip(Reason("its weights have rank {}, but {}", parts[0].geometry.out_channels, done.reason))
        return done

    @staticmethod
    def _write(rw: Rewriter, reading: forms.Reading, parts: tuple[LinearMap, LinearMap]) -> Rewrite:
        first, second = parts
        rank = first.geometry.out_channels
        middle = rw.new_variable(f"{reading.output.name}_rank", reading.output, set_channels(reading.axis, rank))
        low = emit.write(rw, first, reading, reading.source, middle, reading.axis)
        high = emit.write(rw, second, reading, middle, reading.output, reading.axis, inherit=False)
        g = reading.geometry
        reason = (
            f"its {g.out_channels}×{g.weights // g.out_channels} weights have rank {rank}, so two thin maps replace it"
        )
        return rw.replace(reading.nodes, [*low.nodes, *high.nodes], reason, max(low.residual, high.residual))
