"""Faults in what users send, in what a server accepts of it, and in whose weight and absence matter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto import public_text
from sotto.federated import client as clients
from sotto.federated import cohort, device, messages, policy, server, shares, site
from sotto.federated.codec import Srht
from sotto.federated.cohort import Cohort
from sotto.federated.policy import Attendance
from sotto.federated.shares import Shares
from sotto.federated.strategy import SottoStrategy
from sotto.gradients.clipping import Adaptive
from sotto.privacy import adversaries

CORE = "test_federated_core.py::"
CODECS = "test_federated_codecs.py::"
FLOWER = "test_federated_flower.py::"
INFLUENCE = CORE + "test_no_answer_moves_the_sum_by_more_than_the_bound"


@caught_by(INFLUENCE, 25)
def the_server_trusts_that_devices_have_clipped(m: pytest.MonkeyPatch) -> None:
    """Flower's client-side clipping: norms are never verified (F5)."""
    m.setattr(cohort, "bounded", lambda vector, most: vector)


@caught_by(CORE + "test_only_those_who_were_asked_count_and_each_once", 25)
def an_answer_counts_as_often_as_it_is_sent(m: pytest.MonkeyPatch) -> None:
    """Whoever repeats itself weighs more."""

    def add_up(self: Cohort, users: np.ndarray, answers: Any, step: int = 0) -> Any:
        total = self.zeros()
        for _, answer in answers:
            self._add(total.gradients[self.name], answer)
            self.heard.answered += 1
        return total

    m.setattr(Cohort, "add_up", add_up)


@caught_by(CORE + "test_noise_does_not_depend_on_who_answers[0.3-10]", 25)
def the_sum_is_scaled_up_for_those_who_are_silent(m: pytest.MonkeyPatch) -> None:
    """Divided by who answered, so that the noise on the mean is not what was paid for (N10)."""

    def add_up(right: Any, self: Cohort, users: np.ndarray, answers: Any, step: int = 0) -> Any:
        total = right(self, users, answers, step)
        total.sensitivity *= len(users) / max(1, self.heard.answered)
        return total

    wrapped(m, Cohort, "add_up", add_up)


@caught_by(CORE + "test_an_update_that_its_device_cut_counts_as_cut", 3)
def cut_updates_count_as_whole(m: pytest.MonkeyPatch) -> None:
    """Every update arrives within the bound, so that the adaptive bound would only ever fall."""
    m.setattr(cohort, "AT_THE_BOUND", 2.0)


@caught_by(CORE + "test_noise_is_that_of_the_bound_of_this_round_and_the_bound_then_follows_unclipped_updates", 3)
def the_bound_follows_the_clipped_fraction(m: pytest.MonkeyPatch) -> None:
    """Flower's rule: the wrong sign, positive feedback (F1)."""
    wrapped(m, Adaptive, "follow", lambda right, self, fraction_G: right(self, 1 - fraction_G))


@caught_by(CORE + "test_a_vector_that_is_too_long_is_cut_and_one_that_is_none_is_zero", 26)
def a_vector_is_clipped_in_float32(m: pytest.MonkeyPatch) -> None:
    """min(1, C / |v|) in the arithmetic of the vector: too long by a rounding, and NaN for what overflows (F7)."""

    def naive(vector_k: torch.Tensor, clip_norm: float) -> torch.Tensor:
        return vector_k * min(1.0, clip_norm / float(vector_k.norm()))

    m.setattr(clients, "bounded", naive)
    m.setattr("test_federated_core.bounded", naive)


@caught_by(CODECS + "test_the_sum_carries_the_noise_of_the_plan_whoever_answers[10-1.0]", 25)
def shares_of_the_silent_are_not_replaced(m: pytest.MonkeyPatch) -> None:
    """With fewer answers than the shares were sized for, the sum has too little noise."""
    m.setattr(Shares, "missing", lambda self, answers, size, noise, step: torch.zeros(size, dtype=torch.float64))


@caught_by(CODECS + "test_the_noise_does_not_tell_how_many_users_answered[75]", 25)
def the_noise_grows_with_the_answers(m: pytest.MonkeyPatch) -> None:
    """Its deviation tells how many users were drawn, which the accounting takes to be hidden."""

    wrapped(m, Shares, "missing", lambda right, self, *rest: right(dataclasses.replace(self, most=0), *rest))


@caught_by(CODECS + "test_the_sum_carries_the_noise_of_the_plan_whoever_answers[40-1.0]", 26)
def shares_are_sized_for_everybody(m: pytest.MonkeyPatch) -> None:
    """The allowance for silence is forgotten: the shares of those who answer fall short."""
    right = shares.share_multiplier
    m.setattr(shares, "share_multiplier", lambda z, users, dropouts: right(z, users, 0.0))


@caught_by(CODECS + "test_a_message_has_its_own_share_of_noise_and_is_right_on_average", 26)
def a_share_is_divided_by_the_number_of_users(m: pytest.MonkeyPatch) -> None:
    """Deviations are added up as if they were variances."""
    right = shares.share_multiplier
    m.setattr(shares, "share_multiplier", lambda z, users, dropouts: right(z, users, dropouts) / users**0.5)


@caught_by(CORE + "test_srht_is_right_on_average_new_every_round_and_the_same_on_both_sides", 24)
def one_projection_for_all_rounds(m: pytest.MonkeyPatch) -> None:
    """The same part of every update is thrown away."""
    wrapped(m, Srht, "_draw", lambda right, self, step: right(self, 0))


@caught_by(FLOWER + "test_bytes_of_a_stranger_are_compared_and_not_parsed", 27)
def what_a_node_sent_is_parsed(m: pytest.MonkeyPatch) -> None:
    """numpy reads the header that a stranger wrote."""
    m.setattr(messages, "_read", lambda array, shape, kind="float32": array.numpy())


@caught_by(FLOWER + "test_what_goes_wrong_at_a_device_stays_there", 28)
def errors_are_sent_with_their_text(m: pytest.MonkeyPatch) -> None:
    """An exception of a device quotes what it was reading, and the server gets it."""

    def mod(message: Any, at: Any, call_next: Any) -> Any:
        try:
            return call_next(message, at)
        except Exception as error:
            found = messages.SottoError("SOT948", what=str(error), where="", why="", fix="")
            content = messages.refusal_content(found)
            content.config_records["refused"]["code"] = f"{error}"
            return device.Message(content, reply_to=message)

    m.setattr(device, "owner_mod", mod)


@caught_by(FLOWER + "test_rounds_are_counted_at_the_device_and_stale_ones_refused", 19)
def rounds_are_not_counted_at_the_device(m: pytest.MonkeyPatch) -> None:
    """A server may ask the same user as often as it likes."""
    m.setattr(Attendance, "_enter", lambda self, key, step, most: None)


@caught_by(FLOWER + "test_a_server_that_claims_less_than_its_numbers_cost_is_refused", 24)
def a_device_believes_what_it_is_told(m: pytest.MonkeyPatch) -> None:
    """The epsilon of the announced numbers is not recomputed."""
    m.setattr(policy.accounting, "epsilon", lambda *a, **k: 0.0)


@caught_by(FLOWER + "test_a_whole_round_through_flowers_interface", 25)
def replies_of_other_rounds_count(m: pytest.MonkeyPatch) -> None:
    """An answer to an old order, under another bound, is added to this round."""

    def answers(self: SottoStrategy, replies: Any, group: str) -> Any:
        for reply in replies:
            users = self._asked.get(reply.metadata.src_node_id, [])
            yield from messages.vectors_of(reply, users, self._engine.codec.size, "float32")

    m.setattr(SottoStrategy, "_answers", answers)


@caught_by("test_federated_run.py::test_numbers_of_all_adversaries_are_of_the_relation_of_the_run", 24)
def the_numbers_of_who_sees_messages_forget_the_relation(m: pytest.MonkeyPatch) -> None:
    """Under replace_one a message moves by twice the bound, and the statement counts it once."""

    def noised(right: Any, plan: Any, *rest: Any) -> float:
        return right(dataclasses.replace(plan, neighboring_relation="add_or_remove_one"), *rest)

    wrapped(m, adversaries, "_noised", noised)


@caught_by(FLOWER + "test_a_server_that_begins_again_under_another_name_is_found_out", 20)
def a_device_forgets_earlier_runs(m: pytest.MonkeyPatch) -> None:
    """Each new name of a run has the whole allowance of its owner."""
    m.setattr(Attendance, "admit", lambda self, run, agreement, rules: None)


@caught_by(FLOWER + "test_a_user_who_is_drawn_too_often_for_the_announced_probability_stops_answering", 1)
def a_device_believes_any_sampling(m: pytest.MonkeyPatch) -> None:
    """A server announces that it hardly ever asks, which makes epsilon small, and asks in every round."""
    m.setattr(device, "most_draws", lambda steps, sampling_prob: steps)


@caught_by("test_federated_rows.py::test_the_users_own_text_is_no_public_text", 21)
def private_text_passes_for_public(m: pytest.MonkeyPatch) -> None:
    """Directions and rows are made of the users' own text, and sent to everybody."""
    m.setattr(public_text, "_same_file", lambda a, b: False)
    m.setattr(public_text, "MOST_SHARED", 1.0)


@caught_by("test_federated_run.py::test_every_draw_of_a_site_has_a_fresh_key", 14)
def a_site_keeps_its_sampling_key(m: pytest.MonkeyPatch) -> None:
    """A round that is asked for twice draws the same units twice, and whoever has the key knows all of them."""
    m.setattr(site.secrets, "token_bytes", lambda size: bytes(range(size)))


@caught_by("test_federated_core.py::test_the_bound_is_on_what_leaves_and_not_on_what_is_encoded", 26)
def an_update_is_bounded_before_it_is_encoded(m: pytest.MonkeyPatch) -> None:
    """What the codec makes of it may be longer, and the user's own share of noise is for the bound."""

    def answer(right: Any, self: clients.Client, order: Any, user: int, *rest: Any) -> Any:
        compute = self._compute
        self._compute = lambda *of: clients.bounded(compute(*of), order.clip_norm)
        try:
            return right(self, dataclasses.replace(order, clip_norm=1e9), user, *rest)
        finally:
            self._compute = compute

    wrapped(m, clients.Client, "answer", answer)


@caught_by("test_federated_codecs.py::test_the_shares_of_a_run_make_up_the_noise_of_its_plan[None", 25)
def shares_of_a_run_are_for_another_noise(m: pytest.MonkeyPatch) -> None:
    """Each share is right for the noise that it is told of, and a run tells of less than its plan has."""
    less = SimpleNamespace(of=lambda clip_norm, noise, *rest: Shares.of(clip_norm, 0.7 * noise, *rest))
    m.setattr(server, "Shares", less)
