"""From noise to epsilon and back. Every epsilon printed by Sotto comes from this module.

Every value errs on the safe side: `epsilon` is never below the truth (and at most 0.1 % above it, for delta down to
about 1e-9), `noise_multiplier` never too small, `max_steps` never too large. The bounds and their numerics are in
`bounds`. What is assumed: each unit takes part in each step independently with `sampling_prob` (Poisson sampling), the
noise is Gaussian with standard deviation `noise_multiplier` times the L2 sensitivity to adding or removing one unit
(Laplace: its scale over the L1 sensitivity), and all releases, adaptive ones included, are listed.

Under `replace_one` the noise multiplier keeps this meaning (relative to the add-or-remove sensitivity); the accountant
itself accounts for the doubled distance. For Poisson sampling it relies on the pair of distributions that dp_accounting
takes as dominating under replacement.

Epsilon is dimensionless, delta is a probability, a step is one release. dp_accounting is imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context
from statistics import NormalDist
from typing import Any, Literal, get_args

from sotto.errors import SottoError
from sotto.privacy.bounds import (
    COARSE,
    FINE,
    gaussian_epsilon,
    gaussian_mu,
    least_noise,
    normalise,
    rdp_bound,
    upper_bound,
)
from sotto.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    PoissonGaussian,
    PoissonLaplace,
    check_count,
    check_number,
    check_relation,
    event_from_dict,
)

__all__ = [
    "Event",
    "Gaussian",
    "Laplace",
    "PoissonGaussian",
    "PoissonLaplace",
    "attack_tradeoff",
    "composed_epsilon",
    "epsilon",
    "epsilon_without_amplification",
    "event_from_dict",
    "gdp_mu",
    "laplace_noise_multiplier",
    "max_steps",
    "noise_multiplier",
    "pure_epsilon",
    "suggest_delta",
]

Precision = Literal["fine", "coarse"]
_TOLERANCE = {"fine": FINE, "coarse": COARSE}
_SLACK = {"fine": 4e-4, "coarse": 3e-3}
_MAX_STEPS = 10**8


def epsilon(
    noise_multiplier: float,
    sampling_prob: float,
    steps: int,
    delta: float,
    neighboring_relation: str = "add_or_remove_one",
    accountant: str = "pld",
    *,
    precision: Precision = "fine",
) -> float:
    """Returns an upper bound on epsilon of `steps` DP-SGD steps.

    Args:
      noise_multiplier: standard deviation of the noise over the add-or-remove sensitivity; 0 gives infinity.
      sampling_prob: probability with which a unit takes part in a step, in (0, 1].
      steps: number of steps; 0 gives 0.
      delta: in (0, 1).
      neighboring_relation: `add_or_remove_one` or `replace_one`.
      accountant: `pld` (tight) or `rdp` (Renyi; looser, add_or_remove_one only).
      precision: `fine` is at most 0.1 % above the truth, `coarse` about 1 %, in a third of the time.

    Raises:
      SottoError: SOT401, an argument is out of range; SOT403, the accountant does not support the relation.
    """
    check_number("noise_multiplier", noise_multiplier, at_least=0)
    check_number("sampling_prob", sampling_prob, above=0, at_most=1)
    event = PoissonGaussian(float(noise_multiplier), float(sampling_prob))
    if accountant == "pld":
        return composed_epsilon([(event, steps)], delta, neighboring_relation, precision=precision)
    if accountant != "rdp" or check_relation(neighboring_relation) != "add_or_remove_one":
        raise SottoError(
            "SOT403",
            what=f"accountant {accountant!r} with neighboring_relation {neighboring_relation!r} is not available",
            where="accountant",
            why="only combinations with a proof behind them are offered",
            fix="use accountant='pld'",
        )
    check_number("delta", delta, above=0, below=1)
    events = normalise(((event, check_count("steps", steps)),))
    if not events:
        return 0.0
    return math.inf if noise_multiplier == 0 else rdp_bound(events, delta)


def composed_epsilon(
    events: Sequence[tuple[Event, int]],
    delta: float,
    neighboring_relation: str = "add_or_remove_one",
    *,
    precision: Precision = "fine",
) -> float:
    """Returns an upper bound on epsilon of all `events` together, each released `count` times, in any order.

    Tighter than adding the epsilons of the parts. Later releases may depend on earlier results in every way but one:
    the list of events (noise, sampling, counts) must not have been chosen after seeing them. For that case the theory
    has filters for Renyi and Gaussian DP only, not for privacy-loss distributions. Stopping early is always allowed.

    Raises:
      SottoError: SOT401, an argument is out of range; SOT403, an event is not supported under the relation.
    """
    check_number("delta", delta, above=0, below=1)
    relation = check_relation(neighboring_relation)
    for event, count in events:
        if not isinstance(event, get_args(Event)):
            event_from_dict({"kind": type(event).__name__})  # raises: what cannot be counted is refused
        check_count("steps", count)
    return upper_bound(normalise(tuple(events)), float(delta), relation, _tolerance(precision))


def noise_multiplier(
    epsilon: float,
    sampling_prob: float,
    steps: int,
    delta: float,
    neighboring_relation: str = "add_or_remove_one",
    *,
    precision: Precision = "fine",
) -> float:
    """Returns a noise multiplier that keeps `steps` steps within (epsilon, delta). Never too small.

    With precision `fine` it is at most 0.1 % above the smallest valid one; `coarse` (for what-if tables) is as safe,
    and mostly 1 to 2 % above. The same-named `epsilon` of the returned float, at the same precision, is at most the
    target.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    target = check_number("epsilon", epsilon, above=0)
    check_number("sampling_prob", sampling_prob, above=0, at_most=1)
    check_count("steps", steps, at_least=1)
    check_number("delta", delta, above=0, below=1)
    relation = check_relation(neighboring_relation)
    tolerance = _tolerance(precision)

    def spent(sigma: float, tolerance: float, refine: bool = True) -> float:
        events = normalise(((PoissonGaussian(sigma, float(sampling_prob)), steps),))
        return upper_bound(events, float(delta), relation, tolerance, refine)

    each = 2.0 if relation == "replace_one" else 1.0
    mu = gaussian_mu(target, delta) / each
    safe = math.sqrt(steps) / mu  # no amplification: the closed form, which bounds every sampling probability
    while gaussian_epsilon(each * math.sqrt(steps / safe**2), float(delta)) > target:
        safe *= 1 + 1e-10
    if sampling_prob == 1:
        return safe
    # Central limit theorem (Bu et al. 2020, arXiv:1911.11607): where to look first, never a bound.
    guess = min(1 / math.sqrt(math.log1p((mu / sampling_prob) ** 2 / steps)), safe)
    coarse, slope = least_noise(lambda sigma: spent(sigma, COARSE, refine=False), target, guess, safe, _SLACK["coarse"])
    if precision == "coarse":
        return coarse
    guess = coarse * (1 - _SLACK["coarse"] / slope)
    return least_noise(lambda sigma: spent(sigma, tolerance), target, guess, safe, _SLACK["fine"], slope)[0]


def pure_epsilon(events: Sequence[tuple[Event, int]]) -> float:
    """Returns the epsilon at delta 0 of all `events` together under add_or_remove_one: the sum of their epsilons.

    Infinite where Gaussian noise is among them. This is exact for the worst outcome, and simple composition allows
    later events to be chosen after seeing earlier results.

    Raises:
      SottoError: SOT401, a count is not a whole number.
    """
    total = 0.0
    for event, count in events:
        if check_count("steps", count):
            total += count * event.pure_epsilon if isinstance(event, Laplace | PoissonLaplace) else math.inf
    return total * (1 + 1e-12)


def laplace_noise_multiplier(epsilon: float, sampling_prob: float, steps: int) -> float:
    """Returns the least scale (over the L1 sensitivity) with which `steps` Laplace steps are pure epsilon-DP.

    The inverse of `pure_epsilon`: 1 / log(1 + (e^(epsilon / steps) - 1) / sampling_prob), rounded up.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    check_number("epsilon", epsilon, above=0)
    check_number("sampling_prob", sampling_prob, above=0, at_most=1)
    each = epsilon / check_count("steps", steps, at_least=1)
    # For each > 700 sampling is ignored: then one step may cost that much without it.
    scale = 1 / math.log1p(math.expm1(each) / sampling_prob) if each < 700 else 1 / each
    while pure_epsilon([(PoissonLaplace(scale, float(sampling_prob)), steps)]) > epsilon:
        scale *= 1 + 1e-12
    return scale


def max_steps(
    epsilon: float,
    noise_multiplier: float,
    sampling_prob: float,
    delta: float,
    neighboring_relation: str = "add_or_remove_one",
) -> int:
    """Returns the largest number of steps whose epsilon (as `epsilon` computes it) is within the budget.

    At most 10^8 is returned. Because `epsilon` is an upper bound, this may be up to 0.2 % fewer than the truth allows.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    target = check_number("epsilon", epsilon, at_least=0)
    event = PoissonGaussian(float(noise_multiplier), float(sampling_prob))
    check_number("delta", delta, above=0, below=1)
    relation = check_relation(neighboring_relation)

    def fits(steps: int, tolerance: float) -> bool:
        return upper_bound(normalise(((event, steps),)), float(delta), relation, tolerance) <= target

    low, high = 0, 1  # coarse first: everything that fits coarsely fits
    while high <= _MAX_STEPS and fits(high, COARSE):
        low, high = high, 2 * high
    low, high = _bisect(low, min(high, _MAX_STEPS + 1), lambda steps: fits(steps, COARSE), width=0.01)
    step = max(1, math.ceil(low * 0.01))
    high = low + step
    while high <= _MAX_STEPS and fits(high, FINE):
        low, high = high, high + 2 * (high - low)
    return _bisect(low, min(high, _MAX_STEPS + 1), lambda steps: fits(steps, FINE))[0]


def _bisect(low: int, high: int, fits: Callable[[int], bool], width: float = 0.0) -> tuple[int, int]:
    while high - low > max(1, width * low):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low, high


def epsilon_without_amplification(
    noise_multiplier: float, passes: int, delta: float, neighboring_relation: str = "add_or_remove_one"
) -> float:
    """Returns epsilon if each unit takes part `passes` times in an order that the attacker knows.

    This is the worst case over all ways of forming batches: what remains of the guarantee if sampling is observed.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    event = Gaussian(check_number("noise_multiplier", noise_multiplier, at_least=0))
    return composed_epsilon([(event, passes)], delta, neighboring_relation)


def gdp_mu(epsilon: float, delta: float) -> float:
    """Returns the mu of the Gaussian mechanism that has exactly this (epsilon, delta). For display, not a guarantee.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    check_number("epsilon", epsilon, at_least=0)
    check_number("delta", delta, above=0, below=1)
    return gaussian_mu(float(epsilon), float(delta))


def attack_tradeoff(mu: float, fpr: float) -> float:
    """Returns the highest true-positive rate of a membership attack with this false-positive rate under mu-GDP.

    Source: Dong, Roth and Su 2019, arXiv:1905.02383, equation 6.

    Raises:
      SottoError: SOT401, an argument is out of range.
    """
    check_number("mu", mu, at_least=0)
    check_number("fpr", fpr, at_least=0, at_most=1)
    if fpr in (0, 1):
        return float(fpr)
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(fpr) + mu)


def round_up(value: float, digits: int = 3) -> str:
    """A decimal string that is never below the value."""
    if not math.isfinite(value):
        return "infinite"
    scale = 10**digits
    return f"{math.ceil(value * scale) / scale:.{digits}f}"


def round_up_figures(value: float, figures: int = 3) -> str:
    """So many significant figures, never below the value: what is said to be "at most" may not be rounded down."""
    if not math.isfinite(value):
        return "infinite"
    shown = Context(prec=figures, rounding=ROUND_CEILING).create_decimal_from_float(value)
    return f"{shown:,f}" if shown < 10**6 else f"{shown:.{figures - 1}e}"


def suggest_delta(num_units: int) -> float:
    """Returns the largest power of ten that is at most 1 / (10 * num_units).

    Raises:
      SottoError: SOT401, num_units is not a whole number of at least 1.
    """
    check_count("num_units", num_units, at_least=1)
    digits = len(str(10 * num_units - 1))  # 10 ** digits >= 10 * num_units, exactly, in integers
    return float(f"1e-{digits}")


def _tolerance(precision: Any) -> float:
    if precision in _TOLERANCE:
        return _TOLERANCE[precision]
    raise SottoError(
        "SOT401",
        what=f"precision is {precision!r}",
        where="precision",
        why="it sets how tight the bound is",
        fix=f"use one of {', '.join(_TOLERANCE)}",
    )
