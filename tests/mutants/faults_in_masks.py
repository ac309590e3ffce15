"""Faults in masks: what a server could learn of a single message, and sums with too little noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto.federated import mask_keys, masking, unmasking
from sotto.federated.cohort import Cohort
from sotto.federated.masking import Party
from sotto.federated.unmasking import MaskedRound
from sotto.privacy import adversaries

MASKS = "test_federated_masks.py::"
RUN = "test_federated_run.py::"
UNIFORM = MASKS + "test_a_message_is_uniform_also_for_who_knows_one_of_its_two_kinds_of_masks"


def _nothing(*arguments: Any) -> np.ndarray:
    """No mask of the size and kind that were asked for, which are the last arguments."""
    return np.zeros(arguments[-2], arguments[-1])


@caught_by(UNIFORM, 28)
def a_user_has_no_mask_of_its_own(m: pytest.MonkeyPatch) -> None:
    """The message of one who was late lies open, once the common masks were revealed for it."""
    m.setattr(masking, "self_mask", _nothing)
    m.setattr(unmasking, "self_mask", _nothing)


@caught_by(UNIFORM, 28)
def users_have_no_masks_in_common(m: pytest.MonkeyPatch) -> None:
    """The server gets every own secret, and with it every message."""
    m.setattr(masking, "pair_mask", _nothing)
    m.setattr(unmasking, "pair_mask", _nothing)


@caught_by(MASKS + "test_the_stream_of_a_key_is_aes_128_in_counter_mode", 14)
def masks_come_from_a_generator_that_is_no_cipher(m: pytest.MonkeyPatch) -> None:
    """As Flower's SecAgg+ does: the rest of the masks follows from some of them."""

    def words(key: bytes, count: int, word: Any) -> np.ndarray:
        generator = np.random.default_rng(int.from_bytes(key, "little"))
        return generator.integers(0, np.iinfo(word).max, count, dtype=word, endpoint=True)

    m.setattr(mask_keys, "keyed_words", words)
    m.setattr("test_federated_masks.keyed_words", words)


@caught_by(MASKS + "test_nobody_reveals_both_shares_of_one_user", 28)
def a_device_reveals_as_often_as_it_is_asked(m: pytest.MonkeyPatch) -> None:
    """Asked with two lists of survivors, it gives both shares of a user."""

    def reveal(right: Any, self: Party, survivors: Any) -> bytes:
        kept = Party.from_dict(self.to_dict())
        return right(kept, survivors)

    wrapped(m, Party, "reveal", reveal)


@caught_by(MASKS + "test_a_device_masks_nothing_for_too_few", 28)
def a_refused_request_is_as_good_as_an_answered_one(m: pytest.MonkeyPatch) -> None:
    """The next one is answered, with nobody's mask on the message."""
    after = {"fresh": "keys", "keys": "shares", "shares": "admitted", "admitted": "message", "message": "done"}

    def enter(right: Any, self: Party, due: Any) -> None:
        right(self, due)
        self.stage = after[due]  # type: ignore[assignment]

    wrapped(m, Party, "_enter", enter)


@caught_by(MASKS + "test_fewer_than_carry_the_noise_are_never_summed", 25)
def a_majority_is_enough(m: pytest.MonkeyPatch) -> None:
    """Sums are opened that carry fewer shares of the noise than the plan needs."""
    m.setattr(masking, "threshold", lambda users, least: users // 2 + 1)
    m.setattr(unmasking, "threshold", lambda users, least: users // 2 + 1)


@caught_by(MASKS + "test_wrong_shares_are_noticed_and_others_tried", 16)
def shares_are_believed(m: pytest.MonkeyPatch) -> None:
    """What is put together from the first shares is taken for the secret."""

    def secret(self: MaskedRound, position: int, shares: dict[int, bytes], survived: bool, purpose: bytes) -> bytes:
        return mask_keys.combined(dict(sorted(shares.items())[: self.threshold]))

    m.setattr(MaskedRound, "_secret", secret)


@caught_by(MASKS + "test_a_round_that_is_given_up_is_noise_alone", 17)
def a_round_that_is_given_up_is_released_without_noise(m: pytest.MonkeyPatch) -> None:
    """Zeros tell everybody that fewer than the threshold were there."""

    def close(right: Any, self: Cohort, round: Any, step: int) -> Any:
        total = right(self, round, step)
        if round.total is None:
            for tensor in total.gradients.values():
                torch.zero_(tensor)
        return total

    wrapped(m, Cohort, "close", close)


@caught_by(RUN + "test_with_masks_the_statement_counts_whose_noise_is_known_to_whom[None]", 24)
def the_noise_of_colluders_counts_in_full(m: pytest.MonkeyPatch) -> None:
    """Whoever adds a share of the noise knows it, and subtracts it."""
    right = adversaries.share_multiplier
    least = adversaries.least_answers

    def noised(plan: Any, noise_multiplier: float, rounds: int) -> float:
        whole = right(plan.noise_multiplier, plan.expected_batch_size, plan.setting["dropouts"])
        full = whole * least(plan.expected_batch_size, plan.setting["dropouts"]) ** 0.5
        return _noised(plan, full, rounds)

    _noised = adversaries._noised
    m.setattr(adversaries, "_noised", noised)
