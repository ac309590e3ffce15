"""The d_X sampler against its law, and the two wrong samplers of public code, which must fail the same test."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from sotto.errors import SottoError
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.split.metric import Table, distances, dx_noise, meaning, nearest

ETA = 40.0


def rejected(noise_Nn: torch.Tensor, eta: float) -> float:
    """The p-value of Kolmogorov and Smirnov: lengths against Gamma(n, 1/eta)."""
    norms = noise_Nn.norm(dim=1).numpy()
    return float(stats.kstest(norms, stats.gamma(a=noise_Nn.shape[1], scale=1 / eta).cdf).pvalue)


def shared_radius(tokens: int, width: int, eta: float, batch: int = 8) -> torch.Tensor:
    """One gamma for all tokens of a batch."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    radius = torch._standard_gamma(torch.full((math.ceil(tokens / batch), 1), float(width)).double(), generator) / eta
    return v / v.norm(dim=1, keepdim=True) * radius.repeat_interleave(batch, dim=0)[:tokens]


def per_coordinate(tokens: int, width: int, eta: float) -> torch.Tensor:
    """An independent gamma and an independent sign-like factor for each number."""
    generator = torch.Generator().manual_seed(2)
    gamma = torch._standard_gamma(torch.full((tokens, width), float(width)).double(), generator) / eta
    return gamma * (2 * torch.rand(tokens, width, generator=generator, dtype=torch.float64) - 1)


def test_the_length_of_a_million_tokens_follows_the_gamma_law() -> None:
    parts = [dx_noise(100_000, 8, ETA, SecureNoise()) for _ in range(10)]
    assert rejected(torch.cat(parts), ETA) > 1e-6


@pytest.mark.parametrize("width", [1, 2, 384])
def test_the_law_holds_at_every_width(width: int) -> None:
    assert rejected(dx_noise(20_000, width, ETA, SecureNoise()), ETA) > 1e-6


def test_a_radius_for_the_whole_batch_fails() -> None:
    assert rejected(shared_radius(1_000_000, 8, ETA, batch=64), ETA) < 1e-12


def test_a_shared_radius_fails_on_pairs_however_small_the_batch() -> None:
    """Two tokens of one text have independent lengths here, and the same there."""
    ours, theirs = (
        z.norm(dim=1).view(-1, 2) for z in (dx_noise(20_000, 8, ETA, SecureNoise()), shared_radius(20_000, 8, ETA, 2))
    )
    assert abs(float(torch.corrcoef(ours.T)[0, 1])) < 0.05
    assert float(torch.corrcoef(theirs.T)[0, 1]) > 0.999


def test_gammas_per_coordinate_fail() -> None:
    wrong = per_coordinate(20_000, 64, ETA)
    assert rejected(wrong, ETA) < 1e-12
    assert float(wrong.norm(dim=1).mean()) == pytest.approx(64 / ETA * math.sqrt(64 / 3), rel=0.02)


def test_twice_the_eta_fails() -> None:
    assert rejected(dx_noise(20_000, 8, 2 * ETA, SecureNoise()), ETA) < 1e-12


def test_the_direction_is_uniform_and_independent_of_the_length() -> None:
    z = dx_noise(50_000, 5, ETA, SecureNoise())
    norms = z.norm(dim=1)
    u = z / norms[:, None]
    # One coordinate of a uniform direction in n dimensions: (x + 1)/2 is Beta((n-1)/2, (n-1)/2).
    for coordinate in u.T:
        assert stats.kstest(((coordinate + 1) / 2).numpy(), stats.beta(2, 2).cdf).pvalue > 1e-8
    assert float((u.T @ u / len(u) - torch.eye(5, dtype=torch.float64) / 5).abs().max()) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([norms, u[:, 0].abs()]))[0, 1])) < 0.03


def test_the_density_ratio_is_bounded_by_eta_times_the_distance() -> None:
    """In one dimension the law is Laplace's: the ratio of two shifted histograms is at most e^(eta d)."""
    distance, eta = 0.02, 40.0
    a = dx_noise(400_000, 1, eta, SecureNoise())[:, 0]
    b = dx_noise(400_000, 1, eta, SecureNoise())[:, 0] + distance
    edges = torch.linspace(-0.04, 0.06, 11, dtype=torch.float64)
    left, right = (torch.histogram(x, edges).hist for x in (a, b))
    ratio = (left / right).max()
    assert float(ratio) < math.exp(eta * distance) * 1.07  # five standard errors of the bin that has fewest
    assert float(ratio) > math.exp(eta * distance) * 0.94


def test_the_nearest_row_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, table = (
        torch.randn(700, 6, generator=generator),
        torch.randn(50, 6, generator=generator) * torch.rand(50, 1, generator=generator) * 5,
    )
    slow = [min(range(50), key=lambda j: float((row - table[j]).square().sum())) for row in rows]
    assert nearest(rows, table).tolist() == slow
    assert Table(table).nearest(rows, chunk=64).tolist() == slow
    slowly = torch.cdist(rows.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
    far = 1e4  # where products cancel most
    assert torch.allclose(distances(rows, table), slowly, atol=1e-7)
    assert torch.allclose(distances(rows + far, table + far), slowly, atol=1e-2)
    assert nearest(rows[:0], table).shape == (0,)


def test_meaning_goes_from_none_to_all_survive() -> None:
    table = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    weak, strong = meaning(table, 1000.0, DebugNoise(0)), meaning(table, 0.5, DebugNoise(0))
    assert weak.survival == 1.0
    assert strong.survival < 0.05
    assert weak.close_distance <= weak.median_distance
    assert weak.median_distance == pytest.approx(8.0, rel=0.05)  # |a - b| of two normals in 32 dimensions
    assert weak.median_ratio == pytest.approx(1000 * weak.median_distance)
    assert strong.noise_length == 64.0


@pytest.mark.parametrize("eta", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_eta_is_refused(eta: float) -> None:
    with pytest.raises(SottoError) as caught:
        dx_noise(3, 4, eta, DebugNoise(0))
    assert caught.value.code == "SOT401"
