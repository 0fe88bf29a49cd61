"""Small drawings of a few operators: who reads whom, from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pwopt.graph.regions import Operator

#: Size of a box and the space around it, in pixels.
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 146, 38, 14, 26, 6
#: Height of a tensor's name.
LINE = 14
#: How far a line swings out that passes a layer by.
SWING = 116
#: Operators in one drawing; of larger regions, the first are drawn.
MOST = 14
#: Boxes beside each other, so that a drawing fits a page.
MOST_BESIDE = 6


@dataclass(frozen=True)
class Box:
    """An operator, or (with no operator) a tensor that comes from outside; `x` and `y` are its upper left corner."""

    op: str
    name: str
    x: int
    y: int

    @property
    def height(self) -> int:
        return HEIGHT if self.op else LINE


@dataclass(frozen=True)
class Drawing:
    """Boxes, lines between them as (x₁, y₁, x₂, y₂, swing to the right), and how many operators were left out."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    lines: tuple[tuple[int, int, int, int, int], ...]
    left_out: int


def draw(operators: Sequence[Operator]) -> Drawing:
    """Lay operators out in layers, each below everything it reads.

    Parameters
    ----------
    operators : sequence of Operator
        In an order in which they can run.
    """
    shown = operators[:MOST]
    made = {name for o in shown for name in o.outputs}
    layer: dict[str, int] = {}
    rows: dict[int, list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]] = {}
    for name in dict.fromkeys(n for o in shown for n in o.inputs if n and n not in made):
        layer[name] = 0
        rows.setdefault(0, []).append(("", name, (), (name,)))
    for o in shown:
        deep = 1 + max((layer.get(n, 0) for n in o.inputs if n), default=0)
        layer.update((n, deep) for n in o.outputs)
        rows.setdefault(deep, []).append((o.op, o.name, o.inputs, o.outputs))
    lines_of = [row[i : i + MOST_BESIDE] for _, row in sorted(rows.items()) for i in range(0, len(row), MOST_BESIDE)]
    widest = max((len(row) for row in lines_of), default=1)
    width = 2 * MARGIN + widest * WIDTH + (widest - 1) * GAP_X
    boxes: list[Box] = []
    place: dict[str, Box] = {}
    lines: list[tuple[int, int, int, int, int]] = []
    top = MARGIN
    for row in lines_of:
        left = (width - len(row) * WIDTH - (len(row) - 1) * GAP_X) // 2
        for i, (op, name, inputs, outputs) in enumerate(row):
            box = Box(op, name, left + i * (WIDTH + GAP_X), top)
            boxes.append(box)
            for source in dict.fromkeys(n for n in inputs if n in place):
                above = place[source]
                passes = box.y - above.y - above.height > GAP_Y
                ends = above.x + WIDTH // 2, above.y + above.height, box.x + WIDTH // 2, box.y
                lines.append((*ends, SWING if passes else 0))
            place.update((n, box) for n in outputs)
        top += max(b.height for b in boxes[-len(row) :]) + GAP_Y
    width += 4 * MARGIN if any(swing for *_, swing in lines) else 0
    return Drawing(width, max(MARGIN, top - GAP_Y) + MARGIN, tuple(boxes), tuple(lines), len(operators) - len(shown))
