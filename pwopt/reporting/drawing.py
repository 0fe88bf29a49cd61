"""Small drawings of a few operators: who reads whom, from top to bottom."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pwopt.graph.changes import Operator

#: Size of a box and the space around it, in pixels.
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 146, 38, 14, 26, 6
#: Height of a tensor's name.
LINE = 14
#: Operators in one drawing; of larger regions, the first are drawn.
MOST = 14
#: Boxes beside each other, so that a drawing fits a page.
MOST_BESIDE = 6

#: Points that a line goes through.
Line = tuple[tuple[int, int], ...]


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
    """Boxes, lines between them as points, and how many operators were left out."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
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
    placed: list[list[Box]] = []
    reads: list[tuple[str, int, Box]] = []
    place: dict[str, tuple[int, Box]] = {}
    top = MARGIN
    for level, row in enumerate(lines_of):
        left = (width - len(row) * WIDTH - (len(row) - 1) * GAP_X) // 2
        placed.append([Box(op, name, left + i * (WIDTH + GAP_X), top) for i, (op, name, _, _) in enumerate(row)])
        for box, (_, _, inputs, outputs) in zip(placed[-1], row, strict=True):
            reads += [(n, level, box) for n in dict.fromkeys(inputs) if n in place]
            place.update((n, (level, box)) for n in outputs)
        top += max(b.height for b in placed[-1]) + GAP_Y
    lines = tuple(_route(*place[name], level, box, placed) for name, level, box in reads)
    shift = max(0, MARGIN - min((x for line in lines for x, _ in line), default=MARGIN))
    beyond = max(0, max((x for line in lines for x, _ in line), default=0) + MARGIN - width)
    boxes = tuple(replace(b, x=b.x + shift) for row in placed for b in row)
    lines = tuple(tuple((x + shift, y) for x, y in line) for line in lines)
    height = max(MARGIN, top - GAP_Y) + MARGIN
    return Drawing(width + shift + beyond, height, boxes, lines, len(operators) - len(shown))


def _route(start: int, above: Box, end: int, below: Box, placed: Sequence[Sequence[Box]]) -> Line:
    """Points from one box to another, through gaps between the boxes of the layers in between."""
    x, goal = above.x + WIDTH // 2, below.x + WIDTH // 2
    points = [(x, above.y + above.height)]
    for level in range(start + 1, end):
        row = placed[level]
        gaps = [row[0].x - GAP_X // 2, *(b.x + WIDTH + GAP_X // 2 for b in row)]
        straight = x + (goal - x) // (end - level + 1)
        x = min(gaps, key=lambda gap: abs(gap - straight))
        points += [(x, row[0].y), (x, row[0].y + max(b.height for b in row))]
    return (*points, (goal, below.y))


def path(line: Line) -> str:
    """A line as an SVG path: curves from layer to layer, straight where it passes boxes."""
    drawn = f"M{line[0][0]} {line[0][1]}"
    for k, ((x1, y1), (x2, y2)) in enumerate(itertools.pairwise(line)):
        bend = min(13, (y2 - y1) // 2)
        drawn += f"C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}" if k % 2 == 0 else f"V{y2}"
    return drawn
