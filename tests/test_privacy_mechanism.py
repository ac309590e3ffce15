"""What is released is (sum + noise) / divisor, with the noise that the accountant was told of."""

from __future__ import annotations

import math

import pytest
import torch

from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Adaptive
from sotto.privacy import mechanism as mechanism_module
from sotto.privacy.mechanism import AdaptiveGaussianMechanism, GaussianMechanism, IdentityMechanism
from sotto.privacy.noise import DebugNoise, SecureNoise


def total(gradients, sensitivity=1.0):
    return ClippedSum(gradients, torch.zeros(0, 1), sensitivity)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def check_scale(released: torch.Tensor, std: float) -> None:
    """Within 0.5 %: 7 standard errors at a million coordinates."""
    assert float(released.double().std()) == pytest.approx(std, rel=5e-3)
    assert abs(float(released.double().mean())) < 6 * std / released.numel() ** 0.5


@pytest.mark.parametrize(
    ("noise_multiplier", "sensitivity", "divisor"), [(1.0, 1.0, 1.0), (0.7, 0.1, 64.0), (4, 10, 1024)]
)
def test_an_empty_batch_is_all_noise(noise_multiplier, sensitivity, divisor):
    mechanism = GaussianMechanism(noise_multiplier, divisor, SecureNoise())
    released = mechanism.privatize(total({"w": zeros(1000, 1000)}, sensitivity), step=0)["w"]
    std = noise_multiplier * sensitivity / divisor
    assert mechanism.scale(sensitivity) == pytest.approx(std)
    check_scale(released, std)
    for mutant in (0.7, 1.3, 0.99, 1.01, 1 / divisor if divisor != 1 else 2.0):
        with pytest.raises(AssertionError):
            check_scale(released * mutant, std)


def test_every_parameter_is_noised_independently():
    gradients = {f"layer.{i}.weight": zeros(100, 100) for i in range(5)} | {"bias": zeros(10_000), "scalar": zeros(1)}
    released = GaussianMechanism(1.0, 10.0, SecureNoise()).privatize(total(gradients), step=0)
    assert released.keys() == gradients.keys()
    assert all(bool((value != 0).all()) for value in released.values())
    flat = [value.flatten() for value in released.values() if value.numel() == 10_000]
    correlations = torch.corrcoef(torch.stack(flat)) - torch.eye(len(flat))
    assert float(correlations.abs().max()) < 0.055


@pytest.mark.parametrize("noise", [SecureNoise(), DebugNoise(1)], ids=repr)
def test_no_two_steps_share_noise(noise):
    mechanism = GaussianMechanism(1.0, 1.0, noise)
    steps = [mechanism.privatize(total({"w": zeros(10_000)}), step=step)["w"] for step in range(3)]
    correlations = torch.corrcoef(torch.stack(steps)) - torch.eye(3)
    assert float(correlations.abs().max()) < 0.055


def test_the_sum_is_kept():
    value = torch.randn(50, 20, dtype=torch.float64)
    before = value.clone()
    released = GaussianMechanism(1e-9, 4.0, SecureNoise()).privatize(total({"w": value}), step=0)["w"]
    assert torch.allclose(released, value / 4, atol=1e-8)
    assert torch.equal(value, before)


@pytest.mark.parametrize(
    ("given_", "out"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_noise_is_added_in_full_precision(given_, out):
    for mechanism in (GaussianMechanism(1.0, 3.0, SecureNoise()), IdentityMechanism(3.0)):
        released = mechanism.privatize(total({"w": torch.ones(100_000, dtype=given_)}), step=0)["w"]
        assert released.dtype == out
    noised = GaussianMechanism(1.0, 3.0, SecureNoise()).privatize(total({"w": zeros(100_000, dtype=given_)}), 0)["w"]
    assert len(noised.unique()) > 0.99 * noised.numel()
    assert len(noised.bfloat16().unique()) < 0.1 * noised.numel()  # the twin: what half precision would give


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_release_is_rounded_once(dtype):
    """Noise is added and divided in float64: no bit of the sum survives from a rounding of its own."""
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul_(30).to(dtype)
    noise = DebugNoise(5).normal(value.shape, 0.7, step=0, name="w[0]", device=value.device)
    released = GaussianMechanism(0.7, 3.0, DebugNoise(5)).privatize(total({"w": value}), step=0)["w"]
    assert torch.equal(released, ((value.double() + noise) / 3.0).float())
    assert not torch.equal(released, (value.float() + noise.float()) / 3.0), "the twin: an addition in float32"


def test_odd_shapes_and_layouts():
    gradients = {"t": torch.arange(12.0).reshape(3, 4).T, "none": zeros(0, 3), "scalar": torch.tensor(2.0)}
    released = GaussianMechanism(1e-9, 1.0, SecureNoise()).privatize(total(gradients), step=0)
    for name, value in gradients.items():
        assert released[name].shape == value.shape
        assert torch.allclose(released[name], value, atol=1e-6)


def test_large_tensors_are_noised_in_pieces(monkeypatch):
    monkeypatch.setattr(mechanism_module, "_PIECE", 1000)
    value = torch.arange(2500.0)
    released = GaussianMechanism(1e-9, 1.0, DebugNoise(0)).privatize(total({"w": value}), step=0)["w"]
    assert torch.allclose(released, value, atol=1e-6)
    noise = GaussianMechanism(1.0, 1.0, DebugNoise(0)).privatize(total({"w": zeros(2500)}), step=0)["w"]
    assert len(noise.unique()) == 2500


def test_large_tensors_get_exact_noise_in_every_piece(monkeypatch):
    monkeypatch.setattr(mechanism_module, "_PIECE", 1000)
    value = torch.arange(2500.0)
    for source in (SecureNoise(), DebugNoise(0)):
        released = GaussianMechanism(1.0, 1.0, source, exact=True).privatize(total({"w": value}), step=0)["w"]
        first, second, last = (released.double() - value.double()).split(1000)
        for noise in (first, second, last):
            assert float(noise.std()) == pytest.approx(1.0, rel=7 / (2 * len(noise)) ** 0.5)
        assert int((first == second).sum()) < 5  # two of them meet on this coarse grid in one run of a hundred


def test_same_debug_noise_same_release():
    runs = [
        GaussianMechanism(1.0, 2.0, DebugNoise(5)).privatize(total({"w": zeros(100)}), step=4)["w"] for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_sums_are_never_released(bad):
    gradients = {"fine": zeros(3), "broken": torch.tensor([0.0, bad])}
    for mechanism in (GaussianMechanism(1.0, 2.0, SecureNoise()), IdentityMechanism(2.0)):
        with pytest.raises(SottoError) as caught:
            mechanism.privatize(total(gradients), step=0)
        assert caught.value.code == "SOT430"
        assert "broken" in str(caught.value)


def test_bad_arguments():
    noise = SecureNoise()
    for multiplier, divisor in (
        (0.0, 1.0),
        (-1.0, 1.0),
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (1.0, 0.0),
        (1.0, -2.0),
    ):
        with pytest.raises(SottoError):
            GaussianMechanism(multiplier, divisor, noise)
    for sensitivity in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SottoError):
            GaussianMechanism(1.0, 1.0, noise).privatize(total({"w": zeros(2)}, sensitivity), step=0)
    with pytest.raises(SottoError):
        GaussianMechanism(1.0, 1.0, noise).privatize(total({}), step=0)
    with pytest.raises(SottoError):
        IdentityMechanism(0.0)


def test_private():
    assert GaussianMechanism(1.0, 1.0, SecureNoise()).private
    assert not GaussianMechanism(1.0, 1.0, DebugNoise(0)).private
    assert not IdentityMechanism(1.0).private


# ---- adaptive: a sum and a count in one release


def adaptive(groups: int, share: float = 0.2, divisor: float = 50.0, exact: bool = False):
    clipping = Adaptive(1.0, thresholds=[1.0] * groups)
    return AdaptiveGaussianMechanism(0.8, divisor, SecureNoise(), clipping, share, exact), clipping


@pytest.mark.parametrize("groups", [1, 7])
def test_sum_and_counts_together_cost_what_the_plan_bought(groups):
    """Per unit of sensitivity, squared: that of the sum, and G counts that move by 1/2 each."""
    mechanism, _ = adaptive(groups)
    z_sum, count_std = mechanism.scale(1.0) * 50.0, mechanism.count_std(groups)
    assert 1 / z_sum**2 + groups * 0.25 / count_std**2 == pytest.approx(1 / 0.8**2, rel=1e-12)


@pytest.mark.parametrize(("groups", "exact"), [(1, False), (7, False), (1, True)])
def test_both_parts_get_the_noise_that_was_paid_for(groups, exact):
    """Exact noise on a count is rounded to halves, which adds the variance of a uniform number in a half."""
    mechanism, clipping = adaptive(groups, exact=exact)
    sums, fractions = [], []
    norms = torch.rand(30, groups, dtype=torch.float64) * 2
    expected = clipping.count_unclipped(norms) / 50 + 0.5

    def record(fraction_G):
        fractions.append(fraction_G - expected)

    clipping.follow = record
    for step in range(400 if groups > 1 else 1000 if exact else 2500):
        batch = ClippedSum({"w": zeros(400)}, norms, 2.0)
        sums.append(mechanism.privatize(batch, step)["w"])
    noise, noise_of_counts = torch.cat(sums).double(), torch.cat(fractions)
    count_std = math.hypot(mechanism.count_std(groups), 0.5 / math.sqrt(12) if exact else 0.0)
    for found, std in ((noise, mechanism.scale(2.0)), (noise_of_counts, count_std / 50)):
        spread = 5 / (2 * found.numel()) ** 0.5  # five standard errors
        assert float(found.std()) == pytest.approx(std, rel=spread)
        assert abs(float(found.mean())) < 5 * std / found.numel() ** 0.5
        for mutant in (0.8, 1.25):
            assert float(found.std()) * mutant != pytest.approx(std, rel=spread)
    assert len(noise) + len(noise_of_counts) > 100_000


def test_thresholds_move_after_the_step_and_only_by_what_was_released():
    mechanism, clipping = adaptive(1, share=0.01, divisor=1e9)
    mechanism.privatize(ClippedSum({"w": zeros(3)}, torch.zeros(0, 1), 1.0), step=0)
    assert clipping.thresholds[0] == pytest.approx(1.0, abs=1e-6), "an empty batch says: one half, give or take noise"
    one, two = (AdaptiveGaussianMechanism(0.8, 50.0, DebugNoise(3), Adaptive(1.0, thresholds=[1.0])) for _ in "12")
    for mechanism, norms in ((one, torch.full((30, 1), 0.1)), (two, torch.full((30, 1), 9.0))):
        mechanism.privatize(ClippedSum({"w": zeros(3)}, norms.double(), 1.0), step=0)
    assert one.quantile.sensitivity < 1.0 < two.quantile.sensitivity


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_pays_for_nothing_is_refused(share):
    with pytest.raises(SottoError, match="SOT401"):
        AdaptiveGaussianMechanism(1.0, 1.0, SecureNoise(), Adaptive(1.0), share)
