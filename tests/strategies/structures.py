"""Motifs with sequences, optionals and functions whose attributes have defaults."""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, TensorProto, TypeProto, helper

from strategies.builder import Tensor, UnfitError
from strategies.operators import Operators


class Structures(Operators):
    """Adds sequences, optionals and calls of functions."""

    def m_sequence(self) -> None:
        """Maps of a tensor as a sequence, of which elements are read, joined or given back."""
        if self.opset < 11:
            raise UnfitError("no sequences")
        x = self.tensor(2, 3, 4, 4)
        if 0 in x.shape:
            raise UnfitError("empty")
        sequence, parts = self.cut_up(x) if self.chance(0.4) else self.collected(x)
        if self.chance(0.2):
            sequence, parts = self.changed(sequence, parts)
        kind = self.rng.randrange(4)
        if kind == 0:
            self.give_sequence(sequence)
        if kind != 1 and parts:
            place = self.rng.randrange(len(parts))
            element = self.raw("SequenceAt", [sequence, self.integers(self.rng.choice([place, place - len(parts)]))])
            y = self.made(element, parts[place])
            self.rng.choice([self.affine, self.pointwise, self.activation])(y)
        if kind == 1 and parts and len({(p[:1], p[2:]) for p in parts}) == 1 and len(parts[0]) > 1:
            joined = self.raw("ConcatFromSequence", [sequence], axis=1)
            self.pointwise(self.made(joined, (parts[0][0], sum(p[1] for p in parts), *parts[0][2:])))
        if self.chance(0.15):
            length = self.raw("SequenceLength", [sequence])
            self.results.append(helper.make_tensor_value_info(length, TensorProto.INT64, []))

    def m_optional(self) -> None:
        """A map wrapped in an optional: given back, or unwrapped and read."""
        if self.opset < 15:
            raise UnfitError("no optionals")
        y = self.pointwise(self.tensor(3, 4))
        wrapped = self.raw("Optional", [y.name])
        if self.chance(0.5):
            inner = helper.make_tensor_type_proto(self.code, [None] * y.rank)
            self.results.append(helper.make_value_info(wrapped, helper.make_optional_type_proto(inner)))
        if self.chance(0.6):
            self.affine(self.made(self.raw("OptionalGetElement", [wrapped]), y.shape))

    def m_omitted(self) -> None:
        """Nodes some of whose outputs have no name, or no reader."""
        x = self.pointwise(self.tensor(3, 4))
        if 0 in x.shape:
            raise UnfitError("empty")
        if self.chance(0.5):
            size = [2] * (x.rank - 2)
            made = self.node("MaxPool", [x], 2, codes=[0, TensorProto.INT64], kernel_shape=size, strides=size)[0]
        else:
            made = self.node("Dropout", [x], 2, codes=[0, TensorProto.BOOL if self.opset >= 10 else 0])[0]
        if self.chance(0.6):
            unused = self.nodes[-1].output[1]
            self.pool[:] = [t for t in self.pool if t.name != unused]
            self.nodes[-1].output[1] = ""
        self.affine(made)

    def m_defaults(self) -> None:
        """A call of a function whose attributes have defaults; the call gives some of them, or none."""
        x = self.tensor(2, 3, 4, 4)
        kind = self.rng.choice(["Leaky", "Scaled", "Outer", "Window"])
        given: dict[str, Any] = {"slope": self.rng.choice([0.5, -0.25])} if self.chance(0.4) else {}
        if kind in ("Leaky", "Outer"):
            self.declare("Leaky")
            self.declare(kind)
            y = self.call(kind, [x.name], x.shape, given)
        elif kind == "Scaled":
            self.declare(kind)
            y = self.call(kind, [x.name], x.shape, {"scale": 3.0} if self.chance(0.4) else {})
        else:
            self.declare(kind)
            y = self.window(x)
        self.rng.choice([self.affine, self.pointwise, self.pointwise])(y)

    def window(self, x: Tensor) -> Tensor:
        """A convolution whose strides and groups are the function's defaults, or given."""
        if x.rank != 4 or x.shape[1] % 2 or 0 in x.shape:
            raise UnfitError("no image")
        given: dict[str, Any] = {"strides": [1, 1]} if self.chance(0.4) else {}
        given |= {"group": 1} if self.chance(0.4) else {}
        group, stride = given.get("group", 2), 1 if given.get("strides") else 2
        weights = self.constant(self.weights(4, x.shape[1] // group, 1, 1), shared=False)
        shape = (x.shape[0], 4, *((d - 1) // stride + 1 for d in x.shape[2:]))
        return self.call("Window", [x.name, weights], shape, given)

    def declare(self, kind: str) -> None:
        """Add a function to the model, unless it is there."""
        if any(f.name == kind for f in self.functions):
            return
        node = helper.make_node

        def refer(message: Any, **names: tuple[str, int]) -> Any:
            for name, (source, attribute_type) in names.items():
                message.attribute.add(name=name, ref_attr_name=source, type=attribute_type)
            return message

        real, integer, integers = AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.INTS
        body: list[Any]
        inputs = ["a"]
        defaults: dict[str, Any] = {"slope": 0.125}
        if kind == "Leaky":
            body = [refer(node("LeakyRelu", ["a"], ["b"]), alpha=("slope", real))]
        elif kind == "Outer":  # hands its own attribute on in one call, and omits it in the other
            body = [
                refer(node("Leaky", ["a"], ["h"], domain="defaults"), slope=("slope", real)),
                node("Leaky", ["h"], ["b"], domain="defaults"),
            ]
            defaults = {"slope": 0.75}
        elif kind == "Scaled":
            number = helper.make_tensor("v", self.code, [], [0.5])
            body = [
                node("Constant", [], ["half"], value=number),
                refer(node("Elu", ["a"], ["h"]), alpha=("scale", real)),
                node("Mul", ["h", "half"], ["b"]),
            ]
            defaults = {"scale": 2.0}
        else:
            inputs, defaults = ["a", "w"], {"strides": [2, 2], "group": 2}
            body = [refer(node("Conv", ["a", "w"], ["b"]), strides=("strides", integers), group=("group", integer))]
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("defaults", 1)]
        protos = [helper.make_attribute(name, value) for name, value in defaults.items()]
        self.functions.append(
            helper.make_function("defaults", kind, inputs, ["b"], body, opsets, attribute_protos=protos)
        )
        self.domains.add("defaults")

    def call(self, kind: str, inputs: list[str], shape: tuple[int, ...], attrs: dict[str, Any]) -> Tensor:
        return self.made(self.raw(kind, inputs, domain="defaults", **attrs), shape)

    def collected(self, x: Tensor) -> tuple[str, list[tuple[int, ...]]]:
        parts = [self.pointwise(x) for _ in range(self.rng.choice([1, 2, 2, 3]))]
        return self.raw("SequenceConstruct", [p.name for p in parts]), [p.shape for p in parts]

    def cut_up(self, x: Tensor) -> tuple[str, list[tuple[int, ...]]]:
        y = self.pointwise(x, 8)
        if y.rank < 2 or y.shape[1] % 2:
            raise UnfitError("not even")
        size = self.rng.choice([2, y.shape[1] // 2])
        split = self.integers(size) if y.shape[1] % size == 0 else self.integers([1, y.shape[1] - 1])
        widths = [size] * (y.shape[1] // size) if y.shape[1] % size == 0 else [1, y.shape[1] - 1]
        shapes = [(y.shape[0], width, *y.shape[2:]) for width in widths]
        return self.raw("SplitToSequence", [y.name, split], axis=1), shapes

    def changed(self, sequence: str, parts: list[tuple[int, ...]]) -> tuple[str, list[tuple[int, ...]]]:
        """The sequence with one element more, or without one."""
        place = self.rng.randrange(len(parts))
        if self.chance(0.5):
            return self.raw("SequenceErase", [sequence, self.integers(place)]), parts[:place] + parts[place + 1 :]
        new = self.activation(self.tensor(2, 3, 4))
        inserted = self.raw("SequenceInsert", [sequence, new.name, self.integers(place)])
        return inserted, [*parts[:place], new.shape, *parts[place:]]

    def give_sequence(self, sequence: str) -> None:
        element = TypeProto()
        element.tensor_type.elem_type = self.code
        self.results.append(helper.make_value_info(sequence, helper.make_sequence_type_proto(element)))

    def raw(self, op: str, inputs: list[str], **attrs: Any) -> str:
        """Add a node without inference; return its output's name."""
        name = self.name("r")
        self.nodes.append(helper.make_node(op, inputs, [name], **attrs))
        return name

    def made(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.pool.append(Tensor(name, shape))
        return self.pool[-1]
