"""Exact noise on integers, for counts that are released.

A count is a whole number, so its noise can be one too. Then a release is an integer, its probability is exactly what
the theory says, and there are no last bits of a float that could tell of the count (Mironov 2012; Haney et al. 2022,
arXiv:2207.13793). All arithmetic is on integers and fractions; uniform integers come from the operating system
(`secrets`). Three laws:

* The rounded Gaussian: what a real-valued Gaussian gives when it is rounded to the nearest integer. Because counts are
  integers, adding it is the same as adding the Gaussian and rounding, so it is post-processing of the Gaussian
  mechanism: whatever holds for that, in whatever company (sampled, beside other sums, composed), holds for it. Drawn by
  the exact method of Karney 2016 (arXiv:1303.6257, algorithm N), digit by digit until the rounding is decided.
* The discrete Gaussian: probabilities proportional to exp(-x^2 / (2 std^2)), a twelfth less variance, by Canonne,
  Kamath and Steinke 2020 (arXiv:2004.00010, algorithms 1 to 3). Its Renyi divergences are at most those of the Gaussian
  (theorem 4), so concentrated-DP and Renyi accounting of the Gaussian hold for it. The Gaussian's privacy loss
  *distribution* does not bound it: the two (epsilon, delta) curves cross. And beside a noisy sum in one Poisson-sampled
  release it is no longer one Gaussian. Use it for counts that are released on their own.
* The floored Laplace: the largest integer below a real-valued Laplace draw. Adding it to an integer is adding the
  Laplace draw and rounding down, so it too is post-processing of its mechanism. Both halves are geometric.

What they cost. Some tens of coins for a draw, whatever the deviation: right for counts, not for gradients.

What they do not give. The running time depends on what was rejected and on the size of the noise, so whoever can time
single draws learns of the noise (arXiv:2112.05307). It never depends on the counts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from fractions import Fraction

from sotto.privacy.events import check_number

Below = Callable[[int], int]
"""Returns a uniform integer in [0, n). `secrets.randbelow`; a test may bring another, and then nothing is private."""

_DIGIT = 1 << 32


def add_rounded_gaussian(
    counts: Sequence[int], std: float | Fraction, below: Below = secrets.randbelow
) -> tuple[int, ...]:
    """Returns each count plus independent Gaussian noise, rounded to an integer.

    Guarantee. The release is a function of `counts + N(0, std^2)`: it is the Gaussian mechanism, to the last bit. A
    count that moves by halves has to be doubled first.

    Args:
      counts: whole numbers, of any size.
      std: standard deviation of the Gaussian, > 0; a float is taken for the fraction that it is.

    Raises:
      SottoError: SOT401, std is not a positive finite number.
      TypeError: a count is not an integer: rounding it is the caller's decision.
    """
    exact = _checked(counts, std)
    return tuple(count + rounded_gaussian(exact, below) for count in counts)


def add_discrete_gaussian(
    counts: Sequence[int], std: float | Fraction, below: Below = secrets.randbelow
) -> tuple[int, ...]:
    """Returns each count plus independent discrete Gaussian noise.

    Guarantee. If adding or removing one unit moves `counts`, read as one vector of integers, by at most s in L2 norm,
    the release is (s^2 / (2 std^2))-concentrated DP, exactly. A count that moves by halves has to be doubled first.

    Args, Raises: as for `add_rounded_gaussian`. The noise's own standard deviation is at most std, and equal to it to
      6 digits from std = 1 on.
    """
    exact = _checked(counts, std)
    return tuple(count + discrete_gaussian(exact, below) for count in counts)


def _checked(counts: Sequence[int], std: float | Fraction) -> Fraction:
    for count in counts:
        if not isinstance(count, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a count is {type(count).__name__}, not int")
    check_number("std", float(std), above=0)
    return Fraction(std)


def rounded_gaussian(std: Fraction, below: Below = secrets.randbelow) -> int:
    """The integer nearest to a draw of N(0, std^2)."""
    whole, part = half_normal(below)
    while True:
        # The draw lies between these two; where they round alike, it is decided.
        low, high = (std * (whole + end) + Fraction(1, 2) for end in part.interval())
        nearest = math.floor(low)
        if high <= nearest + 1:
            return -nearest if below(2) == 1 else nearest
        part.lengthen()


def half_normal(below: Below = secrets.randbelow) -> tuple[int, UniformReal]:
    """|N(0, 1)| as its whole part and its fractional part (algorithm N of Karney 2016, but for the sign).

    Proposes k with probability proportional to exp(-k/2), keeps it with probability exp(-k(k-1)/2), which makes
    exp(-k^2/2), and keeps a uniform x beside it with probability exp(-x(2k + x)/2): in all exp(-(k + x)^2/2).
    """
    while True:
        k = 0
        while coin_exp(Fraction(1, 2), below):
            k += 1
        if not coin_exp(Fraction(k * (k - 1), 2), below):
            continue
        x = UniformReal(below)
        if all(_coin_exp_real(k, x, below) for _ in range(k + 1)):
            return k, x


def _coin_exp_real(k: int, x: UniformReal, below: Below) -> bool:
    """True with probability exp(-x (2k + x) / (2k + 2)), as `coin_exp` does it.

    Each flip has probability x * (2k + x)/(2k + 2) / n, a product of three coins: a fresh uniform real below x, a
    choice of one in 2k + 2 that is settled by another real only in one case, and one in n.
    """

    def flip(n: int) -> bool:
        if below(n) != 0 or not x.exceeds_another():
            return False
        choice = below(2 * k + 2)
        return choice < 2 * k or (choice == 2 * k and x.exceeds_another())

    flips = 1
    while flip(flips):
        flips += 1
    return flips % 2 == 1


class UniformReal:
    """A uniform real number in (0, 1), of which only as many digits are drawn as somebody has asked for."""

    def __init__(self, below: Below):
        self._below = below
        self._digits: list[int] = []

    def lengthen(self) -> None:
        """Draws one more digit."""
        self._digits.append(self._below(_DIGIT))

    def interval(self) -> tuple[Fraction, Fraction]:
        """The two ends between which the number is known to lie."""
        known, unit = 0, _DIGIT ** len(self._digits)
        for digit in self._digits:
            known = known * _DIGIT + digit
        return Fraction(known, unit), Fraction(known + 1, unit)

    def exceeds_another(self) -> bool:
        """Whether it is larger than a fresh uniform real: true with this number's own probability."""
        place = 0
        while True:
            if place == len(self._digits):
                self.lengthen()
            other = self._below(_DIGIT)
            if other != self._digits[place]:
                return other < self._digits[place]
            place += 1


def discrete_gaussian(std: Fraction, below: Below = secrets.randbelow) -> int:
    """An integer x with probability proportional to exp(-x^2 / (2 std^2)): algorithm 3.

    Draws from the two-sided geometric distribution of a scale just above std, and keeps x with the probability that is
    missing to the Gaussian's.
    """
    variance = std * std
    scale = math.isqrt(math.floor(variance)) + 1
    while True:
        x = discrete_laplace(scale, below)
        if coin_exp((abs(x) - variance / scale) ** 2 / (2 * variance), below):
            return x


def discrete_laplace(scale: int, below: Below = secrets.randbelow) -> int:
    """An integer x with probability proportional to exp(-|x| / scale): algorithm 2 for a whole scale."""
    while True:
        magnitude, negative = geometric(scale, below), below(2) == 1
        if negative and magnitude == 0:  # zero has one sign only
            continue
        return -magnitude if negative else magnitude


def floored_laplace(scale: int, below: Below = secrets.randbelow) -> int:
    """The largest integer that is not above a draw of the Laplace distribution of this scale, a whole number."""
    magnitude = geometric(scale, below)
    return -magnitude - 1 if below(2) == 1 else magnitude


def geometric(scale: int, below: Below = secrets.randbelow) -> int:
    """An integer x >= 0 with probability proportional to exp(-x / scale): what an exponential draw is rounded down to.

    Its remainder modulo `scale` and its quotient are independent.
    """
    while True:
        remainder = below(scale)
        if not coin_exp(Fraction(remainder, scale), below):
            continue
        quotient = 0
        while coin_exp(Fraction(1), below):
            quotient += 1
        return remainder + scale * quotient


def coin_exp(exponent: Fraction, below: Below = secrets.randbelow) -> bool:
    """True with probability exp(-exponent), exponent >= 0: algorithm 1.

    Below 1: flip coins of probability exponent/1, exponent/2, ... until one fails. The number of flips is odd with the
    probability that is the alternating series of exp(-exponent). Above 1: one such coin for each unit.
    """
    while exponent > 1:
        if not coin_exp(Fraction(1), below):
            return False
        exponent -= 1
    flips = 1
    while below(exponent.denominator * flips) < exponent.numerator:
        flips += 1
    return flips % 2 == 1
