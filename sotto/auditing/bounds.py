"""How much privacy an attack that succeeded rules out: lower bounds on epsilon, each at a stated confidence.

An attacker who tells members from non-members better than (epsilon, delta)-DP allows has refuted it. Scores are higher
for what looks like a member. Every bound here holds whatever the attack was, under the assumption in its docstring; it
can be far below the truth, because attacks are imperfect and samples finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats

from sotto.errors import SottoError
from sotto.privacy import accounting
from sotto.privacy.bounds import gaussian_epsilon
from sotto.privacy.events import PoissonLaplace

LARGEST = 100.0
"""Lower bounds are searched up to here."""


@dataclass(frozen=True)
class LowerBound:
    """`epsilon` is not smaller than this, with the confidence that was asked for.

    Attributes:
      method: `clopper_pearson`, `one_run`, `gaussian`, `sampled_gaussian` or `sampled_laplace`.
      assumes: what has to hold besides the attack having been carried out as described.
    """

    method: str
    epsilon: float
    assumes: str


def rate_above(successes: int, trials: int, confidence: float) -> float:
    """Upper end of a one-sided Clopper-Pearson interval of a probability."""
    if successes >= trials:
        return 1.0
    return float(stats.beta.ppf(confidence, successes + 1, trials - successes))


def rate_below(successes: int, trials: int, confidence: float) -> float:
    """Lower end of a one-sided Clopper-Pearson interval of a probability."""
    return 1.0 - rate_above(trials - successes, trials, confidence)


def clopper_pearson(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float = 0.95) -> LowerBound:
    """From the rates of true and false alarms at a threshold, which half of the scores choose and the others test.

    (epsilon, delta)-DP means TPR <= e^epsilon FPR + delta, and the same of the complements (Kairouz, Oh and Viswanath
    2015, arXiv 1311.0776).

    Args:
      inside: (n,) scores of members.
      outside: (n',) scores of non-members, exchangeable with the members but for their membership.
    """
    (first_in, second_in), (first_out, second_out) = _halves(inside), _halves(outside)
    candidates = np.unique(np.quantile(np.concatenate([first_in, first_out]), np.linspace(0, 1, 101)))
    guessed = [_from_rates(first_in, first_out, t, delta, 0.5) for t in candidates]
    threshold = candidates[int(np.argmax(guessed))]
    found = _from_rates(second_in, second_out, threshold, delta, confidence)
    return LowerBound("clopper_pearson", found, "members and non-members are exchangeable")


def _from_rates(inside: np.ndarray, outside: np.ndarray, threshold: float, delta: float, confidence: float) -> float:
    """The better of the two inequalities, each tested at half the error."""
    each = 1 - (1 - confidence) / 4  # four one-sided intervals
    best = 0.0
    hits, alarms = int((inside >= threshold).sum()), int((outside >= threshold).sum())
    for right, wrong, n_right, n_wrong in (
        (hits, alarms, len(inside), len(outside)),
        (len(outside) - alarms, len(inside) - hits, len(outside), len(inside)),
    ):
        low, high = rate_below(right, n_right, each) - delta, rate_above(wrong, n_wrong, each)
        if low > 0 and high > 0:
            best = max(best, math.log(low / high))
    return best


def gaussian(
    inside: np.ndarray, outside: np.ndarray, threshold: float, delta: float, confidence: float = 0.95
) -> LowerBound:
    """As if the two kinds of scores were Gaussians a distance mu apart (Nasr et al. 2023, arXiv 2302.07956, section 4).

    Args:
      threshold: fixed before the scores were seen.
    """
    each = 1 - (1 - confidence) / 2
    normal = NormalDist()
    alarms = rate_above(int((outside >= threshold).sum()), len(outside), each)
    misses = rate_above(int((inside < threshold).sum()), len(inside), each)
    found = 0.0
    if alarms < 1 and misses < 1:
        mu = normal.inv_cdf(1 - alarms) - normal.inv_cdf(misses)
        found = gaussian_epsilon(mu, delta) if mu > 0 else 0.0
    return LowerBound("gaussian", found, "scores are Gaussian: true of sums of noisy releases, not of losses")


def sampled_gaussian(
    inside: np.ndarray,
    outside: np.ndarray,
    steps: int,
    sampling_prob: float,
    delta: float,
    confidence: float = 0.95,
) -> LowerBound:
    """From how strong the noise was, and how far members stood out of it, given that both were as the scheme says.

    Non-members' scores are sums of `steps` draws of the noise, in units of the sensitivity; members' have
    `steps * sampling_prob` added on average. What the noise was at most, over what a member added at least, is the
    noise multiplier that an accountant turns into epsilon. It finds noise that is too weak, left out in some steps, or
    contributions that are too large, where other bounds are too coarse to see them.
    """
    each = 1 - (1 - confidence) / 2
    n = len(outside)
    largest = math.sqrt(float((outside**2).sum()) / float(stats.chi2.ppf(1 - each, n)) / steps)
    least = _least_mean(inside, each) / (steps * sampling_prob)
    found = 0.0 if least <= 0 else accounting.epsilon(largest / least, sampling_prob, steps, delta)
    return LowerBound("sampled_gaussian", found, "releases are Poisson-sampled, with Gaussian noise of some strength")


def sampled_laplace(
    inside: np.ndarray, magnitudes: np.ndarray, steps: int, sampling_prob: float, confidence: float = 0.95
) -> LowerBound:
    """As `sampled_gaussian`, of a pure epsilon: the exact sum over all steps, for the noise that was measured.

    Args:
      inside: (n,) scores of members.
      magnitudes: (n',) sums over the steps of the absolute values that were released along non-members' coordinates.
        Those of Laplace noise of scale b are exponential with mean b, so all together they are a Gamma variable.
    """
    each = 1 - (1 - confidence) / 2
    largest = float(magnitudes.sum()) / float(stats.gamma.ppf(1 - each, len(magnitudes) * steps))
    least = _least_mean(inside, each) / (steps * sampling_prob)
    found = 0.0
    if least > 0:
        found = accounting.pure_epsilon([(PoissonLaplace(largest / least, sampling_prob), steps)])
    return LowerBound("sampled_laplace", found, "releases are Poisson-sampled, with Laplace noise of some strength")


def _least_mean(scores: np.ndarray, confidence: float) -> float:
    """Lower end of a one-sided interval of a mean."""
    error = float(stats.t.ppf(confidence, len(scores) - 1)) * float(scores.std(ddof=1)) / math.sqrt(len(scores))
    return float(scores.mean()) - error


def one_run(
    inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float = 0.95, share: float = 0.2
) -> LowerBound:
    """From how many of the surest guesses about independent fair coins were right (Steinke, Nasr and Jagielski 2023,
    arXiv 2305.08846, theorem 5.2).

    Args:
      inside: scores of canaries whose coin put them into the run.
      outside: scores of those that it left out.
      share: part of the canaries that is guessed about: half of it the highest scores, half the lowest.
    """
    scores = np.concatenate([inside, outside])
    member = np.concatenate([np.ones(len(inside), bool), np.zeros(len(outside), bool)])
    # Scores may tie: then who is guessed about must not depend on how they are stored.
    order = np.lexsort((np.random.default_rng(0).permutation(len(scores)), scores))
    each = max(1, int(len(scores) * share / 2))
    correct = int(member[order[-each:]].sum()) + int((~member[order[:each]]).sum())
    return LowerBound(
        "one_run",
        one_run_epsilon(len(scores), 2 * each, correct, delta, confidence),
        "canaries were put in by independent fair coins",
    )


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many correct guesses refute.

    Raises:
      SottoError: SOT701, the counts do not fit together.
    """
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise SottoError(
            "SOT701", what=f"{correct} correct of {guesses} guesses about {canaries} canaries", where="one_run_epsilon",
            why="guesses are about canaries, and the correct ones are some of them", fix="check the counts",
        )  # fmt: skip
    low, high = 0.0, LARGEST
    if _chance(canaries, guesses, correct, low, delta) >= 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if _chance(canaries, guesses, correct, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def _chance(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of that many correct guesses under (epsilon, delta)-DP."""
    each = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, each))
    if correct == 0:
        return 1.0
    below = stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, each)
    alpha = float((np.cumsum(below) / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * alpha)


def _halves(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every other score; which come first must not depend on their values."""
    if len(scores) < 4:
        raise SottoError(
            "SOT702", what=f"{len(scores)} scores of one kind", where="audit",
            why="a confidence interval needs some of each, for the threshold and for the test",
            fix="use more canaries, or more held-out examples",
        )  # fmt: skip
    return scores[::2], scores[1::2]


def area_under_curve(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that a member scores higher than a non-member; ties count one half."""
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    return float((ranks[: len(inside)].sum() / len(inside) - (len(inside) + 1) / 2) / len(outside))


def true_positives_at(inside: np.ndarray, outside: np.ndarray, false_positives: float) -> float:
    """The rate of true positives at the lowest threshold that raises at most this rate of false alarms."""
    allowed = int(false_positives * len(outside))
    threshold = np.sort(outside)[::-1][min(allowed, len(outside) - 1)]
    return float((inside > threshold).mean())


def true_positives_allowed(epsilon: float, delta: float, false_positives: float) -> float:
    """The highest rate of true positives that any attack can have under (epsilon, delta)-DP."""
    one = math.exp(min(epsilon, 700.0)) * false_positives + delta
    other = 1 - math.exp(-epsilon) * (1 - delta - false_positives)
    return max(false_positives, min(1.0, one, other))
