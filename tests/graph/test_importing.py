"""The graph that is built from a file: attributes of every type, bodies, links."""

import onnx
from onnx import TensorProto, helper

import pwopt
from pwopt.graph.ir import Constant, Graph


def build(nodes: list[onnx.NodeProto], **options: object) -> onnx.ModelProto:
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")}
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"]], [flag])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_attributes_are_read_by_type() -> None:
    given = {"f": 0.5, "i": 3, "s": "text", "fs": [0.5, 1.5], "is": [1, 2], "ss": ["a", "b"]}
    node = helper.make_node("Custom", ["x", ""], ["y"], domain="custom", **given)
    node.attribute.append(helper.make_attribute("t", helper.make_tensor("t", TensorProto.FLOAT, [1], [4.0])))
    node.attribute.append(onnx.AttributeProto(name="raw", type=onnx.AttributeProto.STRING, s=b"\xff"))
    model = pwopt.load(build([node]))
    (read,) = model.graph.nodes
    assert {k: v for k, v in read.attrs.items() if k != "t"} == given  # only the message keeps bytes that are no text
    assert isinstance(read.attrs["t"], Constant)
    assert read.attrs["t"].values == [4.0]
    assert (read.domain, read.inputs[1].name) == ("custom", "")
    assert model.to_proto() == build([node])


def test_a_body_reads_the_tensors_of_the_graph() -> None:
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    body = helper.make_graph([helper.make_node("Neg", ["a"], ["z"])], "body", [], [out])
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body),
    ]
    graph = pwopt.load(build(nodes)).graph
    inner = graph.nodes[1].attrs["then_branch"]
    assert isinstance(inner, Graph)
    assert inner.nodes[0].inputs[0] is graph.nodes[0].outputs[0]


def test_tensors_are_linked_to_the_nodes_around_them() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Add", ["a", "a"], ["y"])]
    first, second = pwopt.load(build(nodes)).graph.nodes
    assert first.outputs[0].inputs == [first]
    assert first.outputs[0].outputs == [second, second]
    assert second.outputs[0].outputs == []
    twin = pwopt.load(build(nodes)).copy().graph.nodes[0]
    assert twin.outputs[0].inputs == [twin]
