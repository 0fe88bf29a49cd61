"""Records of rewrites and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pwopt.errors import UsageError
from pwopt.graph.changes import Operator


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model where a pass acts. It is the same in every run and is printed as "pass:tensor".

    Attributes
    ----------
    pass_name : str
    tensor : str
        The first named output of the node, by the name that it had in the original model.
    """

    pass_name: str = ""
    tensor: str = ""

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site as reports print it.

        Raises
        ------
        UsageError
            If there is no colon.
        """
        pass_name, colon, tensor = text.partition(":")
        if not colon:
            raise UsageError(
                f"there is no place {text!r} to leave alone: a site is a pass and a tensor, PASS:TENSOR; "
                "--details lists the sites of a model"
            )
        return cls(pass_name, tensor)

    def __str__(self) -> str:
        return f"{self.pass_name}:{self.tensor}"


@dataclass(frozen=True)
class Certificate:
    """Whether a region computes the same before and after a rewrite, for all inputs.

    Attributes
    ----------
    status : {"certified", "tested", "none", "failed"}
        Certified: for all inputs, except with `probability`. Tested: only on probes, since the region is not affine.
    reason : str
        What was evaluated, why nothing was evaluated, or what failed.
    residual : float
        Largest deviation, relative to the sum of the absolute values of all terms of that element (affine regions), or
        to the largest value (others).
    bound : float
        The deviation that rounding explains, in the same unit. A larger residual refuses the rewrite.
    probability : float
        The probability that an error of 1000 times the bound in one coefficient is missed; 1 if nothing is claimed.
    """

    status: str
    reason: str
    residual: float = 0.0
    bound: float = 0.0
    probability: float = 1.0

    @property
    def passed(self) -> bool:
        return self.status != "failed"


@dataclass(frozen=True)
class Rewrite:
    """What a pass did at one place.

    Attributes
    ----------
    reason : str
        One sentence for the user.
    removed, added : tuple of str
        The removed and the added operators, as "Op name".
    macs_before, macs_after : int
        Multiply-adds of those; 0 if sizes are unknown.
    residual : float
        Largest relative rounding of folded weights, max |rounded − exact| / max |exact|.
    became : tuple of (str, str)
        The outputs of the removed operators, each with the output of its replacement ("" if there is none).
    signature : str
        Of a measured rewrite. Rewrites whose signatures are equal up to the colon are measured and kept together.
    site : Site
        Where the pass acted; filled in by the driver.
    before, after : tuple of Operator
        The region that changed, filled in by the driver if it certifies.
    certificate : Certificate or None
    growth : int
        Bytes by which the constants of the model grew; filled in by the driver.
    enabled_by : tuple of str
        Measured passes. The rewrite can pay only together with a rewrite of one of them to the same operators. Empty:
        it can pay alone.
    """

    reason: str
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    macs_before: int = 0
    macs_after: int = 0
    residual: float = 0.0
    became: tuple[tuple[str, str], ...] = ()
    signature: str = ""
    site: Site = Site()
    before: tuple[Operator, ...] = ()
    after: tuple[Operator, ...] = ()
    certificate: Certificate | None = None
    growth: int = 0
    enabled_by: tuple[str, ...] = ()

    @property
    def pass_name(self) -> str:
        return self.site.pass_name

    @classmethod
    def of(cls, reason: str, records: Sequence[Rewrite], renamed: Mapping[str, str] | None = None) -> Rewrite:
        """Join several replacements into one rewrite; `renamed` maps old names of results to new ones."""
        names = renamed or {}
        return cls(
            reason,
            tuple(name for r in records for name in r.removed),
            tuple(name for r in records for name in r.added),
            sum(r.macs_before for r in records),
            sum(r.macs_after for r in records),
            max((r.residual for r in records), default=0.0),
            tuple((old, names.get(new, new)) for r in records for old, new in r.became),
        )

    def with_signature(self, signature: str) -> Rewrite:
        return replace(self, signature=signature)


@dataclass(frozen=True)
class Skip:
    """Why a pass did not rewrite a place where it could act, in a sentence that a user can act on."""

    reason: str
    site: Site = Site()

    @property
    def pass_name(self) -> str:
        return self.site.pass_name

    @property
    def tensor(self) -> str:
        return self.site.tensor


@dataclass(frozen=True)
class Outcome:
    """The rewrites and the refusals of a run."""

    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()
