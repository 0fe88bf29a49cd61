"""How names, figures and refusals read, wherever they are shown."""

from __future__ import annotations

from rich.markup import escape

from pwopt.evidence.equivalence import OutputCheck
from pwopt.evidence.metrics import Agreement
from pwopt.rewriting.records import Skip


def harmless(text: str) -> str:
    """Text from a model without control or direction characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """Text from a model, harmless in a terminal: no markup besides."""
    return escape(harmless(text))


#: What the columns of the outputs are, once.
LEGEND = (
    "noise floor: how far the original is from itself without graph optimisation; sensitivity: from itself with inputs "
    "moved by one unit in the last place. The documentation, “How it is verified”, has the rule."
)
FIGURES = (
    "largest error / largest value", "mean error", "relative error", "units in the last place", "… of 99 % of elements",
    "1 − cosine", "signal to noise", "same largest entry", "same five largest", "unequal elements",
)  # fmt: skip
#: Figures that are large wherever a single element is close to zero, and say little of the whole.
ELEMENTWISE = ("relative error", "units in the last place", "… of 99 % of elements")


def figures(of: OutputCheck | Agreement) -> list[str | None]:
    """What `FIGURES` are, None where they are meaningless."""
    cosine = None if of.cosine is None else 1 - of.cosine
    relative = of.max_abs / of.scale if of.scale else None
    patterns = ("{:.2g}", "{:.2g}", "{:.2g}", "{:,.0f}", "{:,.0f}", "{:.1g}", "{:.0f} dB", "{:.2%}", "{:.2%}", "{:.2%}")
    values = (relative, of.mean_abs, of.max_rel, of.ulp, of.ulp_p99, cosine, of.snr_db, of.top1, of.top5, of.mismatch)
    return [None if v is None else p.format(v) for p, v in zip(patterns, values, strict=True)]


def general(skip: Skip) -> str:
    """A refusal without the names that differ from place to place, for counting."""
    words = skip.reason.split("'")
    return "…".join(words[::2]) if len(words) % 2 else skip.reason


SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
