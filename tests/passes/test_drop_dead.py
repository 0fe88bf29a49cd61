"""Which channels drop-dead removes, from which operators, and what it does to the graph around them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import normal, ops, parse, run, same, weight
from onnx import helper
from pruning import SIDE, TWO, V, X, build, dead, holding, pruned, untouched

from pwopt.graph.files import from_proto
from pwopt.passes import DropDead
from pwopt.selecting.candidate_base import run_passes
from pwopt.selecting.shape_folding import infer_sizes

# Constant channels


def test_the_rewrite_record() -> None:
    model = build(SIDE + "{ [one] a = Conv(x, w, b) r = Relu(a) [two] y = Conv(r, v) }")
    _, outcome, _ = run(model, DropDead())
    (rewrite,) = outcome.rewrites
    assert (rewrite.pass_name, str(rewrite.site)) == ("drop-dead", "drop-dead:a")
    assert rewrite.removed == rewrite.added == ("Conv one", "Conv two")
    assert rewrite.became == (("a", "a_pruned"), ("y", "y"))
    assert rewrite.residual == 0.0


def test_the_record_counts_multiply_adds() -> None:
    model = build(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    (rewrite,) = run(model, DropDead())[1].rewrites
    assert rewrite.macs_after == 2 * 36 * (4 * 5 + 5 * 5)
    assert rewrite.macs_before == 2 * 36 * (4 * 7 + 7 * 5)


def test_the_record_counts_multiply_adds_at_representative_sizes() -> None:
    model = build("(double[N,4,H,W] x) => (double[N] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    sizes = infer_sizes(model, {"x": X.shape})
    (rewrite,) = run(model, DropDead(), sizes=sizes)[1].rewrites
    assert rewrite.macs_before == 2 * 36 * (4 * 7 + 7 * 5)
    assert rewrite.macs_after == 2 * 36 * (4 * 5 + 5 * 5)


@pytest.mark.parametrize("shape", ["2,4,6,6", "N,4,H,W"])
def test_the_cost_of_the_result_is_known(shape: str) -> None:
    model = build(f"(double[{shape}] x) => (double[N] y) {{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }}")
    result = run_passes(from_proto(model), [DropDead()], (), {"x": X.shape})
    assert (result.before.macs, result.before.unknown) == (2 * 36 * (4 * 7 + 7 * 5), 0)
    assert (result.after.macs, result.after.unknown) == (2 * 36 * (4 * 5 + 5 * 5), 0)


# Channels nobody reads


def test_channels_that_all_readers_multiply_by_zero_are_removed() -> None:
    body = TWO + "{ [one] a = Conv(x, f) r = Softplus(a) [two] y = Conv<pads=[1,1,1,1]>(r, v) z = Conv(r, o) }"
    weights = {
        "f": normal(7, 4, 1, 1),
        "v": dead(normal(5, 7, 3, 3), columns=(0, 3, 5)),
        "o": dead(normal(2, 7, 1, 1), columns=(3, 5, 6)),
    }
    _, reason = pruned(body, {"f": (5, 4, 1, 1), "v": (5, 5, 3, 3), "o": (2, 5, 1, 1)}, **weights)
    assert "Conv one 7 → 5" in reason
    assert "that Conv two reads, 2 are multiplied by zeros only" in reason
    untouched(body, **{**weights, "o": normal(2, 7, 1, 1)})


def test_unread_channels_are_removed_from_both_operands() -> None:
    body = SIDE + "{ a = Conv(x, f) e = Conv(x, o) q = Add(a, e) r = Exp(q) y = Conv(r, v) }"
    weights = {"f": normal(7, 4, 1, 1), "o": normal(7, 4, 1, 1, seed=1), "v": dead(V, columns=(2, 3))}
    pruned(body, {"f": (5, 4, 1, 1), "o": (5, 4, 1, 1), "v": (5, 5, 1, 1)}, **weights)


def test_an_unread_part_of_a_split_keeps_one_channel() -> None:
    body = SIDE + "{ a = Conv(x, f) s, t = Split<axis=1>(a, parts) y = Conv(s, v) }"
    weights = {
        "f": dead(normal(9, 4, 1, 1), (0,)),
        "parts": np.array([4, 5]),
        "v": dead(normal(5, 4, 1, 1), columns=(1, 2, 3)),
    }
    pruned(body, {"f": (5, 4, 1, 1)}, **weights)


OBSERVED = {
    "a graph output": TWO + "{ z = Conv(x, w, b) y = Conv(z, v) }",
    "a graph output behind an activation": TWO + "{ a = Conv(x, w, b) z = Relu(a) y = Conv(z, v) }",
    "a branch": "(double[2,4,6,6] x, bool k) => (double[N] y, double[N] z) { a = Conv(x, w, b) y = Conv(a, v) "
    "z = If (k) <then_branch = t () => (double[2,7,6,6] p) { p = Neg(a) }, else_branch = f () => (double[2,7,6,6] q) { q = Abs(a) }> }",
    "its shape": "(double[2,4,6,6] x) => (double[N] y, int64[N] z) { a = Conv(x, w, b) y = Conv(a, v) z = Shape(a) }",
    "a norm across channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = ReduceL2<axes=[1]>(a) }",
    "a softmax": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Softmax<axis=1>(a) }",
    "a layer normalisation": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) t = Transpose<perm=[0,2,3,1]>(a) z = LayerNormalization(t, gamma) }",
    "a slope per channel": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) p = PRelu(a, slope) z = Conv(p, v2) }",
    "another shape": SIDE + "{ a = Conv(x, w, b) p = Resize(a, , , size) y = Conv(p, v) }",
    "a shape that is computed": SIDE + "{ a = Conv(x, w, b) e = Conv(x, f) t = Shape(e) p = Reshape(a, t) y = Conv(p, v) }",
    "beside channels of unknown number": "(double[2,4,6,6] x, double[2,C,6,6] k) => (double[N] y) { a = Conv(x, w, b) p = Concat<axis=1>(a, k) y = Conv(p, v11) }",
    "a maximum": SIDE + "{ a = Conv(x, w, b) p = Max(a, half) y = Conv(p, v) }",
    "a sum across channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = ReduceSum(a, one) }",
    "a part of the channels": TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Slice(a, one, five, one) }",
    "a bias": "(double[2,4] x) => (double[N] y) { a = Gemm(x, n) y = Gemm(a, o, a) }",
    "a bound": SIDE + "{ a = Conv(x, w, b) p = GlobalAveragePool(a) r = ReduceMean<axes=[0,1,2,3], keepdims=0>(p) q = Clip(a, r) y = Conv(q, v) }",
    "broadcasting over channels": "(double[2,4,6,6] x, double[2,7,6,6] k) => (double[N] y) { a = Conv(x, f1) p = Add(a, k) y = Conv(p, v) }",
}  # fmt: skip


@pytest.mark.parametrize("body", OBSERVED.values(), ids=OBSERVED)
def test_observed_channels_are_kept(body: str) -> None:
    more = {
        "v2": normal(5, 7, 1, 1),
        "v11": normal(5, 11, 1, 1),
        "n": dead(normal(4, 7), columns=(1, 4)),
        "o": normal(7, 7),
        "f": normal(7, 4, 1, 1),
        "f1": np.zeros((1, 4, 1, 1)),
    }
    untouched(body, **more)


def test_an_unknown_operator_reads_all_channels() -> None:
    model = build(TWO + "{ a = Conv(x, w, b) y = Conv(a, v) z = Relu(a) }")
    model.graph.node[2].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    result, outcome, _ = run(model, DropDead())
    assert result is model, outcome.rewrites


def test_groups_keep_their_channels() -> None:
    wide = {"w": dead(normal(14, 4, 1, 1), (1, 4)), "b": holding(0.0, 14)}
    untouched(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv<group=2>(r, v) }", **wide, v=normal(4, 7, 1, 1))
    narrow = {"w": dead(normal(14, 2, 1, 1), (1, 4)), "b": holding(0.0, 14)}
    untouched(SIDE + "{ a = Conv<group=2>(x, w, b) r = Relu(a) y = Conv(r, v) }", **narrow, v=normal(5, 14, 1, 1))


# Matrix products


def test_matmul_along_the_last_axis() -> None:
    body = "(double[2,3,4] x) => (double[N] y) { a = MatMul(x, n) t = Add(a, c9) r = Sigmoid(t) e = MatMul(r, o) y = Add(bias5, e) }"
    weights = {"n": dead(normal(4, 9), columns=(1, 4, 6)), "c9": normal(9), "o": dead(normal(9, 5), rows=(2,))}
    result, reason = pruned(body, {"n": (4, 5), "o": (5, 5)}, x=normal(2, 3, 4), **weights)
    assert ops(result) == {"MatMul": 2, "Add": 2, "Sigmoid": 1}
    assert "9 → 5" in reason
    assert "3 are constant" in reason
    assert "1 are multiplied by zeros only" in reason


def test_a_matmul_without_bias_gets_one() -> None:
    weights = {"n": dead(normal(4, 7), columns=(1, 4)), "o": normal(7, 5)}
    result, _ = pruned(
        "(double[2,3,4] x) => (double[N] y) { a = MatMul(x, n) r = Sigmoid(a) y = MatMul(r, o) }",
        {"o": (5, 5)},
        x=normal(2, 3, 4),
        **weights,
    )
    assert ops(result) == {"MatMul": 2, "Add": 1, "Sigmoid": 1}
    result, _ = pruned(
        "(double[3,4] x) => (double[N] y) { a = MatMul(x, n) r = Sigmoid(a) y = MatMul(r, o) }",
        {"n": (4, 5)},
        x=normal(3, 4),
        **weights,
    )
    assert ops(result) == {"MatMul": 1, "Gemm": 1, "Sigmoid": 1}


@pytest.mark.parametrize("flip", [0, 1])
def test_gemm(flip: int) -> None:
    body = f"(double[3,4] x) => (double[N] y) {{ a = Gemm<transB={flip}>(x, n, b) r = Sigmoid(a) y = Gemm<transB={flip}, alpha=2.0>(r, o) }}"
    n, o = dead(normal(4, 7), columns=(1, 4)), normal(7, 5)
    result, _ = pruned(body, {"b": (5,)}, x=normal(3, 4), n=n.T.copy() if flip else n, o=o.T.copy() if flip else o)
    assert weight(result, "n").shape == ((5, 4) if flip else (4, 5))
    assert weight(result, "o").shape == (5, 5)


def test_matmul_with_weights_on_the_left() -> None:
    body = "(double[2,4,3] x) => (double[N] y) { a = MatMul(n, x) e = Add(a, c1) r = Sigmoid(e) y = MatMul(flat, r) }"
    weights = {"n": dead(normal(7, 4), rows=(1, 4)), "c1": normal(7, 1)}
    pruned(body, {"n": (5, 4), "flat": (5, 5)}, x=normal(2, 4, 3), **weights)


# Alignment


@pytest.mark.parametrize(
    ("channels", "idle", "left"),
    [(7, 2, 5), (7, 7, 1), (16, 9, 8), (24, 9, 16), (12, 9, 4), (12, 7, 8), (10, 3, 8), (40, 40, 8)],
)
def test_channel_counts_stay_multiples_of_eight_where_they_were(channels: int, idle: int, left: int) -> None:
    """The new count is a multiple of gcd(count, 8): 16 becomes 8, not 7. Dead channels that are kept still give the right values."""
    weights = {"w": dead(normal(channels, 4, 1, 1), range(idle)), "b": normal(channels), "v": normal(5, channels, 1, 1)}
    body = SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) y = Conv(r, v) }"
    pruned(body, {"w": (left, 4, 1, 1), "b": (left,), "v": (5, left, 1, 1)}, **weights)


def test_fewer_dead_channels_than_a_block_are_kept() -> None:
    weights = {"w": dead(normal(16, 4, 1, 1), range(7)), "v": normal(5, 16, 1, 1)}
    untouched(SIDE + "{ a = Conv(x, w) r = Sigmoid(a) y = Conv(r, v) }", **weights)


def test_the_parts_and_the_whole_of_a_concat_stay_multiples() -> None:
    """One of 7 and one of 9 channels are dead. 6 and 8 would suit the parts, but the whole would fall from 16 to 14."""
    weights = {"f": dead(normal(7, 4, 1, 1), (0,)), "o": dead(normal(9, 4, 1, 1), (0,)), "v": normal(5, 16, 1, 1)}
    untouched(SIDE + "{ a = Conv(x, f) e = Conv(x, o) t = Concat<axis=1>(a, e) y = Conv(t, v) }", **weights)


# The graph around it


def test_declared_shapes_are_updated() -> None:
    model = build(
        SIDE + "{ a = Conv(x, w, b) r = Sigmoid(a) p = GlobalAveragePool(r) q = Reshape(p, shape) y = MatMul(q, mat) }",
        shape=np.array([2, 7]),
    )
    model = onnx.shape_inference.infer_shapes(model)
    assert {v.name for v in model.graph.value_info} == {"a", "r", "p", "q"}
    result, _, _ = run(model, DropDead())
    named = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.graph.value_info}
    inferred = {v.name: v for v in onnx.shape_inference.infer_shapes(build_without_shapes(result)).graph.value_info}
    for name, shape in named.items():
        assert [d.dim_value for d in inferred[name].type.tensor_type.shape.dim] == shape
    assert not {"a", "r", "p", "q"} & {
        t for n in result.graph.node for t in n.output
    }  # a name means the original's value


def build_without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    return bare


def test_declared_shapes_of_weights_are_updated() -> None:
    """Inference declares the shapes of what Constant nodes hold as well."""
    model = build(SIDE + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }")
    for name in ("w", "v"):
        held = next(t for t in model.graph.initializer if t.name == name)
        model.graph.initializer.remove(held)
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=held))
    model = onnx.shape_inference.infer_shapes(model)
    assert "w" in {v.name for v in model.graph.value_info}
    result, outcome, _ = run(model, DropDead())
    assert len(outcome.rewrites) == 1
    same(model, result, x=X)


def test_new_names_are_unused() -> None:
    model = build(TWO.replace("z", "a_pruned") + "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) a_pruned = Neg(x) }")
    result, outcome, _ = run(model, DropDead())
    assert outcome.rewrites
    same(model, result, x=X)


def test_one_run_reaches_the_fixpoint() -> None:
    """Each map of a chain loses filters, and also reads channels that the map before it loses."""
    weights = {f"w{i}": dead(normal(7, 7, 1, 1, seed=i), (i,)) for i in range(4)}
    nodes = " ".join(f"a{i} = Conv({f'r{i - 1}' if i else 'e'}, w{i}) r{i} = Relu(a{i})" for i in range(4))
    model = build(SIDE + f"{{ e = Conv(x, f) {nodes} y = Conv(r3, v) }}", **weights, f=normal(7, 4, 1, 1))
    loaded = from_proto(model)
    outcome = DropDead().run(loaded.graph, reserved=loaded.names())
    result = loaded.to_proto()
    same(model, result, x=X)
    assert [weight(result, f"w{i}").shape[:2] for i in range(4)] == [(6, 7), (6, 6), (6, 6), (6, 6)]
    assert len(outcome.rewrites) == 4


def test_a_pass_that_is_used_again_reads_weights_as_their_map_does() -> None:
    """The weight is first read as it stands and transposed; later only transposed, and is pruned then."""
    square = dead(normal(5, 5), rows=(2,))
    body = "(double[9,5] x) => (double[N] y, double[N] z) { p = MatMul(x, u) q = Relu(p) y = Gemm(q, w) z = Gemm<transB=1>(q, w) }"
    loaded = from_proto(parse(body, w=square, u=normal(5, 5, seed=1)))
    again = DropDead()
    assert not again.run(loaded.graph, reserved=loaded.names()).rewrites
    loaded.graph.outputs.pop(0)
    loaded.graph.cleanup()
    model = gs.export_onnx(loaded.graph)
    again.run(loaded.graph, reserved=loaded.names())
    same(model, gs.export_onnx(loaded.graph), x=normal(9, 5))
