"""Faults of training from losses along random directions; most of them were found in released code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto import session as sessions
from sotto.gradients.base import ClippedSum
from sotto.privacy.mechanism import GaussianMechanism
from sotto.privacy.noise import SecureNoise
from sotto.zeroth_order import deterministic, directions, engine, probes, release, updates

SENSITIVITY = "test_zeroth_release.py::test_no_unit_moves_the_sum_by_more_than_the_sensitivity"


@caught_by(f"{SENSITIVITY}[flat-2", 15)
def each_number_is_clipped_alone(m: pytest.MonkeyPatch) -> None:
    """K numbers of norm C each, under noise for one of them."""

    def clipped_sum(self: Any, sketch_UK: torch.Tensor) -> ClippedSum:
        bound = self.clipping.sensitivity
        total = self.zeros()
        total.gradients[release.NAME] = torch.nan_to_num(sketch_UK).clamp(-bound, bound).sum(0)
        return total

    m.setattr(release.Release, "clipped_sum", clipped_sum)


@caught_by(f"{SENSITIVITY}[flat-1", 15)
def laplace_noise_on_a_vector_of_bounded_length(m: pytest.MonkeyPatch) -> None:
    """Clipped in L2 norm, where the noise is for the sum of absolute values."""

    def init(right: Any, self: Any, clipping: Any, count: int, order: int = 2) -> None:
        right(self, clipping, count, 2)
        sums_K, norms = torch.zeros(count), torch.zeros(0, 1)
        self.zeros = lambda: ClippedSum({release.NAME: sums_K}, norms, clipping.sensitivity, order)

    wrapped(m, release.Release, "__init__", init)


@caught_by(f"{SENSITIVITY}[automatic-2", 16)
def an_infinite_difference_poisons_the_sum(m: pytest.MonkeyPatch) -> None:
    """Zero times infinity is nan, in the sum of everybody."""
    m.setattr(release.torch, "where", lambda condition, x, y: x)


@caught_by("test_train_zeroth.py::test_the_noise_follows_from_nothing_in_the_run_folder", 14)
def the_noise_is_drawn_from_the_seed_of_the_direction(m: pytest.MonkeyPatch) -> None:
    """As in the released code of DPZero: whoever knows the directions subtracts it."""

    def rounded(self: Any, shape: Any, std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(step).standard_normal(tuple(shape)) * std).round()

    m.setattr(SecureNoise, "rounded", rounded)


@caught_by("test_train_zeroth.py::test_an_empty_batch_takes_a_step_of_noise_alone", 11)
def one_draw_of_noise_for_all_directions(m: pytest.MonkeyPatch) -> None:
    """The differences of the numbers are released without any."""

    def privatize(right: Any, self: Any, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        released = right(self, total, step)
        noise = released[release.NAME][:1] - total.gradients[release.NAME][:1] / self.divisor
        return {release.NAME: total.gradients[release.NAME] / self.divisor + noise}

    wrapped(m, GaussianMechanism, "privatize", privatize)


@caught_by("test_train_zeroth.py::test_laplace_noise_gives_pure_epsilon", 15)
def gaussian_noise_under_a_pure_guarantee(m: pytest.MonkeyPatch) -> None:
    """Epsilon at delta 0 was promised, and noise drawn that has none."""
    m.setattr(sessions, "LaplaceMechanism", GaussianMechanism)


@caught_by("test_zeroth_probes.py::test_weights_in_bfloat16_keep_every_bit", 12)
def weights_are_moved_and_moved_back(m: pytest.MonkeyPatch) -> None:
    """Add, subtract twice, add: in bfloat16 they do not come back."""

    def differences(right: Any, self: Any, *args: Any) -> torch.Tensor:
        found = right(self, *args)
        with torch.no_grad():
            for name, p in self.parameters.items():
                u = self.directions.tensor(name, 0, 0).to(p.dtype) * self.smoothing
                p.add_(u).sub_(2 * u).add_(u)
        return found

    wrapped(m, probes.Prober, "differences", differences)


@caught_by("test_zeroth_probes.py::test_a_loss_that_is_not_one_number_for_each_example", 6)
def the_loss_may_have_any_shape(m: pytest.MonkeyPatch) -> None:
    """One difference for a whole batch, clipped as if it were one person's."""
    m.setattr(probes, "_per_example", lambda losses, rows: losses.expand(rows))
    m.setattr(probes, "require_same", lambda *args, **others: None)


@caught_by("test_train_zeroth.py::test_a_stopped_run_goes_on_to_the_same_bits[aggzo", 18)
def a_resumed_run_begins_again_with_its_directions(m: pytest.MonkeyPatch) -> None:
    """The numbers of the log are replayed along other directions."""
    for made in ("slice", "stream"):
        wrapped(m, directions.Directions, made, lambda right, self, name, step, *rest: right(self, name, 0, *rest))
    wrapped(m, updates.Updates, "restore", lambda right, self, *args: None)


@caught_by("test_train_zeroth.py::test_the_mask_is_the_same_for_any_data_and_keeps_its_part", 23)
def the_mask_follows_a_random_choice(m: pytest.MonkeyPatch) -> None:
    """Nobody could replay it; one that followed the data would look like this too."""

    def chosen(right: Any, *args: Any) -> Any:
        found = right(*args)
        return {name: mask.flatten()[torch.randperm(mask.numel())].view_as(mask) for name, mask in found.items()}

    wrapped(m, engine, "masks", chosen)


@caught_by("test_zeroth_probes.py::test_dropout_in_training_mode", 6)
def dropout_stays_on(m: pytest.MonkeyPatch) -> None:
    """Differences of losses under other masks: noise that nobody asked for."""
    m.setattr(probes, "require_deterministic", lambda model: None)
    m.setattr(deterministic, "require_no_randomness", lambda *args: None)
