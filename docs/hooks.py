"""Adapt pages for the site: add all passes with pictures, and redirect links that lead out of docs/."""

from __future__ import annotations

import inspect
import re
from html import escape
from pathlib import Path
from typing import Any

import pwopt
from pwopt.evidence.certify import skip_certificate
from pwopt.reporting.drawing import BOX_HEIGHT, BOX_WIDTH, draw, format_path
from pwopt.rewriting import Pass, Rewrite
from pwopt.selecting.candidate_base import run_passes

ROOT = Path(__file__).parent.parent
#: The address of files in the repository that are not pages.
REPOSITORY = "https://github.com/pwopt/pwopt/blob/main/"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the passes, and redirect links that lead out of docs/ to the repository."""
    if page.file.src_path == "passes.md":
        markdown = markdown.replace("<!-- passes -->", "\n\n".join(map(_section, pwopt.PASSES)))
    return re.sub(r"\]\(\.\./([\w./-]+(?:#[\w-]+)?)\)", rf"]({REPOSITORY}\1)", markdown)


def _section(kind: type[Pass]) -> str:
    rest = (inspect.getdoc(kind) or "").partition("\n\n")[2]
    shown = re.sub(r"(?m)^(?=.)", "", rest)
    found = _example(kind)
    picture = "" if found is None else _picture(found)
    return f"## {kind.name}\n\n*{kind.policy}* · `{kind.identity()}`\n\n{shown}\n\n{picture}"


def _example(kind: type[Pass]) -> Rewrite | None:
    """The smallest rewrite of the pass in the gallery."""
    found: list[Rewrite] = []
    for file in sorted(p for p in (ROOT / "models").glob("*.onnx") if ".pwopt" not in p.name):
        p = kind()
        p.scope = "requested"
        outcome = run_passes(pwopt.load(file), [p], (), {}, None, skip_certificate)
        found += [r for r in outcome.rewrites if r.before and r.after and len(r.before) + len(r.after) < 14]
    return min(found, key=lambda r: len(r.before) + len(r.after), default=None)


def _picture(rewrite: Rewrite) -> str:
    figures = ""
    for name, operators in (("before", rewrite.before), ("after", rewrite.after)):
        shown = f"{name}: {', '.join(o.op for o in operators)}"
        figures += f"<figure><figcaption>{escape(shown)}</figcaption>{_svg(shown, operators)}</figure>"
    return f'<div class="drawings" style="display:flex;flex-wrap:wrap;gap:1rem">{figures}</div>'


def _svg(label: str, operators: Any) -> str:
    d = draw(operators)
    ink = "currentColor"
    lines = "".join(f'<path d="{format_path(line)}" fill="none" stroke="{ink}" opacity=".6"/>' for line in d.lines)
    boxes = ""
    for b in d.boxes:
        middle = b.x + BOX_WIDTH // 2
        if b.op:
            boxes += f'<rect x="{b.x}" y="{b.y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
            boxes += f'fill="none" stroke="{ink}"/>'
        size, y = (12, b.y + 24) if b.op else (10, b.y + b.height - 3)
        boxes += f'<text x="{middle}" y="{y}" font-size="{size}" text-anchor="middle" fill="{ink}">'
        boxes += f"{escape((b.op or b.name)[-20:])}</text>"
    return (
        f'<svg width="{d.width}" height="{d.height}" viewBox="0 0 {d.width} {d.height}" role="img" '
        f'aria-label="{escape(label)}">{lines}{boxes}</svg>'
    )
