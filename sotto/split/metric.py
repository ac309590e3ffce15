"""Metric privacy (d_X privacy): noise whose density falls with its length, and what its parameter means.

The mechanism adds z with density proportional to exp(-eta |z|) to a vector of n numbers. Then for any two inputs x and
x', every output is at most exp(eta |x - x'|) times likelier under one than under the other (Chatzikokolakis et al.
2013; for word vectors Feyisetan et al., arXiv 1910.08902). This is not (epsilon, delta)-differential privacy: how
much it hides depends on how far apart the inputs lie, and far inputs are not hidden from one another at all.

What is used in practice often is not this law. One radius for a whole batch ties the tokens together, and
independent gammas per coordinate give another norm (by sqrt(n / 3)) and another metric. `tests/test_split_metric.py`
draws both, and they fail the test that the sampler here passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sotto.privacy.events import check_number
from sotto.privacy.noise import NoiseSource

_CPU = torch.device("cpu")


def dx_noise(tokens: int, width: int, eta: float, noise: NoiseSource, *, step: int = 0) -> torch.Tensor:
    """Draws one independent vector for each token: direction uniform, length Gamma(width, rate eta).

    The direction is that of a normal vector, which is uniform on the sphere and independent of the vector's own length;
    that length is thrown away.

    Args:
      tokens: N.
      width: n, numbers in one representation.
      eta: > 0; a smaller one is more noise. The mean length is width / eta.
      step: names the draw, for a noise source that repeats.

    Returns:
      (N, n) float64.
    """
    check_number("eta", eta, above=0)
    v_Nn = noise.normal((tokens, width), 1.0, step=step, name="direction", device=_CPU)
    radius_N = noise.gamma(width, tokens, step=step, name="radius") / eta
    return v_Nn.mul_((radius_N / v_Nn.norm(dim=1)).unsqueeze(1))


class Table:
    """Rows of which the nearest one is asked for (Euclidean, in float32), with what every question needs of them."""

    def __init__(self, rows_Vn: torch.Tensor):
        self._rows_Vn = rows_Vn.detach().float()
        self._half_squares_V = self._rows_Vn.square().sum(dim=1) / 2

    def nearest(self, rows_Nn: torch.Tensor, chunk: int = 512) -> torch.Tensor:
        """Index of the row that is nearest to each of `rows_Nn`: (N,) int64."""
        parts = [(some.float() @ self._rows_Vn.T - self._half_squares_V).argmax(dim=1) for some in rows_Nn.split(chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def nearest(rows_Nn: torch.Tensor, table_Vn: torch.Tensor) -> torch.Tensor:
    """Index of the row of `table_Vn` that is nearest to each of `rows_Nn`, once."""
    return Table(table_Vn).nearest(rows_Nn)


def distances(rows_Nn: torch.Tensor, table_Vn: torch.Tensor) -> torch.Tensor:
    """(N, V) Euclidean distances, by products in float64: what cancels in them is far below what is read from them."""
    rows, table = rows_Nn.double(), table_Vn.double()
    squares = rows.square().sum(dim=1, keepdim=True) + table.square().sum(dim=1) - 2 * rows @ table.T
    return squares.clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class Meaning:
    """What eta means for one table of public representations.

    Attributes:
      eta, width: of the noise.
      survival: the chance that a token is still the nearest one to its own noised representation.
      nearest_distance: median distance to the nearest other representation.
      close_distance, median_distance: the first and the fiftieth percentile of the distances between two of them.
      probes: how many tokens were tried.
    """

    eta: float
    width: int
    survival: float
    nearest_distance: float
    close_distance: float
    median_distance: float
    probes: int

    @property
    def noise_length(self) -> float:
        """Mean length of the noise."""
        return self.width / self.eta

    @property
    def close_ratio(self) -> float:
        """Log of the factor by which the noise may tell two close tokens apart: eta times their distance."""
        return self.eta * self.close_distance

    @property
    def median_ratio(self) -> float:
        """The same for two tokens at the median distance."""
        return self.eta * self.median_distance


def meaning(table_Vn: torch.Tensor, eta: float, noise: NoiseSource, probes: int = 1000, seed: int = 0) -> Meaning:
    """Measures on public representations what eta means. Uses no private data.

    Args:
      table_Vn: (V, n) representations: rows of the embedding, or of a public text's hidden states. V >= 2.
      probes: rows that are tried, chosen by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    table = table_Vn.detach().float()
    chosen = torch.randperm(len(table), generator=generator)[:probes]
    rows = table[chosen]
    noised = rows.double() + dx_noise(len(rows), table.shape[1], eta, noise)
    survived = float((nearest(noised.float(), table) == chosen).double().mean())
    apart = distances(rows, table)
    own = torch.zeros_like(apart, dtype=torch.bool)
    own[torch.arange(len(rows)), chosen] = True
    others = apart[~own].view(len(rows), -1)
    # A quantile of all pairs needs no more than some millions of them.
    pairs = others.flatten()
    pairs = pairs[torch.randint(len(pairs), (min(len(pairs), 1_000_000),), generator=generator)].sort().values
    return Meaning(
        eta=eta,
        width=table.shape[1],
        survival=survived,
        nearest_distance=float(others.min(dim=1).values.median()),
        close_distance=float(pairs[int(0.01 * (len(pairs) - 1))]),
        median_distance=float(pairs[int(0.5 * (len(pairs) - 1))]),
        probes=len(rows),
    )
