"""What is asked of pwopt: one record that the command line, Python, `profile` and the gallery fill in."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.providers import Provider, as_provider

if TYPE_CHECKING:
    from pwopt.inputs.samples import Feeds
    from pwopt.rewriting.driver import Pass
    from pwopt.rewriting.records import Site

#: Seconds to race the result against the original.
RACE_SECONDS = 4.0
#: Seconds for everything that is measured, by how much effort is asked for.
EFFORTS = {"quick": 10.0, "normal": 40.0, "thorough": 180.0}


@dataclass(frozen=True)
class Request:
    """An optimisation, as it is asked for.

    Parameters
    ----------
    output : path, optional
        Where to write the result, atomically; never if verification fails. Nothing is written without it.
    provider : str
        Execution provider: cpu, cuda, openvino…, or onnxruntime's full name. Never replaced by another.
    cost : {"measured", "analytic"}
        "measured" races the result against the original, and returns the original if that is faster; rewrites
        that only a clock can judge are raced one kind after another, and kept where they are clearly faster.
        "analytic" decides from shapes alone and is deterministic. It verifies if it finds an onnxruntime,
        and says in the report's notes if it does not.
    shapes : mapping of input name to sizes, or a sequence of those, optional
        Sizes for dynamic inputs, for costs, verification and timing; the model stays dynamic. Of several, the first
        are what is optimised for; at none of the others may the result be slower.
    inputs : path, dict of arrays, or a sequence of those, optional
        Inputs to verify on, and to time on the first of, instead of random ones; see
        `pwopt.inputs.samples.read_samples`.
    passes : sequence of str, pass classes and passes, optional
        Passes to run, in order; by default pwopt's own, then those of installed packages, then `plugins`. Measured
        passes that are named are not raced, but applied wherever they are exact; classes and instances are treated as
        their policy says, such as in ``passes=[*pwopt.PASSES, Mine]``.
    plugins : sequence of str, pass classes and passes, optional
        Passes beside pwopt's own: ``module:Class``, where a file ``module.py`` may lie beside the model, or
        ``path/to/module.py:Class``.
    deny : iterable of str
        Sites (from a report) that must not be rewritten.
    threads : int, or a sequence of those
        Intra-operator threads for verification and timing: the first number is what is optimised for, with none of the
        others may the result be slower. By default 1, and as many as onnxruntime takes by itself.
    static : bool
        Fix the inputs to their shapes in the result, which settles shape arithmetic. There is no going back to
        the original then: a slower result is returned with a note.
    opset : int, optional
        Convert to this opset first; as with `static`, a slower result is returned with a note.
    rtol, atol : float, optional
        Tolerances instead of the defaults for each type.
    verify : bool
        Compare with the original, and measure. Without, nothing is run, and the result is what the algebra says.
    race_seconds : float
        Time to spend on the final race, at most.
    effort : {"quick", "normal", "thorough"}
        How long to measure: 10, 40 or 180 seconds at most.
    budget : float, optional
        Seconds at most for all measuring instead: races of rewrites, verification, the final race and the profile. What
        is short is spent on the latter; 0 leaves measured rewrites out.
    cache : bool
        Use the decisions of earlier races on this machine (`pwopt.selecting.cache`), and remember those of this one.
    max_growth : float, optional
        By what fraction of its size the model may grow, data files included: 0.1 for a tenth. What grows most is
        left out. Without it, more than a tenth is noted.
    target_profile : path, optional
        What `pwopt.profile` recorded on the machine that the model is for: it decides on measured rewrites, and nothing
        is timed here.
    name_nodes : bool
        Give every operator of the result that has no name one, made of what it is and what it makes: ``Conv_y``. By
        default, nodes without a name stay without.
    force : bool
        Allow `output` to be the file that the model came from.
    dry_run : bool
        Say in the report what would be rewritten and raced: nothing is raced, verified or written.
    progress : callable, optional
        Called with (stage, fraction done).
    """

    output: str | os.PathLike[str] | None = None
    _: KW_ONLY
    provider: str = "cpu"
    cost: str = "measured"
    shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None
    inputs: str | os.PathLike[str] | Feeds | Sequence[Any] | None = None
    passes: Sequence[str | type[Pass] | Pass] | None = None
    plugins: Sequence[str | type[Pass] | Pass] = ()
    deny: Iterable[str | Site] = ()
    threads: int | Sequence[int] = ()
    static: bool = False
    opset: int | None = None
    rtol: float | None = None
    atol: float | None = None
    verify: bool = True
    race_seconds: float = RACE_SECONDS
    effort: str = "normal"
    budget: float | None = None
    cache: bool = True
    max_growth: float | None = None
    target_profile: str | os.PathLike[str] | None = None
    name_nodes: bool = False
    force: bool = False
    dry_run: bool = False
    progress: Progress = field(default=ignore_progress, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("passes", self.passes), ("plugins", self.plugins or ()), ("deny", self.deny or ())):
            object.__setattr__(self, name, _several(value))
        if self.target_profile is not None:  # a race on this machine says nothing about that one
            object.__setattr__(self, "cost", "analytic")

    @functools.cached_property
    def execution_provider(self) -> Provider:
        """The provider, parsed.

        Raises
        ------
        ProviderError, UsageError
            As `pwopt.running.providers.Provider.parse`.
        """
        return as_provider(self.provider)

    @property
    def denied(self) -> tuple[Site, ...]:
        """The places that must not be rewritten."""
        from pwopt.rewriting.records import Site

        return tuple(site if isinstance(site, Site) else Site.parse(site) for site in self.deny)

    @property
    def rounds(self) -> list[Mapping[str, Sequence[int]]]:
        """Sizes of every condition that was asked for, the first to be optimised for."""
        given = [self.shapes] if isinstance(self.shapes, (Mapping, str)) else list(self.shapes or ())
        return [shapes for shapes in given if shapes]

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Threads of every condition that was asked for, the first to be optimised for; none if nothing was."""
        return (self.threads,) if isinstance(self.threads, int) else tuple(self.threads)

    @property
    def first_threads(self) -> int:
        """What is optimised for."""
        return next(iter(self.thread_counts), 1)

    @property
    def seconds(self) -> float:
        """For all measuring."""
        return EFFORTS[self.effort] if self.budget is None else self.budget

    @property
    def measured(self) -> bool:
        """Whether clocks decide."""
        return self.cost == "measured"

    @property
    def insists(self) -> str:
        """The option that makes a result worth having though it is not faster, else ""."""
        opset = f"--opset {self.opset}" if self.opset is not None else ""
        passes = "--passes" if any(isinstance(p, str) for p in self.passes or ()) else ""
        return opset or ("--static" if self.static else "") or passes


def _several(given: Any) -> tuple[Any, ...] | None:
    """One thing is a list of one."""
    if given is None:
        return None
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, type)) else (given,)
