"""Inlines functions, and the branch of an If whose condition is constant.

Functions are inlined by onnx's own inliner: it keeps the names of the graph's tensors and what its nodes are
documented with. It knows no bound (16 functions that call each other twice become 32,768 operators), it drops the
documentation of the call, and it drops the defaults of attributes; this module makes up for all three. The inliner of
onnx_ir refuses models whose functions have another opset, and loses sparse initializers and quantisation annotations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import inliner

from pwopt.graph.functions import Function, bodies_of, callers, functions, nodes_within
from pwopt.graph.model import find_captured_names
from pwopt.graph.provenance import write_documentation
from pwopt.graph.storage import copy_fields

#: The property that names the function that an operator came from.
TAG = "pwopt.function"


def inline(proto: onnx.ModelProto, chosen: Collection[Function], *, tagged: bool = False) -> onnx.ModelProto:
    """Inline some functions of a model.

    Parameters
    ----------
    proto : onnx.ModelProto
    chosen : collection of Function
    tagged : bool
        Whether each operator from a function gets a property with the name of that function.

    Raises
    ------
    ValueError
        If the inliner refuses the model, or the default of an attribute cannot be kept.
    """
    source = onnx.ModelProto()
    copy_fields(proto, source, skip={"graph"})
    copy_fields(proto.graph, source.graph, skip={"initializer"})
    for tensor in proto.graph.initializer:  # the inliner needs their names; it takes less than 2 GB
        source.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    _spell_out_defaults(source, frozenset(chosen))
    for key, function in functions(source).items():
        for node in function.node if tagged else ():
            node.metadata_props.add(key=TAG, value=":".join(key))
    result = inliner.inline_selected_functions(source, list(chosen), exclude=False)
    del result.graph.initializer[:]
    result.graph.initializer.extend(proto.graph.initializer)
    made = {name: node for node in result.graph.node for name in node.output if name}
    for call in source.graph.node:
        if (call.domain, call.op_type) in chosen and (call.metadata_props or call.doc_string):
            for node in {made[n]: made[n] for n in call.output if n in made}.values():
                own = onnx.NodeProto()
                own.CopyFrom(node)
                write_documentation(node, own, [own, call])
    return result


def _spell_out_defaults(model: onnx.ModelProto, chosen: Collection[Function]) -> None:
    """Give each call of the chosen functions the attributes that it leaves to their defaults, in place.

    A call inside a function may pass on an attribute of that function, which has no default and may be missing. Then
    the attribute gets the same default there, if nothing else in the function uses it.
    """
    found = functions(model)
    pending = list(found.values())
    while pending:
        function = pending.pop()
        nodes = list(nodes_within(function.node))
        for node in nodes:
            callee = found.get((node.domain, node.op_type))
            if callee is None or (node.domain, node.op_type) not in chosen:
                continue
            _add_defaults(node, callee)
            defaults = {a.name: a for a in callee.attribute_proto}
            passed = [a for a in node.attribute if a.name in defaults and a.ref_attr_name in function.attribute]
            for attribute in passed:
                name = attribute.ref_attr_name
                if sum(a.ref_attr_name == name for n in nodes for a in n.attribute) > 1:
                    raise ValueError(f"the attribute {name!r} of {function.name!r} has several defaults")
                function.attribute.remove(name)
                function.attribute_proto.add().CopyFrom(defaults[attribute.name])
                function.attribute_proto[-1].name = name
                pending = list(found.values())
    for node in nodes_within(model.graph.node):
        callee = found.get((node.domain, node.op_type))
        if callee is not None and (node.domain, node.op_type) in chosen:
            _add_defaults(node, callee)


def _add_defaults(call: onnx.NodeProto, function: onnx.FunctionProto) -> None:
    given = {a.name for a in call.attribute}
    call.attribute.extend(a for a in function.attribute_proto if a.name not in given)


def find_touched_functions(
    source: onnx.ModelProto, whole: onnx.ModelProto, result: onnx.ModelProto, replaced: frozenset[str]
) -> set[Function]:
    """Find the functions with an operator that was removed or changed, and the functions that call them.

    Parameters
    ----------
    source : onnx.ModelProto
        With its functions.
    whole : onnx.ModelProto
        With all functions inlined and tagged.
    result : onnx.ModelProto
        The rewritten model.
    replaced : frozenset of str
        Tensors that another operator computes now.
    """
    after = {name: node for node in result.graph.node for name in node.output}
    found = set()
    for node in whole.graph.node:
        tag = next((p.value for p in node.metadata_props if p.key == TAG), None)
        now = after.get(node.output[0]) if node.output else None
        same = now is not None and now.op_type == node.op_type and now.attribute == node.attribute
        if tag is not None and (not same or not replaced.isdisjoint(node.output)):
            domain, _, name = tag.rpartition(":")
            found.add((domain, name))
    by, pending = callers(source), list(found)
    while pending:
        above = by.get(pending.pop(), set()) - found
        found |= above
        pending += above
    return found


def find_branch(node: onnx.NodeProto, condition: bool) -> onnx.GraphProto | None:
    """The body that an If runs under a condition; None if it cannot be moved out of the If."""
    name = "then_branch" if condition else "else_branch"
    found = [a.g for a in node.attribute if a.name == name and a.HasField("g")]
    good = len(found) == 1 and not found[0].sparse_initializer and len(found[0].output) == len(node.output)
    return found[0] if good else None


def inline_branches(proto: onnx.ModelProto, taken: Mapping[str, bool]) -> onnx.ModelProto:
    """Replace Ifs by the bodies that they run; `taken` maps the first output of each to its condition."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    tensors = {v.name for v in (*graph.input, *graph.initializer)} | {n for node in graph.node for n in node.output}
    left = [n for n in graph.node if not n.output or n.output[0] not in taken]
    tensors |= {s.values.name for s in graph.sparse_initializer} | find_captured_names(left)
    names = {node.name for node in graph.node}
    nodes = list(proto.graph.node)
    del graph.node[:]
    for node in nodes:
        body = find_branch(node, taken[node.output[0]]) if node.output and node.output[0] in taken else None
        if body is None:
            graph.node.append(node)
            continue
        names.discard(node.name)
        copy = onnx.GraphProto()
        copy.CopyFrom(body)
        graph.node.extend(_move_out(copy, node, tensors, names))
        graph.initializer.extend(copy.initializer)
    return result


def _move_out(body: onnx.GraphProto, outer: onnx.NodeProto, tensors: set[str], names: set[str]) -> list[onnx.NodeProto]:
    """The operators of a body with names that are unique outside of it."""
    made = [n for node in body.node for n in node.output if n]
    results: dict[str, str] = {}
    aliases = []
    for inside, outside in zip(body.output, outer.output, strict=True):
        if inside.name in made and inside.name not in results and outside:
            results[inside.name] = outside
        elif outside:
            aliases.append((inside.name, outside))
    renamed = dict(results)
    for name in [*(t.name for t in body.initializer), *made]:
        if name not in renamed:
            renamed[name] = _make_unique(name, tensors)
    for tensor in body.initializer:
        tensor.name = renamed[tensor.name]
    nodes = list(body.node)
    for node in nodes:
        _rename(node, renamed)
        node.name = _make_unique(node.name, names) if node.name else ""
    nodes += [onnx.helper.make_node("Identity", [renamed.get(a, a)], [b]) for a, b in aliases]
    for node in nodes:
        if set(node.output) & set(outer.output):
            own = onnx.NodeProto()
            own.CopyFrom(node)
            write_documentation(node, own, [own, outer])
    return nodes


def _make_unique(name: str, taken: set[str]) -> str:
    candidate, k = name, 0
    while candidate in taken:
        k += 1
        candidate = f"{name}_{k}"
    taken.add(candidate)
    return candidate


def _rename(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Rename the tensors of a node and those that its bodies capture, but not those that a body defines."""
    node.input[:] = [renamed.get(n, n) for n in node.input]
    node.output[:] = [renamed.get(n, n) for n in node.output]
    for body in bodies_of(node):
        own = {v.name for v in (*body.input, *body.initializer)} | {n for inner in body.node for n in inner.output}
        outside = {a: b for a, b in renamed.items() if a not in own}
        for inner in body.node:
            _rename(inner, outside)
        for value in body.output:
            value.name = outside.get(value.name, value.name)
