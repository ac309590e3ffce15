"""A few numbers for each row of a tensor, from which one can tell whether another tensor has the same rows.

The engine compares output gradients of two backward passes on the first batch of a run. To keep the first pass' would
take as much memory as all activations, so it keeps random projections instead: if two rows differ by a vector e, their
projections on K independent random directions differ by |e| on average, and by far less in all K at once almost never
(Johnson and Lindenstrauss 1984; directions that are outer products: Rudelson 2012, arXiv 1009.1557).

Shape legend: B rows, L whatever is between the rows and the last dimension, p that last dimension, K directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DIRECTIONS = 12
CHUNK = 1 << 20
"""Numbers that are held in float64 at once."""


@dataclass
class Sketch:
    """Rows of one tensor, reduced.

    Attributes:
      shape: of the tensor.
      norms_B: (B,) float64.
      projections_BK: (B, K) float64.
      floor: norm below which the rounding of subnormal numbers is as large as they are.
      across: the sketch of the tensor with its first two dimensions exchanged, if both have size B.
    """

    shape: torch.Size
    norms_B: torch.Tensor
    projections_BK: torch.Tensor
    floor: float = 0.0
    across: Sketch | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> Sketch:
        """Args: x: (B, ..., p), at least two dimensions."""
        floor = torch.finfo(x.dtype).tiny * math.sqrt(x[0].numel() if len(x) else 0)
        sketch = cls(x.shape, *_reduce(x), floor)
        if x.dim() > 2 and x.shape[0] == x.shape[1]:
            sketch.across = cls(x.shape, *_reduce(x.transpose(0, 1)), floor)
        return sketch

    @property
    def rows_with_gradient(self) -> int:
        """How many rows are finite, and not so small that they cannot be compared."""
        return int((torch.isfinite(self.norms_B) & (self.norms_B > self.floor)).sum())

    def follows(self, x: torch.Tensor, weight_B: torch.Tensor) -> bool:
        """Whether each finite row of x is the sketched row times its weight.

        The weights are powers of two, so that two backward passes round alike in any precision, and the tolerance can
        be narrow.
        """
        tolerance = 1e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
        norms_B, projections_BK = _reduce(x)
        weight_B = weight_B.double()
        error_B = (projections_BK / weight_B[:, None] - self.projections_BK).square().mean(1).sqrt()
        error_B = torch.maximum(error_B, (norms_B / weight_B - self.norms_B).abs())
        finite_B = torch.isfinite(error_B) & torch.isfinite(self.norms_B)
        if not bool(finite_B.any()):
            return True
        allowed_B = tolerance * (self.norms_B + self.norms_B[finite_B].max()) + self.floor
        return not bool((error_B > allowed_B)[finite_B].any())


def _reduce(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) norms and (B, K) projections of the rows, in float64."""
    x_BLp = x.reshape(x.shape[0], -1, x.shape[-1])
    generator = torch.Generator().manual_seed(0)
    u_LK, v_pK = (
        torch.randn(size, DIRECTIONS, generator=generator, dtype=torch.float64).to(x.device) for size in x_BLp.shape[1:]
    )
    norms, projections = [], []
    for part in x_BLp.flatten(0, 1).split(max(1, CHUNK // max(1, x.shape[-1]))):
        wide = part.double()
        norms.append(wide.norm(dim=1))
        projections.append(wide @ v_pK)
    size = x_BLp.shape[:2]
    return torch.cat(norms).view(size).norm(dim=1), (torch.cat(projections).view(*size, -1) * u_LK).sum(1)
