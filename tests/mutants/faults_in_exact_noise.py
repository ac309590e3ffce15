"""Faults in exact noise for whole gradients: the grid, its sensitivity, and the bits that decide a draw."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

import numpy as np
import pytest
from mutant import caught_by, wrapped

from sotto import session as sessions
from sotto.privacy import mechanism as mechanisms
from sotto.privacy import noise as noises
from sotto.privacy import rounded

EXACT = "test_privacy_rounded.py::"


@caught_by(EXACT + "test_rounding_is_part_of_the_sensitivity[1000]", 13)
def rounding_the_sum_is_for_free(m: pytest.MonkeyPatch) -> None:
    """Two neighbouring sums, once rounded to the grid, are further apart than the noise is scaled to."""
    m.setattr(mechanisms, "exact_std", lambda z, sensitivity, unit, numbers: z * sensitivity / unit)


@caught_by(EXACT + "test_a_release_is_a_whole_multiple_of_the_grid_over_the_divisor[0.3]", 13)
def the_sum_is_not_rounded_to_the_grid(m: pytest.MonkeyPatch) -> None:
    """Exact noise on a float sum: what lies between the multiples of the grid is released as it is."""
    m.setattr(mechanisms, "_whole", lambda value, unit: value.double() / unit)


@caught_by(EXACT + "test_a_draw_on_a_boundary_asks_for_more_bits[1.0]", 13)
def fifty_three_bits_decide_every_draw(m: pytest.MonkeyPatch) -> None:
    """Where the bits that were drawn leave two integers, one is taken."""
    m.setattr(rounded, "_ERROR", -1.0)


@caught_by(EXACT + "test_bits_come_from_the_cipher", 14)
def exact_noise_for_gradients_from_a_seeded_generator(m: pytest.MonkeyPatch) -> None:
    """Exact, and anybody can draw it again."""

    def fill(chunk: np.ndarray, std: float) -> None:
        words = np.random.PCG64(int.from_bytes(noises.os.urandom(16), "little")).random_raw
        chunk[:] = rounded.rounded_normal(len(chunk), std, words, secrets.randbelow)

    m.setattr(noises, "_fill_rounded", fill)


@caught_by("test_replay.py::test_exact_noise_shows_no_more[flat]", 13)
def the_key_for_exact_noise_is_ignored(m: pytest.MonkeyPatch) -> None:
    """The statement says integers on a grid, and the mechanism adds floats."""

    def mechanism(right: Any, config: Any, plan: Any, clipping: Any) -> Any:
        return right(config, dataclasses.replace(plan, exact_noise=False), clipping)

    wrapped(m, sessions, "make_mechanism", mechanism)


@caught_by("test_privacy_mechanism.py::test_large_tensors_get_exact_noise_in_every_piece", 9)
def exact_noise_for_the_first_piece_alone(m: pytest.MonkeyPatch) -> None:
    """What lies beyond the first eight million numbers of a tensor is released as it is."""

    def first(right: Any, self: Any, *args: Any, name: str, **rest: Any) -> Any:
        return right(self, *args, name=name, **rest) * name.endswith("[0]")

    wrapped(m, noises.SecureNoise, "rounded", first)


@caught_by("test_privacy_mechanism.py::test_both_parts_get_the_noise_that_was_paid_for[1-True]", 19)
def exact_counts_are_taken_for_whole_ones(m: pytest.MonkeyPatch) -> None:
    """Counts are halves, and their noise, drawn in units of a half, has half of its deviation."""

    def half(right: Any, self: Any, shape: Any, std: float, *, name: str, **rest: Any) -> Any:
        return right(self, shape, std / 2 if name == "count_unclipped" else std, name=name, **rest)

    wrapped(m, noises.SecureNoise, "rounded", half)


@caught_by(EXACT + "test_rounding_counts_the_numbers_of_all_tensors_together", 13)
def rounding_counts_for_one_tensor(m: pytest.MonkeyPatch) -> None:
    """Each tensor is rounded, and the sensitivity grows as if there were one of them."""
    wrapped(
        m, mechanisms, "exact_std", lambda right, z, sensitivity, unit, numbers: right(z, sensitivity, unit, 10_000)
    )
