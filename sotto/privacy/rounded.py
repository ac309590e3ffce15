"""Gaussian noise on integers for whole gradients: exact, and fast enough to be drawn by the million.

The law is that of `discrete.rounded_gaussian`: the integer nearest to a real draw of N(0, std^2). Added to an integer
it is the Gaussian mechanism with its release rounded, which is post-processing. So whatever holds for the Gaussian
mechanism holds here, sampled and composed too, with the same event; and no last bit of a float tells of the sum
(Mironov 2012; Haney et al. 2022, arXiv:2207.13793).

How. A sign and P = P(|N(0, 1)| >= |z|), a uniform real of which 53 bits are drawn, decide a draw. In floating point the
quantile of P is known up to a bound on its error. Where all reals within the bound round to one integer, the 53 bits
have decided, and nothing is approximate about it. Elsewhere (a few draws in a million) more bits are drawn until an
evaluation in long arithmetic decides (inverse transform with refinement, as in Haney et al.).

What this rests on. `scipy.special.ndtri` is taken to be right to 2^-42 relative to max(1, |z|); it was off by at most
2^-49 where the tests compare it, and `check_quantile` compares it again on the machine of a run. `mpmath.erfc` is taken
to be right to all but 32 of the bits that it is asked for. As everywhere here, the bits come from a cipher, and the
running time depends a little on the noise.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sotto.errors import SottoError
from sotto.privacy.discrete import Below
from sotto.privacy.events import check_number

Words = Callable[[int], "np.ndarray[Any, np.dtype[np.uint64]]"]
"""Returns so many independent, uniform words of 64 bits."""

LARGEST_STD = 2.0**36
"""Beyond it most draws would need long arithmetic."""
_ERROR = 2.0**-42
"""Relative bound on the error of the float quantile, a hundred times what was seen."""
_SEEN = 2.0**-48
_DRAWN = 53
_LEAST = 1 << 12
"""Words that begin with so many zeros (one in 2^41) have too few bits left for the bound below."""


def _ndtri() -> Any:
    return importlib.import_module("scipy.special").ndtri  # untyped, and slow to import


def _mpmath() -> Any:
    return importlib.import_module("mpmath")  # untyped


def rounded_normal(count: int, std: float, words: Words, below: Below) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns (count,) independent draws, whole numbers in float64.

    Args:
      count: how many.
      std: standard deviation of the Gaussian before rounding; in (0, `LARGEST_STD`].
      words: the bits that every draw begins with.
      below: uniform integers, for the few draws that need more.

    Raises:
      SottoError: SOT401, std is out of range.
    """
    check_number("std", std, above=0, at_most=LARGEST_STD)
    drawn = words(count)
    first = (drawn >> np.uint64(64 - _DRAWN)).astype(np.float64)
    z = _ndtri()((first + 0.5) * 2.0 ** -(_DRAWN + 1))  # of P / 2: the lower tail, so z <= 0
    np.negative(z, out=z)
    # dz/dP = 1 / (2 phi(z)) <= sqrt(pi / 2) / P by Mills' ratio: 53 bits leave z unknown by at most 3 / first.
    error = z * _ERROR
    error += _ERROR
    with np.errstate(divide="ignore"):
        error += 3.0 / first
    z *= std
    error *= std
    nearest = np.rint(z)
    undecided = np.abs(z - nearest) >= 0.5 - error
    undecided |= first < _LEAST
    for place in np.flatnonzero(undecided).tolist():
        nearest[place] = _decide(int(first[place]), std, below)
    negative = (drawn & np.uint64(1)).astype(bool)
    np.negative(nearest, out=nearest, where=negative)
    nearest += 0.0  # zero has one sign
    return nearest


def _decide(known: int, std: float, below: Below) -> int:
    """The magnitude whose first bits of P are `known`, with as many more as it takes."""
    mpmath, bits = _mpmath(), _DRAWN
    while True:
        if known >= _LEAST:
            with mpmath.workprec(bits + 128):
                guess = int(np.rint(-float(_ndtri()(float(mpmath.ldexp(2 * known + 1, -bits - 2)))) * std))
                found = _bracket(known, bits, std, guess)
            if found is not None:
                return found
        known, bits = (known << 64) | below(1 << 64), bits + 64


def _bracket(known: int, bits: int, std: float, guess: int) -> int | None:
    """The integer n with |z| std between n - 1/2 and n + 1/2 for every P of these bits; None if there are two."""
    mpmath = _mpmath()
    low, high = mpmath.ldexp(known, -bits), mpmath.ldexp(known + 1, -bits)
    slack = mpmath.ldexp(1, -(bits + 96))  # of 128 bits beyond those of P, 32 may be wrong

    def beyond(n: int) -> Any:
        """The probability of n - 1/2 or more; falls as n grows."""
        return mpmath.erfc((mpmath.mpf(n) - 0.5) / std / mpmath.sqrt(2)) if n > 0 else mpmath.mpf(2)

    n = max(0, guess)
    while n > 0 and low > beyond(n):  # P is larger than that of n - 1/2: the draw is nearer to zero
        n -= 1
    while high < beyond(n + 1):
        n += 1
    sure = high <= beyond(n) - slack and low >= beyond(n + 1) + slack
    return n if sure else None


@functools.cache
def check_quantile() -> None:
    """Compares scipy's normal quantile with long arithmetic, over the whole range. Once in a process.

    Raises:
      SottoError: SOT420, they differ by more than rounding explains.
    """
    mpmath = _mpmath()
    tails = [2.0**-k * (1 - 2.0**-6 * (k % 7)) for k in (*range(1, 8), 10, 14, 20, 30, 42, 54)]
    for tail in tails:
        z = -float(_ndtri()(tail))
        with mpmath.workprec(160):
            exact = mpmath.erfc(mpmath.mpf(z) / mpmath.sqrt(2)) / 2
            density = mpmath.exp(-(mpmath.mpf(z) ** 2) / 2) / mpmath.sqrt(2 * mpmath.pi)
            off = abs(float((exact - tail) / density))
        if not off <= _SEEN * max(1.0, abs(z)):
            raise SottoError(
                "SOT420",
                what=f"scipy's normal quantile is off by {off:.1e} on this machine, at {tail:.1e}",
                why="exact noise rests on its error being below 1e-14",
                fix="install another release of scipy, or set privacy.exact_noise: false",
            )
