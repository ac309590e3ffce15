"""The guarantee in words, and the same for machines.

Plain words first, then unit, relation, epsilon and delta, what is released, and what is not covered. Numbers are
rounded up, never down.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sotto.errors import SottoError
from sotto.privacy import accounting
from sotto.privacy.adversaries import Adversary, adversaries
from sotto.privacy.plan import Plan

NOT_COVERED = (
    "Choosing hyper-parameters by looking at private results: each trial run spends budget of its own.",
    "Decisions taken after reading metrics.private.jsonl or an evaluation on private data.",
    "The text that the base model was pretrained on.",
    "People who are mentioned in somebody else's text: only whoever the unit names is protected.",
    "The data at rest, the run folder's private files, and whoever can read this machine's memory.",
    "Rounding of clipped gradients, which are computed in floating point and not exactly.",
)
FLOAT_NOISE = (
    "Rounding of floating-point noise: sampling is cryptographic, in double precision, but not exact arithmetic."
)
DELTAS = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Further points of the privacy curve that the attacker's bound is read from."""


@dataclass(frozen=True)
class Guarantee:
    """What one run earned. `epsilon` counts every step that was paid for, those lost in a crash included.

    `dataset_epsilon`, `dataset_runs`: of all runs on the data; None where a sweep was among them, because the number of
    its trials must stay secret.
    """

    plan: Plan
    steps_taken: int
    steps_charged: int
    epsilon: float
    dataset_epsilon: float | None
    dataset_runs: int | None

    @classmethod
    def from_facts(cls, plan: Plan, facts: Mapping[str, Any]) -> Guarantee:
        """What `machine_readable` wrote, with its numbers as they were rounded there: up."""
        return cls(
            plan,
            facts["steps"],
            facts["steps_charged"],
            facts["epsilon"],
            facts["dataset_epsilon"],
            facts["dataset_runs"],
        )

    @property
    def delta(self) -> float:
        """The delta at which `epsilon` holds."""
        return 0.0 if self.plan.pure else self.plan.delta

    @property
    def epsilon_at_delta(self) -> float:
        """Epsilon at the plan's delta, which a pure guarantee has as well."""
        return self.plan.epsilon_at(self.steps_charged, self.plan.delta) if self.plan.pure else self.epsilon

    @property
    def unamplified_epsilon(self) -> float:
        """What is left without amplification by sampling, of every step that was paid for."""
        return self.plan.unamplified_after(self.steps_charged)

    @property
    def adversaries(self) -> list[Adversary]:
        """Against whom a federated run protects, and how far; empty for a central one."""
        return adversaries(self.plan, self.epsilon, self.steps_charged) if self.plan.setting else []

    @property
    def mu(self) -> float:
        """The mu of the Gaussian mechanism with the same (epsilon, delta). For comparison; it is not itself a bound."""
        return accounting.gdp_mu(self.epsilon_at_delta, self.plan.delta)

    def detection_rate(self, false_alarms: float) -> float:
        """An upper bound of the share of members that any attacker finds who accepts this share of false alarms.

        Every (epsilon, delta) that the run satisfies gives `exp(epsilon) * false_alarms + delta` (Wasserman and Zhou
        2010); the least over several delta is taken.
        """
        plan = self.plan
        rates = [math.exp(min(self.epsilon, 700)) * false_alarms + self.delta]
        for delta in DELTAS if self.steps_charged else ():
            epsilon = plan.epsilon_at(self.steps_charged, delta, "coarse")
            rates.append(math.exp(min(epsilon, 700)) * false_alarms + delta)
        return min(1.0, *rates)


def earned(
    plan: Plan, steps_taken: int, steps_charged: int, dataset_epsilon: float | None, dataset_runs: int | None
) -> Guarantee:
    """The guarantee of a finished run.

    Raises:
      SottoError: the run is not private, so that no statement may be written about it.
    """
    if not plan.private:
        raise SottoError(
            "SOT490", what="there is no guarantee to state", where="statement", why=str(plan.not_private),
            fix="train with a budget and without debug_noise_seed",
        )  # fmt: skip
    epsilon = plan.epsilon_after(steps_charged) if steps_charged else 0.0
    own = epsilon if not plan.pure else plan.epsilon_at(steps_charged, plan.delta)
    total = None if dataset_epsilon is None else max(own, dataset_epsilon)
    return Guarantee(plan, steps_taken, steps_charged, epsilon, total, dataset_runs)


def who(plan: Plan) -> str:
    """The protected unit in words."""
    if plan.unit == "record":
        return "any single record"
    most = plan.max_examples_per_unit
    share = "the one example" if most == 1 else f"the whole set of up to {most} examples"
    return f"{share} of any one {plan.unit}"


RELATIONS = {
    "add_or_remove_one": "one unit added or removed",
    "replace_one": "one unit replaced by another",
}
"""The neighbouring relations in words."""
RELEASED = "The final weights, and every intermediate checkpoint, under the same guarantee."


def promise(guarantee: Guarantee) -> str:
    """The guarantee as one sentence without its terms."""
    odds = accounting.round_up_figures(math.exp(min(guarantee.epsilon, 700)))
    return (
        f"The released model was trained so that {who(guarantee.plan)} has little influence on it: whatever anyone "
        f"concludes from the model, they would have concluded with at most {odds} times other odds had that unit "
        f"not been in the training data{_except(guarantee)}."
    )


def how(guarantee: Guarantee) -> str:
    """What was done in each step, and how epsilon follows from it."""
    plan, g = guarantee.plan, guarantee
    return (
        f"Each of {g.steps_taken:,} steps drew every unit independently with probability {plan.sampling_prob:.6g}, "
        f"scaled {_clipping(plan)}, added {plan.noise.capitalize()} "
        f"noise of {plan.noise_multiplier:.6g} times that norm from a cryptographic generator"
        f"{' as exact integers on a public grid' if plan.exact_noise else ''}, and divided by the "
        f"constant {plan.expected_batch_size:,}. {_accounting(plan)} Without "
        "amplification by sampling, for passes in an order known to the attacker, epsilon would be "
        f"{accounting.round_up(g.unamplified_epsilon)}."
    )


def lost_steps(guarantee: Guarantee) -> str | None:
    """What was paid for and is not in the model, or None."""
    plan, lost = guarantee.plan, guarantee.steps_charged - guarantee.steps_taken
    if plan.whole:
        return (
            f"The run could end early, by looks at released weights and public text, {plan.look_every} step(s) apart. "
            f"When it ended is a release too, so all {guarantee.steps_charged:,} steps that it might have taken are "
            "charged."
        )
    if not lost:
        return None
    return f"{lost} step(s) were lost and done again; they are charged twice ({guarantee.steps_charged:,} in all)."


def dataset(guarantee: Guarantee) -> str:
    """What all runs on the same data cost together."""
    plan, g = guarantee.plan, guarantee
    if g.dataset_epsilon is None:
        return (
            "What all runs on the same data cost together is in the ledger, for the owner of the data alone: a sweep "
            "was among them, and how many trainings that took must stay secret."
        )
    return (
        f"Together with all runs that protect this unit on the same data ({g.dataset_runs} in the ledger) epsilon is "
        f"{accounting.round_up(g.dataset_epsilon)}{f' at delta {plan.delta:g}' if plan.pure else ''}."
    )


def text(guarantee: Guarantee) -> str:
    """The statement as a page of plain text."""
    plan, g = guarantee.plan, guarantee
    found = accounting.round_up(100 * g.detection_rate(0.01), 1)
    lost = lost_steps(g)
    lines = [
        "PRIVACY STATEMENT",
        "",
        *_paragraph(promise(g), indent=""),
        "",
        f"  epsilon               {accounting.round_up(g.epsilon)}   (an upper bound, rounded up; "
        f"budget {plan.epsilon:g})",
        *_delta(g),
        f"  protected unit        {plan.unit}: {who(plan)}",
        f"  neighbouring datasets {RELATIONS[plan.neighboring_relation]} ({plan.neighboring_relation})",
        f"  against an attacker   who accepts 1 % false alarms: at most {found} % of members are found",
        f"  for comparison        a Gaussian mechanism of this epsilon and delta has mu {accounting.round_up(g.mu)}",
        f"  public count of units {plan.num_units:,}",
        "",
        "HOW",
        *_paragraph(how(g)),
        *(_paragraph(lost) if lost else []),
        *_against_whom(g),
        "",
        "THIS DATASET",
        f"  {dataset(g)}",
        "",
        "WHAT IS RELEASED",
        f"  {RELEASED}",
        "",
        "WHAT IS NOT COVERED",
        *(f"  * {item}" for item in not_covered(plan)),
    ]
    return "\n".join(lines) + "\n"


def not_covered(plan: Plan) -> list[str]:
    return [*NOT_COVERED, *([] if plan.exact_noise else [FLOAT_NOISE])]


def _against_whom(g: Guarantee) -> list[str]:
    if not g.adversaries:
        return []
    lines = ["", "AGAINST WHOM"]
    for a in g.adversaries:
        lines += _paragraph(f"* {a.who}: {bound_of(a)}. Sees {a.sees}. Because: {a.because}.")
    return lines


def bound_of(adversary: Adversary) -> str:
    """What is promised against one adversary."""
    return "NO GUARANTEE" if adversary.epsilon is None else f"epsilon {accounting.round_up(adversary.epsilon)}"


def _except(g: Guarantee) -> str:
    return f", except with probability {g.delta:g}" if g.delta else ""


def _delta(g: Guarantee) -> list[str]:
    if g.delta:
        return [f"  delta                 {g.delta:g}"]
    also = accounting.round_up(g.epsilon_at_delta)
    return ["  delta                 0   (pure)", f"  also                  epsilon {also} at delta {g.plan.delta:g}"]


def _accounting(plan: Plan) -> str:
    if plan.pure:
        return "Epsilon is the exact sum over all steps, each amplified by sampling."
    renyi = "is not available for this plan"
    if plan.rdp_epsilon is not None:
        renyi = f"of the planned steps gives {accounting.round_up(plan.rdp_epsilon)}"
    return f"Epsilon was computed from privacy loss distributions (dp-accounting). Renyi accounting {renyi}."


def _clipping(plan: Plan) -> str:
    what = "each layer of its gradient, so that the whole had" if plan.layerwise else "its gradient to"
    if plan.setting and plan.setting["sites"] is None:
        codec = "" if plan.setting["codec"] == "none" else f", encoded as {plan.setting['latent']:,} numbers,"
        rows = plan.setting.get("embedding_rows")
        some = f", of the token embedding {rows:,} rows that are public," if rows else ""
        what = f"what its device would change of the weights{some}{codec} to"
    if plan.probes:
        within = f" within one of {plan.parts} parts of the weights, by a public draw," if plan.parts > 1 else ""
        what = f"the change of its loss along one public random direction{within} to"
        if plan.probes > 1:
            along = f"along public random directions{within or ','} as one vector, to"
            what = f"the {plan.probes} changes of its loss {along}"
    norm = "an L1 norm" if plan.pure else "a norm"
    bound = f"{norm} of at most {plan.clip_norm:g} ({plan.clipping} clipping)"
    if plan.clipping == "adaptive":
        bound = (
            f"a norm of at most a bound that began at {plan.clip_norm:g} and then followed noisy counts of the units "
            "within it, which are part of what the noise below covers"
        )
    return f"{what} {bound}"


def _paragraph(words: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(words, width=100, initial_indent=indent, subsequent_indent=indent)


def machine_readable(guarantee: Guarantee, versions: dict[str, str]) -> dict[str, Any]:
    """The content of privacy.json and of the model card's `dp:` metadata."""
    plan, g = guarantee.plan, guarantee
    return {
        "private": True,
        "epsilon": float(accounting.round_up(g.epsilon, 6)),
        "delta": g.delta,
        "unit": plan.unit,
        "max_examples_per_unit": plan.max_examples_per_unit,
        "num_units": plan.num_units,
        "neighboring_relation": plan.neighboring_relation,
        "accountant": "exact composition" if plan.pure else "PLD",
        "equivalent_gdp_mu": float(accounting.round_up(g.mu, 6)),
        "members_found_at_1_percent_false_alarms": float(accounting.round_up(g.detection_rate(0.01), 6)),
        "noise": plan.noise,
        "noise_multiplier": plan.noise_multiplier,
        "exact_noise": plan.exact_noise,
        "sampling": "poisson",
        "sampling_prob": plan.sampling_prob,
        "steps": g.steps_taken,
        "steps_charged": g.steps_charged,
        "patience": plan.patience or None,
        "look_every": plan.look_every or None,
        "clip_norm": plan.clip_norm,
        "clipping": plan.clipping,
        "layerwise": plan.layerwise,
        "numbers_released_per_step": plan.probes * plan.parts or None,
        "expected_batch_size": plan.expected_batch_size,
        "epsilon_without_amplification": g.unamplified_epsilon,
        "dataset_epsilon": None if (total := g.dataset_epsilon) is None else float(accounting.round_up(total, 6)),
        "dataset_runs": g.dataset_runs,
        "released": "final weights and all checkpoints",
        "not_covered": not_covered(plan),
        "adversaries": [a.to_dict() for a in g.adversaries] or None,
        "versions": versions,
    }
