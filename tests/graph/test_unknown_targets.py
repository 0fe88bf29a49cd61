"""Sizes behind targets that onnx's inference does not know."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import normal, ops, parse, same

from pwopt.graph import unknown_targets
from pwopt.graph.files import from_proto
from pwopt.graph.ir import Graph
from pwopt.graph.shapes import infer_alone
from pwopt.graph.unknown_targets import follow_targets
from pwopt.optimizing.optimizer import optimize
from pwopt.selecting import shape_folding
from pwopt.selecting.shape_folding import fold_shapes, infer_sizes

#: One block of ShuffleNet as torch exports it: split into halves, an operator on one of them, and a shuffle.
BLOCK = (
    "s{0} = Shape(h{0}) c{0} = Gather(s{0}, one) d{0} = Div(c{0}, two) a{0} = Slice(h{0}, zero, d{0}, one) "
    "b{0} = Slice(h{0}, d{0}, c{0}, one) r{0} = Relu(b{0}) k{0} = Concat<axis=1>(a{0}, r{0}) t{0} = Shape(k{0}) "
    "n{0} = Gather(t{0}, zero) m{0} = Gather(t{0}, one) i{0} = Gather(t{0}, two) j{0} = Gather(t{0}, three) "
    "g{0} = Div(m{0}, two) e{0} = Concat<axis=0>(n{0}, two, g{0}, i{0}, j{0}) u{0} = Reshape(k{0}, e{0}) "
    "v{0} = Transpose<perm=[0,2,1,3,4]>(u{0}) f{0} = Concat<axis=0>(n{0}, m{0}, i{0}, j{0}) h{1} = Reshape(v{0}, f{0})"
)
NUMBERS = {name: np.array([n]) for n, name in enumerate(("zero", "one", "two", "three"))}
#: Half of the channels of x, which inference does not know.
HALF = "s = Shape(x) c = Gather(s, one) d = Div(c, two)"


def chained(blocks: int, opset: int = 17) -> onnx.ModelProto:
    body = " ".join(BLOCK.format(n, n + 1) for n in range(blocks))
    model = f"(float[N,8,H,W] x) => (float[A,B,C,D] y) {{ h0 = Relu(x) {body} y = Sigmoid(h{blocks}) }}"
    return parse(model, opset, **NUMBERS)


def loaded(body: str, opset: int = 17, sizes: str = "N,8,H,W", **weights: np.ndarray) -> Graph:
    model = parse(f"(float[{sizes}] x) => (float[A] y) {{ {body} }}", opset, **NUMBERS, **weights)
    return from_proto(model).graph


def shape(graph: Graph, name: str) -> list[object] | None:
    """The shape of a tensor, with "?" for a name that inference made up."""
    found = next(t.shape for node in graph.nodes for t in node.outputs if t.name == name)
    return None if found is None else ["?" if str(d).startswith("unk__") else d for d in found]


@pytest.fixture
def inferred(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are inferred alone."""
    seen: list[str] = []

    def infer(light: onnx.ModelProto) -> object:
        seen.append(light.graph.node[-1].output[0])
        return infer_alone(light)

    monkeypatch.setattr(unknown_targets, "infer_alone", infer)
    return seen


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each inference of the whole graph while shapes are folded."""
    seen: list[None] = []

    def infer(*arguments: onnx.ModelProto) -> object:
        seen.append(None)
        return real(*arguments)

    real = shape_folding.infer
    monkeypatch.setattr(shape_folding, "infer", infer)
    return seen


def test_a_chain_of_blocks_takes_one_round(rounds: list[None]) -> None:
    model = from_proto(chained(8))
    fold_shapes(model)
    assert len(rounds) == 1
    assert "Div" not in {node.op for node in model.graph.nodes}
    assert (shape(model.graph, "y") or [])[1] == 8


def test_the_sizes_of_a_chain_take_one_inference(rounds: list[None]) -> None:
    for opset in (13, 17):
        rounds.clear()
        found = infer_sizes(chained(8, opset), {"x": (2, 8, 3, 5)})
        assert len(rounds) == 1
        assert found["u7"] == (2, 2, 4, 3, 5)
        assert found["y"] == (2, 8, 3, 5)


def test_every_operator_is_inferred_once_at_most(inferred: list[str]) -> None:
    follow_targets(from_proto(chained(8)).graph)
    assert len(inferred) == len(set(inferred)) == 7 * 8 + 1


def test_folded_blocks_compute_the_same() -> None:
    model = chained(8)
    result = optimize(model, cost="analytic", verify=False).model
    assert "Div" not in ops(result)
    same(model, result, 0.0, x=normal(2, 8, 3, 5, dtype=np.float32))


def test_sizes_of_tensors_that_are_folded_away_are_told() -> None:
    model, sizes = chained(8), dict[str, tuple[int, ...]]()
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (2, 8, 3, 5), strict=True):
        dim.dim_value = size
    fold_shapes(from_proto(model), sizes=sizes)
    assert sizes.items() >= infer_sizes(model, {}).items()


def test_without_passes_that_fold_nothing_is_followed(inferred: list[str]) -> None:
    model = from_proto(chained(2))
    assert fold_shapes(model, passes=()) == ()
    assert not inferred


@pytest.mark.parametrize("sizes", ["N,8,H,W", "2,8,3,5"])
def test_known_sizes_are_not_inferred_again(inferred: list[str], sizes: str) -> None:
    """Neither constant targets nor those without a known number tell anything new."""
    body = "a = Relu(x) s = Shape(a) n = Gather(s, zero) c = ConstantOfShape(n) r = Reshape(a, m) y = Sigmoid(r)"
    graph = loaded(body, sizes=sizes, m=np.array([-1]))
    assert follow_targets(graph) == {}
    assert not inferred


def test_numbers_fill_in_and_names_stay() -> None:
    graph = loaded(f"{HALF} a = Slice(x, zero, d, one) y = Relu(a)")
    before = graph.nodes[-1].outputs[0].shape
    assert before is not None
    assert follow_targets(graph) == {"a": (*before[:1], 4, *before[2:]), "y": (*before[:1], 4, *before[2:])}


def test_made_up_names_of_one_operator_mean_nothing() -> None:
    """Two flattened tensors have different sizes, although inference alone makes up the same name for both."""
    body = (
        f"{HALF} t = Concat<axis=0>(two, d, m) a = Reshape(x, t) p = MaxPool<kernel_shape=[2, 2]>(x) "
        "b = Reshape(p, t) y = Concat<axis=1>(a, b)"
    )
    graph = loaded(body, opset=14, sizes="4,8,H,W", m=np.array([-1]))
    follow_targets(graph)
    found = {t.name: t.shape for node in graph.nodes for t in node.outputs}
    assert (found["a"] or ())[:2] == (2, 4) == (found["b"] or ())[:2]
    assert (found["a"] or ())[2] != (found["b"] or ())[2]


def test_symbols_and_numbers_of_one_target() -> None:
    body = (
        "s = Shape(x) n = Gather(s, zero) h = Gather(s, two) c = Gather(s, one) d = Div(c, two) "
        "t = Concat<axis=0>(n, d, two, h, m) y = Reshape(x, t)"
    )
    graph = loaded(body, m=np.array([-1]))
    follow_targets(graph)
    assert shape(graph, "y") == ["N", 4, 2, "H", "?"]


@pytest.mark.parametrize(("pads", "expected"), [("0, 0, 0, 1", ["?"] * 4), ("0, 1, 0, 0", [1, 12, 2, 3])])
def test_a_window_that_inference_counts_wrongly_is_not_counted(pads: str, expected: list[object]) -> None:
    """Of six columns, onnx counts a third window that begins behind them."""
    pool = f"p = MaxPool<kernel_shape=[1, 2], strides=[1, 3], pads=[{pads}], ceil_mode=1>(a)"
    graph = loaded(f"{HALF} a = Slice(x, zero, d, three) {pool} y = Relu(p)", sizes="1,12,2,9")
    follow_targets(graph)
    assert shape(graph, "a") == [1, 12, 2, 6]
    assert shape(graph, "y") == expected


@pytest.mark.parametrize(("factor", "expected"), [(1.4, ["?"] * 4), (1.5, [1, 20, 2, 15])])
def test_a_size_that_runtimes_round_differently_stays_unknown(factor: float, expected: list[object]) -> None:
    body = f"{HALF} a = Slice(x, zero, d, three) r = Resize(a, , f) y = Relu(r)"
    graph = loaded(body, sizes="1,20,2,12", f=np.array([1, 1, 1, factor], np.float32))
    follow_targets(graph)
    assert shape(graph, "a") == [1, 20, 2, 10]
    assert shape(graph, "y") == expected


@pytest.mark.parametrize(
    ("domain", "op", "expected"),
    [("", "Conv", [1, 6, 2]), ("com.microsoft", "FusedConv", [1, 6, 2]), ("other", "Conv", None)],
)
def test_operators_of_other_domains(domain: str, op: str, expected: list[object] | None) -> None:
    model = parse(
        f"(float[1,4,9] x) => (float[A] y) {{ {HALF} a = Slice(x, zero, d, two) y = Conv(a, w) }}",
        **NUMBERS, w=normal(6, 4, 1, dtype=np.float32),
    )  # fmt: skip
    model.graph.node[-1].domain, model.graph.node[-1].op_type = domain, op
    if domain:
        model.opset_import.add(domain=domain, version=1)
    graph = from_proto(model).graph
    follow_targets(graph)
    assert shape(graph, "a") == [1, 4, 2]
    assert shape(graph, "y") == expected


def test_what_other_operators_may_mean_is_not_guessed(inferred: list[str]) -> None:
    """Neither a function of the model, whatever its name, nor the bodies of an If, which may be of any size."""
    model = parse(
        f"(float[1,4,9] x) => (float[A] y) {{ {HALF} a = Slice(x, zero, d, two) b = Relu(a) e = Equal(d, two) "
        "y = If(e) <then_branch = g () => (float[A] u) { u = Sqrt(a) }, else_branch = h () => (float[B] v) { v = Exp(a) }> }",
        **NUMBERS,
    )  # fmt: skip
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.domain = "com.microsoft"
    relu.op_type = "BiasGelu"
    model.opset_import.add(domain="com.microsoft", version=1)
    body = [onnx.helper.make_node("Flatten", ["p"], ["q"])]
    model.functions.append(
        onnx.helper.make_function("com.microsoft", "BiasGelu", ["p"], ["q"], body, [onnx.helper.make_opsetid("", 17)])
    )
    follow_targets(from_proto(model).graph)
    assert inferred == ["a"]


def test_axes_that_inference_ignores_make_a_shape_unknown() -> None:
    """Before opset 11, inference ignores negative axes of a Squeeze."""
    for axis, expected in ((3, [1, 4, 2]), (-1, None)):
        graph = loaded(f"{HALF} a = Slice(x, zero, d, one) y = Squeeze<axes=[{axis}]>(a)", 10, "1,8,2,1")
        follow_targets(graph)
        assert shape(graph, "a") == [1, 4, 2, 1]
        assert shape(graph, "y") == expected


def test_an_end_means_what_it_means_to_onnxruntime() -> None:
    """Backwards to the largest number, onnxruntime takes all positions, and inference none."""
    body = f"{HALF} a = Slice(x, zero, d, one) y = Slice(a, m, far, one, m)"
    graph = loaded(body, sizes="2,8,3", m=np.array([-1]), far=np.array([2**63 - 1]))
    follow_targets(graph)
    assert shape(graph, "y") == [2, 4, 3]


def test_a_scalar_symbol_adds_no_axis() -> None:
    graph = loaded(f"{HALF} a = Slice(x, zero, d, one) n = Gather(s, i) y = Gather<axis=2>(a, n)", i=np.array(0))
    follow_targets(graph)
    assert (shape(graph, "y") or [])[1:2] == [4]


def test_values_of_long_tensors_are_not_propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx would store every element."""
    seen: list[object] = []

    def infer(model: onnx.ModelProto, data_prop: bool = False) -> onnx.ModelProto:
        seen.append((model.graph.node[-1].op_type, data_prop))
        return onnx.shape_inference.infer_shapes(model)

    graph = loaded(f"{HALF} a = Slice(z, zero, d, zero) y = Add(a, a)", sizes="9,1000000", z=np.zeros(1))
    monkeypatch.setattr("pwopt.graph.shapes.shape_inference", type("", (), {"infer_shapes": staticmethod(infer)}))
    follow_targets(graph)
    assert [propagated for op, propagated in seen if op == "Add"] == [False]
