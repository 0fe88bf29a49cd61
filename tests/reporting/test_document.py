"""Documents: one file that loads nothing, in which every name from a model is text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MODELS, normal, parse, run_command

import pwopt
from pwopt.errors import UsageError
from pwopt.evidence.verify import verify
from pwopt.graph.changes import Operator
from pwopt.optimizing.batch import BatchRow
from pwopt.optimizing.optimizer import Result, optimize
from pwopt.reporting.document import (
    SCRIPT,
    clip,
    escape_markdown,
    format_gain,
    render_document,
    render_properties_page,
)
from pwopt.reporting.drawing import BOX_WIDTH, MAX_BOXES, draw
from pwopt.reporting.formats import parse_format
from pwopt.reporting.index import render_index as index_page
from pwopt.reporting.report import LAYOUT_CHANGES, Comparison, Layer, Report, to_json
from pwopt.reporting.verdicts import format_scientific
from pwopt.rewriting.ratios import format_ratio
from pwopt.running.installation import describe_machine
from pwopt.selecting.weight_properties import properties

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parent.parent.parent
#: A name that runs in a careless page, breaks a careless table, and hides in a careless terminal.
EVIL = "<script>console.error('pwned')</script>|`*_\u202e\"'&amp;"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def evil_model() -> onnx.ModelProto:
    """Every name is EVIL, with a number to tell them apart."""
    model = parse(
        "(float[1,4,6,6] x) => (float[N] y) { h = Conv(x, w) r = Relu(h) a = Conv(r, u) s = Mul(a, k) y = Add(s, c) }",
        w=normal(6, 4, 1, 1, dtype=np.float32), u=normal(5, 6, 1, 1, seed=1, dtype=np.float32),
        k=normal(5, 1, 1, seed=2, dtype=np.float32), c=normal(5, 1, 1, seed=3, dtype=np.float32),
    )  # fmt: skip
    names = {"": ""}

    def evil(name: str) -> str:
        return names.setdefault(name, f"{EVIL}{len(names)}")

    graph = model.graph
    for node in graph.node:
        node.name = evil(f"node {node.output[0]}")
        node.input[:], node.output[:] = [*map(evil, node.input)], [*map(evil, node.output)]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = evil(value.name)
    return model


@pytest.fixture(scope="module")
def report() -> Report:
    kept = ["fold-affine", "fold-chains"]  # what is asked for by name is kept, however fast it is
    result = optimize(evil_model(), measuring=pwopt.Measuring(race_seconds=0.1), passes=kept)
    return replace(result.report, command="pwopt optimize 'a <b>.onnx'")


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_document(report, "html")


class Elements(html.parser.HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_are_text(page: str) -> None:
    found = Elements(page)
    assert found.tags.count("script") == 1  # the filter of the table of layers
    assert "<script>console.error('pwned')</script>|`*_\N{REPLACEMENT CHARACTER}\"'&amp;" in found.text
    assert "\u202e" not in page


def test_the_page_loads_nothing(page: str) -> None:
    found = Elements(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not [
        a for a, _ in found.attributes if a in ("src", "srcset", "href", "action", "data") or a.startswith("on")
    ]
    assert not [v for a, v in found.attributes if a == "xlink:href" and not (v or "").startswith("#")]
    namespaces = {v for a, v in found.attributes if a.startswith("xmlns")}
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= namespaces
    assert "@import" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert script == SCRIPT
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_says_what_happened(report: Report, page: str) -> None:
    text = " ".join(Elements(page).text.split())
    assert text.index("Equivalent") < text.index("Size and speed") < text.index("What was rewritten")
    assert "Certified" in text
    assert "A(Wx + b) = (AW)x + Ab" in text
    assert "pwopt optimize 'a <b>.onnx'" in text
    assert report.latency is not None
    assert format_ratio(report.latency.speedup, *report.latency.interval) in text
    assert "Where the time goes" in text
    assert {"details", "svg", "table"} <= set(Elements(page).tags)
    for key in ("onnxruntime", "numpy", "cpu"):
        assert str(report.environment[key]) in text


def test_plots_take_the_pages_colours(page: str) -> None:
    assert "var(--after)" in page
    assert "#030303" not in page
    assert "mathdefault" not in page


def test_documents_are_the_same_each_time(report: Report, page: str) -> None:
    assert render_document(report, "html") == page
    assert render_document(report, "markdown") == render_document(report, "markdown")


def test_markdown_shows_names_as_text(report: Report) -> None:
    text = render_document(report, "markdown")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table
    assert "## What was rewritten" in text
    assert "certified" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a|b", "a\\|b"), ("<b>", "&lt;b&gt;"), ("x_y*z", "x\\_y\\*z"), ("a\nb", "a b"), ("`r`", "\\`r\\`"), (7, "7")],
)
def test_in_markdown(given: Any, shown: str) -> None:
    assert escape_markdown(given) == shown


def test_numbers_and_names_are_short() -> None:
    assert format_scientific("6e-08") == "6×10⁻⁸"
    assert format_scientific("1.5") == "1.5"
    assert format_scientific("inf") == "inf"
    assert clip("layers/block1/conv", 8) == "…k1/conv"
    assert len(clip("x" * 50)) == 20


def test_a_file_name_chooses_the_format() -> None:
    kinds = [parse_format(Path(name)) for name in ("a.html", "a.HTM", "a.md", "a.json")]
    assert kinds == ["html", "html", "markdown", "json"]
    for name in ("a.txt", "a"):
        with pytest.raises(UsageError, match=r"use the suffix .html, .md or .json"):
            parse_format(Path(name))


def test_a_failure_says_where_it_begins(tmp_path: Path) -> None:
    model = onnx.load(MODELS / "network_in_network.onnx")
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    name = next(n for n in wrong.graph.node if n.op_type == "Conv").input[1]
    weight = next(t for t in wrong.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[3] += 1.0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, name))
    equivalence = verify(model, wrong)
    assert not equivalence.passed
    found = Comparison("a.onnx", "b.onnx", "cpu", describe_machine(), equivalence)
    text = " ".join(Elements(render_document(found, "html")).text.split())
    assert "Not equivalent" in text
    assert "First difference" in text
    assert "Not equivalent" in render_document(found, "markdown")


def test_a_report_of_nothing_done() -> None:
    model = parse("(float[1,4] x) => (float[N] y) { y = Exp(x) }")
    report = optimize(model, cost="analytic", verify=False).report
    assert "Unchanged" in render_document(report, "html")
    assert "Unchanged" in render_document(report, "markdown")


def test_many_outputs_and_rewrites_are_collapsed() -> None:
    pairs = "".join(f" h{i} = Mul(x, k) y{i} = Add(h{i}, c)" for i in range(12))
    outputs = ", ".join(f"float[N] y{i}" for i in range(12))
    k, c = np.float32(2), normal(4, 1, 1, dtype=np.float32)
    report = optimize(parse(f"(float[1,4,3,3] x) => ({outputs}) {{{pairs} }}", k=k, c=c), cost="analytic").report
    assert "4 more outputs" in render_document(report, "html")


def test_spectra_are_drawn() -> None:
    path = MODELS / "linear_sequence.onnx"
    text = render_properties_page(properties(path), path)
    assert Elements(text).tags.count("svg") == 4
    assert "linear_sequence.onnx" in text


def test_a_drawing_has_each_operator_below_what_it_reads() -> None:
    chain = [
        Operator("Conv", "a", ("x",), ("p",)),
        Operator("Relu", "b", ("p",), ("q",)),
        Operator("Add", "c", ("p", "q"), ("y",)),
    ]
    found = draw(chain)
    assert [b.op for b in found.boxes] == ["", "Conv", "Relu", "Add"]
    assert [b.y for b in found.boxes] == sorted({b.y for b in found.boxes})
    assert len(found.lines) == 4
    assert sorted(map(len, found.lines)) == [2, 2, 2, 4]  # one goes past the Relu
    for line in found.lines:
        for (x1, y1), (x2, y2) in itertools.pairwise(line):
            assert y1 < y2
            middle = (x1 + x2) / 2, (y1 + y2) / 2
            assert not any(b.x < middle[0] < b.x + BOX_WIDTH and b.y < middle[1] < b.y + b.height for b in found.boxes)
    assert all(b.x >= 0 and b.x < found.width and b.y + b.height <= found.height for b in found.boxes)


def test_large_drawings_leave_operators_out() -> None:
    many = [Operator("Relu", str(i), (f"t{i}",), (f"t{i + 1}",)) for i in range(MAX_BOXES + 5)]
    assert draw(many).left_out == 5
    assert draw([]).boxes == ()


def test_the_command_line_writes_documents(tmp_path: Path) -> None:
    source = tmp_path / "seq.onnx"
    source.write_bytes((MODELS / "linear_sequence.onnx").read_bytes())
    arguments = [
        "optimize",
        str(source),
        "--cost",
        "analytic",
        "--shape",
        "x=1x64x8x8",
        "--report",
        str(tmp_path / "r.html"),
    ]
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    text = Elements((tmp_path / "r.html").read_text()).text
    assert "pwopt optimize" in text
    assert "--shape x=1x64x8x8" in text
    arguments = [
        "verify",
        str(source),
        str(tmp_path / "seq.pwopt.onnx"),
        "--shape",
        "x=1x64x8x8",
        "--report",
        str(tmp_path / "v.md"),
    ]
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "# seq.onnx → seq.pwopt.onnx: Equivalent" in (tmp_path / "v.md").read_text()


def test_a_missing_library_is_told_before_any_work(tmp_path: Path) -> None:
    script = "import sys; sys.modules['jinja2'] = None; from pwopt.cli import main; main(sys.argv[1:])"
    arguments = [
        "optimize",
        str(MODELS / "linear_sequence.onnx"),
        "-o",
        str(tmp_path / "o.onnx"),
        "--report",
        str(tmp_path / "r.html"),
    ]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install jinja2 matplotlib" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_complaint(page: str, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page)
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        "--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    shown = Elements(done.stdout)
    assert shown.tags.count("script") == 1
    assert '<p class="filter">' in done.stdout  # no longer hidden: the page's own script has run
    assert EVIL.replace("\u202e", "\N{REPLACEMENT CHARACTER}") in shown.text


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine")
def test_the_browser_would_have_complained(tmp_path: Path) -> None:
    """The test above sees what a careless page does."""
    path = tmp_path / "careless.html"
    path.write_text(f"<!DOCTYPE html><title>careless</title><p>{EVIL}</p>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" in done.stderr


def test_a_report_of_a_thousand_operators_is_small(report: Report) -> None:
    """Half of them fold, a quarter is left alone for a reason, and each has a row in the table of layers."""
    weights = {f"w{i}": normal(8, 8, 1, 1, seed=i, dtype=np.float32) for i in range(250)}
    weights["k"] = normal(8, 1, 1, dtype=np.float32)
    body, h = "", "x"
    for i in range(250):
        body += f" a{i} = Conv({h}, w{i}) b{i} = Mul(a{i}, k) c{i} = Relu(b{i}) h{i} = Erf(c{i})"
        h = f"h{i}"
    model = parse(f"(float[1,8,6,6] x) => (float[N] {h}) {{{body} }}", **weights)
    for node in model.graph.node:
        node.name = f"/a/rather/long/name/as/exporters/write/them/{node.op_type}_{node.output[0]}"
    found = optimize(model, cost="analytic").report
    assert found.before.nodes == 1000
    assert len(found.rewrites) >= 250
    named = [f"{n.op_type} {n.name}" for n in model.graph.node]
    many = tuple(Layer((a, b), (a,), 0.3, 0.2) for a, b in zip(named[::2], named[1::2], strict=True))
    many += tuple(Layer((n,), (n,), 0.3, 0.3) for n in named[::2])  # as many rows as operators
    text = render_document(replace(found, layers=many, latency=report.latency, operators=report.operators), "html")
    assert len(text.encode()) < 2_000_000
    assert Elements(text).tags.count("tr") > 1000
    assert named[0].split()[1] in text


def test_figures_of_single_elements_are_folded_and_explained(report: Report) -> None:
    """Units in the last place, by the hundred thousand, beside "passes"."""
    assert report.equivalence is not None
    (output,) = report.equivalence.outputs
    large = replace(output, max_rel=0.033, ulp=786432.0, ulp_p99=128.0)
    text = render_document(replace(report, equivalence=replace(report.equivalence, outputs=(large,))), "html")
    folded = re.findall(r'<details class="more"><summary>Element by element</summary>.*?</details>', text, re.S)
    assert len(folded) == 1
    assert "large wherever the original is close to zero" in folded[0]
    assert "786,432" in folded[0]
    assert "786,432" not in text.replace(folded[0], "")
    none = replace(output, max_rel=None, ulp=None, ulp_p99=None)
    text = render_document(replace(report, equivalence=replace(report.equivalence, outputs=(none,))), "html")
    assert "Element by element" not in text


@pytest.mark.parametrize(("change", "said"), [(0.0004, "0.000"), (-0.0004, "0.000"), (0.01, "+0.010"), (-1, "−1.000")])
def test_what_rounds_to_nothing_has_no_sign(change: float, said: str) -> None:
    assert format_gain(change) == said


def pages(report: Report, tmp_path: Path) -> list[str]:
    model = MODELS / "linear_sequence.onnx"
    rows = [
        BatchRow("a.onnx", "a.onnx", "done", "", 0, 1.02, 1.0, 1.04, (2, 1), (2, 1)),
        BatchRow("b", "b", "failed", "no", 3),
    ]
    layered = replace(
        report, layers=(Layer(("Conv a", "Relu b"), ("Conv a",), 0.3, 0.2), Layer((LAYOUT_CHANGES,), (), 1, 0))
    )
    return [
        render_document(layered, "html"),
        index_page(rows, tmp_path),
        render_properties_page(properties(model), model),
    ]


def test_headings_are_in_order_and_pictures_have_words(report: Report, tmp_path: Path) -> None:
    for text in pages(report, tmp_path):
        levels = [int(n) for n in re.findall(r"<h([1-6])", text)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        pictures = re.findall(r"<svg .*?</svg>", text, re.S)
        assert pictures
        for picture in pictures:
            head = picture[: picture.index(">")]
            assert 'role="img"' in head
            assert re.search(r'aria-label="[^"]+"', head) or re.search(r"<title>[^<]+</title>", picture)
        assert '<html lang="en">' in text
        assert all('scope="col"' in head for head in re.findall(r"<th\b[^>]*>", text))


def test_colours_can_be_told_apart(page: str) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for what is drawn, in each scheme and on paper."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    schemes = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(schemes) == 3
    for scheme in schemes:
        value = {name: luminance(c) for name, c in re.findall(r"--(\w+): #(\w+);", scheme)}
        for name in value.keys() - {"paper", "sheet", "line"}:
            for ground in ("paper", "sheet"):
                low, high = sorted((value[name], value[ground]))
                assert (high + 0.05) / (low + 0.05) >= (3 if name == "before" else 4.5), (name, ground)


def test_layers_stand_beside_what_they_became(page: str) -> None:
    text = " ".join(Elements(page).text.split())
    assert "Layer by layer" in text
    assert "changes of layout" in text or "the same" in text


def test_the_index_over_many_models(tmp_path: Path) -> None:
    rows = [
        BatchRow(
            "in/a.onnx", "a.onnx", "done", "Little was gained.", 0, 1.02, 1.0, 1.04, (20, 15), (2_000_000, 1_000_000)
        ),
        BatchRow("in/b.onnx", "b.onnx", "done", "", 0, 2.0, 1.9, 2.1, (20, 15), (2_000_000, 1_000_000)),
        BatchRow(f"in/{EVIL}.onnx", f"{EVIL}.onnx", "failed", "it is not a model", 3),
    ]
    (tmp_path / "b.report.html").write_text("")
    text = index_page(rows, tmp_path)
    found = Elements(text)
    assert "script" not in found.tags
    assert [v for a, v in found.attributes if a == "href"] == ["b.report.html"]
    said = " ".join(found.text.split())
    assert "1.43×" in said
    assert "in the geometric mean of 2" in said
    assert (
        said.index("it is not a model") < said.index("2.00×") < said.index("1.02×") < said.index("Little was gained.")
    )


def test_the_index_shows_page_sizes_start_up_and_what_is_clear(tmp_path: Path) -> None:
    figures = {"nodes": (20, 15), "macs": (2, 1)}
    clear = BatchRow("a.onnx", "a.onnx", "done", "", 0, 1.5, 1.4, 1.6, **figures, faster=True)
    rows = [
        replace(clear, small_pages=(1.31, 1.25, 1.37), start=(1.97, 1.9, 2.05)),
        BatchRow("b.onnx", "b.onnx", "done", "", 0, 3.69, 1.31, 10.4, **figures),
    ]
    said = " ".join(Elements(index_page(rows, tmp_path)).text.split())
    assert "speed-up, huge pages" in said
    assert "pages of 4 KiB" in said
    assert "1 of 2clearly faster than the original" in said
    assert "1.31×[1.25, 1.37]" in said
    assert "1.97×[1.90, 2.05]" in said
    assert "unclear[1.31, 10.40]" in said
    assert "3.69" not in said
    assert "1.50×as fast in the geometric mean of 1; 1 varied too much" in said
    nothing = " ".join(Elements(index_page(rows[1:], tmp_path)).text.split())
    assert "geometric mean" not in nothing
    assert "0 of 1clearly faster" in nothing
    plain = " ".join(Elements(index_page([clear], tmp_path)).text.split())
    assert "pages" not in plain
    assert "session creation" not in plain


def test_a_notebook_shows_the_top(report: Report) -> None:
    text = Result(evil_model(), report)._repr_html_()
    assert "script" not in Elements(text).tags
    said = " ".join(Elements(text).text.split())
    assert "Equivalent" in said
    assert "multiply-adds" in said


def test_reports_are_as_the_schema_says(report: Report) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    unverified = optimize(evil_model(), cost="analytic", verify=False).report
    for each in (report, unverified):
        validator.validate(json.loads(each.to_json()))
        assert each.to_dict().keys() == schema["properties"].keys()
    damaged = report.to_dict() | {"rewrites": [{"pass": "fold-affine"}]}
    assert not validator.is_valid(json.loads(to_json(damaged)))


def test_a_report_without_races_says_so_and_counts_in_words() -> None:
    """One rewrite is not "1 rewrites", an environment without a card has no line for it, and no figure is infinite."""
    report = optimize(MODELS / "linear_sequence.onnx", cost="analytic", shapes={"x": (1, 64, 2, 2)}).report
    page = render_document(report, "html")
    assert page.count("Nothing was timed") == 1
    assert page.count("shapes alone") == 1
    assert "These figures are counted, not measured." in page
    assert "1 rewrite." in page
    assert "1 rewrites" not in page
    assert not re.search(r"\bNone\b|\binf\b|\N{REPLACEMENT CHARACTER}", page)
    assert '<span class="whole">2,080</span>' in page  # a number and its unit stay on one line
    same = optimize(parse("(float[1,2] x) => (float[1,2] y) { y = Tanh(x) }"), cost="analytic").report
    assert "These figures are counted, not measured." in render_document(same, "html")


def test_matplotlib_is_imported_for_plots_only() -> None:
    """Markdown has no plots. The import takes seconds on a slow machine."""
    program = """if True:
        import sys, pwopt
        from pathlib import Path
        from pwopt.reporting.document import render_document
        from pwopt.reporting.formats import check_available
        check_available(Path("report.html"))
        report = pwopt.optimize(sys.argv[1], cost="analytic", verify=False).report
        assert "operators" in render_document(report, "markdown")
        assert "operators" in render_document(report, "html")
        print(sorted(name for name in sys.modules if name.startswith("matplotlib")))
    """
    command = [sys.executable, "-c", program, str(MODELS / "linear_sequence.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
