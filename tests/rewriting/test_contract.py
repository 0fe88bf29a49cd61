"""A third-party pass that changes the graph outside its rewrites, raises or does not end is named in one sentence."""

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MODELS, build, ops

import pwopt
from pwopt.errors import UsageError
from pwopt.rewriting import Pass, Rewrite, Rewriter

F = np.float32


def model() -> onnx.ModelProto:
    body = "(float[N,4] x) => (float[N,4] y) { a = Neg(x) b = LeakyRelu<alpha = 0.3>(a) y = Mul(b, c) }"
    return build(body, {"c": np.arange(1, 5, dtype=F)})


def optimize(*passes: type[Pass]) -> pwopt.Result:
    return pwopt.optimize(model(), cost="analytic", verify=False, passes=list(passes))


def _set_attribute(node: gs.Node) -> None:
    node.attrs["alpha"] = 0.9


def _set_operator(node: gs.Node) -> None:
    node.op = "Elu"


def _swap_input(node: gs.Node) -> None:
    node.inputs[0] = node.i().inputs[0]


def _replace_outputs(node: gs.Node) -> None:
    node.outputs.append(gs.Variable("more"))


def _rename(node: gs.Node) -> None:
    node.outputs[0].name = "other"


def _reshape(node: gs.Node) -> None:
    node.outputs[0].shape = [7]


def _set_constant(node: gs.Node) -> None:
    node.o().inputs[1].values = np.zeros(4, F)


def _edit_constant(node: gs.Node) -> None:
    node.o().inputs[1].values[:] = 0


EDITS = [
    _set_attribute,
    _set_operator,
    _swap_input,
    _replace_outputs,
    _rename,
    _reshape,
    _set_constant,
    _edit_constant,
]


@pytest.mark.parametrize("place", ["start", "match", "rewrite"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_direct_change_is_the_fault_of_the_pass(edit: Callable[[gs.Node], None], place: str) -> None:
    class Direct(Pass):
        """x = x"""

        name = "direct"

        def start(self, rw: Rewriter) -> None:
            if place == "start":
                edit(next(n for n in rw.nodes() if n.op == "LeakyRelu"))

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if rw.op(node) != "LeakyRelu" or place == "start":
                return None
            edit(node)
            return Rewrite("an edit") if place == "rewrite" else None

    with pytest.raises(UsageError, match=r"the pass 'direct' \(.*Direct\) changed the (node|tensor) '.*' directly"):
        optimize(Direct)


def test_a_direct_change_before_an_edit_is_found() -> None:
    class Sly(Pass):
        """x = x"""

        name = "sly"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if rw.op(node) != "LeakyRelu" or node.attrs["alpha"] == 0.9:
                return None
            node.attrs["alpha"] = 0.9
            new = gs.Node("LeakyRelu", node.name, dict(node.attrs), list(node.inputs), list(node.outputs))
            return rw.replace([node], [new], "a copy")

    with pytest.raises(UsageError, match=r"the pass 'sly' .* changed the node"):
        optimize(Sly)


def test_the_lists_of_the_graph_are_watched() -> None:
    class Outputs(Pass):
        """x = x"""

        name = "outputs"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if rw.op(node) == "Neg":
                rw.graph.outputs.append(node.outputs[0])
            return None

    with pytest.raises(UsageError, match="changed the list of outputs of the graph"):
        optimize(Outputs)


@pytest.mark.parametrize("place", ["start", "match"])
def test_an_edit_without_a_rewrite_is_the_fault_of_the_pass(place: str) -> None:
    class Silent(Pass):
        """x = x"""

        name = "silent"

        def start(self, rw: Rewriter) -> None:
            if place == "start":
                self.edit(next(n for n in rw.nodes() if n.op == "Neg"), rw)

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            if place == "match" and rw.op(node) == "Neg":
                self.edit(node, rw)
            return None

        def edit(self, node: gs.Node, rw: Rewriter) -> None:
            rw.replace([node], [gs.Node("Abs", "abs", {}, [node.inputs[0]], [node.outputs[0]])], "no reason")

    where = "in start" if place == "start" else "at 'silent:a' without returning a Rewrite"
    with pytest.raises(UsageError, match=f"the pass 'silent' .* edited the graph {where}"):
        optimize(Silent)


def test_a_rewrite_that_changes_nothing_is_not_counted() -> None:
    class Idle(Pass):
        """x = x"""

        name = "idle"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            return Rewrite("nothing") if rw.op(node) == "Neg" else None

    result = optimize(Idle)
    assert not result.report.rewrites
    (skip,) = result.report.skips
    assert str(skip.site) == "idle:a"
    assert skip.reason == "an error of the pass: it returned a Rewrite, but changed nothing"


class Restless(Pass):
    """x = x"""

    name = "restless"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Neg":
            return None
        new = gs.Node("Neg", node.name, {}, list(node.inputs), list(node.outputs))
        return rw.replace([node], [new], "again")


class Growing(Pass):
    """−x = −(−(−x))"""

    name = "growing"

    def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
        if rw.op(node) != "Neg":
            return None
        a, b = (rw.new_variable("more", node.outputs[0]) for _ in range(2))
        ends = [node.inputs[0], a, b, node.outputs[0]]
        return rw.replace([node], [gs.Node("Neg", "", {}, [s], [t]) for s, t in itertools.pairwise(ends)], "more")


@pytest.mark.parametrize("kind", [Restless, Growing])
def test_a_pass_that_does_not_end_is_stopped(kind: type[Pass]) -> None:
    with pytest.raises(UsageError, match=f"the pass '{kind.name}' .* does not end"):
        optimize(kind)


def test_one_site_may_absorb_many_nodes() -> None:
    count = 150
    weights = {f"w{i}": (np.eye(2) * (1 + i % 2)).astype(F).reshape(2, 2, 1, 1) for i in range(count)}
    steps = " ".join(
        f"{'y' if i == count - 1 else f't{i + 1}'} = Conv({f't{i}' if i else 'x'}, w{i})" for i in range(count)
    )
    chain = build(f"(float[1,2,3,3] x) => (float[1,2,3,3] y) {{ {steps} }}", weights)
    result = pwopt.optimize(chain, cost="analytic", verify=False, passes=["fold-chains"])
    assert ops(result.model) == {"Conv": 1}


def test_reading_is_no_change() -> None:
    class Reader(Pass):
        """x = x"""

        name = "reader"

        def match_and_rewrite(self, node: gs.Node, rw: Rewriter) -> Rewrite | None:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    assert tensor.values.sum() == 10
            return None

    assert ops(optimize(Reader).model) == {"Neg": 1, "LeakyRelu": 1, "Mul": 1}


@pytest.mark.parametrize("name", ["decoder", "fpn", "attention", "text_detector"])
def test_the_built_in_passes_keep_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pass, "builtin", property(lambda self: False))
    passes = [p.name for p in pwopt.PASSES]
    result = pwopt.optimize(MODELS / f"{name}.onnx", cost="analytic", verify=False, passes=passes)
    assert result.report.rewrites
    assert not any("error of the pass" in s.reason for s in result.report.skips)
