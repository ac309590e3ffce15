"""Exact Gaussian noise by the million: draw by draw against long arithmetic, and as a law."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from randomgen import AESCounter
from scipy import special, stats

from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.privacy import mechanism as mechanisms
from sotto.privacy import noise as noise_module
from sotto.privacy import rounded
from sotto.privacy.discrete import rounded_gaussian
from sotto.privacy.mechanism import GRID_BITS, GaussianMechanism, grid
from sotto.privacy.noise import DebugNoise, NoiseSource, SecureNoise

CPU = torch.device("cpu")
STDS = [0.3, 1.0, 37 / 11, 1000.5, 2.0**24, 1.7 * 2**25, 2.0**33]


def system_words(count: int) -> Any:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def no_more(n: int) -> int:
    raise AssertionError("53 bits were enough")


def slowly(word: int, std: float, tail: int = 1 << 127) -> int:
    """The draw whose bits are those of the word and then those of `tail`, by bisection in 400 bits."""
    with mpmath.workprec(400):
        p = mpmath.ldexp((word >> 11) * 2**128 + tail, -53 - 128)
        low, high = mpmath.mpf(0), mpmath.mpf(40)
        for _ in range(180):
            middle = (low + high) / 2
            low, high = (middle, high) if mpmath.erfc(middle / mpmath.sqrt(2)) > p else (low, middle)
        magnitude = int(mpmath.floor(low * std + 0.5))
    return -magnitude if word & 1 else magnitude


def of(word: int, std: float, below: Callable[[int], int] = no_more) -> int:
    (found,) = rounded.rounded_normal(1, std, lambda count: np.array([word], dtype=np.uint64), below)
    assert found == int(found)
    return int(found)


@pytest.mark.parametrize("std", STDS)
def test_draws_are_those_of_long_arithmetic(std: float) -> None:
    words = system_words(20).tolist()
    words += [w >> shift for w, shift in zip(system_words(10).tolist(), range(3, 43, 4), strict=True)]  # deep tails
    words += [2**64 - 1, 2**64 - 2, 1 << 63, (1 << 63) + 1, rounded._LEAST << 11]
    for word in words:
        assert of(word, std, lambda n: n // 2) == slowly(word, std), word


@pytest.mark.parametrize("std", STDS)
def test_a_draw_on_a_boundary_asks_for_more_bits(std: float) -> None:
    """The same 53 bits give one integer or the next, as the bits after them say."""
    for between in (0, 1, int(std), int(3 * std)):
        with mpmath.workprec(300):
            edge = mpmath.erfc((mpmath.mpf(between) + 0.5) / std / mpmath.sqrt(2))
            word = int(mpmath.floor(mpmath.ldexp(edge, 53))) << 11
        if word >> 11 >= 1 << 53:
            continue
        answers = []
        for bits in (0, (1 << 64) - 1):
            asked: list[int] = []
            answers.append(of(word, std, lambda n, asked=asked, bits=bits: asked.append(n) or bits))
            assert asked, "decided by chance"
            assert answers[-1] == slowly(word, std, bits << 64 | bits)
        assert answers == [between + 1, between]


def test_a_word_of_zeros_is_far_out_and_not_infinite() -> None:
    drawn = iter([5, 1 << 60])
    assert of(0, 1000.0, lambda n: next(drawn)) == slowly(0, 1000.0, 5 << 64 | 1 << 60)


def test_the_quantile_is_a_hundred_times_better_than_it_has_to_be() -> None:
    tails = [*np.random.default_rng(1).random(200) / 2, *np.exp(-np.linspace(0.7, 38, 200)), 0.13533528323661, 0.5]
    for tail in map(float, tails):
        z = -float(special.ndtri(tail))
        with mpmath.workprec(160):
            density = mpmath.exp(-(mpmath.mpf(z) ** 2) / 2) / mpmath.sqrt(2 * mpmath.pi)
            off = abs(float((mpmath.erfc(mpmath.mpf(z) / mpmath.sqrt(2)) / 2 - tail) / density))
        assert off <= rounded._ERROR / 100 * max(1.0, z)


def test_a_quantile_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded.check_quantile.__wrapped__()
    monkeypatch.setattr(rounded, "_ndtri", lambda: lambda p: special.ndtri(p) * (1 + 1e-13))
    with pytest.raises(SottoError, match="SOT420"):
        rounded.check_quantile.__wrapped__()


# ---- the law


def fits(drawn: np.ndarray, std: float) -> float:
    """The chance that draws of the rounded Gaussian look no more like it than these."""
    reach = max(1, round(2.5 * std))
    edges = np.arange(-reach, reach + 1) + 0.5
    expected = np.diff(stats.norm.cdf(edges / std), prepend=0, append=1) * len(drawn)
    found = np.bincount(np.searchsorted(edges, drawn), minlength=len(expected))
    kept = expected >= 5
    return float(stats.chisquare(found[kept], expected[kept] * found[kept].sum() / expected[kept].sum()).pvalue)


@pytest.mark.parametrize("source", [SecureNoise(), DebugNoise(4)], ids=repr)
@pytest.mark.parametrize("std", [0.7, 2.0, 37 / 11])
def test_the_law_is_that_of_the_rounded_gaussian(source: NoiseSource, std: float) -> None:
    drawn = source.rounded((200_000,), std, step=0, name="w", device=CPU).numpy()
    assert fits(drawn, std) > 1e-6
    for wrong in (0.98, 1.02):
        assert fits(drawn, std * wrong) < 1e-6, "the twin"
    slow = np.array([rounded_gaussian(Fraction(std), secrets.randbelow) for _ in range(2000)])
    assert fits(slow, std) > 1e-6, "the law of the slow sampler, which is Karney's"


def test_large_draws_are_normal_and_use_every_integer() -> None:
    drawn = SecureNoise().rounded((1_000_000,), 2.0**24, step=0, name="w", device=CPU).numpy()
    assert np.array_equal(drawn, np.rint(drawn))
    assert stats.kstest(drawn / 2**24, "norm").pvalue > 1e-6
    assert stats.kstest(drawn / 2**24 * 0.97, "norm").pvalue < 1e-6
    for factor in (1.0, 0.99):  # of a million draws the deviation is known to a part in fourteen hundred
        assert (abs(float(drawn.std()) / 2**24 * factor - 1) < 0.005) == (factor == 1.0)
    assert abs(np.mean(drawn % 2) - 0.5) < 0.003
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.006
    assert len(np.unique(drawn)) > 0.97 * len(drawn)


def test_every_call_and_chunk_is_fresh() -> None:
    first, second = (SecureNoise().rounded((3 << 20,), 2.0**30, step=0, name="w", device=CPU) for _ in "12")
    chunks = [*first.split(1 << 20), *second.split(1 << 20)]
    assert float((torch.corrcoef(torch.stack(chunks)) - torch.eye(6)).abs().max()) < 0.006
    same = [DebugNoise(1).rounded((9,), 50.0, step=s, name="w", device=CPU) for s in (3, 3, 4)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_bits_come_from_the_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(16, 32))
    monkeypatch.setattr(noise_module.os, "urandom", lambda n: key)
    found = SecureNoise().rounded((500,), 2.0**20, step=0, name="w", device=CPU).numpy()
    words: Any = AESCounter(key=np.frombuffer(key, dtype=np.uint64)).random_raw  # type: ignore[arg-type]
    assert np.array_equal(found, rounded.rounded_normal(500, 2.0**20, words, secrets.randbelow))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), 2.0**37])
def test_other_deviations_are_refused(std: float) -> None:
    with pytest.raises(SottoError, match="SOT401"):
        SecureNoise().rounded((3,), std, step=0, name="w", device=CPU)


# ---- the mechanism


def exact(noise_multiplier: float, divisor: float, noise: NoiseSource) -> GaussianMechanism:
    return GaussianMechanism(noise_multiplier, divisor, noise, exact=True)


@pytest.mark.parametrize("sensitivity", [1.0, 0.1, 7e-5, 1e4, 1 - 2**-53])
def test_the_grid_is_fine_and_public(sensitivity: float) -> None:
    unit = grid(sensitivity, GRID_BITS)
    assert 2.0**-25 <= unit / sensitivity <= 2.0**-24
    assert np.log2(unit) == int(np.log2(unit))


@pytest.mark.parametrize("numbers", [1, 2, 1000, 10**9])
def test_rounding_is_part_of_the_sensitivity(numbers: int) -> None:
    """z (C + g sqrt(D)) at least, and no more than a grid step above."""
    for z, c in ((0.7, 1.0), (3.3, 0.01), (50.0, 9.9)):
        unit = grid(c, GRID_BITS)
        std = mechanisms.exact_std(z, c, unit, numbers)
        assert z * (c + unit * numbers**0.5) <= std * unit <= z * (c + unit * (numbers**0.5 + 1.001))


def test_rounding_counts_the_numbers_of_all_tensors_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def rounded(self: Any, shape: Any, std: float, **where: Any) -> torch.Tensor:
        asked.append(std)
        return torch.zeros(shape, dtype=torch.float64)

    monkeypatch.setattr(SecureNoise, "rounded", rounded)
    gradients = {f"w{i}": torch.zeros(10_000) for i in range(9)}
    exact(0.8, 1.0, SecureNoise()).privatize(ClippedSum(gradients, torch.zeros(0, 1), 1.0), 0)
    unit = grid(1.0, GRID_BITS)
    assert 0.8 * (1.0 + unit * 300) <= min(asked) * unit <= max(asked) * unit <= 0.8 * (1.0 + unit * 302)
    assert len(asked) == 9


def test_neighbouring_sums_stay_within_it_once_they_are_rounded() -> None:
    """Also where every number is rounded apart: the twin, which counts the sensitivity alone, is refuted."""
    sensitivity, numbers = 1.0, 4096
    unit = grid(sensitivity, GRID_BITS)
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, unit, 100 * unit):
        one = torch.randn(numbers, generator=generator, dtype=torch.float64) * scale
        step = torch.randn(numbers, generator=generator, dtype=torch.float64)
        two = one + step / step.norm() * sensitivity * (1 - 1e-12)
        apart = float(((one / unit).round() - (two / unit).round()).norm()) * unit
        assert apart <= sensitivity + unit * numbers**0.5
    flips = torch.full((numbers,), unit * (0.5 - 2**-20), dtype=torch.float64)
    nudged = flips + (sensitivity / numbers**0.5 - unit / 2)
    apart = float(((flips / unit).round() - (nudged / unit).round()).norm()) * unit
    before = float((flips - nudged).norm())
    assert before < apart <= before + unit * numbers**0.5, "the twin: rounding moves them apart"


@pytest.mark.parametrize("sensitivity", [1.0, 0.3])
def test_a_release_is_a_whole_multiple_of_the_grid_over_the_divisor(sensitivity: float) -> None:
    unit, values = grid(sensitivity, GRID_BITS), torch.randn(5000, dtype=torch.float64) * 9
    released = exact(0.8, 64.0, SecureNoise()).privatize(ClippedSum({"w": values}, torch.zeros(0, 1), sensitivity), 0)
    whole = released["w"] * 64.0 / unit
    assert torch.equal(whole, whole.round())
    floats = GaussianMechanism(0.8, 64.0, SecureNoise()).privatize(
        ClippedSum({"w": values}, torch.zeros(0, 1), sensitivity), 0
    )
    assert not torch.equal(floats["w"] * 64.0 / unit, (floats["w"] * 64.0 / unit).round()), "the twin"


@pytest.mark.parametrize(("z", "sensitivity", "divisor"), [(1.0, 1.0, 1.0), (0.7, 0.1, 64.0), (4.0, 10.0, 1024.0)])
def test_an_empty_batch_is_noise_of_the_right_size(z: float, sensitivity: float, divisor: float) -> None:
    zeros = ClippedSum({"w": torch.zeros(1000, 900), "b": torch.zeros(100_000)}, torch.zeros(0, 1), sensitivity)
    released = exact(z, divisor, SecureNoise()).privatize(zeros, 0)
    for value in released.values():
        found, std = float(value.double().std()), z * sensitivity / divisor
        spread = 5.5 / (2 * value.numel()) ** 0.5 + 1e-4  # five and a half standard errors
        assert found == pytest.approx(std, rel=spread)
        assert found * 1.03 != pytest.approx(std, rel=spread), "the twin"
        assert value.dtype == torch.float32


def test_it_is_the_gaussian_mechanism_of_the_rounded_sum_and_rounded() -> None:
    """Noise of a known source: the release is round(sum / g) + integers, and no function of the bits below."""
    values = torch.randn(400)
    unit = grid(1.0, GRID_BITS)
    noise = DebugNoise(5).rounded((400,), mechanisms.exact_std(0.7, 1.0, unit, 400), step=3, name="w[0]", device=CPU)
    for below in (0.0, unit * 0.2):  # what the grid rounds away
        total = ClippedSum({"w": (values.double() / unit).round() * unit + below}, torch.zeros(0, 1), 1.0)
        released = exact(0.7, 3.0, DebugNoise(5)).privatize(total, 3)["w"]
        assert torch.equal(released, ((values.double() / unit).round() + noise) * unit / 3.0)


def test_a_sum_beyond_the_grid_is_never_released() -> None:
    with pytest.raises(SottoError, match="SOT430"):
        exact(1.0, 1.0, SecureNoise()).privatize(ClippedSum({"w": torch.full((2,), 1e9)}, torch.zeros(0, 1), 1.0), 0)
