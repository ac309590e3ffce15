"""What it costs to train several models and to release the best of them.

If the number of trials is random, and every trial is drawn anew from the same list of settings, releasing the best one
costs little more than one trial (Liu and Talwar 2019, arXiv:1811.07971; Papernot and Steinke 2022, arXiv:2110.03620,
theorem 2 for the truncated negative binomial, of which these are the cases: logarithmic, shape 0, and geometric, shape
1). A fixed number of trials has no such bound: its price is that of all of them. Neither may the number that was drawn
become known. The score may be any function of the released model, or of public data.

Renyi bounds come from dp_accounting (`RepeatAndSelectDpEvent`); they are larger than those of privacy loss
distributions, also for a single trial.
"""

from __future__ import annotations

import math
import secrets
from typing import Literal

from sotto.errors import SottoError
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.bounds import least_noise, selection_bound
from sotto.privacy.events import check_number

Law = Literal["geometric", "logarithmic"]
SHAPES: dict[str, float] = {"geometric": 1.0, "logarithmic": 0.0}


def epsilon(event: PoissonGaussian, steps: int, delta: float, mean: float, law: Law = "geometric") -> float:
    """Returns an upper bound on epsilon of the best of a random number of trials, under add_or_remove_one.

    Args:
      event, steps: of one trial.
      delta: of the whole.
      mean: the expected number of trials, > 1.
      law: how that number is distributed.

    Raises:
      SottoError: SOT401, a number is out of range.
    """
    _check(mean, law)
    check_number("delta", delta, above=0, below=1)
    return selection_bound(event, steps, delta, mean, SHAPES[law])


def noise_multiplier(
    target: float, sampling_prob: float, steps: int, delta: float, mean: float, law: Law = "geometric"
) -> float:
    """Returns a noise multiplier for each trial that keeps the best of them within (target, delta). Never too small.

    Raises:
      SottoError: SOT401, a number is out of range.
    """
    check_number("epsilon", target, above=0)

    def spent(sigma: float) -> float:
        return epsilon(PoissonGaussian(sigma, float(sampling_prob)), steps, delta, mean, law)

    safe = 1.0
    while spent(safe) > target:
        safe *= 2
    return least_noise(spent, target, 0.7 * safe, safe, 2e-4)[0]


def draw_trials(mean: float, law: Law = "geometric", uniform: float | None = None) -> int:
    """Draws the number of trials, at least one. It is private: it must never be released.

    Args:
      uniform: FOR TESTS: in [0, 1), instead of the operating system's generator.
    """
    _check(mean, law)
    u = secrets.SystemRandom().random() if uniform is None else uniform
    if law == "geometric":
        stop = 1 / mean
        return 1 + math.floor(math.log1p(-u) / math.log1p(-stop))
    goes_on = logarithmic_parameter(mean)
    count, weight, below = 1, goes_on, 0.0
    scale = -math.log1p(-goes_on)
    while True:
        below += weight / count / scale
        if u < below or weight < 1e-300:
            return count
        count, weight = count + 1, weight * goes_on


def logarithmic_parameter(mean: float) -> float:
    """The p of P[K = k] = p^k / (k log(1 / (1 - p))) with this mean, p / ((1 - p) log(1 / (1 - p)))."""
    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        low, high = (p, high) if p / ((1 - p) * -math.log1p(-p)) < mean else (low, p)
    return low


def _check(mean: float, law: str) -> None:
    check_number("the expected number of trials", mean, above=1)
    if law not in SHAPES:
        raise SottoError(
            "SOT401", what=f"{law!r} is no law of the number of trials", where="distribution",
            why="the bound is proven for some laws alone", fix=f"use one of {', '.join(SHAPES)}",
        )  # fmt: skip
