"""Races: the time of one model against another's, as the next session of each will see it.

Two sessions of one and the same model differ for as long as they live, by where their memory happens to lie, so no
number of runs within one pair of sessions tells two models apart. A race therefore consists of several *pairs*: fresh
sessions of all models, created in changing order, with a few interleaved rounds of runs each. One pair gives one
ratio. The interval is Student's over the pairs, so it includes what differs between sessions.

Sources: Kalibera and Jones, "Rigorous benchmarking in reasonable time", ISMM 2013 (how many runs a session is worth);
Curtsinger and Berger, "Stabilizer", ASPLOS 2013 (why the memory layout must be sampled).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pwopt.algebra import Values
from pwopt.inputs.feeds import Feeds
from pwopt.running import memory
from pwopt.running.creation_order import order_creation
from pwopt.running.progress import Progress, ignore_progress
from pwopt.running.session import Session
from pwopt.running.student import student_quantile

#: Confidence of the intervals that users see, and of what is called faster or slower.
CONFIDENCE = 0.99
#: A race has at least so many pairs of sessions, unless they take `OVERDRAWN` times its budget; and at most so many.
MIN_PAIRS, MAX_PAIRS, OVERDRAWN = 3, 60, 2.0
#: Rounds of a pair: at least, at most, and in the first pair.
MIN_PAIR_ROUNDS, MAX_PAIR_ROUNDS, FIRST_ROUNDS = 2, 40, 3
#: A model whose first run takes so many seconds of processor time needs no second run before it is timed.
WARM_SECONDS = 0.2
#: By how much two sessions of one model are expected to differ: huge pages, idle machine (natural logarithm).
BETWEEN_SESSIONS = 0.008
#: After these numbers of pairs, the rules of a race are checked. Each check costs confidence, so there are few.
LOOKS = (3, 5, 8, 12, 17, 24, 33, 45, 60)
#: Pairs before a race may end because there is nothing to gain, and the confidence of that.
HOPELESS_PAIRS, HOPELESS = 5, 0.7
#: A race may end if the probability that it proves what it is to prove is below this. The number is the quantile of the
#: normal distribution for a probability of 5 %.
UNLIKELY = 1.645
#: The confidence at which a race may end because the second model is unlikely to be slower.
HARMLESS = 0.9
#: A large speed-up need not be known more precisely than to this part of it (natural logarithm).
PART_OF_GAIN = 0.1
#: From so many ratios on, those further than so many scaled median absolute deviations from their median count as if
#: they were no further (Huber, "Robust Estimation of a Location Parameter", 1964).
ROBUST, HUBER = 8, 2.0


@dataclass(frozen=True)
class Evidence:
    """What races said of one model against another, in sums to which later races add.

    Attributes
    ----------
    pairs : float
        How many pairs of sessions. On a busy machine each counts for less than one.
    total, squares : float
        Sums over the pairs of the natural logarithm of the speed-up, and of its square.
    count : int
        One more than the degrees of freedom of the spread, where they are known: usually the number of pairs.
    """

    pairs: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    @classmethod
    def from_race(cls, race: Race, i: int = 1) -> Evidence:
        """The evidence on model `i` against the first.

        If three models raced in fewer than `ROBUST` pairs, the spread of sessions comes from all three, as in a
        randomised block design with a pair as a block (Fisher, "The Design of Experiments", 1935). A third model thus
        doubles the degrees of freedom. This assumes that sessions of all three differ by similar factors. Where the
        ratios of model `i` spread more than that, their own spread counts.
        """
        count, logs = len(race.pairs), race.logs(i)
        if len(race.pairs[0].times) != 3 or not 2 <= count < ROBUST:
            return cls.from_logs(logs, race.own)
        table = np.stack([np.zeros(count), race.logs(1), race.logs(2)])
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        freedom = 2 * (count - 1)
        shared = 2 * float(np.sum(rest**2)) / freedom  # of the difference between two sessions
        return cls.from_moments(
            race.own * count, float(np.mean(logs)), max(shared, float(np.var(logs, ddof=1))), freedom
        )

    @classmethod
    def from_logs(cls, logs: Values, own: float = 1.0) -> Evidence:
        """The evidence of independent logarithms of a speed-up, measured with the part `own` of the machine's time.

        From `ROBUST` values on by one step of Huber's M-estimator, since slow spells hit single pairs. Values that
        count as if they were nearer add no degree of freedom (Tukey and McLaughlin, Sankhya A 25, 1963).
        """
        pairs, freedom = len(logs), len(logs) - 1
        mean, spread = float(np.mean(logs)), float(np.std(logs, ddof=1)) if freedom else 0.0
        middle = float(np.median(logs))
        scale = 1.4826 * float(np.median(np.abs(logs - middle)))
        if scale > 0 and pairs >= ROBUST:
            scores = (logs - middle) / scale
            clipped, near = np.clip(scores, -HUBER, HUBER), int(np.sum(np.abs(scores) < HUBER))
            mean = middle + scale * float(np.sum(clipped)) / near
            spread = scale * float(np.std(clipped, ddof=1)) * pairs / near
            freedom = max(1, near - 1)
        return cls.from_moments(own * pairs, mean, spread**2, freedom)

    @classmethod
    def from_moments(cls, pairs: float, mean: float, variance: float, freedom: int) -> Evidence:
        """The evidence of a mean, and of the variance of one value, which is known with so many degrees of freedom."""
        seen = freedom + 1
        return cls(pairs, pairs * mean, pairs * (mean**2 + variance * (1 - 1 / seen)), seen)

    def __add__(self, other: Evidence) -> Evidence:
        sums = self.pairs + other.pairs, self.total + other.total, self.squares + other.squares
        return Evidence(*sums, self._seen + other._seen)

    @property
    def _seen(self) -> int:
        return self.count or int(self.pairs)

    @property
    def speedup(self) -> float:
        """The geometric mean of the ratios."""
        return math.exp(self.total / self.pairs) if self.pairs else 1.0

    @property
    def deviation(self) -> float:
        """The standard deviation of the natural logarithm of the speed-up from pair to pair; needs two pairs."""
        variance = max(0.0, self.squares / self.pairs - (self.total / self.pairs) ** 2)
        return math.sqrt(variance / (1 - 1 / self._seen))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Confidence interval of the speed-up, by Student's distribution (1908)."""
        if self._seen < 2 or not self.pairs:
            return 0.0, math.inf
        mean = self.total / self.pairs
        reach = student_quantile(self._seen - 1, confidence) * self.deviation / math.sqrt(self.pairs)
        return math.exp(max(mean - reach, -700.0)), math.exp(min(mean + reach, 700.0))


#: No evidence.
NO_EVIDENCE = Evidence()


@dataclass(frozen=True)
class SessionPair:
    """One fresh session of each model.

    Attributes
    ----------
    times : tuple of arrays of float64, shape (rounds,)
        Seconds of each run by `Session.clock`, one array for each model. Equal indices ran in the same round.
    creation, first_run : tuple of float
        Seconds of processor time to create each session, and of its first run.
    """

    times: tuple[Values, ...]
    creation: tuple[float, ...] = ()
    first_run: tuple[float, ...] = ()


@dataclass(frozen=True)
class Race:
    """What several models took, in several pairs of fresh sessions.

    Attributes
    ----------
    pairs : tuple of SessionPair
    own : float
        Which part of the time that passed the models had for themselves; 1 where that is not known.
    """

    pairs: tuple[SessionPair, ...]
    own: float = 1.0

    @property
    def rounds(self) -> int:
        """Runs of each model."""
        return sum(len(pair.times[0]) for pair in self.pairs)

    def logs(self, i: int, base: int = 0) -> Values:
        """For each pair, the natural logarithm of the time of model `base` over that of model `i`."""
        return np.array([float(np.median(np.log(pair.times[base] / pair.times[i]))) for pair in self.pairs])

    def median(self, i: int) -> float:
        """Seconds of a run of model `i`: the median over all sessions."""
        return float(np.median(np.concatenate([pair.times[i] for pair in self.pairs])))

    def minimum(self, i: int) -> float:
        """Seconds of the fastest run of model `i`."""
        return float(min(np.min(pair.times[i]) for pair in self.pairs))

    def creation(self, i: int) -> float:
        """Seconds of processor time to create a session of model `i`: the median over the pairs."""
        return statistics.median(pair.creation[i] for pair in self.pairs)

    def creation_logs(self, i: int) -> Values:
        """For each pair, the natural logarithm of the first model's `creation` over that of model `i`."""
        return np.array([math.log(max(pair.creation[0], 1e-9) / max(pair.creation[i], 1e-9)) for pair in self.pairs])

    def first_run(self, i: int) -> float:
        """Seconds of processor time of the first run of model `i`: the median over the pairs."""
        return statistics.median(pair.first_run[i] for pair in self.pairs)

    def speedup(self, i: int = 1) -> float:
        """The time of the first model over that of model `i`: the geometric mean over the pairs."""
        return Evidence.from_race(self, i).speedup

    def interval(self, i: int = 1, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Confidence interval of `speedup`.

        A race that went on after its first check may have ended because its numbers looked good. Therefore its
        probability of an error is halved.
        """
        doubt = (1 - confidence) / (1 if len(self.pairs) <= LOOKS[0] else 2)
        return Evidence.from_race(self, i).interval(1 - doubt)


@dataclass(frozen=True)
class Rules:
    """When a race may end before its budget is spent.

    If there is a third model, it is a copy of the first. The second model is then faster or slower only by more than
    the copy.

    Attributes
    ----------
    decided : float or None
        The race may end when the second model is faster or slower at this confidence, over all checks.
    worth : float
        It may end when the second model's speed-up is hardly this; not before `HOPELESS_PAIRS`.
    known : Evidence
        The evidence of earlier races.
    earlier : tuple of SessionPair
        The pairs of an earlier race of the same models, which this race continues.
    promise : float
        The largest speed-up that the second model can have. The race may end when it is unlikely to prove even that in
        the time that is left.
    precise : float
        It may end when the speed-up is known to this relative precision, at `CONFIDENCE`.
    margin : float
        It may also end as decided when the second model is surely not slower by this fraction; not before
        `HOPELESS_PAIRS`.
    harmless : float
        It may end when the second model is unlikely to be slower by this fraction, at the confidence `HARMLESS`.
    roughly : float
        A decided race goes on until the speed-up is known to this relative precision or `PART_OF_GAIN`.
    """

    decided: float | None = None
    worth: float = 0.0
    known: Evidence = NO_EVIDENCE
    earlier: tuple[SessionPair, ...] = ()
    promise: float = math.inf
    precise: float = 0.0
    margin: float = 0.0
    harmless: float = 0.0
    roughly: float = math.inf

    def ended_by(self, race: Race, spent: float = 0.0) -> bool:
        """Whether what was measured so far is enough; `spent` is the part of the time that has passed."""
        count = len(race.pairs)
        if count not in LOOKS or not (self.decided or self.precise or self.harmless):
            return False
        race = Race((*self.earlier, *race.pairs), race.own)
        evidence = self.known + Evidence.from_race(race)
        look = LOOKS.index(count) + 1
        doubt = 1 / (look * (look + 1))  # the part of the doubt for this check; all parts add up to less than 1
        if self.precise and _precision(evidence.interval(1 - (1 - CONFIDENCE) * doubt)) < self.precise:
            return True
        if self.harmless and evidence.interval(HARMLESS)[0] > 1 - self.harmless:
            return True
        if self.decided is None:
            return False
        low, high = evidence.interval(1 - (1 - self.decided) * doubt)
        noise = math.exp(abs(math.log(race.speedup(2)))) if len(race.pairs[0].times) > 2 else 1.0
        same = bool(self.margin) and count >= HOPELESS_PAIRS and low > 1 - self.margin
        if low > noise or high < 1 / noise or same:
            part = PART_OF_GAIN * abs(math.log(evidence.speedup))
            return _precision(evidence.interval(CONFIDENCE)) < max(self.roughly, part)
        if count >= HOPELESS_PAIRS and evidence.interval(HOPELESS)[1] < self.worth:
            return True
        return spent > 0 and self._is_futile(evidence, min(MAX_PAIRS, count / spent) / count)

    def _is_futile(self, evidence: Evidence, growth: float) -> bool:
        """Whether even the speed-up `promise` is unlikely to be proved by `growth` times the pairs of this race.

        This is stochastic curtailment: the mean at the end is that of the pairs so far and of others whose mean is the
        promised one (Lan, Simon and Halperin, "Stochastically curtailed tests in long-term clinical trials", Sequential
        Analysis 1, 1982).
        """
        if self.decided is None or math.isinf(self.promise):
            return False
        done, most = evidence.pairs, self.known.pairs + growth * (evidence.pairs - self.known.pairs)
        deviation = evidence.deviation
        expected = (evidence.total + (most - done) * math.log(self.promise)) / most
        error = deviation * math.sqrt(max(0.0, most - done)) / most
        needed = student_quantile(max(1, int(most) - 1), self.decided) * deviation / math.sqrt(most)
        return expected + UNLIKELY * error < needed


def least_provable(pairs: int) -> float:
    """The least speed-up that so many pairs can be expected to prove, where sessions differ by `BETWEEN_SESSIONS`."""
    pairs = max(MIN_PAIRS, pairs)
    return math.exp(student_quantile(pairs - 1, CONFIDENCE) * BETWEEN_SESSIONS / math.sqrt(pairs))


def _precision(interval: tuple[float, float]) -> float:
    """Half the width of an interval, relative to its lower end."""
    low, high = interval
    return (high / low - 1) / 2 if low > 0 else math.inf


#: All pairs that there is time for.
TO_THE_END = Rules()


def race(
    openers: Sequence[Callable[[], Session]], feeds: Feeds, budget: float, progress: Progress = ignore_progress,
    rules: Rules = TO_THE_END, *, together: bool = True,
) -> Race:  # fmt: skip
    """Time models against each other on the same inputs, in pairs of fresh sessions.

    Parameters
    ----------
    openers : sequence of callable
        Each creates a fresh session of one model.
    feeds : dict of arrays
    budget : float
        Wall seconds to spend, the creation of sessions included.
    progress : callable, optional
        Called with (stage, fraction done).
    rules : Rules, optional
        What may end the race early.
    together : bool
        Whether the sessions of a pair are open side by side, and run in turn. Otherwise each is closed before the next
        one is created, so that large models take less memory.
    """
    rng = np.random.default_rng(0)
    pairs: list[SessionPair] = []
    rounds, start, passed = FIRST_ROUNDS, time.perf_counter(), 0.0
    for done in itertools.count(1):
        order = order_creation(len(openers), done - 1)
        deadline = start + budget / (MIN_PAIRS if done == 1 else 1)
        pair, wall = _run_pair(openers, order, feeds, rounds, deadline, rng, together)
        pairs.append(pair)
        passed += wall
        spent = time.perf_counter() - start
        share = spent / budget if budget > 0 else 1.0
        progress("racing", min(1.0, max(share, done / MAX_PAIRS)))
        busy = sum(float(np.sum(times)) for p in pairs for times in p.times)
        seen = Race(tuple(pairs), min(1.0, busy / passed) if passed else 1.0)
        enough = done >= MIN_PAIRS or (done > 1 and spent > OVERDRAWN * budget > 0)
        if (
            (enough and spent >= budget)
            or done >= MAX_PAIRS
            or rules.ended_by(seen, spent / budget if budget > 0 else 1.0)
        ):
            return seen
        rounds = _rounds_worth(pairs, (budget - spent) / max(1, MIN_PAIRS - done))
    raise AssertionError("itertools.count ends only by the return above")


def _run_pair(
    openers: Sequence[Callable[[], Session]], order: Sequence[int], feeds: Feeds, rounds: int, deadline: float,
    rng: np.random.Generator, together: bool,
) -> tuple[SessionPair, float]:  # fmt: skip
    """A pair, and the wall seconds of its timed runs. After the deadline, it ends with the round that it is in."""
    padding = bytearray(int(rng.integers(1 << 12, 1 << 20)))  # so that sessions do not lie where the last ones lay
    sessions: dict[int, Session] = {}
    creation, first_run = [0.0] * len(openers), [0.0] * len(openers)
    times: list[list[float]] = [[] for _ in openers]
    passed = 0.0
    for place, i in enumerate(order):
        begin = time.process_time()
        sessions[i] = openers[i]()
        creation[i] = time.process_time() - begin
        sessions[i].bind(feeds)
        begin = time.process_time()
        sessions[i].step()
        first_run[i] = time.process_time() - begin
        memory.release_freed()
        if not together:
            left = max(0.0, deadline - time.perf_counter()) / (len(order) - place)
            passed += _time_rounds(sessions, first_run, time.perf_counter() + left, rounds, rng, times)
            sessions.clear()
            memory.release_freed()
    if together:
        passed += _time_rounds(sessions, first_run, deadline, rounds, rng, times)
    del padding
    shared = min(map(len, times))
    return SessionPair(tuple(np.array(t[:shared]) for t in times), tuple(creation), tuple(first_run)), passed


def _time_rounds(
    sessions: Mapping[int, Session], first_run: Sequence[float], deadline: float, rounds: int,
    rng: np.random.Generator, times: Sequence[list[float]],
) -> float:  # fmt: skip
    """Time open sessions in rounds, each round in a random order; append to `times`, and return the wall seconds."""
    for i, session in sessions.items():
        if first_run[i] < WARM_SECONDS and time.perf_counter() < deadline:
            session.step()
    numbers, passed = sorted(sessions), 0.0
    for done in range(rounds):
        if done >= 1 and time.perf_counter() > deadline:
            break
        for k in rng.permutation(len(numbers)):
            session = sessions[numbers[k]]
            if session.spins:
                session.step()
            begin, wall = session.clock(), time.perf_counter()
            session.step()
            times[numbers[k]].append(max(session.clock() - begin, 1e-9))
            passed += time.perf_counter() - wall
    return passed


def _rounds_worth(pairs: Sequence[SessionPair], seconds: float) -> int:
    """How many rounds the next pair should have, within so many seconds.

    √(cost of a pair's start ÷ cost of a round) · (spread of rounds ÷ spread of sessions) makes the interval as narrow
    as it can be for the time (Kalibera and Jones, 2013, equation 1).
    """
    start = statistics.median(sum(p.creation) + 2 * sum(p.first_run) for p in pairs)
    each = max(1e-6, statistics.median(sum(float(np.median(t)) for t in p.times) for p in pairs))
    spreads = [float(np.std(np.log(p.times[0] / t))) for p in pairs for t in p.times[1:] if len(t) > 1]
    spread = statistics.median(spreads) if spreads else BETWEEN_SESSIONS
    wanted = math.sqrt(start / each) * spread / BETWEEN_SESSIONS
    affordable = (seconds - start) / each
    return int(max(MIN_PAIR_ROUNDS, min(wanted, affordable, MAX_PAIR_ROUNDS)))
