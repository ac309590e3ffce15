"""Faults in how batches are drawn, in who is a unit, and in what an example is."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto import losses, training
from sotto import session as sessions
from sotto.data import load
from sotto.data.examples import Examples
from sotto.data.sampling import PoissonSampler
from sotto.data.units import Units
from sotto.gradients.engine import Engine
from sotto.optim import Optimizer
from sotto.privacy import plan as plans

encoding = importlib.import_module("sotto.data.encode")  # `sotto.data.encode` is the function of that name
POISSON = "test_data_sampling.py::test_the_sampler_is_poisson[40-0.25"
SUBSETS = "test_data_sampling.py::test_every_subset_has_its_probability"
DECLARED = "test_training.py::test_the_sampling_probability_comes_from_the_declared_number"


# ---- 1: batches and accountant


@caught_by(POISSON, 1)
def batches_of_fixed_size(m: pytest.MonkeyPatch) -> None:
    """Every batch has the expected size."""

    def draw(self: PoissonSampler, step: int, attempt: int = 0) -> np.ndarray:
        count = round(self.num_units * self.sampling_prob)
        return np.sort(self._stream(step, attempt).choice(self.num_units, count, replace=False))

    m.setattr(PoissonSampler, "draw", draw)


@caught_by(POISSON, 1)
def passes_over_shuffled_data(m: pytest.MonkeyPatch) -> None:
    """Each unit is used once in every pass."""

    def draw(self: PoissonSampler, step: int, attempt: int = 0) -> np.ndarray:
        batches = round(1 / self.sampling_prob)
        order = self._stream(step // batches, attempt).permutation(self.num_units)
        return np.sort(np.array_split(order, batches)[step % batches])

    m.setattr(PoissonSampler, "draw", draw)


@caught_by(POISSON, 1)
def two_steps_share_a_draw(m: pytest.MonkeyPatch) -> None:
    """The stream of a step depends on half its number."""
    wrapped(m, PoissonSampler, "_stream", lambda right, self, step, attempt: right(self, step // 2, attempt))


@caught_by(POISSON, 1)
def large_draws_are_cut(m: pytest.MonkeyPatch) -> None:
    """A draw that is larger than expected is cut to a size that fits."""

    def cut(right: Any, self: PoissonSampler, *args: Any) -> np.ndarray:
        return right(self, *args)[: 1 + round(self.num_units * self.sampling_prob)]

    wrapped(m, PoissonSampler, "draw", cut)


@caught_by(SUBSETS, 1)
def empty_draws_are_drawn_again(m: pytest.MonkeyPatch) -> None:
    """A step never has an empty batch."""

    def again(right: Any, self: PoissonSampler, step: int, attempt: int = 0) -> np.ndarray:
        draws = (right(self, step, attempt + 1000 * i) for i in range(1000))
        return next(units for units in draws if len(units))

    wrapped(m, PoissonSampler, "draw", again)


@caught_by("test_data_sampling.py::test_attempts_are_fresh_draws[attempts1", 1)
def a_redone_step_draws_the_same_units(m: pytest.MonkeyPatch) -> None:
    """The attempt does not enter the stream: two releases of one step share their batch."""
    wrapped(m, PoissonSampler, "_stream", lambda right, self, step, attempt: right(self, step, 0))


@caught_by("test_privacy_statement.py::test_plan_pays_for_spare_steps_within_the_budget", 1)
def noise_is_calibrated_to_a_smaller_batch(m: pytest.MonkeyPatch) -> None:
    """The accountant hears of half the sampling probability that the sampler uses."""

    def halved(right: Any, **arguments: Any) -> float:
        return right(**arguments | {"sampling_prob": arguments["sampling_prob"] / 2})

    wrapped(m, plans.accounting, "noise_multiplier", halved)


@caught_by(DECLARED, 1)
def the_sampler_draws_more_than_the_plan_says(m: pytest.MonkeyPatch) -> None:
    """Twice the sampling probability, after the plan was made."""

    def sampler(num_units: int, prob: float, key: bytes, debug: bool) -> PoissonSampler:
        return PoissonSampler(num_units, min(1.0, 2 * prob), key, debug)

    m.setattr(sessions, "PoissonSampler", sampler)


# ---- 2: the size of the data


@caught_by(DECLARED, 2)
def sampling_probability_from_the_data(m: pytest.MonkeyPatch) -> None:
    """The expected batch over the number of units that were found, not over the declared one."""

    def sampler(num_units: int, prob: float, key: bytes, debug: bool) -> PoissonSampler:
        return PoissonSampler(num_units, min(1.0, 12 / num_units), key, debug)

    m.setattr(sessions, "PoissonSampler", sampler)


@caught_by("test_training.py::test_the_divisor_is_the_public_constant_whatever_the_data_holds", 2)
def divisor_from_the_data(m: pytest.MonkeyPatch) -> None:
    """The mean is over the number of units that a batch of this dataset has on average."""

    def assemble(right: Any, *args: Any) -> Any:
        session = right(*args)
        session.mechanism.divisor = session.plan.sampling_prob * len(session.data.units)
        return session

    wrapped(m, sessions, "_assemble", assemble)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat", 2)
def steps_from_the_data(m: pytest.MonkeyPatch) -> None:
    """An epoch is as many steps as the data that was found has batches."""

    def assemble(right: Any, config: Any, plan: Any, run: Any, parts: Any, secret: Any) -> Any:
        steps = plan.steps * len(parts.data.units) // plan.num_units
        return right(config, dataclasses.replace(plan, steps=steps), run, parts, secret)

    wrapped(m, sessions, "_assemble", assemble)


# ---- 6 and 7: examples and their losses


@caught_by("test_losses.py::test_classification_is_cross_entropy_without_the_mean", 6)
def every_example_has_the_mean_loss(m: pytest.MonkeyPatch) -> None:
    """The batch's average loss, once for each example."""
    wrapped(m, losses, "classification", lambda right, logits, labels: right(logits, labels).mean().expand(len(labels)))


@caught_by("test_losses.py::test_language_is_the_mean_over_each_examples_own_tokens", 7)
def losses_are_averaged_over_the_tokens_of_the_batch(m: pytest.MonkeyPatch) -> None:
    """A long neighbour makes an example count less."""

    def language(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        values, counts = losses.token_losses(logits_BTV, labels_BT)
        return values.sum(1) * len(counts) / counts.sum().clamp(min=1)

    m.setattr(losses, "language", language)


@caught_by("test_losses.py::test_padding_and_neighbours_do_not_matter", 7)
def padding_counts_as_tokens(m: pytest.MonkeyPatch) -> None:
    """The sum over an example's tokens is divided by the length of the padded batch."""

    def language(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return losses.token_losses(logits_BTV, labels_BT)[0].mean(1)

    m.setattr(losses, "language", language)


@caught_by("test_losses.py::test_language_is_the_mean_over_each_examples_own_tokens", 7)
def tokens_predict_themselves(m: pytest.MonkeyPatch) -> None:
    """Labels are not shifted against the logits."""

    def token_losses(right: Any, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> Any:
        return right(logits_BTV, torch.cat([labels_BT[:, :1], labels_BT[:, :-1]], 1))

    wrapped(m, losses, "token_losses", token_losses)


@caught_by("test_data_encode.py::test_prompt_and_completion_take_loss_on_the_completion_alone", 7)
def prompts_are_learned(m: pytest.MonkeyPatch) -> None:
    """Loss is taken on the prompt as well."""

    def collate(right: Any, self: Examples, *args: Any) -> Any:
        return right(dataclasses.replace(self, prompt_lengths=np.zeros_like(self.prompt_lengths)), *args)

    wrapped(m, Examples, "collate", collate)


@caught_by("test_data_encode.py::test_collate_pads_on_the_right_and_loses_nothing", 7)
def padding_is_attended_to(m: pytest.MonkeyPatch) -> None:
    """The mask is all ones, so an example's gradient depends on the longest of its batch."""

    def collate(right: Any, *args: Any) -> Any:
        batch = right(*args)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}

    wrapped(m, Examples, "collate", collate)


@caught_by("test_data_encode.py::test_plain_text_is_packed_within_a_unit_and_never_across", 7)
def texts_are_packed_across_units(m: pytest.MonkeyPatch) -> None:
    """One sequence holds the words of two people."""

    def packed(right: Any, table: Any, section: Any, tokenizer: Any, rows: Any, units: Any) -> Any:
        return right(table, section, tokenizer, rows, None if units is None else [""] * len(units))

    wrapped(m, encoding, "_plain_text", packed)


# ---- 8: microbatches

MICROBATCHES = "test_training.py::test_the_microbatch_size_never_changes_the_result[1"


@caught_by(MICROBATCHES, 8)
def each_microbatch_is_clipped_as_one(m: pytest.MonkeyPatch) -> None:
    """The sum over a microbatch is clipped, not each unit's gradient."""

    def backward(right: Any, self: Engine, values: torch.Tensor, units: torch.Tensor | None = None) -> Any:
        return right(self, values, torch.zeros(len(values), dtype=torch.int64))

    # The check of the first batch would notice: it is out of the way, so that the loop's own test has to.
    m.setattr(sessions, "check_gradients", lambda session: None)
    wrapped(m, Engine, "backward", backward)


@caught_by(MICROBATCHES, 8)
def only_the_last_microbatch_counts(m: pytest.MonkeyPatch) -> None:
    """Sums are replaced where they should be added."""
    m.setattr("sotto.gradients.base.ClippedSum.__iadd__", lambda self, other: other)


@caught_by(MICROBATCHES, 8)
def microbatches_are_averaged(m: pytest.MonkeyPatch) -> None:
    """Each sum is divided by the number of microbatches."""

    count = [1]

    def microbatches(right: Any, *args: Any) -> Any:
        parts = right(*args)
        count[0] = max(1, len(parts))
        return parts

    def clipped_sum(right: Any, *args: Any) -> Any:
        total = right(*args)
        for gradient in total.gradients.values():
            gradient /= count[0]
        return total

    wrapped(m, training, "microbatches", microbatches)
    wrapped(m, training, "_clipped_sum", clipped_sum)


@caught_by(MICROBATCHES, 8)
def units_are_split_over_microbatches(m: pytest.MonkeyPatch) -> None:
    """A unit in two microbatches is clipped twice, and counts twice."""

    def microbatches(examples: np.ndarray, unit_of: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
        return np.array_split(np.arange(len(examples)), max(1, len(examples) // size))

    m.setattr(training, "microbatches", microbatches)


@caught_by("test_training.py::test_a_step_is_noised_once_however_many_microbatches_it_has", 8)
def every_microbatch_is_noised(m: pytest.MonkeyPatch) -> None:
    """Noise is added to each microbatch's sum, and again to the whole."""

    def losses_of(right: Any, session: training.Session, examples: np.ndarray) -> torch.Tensor:
        session.mechanism.privatize(session.engine.zeros(), session.step)
        return right(session, examples)

    wrapped(m, training, "losses_of", losses_of)


# ---- 17: empty batches


@caught_by("test_training.py::test_an_empty_batch_is_noised_and_steps", 17)
def an_empty_batch_takes_no_step(m: pytest.MonkeyPatch) -> None:
    """Nothing was drawn, so nothing is released: which steps are missing tells of the data."""

    empty: list[bool] = []

    def private_numbers(right: Any, session: Any, total: Any, units: np.ndarray) -> Any:
        empty.append(len(units) == 0)
        return right(session, total, units)

    wrapped(m, training, "private_numbers", private_numbers)
    wrapped(m, Optimizer, "step", lambda right, *args: None if empty[-1] else right(*args))


@caught_by("test_training.py::test_an_empty_batch_is_noised_and_steps", 17)
def an_empty_batch_is_released_as_it_is(m: pytest.MonkeyPatch) -> None:
    """Zeros without noise say that nobody was drawn."""

    def privatize(right: Any, self: Any, total: Any, step: int) -> Any:
        return right(self, total, step) if len(total.norms) else {n: g / 12 for n, g in total.gradients.items()}

    wrapped(m, sessions.GaussianMechanism, "privatize", privatize)


# ---- 22: who is protected


@caught_by("test_gradients_rules.py::test_layers_of_features[linear-3d-groups", 22)
def every_example_is_a_unit_of_its_own(m: pytest.MonkeyPatch) -> None:
    """Units are ignored: a person with many examples contributes many clipping norms."""
    wrapped(m, Engine, "backward", lambda right, self, values, units=None: right(self, values))


@caught_by("test_data_units.py::test_the_bound_holds_and_nothing_is_lost_below_it", 22)
def a_unit_may_have_any_number_of_examples(m: pytest.MonkeyPatch) -> None:
    """The contribution bound is not applied."""
    m.setattr("sotto.data.units._bounded", lambda unit, examples, most, seed: np.asarray(examples))


@caught_by("test_data_units.py::test_another_unit_changes_nothing_for_this_one", 22)
def the_choice_of_examples_depends_on_other_units(m: pytest.MonkeyPatch) -> None:
    """Which examples are kept depends on how many there are: removing one unit changes what others contribute."""

    def build(right: Any, example_units: Any, num_examples: int, most: int, seed: int) -> Any:
        return right(example_units, num_examples, most, seed + num_examples)

    original = Units.build
    m.setattr(Units, "build", staticmethod(lambda *args: build(original, *args)))


@caught_by("test_data_load.py::test_a_long_document_is_one_record_in_training", 22)
def chunks_of_a_document_are_units(m: pytest.MonkeyPatch) -> None:
    """With `unit: record`, each piece of a long document is protected alone."""
    m.setattr(load, "_example_units", lambda examples, section, values, training: values and None)


@caught_by("test_data_units.py::test_clean_units_makes_one_person_of_two_spellings", 22)
def two_spellings_are_two_people(m: pytest.MonkeyPatch) -> None:
    """Names are taken byte for byte."""
    m.setattr("sotto.data.units.unicodedata.normalize", lambda form, text: text)


@caught_by("test_data_load.py::test_a_row_that_is_left_out_moves_nobody_to_another_unit", 22)
def rows_that_are_left_out_shift_the_units(m: pytest.MonkeyPatch) -> None:
    """Examples get the names of the first rows, usable or not: behind a bad row, texts are other people's."""

    def shifted(right: Any, examples: Any, section: Any, values: Any, *rest: Any) -> Any:
        return right(examples, section, values, *rest) if values is None else values[: len(examples)]

    wrapped(m, load, "_example_units", shifted)
