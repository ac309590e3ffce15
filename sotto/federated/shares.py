"""Noise that users add themselves, each a share, on an integer grid.

With `noise: clients` a device rounds its bounded vector towards zero to whole multiples of a public unit (no norm grows
by that), adds a rounded Gaussian of deviation s to each number, and sends integers. So the server never sees a vector
without noise, and integers can be added under masks. The shares of M = `least_answers` users make up all of the noise
that the plan bought, M s^2 = (noise_multiplier * C)^2. For each of `most` users who did not answer the server adds a
share itself, so that the noise on a sum does not tell how many have answered: the accounting takes it to be hidden from
whoever gets the model who was drawn, and the number of them could be read off noise that grew with the answers.

What holds against whom. One message is a function of vector + N(0, s^2 I): the Gaussian mechanism with s, which holds
against the server as it is. The sum carries a sum of rounded Gaussians. A rounded Gaussian of deviation s is, but for a
part below exp(-2 pi^2 s^2) (units of the grid), the value at an integer of a Gaussian's density that was blurred by a
uniform number; so the sum of M of them is a Gaussian of deviation sqrt(M) s, blurred by M - 1 uniform numbers, and then
rounded: what is done to the Gaussian there is post-processing. With s >= 64 here that part is below 10^-35000, and the
sum is covered as the Gaussian of all shares together. That needs users who follow their orders: one who sends no noise
leaves that much less of it for the others.

With `masks` (`masking`) the server sees sums of these messages alone. Without them it could look at single ones, and
the statement says what holds then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sotto.gradients.base import ClippedSum
from sotto.privacy.adversaries import least_answers, most_answers, share_multiplier
from sotto.privacy.noise import NoiseSource

LEAST_STD, LEAST_STEPS = 64.0, 2.0**16
"""Deviation of a share, and length of the bound, in units of the grid, at least."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shares:
    """The shares of one plan.

    Attributes:
      clip_norm: C.
      std: s, of a share, in the units of an update.
      least: M.
      reach: the norm that a message has at most without its noise: C, or a site's units times C.
      most: shares that the noise on every sum has: for users, no fewer than ever answer; for sites, M, because whether
        a site answers does not depend on any unit.
    """

    clip_norm: float
    std: float
    least: int
    reach: float
    most: int = 0

    @classmethod
    def of(
        cls,
        clip_norm: float,
        noise_multiplier: float,
        expected: int,
        dropouts: float,
        reach: float | None = None,
        registered: int | None = None,
    ) -> Shares:
        """The shares of so many users, or sites, that are expected to answer.

        Args:
          registered: users, of whom each is drawn with probability expected / registered; a server needs it.
        """
        share, least = share_multiplier(noise_multiplier, expected, dropouts), least_answers(expected, dropouts)
        most = 0 if registered is None else most_answers(registered, expected / registered)
        return cls(clip_norm, share * clip_norm, least, reach or clip_norm, most)

    @property
    def unit(self) -> float:
        """Of the grid: a power of two, so that multiples of it are exact."""
        return 2.0 ** math.floor(math.log2(min(self.std / LEAST_STD, self.clip_norm / LEAST_STEPS)))

    def message(self, vector_k: torch.Tensor, noise: NoiseSource, step: int, name: str) -> torch.Tensor:
        """(k,) int32: a bounded vector with its share of the noise, in units."""
        whole = (vector_k.double() / self.unit).trunc()
        drawn = self._rounded(vector_k.shape, self.std, noise, step, name)
        most = 2.0**31 - 1  # never reached by the noise of a sane plan; a number that wrapped would be one at random
        return (whole + drawn).clamp(-most, most).to(torch.int32)

    def longest(self, size: int) -> float:
        """Norm, in units, that a message of k numbers does not exceed but with probability below 10^-13."""
        return (self.reach + self.std * (math.sqrt(size) + 8)) / self.unit

    def word(self, users: int) -> type[np.uint32] | type[np.uint64]:
        """Of masked messages: 32 bits where the sum of so many cannot leave them, else 64, which none of int32 leaves.

        With 32 bits an honest sum wraps with probability below 10^-32 per number: twelve deviations of the noise.
        """
        most = users * (self.reach / self.unit + 1) + 12 * math.sqrt(users) * self.std / self.unit
        return np.uint32 if most < 2.0**31 else np.uint64

    def missing(self, answers: int, size: int, noise: NoiseSource, step: int) -> torch.Tensor:
        """(k,) float64: the shares of those of `most`, or of `least`, who did not answer, in units."""
        short = max(0, self.least - answers, self.most - answers)
        if short == 0:
            return torch.zeros(size, dtype=torch.float64)
        return self._rounded(torch.Size([size]), self.std * math.sqrt(short), noise, step, "missing shares")

    def _rounded(self, shape: torch.Size, std: float, noise: NoiseSource, step: int, name: str) -> torch.Tensor:
        return noise.normal(shape, std / self.unit, step=step, name=name, device=_CPU).round()


def as_message(answer: object, size: int) -> torch.Tensor | None:
    """(k,) float64 whole numbers, if the answer is (k,) int32."""
    if isinstance(answer, np.ndarray) and answer.dtype == np.int32:
        answer = torch.from_numpy(answer)
    if isinstance(answer, torch.Tensor) and answer.dtype == torch.int32 and answer.shape == (size,):
        return answer.double()
    return None


class Divided:
    """The mechanism of a server whose sums carry their noise already: divides by the public constant."""

    def __init__(self, divisor: float, private: bool):
        self.divisor, self.private = divisor, private

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """Returns the noisy sum over the divisor, float64."""
        return {name: value.double() / self.divisor for name, value in total.gradients.items()}
