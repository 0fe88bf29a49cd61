"""Races that only ask whether a model is slower than another, where the spread of sessions is known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pwopt.running.student import student_quantile
from pwopt.running.timing import CONFIDENCE, HARMLESS, Race, Rules

#: Sessions under different conditions differ by at least this much from pair to pair (natural logarithm), whatever the
#: spread of another race was.
LEAST_SPREAD = 0.03
#: From so many pairs on, the spread of the race itself is enough.
OWN_PAIRS = 5
#: If the pairs of a race have more than so many times the known variance, their own spread alone counts: by the F test,
#: sessions that differ alike exceed it in about one of twenty races of three pairs.
FOREIGN = 4.0


@dataclass(frozen=True)
class Spread:
    """How much the ratio of two models differs from pair to pair of fresh sessions.

    Attributes
    ----------
    deviation : float
        The standard deviation of the natural logarithm of the ratio.
    freedom : int
        Its degrees of freedom; 0 if nothing is known.
    """

    deviation: float = LEAST_SPREAD
    freedom: int = 0

    @classmethod
    def from_race(cls, race: Race) -> Spread:
        """Pool the spreads of all models of a race against the first, at least `LEAST_SPREAD`."""
        count, others = len(race.pairs), len(race.pairs[0].times) - 1
        if count < 2:
            return cls()
        variances = [float(np.var(race.logs(i), ddof=1)) for i in range(1, others + 1)]
        return cls(max(LEAST_SPREAD, math.sqrt(sum(variances) / others)), (count - 1) * others)

    def interval(self, race: Race, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Confidence interval of the speed-up in another race; few pairs are judged by the known spread too.

        Where the pairs of the race differ by much more than is known, their own spread alone counts. With several
        threads, sessions may differ much more than with one.
        """
        logs = race.logs(1)
        foreign = len(logs) > 1 and float(np.var(logs, ddof=1)) > FOREIGN * self.deviation**2
        return race.interval(1, confidence) if foreign else self.pool(race, confidence)

    def pool(self, race: Race, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The same, if sessions differ alike in both races. Otherwise it is too narrow.

        The variance is pooled with that of the other race, weighted by degrees of freedom, as in Student's test for two
        samples.
        """
        logs = race.logs(1)
        if len(logs) >= OWN_PAIRS or not self.freedom:
            return race.interval(1, confidence)
        freedom = self.freedom + len(logs) - 1
        squares = self.freedom * self.deviation**2 + float(np.sum((logs - np.mean(logs)) ** 2))
        reach = student_quantile(freedom, confidence) * math.sqrt(squares / freedom / len(logs))
        return math.exp(float(np.mean(logs)) - reach), math.exp(float(np.mean(logs)) + reach)


#: Nothing is known.
UNKNOWN_SPREAD = Spread()


@dataclass(frozen=True)
class NoninferiorityRules(Rules):
    """Rules that also end a race after few pairs if the second model is not slower by the fraction `harmless`.

    The race ends if the second model is unlikely to be slower by that fraction according to the known spread, which one
    pair may show. It also ends after two pairs and some time if the second model does not seem slower by that fraction,
    since a verdict that it is surely slower has become unlikely.

    Attributes
    ----------
    spread : Spread
    patience : float
        Seconds of work after which a race may end because the second model does not seem slower.
    """

    spread: Spread = UNKNOWN_SPREAD
    patience: float = math.inf

    def ended_by(self, race: Race, spent: float = 0.0) -> bool:
        """Whether what was measured so far is enough; `spent` is the part of the time that has passed."""
        if super().ended_by(race, spent):
            return True
        if self.spread.freedom and self.spread.interval(race, HARMLESS)[0] > 1 - self.harmless:
            return True
        worked = sum(sum(p.creation) + 2 * sum(p.first_run) + sum(map(float, map(np.sum, p.times))) for p in race.pairs)
        return len(race.pairs) > 1 and worked >= self.patience and float(np.mean(race.logs(1))) > -self.harmless
