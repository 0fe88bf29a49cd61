"""Notes of a report: one sentence for each thing that a user should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import onnx

from pwopt.evidence.equivalence import Equivalence
from pwopt.graph.functions import functions
from pwopt.graph.operators import QUANTISED
from pwopt.graph.shapes import Shape, format_shape
from pwopt.graph.storage import count_bytes
from pwopt.reporting.report import ConditionLatency, Latency, Report
from pwopt.rewriting.ratios import format_interval, format_ratio, is_vague
from pwopt.rewriting.records import Rewrite, Site
from pwopt.rewriting.wording import format_count
from pwopt.running.installation import list_cores
from pwopt.selecting.autotuning import BUSY, Decision
from pwopt.selecting.compilation import CERTIFICATE_DEFECT
from pwopt.selecting.groups import Group

#: Microseconds to start an operator on a graphics card, from the framework's call to the kernel's first instruction; a
#: launch alone takes 2 to 5 (NVIDIA, "Getting started with CUDA graphs", 2019).
LAUNCH_MICROSECONDS = 10.0
#: Profile times and race times that differ by more than this factor are explained.
PROFILE_APART = 1.25
#: A speed-up below this is explained.
EXPLAINED_SPEEDUP = 1.05
#: The last note if every rewrite was left out, one after another.
RETURNED = "The original is returned."
#: What the names of onnxruntime's operators that multiply matrices contain, and the share of the time from which on
#: they are what a model spends it on.
MULTIPLYING, MAIN_SHARE = ("Conv", "Gemm", "MatMul", "Attention"), 0.5
#: A model that grows by more than this fraction, and so many bytes, is mentioned.
MENTIONED_GROWTH, MENTIONED_BYTES = 0.1, 1 << 16
#: A smaller fraction of new parameters is not mentioned; tables show it as 0.0 %.
MENTIONED_PARAMETERS = 0.0005


def explain_profile(latency: Latency, operators: Mapping[str, Mapping[str, float]] | None) -> Iterator[str]:
    """Say why the operators' times do not add up to those of the race, if they do not."""
    before, after = (sum(operators[which].values()) for which in ("before", "after")) if operators else (0.0, 0.0)
    if not before or not after:
        return
    ratio = before / after / latency.speedup
    if max(ratio, 1 / ratio, before / latency.before_ms, after / latency.after_ms) > PROFILE_APART:
        yield (
            f"The operators' times add up to {before:.3g} → {after:.3g} ms, and runs take {latency.before_ms:.3g} → "
            f"{latency.after_ms:.3g} ms. The operators' times are medians of a few other runs under onnxruntime's "
            "profiler, which costs time at every operator. They show where the time goes, not how much it fell."
        )


def explain_launches(report: Report, provider_kind: str) -> Iterator[str]:
    """Say if a graphics card spent its time on starting operators, which hides what they compute."""
    if report.latency is None or provider_kind != "gpu" or not report.after.nodes:
        return
    each = report.latency.after_ms * 1e3 / report.after.nodes
    if each < LAUNCH_MICROSECONDS:
        yield (
            f"{each:.1f} µs for each of {report.after.nodes} operators is what it takes to start them: at these sizes "
            "the ratio says little of their arithmetic. Give a larger batch with --shape, or "
            "--provider-option enable_cuda_graph=1."
        )


def list_fallbacks(equivalence: Equivalence, provider: str) -> Iterator[str]:
    """List the operators that ran on another provider than the requested one."""
    for places in equivalence.elsewhere.values():
        for other, names in places.items():
            some = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            yield f"{len(names)} operators ran on {other}, not on {provider}: {some}."


def describe_unknown_sizes(report: Report, unseen: bool) -> Iterator[str]:
    """Say which operators the count of multiply-adds leaves out, and whether other sizes would change that."""
    before, after = report.before.unknown, report.after.unknown
    if before:
        why = "; --shape may settle them" if unseen else ", whatever the inputs' sizes: they follow from values"
        yield f"Multiply-adds leave out {format_count(before, 'operator')} whose sizes are not known{why}."
    if after != before:
        left_out = format_count(after, "operator")
        yield f"In the result they leave out {left_out}, so the two counts are not of the same work."


def describe_rewriting(
    report: Report, proto: onnx.ModelProto, denied: Iterable[Site], guessed: bool, unseen: bool
) -> Iterator[str]:
    """Describe a rewritten model: unknown sizes, quantised operators, guessed sizes, denied places without effect.

    Parameters
    ----------
    report : Report
    proto : onnx.ModelProto
        The original.
    denied : iterable of Site
    guessed : bool
        Whether the inputs were fixed to sizes that nobody gave.
    unseen : bool
        Whether sizes were guessed and no model ran on them.
    """
    yield from describe_unknown_sizes(report, unseen)
    found = Counter(n.op_type for n in proto.graph.node if n.op_type in QUANTISED or n.op_type.startswith("QLinear"))
    if found:
        listed = ", ".join(f"{count} {op}" for op, count in found.most_common())
        yield f"Not touched, since folding would round integers once more: {listed}, and the weights that they hold."
    if guessed:
        yield "Inputs fixed to likely sizes, since none were given; --shape chooses them."
    seen = {r.site for r in report.rewrites} | {s.site for s in report.skips}
    for site in denied:
        if site not in seen:
            yield f"No place is called {str(site)!r}; sites look like fold-chains:TENSOR and are listed by --details."


def describe_declarations(operators: Sequence[str], wrong: Mapping[str, tuple[Shape, Shape]] | None) -> Iterator[str]:
    """Say which declared shapes were trusted, whether a run checked them, and which were wrong.

    Parameters
    ----------
    operators : sequence of str
        The operators whose declared output shapes were trusted.
    wrong : mapping of tensor name to shapes, or None
        The declared and the true shapes of tensors whose declarations were ignored. None if nothing was run.
    """
    if operators:
        some = ", ".join(operators[:5]) + (" and more" if len(operators) > 5 else "")
        checked = "no run checked them" if wrong is None else "they are right on every sample"
        yield f"Declared output shapes were trusted, since nothing else gives them ({some}); {checked}."
    for name, (declared, shape) in (wrong or {}).items():
        yield (
            f"The declared shape {format_shape(declared)} of {name!r} was ignored, since the model computes "
            f"{format_shape(shape)}."
        )


def list_inlined(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """List the functions that were inlined."""
    gone = [f"{domain}:{name}" for domain, name in functions(before) if (domain, name) not in functions(after)]
    if gone:
        names = ", ".join(gone[:5]) + (" and more" if len(gone) > 5 else "")
        yield f"Functions inlined, since rewrites reach into them: {names}."


def describe_growth(report: Report, before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    """Say by how much the model grew and why, if it grew considerably."""
    sizes = count_bytes(before), count_bytes(after)
    if sizes[1] - sizes[0] <= max(MENTIONED_GROWTH * sizes[0], MENTIONED_BYTES):
        return
    grown: Counter[str] = Counter()
    for r in report.rewrites:
        grown[r.pass_name] += r.growth
    parts = ", ".join(f"{name} {size / 1e6:.2g} MB" for name, size in grown.most_common(3) if size > 0)
    grew = f"The model grows by {sizes[1] / sizes[0] - 1:.0%}, from {sizes[0] / 1e6:.3g} to {sizes[1] / 1e6:.3g} MB"
    yield f"{grew}{f' ({parts})' if parts else ''}; --max-growth bounds that."


def explain_disturbance(latency: Latency, own: float) -> Iterator[str]:
    """Say that other programs probably made a race unclear, if the models rarely had the processor.

    Parameters
    ----------
    latency : Latency
    own : float
        The share of the time of the race that the models had the processor for themselves.
    """
    decided = latency.faster or latency.slower or latency.same
    if own < BUSY and (not decided or is_vague(*latency.interval)):
        advice = " Run pwopt again when the machine is quieter." if decided else ""  # else `explain_verdict` advises
        yield (
            "Other load on this machine is the likely cause of the wide interval: the models had the processor for "
            f"{own:.0%} of the time of their race.{advice}"
        )


def explain_threads(thread_counts: Iterable[int]) -> Iterator[str]:
    """Say that more threads were asked for than this process may use cores."""
    cores, most = len(list_cores()), max(thread_counts, default=1)
    if most > cores:
        yield f"{most} threads were asked for, but this process may use {format_count(cores, 'core')}."


def explain_additions(report: Report, measured: Collection[str]) -> Iterator[str]:
    """Say which passes added operators or parameters, and why their rewrites stay.

    Parameters
    ----------
    report : Report
    measured : collection of str
        The passes with rewrites that were measured to be faster.
    """
    operators, sizes, saved = Counter[str](), Counter[str](), Counter[str]()
    for r in report.rewrites:
        operators[r.pass_name] += len(r.added) - len(r.removed)
        sizes[r.pass_name] += r.growth
        saved[r.pass_name] += r.macs_before - r.macs_after
    before, after, more, names = report.before, report.after, list[str](), dict[str, None]()
    for noun, count, least, added in (
        ("operator", after.nodes - before.nodes, 0, operators),
        ("parameter", after.params - before.params, MENTIONED_PARAMETERS * before.params, sizes),
    ):
        adding = [name for name, each in added.most_common() if each > 0]
        if count > least and sum(added[name] for name in adding) >= count:  # else something else added them
            more.append(format_count(count, f"more {noun}"))
            names.update(dict.fromkeys(adding))
    if not more:
        return
    told = []
    for name in names:
        if name in measured:
            told.append(f"{name}, which was measured to be faster")
        elif saved[name] > 0:
            told.append(f"{name}, which saves multiply-adds")
        else:
            told.append(f"{name}, which removes operators" if operators[name] < 0 else name)
    yield f"The result has {' and '.join(more)}. They come from {'; '.join(told)}."


def describe_failures(failed: Sequence[Rewrite], builtin: Iterable[str]) -> Iterator[str]:
    """Say how many rewrites were refused by their certificates, and whose fault that is.

    Parameters
    ----------
    failed : sequence of Rewrite
    builtin : iterable of str
        Names of pwopt's own passes.
    """
    if failed:
        others = sorted({r.pass_name for r in failed}.difference(builtin))
        whose = f"the fault of {', '.join(others)}" if others else CERTIFICATE_DEFECT
        yield f"{format_count(len(failed), 'rewrite')} refused by certificates: {whose}."


def describe_races(decisions: Sequence[Decision], hint: str) -> Iterator[str]:
    """Say which races ended in doubt, with a hint on what to do, and whether the machine was busy."""
    doubtful = [d for d in decisions if not d.clear]
    if doubtful:
        figures = [format_ratio(d.speedup, *d.interval, digits=3) for d in doubtful]
        listed = "; ".join(f"{d.group.pass_name} {f}" for d, f in zip(doubtful, figures, strict=True))
        yield f"Left out in doubt: {listed}. {hint}"
    busy = min((d.own for d in decisions if d.raced), default=1.0)
    if busy < BUSY:
        yield (
            f"The machine was busy: in one race, the models had the processor for {busy:.0%} of the time. "
            "Such a race counts less."
        )


def describe_worker(problem: str) -> Iterator[str]:
    """Say that candidates were tried without a worker process, if there was a problem with it."""
    if problem:
        yield f"Candidates did not run in a process of their own: {problem}."


def describe_dry_run(groups: Sequence[Group], *, races: bool) -> Iterator[str]:
    """Say what a dry run leaves out; without `races`, a tuning database decides on the groups."""
    yield "A dry run: nothing was raced, verified or written."
    if groups:
        them = "it" if len(groups) == 1 else "them"
        unless = f"unless earlier runs on this machine have already decided {them}"
        how = f"timed, {unless}" if races else "decided by the profile"
        listed = "; ".join(g.title for g in groups)
        kinds = "1 kind of rewrite" if len(groups) == 1 else f"{len(groups)} kinds of rewrites"
        yield f"{kinds} would be {how}: {listed}."


def explain_not_equivalent(equivalence: Equivalence | None) -> str:
    """Say which output differs, where the difference begins, and what to do."""
    worst = equivalence.worst() if equivalence is not None else None
    where = equivalence.difference if equivalence is not None else None
    what = f"output {worst.name!r} {worst.explain()}; " if worst is not None else ""
    what += f"{where.explain()}; " if where is not None else ""
    return what + "nothing was written; leave rewrites out with --deny, or allow more with --rtol and --atol"


def explain_verdict(report: Report) -> Iterator[str]:
    """Explain the verdict in one sentence if the result is hardly faster."""
    latency = report.latency
    if latency is None or (latency.faster and latency.speedup >= EXPLAINED_SPEEDUP):
        return
    brought = " and ".join(_list_benefits(report))
    also = f" It {brought}." if brought else ""
    figures = within(latency)
    if latency.faster:
        yield f"Slightly faster{figures}.{also} {explain_small_gain(report)}"
    elif latency.same:
        yield f"Same speed{figures}.{also} {explain_small_gain(report)}"
    else:
        yield (
            f"Whether it is faster is not clear{figures}.{also} The rewrites are kept, because each saves operators "
            "or work, and those that only measurements can justify are left out. A larger --budget, or a quieter "
            "machine, measures more precisely."
        )


def _list_benefits(report: Report) -> Iterator[str]:
    """List the benefits of a result other than speed."""
    fewer, start = report.before.nodes - report.after.nodes, report.latency.start if report.latency else None
    if fewer > 0:
        yield f"has {format_count(fewer, 'operator')} fewer"
    if start is not None and start.interval[0] > 1:
        yield f"loads {start.speedup:.1f} times faster"


def explain_small_gain(report: Report) -> str:
    """Say in one sentence why there is little to gain."""
    change = report.before.change(report.after)
    if change is not None and change < 0:
        return f"Multiply-adds fell by {-change:.1%}, but the rest of the model takes the time."
    if report.before.nodes > report.after.nodes:
        return "All multiply-adds are needed, and onnxruntime fuses most of the removed operators itself while loading."
    return "All multiply-adds are needed, and there was nothing to fold."


def explain_time(report: Report, proto: onnx.ModelProto) -> Iterator[str]:
    """Say what a model spends its time on, if nothing made it faster.

    Parameters
    ----------
    report : Report
    proto : onnx.ModelProto
        The original.
    """
    tried = report.candidate
    operators = (None if tried is None else tried.operators) or report.operators
    if not operators or (report.rewrites and (report.latency is None or report.latency.faster)):
        return
    it, times, counts = "them", operators["before"], Counter(n.op_type for n in proto.graph.node)
    total = sum(times.values())
    multiplying = sum(ms for op, ms in times.items() if any(kind in op for kind in MULTIPLYING))
    maps = (counts["Conv"] + counts["ConvTranspose"], "convolution"), (counts["MatMul"] + counts["Gemm"], "product")
    named = " and ".join(format_count(count, what) for count, what in maps if count)
    if named and total and multiplying >= MAIN_SHARE * total:
        rate = (
            f", at {report.before.macs / multiplying / 1e6:.3g} G multiply-adds/s" if not report.before.unknown else ""
        )
        spent = f"{multiplying / total:.0%} of the time goes into {named}{rate}"
        it = "it" if sum(count for count, _ in maps) == 1 else it
    elif total:
        slowest = sorted(times.items(), key=lambda item: -item[1])[:3]
        spent = f"The time goes into {', '.join(f'{op} ({ms / total:.0%})' for op, ms in slowest)}"
        it = "it" if len(slowest) == 1 else it
    else:
        return
    if report.rewrites or tried is not None or RETURNED in report.notes:
        yield f"{spent}."
    elif report.skips:
        yield f"{spent}; {format_count(len(report.skips), 'place')} could not be rewritten, each for a reason given."
    else:
        yield f"{spent}; nothing in front of or behind {it} could be folded."


def explain_kept(latency: Latency, elsewhere: ConditionLatency | None, option: str) -> str:
    """Say why a result that is not faster is returned: an option asked for it."""
    found = (
        f"Measured slower ({latency.speedup:.2f}×)" if latency.slower else f"Not faster beyond doubt{within(latency)}"
    )
    if elsewhere is not None:
        found = f"Measured slower with {elsewhere.label}{within(elsewhere.latency)}"
    return f"{found}, and kept since {option} was asked for."


def compare_with_original(latency: Latency, elsewhere: ConditionLatency | None) -> tuple[str, str]:
    """Say how a result that is not faster compares: "slower", and its speed-up with the interval."""
    if elsewhere is not None:
        return f"slower with {elsewhere.label}", within(elsewhere.latency)
    return ("slower" if latency.slower else "no faster beyond doubt"), within(latency)


def within(latency: Latency) -> str:
    """Format the speed-up with its interval, and that of a copy of the original where it hides the difference.

    Only the interval if it is vague; "" if it says nothing.
    """
    low, high = latency.interval
    hidden = (low > 1 and not latency.faster) or (high < 1 and not latency.slower and not latency.same)
    copy = f"; a copy of the original {latency.control:.3f}×" if hidden and latency.control is not None else ""
    figures = format_ratio(latency.speedup, low, high, digits=3)
    if figures == "unclear":
        return ""
    if is_vague(low, high):
        figures = "99 % interval {} to {}".format(*format_interval(low, high).strip("[]").split(", "))
    return f" ({figures}{copy})"
