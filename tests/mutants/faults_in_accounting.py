"""Faults in epsilon, in the statement's numbers, in the ledger, and in what a crash costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mutant import caught_by, wrapped

from sotto import checkpoint, finish, sweeping
from sotto import session as sessions
from sotto.auditing import bounds as attacks
from sotto.data import load
from sotto.evaluation import score_examples
from sotto.privacy import accounting, bounds, chain, statement
from sotto.privacy import plan as plans
from sotto.privacy.events import Gaussian, PoissonGaussian
from sotto.privacy.ledger import Ledger, RunRecord
from sotto.session import LedgerBudget
from sotto.stopping import StopRule

GOLDEN = "test_privacy_accounting.py::test_poisson_gaussian["


def other_bound(m: pytest.MonkeyPatch, change: Any) -> None:
    """Replaces what all epsilons are computed from; `change(right, events, delta, relation, *rest)`."""
    wrapped(m, accounting, "upper_bound", change)


# ---- 24: epsilon


@caught_by(GOLDEN, 24)
def epsilon_from_the_central_limit(m: pytest.MonkeyPatch) -> None:
    """Gaussian DP in the limit (Bu et al. 2020): an estimate, up to a quarter below the truth."""

    def limit(right: Any, events: Any, delta: float, *rest: Any) -> float:
        squares = (
            count * math.expm1(1 / e.noise_multiplier**2) * getattr(e, "sampling_prob", 1.0) ** 2 for e, count in events
        )
        return bounds.gaussian_epsilon(math.sqrt(sum(squares)), delta)

    other_bound(m, limit)


@caught_by("test_privacy_accounting.py::test_composition_of_three_steps", 24)
def one_step_less_is_counted(m: pytest.MonkeyPatch) -> None:
    """Steps - 1."""
    other_bound(m, lambda right, events, *rest: right(tuple((e, max(1, n - 1)) for e, n in events), *rest))


@caught_by("test_privacy_accounting.py::test_one_step_closed_form", 24)
def sampling_amplifies_twice(m: pytest.MonkeyPatch) -> None:
    """The sampling probability enters as its square."""

    def squared(right: Any, events: Any, *rest: Any) -> float:
        return right(
            tuple(
                (e if isinstance(e, Gaussian) else dataclasses.replace(e, sampling_prob=e.sampling_prob**2), n)
                for e, n in events
            ),
            *rest,
        )

    other_bound(m, squared)


@caught_by("test_privacy_accounting.py::test_gaussian_closed_form_both_ways", 24)
def delta_is_ignored(m: pytest.MonkeyPatch) -> None:
    """Epsilon is computed at a delta of 1e-5 whatever was asked."""
    other_bound(m, lambda right, events, delta, *rest: right(events, 1e-5, *rest))


@caught_by("test_privacy_accounting.py::test_replace_one_without_sampling_doubles_the_distance", 24)
def replacement_costs_as_much_as_removal(m: pytest.MonkeyPatch) -> None:
    """The distance between the two sums is not doubled."""
    other_bound(m, lambda right, events, delta, relation, *rest: right(events, delta, "add_or_remove_one", *rest))


@caught_by("test_privacy_accounting.py::test_mixed_kinds_compose", 24)
def only_the_first_kind_of_release_counts(m: pytest.MonkeyPatch) -> None:
    """Composition forgets all but one event."""
    other_bound(m, lambda right, events, *rest: right(events[:1], *rest))


@caught_by("test_privacy_accounting.py::test_max_steps[add", 24)
def noise_is_rounded_down(m: pytest.MonkeyPatch) -> None:
    """Two digits look nicer."""

    def rounded(right: Callable[..., tuple[float, float]], *args: float) -> tuple[float, float]:
        sigma, slope = right(*args)
        return math.floor(sigma * 100) / 100, slope

    wrapped(m, accounting, "least_noise", rounded)


@caught_by("test_privacy_statement.py::test_numbers_are_rounded_up[3.00001", 24)
def epsilon_is_rounded_to_the_nearest(m: pytest.MonkeyPatch) -> None:
    """3.00001 is printed as 3.000."""
    m.setattr(accounting, "round_up", lambda value, digits=3: f"{value:.{digits}f}")


@caught_by("test_privacy_statement.py::test_machine_readable_matches", 24)
def epsilon_for_machines_is_rounded_down(m: pytest.MonkeyPatch) -> None:
    """privacy.json holds less than the run spent."""

    def down(value: float, digits: int = 3) -> str:
        return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"

    m.setattr(accounting, "round_up", down)


@caught_by("test_privacy_accounting.py::test_suggest_delta", 24)
def a_delta_of_one_in_the_number_of_units(m: pytest.MonkeyPatch) -> None:
    """delta = 1/n allows publishing one unit outright."""
    m.setattr(accounting, "suggest_delta", lambda num_units: 1 / num_units)


@caught_by("test_privacy_statement.py::test_plan_pays_for_spare_steps_within_the_budget", 24)
def the_budget_is_for_another_delta(m: pytest.MonkeyPatch) -> None:
    """Noise is calibrated at a delta ten times the plan's."""
    wrapped(m, plans.accounting, "noise_multiplier", lambda right, **kw: right(**kw | {"delta": 10 * kw["delta"]}))


NAMED = (
    "test_privacy_statement.py::test_the_plan_accounts_for_the_noise_the_relation_and_the_delta_that_it_names[replace"
)
STATED = "test_privacy_statement.py::test_every_number_of_the_statement_is_what_was_earned[replace_one-patient_id-4"


@caught_by(NAMED, 24)
def noise_is_calibrated_for_removal_whatever_the_relation(m: pytest.MonkeyPatch) -> None:
    """Under replace_one, half the noise that the budget asks for."""

    def removal(right: Any, **kw: Any) -> float:
        return right(**kw | {"neighboring_relation": "add_or_remove_one"})

    wrapped(m, plans.accounting, "noise_multiplier", removal)


@caught_by(NAMED, 24)
def a_finished_run_is_accounted_for_removal(m: pytest.MonkeyPatch) -> None:
    """The plan names replace_one, and its epsilon is that of removal."""

    def after(self: plans.Plan, steps: int) -> float:
        return accounting.epsilon(self.noise_multiplier, self.sampling_prob, steps, self.delta)

    m.setattr(plans.Plan, "epsilon_after", after)


@caught_by(NAMED, 24)
def a_finished_run_is_accounted_for_at_another_delta(m: pytest.MonkeyPatch) -> None:
    """Ten times the delta that is stated."""
    wrapped(
        m, plans.Plan, "epsilon_after",
        lambda right, self, steps: right(dataclasses.replace(self, delta=10 * self.delta), steps),
    )  # fmt: skip


@caught_by(NAMED, 19)
def the_ledger_hears_of_more_noise_than_there_is(m: pytest.MonkeyPatch) -> None:
    """The event of a step is not what the mechanism adds."""
    m.setattr(
        plans.Plan, "event", property(lambda self: PoissonGaussian(1.1 * self.noise_multiplier, self.sampling_prob))
    )


@caught_by(STATED, 24)
def the_statement_prints_the_plan_and_not_the_spend(m: pytest.MonkeyPatch) -> None:
    """Epsilon as it would be if nothing had been done again."""
    wrapped(
        m, statement, "text",
        lambda right, g: right(dataclasses.replace(g, epsilon=g.plan.epsilon_after(g.steps_taken))),
    )  # fmt: skip


@caught_by(STATED, 22)
def the_statement_promises_more_examples_than_were_bounded(m: pytest.MonkeyPatch) -> None:
    """A record-level guarantee in the words of a user-level one."""
    m.setattr(statement, "who", lambda plan: f"all examples of any one {plan.unit}")


@caught_by("test_privacy_statement.py::test_attackers_bound_is_not_below_what_an_attacker_reaches", 24)
def attackers_are_taken_to_guess(m: pytest.MonkeyPatch) -> None:
    """The share of members that are found is stated as that of a coin."""
    m.setattr(statement.Guarantee, "detection_rate", lambda self, false_alarms: 1.01 * false_alarms)


# ---- 18: what was spent

REDONE = "test_resume.py::test_steps_that_are_lost_are_charged_again"


@caught_by("test_training.py::test_steps_are_paid_for_before_the_data_is_touched", 18)
def the_ledger_is_written_after_the_step(m: pytest.MonkeyPatch) -> None:
    """A step is charged when the next one begins: a crash between them is for free."""
    owed: dict[int, int] = {}

    def reserve(right: Any, self: LedgerBudget, step: int) -> int | None:
        before = owed.pop(id(self), None)
        attempt = 0 if before is None else right(self, before)
        owed[id(self)] = step
        return attempt

    wrapped(m, LedgerBudget, "reserve", reserve)


@caught_by(REDONE, 18)
def a_redone_step_is_free(m: pytest.MonkeyPatch) -> None:
    """The ledger has this step already."""

    def reserve(right: Any, self: LedgerBudget, step: int) -> int | None:
        attempts = self.ledger.attempts(self.run_id, step)
        return attempts or right(self, step)

    wrapped(m, LedgerBudget, "reserve", reserve)


@caught_by(REDONE, 18)
def every_attempt_is_the_first(m: pytest.MonkeyPatch) -> None:
    """A step that is done again is charged, and draws the same units again."""

    def reserve(right: Any, *args: Any) -> int:
        right(*args)
        return 0

    wrapped(m, Ledger, "reserve", reserve)


@caught_by("test_privacy_ledger.py::test_the_charge_is_on_the_disk_before_reserve_returns", 18)
def the_charge_is_in_the_cache_of_the_disk(m: pytest.MonkeyPatch) -> None:
    """Nothing is fsynced: a power failure forgets what was spent."""

    def append(right: Any, self: Any, *args: Any, **fields: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(chain.os, "fsync", lambda descriptor: None)
            right(self, *args, **fields)

    wrapped(m, chain.Chain, "append", append)


@caught_by("test_privacy_ledger.py::test_a_run_reserves_no_more_than_it_announced", 18)
def the_ledger_has_no_end(m: pytest.MonkeyPatch) -> None:
    """A run may reserve more steps than its noise was made for."""
    m.setattr("sotto.privacy.ledger.RunRecord.left", property(lambda self: 1))


@caught_by("test_stopping.py::test_all_planned_steps_are_charged_and_stated", 18)
def steps_that_a_look_saved_are_not_charged(m: pytest.MonkeyPatch) -> None:
    """A run that its own releases ended claims the epsilon of the steps that it took."""
    m.setattr("sotto.privacy.ledger.RunRecord.charged", property(lambda self: self.reserved))


@caught_by("test_stopping.py::test_a_look_needs_no_private_text", 21)
def private_text_decides_when_to_end(m: pytest.MonkeyPatch) -> None:
    """The loss that is published, and that ends the run, is that of the training data."""

    def loss(self: StopRule, session: Any) -> float:
        seen = score_examples(session.model, session.tokenizer.pad_token_id, session.data.examples, "classification")
        return seen["loss"]

    m.setattr(StopRule, "_loss", loss)


@caught_by("test_training.py::test_a_run_stops_before_the_step_that_would_pass_its_budget", 18)
def the_last_step_is_one_too_many(m: pytest.MonkeyPatch) -> None:
    """The run stops after the step that passed the budget, and that step is not charged."""
    over: list[int] = []

    def reserve(right: Any, self: LedgerBudget, step: int) -> int | None:
        attempt = right(self, step)
        if attempt is None and not over:
            over.append(step)
            return 0
        return attempt

    wrapped(m, LedgerBudget, "reserve", reserve)


@caught_by("test_privacy_statement.py::test_redone_steps_are_charged", 18)
def the_statement_counts_finished_steps(m: pytest.MonkeyPatch) -> None:
    """Steps that were lost in a crash are not in epsilon."""
    wrapped(m, statement, "earned", lambda right, plan, taken, charged, *rest: right(plan, taken, taken, *rest))


@caught_by("test_privacy_statement.py::test_plan_pays_for_spare_steps_within_the_budget", 18)
def spare_steps_are_not_paid_for(m: pytest.MonkeyPatch) -> None:
    """Noise is calibrated to the planned steps alone, and spare ones are taken all the same."""
    wrapped(m, plans.accounting, "noise_multiplier", lambda right, **kw: right(**kw | {"steps": kw["steps"] - 1}))


@caught_by("test_privacy_ledger.py::test_counts_survive", 18)
def a_ledger_counts_each_step_once(m: pytest.MonkeyPatch) -> None:
    """What is charged is the number of different steps."""
    wrapped(m, Ledger, "reserved", lambda right, self, run: len(self._runs[run].attempts) if run in self._runs else 0)


@caught_by("test_privacy_ledger.py::test_an_edit_that_makes_sense_is_found[step-False", 18)
def lines_of_the_ledger_are_believed(m: pytest.MonkeyPatch) -> None:
    """Hashes are not compared."""

    def take(right: Any, self: Any, line: bytes) -> None:
        entry = chain.json.loads(line)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(chain.hashlib, "sha256", lambda data: SimpleNamespace(hexdigest=lambda: entry["hash"]))
            right(self, line)

    wrapped(m, chain.Chain, "_take", take)


@caught_by("test_privacy_ledger.py::test_a_cut_tail_is_found_by_the_head", 18)
def a_ledger_may_lose_its_end(m: pytest.MonkeyPatch) -> None:
    """Nothing remembers how long the file was."""
    m.setattr(chain.Chain, "_read_head", lambda self: None)


@caught_by("test_training.py::test_a_run_goes_on_exactly_where_it_stopped[{'clipping': 'adaptive'}", 18)
def thresholds_are_forgotten_in_a_checkpoint(m: pytest.MonkeyPatch) -> None:
    """A resumed run clips at the first step's threshold."""

    def restore(right: Any, session: Any, latest: Any) -> None:
        before = list(session.engine.clipping.thresholds)
        right(session, latest)
        session.engine.clipping.thresholds = before

    wrapped(m, sessions, "_restore", restore)


@caught_by("test_resume.py::test_a_configuration_that_was_edited_is_refused[delta", 18)
def a_resumed_run_believes_its_edited_configuration(m: pytest.MonkeyPatch) -> None:
    """The plan of a run and its configuration may differ."""
    m.setattr(sessions, "require_same_configuration", lambda config, run: None)


@caught_by("test_damage.py::test_another_ledger_is_refused", 18)
def a_resumed_run_believes_any_ledger(m: pytest.MonkeyPatch) -> None:
    """Steps that another folder of ledgers has charged are charged nowhere in this one."""
    m.setattr(sessions, "require_known_steps", lambda run, step, ledger: None)


@caught_by("test_damage.py::test_a_renamed_folder_is_refused", 18)
def a_renamed_run_is_another_run(m: pytest.MonkeyPatch) -> None:
    """The ledger does not know what it has spent."""
    m.setattr(sessions, "require_same_name", lambda run, secret: None)


# ---- 20: several runs


@caught_by("test_training.py::test_runs_on_one_dataset_compose", 20)
def each_run_has_the_dataset_to_itself(m: pytest.MonkeyPatch) -> None:
    """What all runs on a dataset spent is what the last one spent."""

    def events(self: Ledger) -> list[Any]:
        last = list(self._runs.values())[-1:]
        return [(run.event, run.reserved) for run in last if run.reserved]

    m.setattr(Ledger, "events", events)


@caught_by("test_privacy_ledger.py::test_a_budget_holds_over_all_runs", 20)
def the_budget_of_a_dataset_is_for_each_run(m: pytest.MonkeyPatch) -> None:
    """Earlier runs are not counted when the next one asks."""

    def check(right: Any, self: Ledger, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "events", list)
            right(self, *args)

    wrapped(m, Ledger, "_check_budget", check)


@caught_by("test_privacy_ledger.py::test_a_budget_holds_over_all_runs", 20)
def what_open_runs_have_planned_is_not_counted(m: pytest.MonkeyPatch) -> None:
    """Ten runs that start together each see the whole budget."""
    m.setattr(Ledger, "outstanding", lambda self, excluding=None: [])


@caught_by("test_data_load.py::test_the_fingerprint_is_of_the_text", 20)
def another_name_is_another_dataset(m: pytest.MonkeyPatch) -> None:
    """A copy of the file, in another order, has a ledger of its own."""
    m.setattr(load, "sorted", list, raising=False)


@caught_by("test_sweep.py::test_the_price_covers_the_spare_steps_of_every_trial", 18)
def trials_of_a_sweep_are_priced_without_their_spare_steps(m: pytest.MonkeyPatch) -> None:
    """The price of the choice counts the planned steps of each trial, and a crash makes one take more."""

    right = sweeping.selection

    def epsilon(event: Any, steps: int, *rest: Any) -> float:
        return right.epsilon(event, steps // 2, *rest)  # half of the steps are spare ones in the test

    m.setattr(sweeping, "selection", SimpleNamespace(**{**vars(right), "epsilon": epsilon}))


@caught_by("test_checkpoint.py::test_damage_is_noticed[last-optimizer.safetensors]", 18)
def the_optimizers_state_is_believed(m: pytest.MonkeyPatch) -> None:
    """Its hash is not compared: a run goes on, to another model, from numbers that a disk has changed."""
    wrapped(m, checkpoint, "_digest", lambda right, path: "" if path.name.startswith("optimizer") else right(path))


@caught_by("test_privacy_datasets.py::test_the_same_texts_under_a_second_name_are_refused[None-clinic", 20)
def a_second_name_is_a_second_dataset(m: pytest.MonkeyPatch) -> None:
    """The same texts begin with an empty ledger as soon as they are called something else."""
    m.setattr(sessions, "require_one_name", lambda *args: None)


@caught_by("test_privacy_ledger.py::test_no_two_charges_of_a_step_are_told_the_same", 1)
def two_copies_of_a_run_draw_the_same_batch(m: pytest.MonkeyPatch) -> None:
    """How often a step was charged is looked up before the charge, and another process may come in between."""

    def reserve(right: Any, self: LedgerBudget, step: int) -> int | None:
        attempt = self.ledger.attempts(self.run_id, step)
        return None if right(self, step) is None else attempt

    wrapped(m, LedgerBudget, "reserve", reserve)


@caught_by("test_privacy_statement.py::test_redone_steps_are_charged", 24)
def passes_that_were_made_again_are_forgotten(m: pytest.MonkeyPatch) -> None:
    """Epsilon without amplification is that of the planned steps."""
    m.setattr(statement.Guarantee, "unamplified_epsilon", property(lambda self: self.plan.unamplified_epsilon))


STATED = "test_privacy_statement.py::test_every_number_of_the_statement_is_what_was_earned["


@caught_by(STATED, 24)
def mu_is_that_of_another_delta(m: pytest.MonkeyPatch) -> None:
    """A mechanism that is compared with the run hides more than it does."""
    right = statement.accounting
    changed = {"gdp_mu": lambda epsilon, delta: right.gdp_mu(epsilon, delta / 10)}
    m.setattr(statement, "accounting", SimpleNamespace(**{**vars(right), **changed}))


@caught_by(STATED, 13)
def noise_is_called_exact_that_is_not(m: pytest.MonkeyPatch) -> None:
    """Machines read that releases are integers on a grid, of a run whose noise is made of floats."""
    wrapped(m, statement, "machine_readable", lambda right, *args: {**right(*args), "exact_noise": True})


@caught_by(
    "test_privacy_statement.py::test_the_plan_accounts_for_the_noise_the_relation_and_the_delta_that_it_names[add", 24
)
def the_number_of_another_accountant_is_for_another_delta(m: pytest.MonkeyPatch) -> None:
    """Renyi accounting, which stands beside epsilon to be compared with other tools."""
    right = plans.accounting

    def epsilon(noise: float, prob: float, steps: int, delta: float, *rest: Any, **options: Any) -> float:
        delta *= 10 if options.get("accountant") == "rdp" else 1
        return right.epsilon(noise, prob, steps, delta, *rest, **options)

    m.setattr(plans, "accounting", SimpleNamespace(**{**vars(right), "epsilon": epsilon}))


@caught_by("test_privacy_ledger.py::test_a_step_that_is_done_again_is_one_of_those_that_were_announced", 18)
def steps_that_are_done_again_are_not_among_the_announced(m: pytest.MonkeyPatch) -> None:
    """The ledger ends a run by the number of different steps."""
    m.setattr(RunRecord, "left", property(lambda self: max(self.planned - len(self.attempts), 0)))


@caught_by("test_privacy_ledger.py::test_runs_with_different_noise_add_up_as_they_are[1]", 20)
def all_runs_have_the_noise_of_the_last_one(m: pytest.MonkeyPatch) -> None:
    """What was charged is one number of steps."""

    def events(right: Any, self: Ledger) -> Any:
        found = right(self)
        return [(found[-1][0], sum(count for _, count in found))] if found else found

    wrapped(m, Ledger, "events", events)


@caught_by("test_privacy_ledger.py::test_runs_with_different_noise_add_up_as_they_are[-1]", 24)
def the_total_of_a_dataset_is_that_of_removal(m: pytest.MonkeyPatch) -> None:
    """Whatever relation was asked for."""
    wrapped(m, Ledger, "spent", lambda right, self, delta, relation="": right(self, delta))


@caught_by("test_privacy_statement.py::test_the_total_of_a_dataset_is_at_the_delta_and_in_the_relation_of_the_run", 24)
def a_statement_asks_the_ledger_for_removal(m: pytest.MonkeyPatch) -> None:
    """The run replaces units, and the total over the data is that of taking one away."""

    def guarantee(right: Any, session: Any, budget: Any) -> Any:
        book = budget.ledger
        asked = {"runs": book.runs, "charged": book.charged, "secretive": book.secretive}
        return right(
            session, SimpleNamespace(ledger=SimpleNamespace(**asked, spent=lambda delta, _: book.spent(delta)))
        )

    wrapped(m, finish, "_guarantee", guarantee)


@caught_by("test_federated_run.py::test_rounds_that_were_done_again_count_against_every_adversary", 18)
def adversaries_see_the_rounds_that_were_taken(m: pytest.MonkeyPatch) -> None:
    """A round that was lost in a crash had been sent all the same."""

    def seen(self: statement.Guarantee) -> Any:
        return statement.adversaries(self.plan, self.epsilon, self.steps_taken)

    m.setattr(statement.Guarantee, "adversaries", property(seen))


@caught_by("test_resume.py::test_changed_data_is_refused", 22)
def people_may_change_their_texts_in_the_middle_of_a_run(m: pytest.MonkeyPatch) -> None:
    """The tokens are compared when a run goes on, and whose they are is not."""
    nobody = SimpleNamespace(offsets=None, members=None)
    wrapped(m, sessions, "digest", lambda right, data: right(SimpleNamespace(examples=data.examples, units=nobody)))


@caught_by("test_auditing.py::test_what_delta_allows_proves_no_epsilon", 24)
def an_attack_takes_delta_for_epsilon(m: pytest.MonkeyPatch) -> None:
    """What may happen with probability delta is counted as a proof against epsilon: an audit that cries wolf."""
    wrapped(m, attacks, "_from_rates", lambda right, a, b, threshold, delta, *rest: right(a, b, threshold, 0.0, *rest))


@caught_by("test_auditing.py::test_bounds_hold_where_one_kind_of_scores_is_few[20000", 24)
def an_attack_takes_the_noise_for_what_it_saw_of_it(m: pytest.MonkeyPatch) -> None:
    """Forty scores say roughly how strong the noise is, and a bound needs how strong it may be."""
    chi2 = SimpleNamespace(ppf=lambda probability, freedom: freedom)
    m.setattr(attacks, "stats", SimpleNamespace(**{**vars(attacks.stats), "chi2": chi2}))
