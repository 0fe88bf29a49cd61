"""Small drawings of graphs: operators from top to bottom, connected by their tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pwopt.graph.changes import Operator

#: Size of a box and the space around it, in pixels.
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 146, 38, 14, 26, 6
#: Height of a tensor's name, in pixels.
LABEL_HEIGHT = 14
#: Maximum number of operators in one drawing; further ones are left out.
MAX_BOXES = 14
#: Maximum number of boxes side by side, so that a drawing fits on a page.
MAX_BOXES_PER_ROW = 6

#: Points along a line, in pixels.
Line = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Box:
    """An operator, or (if `op` is empty) an input tensor. `x` and `y` are the upper left corner, in pixels."""

    op: str
    name: str
    x: int
    y: int

    @property
    def height(self) -> int:
        return BOX_HEIGHT if self.op else LABEL_HEIGHT


@dataclass(frozen=True)
class Drawing:
    """Boxes, lines between them, and the number of operators left out."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    left_out: int


def draw(operators: Sequence[Operator]) -> Drawing:
    """Lay out operators in layers; each operator is below its inputs.

    Parameters
    ----------
    operators : sequence of Operator
        In topological order.
    """
    shown = operators[:MAX_BOXES]
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
    lines_of = [
        row[i : i + MAX_BOXES_PER_ROW] for _, row in sorted(rows.items()) for i in range(0, len(row), MAX_BOXES_PER_ROW)
    ]
    widest = max((len(row) for row in lines_of), default=1)
    width = 2 * MARGIN + widest * BOX_WIDTH + (widest - 1) * GAP_X
    placed: list[list[Box]] = []
    reads: list[tuple[str, int, Box]] = []
    place: dict[str, tuple[int, Box]] = {}
    top = MARGIN
    for level, row in enumerate(lines_of):
        left = (width - len(row) * BOX_WIDTH - (len(row) - 1) * GAP_X) // 2
        placed.append([Box(op, name, left + i * (BOX_WIDTH + GAP_X), top) for i, (op, name, _, _) in enumerate(row)])
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
    """Route a line from one box to another through the gaps between boxes of the layers in between."""
    x, goal = above.x + BOX_WIDTH // 2, below.x + BOX_WIDTH // 2
    points = [(x, above.y + above.height)]
    for level in range(start + 1, end):
        row = placed[level]
        gaps = [row[0].x - GAP_X // 2, *(b.x + BOX_WIDTH + GAP_X // 2 for b in row)]
        straight = x + (goal - x) // (end - level + 1)
        x = min(gaps, key=lambda gap: abs(gap - straight))
        points += [(x, row[0].y), (x, row[0].y + max(b.height for b in row))]
    return (*points, (goal, below.y))


def format_path(line: Line) -> str:
    """Convert a line to an SVG path: curved between layers, straight where it passes boxes."""
    drawn = f"M{line[0][0]} {line[0][1]}"
    for k, ((x1, y1), (x2, y2)) in enumerate(itertools.pairwise(line)):
        bend = min(13, (y2 - y1) // 2)
        drawn += f"C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}" if k % 2 == 0 else f"V{y2}"
    return drawn
