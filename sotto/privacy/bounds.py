"""Upper bounds on epsilon: the numerics behind `accounting`, with no argument checking.

Three bounds, each valid on its own; the least is taken.

1. The closed form of the Gaussian mechanism (Balle and Wang 2018, arXiv:1805.06530). Exact without subsampling, and an
   upper bound with it, because subsampling never hurts (joint convexity of the hockey-stick divergence).
2. The privacy-loss distribution of dp_accounting, pessimistic connect-the-dots (Doroshenko et al. 2022,
   arXiv:2207.04380). An upper bound at every discretisation interval, tight as the interval shrinks.
3. Renyi DP of dp_accounting, for add_or_remove_one. Loose, but immune to the round-off of 2.

The interval. Connect-the-dots replaces the loss of a step, between two grid points `h` apart, by a two-point
distribution: it adds a variance of about h^2/6 per step. Relative to the variance `v` of the loss itself this costs
about h^2/(12 v) in epsilon. So `h` is chosen as a fraction of sqrt(v), not as an absolute number (at q = 1e-4,
sigma = 2 the usual 1e-4 is twice the standard deviation of the loss, and overstates epsilon by 29 %). The estimate is
then checked by Richardson extrapolation between two intervals and refined as needed.

Round-off. The FFT and the one-step hockey-stick values carry absolute errors near 1e-16, amplified by the number of
steps. `_ROUND_OFF * steps` is taken off delta before epsilon is read, so that they cannot lower it. Where that is not
small against delta (delta < 1e-11 or so), bound 2 says little and bound 3 takes over.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable
from typing import Any

from sotto.errors import SottoError
from sotto.privacy.events import Event, Gaussian, Laplace, PoissonGaussian, PoissonLaplace, dp_accounting

Counts = tuple[tuple[Event, int], ...]

FINE = 4e-4
COARSE = 6e-3
_ROUND_OFF = 1e-15
_MAX_ONE_STEP_BINS = 800_000
_MAX_BINS = 3_000_000
_LAPLACE = (Laplace, PoissonLaplace)
_LARGEST_PLD_EPSILON = 500.0  # beyond, exp(-loss) loses its digits inside dp_accounting


def normalise(events: tuple[tuple[Event, int], ...]) -> Counts:
    """Merges equal events, reads Poisson sampling with probability 1 as no sampling, and fixes the order."""
    counts: dict[Event, int] = {}
    for event, count in events:
        if isinstance(event, PoissonGaussian) and event.sampling_prob == 1:
            event = Gaussian(event.noise_multiplier)
        if isinstance(event, PoissonLaplace) and event.sampling_prob == 1:
            event = Laplace(event.noise_multiplier)
        if count:
            counts[event] = counts.get(event, 0) + count
    return tuple(sorted(counts.items(), key=lambda item: (item[0].kind, repr(item[0]))))


@functools.lru_cache(maxsize=4096)
def upper_bound(events: Counts, delta: float, relation: str, tolerance: float, refine: bool = True) -> float:
    """Epsilon of the composition of `events`, never below the truth.

    Args:
      events: from `normalise`.
      delta: in (0, 1).
      relation: `add_or_remove_one` or `replace_one`.
      tolerance: the relative excess over the truth that is aimed at.
      refine: whether finer grids are tried until that is seen to be reached; without, the first grid's bound is taken.
    """
    if not events:
        return 0.0
    if any(isinstance(event, _LAPLACE) for event, _ in events) and relation == "replace_one":
        raise SottoError(
            "SOT403",
            what="Laplace noise cannot be accounted for under replace_one",
            where="neighboring_relation",
            why="no accountant for this pair is known to be correct",
            fix="use neighboring_relation: add_or_remove_one",
        )
    if any(event.noise_multiplier == 0 for event, _ in events):
        return math.inf
    best = math.inf
    if pure := [(event.pure_epsilon, count) for event, count in events if isinstance(event, _LAPLACE)]:
        if len(pure) == len(events):  # what holds at delta 0 holds at every delta
            best = math.fsum(value * count for value, count in pure) * (1 + 1e-12)
    else:
        per_step = 2.0 if relation == "replace_one" else 1.0
        mu = per_step * math.sqrt(sum(count / event.noise_multiplier**2 for event, count in events))
        best = gaussian_epsilon(mu, delta)
        if all(isinstance(event, Gaussian) for event, _ in events):
            return best
    tight = _refined_pld(events, delta, relation, tolerance, 12 if refine else 1)
    if math.isinf(tight) and relation == "add_or_remove_one":
        tight = rdp_bound(events, delta)
    return min(best, tight)


@functools.cache
def _log_ndtr() -> Any:
    return importlib.import_module("scipy.special").log_ndtr  # untyped, and slow to import


def _log_normal_cdf(x: float) -> float:
    return float(_log_ndtr()(x))


def gaussian_log_delta(mu: float, epsilon: float) -> float:
    """log of the hockey-stick divergence of N(mu, 1) from N(0, 1): equation 6 of arXiv:1805.06530."""
    upper = _log_normal_cdf(mu / 2 - epsilon / mu)
    lower = epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu)
    return upper + math.log(-math.expm1(lower - upper)) if lower < upper else -math.inf


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity/deviation `mu`, rounded up by 1e-11 (relative) and 1e-12."""
    log_delta = math.log(delta)
    if gaussian_log_delta(mu, 0.0) <= log_delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * log_delta)  # the zCDP bound
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_log_delta(mu, middle) <= log_delta:
            high = middle
        else:
            low = middle
    return high * (1 + 1e-11) + 1e-12


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest `mu` for which the Gaussian mechanism is (epsilon, delta)-DP, rounded down by less than 1e-11."""
    log_delta = math.log(delta)
    low, high = 0.0, 1.0
    while gaussian_log_delta(high, epsilon) <= log_delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_log_delta(middle, epsilon) <= log_delta:
            low = middle
        else:
            high = middle
    return low * (1 - 1e-11)


def least_noise(
    spent: Callable[[float], float], target: float, guess: float, safe: float, slack: float, slope: float = 2.5
) -> tuple[float, float]:
    """A `sigma` <= `safe` with `spent(sigma)` in [target * (1 - slack), target], and how steeply `spent` falls there.

    `safe` is known to be within the target, and is not tried. `slope` is minus the slope of log spent over log sigma,
    as guessed: one step of Newton's method from each value, with the slope between the last two, inside a bracket.
    Stops also when the bracket is narrower than `slack`; returns its safe end.
    """
    low, high = 0.0, safe
    sigma, aim = min(guess, safe), math.log(target) + math.log1p(-slack / 2)
    before: tuple[float, float] | None = None
    for attempt in range(200):
        value = spent(sigma)
        if value <= target:
            high = sigma
        else:
            low = sigma
        if target * (1 - slack) <= value <= target or high <= low * (1 + slack / 4):
            break
        step = math.nan
        if 0 < value < math.inf:
            point = (math.log(sigma), math.log(value))
            if before is not None and before[0] != point[0]:
                slope = min(max((before[1] - point[1]) / (point[0] - before[0]), 0.5), 20.0)
            step, before = sigma * math.exp(min(max((point[1] - aim) / slope, -1.0), 1.0)), point
        middle = math.sqrt(low * high) if low else high / 2
        sigma = step if low < step < high and attempt % 8 != 7 else middle  # nan is not inside
    return high, slope


def selection_bound(event: Event, steps: int, delta: float, mean: float, shape: float) -> float:
    """Epsilon by Renyi DP of the best of a random number of runs of `steps` events; see `selection`."""
    library = dp_accounting()
    trial = library.SelfComposedDpEvent(event.to_dp_event(), steps)
    return _renyi([(dp_accounting(".dp_event").RepeatAndSelectDpEvent(trial, mean, shape), 1)], delta)


@functools.lru_cache(maxsize=4096)
def rdp_bound(events: Counts, delta: float) -> float:
    """Epsilon by Renyi DP under add_or_remove_one (conversion of Canonne, Kamath and Steinke 2020)."""
    return _renyi([(event.to_dp_event(), count) for event, count in events], delta)


def _renyi(events: list[tuple[Any, int]], delta: float) -> float:
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [80, 100, 128, 192, 256, 384, 512, 1024]
    relation = dp_accounting().NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = dp_accounting(".rdp").RdpAccountant(orders, relation)
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)  # it warns of each order that it leaves out; fewer orders only make the bound larger
    try:
        for event, count in events:
            accountant.compose(event, count)
        value = float(accountant.get_epsilon(delta))
    finally:
        log.setLevel(before)
    return math.inf if math.isnan(value) else value


def _loss_scale(event: Event, relation: str) -> tuple[float, float]:
    """(standard deviation, largest value) of the privacy loss of one step, roughly. Sets the grid, not the bound."""
    sides = 2.0 if relation == "replace_one" else 1.0
    x = 1 / event.noise_multiplier
    if isinstance(event, Laplace):
        return min(x, 1.0), x
    if isinstance(event, PoissonLaplace):
        largest = event.pure_epsilon
        return min(event.sampling_prob * x, largest, 1.0), largest
    tail = 10 * x + x * x / 2
    if isinstance(event, Gaussian):
        return sides * x, sides * tail
    q = event.sampling_prob
    deviation = min(q * math.sqrt(math.expm1(min(x * x, 700.0))), x)
    largest = math.log1p(q * math.expm1(tail)) if tail < 700 else tail
    return sides * deviation, largest - math.log1p(-q) * sides


def _refined_pld(events: Counts, delta: float, relation: str, tolerance: float, grids: int) -> float:
    """The least of several PLD bounds, refined until the extrapolated excess is below `tolerance`. inf if unusable.

    At most `grids` are tried."""
    steps = sum(count for _, count in events)
    target = delta - _ROUND_OFF * steps
    if target < delta / 2:
        return math.inf
    scales = [(*_loss_scale(event, relation), count) for event, count in events]
    variance = sum(deviation**2 * count for deviation, _, count in scales)
    largest = max(top for _, top, _ in scales)
    finest = max(largest / _MAX_ONE_STEP_BINS, (largest + 20 * math.sqrt(variance)) / _MAX_BINS)
    aim = tolerance * (2 if grids > 1 else 0.5)  # rounding to a grid adds interval^2 / 12 to a step's variance
    interval = max(2 * math.sqrt(12 * aim * variance / steps), largest / 20_000, finest)
    order = 2
    if any(isinstance(event, _LAPLACE) for event, _ in events):
        # The loss has an atom at 1/scale, off the grid: the excess falls with the interval, not with its square.
        order, interval = 1, max(min(interval, tolerance * largest), finest)
    best, previous, previous_interval = math.inf, math.inf, math.inf
    for _ in range(grids):
        value = _pld_bound(events, target, relation, interval)
        if math.isinf(value):
            break
        best = min(best, value)
        shrink = 2.0
        if math.isfinite(previous):
            ratio = (previous_interval / interval) ** order
            excess = max(previous - value, 0.0) / (ratio - 1)
            if excess <= tolerance * value + 1e-10:
                break
            shrink = min(max((excess / (0.7 * tolerance * value + 1e-10)) ** (1 / order), 1.5), 8.0)
        if interval <= finest:
            break
        previous, previous_interval = value, interval
        interval = max(interval / shrink, finest)
    return best


def _pld_bound(events: Counts, delta: float, relation: str, interval: float) -> float:
    pair = dp_accounting().NeighboringRelation[relation.upper()]
    accountant = dp_accounting(".pld").PLDAccountant(pair, interval)
    try:
        for event, count in events:
            accountant.compose(event.to_dp_event(), count)
        value = float(accountant.get_epsilon(delta))
    except (ValueError, OverflowError, ZeroDivisionError, FloatingPointError):
        return math.inf  # not representable on this grid: another bound takes over
    return value if 0 <= value <= _LARGEST_PLD_EPSILON else math.inf
