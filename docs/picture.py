"""Draw the picture in README.md, a gallery model before and after pwopt: `python docs/picture.py`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import onnx

import pwopt

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "before_after.svg"
#: A chain, which can be drawn in one line: normalisation, whitening, projection, classifier.
MODEL = ROOT / "models" / "hyperspectral.onnx"
#: Width and height of a box, length of an arrow, margin, and height of a line of text, in pixels.
WIDTH, HEIGHT, GAP, MARGIN, LINE = 104, 40, 34, 16, 20
#: Text, secondary text, background, removed operators, new operators; for light and dark mode.
LIGHT = ("#1b1f24", "#59636e", "#fff", "#6f7b87", "#0b62c4")
DARK = ("#e7eaee", "#9da7b3", "#0d1117", "#7d8894", "#65aefc")
STYLE = """text{{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:{0};text-anchor:middle}}
.start{{text-anchor:start}}.soft{{fill:{1};font-size:11px}}.paper{{fill:{2}}}rect,path{{fill:none;stroke:{0}}}
.old{{stroke:{3};stroke-dasharray:5 3}}.new{{stroke:{4};stroke-width:2}}"""


def picture() -> str:
    """Return the model before and after as SVG, with the same bytes on every machine."""
    before = onnx.shape_inference.infer_shapes(onnx.load(MODEL))
    result = pwopt.optimize(MODEL, cost="analytic", verify=False)
    after = onnx.shape_inference.infer_shapes(result.model)
    kept = {n.name for n in before.graph.node if any(n == m for m in after.graph.node)}
    rows = ((before, "old", result.report.before), (after, "new", result.report.after))
    width = 2 * MARGIN + max(_width(m.graph.node) for m, *_ in rows)
    pitch = HEIGHT + 3 * LINE
    drawn = ""
    for k, (model, tone, cost) in enumerate(rows):
        top = MARGIN + k * pitch
        said = f"{cost.nodes} operators, {cost.params:,} parameters, {cost.macs:,} multiply-adds"
        drawn += f'<text class="start" x="{MARGIN}" y="{top + 13}">{"After" if k else "Before"}: {said}</text>\n'
        drawn += _chain(model, kept, tone, top + 2 * LINE - 8)
    height = 2 * MARGIN + 2 * pitch - 12
    style = f"{STYLE.format(*LIGHT)}\n@media (prefers-color-scheme:dark){{{STYLE.format(*DARK)}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">\n<title>{MODEL.stem} before and after pwopt</title>\n<style>{style}</style>\n'
        f'<rect class="paper" style="stroke:none" width="{width}" height="{height}"/>\n{drawn}</svg>\n'
    )


def _width(nodes: Sequence[onnx.NodeProto]) -> int:
    return len(nodes) * (WIDTH + GAP) + GAP


def _channels(model: onnx.ModelProto) -> dict[str, str]:
    """The number above an arrow: the channels of each tensor."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {v.name: str(v.type.tensor_type.shape.dim[1].dim_value) for v in values}


def _chain(model: onnx.ModelProto, kept: set[str], tone: str, top: int) -> str:
    """Draw operators from left to right; those that are not in both models get the class `tone`."""
    channels, drawn, nodes = _channels(model), "", model.graph.node
    middle = top + HEIGHT // 2
    flowing = [model.graph.input[0].name, *(n.output[0] for n in nodes)]
    for i, name in enumerate(flowing):
        x = MARGIN + i * (WIDTH + GAP)
        drawn += f'<path d="M{x + 3} {middle}h{GAP - 6}m-5 -4l5 4l-5 4"/>'
        drawn += f'<text class="soft" x="{x + GAP // 2}" y="{middle - 9}">{channels.get(name, "")}</text>\n'
    for i, node in enumerate(nodes):
        x = MARGIN + GAP + i * (WIDTH + GAP)
        mark = "" if node.name in kept else f' class="{tone}"'
        weights = [t for t in model.graph.initializer if t.name in node.input and len(t.dims) > 1]
        size = "×".join(str(d) for t in weights[:1] for d in t.dims if d > 1)
        drawn += f'<rect{mark} x="{x}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        centre = x + WIDTH // 2
        drawn += f'<text x="{centre}" y="{top + (18 if size else 25)}">{escape(node.op_type)}</text>'
        drawn += f'<text class="soft" x="{centre}" y="{top + 33}">{size}</text>\n' if size else "\n"
    return drawn


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8", newline="\n")
