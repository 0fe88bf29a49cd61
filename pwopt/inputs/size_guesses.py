"""Guess the sizes of open axes from metadata, names and positions; each guess has a reason and a rank of trust."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import onnx

from pwopt.inputs import shape_constraints
from pwopt.inputs.input_specs import InputSpec
from pwopt.inputs.metadata import (
    BATCH_KEYS,
    CHANNEL_KEYS,
    FRAME_KEYS,
    LATENT_KEYS,
    LENGTH_KEYS,
    MAX_LENGTH_KEYS,
    RATE_KEYS,
    STRIDE_KEYS,
    Metadata,
)

#: Sizes (height, width) to try for dynamic images, in order: for classifiers, detectors and text recognisers.
IMAGE_SIZES = ((224, 224), (320, 320), (640, 640), (48, 320), (32, 320), (48, 192), (256, 256), (512, 512))
#: The largest height of an image that is taken for a line of text, and the width that such a line gets.
MAX_TEXT_HEIGHT, TEXT_WIDTH = 64, 320
#: Latents of diffusion models, which have 4 channels and an eighth of the size of images of 512 or 256 pixels.
LATENT_SIZES = ((64, 64), (32, 32))
#: Frames of a video, and their height and width.
CLIP, CLIP_SIZE = 16, 112
#: Samples in a second of speech.
WAVEFORM = 16_000
#: The size of any other axis.
LENGTH_SIZE = 64


class Trust(IntEnum):
    """Where a size comes from, the most trustworthy source first."""

    GIVEN = 0
    DECLARED = 1
    METADATA = 2
    GRAPH = 3
    SIBLING = 4
    NAME = 5
    PLACE = 6
    SPARE = 7


@dataclass(frozen=True)
class Guess:
    """Sizes for the axes of a group, in its order, with the reason and its rank of trust."""

    sizes: tuple[int, ...]
    why: str
    trust: Trust


@dataclass(frozen=True)
class AxisGroup:
    """Open axes whose sizes are chosen together.

    Attributes
    ----------
    axes : tuple of str
        Their symbols.
    role : str
        A key of `USUAL`, or "image", "total".
    guesses : tuple of Guess
        The likeliest first.
    step : int
        Sizes are multiples of this where possible.
    """

    axes: tuple[str, ...]
    role: str
    guesses: tuple[Guess, ...]
    step: int = 1

    def insert(self, *guesses: Guess) -> AxisGroup:
        """Insert guesses before those of less trust; each size stays once."""
        merged = sorted([*guesses, *self.guesses], key=lambda g: g.trust)
        unique = {g.sizes: g for g in reversed(merged)}
        return AxisGroup(self.axes, self.role, tuple(g for g in merged if unique[g.sizes] is g), self.step)

    def without(self, axes: Collection[str]) -> AxisGroup:
        """Remove some axes from the group."""
        left = [i for i, a in enumerate(self.axes) if a not in axes]
        guesses = (replace(g, sizes=tuple(g.sizes[i] for i in left)) for g in self.guesses)
        return AxisGroup(tuple(self.axes[i] for i in left), self.role, (), self.step).insert(*guesses)


#: The role of an axis by the words of its name; the first pattern that fits counts.
NAMES = (
    ("past", r"past|cache"),
    ("total", r"total"),
    ("batch", r"n|b|bs|bsz|batch|nbatch"),
    ("height", r"h|height|rows|imgh|ih"),
    ("width", r"w|width|cols|columns|imgw|iw"),
    ("channel", r"c|channels?|chans?"),
    ("samples", r"samples?|audio|wav|waveforms?|signal"),
    ("frames", r"frames?|time|t|times|timesteps?|steps"),
    ("depth", r"d|depth|slices"),
    ("tokens", r"s|l|seq|seqlen|sequence|tokens?|len|length|words?|text|ids|context|prompt|src|tgt|(de|en)c(oder)?"),
    ("number", r"num|nodes|edges|points|boxes|rois|proposals|objects|queries|count"),
)  # fmt: skip
#: The reason of a guess that rests on an axis's name.
BY_NAME = "by its name"
#: Roles that a single letter may wrongly suggest.
LETTERS = ("depth", "channel", "batch")
#: Usual sizes by role: the default first, then alternatives.
USUAL = {
    "past": (16, 0, 1),
    "total": (128, 64),
    "batch": (1,),
    "channel": (3, 1, 4),
    "samples": (WAVEFORM, 8_000, 48_000, 4_096, 1_024, 512),
    "frames": (400, 64, 128, 100, 80, 32, 16, 8, 1),
    "depth": (CLIP, 8, 32, 1),
    "tokens": (128, 64, 32, 16, 512, 8, 1),
    "number": (256, 64, 16, 1),
    "length": (LENGTH_SIZE, 128, 32, 16, 256, 512, 8, 1, 3, 2),
    "height": (224,),
    "width": (224,),
}


def role_by_name(name: str) -> str | None:
    """Find the role of an axis by its name, such as batch_size or num_frames; None if the name says nothing."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) if not name.startswith("axis ") else []
    stated = [word.lower() for word in words]
    if len(stated) > 1:  # a letter is a word only if it is alone
        stated = [word for word in stated if len(word) > 1]
    if re.search(r"\d", name) and len(stated) == 1 and len(stated[0]) == 1:  # s77 is a numbered symbol
        return None
    return next((role for role, fits in NAMES if any(re.fullmatch(fits, word) for word in stated)), None)


def image_axes(spec: InputSpec) -> tuple[int, int, int] | None:
    """Find the axes of channels, height and width by position; None if the input is no image or video."""
    shape = spec.shape or ()
    rank, first, last = len(shape), *(shape[1:2] or (None,)), *(shape[-1:] or (None,))
    if spec.dtype.kind != "f" and spec.dtype.name not in ("uint8", "int8", "bfloat16"):
        return None
    if rank == 3 and shape[0] == 3 and not _is_fixed(first) and not _is_fixed(last):
        return 0, 1, 2
    if rank == 3 and spec.dtype.kind == "u" and last in (1, 3, 4) and not _is_fixed(first):
        return 2, 0, 1
    if rank not in (4, 5):
        return None
    if not _is_fixed(first) and _is_fixed(last) and (last in (1, 3, 4) or not _is_fixed(shape[-2])):
        return rank - 1, rank - 3, rank - 2
    if rank == 5 and not _is_fixed(first) and shape[2] in (1, 3, 4):
        return 2, 3, 4
    return 1, rank - 2, rank - 1


def _is_fixed(d: object) -> bool:
    return isinstance(d, int) and d > 0


def role_by_position(spec: InputSpec, axis: int, waveform: bool) -> str:
    """Find the role of an axis by the rank and the other sizes of its input."""
    if re.search(r"past|cache", spec.name) and axis > 0 and len(spec.shape or ()) > 3:
        return "past"
    places = image_axes(spec)
    if places is not None and axis in places:
        return ("channel", "height", "width")[places.index(axis)]
    if axis == 0:
        return "batch"
    if places is not None:
        return "depth"
    return "samples" if waveform or (_is_audio(spec) and axis == 2) else "length"


def _is_audio(spec: InputSpec) -> bool:
    """Whether an input holds one or two audio signals."""
    shape = spec.shape or ()
    return len(shape) == 3 and spec.dtype.kind == "f" and shape[1] in (1, 2)


@dataclass(frozen=True)
class OpenAxes:
    """The open axes of a model's inputs.

    Attributes
    ----------
    shapes : dict
        Input name → shape, with a symbol for each open axis.
    derived : dict
        Symbols that are computed from others, each with its expression.
    groups : tuple of AxisGroup
        The axes to choose.
    given : mapping of symbol to size
    """

    shapes: dict[str, tuple[int | str, ...]]
    derived: dict[str, ast.expr]
    groups: tuple[AxisGroup, ...]
    given: Mapping[str, int]

    def sizes(self, chosen: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Compute the shapes of all inputs from the sizes of the open axes."""
        values = {**self.given, **chosen}
        for name, expression in self.derived.items():
            values[name] = max(0, _evaluate(expression, values))
        return {
            name: tuple(values[d] if isinstance(d, str) else d for d in shape) for name, shape in self.shapes.items()
        }


def find_open_axes(
    specs: Sequence[InputSpec], model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None
) -> OpenAxes:
    """Find the open axes, with guesses from metadata, names and positions.

    Parameters
    ----------
    given : mapping of input name to sizes, optional
        These stay as they are. Axes of the same name in other inputs get the same sizes.
    """
    given = given or {}
    shapes: dict[str, tuple[int | str, ...]] = {}
    bound: dict[str, int] = {}
    for spec in specs:
        if spec.name in given:
            shapes[spec.name] = tuple(given[spec.name])
            for d, size in zip(spec.shape or (), given[spec.name], strict=False):
                if isinstance(d, str) and d != "?":
                    bound.setdefault(d, size)
        else:
            shapes[spec.name] = shape_constraints.name_open_axes(spec.name, spec.shape or ())
    shapes = {
        name: tuple(bound.get(d, d) if isinstance(d, str) else d for d in shape) for name, shape in shapes.items()
    }
    asked = [s for s in specs if s.name not in given]
    groups = _group_axes(asked, shapes, model)
    derived = _find_derived({a: g.role for g in groups for a in g.axes}, bound)
    groups = [_prefer_declared_zero(g, asked, shapes) for g in (g.without(derived) for g in groups) if g.axes]
    return OpenAxes(shapes, derived, tuple(groups), bound)


def _group_axes(
    specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int | str, ...]], model: onnx.ModelProto
) -> list[AxisGroup]:
    metadata = Metadata(model)
    seen: set[str] = set()
    groups = []
    for spec in specs:
        waveform = shape_constraints.reads_waveform(model, spec.name)
        roles: dict[str, tuple[str, str]] = {}
        for axis, d in enumerate(shapes[spec.name]):
            if isinstance(d, str) and d not in seen:
                named, placed = _role_in_input(spec, d, waveform), role_by_position(spec, axis, waveform)
                if named in LETTERS and axis and (len(d) == 1 or placed in ("height", "width", "samples")):
                    named = None if placed != "channel" else named  # a number of points is no batch
                roles[d] = (named or placed, BY_NAME if named else f"by its place in {spec.name!r}")
        seen.update(roles)
        pixels = tuple(d for d, (role, _) in roles.items() if role in ("height", "width"))
        if pixels:
            groups.append(_group_image(spec, shapes[spec.name], pixels, roles, specs, metadata))
        for d, (role, why) in roles.items():
            if d not in pixels:
                groups.append(_group_single(d, role, why, metadata))
    return groups


def _role_in_input(spec: InputSpec, name: str, waveform: bool) -> str | None:
    """Find the role of an axis by its name and its input: time is samples in a signal, and frames in a video."""
    named = role_by_name(name)
    if named in ("frames", "depth", "tokens") and (waveform or (named == "frames" and _is_audio(spec))):
        return "samples"
    return "depth" if named == "frames" and len(spec.shape or ()) == 5 else named


def _group_single(axis: str, role: str, why: str, metadata: Metadata) -> AxisGroup:
    first, *others = USUAL[role]
    trust = Trust.NAME if why == BY_NAME else Trust.PLACE
    group = AxisGroup((axis,), role, tuple(Guess((size,), "a common size", Trust.SPARE) for size in others))
    group = group.insert(Guess((first,), why, trust))
    keys = {
        "batch": BATCH_KEYS,
        "channel": CHANNEL_KEYS,
        "samples": RATE_KEYS,
        "frames": FRAME_KEYS,
        "depth": FRAME_KEYS,
        "tokens": LENGTH_KEYS,
        "length": LENGTH_KEYS,
    }
    stated = metadata.number(keys[role], high=1 << 17) if role in keys else None
    if stated is None and role in ("tokens", "length"):
        longest = metadata.number(MAX_LENGTH_KEYS)
        stated = (min(128, longest[0]), longest[1]) if longest else None
    return group if stated is None else group.insert(Guess((stated[0],), _explain_key(stated[1]), Trust.METADATA))


def _group_image(
    spec: InputSpec,
    shape: tuple[int | str, ...],
    pixels: tuple[str, ...],
    roles: Mapping[str, tuple[str, str]],
    specs: Sequence[InputSpec],
    metadata: Metadata,
) -> AxisGroup:
    """Group height and width, of which one may be fixed."""

    def select(pair: tuple[int, int]) -> tuple[int, ...]:
        """Select the sizes of the open axes from a height and a width."""
        return tuple(pair[0] if roles[d][0] == "height" else pair[1] for d in pixels)

    usual: Sequence[tuple[int, int]] = IMAGE_SIZES
    why = roles[pixels[0]][1]
    if len(pixels) > 1:
        why = "by their names" if why == BY_NAME else why.replace("its", "their", 1)
    if len(shape) == 5:
        usual = ((CLIP_SIZE, CLIP_SIZE), *IMAGE_SIZES)
    elif len(shape) == 4 and shape[1] == 4 and any(len(s.shape or ()) <= 3 for s in specs if s is not spec):
        usual, why = (*LATENT_SIZES, *IMAGE_SIZES), "4 channels beside another input are latents of a diffusion model"
    trust = Trust.NAME if roles[pixels[0]][1] == BY_NAME else Trust.PLACE
    stride = metadata.number(STRIDE_KEYS, 2, 128)
    group = AxisGroup(pixels, "image", (), stride[0] if stride else 1)
    group = group.insert(*(Guess(select(pair), "a common size", Trust.SPARE) for pair in usual[1:]))
    group = group.insert(Guess(select(usual[0]), why, trust))
    group = group.insert(*_guess_from_siblings(spec, pixels, roles, specs, select))
    stated = (metadata.image(LATENT_KEYS) if shape[1:2] == (4,) else None) or metadata.image()
    return group if stated is None else group.insert(Guess(select(stated[0]), _explain_key(stated[1]), Trust.METADATA))


def _explain_key(key: str) -> str:
    return f"from {key!r} in the metadata"


def _guess_from_siblings(
    spec: InputSpec,
    pixels: tuple[str, ...],
    roles: Mapping[str, tuple[str, str]],
    specs: Sequence[InputSpec],
    select: Callable[[tuple[int, int]], tuple[int, ...]],
) -> list[Guess]:
    """Guess sizes from a fixed input of the same rank, or a height or width from the other one."""
    found = []
    shape, places = spec.shape or (), image_axes(spec)
    for other in specs:
        axes = image_axes(other)
        if other is spec or axes is None or len(other.shape or ()) != len(shape):
            continue
        high, wide = ((other.shape or ())[a] for a in axes[1:])
        if isinstance(high, int) and isinstance(wide, int) and min(high, wide) > 0:
            found.append(Guess(select((high, wide)), f"as {other.name!r} beside it", Trust.SIBLING))
    sides = [d for d in (shape[a] for a in places[1:]) if isinstance(d, int) and d > 0] if places else []
    if sides and len(pixels) == 1:
        line = (
            sides[0] <= MAX_TEXT_HEIGHT
            and roles[pixels[0]][0] == "width"
            and places is not None
            and shape[places[0]] in (1, 3)
        )
        why = f"beside a height of {sides[0]}, as lines of text have it" if line else "as the other side of it"
        found.append(Guess((TEXT_WIDTH if line else sides[0],), why, Trust.SIBLING))
    return found


def _prefer_declared_zero(
    group: AxisGroup, specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int | str, ...]]
) -> AxisGroup:
    """Put a declared 0 first: it is an empty key-value cache, or a size that the exporter did not know."""
    for spec in specs:
        for d, name in zip(spec.shape or (), shapes[spec.name], strict=True):
            if d == 0 and group.axes == (name,):
                return group.insert(Guess((0,), "declared as 0", Trust.DECLARED))
    return group


def _find_derived(roles: Mapping[str, str], bound: Mapping[str, int]) -> dict[str, ast.expr]:
    """Find axes whose names are expressions over other names. A total length is the past plus the new length."""
    names = {**dict.fromkeys(roles, ""), **bound}
    found: dict[str, ast.expr] = {}
    for name, role in roles.items():
        try:
            expression = ast.parse(name, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            expression = None
        parts = {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)} if expression is not None else set()
        if expression is not None and not isinstance(expression, ast.Name) and parts and parts <= set(names) - {name}:
            found[name] = expression
        elif role == "total":
            past = next((n for n, r in roles.items() if r == "past"), None)
            new = next((n for n, r in roles.items() if r == "tokens"), None)
            if past is not None and new is not None:
                found[name] = ast.BinOp(ast.Name(past), ast.Add(), ast.Name(new))
    return found


#: Arithmetic in names of axes; a division rounds down.
AXIS_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // (b or 1),
    ast.Div: lambda a, b: a // (b or 1),
}


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    """Evaluate an expression; parts that it does not understand count as 1."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return values.get(node.id, 1)
    if isinstance(node, ast.BinOp) and type(node.op) in AXIS_ARITHMETIC:
        return AXIS_ARITHMETIC[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    return 1
