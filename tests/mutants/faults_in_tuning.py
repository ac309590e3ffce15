"""Faults in the price of choosing between trainings, and of scores on private data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import secrets
from types import SimpleNamespace
from typing import Any

import pytest
from mutant import caught_by, wrapped

from sotto import noisy_scores, sweeping
from sotto.rundir import RunDir

LAW = "test_sweep.py::test_the_number_of_trials_follows_its_law["


@caught_by("test_sweep.py::test_what_has_no_bound_is_refused[over6-", 24)
def a_trial_may_have_laplace_noise(m: pytest.MonkeyPatch) -> None:
    """The choice is priced for Gaussian releases, and a swept key makes them others."""
    m.setattr("sotto.config_method.MethodSection.laplace", property(lambda self: False))


@caught_by("test_sweep.py::test_every_trial_releases_what_was_priced", 24)
def trials_are_not_compared_with_their_price(m: pytest.MonkeyPatch) -> None:
    """A key that changes what a step releases is swept like any other."""
    price: list[Any] = []

    def make_plan(right: Any, config: Any) -> Any:
        price.append(right(config))
        return price[-1]

    wrapped(m, sweeping, "make_plan", make_plan)
    wrapped(m, RunDir, "plan", lambda right, self: price[-1])


@caught_by(LAW + "geometric", 20)
def one_trial_more_than_the_law_says(m: pytest.MonkeyPatch) -> None:
    """The number of trials is that of failures before a success, plus two."""
    wrapped(m, sweeping.selection, "draw_trials", lambda right, *args: right(*args) + 1)


@caught_by(LAW + "logarithmic", 20)
def both_laws_are_geometric(m: pytest.MonkeyPatch) -> None:
    """The logarithmic law is named, and priced, and not drawn."""
    wrapped(m, sweeping.selection, "draw_trials", lambda right, mean, law="", *u: right(mean, "geometric", *u))


@caught_by("test_sweep.py::test_a_later_run_does_not_tell_how_many_trials_there_were", 21)
def a_later_run_counts_the_trials_of_a_sweep(m: pytest.MonkeyPatch) -> None:
    """The total over the data, and the number of runs, in the statement of whatever is trained next."""
    m.setattr("sotto.privacy.ledger.Ledger.secretive", False)


@caught_by("test_noisy_scores.py::test_a_score_has_the_noise_that_the_relation_of_its_run_needs", 24)
def a_score_is_calibrated_for_removal(m: pytest.MonkeyPatch) -> None:
    """Under replace_one it has half of the noise that its epsilon needs."""
    right = noisy_scores.accounting
    changed = {
        "noise_multiplier": lambda epsilon, prob, steps, delta, _: right.noise_multiplier(epsilon, prob, steps, delta),
        "composed_epsilon": lambda events, delta, _: right.composed_epsilon(events, delta),
    }
    m.setattr(noisy_scores, "accounting", SimpleNamespace(**{**vars(right), **changed}))


@caught_by("test_noisy_scores.py::test_a_score_is_charged_where_its_texts_are_known_under_a_name", 20)
def a_score_knows_no_names_of_datasets(m: pytest.MonkeyPatch) -> None:
    """What was charged to the same texts under a name of theirs is in another ledger."""
    m.setattr(noisy_scores, "require_one_name", lambda *args: None)


@caught_by("test_sweep.py::test_a_score_that_is_no_number_never_wins", 24)
def what_is_no_number_wins_where_it_comes_first(m: pytest.MonkeyPatch) -> None:
    """Nothing is larger than it: the price is that of a choice in one order, and this is none."""
    wrapped(m, sweeping, "_one", lambda right, *args: (lambda path, score: (path, nan_again(score)))(*right(*args)))


def nan_again(score: float) -> float:
    return math.nan if score == -math.inf else score


ANEW = "test_sweep.py::test_trials_are_as_many_as_were_priced_and_each_draws_its_setting_anew"
BY_THE_SYSTEM = "test_sweep.py::test_the_number_of_trials_is_drawn_by_the_operating_system["


@caught_by(ANEW, 20)
def twice_as_many_trials_as_were_priced(m: pytest.MonkeyPatch) -> None:
    """The law that is drawn from has another mean than the one that was accounted for."""
    right = sweeping.selection
    changed = {"draw_trials": lambda mean, *rest: right.draw_trials(2 * mean, *rest)}
    m.setattr(sweeping, "selection", SimpleNamespace(**{**vars(right), **changed}))


@caught_by(ANEW, 24)
def settings_take_turns(m: pytest.MonkeyPatch) -> None:
    """Every setting is tried about as often as any other: the trials are no independent draws."""
    turn = itertools.count()
    system = SimpleNamespace(choice=lambda values: values[next(turn) % len(values)])
    m.setattr(sweeping, "secrets", SimpleNamespace(SystemRandom=lambda: system, token_hex=secrets.token_hex))


@caught_by(BY_THE_SYSTEM + "geometric", 14)
def the_number_of_trials_follows_a_seed(m: pytest.MonkeyPatch) -> None:
    """Of Python's own generator, which anybody may have set."""
    m.setattr(sweeping.selection, "secrets", SimpleNamespace(SystemRandom=lambda: random))


@caught_by(BY_THE_SYSTEM + "logarithmic", 20)
def the_number_of_trials_is_fixed(m: pytest.MonkeyPatch) -> None:
    """Always the median: a fixed number has no bound but that of all trials together."""
    wrapped(m, sweeping.selection, "draw_trials", lambda right, mean, law: right(mean, law, 0.5))


@caught_by("test_sweep.py::test_every_number_of_a_sweeps_statement_is_that_of_the_choice", 24)
def a_sweep_states_the_price_of_one_trial(m: pytest.MonkeyPatch) -> None:
    """The epsilon above the statement is that of the training which was released, as if it had been the only one."""

    def of_one(right: Any, planned: sweeping.SweepPlan, *rest: Any) -> str:
        return right(dataclasses.replace(planned, epsilon=planned.trial_epsilon), *rest)

    wrapped(m, sweeping, "text", of_one)
