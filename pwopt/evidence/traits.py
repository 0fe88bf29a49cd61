"""What certificates know about each operator: one row per operator.

This table is independent of `pwopt.graph.operators`, which the passes rely on: certificates must not use what they
check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Attributes = Mapping[str, Any]


def _always(_attributes: Attributes) -> bool:
    return True


def _same_pads(attributes: Attributes) -> bool:
    return attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def _rounds_up(attributes: Attributes) -> bool:
    return bool(attributes.get("ceil_mode", 0)) or _same_pads(attributes)


def _odd_coordinates(attributes: Attributes) -> bool:
    return attributes.get("coordinate_transformation_mode") in ("align_corners", "tf_half_pixel_for_nn")


@dataclass(frozen=True)
class Traits:
    """Traits of an operator.

    Attributes
    ----------
    numbers : sequence of int
        Inputs that hold numbers to compute with, not shapes, axes, limits or exponents.
    affine : {"", "first", "all", "product"}
        In which inputs it is affine: in the first one, whatever else it reads; in all inputs together; or in one of
        the first two. "" if in none.
    random : bool
        Whether it gives a different result each time.
    sized : bool
        Whether it may read a size or position that the model fixes. A change with such operators is evaluated with
        the model's own sizes only.
    wrong : callable or None
        Returns for which attributes onnx's reference evaluator is wrong (where no definition of `operators` applies).
    """

    numbers: Sequence[int] = ()
    affine: Literal["", "first", "all", "product"] = ""
    random: bool = False
    sized: bool = False
    wrong: Callable[[Attributes], bool] | None = None


_FIRST, _RANDOM = Traits(affine="first"), Traits(random=True)
_MANY = range(64)
OPERATOR_TRAITS: Mapping[str, Traits] = {
    "Add": Traits((0, 1), "all"),
    "Attention": Traits(wrong=_always),
    "AveragePool": Traits(affine="first", wrong=_same_pads),
    "BatchNormalization": Traits((1, 2, 3, 4), "first", wrong=_always),
    "Bernoulli": _RANDOM,
    "Cast": _FIRST,
    "Clip": Traits((1, 2)),
    "Concat": Traits(_MANY, "all"),
    "Conv": Traits((1, 2), "first"),
    "ConvTranspose": Traits((1, 2), "first", wrong=_same_pads),
    "DepthToSpace": _FIRST,
    "Div": Traits((0, 1), "first"),
    "Dropout": _FIRST,
    "Expand": Traits(affine="first", sized=True),
    "Flatten": _FIRST,
    "FusedConv": Traits((1, 2, 3)),
    "FusedGemm": Traits((0, 1, 2)),
    "FusedMatMul": Traits((0, 1)),
    "Gather": Traits(affine="first", sized=True),
    "Gemm": Traits((0, 1, 2), "product"),
    "GlobalAveragePool": _FIRST,
    "Identity": _FIRST,
    "LpPool": Traits(wrong=_rounds_up),
    "MatMul": Traits((0, 1), "product"),
    "Max": Traits((0, 1)),
    "MaxPool": Traits(wrong=_same_pads),
    "MaxRoiPool": Traits(wrong=_always),
    "MaxUnpool": Traits(wrong=_always),
    "Mean": Traits(_MANY, "all"),
    "Min": Traits((0, 1)),
    "Mul": Traits((0, 1), "product"),
    "Multinomial": _RANDOM,
    "Neg": _FIRST,
    "PRelu": Traits((1,)),
    "Pad": Traits((2,), "first"),
    "RandomNormal": _RANDOM,
    "RandomNormalLike": _RANDOM,
    "RandomUniform": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "ReduceMean": _FIRST,
    "ReduceSum": _FIRST,
    "Reshape": Traits(affine="first", sized=True),
    "Resize": Traits(affine="first", wrong=_odd_coordinates),
    "RoiAlign": Traits(wrong=_always),
    "Shape": Traits(sized=True),
    "Size": Traits(sized=True),
    "Slice": Traits(affine="first", sized=True),
    "SpaceToDepth": _FIRST,
    "Split": _FIRST,
    "Squeeze": _FIRST,
    "Sub": Traits((0, 1), "all"),
    "Sum": Traits(_MANY, "all"),
    "Tile": Traits(affine="first", sized=True),
    "Transpose": _FIRST,
    "Unsqueeze": _FIRST,
    "Upsample": _FIRST,
}
_NONE = Traits()


def find_traits(op: str) -> Traits:
    """Return the traits of an operator; one without a row has none."""
    return OPERATOR_TRAITS.get(op, _NONE)
