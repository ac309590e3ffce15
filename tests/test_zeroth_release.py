"""No unit moves a released sum by more than its sensitivity, whatever its numbers are; Laplace noise has its law."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import CLIPPINGS, Flat, Unclipped
from sotto.privacy.mechanism import GaussianMechanism, LaplaceMechanism, grid
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.zeroth_order.release import NAME, Release

CASES = 10_000
BAD = torch.tensor([math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300, 0.0, -0.0], dtype=torch.float64)


def cases(seed: int) -> Any:
    """(sketch, clip norm) of all sizes and scales, a tenth of them with values that no loss should give."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(CASES):
        units, count = whole(1, 5), whole(1, 9)
        scale = 10.0 ** whole(-6, 7)
        x_UK = scale * torch.randn(units, count, dtype=torch.float64, generator=generator)
        if whole(0, 10) == 0:
            spoiled = torch.rand(units, count, generator=generator) < 0.5
            x_UK = torch.where(spoiled, BAD[torch.randint(len(BAD), (units, count), generator=generator)], x_UK)
        yield x_UK, 10.0 ** whole(-3, 4) * (1 + float(torch.rand((), generator=generator)))


def largest_move(clipping: str, order: int, release: Any = Release) -> float:
    """How far a sum moved at most when its first unit was removed, over the sensitivity."""
    worst = 0.0
    for x_UK, clip_norm in cases(order):
        made = release(CLIPPINGS[clipping](clip_norm), x_UK.shape[1], order)
        whole, without = made.clipped_sum(x_UK), made.clipped_sum(x_UK[1:])
        assert torch.isfinite(whole.gradients[NAME]).all()
        assert whole.sensitivity == without.sensitivity == clip_norm
        moved = torch.linalg.vector_norm(whole.gradients[NAME] - without.gradients[NAME], order)
        worst = max(worst, float(moved) / clip_norm)
    return worst


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_no_unit_moves_the_sum_by_more_than_the_sensitivity(clipping, order):
    # Sums in float64 round; those of Laplace releases are exact, on their grid.
    assert 0.9 < largest_move(clipping, order) <= (1 if order == 1 else 1 + 1e-12)


class EachAlone(Release):
    """Every number clipped on its own, as if K numbers were one."""

    def clipped_sum(self, sketch_UK: torch.Tensor) -> ClippedSum:
        total = self.zeros()
        total.gradients[NAME] = (
            torch.nan_to_num(sketch_UK).clamp(-self.clipping.sensitivity, self.clipping.sensitivity).sum(0)
        )
        return total


class OtherNorm(Release):
    """Clipped in L2 norm where the noise needs L1."""

    def __init__(self, clipping: Any, count: int, order: int):
        super().__init__(clipping, count, 2)


@pytest.mark.parametrize(("mutant", "order"), [(EachAlone, 2), (EachAlone, 1), (OtherNorm, 1)])
def test_clipping_that_is_not_enough_is_noticed(mutant, order):
    assert largest_move("flat", order, mutant) > 1.5


def test_a_unit_that_is_not_finite_contributes_zero_and_says_so():
    x_UK = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0], [0.3, 0.4]], dtype=torch.float64)
    for order, expected in ((2, [0.6 + 0.3, 0.8 + 0.4]), (1, [3 / 7 + 0.3, 4 / 7 + 0.4])):
        total = Release(Flat(1.0), 2, order).clipped_sum(x_UK)
        assert total.gradients[NAME].tolist() == pytest.approx(expected, abs=1e-8)
        assert torch.isfinite(total.norms).tolist() == [True, False, False, True]


def test_sums_of_parts_add_up_and_only_like_ones_do():
    x_UK = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = Release(Flat(0.5), 4)
    total = made.zeros()
    for part in (x_UK[:2], x_UK[2:2], x_UK[2:]):
        total += made.clipped_sum(part)
    torch.testing.assert_close(total.gradients[NAME], made.clipped_sum(x_UK).gradients[NAME])
    assert torch.equal(total.norms, made.clipped_sum(x_UK).norms)
    for other in (Release(Flat(0.5), 4, 1), Release(Flat(0.6), 4)):
        with pytest.raises(ValueError, match="same engine"):
            total += other.zeros()


def test_without_privacy_nothing_is_clipped():
    x_UK = torch.tensor([[300.0, -400.0], [math.nan, 1.0]])
    assert Release(Unclipped(), 2).clipped_sum(x_UK).gradients[NAME].tolist() == [300, -400]


# ---- Laplace noise


def laplace_draws(
    mechanism: LaplaceMechanism, sensitivity: float, value: float = 0.0, count: int = 4000
) -> list[float]:
    unit = grid(sensitivity)
    sums_K = torch.full((count,), round(value / unit) * unit, dtype=torch.float64)
    return mechanism.privatize(ClippedSum({NAME: sums_K}, torch.zeros(0, 1), sensitivity, 1), 0)[NAME].tolist()


def assert_laplace(draws: list[float], centre: float, scale: float) -> None:
    """Its shape, and its mean distance from the centre, which is the scale within six standard errors."""
    assert stats.kstest(draws, stats.laplace(centre, scale).cdf).pvalue > 1e-7
    distance = sum(abs(x - centre) for x in draws) / len(draws)
    assert distance == pytest.approx(scale, rel=6 / math.sqrt(len(draws)))


@pytest.mark.parametrize(
    ("multiplier", "sensitivity", "divisor"), [(1.0, 1.0, 1.0), (4.5, 0.03, 16.0), (0.3, 70.0, 3.0)]
)
def test_the_noise_is_laplace_of_the_right_scale(multiplier, sensitivity, divisor):
    mechanism = LaplaceMechanism(multiplier, divisor, DebugNoise(3))
    scale, centre = multiplier * sensitivity / divisor, 2.5 * sensitivity / divisor
    draws = laplace_draws(mechanism, sensitivity, 2.5 * sensitivity)
    assert_laplace(draws, centre, scale)
    for wrong in (0.85, 1.15):
        with pytest.raises(AssertionError):
            assert_laplace(draws, centre, wrong * scale)
    with pytest.raises(AssertionError):
        assert_laplace(draws, centre + 0.15 * scale, scale)
    gaussian = GaussianMechanism(multiplier * math.sqrt(2), divisor, DebugNoise(3))
    sums = ClippedSum({NAME: torch.zeros(4000)}, torch.zeros(0, 1), sensitivity)
    with pytest.raises(AssertionError):
        assert_laplace(gaussian.privatize(sums, 0)[NAME].tolist(), 0.0, scale)


def test_every_release_is_a_whole_multiple_of_the_grid():
    mechanism = LaplaceMechanism(2.0, 1.0, SecureNoise())
    for x in laplace_draws(mechanism, 0.7, 0.3, 200):
        assert (x / grid(0.7)).is_integer()
    assert 2**32 <= 0.7 / grid(0.7) <= 2**33
    assert grid(1.0) == 2.0**-32


def test_secure_laplace_noise_is_fresh_and_debug_noise_is_not():
    secure, debug = (LaplaceMechanism(1.0, 1.0, noise) for noise in (SecureNoise(), DebugNoise(1)))
    assert secure.private
    assert not debug.private
    assert laplace_draws(secure, 1.0, count=8) != laplace_draws(secure, 1.0, count=8)
    assert laplace_draws(debug, 1.0, count=8) == laplace_draws(debug, 1.0, count=8)
    sums = Release(Flat(1.0), 8, 1).zeros()
    assert not torch.equal(debug.privatize(sums, 0)[NAME], debug.privatize(sums, 1)[NAME])


@pytest.mark.parametrize(
    "total",
    [
        ClippedSum({NAME: torch.zeros(3)}, torch.zeros(0, 1), 1.0),
        ClippedSum({NAME: torch.full((3,), math.pi, dtype=torch.float64)}, torch.zeros(0, 1), 1.0, 1),
        ClippedSum({NAME: torch.full((3,), 2.0**30, dtype=torch.float64)}, torch.zeros(0, 1), 1.0, 1),
        ClippedSum({NAME: torch.tensor([math.nan])}, torch.zeros(0, 1), 1.0, 1),
        ClippedSum({}, torch.zeros(0, 1), 1.0, 1),
    ],
    ids=["L2 norm", "off the grid", "too large", "nan", "empty"],
)
def test_sums_that_laplace_noise_does_not_cover(total):
    with pytest.raises(SottoError) as caught:
        LaplaceMechanism(1.0, 1.0, DebugNoise(1)).privatize(total, 0)
    assert caught.value.code == "SOT430"


def test_gaussian_noise_covers_a_sum_in_l1_norm_too():
    total = Release(Flat(1.0), 3, 1).clipped_sum(torch.ones(2, 3))
    assert GaussianMechanism(1.0, 1.0, DebugNoise(1)).privatize(total, 0)[NAME].shape == (3,)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_arguments(bad):
    for make in (lambda: LaplaceMechanism(bad, 1.0, DebugNoise(1)), lambda: LaplaceMechanism(1.0, bad, DebugNoise(1))):
        with pytest.raises(SottoError) as caught:
            make()
        assert caught.value.code == "SOT401"
