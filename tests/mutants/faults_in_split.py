"""Faults in what a customer sends to a vendor: the noise on it, how often it is drawn, and what goes along."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mutant import caught_by, wrapped

from sotto.split import cache, importance, labels, metric, privatizers, statement
from sotto.split import customer as customers
from sotto.split.answers import AnswerBook
from sotto.split.labels import LabelKeeper
from sotto.split.privatizers import GaussianRelease

LAW = "test_split_metric.py::test_the_length_of_a_million_tokens_follows_the_gamma_law"
RUNS = "test_split_run.py::test_every_privatizer_runs_from_text_to_statement"


@caught_by(LAW, 9)
def gaussian_noise_instead_of_the_metric_law(m: pytest.MonkeyPatch) -> None:
    """A normal vector of the right mean length: its density does not fall as exp(-eta |z|)."""

    def draw(tokens: int, width: int, eta: float, noise: Any, *, step: int = 0) -> torch.Tensor:
        std = math.sqrt(width) / eta
        return noise.normal((tokens, width), std, step=step, name="direction", device=torch.device("cpu"))

    m.setattr("test_split_metric.dx_noise", draw)


@caught_by(LAW, 11)
def one_radius_for_a_batch(m: pytest.MonkeyPatch) -> None:
    """As in public code: the tokens of a batch share the length of their noise."""

    def draw(right: Any, tokens: int, width: int, eta: float, noise: Any, *, step: int = 0) -> torch.Tensor:
        z = right(tokens, width, eta, noise, step=step)
        return z / z.norm(dim=1, keepdim=True) * z[:1].norm()

    wrapped(m, metric, "dx_noise", draw)
    m.setattr("test_split_metric.dx_noise", metric.dx_noise)


@caught_by("test_split_privatizers.py::test_each_row_has_its_own_noise_of_the_right_length", 9)
def noise_is_scaled_after_rounding_eta(m: pytest.MonkeyPatch) -> None:
    """An eta a fifth larger than the configuration's."""
    wrapped(m, privatizers, "dx_noise", lambda right, n, w, eta, *a, **k: right(n, w, 1.2 * eta, *a, **k))


@caught_by("test_split_privatizers.py::test_one_token_moves_the_means_by_its_share_at_most[3", 9)
def a_rest_has_a_row_of_its_own(m: pytest.MonkeyPatch) -> None:
    """A token that is left over then stands alone, and moves its row by m times what was stated."""

    def cut(tokens_B: torch.Tensor, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows_B, owners = (tokens_B + segment - 1) // segment, []
        for first, tokens in zip((rows_B.cumsum(0) - rows_B).tolist(), tokens_B.tolist(), strict=True):
            owners.append(first + torch.arange(tokens) // segment)
        return rows_B, torch.cat(owners)

    m.setattr(privatizers, "segments", cut)


@caught_by("test_split_privatizers.py::test_each_segment_has_its_own_noise_of_the_right_length", 9)
def noise_is_averaged_with_the_tokens(m: pytest.MonkeyPatch) -> None:
    """Noise that is put on tokens before their mean is taken is sqrt(m) shorter than the mean's guarantee needs."""
    wrapped(m, privatizers, "dx_noise", lambda right, *a, **k: right(*a, **k) / math.sqrt(3))


@caught_by("test_split_privatizers.py::test_the_noise_is_calibrated_to_replace_one[0.5", 9)
def sensitivity_of_adding_instead_of_replacing(m: pytest.MonkeyPatch) -> None:
    """A text is replaced by another, which moves the release by twice the clip norm."""

    def calibrated(rows: int, pooled: bool, clip_norm: float, epsilon: float, delta: float) -> GaussianRelease:
        return GaussianRelease(rows, pooled, clip_norm, clip_norm / privatizers.gaussian_mu(epsilon, delta))

    m.setattr(GaussianRelease, "calibrated", calibrated)


@caught_by("test_split_privatizers.py::test_no_text_moves_the_release_by_more_than_twice_the_norm[False", 3)
def rows_are_clipped_each_to_the_whole_norm(m: pytest.MonkeyPatch) -> None:
    """A text of many rows then moves the release by far more than is noised."""
    m.setattr(privatizers.math, "sqrt", lambda value: 1.0)


@caught_by("test_split_privatizers.py::test_no_text_moves_the_release_by_more_than_twice_the_norm[True", 16)
def a_broken_text_passes_the_clipping(m: pytest.MonkeyPatch) -> None:
    """min(1, C / nan) is not a bound."""
    m.setattr(torch.Tensor, "nan_to_num", lambda self, *arguments: self)


@caught_by("test_split_wire.py::test_noise_is_drawn_once_however_often_it_is_asked_for", 11)
def noise_is_drawn_anew_for_every_epoch(m: pytest.MonkeyPatch) -> None:
    """The outbox forgets what it has drawn, and the mean of many draws is the text."""
    original = cache._stored_or_new

    def forget(folder: Any, index: int, *arguments: Any) -> Any:
        for path in folder.glob(f"piece-{index:06d}.*"):
            path.unlink()
        (folder / cache.MANIFEST).unlink(missing_ok=True)
        return original(folder, index, *arguments)

    m.setattr(cache, "_stored_or_new", forget)


@caught_by("test_split_wire.py::test_a_damaged_release_is_not_drawn_again[piece", 11)
def a_damaged_release_is_drawn_again(m: pytest.MonkeyPatch) -> None:
    """It may have been sent before it was damaged."""
    original = cache._stored_or_new

    def redraw(folder: Any, index: int, size: int, agreement: Any, make: Any) -> Any:
        (folder / f"piece-{index:06d}.json").unlink(missing_ok=True)
        (folder / cache.MANIFEST).unlink(missing_ok=True)
        return original(folder, index, size, agreement, make)

    m.setattr(cache, "_stored_or_new", redraw)


@caught_by("test_split_run.py::test_a_private_choice_of_words_is_made_once", 11)
def the_choice_of_words_is_made_anew(m: pytest.MonkeyPatch) -> None:
    """Every start pays for another choice and tells of one."""
    wrapped(m, customers, "write_private", lambda right, path, data: None)
    m.setattr(importance, "scores", lambda *a, **k: np.random.default_rng().normal(size=np.asarray(a[0]).shape))


@caught_by("test_split_network.py::test_a_restart_forgets_no_answer_and_repeats_none", 18)
def answers_are_forgotten_in_a_crash(m: pytest.MonkeyPatch) -> None:
    """The book is opened empty, so labels are answered for twice as often as was paid for."""

    def empty(self: AnswerBook, path: Any, keeper: LabelKeeper, classes: int) -> None:
        self._path, self._keeper, self._classes, self._known = path, keeper, classes, {}

    m.setattr(AnswerBook, "__init__", empty)


@caught_by("test_split_labels.py::test_two_labels_are_sqrt_two_apart_and_the_noise_is_scaled_to_that", 18)
def answers_are_paid_for_once(m: pytest.MonkeyPatch) -> None:
    """The noise of one answer, given in every epoch."""
    original = LabelKeeper.__init__

    def cheap(self: LabelKeeper, labels_E: Any, classes: int, uses: int, *arguments: Any) -> None:
        original(self, labels_E, classes, 1, *arguments)
        self.uses = uses

    m.setattr(LabelKeeper, "__init__", cheap)


@caught_by("test_split_labels.py::test_randomised_response_has_its_law[2-1.0", 9)
def labels_are_kept_too_often(m: pytest.MonkeyPatch) -> None:
    """Twice the epsilon that is stated."""
    wrapped(m, labels, "coin_exp", lambda right, exponent, below: right(2 * exponent, below))


@caught_by("test_split_labels.py::test_one_text_moves_the_counts_by_no_more_than_the_sensitivity", 3)
def a_text_is_counted_in_full(m: pytest.MonkeyPatch) -> None:
    """A long text moves more counts than the noise covers."""
    right = importance.class_counts
    m.setattr(importance, "class_counts", lambda *a, most=None, **k: right(*a, most=None, **k))


@caught_by("test_split_run.py::test_labels_that_are_kept_never_reach_the_vendor", 21)
def kept_labels_go_along(m: pytest.MonkeyPatch) -> None:
    """The pieces of the upload hold the labels that were to stay."""

    def send(self: Any, examples: Any, start: int, count: int) -> Any:
        chosen = np.arange(start, start + count)
        lengths, values = self._release(examples, chosen, step=start)
        return customers.Piece(lengths, examples.labels[chosen].astype(np.int32), values)

    m.setattr(customers.Customer, "_piece", send)
    wrapped(
        m, customers, "agreement", lambda right, *a: customers.Agreement(**{**right(*a).__dict__, "labels": "sent"})
    )
    m.setattr("sotto.split.vendor.agreement", customers.agreement)


@caught_by("test_split_privatizers.py::test_only_differential_privacy_is_stated_as_epsilon[values1", 24)
def eta_is_stated_as_epsilon(m: pytest.MonkeyPatch) -> None:
    """Metric privacy in the words of differential privacy."""
    m.setattr(statement, "_metric", lambda found, *rest: f"epsilon {found.eta:g}, delta 1e-05")


@caught_by("test_split_privatizers.py::test_rows_behind_the_end_of_a_text_have_the_same_noise", 9)
def rows_that_hold_nothing_have_no_noise(m: pytest.MonkeyPatch) -> None:
    """Zeros behind the end of a text say where it ends."""

    def release(right: Any, self: GaussianRelease, batch: Any, *rest: Any) -> Any:
        left = right(self, batch, *rest)
        left.rows[(self.clipped(batch) == 0).flatten(0, 1)] = 0.0
        return left

    wrapped(m, GaussianRelease, "release", release)


@caught_by("test_split_privatizers.py::test_what_leaves_is_rounded_once_after_the_noise[True]", 12)
def noise_is_added_in_half_precision(m: pytest.MonkeyPatch) -> None:
    """Text and noise are each rounded for the way, and then added."""

    def release(self: GaussianRelease, batch: Any, noise: Any, step: int) -> Any:
        clipped = self.clipped(batch)
        drawn = noise.normal(tuple(clipped.shape), self.std, step=step, name="rows", device=clipped.device)
        lengths = torch.full((len(clipped),), self.rows)
        return privatizers.Released(lengths, (clipped.half() + drawn.half()).flatten(0, 1))

    m.setattr(GaussianRelease, "release", release)
