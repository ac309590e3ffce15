"""Faults in clipping, in the norms it is based on, and in how broken examples are kept apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_gradients_self_check as breaks
import torch
from mutant import caught_by, wrapped

from sotto import session as sessions
from sotto import training
from sotto.errors import SottoError
from sotto.gradients import clipping, engine, layerwise, passes, pieces, taps
from sotto.gradients.clipping import Adaptive, Automatic, Flat
from sotto.gradients.engine import Engine
from sotto.gradients.rows import Rows
from sotto.gradients.rules import call, rerun
from sotto.gradients.taps import Site

COEFFICIENTS = "test_gradients_clipping.py::test_no_coefficient_exceeds_the_sensitivity[Flat"
LINEAR = "test_gradients_rules.py::test_layers_of_features[linear-3d-"
NOT_FINITE = "test_gradients_clipping.py::test_a_unit_that_is_not_finite_contributes_nothing_and_harms_nobody"


# ---- 3: the clipping norm


@caught_by(COEFFICIENTS, 3)
def clipping_norm_of_one_whatever_was_asked(m: pytest.MonkeyPatch) -> None:
    """Clips to 1 and says that the sensitivity is clip_norm."""
    m.setattr(Flat, "threshold", lambda self, norms: 1.0)


@caught_by(COEFFICIENTS, 3)
def nothing_is_clipped(m: pytest.MonkeyPatch) -> None:
    """All factors are 1."""
    m.setattr(clipping, "_scale_down", lambda norms, threshold: clipping._zero_where_unusable(norms * 0 + 1, norms))


@caught_by(COEFFICIENTS, 3)
def the_factor_is_inverted(m: pytest.MonkeyPatch) -> None:
    """Small gradients are scaled down and large ones let through: min(1, |g| / C)."""
    wrapped(m, clipping, "_scale_down", lambda right, norms, threshold: right(threshold**2 / norms, threshold))


@caught_by(COEFFICIENTS, 3)
def norms_are_compared_squared(m: pytest.MonkeyPatch) -> None:
    """min(1, C / |g|^2): too much for every gradient shorter than 1."""
    wrapped(m, clipping, "_scale_down", lambda right, norms, threshold: right(norms.square(), threshold))


@caught_by("test_gradients_clipping.py::test_no_coefficient_exceeds_the_sensitivity[Automatic", 3)
def automatic_clipping_shrinks_by_gamma_alone(m: pytest.MonkeyPatch) -> None:
    """C / (gamma |g| + gamma), which passes C for every gradient that is not tiny."""

    def coefficients(self: Automatic, norms: torch.Tensor) -> torch.Tensor:
        return clipping._zero_where_unusable(self.threshold(norms) / (self.gamma * norms + self.gamma), norms)

    m.setattr(Automatic, "coefficients", coefficients)


@caught_by("test_replay.py::test_a_neighbouring_dataset_shows_nowhere_in_public[classification-full-flat", 3)
def the_clipping_norm_is_not_passed_on(m: pytest.MonkeyPatch) -> None:
    """The engine is built with a clipping norm of 1: consistent with itself, not with the plan."""
    m.setattr(sessions, "make_clipping", lambda config: Flat(1.0, config.method.gradient == "layerwise"))


# ---- 4: norms of layers


@caught_by(LINEAR, 4)
def the_norm_of_a_bias_is_taken_per_token(m: pytest.MonkeyPatch) -> None:
    """|G|^2 over the tokens, instead of the square of their sum."""
    breaks.bias_norm_per_token(m)


@caught_by(LINEAR, 4)
def a_bias_is_left_out_of_the_norm(m: pytest.MonkeyPatch) -> None:
    """Its gradient is in the sum and not in the norm."""
    breaks.missing_bias(m)


@caught_by(LINEAR, 4)
def norms_are_a_tenth_too_large(m: pytest.MonkeyPatch) -> None:
    """Safe, and wrong: the sum is not the one that was promised."""
    breaks.norm_off_by_a_tenth(m)


@caught_by(LINEAR, 4)
def inputs_of_another_example(m: pytest.MonkeyPatch) -> None:
    """Each output gradient meets its neighbour's activations."""
    breaks.swapped_rows(m)


@caught_by("test_gradients_rules.py::test_embeddings[plain-", 4)
def a_token_that_is_repeated_counts_as_two(m: pytest.MonkeyPatch) -> None:
    """The squared norm of an embedding adds up tokens, not rows of the table."""
    breaks.repeats_ignored(m)


@caught_by("test_gradients_rules.py::test_layers_of_features[linear_wide-3d-groups", 4)
def the_norm_of_a_unit_adds_those_of_its_examples(m: pytest.MonkeyPatch) -> None:
    """Two examples of a unit that agree are longer together than their squares tell."""

    def squared_norms(self: pieces.Factored, rows: Rows) -> torch.Tensor:
        a, g = pieces.wide(self.a_BTd), pieces.wide(self.g_BTp)
        squared_B = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        return rows.add_up(squared_B[:, None])[:, 0]

    m.setattr(pieces.Factored, "squared_norms", squared_norms)
    m.setattr(pieces.Factored, "instantiation_is_cheaper", lambda self, *args: False)


@caught_by("test_gradients_clipping.py::test_norms_left_over_from_cancellation_are_not_too_small[1e-05", 4)
def rounding_may_make_a_norm_too_small(m: pytest.MonkeyPatch) -> None:
    """What is left of terms that cancel is taken for the norm."""
    m.setattr(pieces, "never_too_small", lambda squared, size: squared.clamp(min=0))


# ---- 5: parameters that are used twice


@caught_by("test_gradients_rules.py::test_tied_embedding_and_head[False-None-", 5)
def the_cross_term_of_tied_weights_is_dropped(m: pytest.MonkeyPatch) -> None:
    """The norm of a sum is taken for the sum of norms where one matrix embeds and scores."""
    breaks.tied_cross_term_dropped(m)


@caught_by("test_gradients_rules.py::test_models_that_use_parameters_in_odd_ways[linear_twice-", 5)
def uses_of_a_layer_are_counted_apart(m: pytest.MonkeyPatch) -> None:
    """A layer that is called twice has the squared norms of both calls."""

    def add(right: Any, self: taps.Book, name: str, piece: Any) -> None:
        shared, self.shared = self.shared, set()
        right(self, name, piece)
        self.shared = shared
        self.repeated.clear()

    wrapped(m, taps.Book, "add", add)


@caught_by("test_gradients_rules.py::test_tied_embedding_and_head[False-None-", 5)
def tied_weights_are_two_parameters(m: pytest.MonkeyPatch) -> None:
    """One tensor under two names is released twice."""

    def parameters(self: Engine) -> dict[str, Any]:
        return {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}

    m.setattr(Engine, "parameters", property(parameters))


@caught_by("test_gradients_rules.py::test_models_that_use_parameters_in_odd_ways[bare_parameters-", 5)
def parameters_without_a_rule_are_left_out_of_the_norm(m: pytest.MonkeyPatch) -> None:
    """Modules that have to be run again are not."""
    breaks.rerun_parameters_forgotten(m)


@caught_by("test_gradients_self_check.py::test_a_right_model_passes[one-0.3-book_keeping", 5)
def parameters_used_beyond_the_model_are_left_out_of_the_norm(m: pytest.MonkeyPatch) -> None:
    """They are summed without having been clipped."""
    breaks.slow_parameters_forgotten(m)


@caught_by("test_gradients_rerun.py::test_effects_beyond_the_output_are_found", 5)
def effects_beyond_the_output_are_not_looked_for(m: pytest.MonkeyPatch) -> None:
    """What a module leaves behind for another one to read has no part in the gradient."""
    m.setattr(rerun.RerunSite, "conclude", Site.conclude)


@caught_by("test_gradients_rerun.py::test_a_module_that_starts_to_look_at_the_batch[book_keeping", 6)
def what_comes_out_the_second_time_is_not_compared(m: pytest.MonkeyPatch) -> None:
    """An example that is run again alone may give anything."""
    m.setattr(call.Call, "agrees", lambda self, found, index: True)


# ---- 6: coupling


@caught_by("test_gradients_refusals.py::test_batch_norm[BatchNorm1d-ghost", 6)
def batch_normalisation_is_accepted(m: pytest.MonkeyPatch) -> None:
    """Its statistics mix the examples."""
    m.setattr(engine, "COUPLING", ())


@caught_by("test_gradients_refusals.py::test_losses_that_couple_examples[mean-", 6)
def every_probe_is_passed(m: pytest.MonkeyPatch) -> None:
    """Nothing looks whether an example's gradient follows its own loss alone."""

    def compare(self: taps.Site, g: torch.Tensor) -> None:
        self.probed += 1
        self.evidence = True

    m.setattr(taps.Site, "_compare", compare)


@caught_by("test_training.py::test_a_failing_self_check_leaves_nothing", 6)
def the_first_batch_is_not_checked(m: pytest.MonkeyPatch) -> None:
    """The run begins without a comparison with plain autograd."""
    m.setattr(training, "verify", lambda *args: 0.0)


# ---- 16: broken examples


@caught_by(COEFFICIENTS, 16)
def a_norm_that_is_not_a_number_passes(m: pytest.MonkeyPatch) -> None:
    """The factor of a gradient that is nan or inf is not zero."""
    m.setattr(clipping, "_zero_where_unusable", lambda factors, norms: torch.nan_to_num(factors, nan=1.0))


@caught_by(f"{NOT_FINITE}[nan-input--alone-ghost", 16)
def zero_times_infinity(m: pytest.MonkeyPatch) -> None:
    """Broken rows are weighted by zero, which leaves nan where they are inf."""
    m.setattr(pieces, "_zero_bad", lambda x, bad: x)
    m.setattr("sotto.gradients.rules.linear.plain_inputs", lambda site, g, x: (g, x))


@caught_by("test_training.py::test_a_broken_example_changes_nothing_but_itself[nan-book_keeping", 16)
def a_step_with_a_broken_example_is_skipped(m: pytest.MonkeyPatch) -> None:
    """Whether the step was taken tells that the example was in the batch."""

    def clipped_sum(right: Any, session: training.Session, units: np.ndarray, step: int) -> Any:
        total = right(session, units, step)
        return total if bool(torch.isfinite(total.norms).all()) else session.engine.zeros()

    wrapped(m, training, "_clipped_sum", clipped_sum)


@caught_by("test_training.py::test_a_broken_example_changes_nothing_but_itself[nan-book_keeping", 16)
def a_broken_example_stops_the_run(m: pytest.MonkeyPatch) -> None:
    """An exception tells that the example was in the batch."""

    def clipped_sum(right: Any, session: training.Session, units: np.ndarray, step: int) -> Any:
        total = right(session, units, step)
        if not bool(torch.isfinite(total.norms).all()):
            raise SottoError("SOT999", what="a loss is not finite", where="loop", why="nan", fix="clean the data")
        return total

    wrapped(m, training, "_clipped_sum", clipped_sum)


@caught_by("test_gradients_clipping.py::test_an_infinity_is_traced_to_one_unit_or_stops_the_step[0.1-ghost", 16)
def an_infinity_of_one_unit_removes_all(m: pytest.MonkeyPatch) -> None:
    """One unit decides over the contributions of the others."""
    m.setattr(passes, "require_isolated", lambda known, found: None)


@caught_by("test_gradients_layerwise.py::test_a_loss_that_is_not_finite_contributes_nothing[fast-layerwise", 16)
def a_broken_loss_is_noticed_after_the_layers(m: pytest.MonkeyPatch) -> None:
    """Layer-wise clipping begins without knowing which losses are not finite."""
    m.setattr(layerwise.torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))


# ---- 3 and 19: layers and thresholds that move

EACH_LAYER = "test_gradients_layerwise.py::test_each_layer_is_clipped_on_its_own[fast-alone-layerwise"


@caught_by("test_gradients_layerwise.py::test_no_unit_moves_the_sum_by_more_than_the_sensitivity", 3)
def every_layer_has_the_whole_clipping_norm(m: pytest.MonkeyPatch) -> None:
    """G layers of norm C are sqrt(G) times as long as was said."""
    m.setattr(Flat, "threshold", lambda self, norms: self.clip_norm)


@caught_by("test_gradients_layerwise.py::test_adaptive_clips_at_this_steps_threshold[True", 19)
def layers_that_adapt_begin_with_the_whole_clipping_norm(m: pytest.MonkeyPatch) -> None:
    """Thresholds of layers are not divided by sqrt(G)."""

    def group_of(right: Any, self: Adaptive, names: Any) -> Any:
        fresh, groups = not self.thresholds, right(self, names)
        if fresh:
            self.thresholds = [self.clip_norm] * len(self.thresholds)
        return groups

    wrapped(m, Adaptive, "group_of", group_of)


@caught_by("test_gradients_layerwise.py::test_adaptive_clips_at_this_steps_threshold[False", 19)
def the_sensitivity_is_that_of_the_first_step(m: pytest.MonkeyPatch) -> None:
    """Thresholds move and the noise does not."""
    m.setattr(Adaptive, "sensitivity", property(lambda self: self.clip_norm))


@caught_by("test_gradients_layerwise.py::test_adaptive_clips_at_this_steps_threshold[True", 19)
def the_sensitivity_is_that_of_the_largest_layer(m: pytest.MonkeyPatch) -> None:
    """The longest threshold, instead of the length of all together."""
    m.setattr(Adaptive, "sensitivity", property(lambda self: max(self.thresholds or [self.clip_norm])))


@caught_by("test_gradients_layerwise.py::test_the_count_of_unclipped_units_moves_by_one_half", 19)
def counts_are_not_centred(m: pytest.MonkeyPatch) -> None:
    """A count that moves by 1 has the noise of one that moves by 1/2."""

    def count(self: Adaptive, norms: torch.Tensor) -> torch.Tensor:
        return (norms <= self._thresholds(norms)).double().sum(0)

    m.setattr(Adaptive, "count_unclipped", count)


@caught_by("test_gradients_layerwise.py::test_the_count_of_unclipped_units_moves_by_one_half", 19)
def counts_add_up_norms(m: pytest.MonkeyPatch) -> None:
    """How far a unit is from the threshold is counted, which is not bounded."""
    m.setattr(Adaptive, "count_unclipped", lambda self, norms: (self._thresholds(norms) - norms).sum(0))
