from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from helpers import normal, parse, run

import pwopt
from pwopt.graph.provenance import FOLDED
from pwopt.passes import CleanUp, FoldAffine, FoldChains, NameActivations

NORM = {"g": normal(6), "b": normal(6), "m": normal(6), "v": normal(6) ** 2 + 0.1}


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every operator tells where it stood, as the dynamo exporter of PyTorch writes it."""
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"n{i}"
        node.metadata_props.add(key="namespace", value=f"net/{node.op_type}{i}")
        node.doc_string = f"line {i}"
    return model


def told(node: onnx.NodeProto) -> tuple[dict[str, str], list[dict[str, object]]]:
    props = {p.key: p.value for p in node.metadata_props}
    return props, json.loads(props.pop(FOLDED, "[]"))


def test_a_convolution_keeps_its_own_and_lists_what_it_took_over() -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { c = Conv(x, w) y = BatchNormalization(c, g, b, m, v) }"
    result, _, _ = run(named(parse(body, w=normal(6, 4, 3, 3), **NORM)), FoldAffine())
    (node,) = result.graph.node
    own, folded = told(node)
    assert own == {"namespace": "net/Conv0"}
    assert (node.name, node.doc_string) == ("n0", "line 0")
    assert folded == [
        {
            "name": "n1",
            "op_type": "BatchNormalization",
            "metadata_props": {"namespace": "net/BatchNormalization1"},
            "doc_string": "line 1",
        }
    ]


def test_also_past_other_operators_and_into_what_reads_it() -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { s = Mul(x, k) r = Relu(s) y = Conv(r, w) }"
    result, _, _ = run(named(parse(body, w=normal(6, 4, 3, 3), k=np.float64(2))), FoldAffine())
    relu, conv = result.graph.node
    assert told(relu) == ({"namespace": "net/Relu1"}, [])
    own, folded = told(conv)
    assert own == {"namespace": "net/Conv2"}
    assert [f["op_type"] for f in folded] == ["Mul"]


def test_what_folds_again_lists_everything_once() -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { a = Conv(x, w) c = Conv(a, u) y = BatchNormalization(c, g, b, m, v) }"
    result, _, _ = run(
        named(parse(body, w=normal(8, 4, 1, 1), u=normal(6, 8, 1, 1), **NORM)), FoldAffine(), FoldChains()
    )
    (node,) = result.graph.node
    own, folded = told(node)
    assert len({own["namespace"], *(f["metadata_props"]["namespace"] for f in folded)}) == 3  # type: ignore[index]
    assert len(folded) == 2


def test_what_an_earlier_run_listed_is_listed_on() -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { c = Conv(x, w) y = BatchNormalization(c, g, b, m, v) }"
    first, _, _ = run(named(parse(body, w=normal(6, 4, 3, 3), **NORM)), FoldAffine())
    first.graph.node[0].output[0] = "c"
    first.graph.node.append(onnx.helper.make_node("Neg", ["c"], ["y"], name="neg", doc_string="again"))
    second, _, _ = run(first, FoldAffine())
    own, folded = told(second.graph.node[0])
    assert own == {"namespace": "net/Conv0"}
    assert [f["op_type"] for f in folded] == ["BatchNormalization", "Neg"]


@pytest.mark.parametrize("value", ["", "nonsense", "{}", "[" * 5000])
def test_what_others_wrote_under_that_name_does_no_harm(value: str) -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { c = Conv(x, w) y = Neg(c) }"
    model = named(parse(body, w=normal(6, 4, 3, 3)))
    model.graph.node[0].metadata_props.add(key=FOLDED, value=value)
    result, _, _ = run(model, FoldAffine())
    assert [f["op_type"] for f in told(result.graph.node[0])[1]] == ["Neg"]


def test_an_operator_with_other_attributes_is_still_itself() -> None:
    """hoist-stride changes attributes in place."""
    body = "(double[1,4,8,8] x) => (double[A,B,C,D] y) { a = Relu(x) p = Conv(a, w) y = Conv<strides=[2,2]>(p, u) }"
    model = named(parse(body, w=normal(4, 4, 1, 1), u=normal(6, 4, 1, 1)))
    result = pwopt.optimize(model, cost="analytic", verify=False).model
    places = {told(n)[0].get("namespace") for n in result.graph.node}
    assert None not in places


def test_an_activation_stands_for_all_that_spelled_it() -> None:
    body = "(float[N,4] x) => (float[A,B] y) { a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six) }"
    weights = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}
    result, _, _ = run(named(parse(body, **weights)), NameActivations())
    own, folded = told(result.graph.node[-1])
    assert len(folded) == 3
    assert own["namespace"].startswith("net/")


def test_nameless_operators_stay_nameless_and_undocumented() -> None:
    body = "(double[N,4,8,8] x) => (double[A,B,C,D] y) { c = Conv(x, w) i = Identity(c) y = BatchNormalization(i, g, b, m, v) }"
    result, _, _ = run(parse(body, w=normal(6, 4, 3, 3), **NORM), CleanUp(), FoldAffine())
    (node,) = result.graph.node
    assert (node.name, node.doc_string, list(node.metadata_props)) == ("", "", [])
