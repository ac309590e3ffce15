"""From the numbers of a batch to what may be released: one vector of K numbers for each unit, clipped as a whole.

Clipping the K numbers of a unit together (Bao et al. 2025, DP-AggZO, USENIX Security) makes the sum move by at most the
clip norm when a unit is added or removed, whatever K is: K does not enter the accounting. Clipping each number alone
would let it move by sqrt(K) times as much. For Laplace noise the vector is clipped in L1 norm, and rounded towards zero
to whole multiples of the mechanism's grid, so that sums are exact and no norm grows.

Shape legend: U units, K directions of a step.
"""

from __future__ import annotations

import torch

from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Clipping
from sotto.privacy.mechanism import grid

NAME = "directions"
"""The one tensor of a sum: (K,) float64."""


class Release:
    """Clips sketches and adds them up.

    Attributes:
      clipping: of the whole vector; its sensitivity is that of the sum.
      order: the norm in which vectors are clipped: 2 for Gaussian noise, 1 for Laplace noise.
      count: how many numbers a step releases: K, for each part.
    """

    def __init__(self, clipping: Clipping, count: int, order: int = 2):
        self.clipping, self.count, self.order = clipping, count, order

    def zeros(self) -> ClippedSum:
        """The sum over no units at all."""
        empty = torch.zeros(0, 1, dtype=torch.float64)
        sums_K = torch.zeros(self.count, dtype=torch.float64)
        return ClippedSum({NAME: sums_K}, empty, self.clipping.sensitivity, self.order)

    def clipped_sum(self, sketch_UK: torch.Tensor) -> ClippedSum:
        """Clips each unit's vector and adds them up.

        Args:
          sketch_UK: a row for each unit. One with a value that is not finite, or with a norm that is not, contributes
            zero.

        Returns:
          A sum on the CPU that moves by at most `clipping.sensitivity` in norm when a row is added or removed.
        """
        x_UK = sketch_UK.detach().double().cpu()
        norms_U1 = torch.linalg.vector_norm(x_UK, self.order, dim=1, keepdim=True)
        factor_U1 = self.clipping.coefficients(norms_U1)
        x_UK = torch.where(factor_U1 > 0, x_UK, 0) * factor_U1  # not a product alone: 0 * nan is nan
        if self.order == 1:
            x_UK = self._whole(x_UK)
        return ClippedSum({NAME: x_UK.sum(0)}, norms_U1, self.clipping.sensitivity, self.order)

    def _whole(self, x_UK: torch.Tensor) -> torch.Tensor:
        """Rounded towards zero to the grid, and to zero where rounding of the factor left the norm above the bound."""
        unit = grid(self.clipping.sensitivity)
        n_UK = (x_UK / unit).trunc()
        excess_U1 = n_UK.abs().sum(1, keepdim=True) - self.clipping.sensitivity / unit
        # At most a few units of the grid: take them from the largest number, towards zero.
        largest_U1 = n_UK.abs().argmax(1, keepdim=True)
        less_U1 = excess_U1.clamp(min=0).ceil()
        taken_U1 = n_UK.gather(1, largest_U1)
        n_UK = n_UK.scatter(1, largest_U1, taken_U1 - taken_U1.sign() * torch.minimum(less_U1, taken_U1.abs()))
        return n_UK * unit
