"""The one place where raw sums become releases: add noise, divide by a public constant."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sotto.errors import SottoError
from sotto.privacy.discrete import floored_laplace
from sotto.privacy.events import check_number
from sotto.privacy.noise import NoiseSource
from sotto.privacy.rounded import check_quantile

if TYPE_CHECKING:
    from sotto.gradients.base import ClippedSum


_PIECE = 1 << 23  # elements noised at a time: 64 MiB of float64


class Mechanism(Protocol):
    """What the training loop needs."""

    @property
    def private(self) -> bool: ...

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]: ...


class GaussianMechanism:
    """Releases (sum + N(0, (noise_multiplier * sensitivity)^2)) / divisor, every coordinate noised independently.

    Guarantee. With `total.sensitivity` a bound on the L2 norm of the change of `total.gradients`, read as one vector,
    when one unit is added or removed, one call is the event `Gaussian(noise_multiplier)`; on a Poisson batch it is
    `PoissonGaussian(noise_multiplier, sampling_prob)`. Under replace_one the noise is the same: `noise_multiplier`
    stays relative to the add-or-remove sensitivity and the accountant counts the doubled distance. `divisor` must be a
    public constant (the expected batch size), never the size of the batch that was drawn. Each call is one release:
    charge the ledger before it, also if the result is thrown away.

    Exact. With `exact`, the sum is rounded to whole multiples of a public grid g, and gets exact noise that is rounded
    to the same grid. Rounding moves each of D numbers by at most g/2, so two neighbouring sums, once rounded, are at
    most `sensitivity + g sqrt(D)` apart, and that is what the noise is scaled to. The noise is the integer nearest to a
    real draw of the Gaussian; added to integers, it makes the release a function of what the real-valued Gaussian
    mechanism releases. So the event is the same, for every sampling and composition, and no last bit of a float takes
    part. (The discrete Gaussian of Canonne et al. 2020 has no such relation to the sampled Gaussian; see `discrete`.)

    Not covered: `total.norms` is not released and stays private; noise is float (see `noise`) unless it is exact.
    """

    def __init__(self, noise_multiplier: float, divisor: float, noise: NoiseSource, exact: bool = False):
        """Sets up the mechanism.

        Args:
          noise_multiplier: standard deviation of the noise over the sensitivity; > 0.
          divisor: public constant, in units; > 0.
          noise: where the noise comes from.
          exact: on a grid, as integers.

        Raises:
          SottoError: SOT401, a number is out of range.
        """
        self.noise_multiplier = check_number("noise_multiplier", noise_multiplier, above=0)
        self.divisor = check_number("divisor", divisor, above=0)
        self.noise, self.exact = noise, exact
        if exact:
            check_quantile()

    @property
    def private(self) -> bool:
        return self.noise.private

    def scale(self, sensitivity: float) -> float:
        """Standard deviation, per coordinate, of the noise in what `privatize` returns."""
        return self.noise_multiplier * sensitivity / self.divisor

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """Returns name -> noised mean, float32 or better, on the gradient's device. `total` is left as it is.

        Raises:
          SottoError: SOT430, `total` is empty or not finite; SOT401, its sensitivity is not positive. This is a bug in
            the engine that made it; nothing is released.
        """
        _check(total)
        std = self.noise_multiplier * check_number("sensitivity", total.sensitivity, above=0)
        unit = 0.0
        if self.exact:
            unit = grid(total.sensitivity, GRID_BITS)
            numbers = sum(value.numel() for value in total.gradients.values())
            std = exact_std(self.noise_multiplier, total.sensitivity, unit, numbers)
        released: dict[str, torch.Tensor] = {}
        for name, value in total.gradients.items():
            released[name] = self._release(value, std, step, name, unit)
        return released

    def _release(self, value: torch.Tensor, std: float, step: int, name: str, unit: float) -> torch.Tensor:
        """Adds and divides in float64, rounds once. In pieces, so that the float64 copies stay small.

        Args:
          unit: of the grid, and of `std`; 0 for float noise.
        """
        released = torch.empty_like(value, dtype=_wide(value.dtype), memory_format=torch.contiguous_format)
        source, target = value.reshape(-1), released.view(-1)
        for start in range(0, target.numel(), _PIECE):
            piece = source[start : start + _PIECE]
            where: dict[str, Any] = {"step": step, "name": f"{name}[{start}]", "device": value.device}
            if unit:
                noised = (self.noise.rounded(piece.shape, std, **where) + _whole(piece, unit)).mul_(unit)
            else:
                noised = self.noise.normal(piece.shape, std, **where) + piece
            target[start : start + _PIECE] = noised.div_(self.divisor)
        return released

    def __repr__(self) -> str:
        kind = ", exact" if self.exact else ""
        return (
            f"GaussianMechanism(noise_multiplier={self.noise_multiplier}, divisor={self.divisor}, {self.noise!r}{kind})"
        )


GRID_BITS = 24
"""The grid of exact Gaussian noise is 2^-25 to 2^-24 of the sensitivity: fine enough that rounding costs little, coarse
enough that few draws of the noise need more than 64 bits."""


def exact_std(noise_multiplier: float, sensitivity: float, unit: float, numbers: int) -> float:
    """Standard deviation, in units of the grid, for so many numbers whose sum is rounded to it. Never rounded down."""
    exact = Fraction(sensitivity) / Fraction(unit) + math.isqrt(numbers) + 1  # at least the square root
    return math.nextafter(float(Fraction(noise_multiplier) * exact), math.inf)


def _whole(value: torch.Tensor, unit: float) -> torch.Tensor:
    """Multiples of a unit that is a power of two, so that only the rounding to whole numbers changes anything."""
    whole = value.double().div_(unit).round_()
    if bool((whole.abs() >= 2**52).any()):
        raise _bug("the clipped sum is too large for the grid")
    return whole


class LaplaceMechanism:
    """Releases (sum + Laplace noise) / divisor, with noise of scale noise_multiplier * sensitivity on every number.

    Guarantee. With `total.sensitivity` a bound on the L1 norm of the change of `total.gradients` when one unit is added
    or removed, one call is the event `Laplace(noise_multiplier)`, and `PoissonLaplace` on a Poisson batch: pure
    epsilon-DP (Dwork et al. 2006). In floating point no such promise would hold, because a sum leaves traces in the
    last bits (Mironov 2012). So the sum has to consist of whole multiples of `grid(sensitivity)`, the noise is an exact
    draw of the Laplace distribution rounded down to such a multiple, and they are added as integers: the release is a
    function of what the real-valued mechanism would have released. What rounding to the grid does to the L1 norm of a
    unit is up to whoever rounds: towards zero it can only fall.
    """

    def __init__(self, noise_multiplier: float, divisor: float, noise: NoiseSource):
        """Sets up the mechanism.

        Args:
          noise_multiplier: scale of the noise over the L1 sensitivity; > 0.
          divisor, noise: as for `GaussianMechanism`.

        Raises:
          SottoError: SOT401, a number is out of range.
        """
        self.noise_multiplier = check_number("noise_multiplier", noise_multiplier, above=0)
        self.divisor = check_number("divisor", divisor, above=0)
        self.noise = noise

    @property
    def private(self) -> bool:
        return self.noise.private

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """Returns name -> noised mean, float32 or better. `total` is left as it is.

        Raises:
          SottoError: SOT430, `total` is empty or not finite, is not clipped in L1 norm, or is not on the grid: a bug in
            what made it. Nothing is released.
        """
        _check(total)
        unit = grid(total.sensitivity)
        whole = {name: value.detach().double().cpu() / unit for name, value in total.gradients.items()}
        if total.order != 1 or any(bool((x != x.trunc()).any() or (x.abs() >= 2**53).any()) for x in whole.values()):
            raise _bug("the sum is not clipped in L1 norm to whole multiples of the grid")
        scale = math.ceil(Fraction(self.noise_multiplier) * Fraction(total.sensitivity) / Fraction(unit))
        released: dict[str, torch.Tensor] = {}
        for name, value in total.gradients.items():
            below = self.noise.below(step=step, name=name)
            noised = [int(n) + floored_laplace(scale, below) for n in whole[name].flatten()]
            mean = torch.tensor([n * unit / self.divisor for n in noised], dtype=torch.float64)
            released[name] = mean.view(value.shape).to(value.device, _wide(value.dtype))
        return released

    def __repr__(self) -> str:
        return f"LaplaceMechanism(noise_multiplier={self.noise_multiplier}, divisor={self.divisor}, {self.noise!r})"


def grid(sensitivity: float, bits: int = 32) -> float:
    """A power of two between 2^-(bits + 1) and 2^-bits of the sensitivity: what releases are multiples of."""
    return 2.0 ** (math.frexp(check_number("sensitivity", sensitivity, above=0))[1] - bits - 1)


class Quantile(Protocol):
    """A clipping whose thresholds follow what a step released (`sotto.gradients.clipping.Adaptive`)."""

    def count_unclipped(self, norms_UG: torch.Tensor) -> torch.Tensor:
        """(U, G) norms -> (G,) sums, each of which moves by at most 1/2 when one unit is added or removed."""
        ...

    def follow(self, fraction_G: torch.Tensor) -> None: ...


class AdaptiveGaussianMechanism:
    """A Gaussian mechanism that also measures, with noise, which fraction of the units was not clipped.

    Guarantee. One call releases the vector (sum / a, counts / b): the clipped sum, sensitivity S, with noise of
    standard deviation a = z_sum * S, and G counts that move by at most 1/2 each, so by sqrt(G)/2 together, with noise
    of standard deviation b. It is the Gaussian mechanism with 1/z^2 = 1/z_sum^2 + (G/4)/b^2 (Andrew et al. 2021,
    arXiv 1905.03871, theorem 1, for G counts). Of the 1/z^2 that the plan bought, the part `share` goes to the counts:
    z_sum = z / sqrt(1 - share), b = z sqrt(G / share) / 2. So the event is the plan's, whatever the share. S may
    differ from step to step, because it follows from earlier releases.
    """

    def __init__(
        self,
        noise_multiplier: float,
        divisor: float,
        noise: NoiseSource,
        quantile: Quantile,
        share: float = 0.01,
        exact: bool = False,
    ):
        """Sets up the mechanism.

        Args:
          noise_multiplier, divisor, noise, exact: as for `GaussianMechanism`; noise_multiplier is that of the whole
            release.
          quantile: the clipping that the sums are made with. Its thresholds move after each call.
          share: in (0, 1): part of each step's privacy that pays for the counts.

        Raises:
          SottoError: SOT401, a number is out of range.
        """
        self.noise_multiplier = check_number("noise_multiplier", noise_multiplier, above=0)
        self.share = check_number("share", share, above=0, below=1)
        self.quantile = quantile
        self._sum = GaussianMechanism(noise_multiplier / math.sqrt(1 - share), divisor, noise, exact)

    @property
    def private(self) -> bool:
        return self._sum.private

    def scale(self, sensitivity: float) -> float:
        """Standard deviation, per coordinate, of the noise in what `privatize` returns."""
        return self._sum.scale(sensitivity)

    def count_std(self, groups: int) -> float:
        """Standard deviation of the noise on each of `groups` counts of units."""
        return self.noise_multiplier * math.sqrt(groups / self.share) / 2

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """As `GaussianMechanism.privatize`; then moves the clipping's thresholds."""
        released = self._sum.privatize(total, step)
        counts_G = self.quantile.count_unclipped(total.group_norms).double()
        where: dict[str, Any] = {"step": step, "name": "count_unclipped", "device": counts_G.device}
        std = self.count_std(len(counts_G))
        if self._sum.exact:  # counts are halves: in units of one half they are whole numbers
            noise_G = self._sum.noise.rounded(counts_G.shape, math.nextafter(2 * std, math.inf), **where) / 2
        else:
            noise_G = self._sum.noise.normal(counts_G.shape, std, **where)
        # Centred counts over the expected number of units: an estimate of the fraction, less one half.
        self.quantile.follow((counts_G + noise_G) / self._sum.divisor + 0.5)
        return released


class IdentityMechanism:
    """No noise at all, for `privacy.epsilon: none`. What comes out is NOT PRIVATE."""

    private = False
    noise_multiplier = 0.0

    def __init__(self, divisor: float):
        self.divisor = check_number("divisor", divisor, above=0)

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """Returns the sum over the divisor, without noise."""
        _check(total)
        return {name: value.to(_wide(value.dtype)) / self.divisor for name, value in total.gradients.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(total: ClippedSum) -> None:
    bad = [name for name, value in total.gradients.items() if not bool(torch.isfinite(value).all())]
    if not total.gradients:
        raise _bug("the clipped sum is empty")
    if bad:
        raise _bug(f"the clipped sum of {', '.join(sorted(bad)[:3])} is not finite")


def _bug(what: str) -> SottoError:
    return SottoError(
        "SOT430",
        what=what,
        where="gradient engine",
        why="noise of this scale could not hide one unit's part in it, so nothing was released",
        fix="this is a bug in Sotto: please report it, with the model's configuration",
    )
