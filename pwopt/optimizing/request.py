"""Requests: the options of an optimisation as records, which the command line and the Python interface fill in."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from pwopt.errors import UsageError
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider, as_provider

if TYPE_CHECKING:
    from pwopt.inputs.feeds import Feeds
    from pwopt.rewriting.driver import Pass
    from pwopt.rewriting.records import Site

CostModel = Literal["measured", "analytic"]
Effort = Literal["quick", "normal", "thorough"]
#: The runtime that a result is written for.
Target = Literal["portable", "onnxruntime-cpu", "onnxruntime-gpu", "openvino"]
#: The kind of execution provider whose lowered forms each target takes; "portable" takes those of the provider.
KINDS: dict[Target, str] = {"onnxruntime-cpu": "cpu", "onnxruntime-gpu": "gpu", "openvino": "other"}
#: Seconds to race the result against the original.
RACE_SECONDS = 2.0
#: Seconds for all measurements, by effort.
EFFORTS: dict[Effort, float] = {"quick": 10.0, "normal": 40.0, "thorough": 180.0}


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, which is not one of: {', '.join(choices)}")


def _check_number(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Real):
        raise UsageError(f"{name} is {value!r}; give a number")


def _as_tuple(given: Any) -> tuple[Any, ...] | None:
    """Convert a single value to a sequence of one."""
    if given is None:
        return None
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, type)) else (given,)


@dataclass(frozen=True)
class Measuring:
    """How long to measure, and where.

    Attributes
    ----------
    effort : {"quick", "normal", "thorough"}
        Measure for 10, 40 or 180 seconds at most.
    budget : float, optional
        Seconds at most for all measurements, instead of `effort`: races of rewrites, verification, the final race and
        the profile. A short budget is spent on the last three; 0 leaves measured rewrites out.
    race_seconds : float
        Seconds at most for the final race.
    target_profile : path, optional
        The tuning database that `pwopt.profile` recorded on the machine that will run the model. It decides on measured
        rewrites, and nothing is timed here.
    layers : bool
        Whether to profile both models, for the times of operators and layers in the report.

    Raises
    ------
    UsageError
        If a value makes no sense.
    """

    effort: Effort = "normal"
    budget: float | None = None
    race_seconds: float = RACE_SECONDS
    target_profile: str | os.PathLike[str] | None = None
    layers: bool = True

    def __post_init__(self) -> None:
        _check_choice("effort", self.effort, get_args(Effort))
        _check_number("budget", self.budget)
        _check_number("race_seconds", self.race_seconds)
        for seconds in (self.seconds, self.race_seconds):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"nothing can be measured in {seconds:g} seconds; give 0 or more, and a finite number")

    @property
    def seconds(self) -> float:
        """Seconds for all measurements."""
        return EFFORTS[self.effort] if self.budget is None else self.budget


@dataclass(frozen=True)
class Limits:
    """By how much a result may differ from the original and grow.

    Attributes
    ----------
    rtol, atol : float, optional
        Tolerances instead of the defaults for each type.
    max_growth : float, optional
        The fraction of its size by which the model may grow, data files included: 0.1 for a tenth. The rewrites that
        grow most are left out. Without a limit, a growth of more than a tenth is noted.

    Raises
    ------
    UsageError
        If a value makes no sense.
    """

    rtol: float | None = None
    atol: float | None = None
    max_growth: float | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            _check_number(name, value)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"a tolerance is a number from 0 on, and {name} is {value}")
        _check_number("max_growth", self.max_growth)
        if self.max_growth is not None and not 0 <= self.max_growth < float("inf"):
            raise UsageError(f"a model cannot grow by {self.max_growth:g} of its size at most; give 0, 0.1 or more")


@dataclass(frozen=True)
class Writing:
    """How the result is written.

    Attributes
    ----------
    force : bool
        Allow the output to be the file that the model came from.
    name_nodes : bool
        Name every operator of the result that has no name after its type and its output: ``Conv_y``.
    dry_run : bool
        Only report what would be rewritten and raced: race, verify and write nothing.
    """

    force: bool = False
    name_nodes: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Request:
    """A request for one optimisation: the options of `pwopt.optimize`.

    Attributes
    ----------
    output : path, optional
        Where to write the result, atomically; never if verification fails. Nothing is written without it.
    provider : str
        Execution provider: cpu, cuda, openvino…, or onnxruntime's full name. Never replaced by another.
    cost : {"measured", "analytic"}
        "measured" races the result against the original, and returns the original if that is faster. Rewrites that only
        measurements can judge are raced one kind after another and kept where they are clearly faster. "analytic"
        decides from shapes alone and is deterministic. It verifies if onnxruntime is installed; the report says if not.
    shapes : mapping of input name to sizes, or a sequence of those, optional
        Sizes of dynamic inputs, for costs, verification and timing; the model stays dynamic. Of several, the model is
        optimised for the first; at none of the others may the result be slower.
    inputs : path, dict of arrays, or a sequence of those, optional
        Inputs to verify on, instead of random ones; the first one is timed. See `pwopt.inputs.samples.read_samples`.
    passes : sequence of str, pass classes and passes, optional
        Passes to run, in order; by default pwopt's own, then those of installed packages, then `plugins`. Measured
        passes that are named are not raced, but applied wherever they are exact. Classes and instances follow their
        policy, as in ``passes=[*pwopt.PASSES, Mine]``.
    plugins : sequence of str, pass classes and passes, optional
        Passes besides pwopt's own: ``module:Class``, where a file ``module.py`` may lie beside the model, or
        ``path/to/module.py:Class``.
    deny : iterable of str or Site
        Sites (from a report) that must not be rewritten, and names of passes that must not run.
    threads : int, or a sequence of those
        Intra-operator threads for verification and timing. The model is optimised for the first number; with none of
        the others may the result be slower. By default 1, and as many as onnxruntime uses by default.
    static : bool
        Fix the inputs to their shapes in the result, so that shape arithmetic is folded. A slower result is returned
        with a note, because the original has other inputs.
    target : {"portable", "onnxruntime-cpu", "onnxruntime-gpu", "openvino"}
        The runtime that the result is written for. "portable" takes the forms that pay on the provider, as far as other
        runtimes read them well: a model that spells out HardSwish becomes one of opset 14, which has the operator. If
        another runtime than the provider is named, nothing is timed.
    opset : int, optional
        Convert to this opset first. As with `static`, a slower result is returned with a note.
    verify : bool
        Compare with the original, and measure. Without it, nothing is run.
    cache : bool
        Use the decisions of earlier races on this machine, and store those of this one.
    measuring : Measuring
    limits : Limits
    writing : Writing
    progress : callable, optional
        Called with (stage, fraction done).

    Raises
    ------
    UsageError
        If a value makes no sense.
    """

    output: str | os.PathLike[str] | None = None
    _: KW_ONLY
    provider: str = "cpu"
    cost: CostModel = "measured"
    shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None
    inputs: str | os.PathLike[str] | Feeds | Sequence[Any] | None = None
    passes: Sequence[str | type[Pass] | Pass] | None = None
    plugins: Sequence[str | type[Pass] | Pass] = ()
    deny: Iterable[str | Site] = ()
    threads: int | Sequence[int] = ()
    static: bool = False
    target: Target = "portable"
    opset: int | None = None
    verify: bool = True
    cache: bool = True
    measuring: Measuring = Measuring()
    limits: Limits = Limits()
    writing: Writing = Writing()
    progress: Progress = field(default=ignore_progress, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("passes", self.passes), ("plugins", self.plugins or ()), ("deny", self.deny or ())):
            object.__setattr__(self, name, _as_tuple(value))
        for name, kind in (("measuring", Measuring), ("limits", Limits), ("writing", Writing)):
            if not isinstance(getattr(self, name), kind):
                raise UsageError(f"{name} is {getattr(self, name)!r}; give pwopt.{kind.__name__}(…)")
        _check_choice("cost", self.cost, get_args(CostModel))
        if self.measuring.target_profile is not None:  # races on this machine say nothing about the target
            object.__setattr__(self, "cost", "analytic")
        _check_choice("target", self.target, get_args(Target))
        if self.target in KINDS and KINDS[self.target] != self.execution_provider.kind:
            object.__setattr__(self, "cost", "analytic")  # races on this provider say nothing about the target
        _check_number("opset", self.opset)
        for threads in self.thread_counts:
            if not isinstance(threads, Integral):
                raise UsageError(f"threads is {self.threads!r}; give a whole number, or several")
            if threads < 1:
                raise UsageError(f"{threads} threads cannot run anything; give 1 or more")
        if self.output is not None and not isinstance(self.output, (str, os.PathLike)):
            raise UsageError(f"the output {self.output!r} is not a path")

    @functools.cached_property
    def execution_provider(self) -> Provider:
        """The provider, parsed.

        Raises
        ------
        ProviderError, UsageError
            As `pwopt.running.providers.Provider.parse`.
        """
        return as_provider(self.provider)

    @functools.cached_property
    def denied(self) -> tuple[Site, ...]:
        """The sites that must not be rewritten.

        Raises
        ------
        UsageError
            If a text is no site.
        """
        from pwopt.rewriting.records import Site

        sites = (site for site in self.deny if site not in self.denied_passes)
        return tuple(site if isinstance(site, Site) else Site.parse(site) for site in sites)

    @property
    def denied_passes(self) -> tuple[str, ...]:
        """The passes that must not run: names without a tensor."""
        return tuple(name for name in self.deny if isinstance(name, str) and ":" not in name)

    @property
    def rounds(self) -> list[Mapping[str, Sequence[int]]]:
        """The requested sizes of every condition. The model is optimised for the first."""
        given = [self.shapes] if isinstance(self.shapes, (Mapping, str)) else list(self.shapes or ())
        return [shapes for shapes in given if shapes]

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """The requested threads of every condition; empty by default. The model is optimised for the first."""
        return (self.threads,) if isinstance(self.threads, int) else tuple(self.threads)

    @property
    def first_threads(self) -> int:
        """The number of threads that the model is optimised for."""
        return next(iter(self.thread_counts), 1)

    @property
    def measured(self) -> bool:
        """Whether measurements decide."""
        return self.cost == "measured"

    @property
    def untimed(self) -> str:
        """Why nothing is timed, as a clause, or ""."""
        if self.measuring.target_profile is not None:
            return "--target-profile decides from a record"
        if self.target in KINDS and KINDS[self.target] != self.execution_provider.kind:
            return f"races on {self.provider} say nothing about --target {self.target}"
        if not self.measured:
            return "--cost analytic decides from shapes alone"
        return "" if self.verify else "--no-verify runs no model"

    @property
    def insists(self) -> str:
        """The option that makes pwopt return a result that is not faster, or ""."""
        opset = f"--opset {self.opset}" if self.opset is not None else ""
        passes = "--passes" if any(isinstance(p, str) for p in self.passes or ()) else ""
        return opset or ("--static" if self.static else "") or passes
