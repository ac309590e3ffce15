"""The one place where raw sums become releases: add Gaussian noise, divide by a public constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from sotto.errors import SottoError
from sotto.privacy.events import check_number
from sotto.privacy.noise import NoiseSource

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

    Not covered: `total.norms` is not released and stays private; noise is float (see `noise`).
    """

    def __init__(self, noise_multiplier: float, divisor: float, noise: NoiseSource):
        """Sets up the mechanism.

        Args:
          noise_multiplier: standard deviation of the noise over the sensitivity; > 0.
          divisor: public constant, in units; > 0.
          noise: where the noise comes from.

        Raises:
          SottoError: SOT401, a number is out of range.
        """
        self.noise_multiplier = check_number("noise_multiplier", noise_multiplier, above=0)
        self.divisor = check_number("divisor", divisor, above=0)
        self.noise = noise

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
        released: dict[str, torch.Tensor] = {}
        for name, value in total.gradients.items():
            released[name] = self._release(value, std, step, name)
        return released

    def _release(self, value: torch.Tensor, std: float, step: int, name: str) -> torch.Tensor:
        """Adds and divides in float64, rounds once. In pieces, so that the float64 copies stay small."""
        released = torch.empty_like(value, dtype=_wide(value.dtype), memory_format=torch.contiguous_format)
        source, target = value.reshape(-1), released.view(-1)
        for start in range(0, target.numel(), _PIECE):
            piece = source[start : start + _PIECE]
            noise = self.noise.normal(piece.shape, std, step=step, name=f"{name}[{start}]", device=value.device)
            target[start : start + _PIECE] = (noise + piece).div_(self.divisor)
        return released

    def __repr__(self) -> str:
        return f"GaussianMechanism(noise_multiplier={self.noise_multiplier}, divisor={self.divisor}, {self.noise!r})"


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
    if total.gradients and not bad:
        return
    raise SottoError(
        "SOT430",
        what=f"the clipped sum of {', '.join(sorted(bad)[:3])} is not finite" if bad else "the clipped sum is empty",
        where="gradient engine",
        why="noise cannot hide an infinity or a nan, so nothing was released",
        fix="this is a bug in Sotto: please report it, with the model's configuration",
    )
