"""Faults in the noise: its scale, its generator, its precision, and where it is added."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import secrets
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto import session as sessions
from sotto import training
from sotto.optim import Optimizer
from sotto.privacy import discrete
from sotto.privacy import mechanism as mechanisms
from sotto.privacy import noise as noises
from sotto.privacy.mechanism import AdaptiveGaussianMechanism, GaussianMechanism
from sotto.privacy.noise import DebugNoise, SecureNoise

ALL_NOISE = "test_privacy_mechanism.py::test_an_empty_batch_is_all_noise[0.7"
NORMAL = "test_privacy_noise.py::test_standard_normal[SecureNoise"
STEPS = "test_privacy_mechanism.py::test_no_two_steps_share_noise[SecureNoise"


def rescaled(m: pytest.MonkeyPatch, factor: Any) -> None:
    """The mechanism asks for noise of another deviation: `factor(mechanism, sensitivity)` times the right one."""

    def privatize(right: Any, self: GaussianMechanism, total: Any, step: int) -> Any:
        found = dataclasses.replace(total, sensitivity=total.sensitivity * factor(self, total.sensitivity))
        return right(self, found, step)

    wrapped(m, GaussianMechanism, "privatize", privatize)


# ---- 9: scale


@caught_by(ALL_NOISE, 9)
def noise_without_the_clipping_norm(m: pytest.MonkeyPatch) -> None:
    """Standard deviation z instead of z C."""
    rescaled(m, lambda mechanism, sensitivity: 1 / sensitivity)


@caught_by(ALL_NOISE, 9)
def noise_divided_by_the_batch(m: pytest.MonkeyPatch) -> None:
    """z C / B is added to the sum, and divided by B again."""
    rescaled(m, lambda mechanism, sensitivity: 1 / mechanism.divisor)


@caught_by(ALL_NOISE, 9)
def noise_divided_by_the_root_of_the_batch(m: pytest.MonkeyPatch) -> None:
    """As if every example brought noise of its own."""
    rescaled(m, lambda mechanism, sensitivity: mechanism.divisor**-0.5)


@caught_by(ALL_NOISE, 9)
def variance_for_deviation(m: pytest.MonkeyPatch) -> None:
    """The square of z C is taken for its root."""
    rescaled(m, lambda mechanism, sensitivity: mechanism.noise_multiplier * sensitivity)


@caught_by(ALL_NOISE, 9)
def noise_a_hundredth_too_small(m: pytest.MonkeyPatch) -> None:
    """99 % of the deviation."""
    rescaled(m, lambda mechanism, sensitivity: 0.99)


@caught_by("test_privacy_mechanism.py::test_every_parameter_is_noised_independently", 9)
def biases_are_not_noised(m: pytest.MonkeyPatch) -> None:
    """Small parameters are released as they are."""

    def release(
        right: Any, self: GaussianMechanism, value: torch.Tensor, std: float, step: int, name: str, *a: Any
    ) -> Any:
        return value / self.divisor if name.endswith("bias") else right(self, value, std, step, name, *a)

    wrapped(m, GaussianMechanism, "_release", release)


@caught_by(STEPS, 9)
def every_second_step_has_no_noise(m: pytest.MonkeyPatch) -> None:
    """Odd steps are released as they are."""

    def privatize(right: Any, self: GaussianMechanism, total: Any, step: int) -> Any:
        return {n: g / self.divisor for n, g in total.gradients.items()} if step % 2 else right(self, total, step)

    wrapped(m, GaussianMechanism, "privatize", privatize)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat", 9)
def noise_scaled_to_the_batch_that_was_drawn(m: pytest.MonkeyPatch) -> None:
    """Less noise for a small batch: the scale is a function of the data."""

    def privatize(right: Any, self: GaussianMechanism, total: Any, step: int) -> Any:
        share = min(1.0, max(1, len(total.norms)) / self.divisor)
        return right(self, dataclasses.replace(total, sensitivity=total.sensitivity * share), step)

    wrapped(m, GaussianMechanism, "privatize", privatize)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat", 9)
def the_mechanism_has_less_noise_than_the_plan(m: pytest.MonkeyPatch) -> None:
    """Nine tenths of the multiplier that is accounted for."""

    def mechanism(right: Any, config: Any, plan: Any, clipping: Any) -> Any:
        return right(config, dataclasses.replace(plan, noise_multiplier=0.9 * plan.noise_multiplier), clipping)

    wrapped(m, sessions, "make_mechanism", mechanism)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat", 9)
def the_update_takes_the_sum_without_noise(m: pytest.MonkeyPatch) -> None:
    """What is released is computed, and the optimizer is given what was clipped."""
    last: dict[str, Any] = {}

    def clipped_sum(right: Any, session: Any, units: Any, step: int) -> Any:
        total = right(session, units, step)
        last.update(total.gradients)
        return total

    wrapped(m, training, "clipped_sum", clipped_sum)
    wrapped(m, Optimizer, "step", lambda right, self, update, step: right(self, last, step))


# ---- 11: reuse


@caught_by("test_privacy_noise.py::test_two_calls_share_no_value", 11)
def the_key_is_always_the_same(m: pytest.MonkeyPatch) -> None:
    """A fixed seed."""
    m.setattr(noises.os, "urandom", lambda size: bytes(range(size)))


@caught_by("test_privacy_noise.py::test_chunks_have_their_own_keys", 11)
def chunks_of_one_tensor_share_a_key(m: pytest.MonkeyPatch) -> None:
    """Long tensors repeat their noise."""
    key = noises.os.urandom(16)

    def normal(right: Any, self: SecureNoise, *args: Any, **kwargs: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(noises.os, "urandom", lambda size: key)
            return right(self, *args, **kwargs)

    wrapped(m, SecureNoise, "normal", normal)


@caught_by(STEPS, 11)
def the_noise_of_the_first_step_is_kept(m: pytest.MonkeyPatch) -> None:
    """Noise is drawn once for each parameter and then added in every step."""
    kept: dict[Any, torch.Tensor] = {}

    def normal(right: Any, self: SecureNoise, shape: Any, std: float, *, step: int, name: str, device: Any) -> Any:
        if (name, *shape) not in kept:
            kept[name, *shape] = right(self, shape, 1.0, step=step, name=name, device=device)
        return kept[name, *shape] * std

    wrapped(m, SecureNoise, "normal", normal)


@caught_by("test_privacy_mechanism.py::test_every_parameter_is_noised_independently", 11)
def parameters_of_one_shape_share_noise(m: pytest.MonkeyPatch) -> None:
    """Noise is drawn once for each shape and step."""
    kept: dict[Any, torch.Tensor] = {}

    def normal(right: Any, self: SecureNoise, shape: Any, std: float, *, step: int, name: str, device: Any) -> Any:
        key = (step, *shape)
        kept.setdefault(key, right(self, shape, 1.0, step=step, name=name, device=device))
        return kept[key] * std

    wrapped(m, SecureNoise, "normal", normal)


@caught_by("test_privacy_mechanism.py::test_large_tensors_are_noised_in_pieces", 11)
def pieces_of_a_large_tensor_share_noise(m: pytest.MonkeyPatch) -> None:
    """Each piece draws under the name of the whole."""

    def normal(right: Any, self: DebugNoise, shape: Any, std: float, *, step: int, name: str, device: Any) -> Any:
        return right(self, shape, std, step=step, name=name.partition("[")[0], device=device)

    wrapped(m, DebugNoise, "normal", normal)


# ---- 12 and 13: precision


@caught_by(NORMAL, 12)
def noise_in_bfloat16(m: pytest.MonkeyPatch) -> None:
    """Some thousand distinct values."""
    wrapped(m, SecureNoise, "normal", lambda right, *args, **kwargs: right(*args, **kwargs).bfloat16().double())


@caught_by("test_privacy_mechanism.py::test_noise_is_added_in_full_precision[given_2", 12)
def releases_in_the_precision_of_the_sum(m: pytest.MonkeyPatch) -> None:
    """A half-precision sum gives a half-precision release."""
    m.setattr(mechanisms, "_wide", lambda dtype: dtype)


@caught_by("test_privacy_noise.py::test_standard_normal[SecureNoise", 12)
def noise_is_cut_at_three_deviations(m: pytest.MonkeyPatch) -> None:
    """No tails."""
    wrapped(m, noises, "_tensor", lambda right, array: right(array).clamp(-3, 3))


@caught_by("test_privacy_mechanism.py::test_a_release_is_rounded_once", 13)
def noise_is_added_in_float32(m: pytest.MonkeyPatch) -> None:
    """The last bits of the sum survive the addition, where an attack looks for them."""
    wrapped(m, SecureNoise, "normal", lambda right, *args, **kwargs: right(*args, **kwargs).float())
    wrapped(m, DebugNoise, "normal", lambda right, *args, **kwargs: right(*args, **kwargs).float())


# ---- 14: seeds


@caught_by("test_privacy_noise.py::test_no_seed_reaches_it", 14)
def noise_from_the_generator_of_torch(m: pytest.MonkeyPatch) -> None:
    """Whoever knows the seed takes the noise off again."""

    def normal(self: SecureNoise, shape: Any, std: float, *, step: int, name: str, device: Any) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64) * std

    m.setattr(SecureNoise, "normal", normal)


@caught_by("test_training.py::test_the_sampling_key_is_fresh_and_follows_from_no_seed", 14)
def batches_follow_from_the_seed_of_the_configuration(m: pytest.MonkeyPatch) -> None:
    """The key of the sampler is a hash of run.seed, which stands in config.yaml."""

    def token_bytes(size: int) -> bytes:
        return hashlib.blake2b(b"0", digest_size=size).digest()

    m.setattr(sessions.secrets, "token_bytes", token_bytes)


@caught_by("test_privacy_noise.py::test_draws_come_from_the_cipher", 14)
def a_generator_that_can_be_predicted(m: pytest.MonkeyPatch) -> None:
    """Statistically as good as AES, and no cipher: a few draws give away the rest."""

    def fill(chunk: np.ndarray, std: float) -> None:
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(noises.os.urandom(16), "little")))
        chunk[:] = generator.standard_normal(len(chunk)) * std

    m.setattr(noises, "_fill", fill)


# ---- 19: sums and counts together

TOGETHER = "test_privacy_mechanism.py::test_sum_and_counts_together_cost_what_the_plan_bought[7"
BOTH = "test_privacy_mechanism.py::test_both_parts_get_the_noise_that_was_paid_for[1"


@caught_by(TOGETHER, 19)
def counts_cost_nothing(m: pytest.MonkeyPatch) -> None:
    """The sum has the noise of the whole release, and the counts come on top."""

    def init(right: Any, self: AdaptiveGaussianMechanism, z: float, *args: Any) -> None:
        right(self, z, *args)
        self._sum.noise_multiplier = z

    wrapped(m, AdaptiveGaussianMechanism, "__init__", init)


@caught_by(TOGETHER, 19)
def counts_of_many_layers_cost_as_much_as_one(m: pytest.MonkeyPatch) -> None:
    """The noise of a count does not grow with the number of counts."""
    wrapped(m, AdaptiveGaussianMechanism, "count_std", lambda right, self, groups: right(self, 1))


@caught_by(BOTH, 19)
def counts_are_released_without_noise(m: pytest.MonkeyPatch) -> None:
    """Thresholds follow the exact share of clipped units."""

    def privatize(self: AdaptiveGaussianMechanism, total: Any, step: int) -> Any:
        released = self._sum.privatize(total, step)
        self.quantile.follow(self.quantile.count_unclipped(total.group_norms).double() / self._sum.divisor + 0.5)
        return released

    m.setattr(AdaptiveGaussianMechanism, "privatize", privatize)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-head-adaptive", 19)
def thresholds_follow_the_share_of_the_batch_that_was_drawn(m: pytest.MonkeyPatch) -> None:
    """Noisy counts are divided by the exact size of the batch."""

    def privatize(right: Any, self: AdaptiveGaussianMechanism, total: Any, step: int) -> Any:
        follow, expected = self.quantile.follow, self._sum.divisor

        def by_the_batch(fraction: torch.Tensor) -> None:
            follow((fraction - 0.5) * expected / max(1, len(total.norms)) + 0.5)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.quantile, "follow", by_the_batch)
            return right(self, total, step)

    wrapped(m, AdaptiveGaussianMechanism, "privatize", privatize)


@caught_by(BOTH, 19)
def noise_is_scaled_to_the_threshold_of_the_next_step(m: pytest.MonkeyPatch) -> None:
    """Thresholds move first, and the noise is taken from where they are then."""

    def privatize(right: Any, self: AdaptiveGaussianMechanism, total: Any, step: int) -> Any:
        return right(self, dataclasses.replace(total, sensitivity=self.quantile.sensitivity * math.exp(-0.02)), step)

    wrapped(m, AdaptiveGaussianMechanism, "privatize", privatize)


# ---- 13: exact noise on integers


@caught_by("test_privacy_discrete.py::test_two_sided_geometric[3", 13)
def zero_has_two_signs(m: pytest.MonkeyPatch) -> None:
    """Plus and minus zero are both kept, so zero comes twice as often as it may."""

    def laplace(scale: int, below: Any = secrets.randbelow) -> int:
        while not discrete.coin_exp(Fraction(remainder := below(scale), scale), below):
            pass
        while discrete.coin_exp(Fraction(1), below):
            remainder += scale
        return -remainder if below(2) else remainder

    m.setattr(discrete, "discrete_laplace", laplace)


@caught_by("test_privacy_discrete.py::test_draws[discrete-1", 13)
def every_proposal_is_kept(m: pytest.MonkeyPatch) -> None:
    """The two-sided geometric draw is released as it is."""

    def gaussian(std: Fraction, below: Any = secrets.randbelow) -> int:
        return discrete.discrete_laplace(math.isqrt(math.floor(std * std)) + 1, below)

    m.setattr(discrete, "discrete_gaussian", gaussian)


@caught_by("test_privacy_discrete.py::test_draws[discrete-1", 13)
def a_float_gaussian_is_rounded(m: pytest.MonkeyPatch) -> None:
    """A twelfth more variance, from a generator of floats."""
    m.setattr(discrete, "discrete_gaussian", lambda std, below: round(random.gauss(0, float(std))))


@caught_by("test_privacy_discrete.py::test_gaussian[37/11", 13)
def the_deviation_is_rounded_to_a_whole_number(m: pytest.MonkeyPatch) -> None:
    """Less noise than was paid for, wherever there is something after the point."""
    wrapped(m, discrete, "discrete_gaussian", lambda right, std, *args: right(Fraction(math.floor(std)), *args))


@caught_by("test_privacy_discrete.py::test_the_nearest_integer_of_a_known_draw[7/5", 13)
def a_rounding_is_settled_by_the_first_digit(m: pytest.MonkeyPatch) -> None:
    """The draw is cut to what is known of it so far: a value just below a half is sometimes taken for one above."""
    m.setattr(discrete.UniformReal, "lengthen", lambda self: None)
    wrapped(m, discrete.UniformReal, "interval", lambda right, self: (right(self)[0],) * 2)


@caught_by("test_privacy_discrete.py::test_coins_of_real_probability[0.3-3", 13)
def a_half_normal_is_flat_between_whole_numbers(m: pytest.MonkeyPatch) -> None:
    """The fractional part is kept whatever it is: a histogram, not a Gaussian."""
    m.setattr(discrete, "_coin_exp_real", lambda k, x, below: True)


@caught_by("test_privacy_discrete.py::test_draws_are_fresh_and_come_from_the_system[rounded", 14)
def exact_noise_from_a_seeded_generator(m: pytest.MonkeyPatch) -> None:
    """The module `random`, which anyone may seed."""

    def seeded(right: Any, counts: Any, std: Any, below: Any = random.randrange) -> Any:
        return right(counts, std, below)

    wrapped(m, discrete, "add_rounded_gaussian", seeded)
