"""The words that the data protection officer signs: right numbers, rounded up, and nothing for a run without them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pytest

from sotto import finish
from sotto.config import Config
from sotto.errors import SottoError
from sotto.privacy import accounting, statement
from sotto.privacy.ledger import Ledger
from sotto.privacy.plan import Plan, make_plan
from sotto.reporting import card, plan_text


def config(**privacy: object) -> Config:
    return Config.from_dict(
        {
            "model": {"name": "tiny"},
            "data": {"train": "x.csv", "text": "note", "label": "code", "labels": ["a", "b"]},
            "privacy": {"unit": "patient_id", "epsilon": 3.0, "num_units": 1275, "max_examples_per_unit": 4, **privacy},
            "run": {"expected_batch_size": 80, "steps": 40},
        }
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(config())


def test_plan_pays_for_spare_steps_within_the_budget(plan: Plan) -> None:
    assert plan.spare_steps == 1
    assert plan.epsilon_after(plan.total_steps) <= 3.0
    assert plan.planned_epsilon is not None
    assert plan.planned_epsilon < 3.0
    assert plan.sampling_prob == 80 / 1275


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_plan_accounts_for_the_noise_the_relation_and_the_delta_that_it_names(relation: str) -> None:
    """Against the accountant itself, not against other numbers of the plan."""
    made = make_plan(config(neighboring_relation=relation, delta=1e-6))
    assert (made.neighboring_relation, made.delta, made.epsilon) == (relation, 1e-6, 3.0)
    assert made.event == accounting.PoissonGaussian(made.noise_multiplier, 80 / 1275)

    def spent(steps: int) -> float:
        return accounting.epsilon(made.noise_multiplier, 80 / 1275, steps, 1e-6, relation)

    assert 0.99 * 3.0 < spent(made.steps + made.spare_steps) <= 3.0
    for steps in (1, made.steps, made.total_steps):
        assert made.epsilon_after(steps) == spent(steps)
    assert made.planned_epsilon == spent(made.steps)
    assert made.unamplified_epsilon == accounting.epsilon_without_amplification(
        made.noise_multiplier, 3, 1e-6, relation
    )
    renyi = accounting.epsilon(made.noise_multiplier, 80 / 1275, made.steps, 1e-6, accountant="rdp")
    assert made.rdp_epsilon == (renyi if relation == "add_or_remove_one" else None)
    assert all(made.frontier([e])[0].noise_multiplier > 0.99 * made.noise_multiplier for e in (1.0, 3.0))


def test_noise_is_as_small_as_the_budget_allows(plan: Plan) -> None:
    spent = accounting.epsilon(plan.noise_multiplier * 0.99, plan.sampling_prob, plan.total_steps, plan.delta)
    assert spent > 3.0


def test_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_frontier_is_monotone(plan: Plan) -> None:
    noise = [row.noise_multiplier for row in plan.frontier()]
    assert noise == sorted(noise, reverse=True)
    larger = plan.larger_batch()
    assert larger is not None
    assert larger.expected_batch_size == 160
    assert dataclasses.replace(plan, num_units=100).larger_batch() is None


def test_redone_steps_are_charged(plan: Plan) -> None:
    once = statement.earned(plan, 40, 40, 0.0, 1)
    again = statement.earned(plan, 40, 41, 0.0, 1)
    assert again.epsilon > once.epsilon
    assert "1 step(s) were lost and done again" in statement.text(again)
    # 40 steps of 80 in 1,275 are three passes over the data, 48 are four.
    known = [accounting.epsilon_without_amplification(plan.noise_multiplier, n, plan.delta) for n in (3, 4)]
    many = statement.earned(plan, 40, 48, 0.0, 1)
    assert [once.unamplified_epsilon, many.unamplified_epsilon] == known
    assert f"order known to the attacker, epsilon would be {accounting.round_up(known[1])}." in " ".join(
        statement.text(many).split()
    )
    assert statement.machine_readable(many, {})["epsilon_without_amplification"] == known[1]
    assert "lost" not in statement.text(once).split("HOW")[1].split("THIS DATASET")[0]


def test_dataset_total_is_never_below_the_run(plan: Plan) -> None:
    assert statement.earned(plan, 40, 40, 0.5, 2).dataset_epsilon >= plan.epsilon_after(40)


def test_the_total_of_a_dataset_is_at_the_delta_and_in_the_relation_of_the_run(tmp_path: Path) -> None:
    made = dataclasses.replace(make_plan(config(neighboring_relation="replace_one")), sampling_prob=1.0)
    book = Ledger.open("notes", tmp_path)
    for run in ("earlier", "this"):
        book.open_run(run, made.event, 9, delta=made.delta, neighboring_relation="replace_one")
        for step in range(9):
            book.reserve(run, step, made.event)
    session: Any = SimpleNamespace(plan=made, step=9, run=SimpleNamespace(id="this"))
    found = finish._guarantee(session, SimpleNamespace(ledger=book))  # type: ignore[arg-type]
    mu = 2 * 18**0.5 / made.noise_multiplier  # without sampling, and for two sums that are twice as far apart
    whole = accounting.composed_epsilon([(accounting.Gaussian(1 / mu), 1)], made.delta)
    assert found.dataset_epsilon == pytest.approx(whole, rel=1e-9)
    assert (found.dataset_runs, found.steps_charged) == (2, 9)


def test_no_statement_without_a_guarantee() -> None:
    for not_private in (
        make_plan(config(epsilon="none")),
        dataclasses.replace(make_plan(config()), not_private="debug"),
    ):
        with pytest.raises(SottoError, match="no guarantee"):
            statement.earned(not_private, 40, 40, 0.0, 1)


@pytest.mark.parametrize(
    ("value", "shown"), [(2.9991, "3.000"), (3.0, "3.000"), (3.00001, "3.001"), (float("inf"), "infinite")]
)
def test_numbers_are_rounded_up(value: float, shown: str) -> None:
    assert accounting.round_up(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(52.1428, "52.2"), (52.2, "52.3"), (1.0, "1"), (2980.96, "2,990"), (99.95, "100"), (2.0e9 + 1, "2.01e+9"),
     (0.01234, "0.0124"), (float("inf"), "infinite")],
)  # fmt: skip
def test_what_is_said_to_be_at_most_is_rounded_up(value: float, shown: str) -> None:
    """52.2 as a float lies above 52.2, so even that goes up."""
    assert accounting.round_up_figures(value) == shown


def test_the_odds_of_the_promise_are_not_below_those_of_epsilon(plan: Plan) -> None:
    for epsilon in (0.3, 2.951, 3.953987, 8.0):
        said = statement.promise(dataclasses.replace(statement.earned(plan, 40, 40, 0.0, 1), epsilon=epsilon))
        (odds,) = re.findall(r"at most (\S+) times other odds", said)
        assert math.exp(epsilon) <= float(odds.replace(",", "")) < 1.01 * math.exp(epsilon)


def test_attackers_bound_is_proven_and_not_trivial(plan: Plan) -> None:
    guarantee = statement.earned(plan, 40, 40, 0.0, 1)
    found = guarantee.detection_rate(0.01)
    # The exact trade-off of 40 sampled Gaussians lies below every (epsilon, delta) line and above that of no attack.
    assert 0.01 < found <= 0.01 * 2.718281828**guarantee.epsilon + plan.delta
    assert guarantee.detection_rate(0.5) > found


def test_attackers_bound_is_not_below_what_an_attacker_reaches(plan: Plan) -> None:
    """Without sampling, the best attack on Gaussian noise is known exactly."""
    exposed = dataclasses.replace(plan, sampling_prob=1.0, noise_multiplier=10.0)
    guarantee = statement.earned(exposed, 40, 40, 0.0, 1)
    for false_alarms in (0.001, 0.01, 0.1, 0.5):
        reached = accounting.attack_tradeoff(40**0.5 / 10.0, false_alarms)
        assert reached <= guarantee.detection_rate(false_alarms) <= 1.0
    assert guarantee.detection_rate(0.01) < 1.0


@pytest.mark.parametrize(
    ("unit", "most", "words"),
    [
        ("record", 1, "any single record"),
        ("patient_id", 1, "the one example of any one patient_id"),
        ("patient_id", 4, "the whole set of up to 4 examples of any one patient_id"),
    ],
)
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_every_number_of_the_statement_is_what_was_earned(unit: str, most: int, words: str, relation: str) -> None:
    made = make_plan(config(unit=unit, max_examples_per_unit=most, neighboring_relation=relation))
    guarantee = statement.earned(made, 38, 41, 2.5 + made.epsilon_after(41), 3)
    epsilon = accounting.epsilon(made.noise_multiplier, made.sampling_prob, 41, made.delta, relation)
    shown, mu, found = accounting.round_up(epsilon), guarantee.mu, guarantee.detection_rate(0.01)
    normal = NormalDist()  # the Gaussian mechanism of this mu has this epsilon at this delta (Balle and Wang 2018)
    unamplified = accounting.epsilon_without_amplification(made.noise_multiplier, 3, made.delta, relation)
    lost = normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
    assert lost == pytest.approx(made.delta, rel=1e-4)
    text = " ".join(statement.text(guarantee).split())
    known = made.rdp_epsilon is not None and f"of the planned steps gives {accounting.round_up(made.rdp_epsilon)}."
    for part in (
        f"Renyi accounting {known or 'is not available for this plan.'}",
        f"trained so that {words} has little influence",
        f"at most {accounting.round_up_figures(math.exp(epsilon))} times other odds",
        f"except with probability {made.delta:g}.",
        f"epsilon {shown} (an upper bound, rounded up; budget 3)",
        f"protected unit {unit}: {words}",
        f"({relation})",
        f"of this epsilon and delta has mu {accounting.round_up(mu)} ",
        f"at most {accounting.round_up(100 * found, 1)} % of members are found",
        f"Each of 38 steps drew every unit independently with probability {made.sampling_prob:.6g}",
        f"noise of {made.noise_multiplier:.6g} times that norm",
        "3 step(s) were lost and done again; they are charged twice (41 in all)",
        f"(3 in the ledger) epsilon is {accounting.round_up(2.5 + epsilon)}.",
        f"for passes in an order known to the attacker, epsilon would be {accounting.round_up(unamplified)}.",
    ):
        assert part in text, part
    facts = statement.machine_readable(guarantee, {})
    assert epsilon <= facts["epsilon"] < epsilon + 2e-6
    assert 2.5 + epsilon <= facts["dataset_epsilon"] < 2.5 + epsilon + 2e-6
    assert (facts["steps"], facts["steps_charged"], facts["unit"], facts["max_examples_per_unit"]) == (
        38,
        41,
        unit,
        most,
    )
    assert (facts["neighboring_relation"], facts["delta"], facts["num_units"]) == (relation, made.delta, 1275)
    assert (facts["noise_multiplier"], facts["sampling_prob"]) == (made.noise_multiplier, 80 / 1275)
    assert mu <= facts["equivalent_gdp_mu"] < mu + 2e-6
    assert found <= facts["members_found_at_1_percent_false_alarms"] < found + 2e-6
    assert facts["epsilon_without_amplification"] == unamplified
    for exact in (False, True):
        other = dataclasses.replace(guarantee, plan=dataclasses.replace(made, exact_noise=exact))
        assert statement.machine_readable(other, {})["exact_noise"] is exact
        assert ("as exact integers on a public grid" in " ".join(statement.text(other).split())) is exact
        assert (statement.FLOAT_NOISE in statement.text(other)) is not exact


def test_text_names_everything(plan: Plan) -> None:
    text = statement.text(statement.earned(plan, 40, 40, 0.0, 1))
    for word in ("PRIVACY STATEMENT", "patient_id", "add_or_remove_one", "1e-05", "1,275", "NOT COVERED", "Renyi"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 115


def test_machine_readable_matches(plan: Plan) -> None:
    guarantee = statement.earned(plan, 40, 40, 0.0, 1)
    facts = statement.machine_readable(guarantee, {"sotto": "0"})
    assert facts["epsilon"] >= guarantee.epsilon - 1e-12
    assert json.loads(json.dumps(facts)) == facts


def test_card_carries_the_guarantee(plan: Plan) -> None:
    import yaml

    guarantee = statement.earned(plan, 40, 40, 0.0, 1)
    facts = statement.machine_readable(guarantee, {})
    text = card.render(base="tiny", title="t", task="classification", form="plain", privacy=facts,
                       statement=statement.text(guarantee), reason=None)  # fmt: skip
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["dp"]["epsilon"] == facts["epsilon"]
    assert "PRIVACY STATEMENT" in text


def test_card_of_a_run_without_guarantee_says_so() -> None:
    text = card.render(
        base="tiny", title="t", task="generation", form="adapter", privacy=None, statement=None, reason="x"
    )
    assert "**NOT PRIVATE.**" in text
    assert "private: false" in text


def test_plan_text_warns_of_a_large_delta() -> None:
    assert "WARNING" in plan_text.render(make_plan(config(delta=0.01)))
    assert "WARNING" not in plan_text.render(make_plan(config()))
    assert "NOT PRIVATE" in plan_text.render(make_plan(config(epsilon="none")))
