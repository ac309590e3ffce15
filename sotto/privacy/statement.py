"""The guarantee in words, and the same for machines.

Plain words first, then unit, relation, epsilon and delta, what is released, and what is not covered. Numbers are
rounded up, never down.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

from sotto.errors import SottoError
from sotto.privacy import accounting
from sotto.privacy.plan import Plan

NOT_COVERED = (
    "Choosing hyper-parameters by looking at private results: each trial run spends budget of its own.",
    "Decisions taken after reading metrics.private.jsonl or an evaluation on private data.",
    "The text that the base model was pretrained on.",
    "People who are mentioned in somebody else's text: only whoever the unit names is protected.",
    "The data at rest, the run folder's private files, and whoever can read this machine's memory.",
    "Rounding of floating-point noise: sampling is cryptographic, in double precision, but not exact arithmetic.",
)
DELTAS = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Further points of the privacy curve that the attacker's bound is read from."""


@dataclass(frozen=True)
class Guarantee:
    """What one run earned. `epsilon` counts every step that was paid for, those lost in a crash included."""

    plan: Plan
    steps_taken: int
    steps_charged: int
    epsilon: float
    dataset_epsilon: float
    dataset_runs: int

    @property
    def mu(self) -> float:
        """The mu of the Gaussian mechanism with the same (epsilon, delta). For comparison; it is not itself a bound."""
        return accounting.gdp_mu(self.epsilon, self.plan.delta)

    def detection_rate(self, false_alarms: float) -> float:
        """An upper bound of the share of members that any attacker finds who accepts this share of false alarms.

        Every (epsilon, delta) that the run satisfies gives `exp(epsilon) * false_alarms + delta` (Wasserman and Zhou
        2010); the least over several delta is taken.
        """
        plan = self.plan
        rates = [math.exp(min(self.epsilon, 700)) * false_alarms + plan.delta]
        for delta in DELTAS if self.steps_charged else ():
            epsilon = accounting.epsilon(
                plan.noise_multiplier,
                plan.sampling_prob,
                self.steps_charged,
                delta,
                plan.neighboring_relation,
                precision="coarse",
            )
            rates.append(math.exp(min(epsilon, 700)) * false_alarms + delta)
        return min(1.0, *rates)


def earned(plan: Plan, steps_taken: int, steps_charged: int, dataset_epsilon: float, dataset_runs: int) -> Guarantee:
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
    return Guarantee(plan, steps_taken, steps_charged, epsilon, max(epsilon, dataset_epsilon), dataset_runs)


def who(plan: Plan) -> str:
    """The protected unit in words."""
    if plan.unit == "record":
        return "any single record"
    most = plan.max_examples_per_unit
    share = "the one example" if most == 1 else f"the whole set of up to {most} examples"
    return f"{share} of any one {plan.unit}"


def text(guarantee: Guarantee) -> str:
    """The statement as a page of plain text."""
    plan, g = guarantee.plan, guarantee
    epsilon = accounting.round_up(g.epsilon)
    odds = math.exp(min(g.epsilon, 700))
    relation = {
        "add_or_remove_one": "one unit added or removed",
        "replace_one": "one unit replaced by another",
    }[plan.neighboring_relation]
    lost = g.steps_charged - g.steps_taken
    found = accounting.round_up(100 * g.detection_rate(0.01), 1)
    lines = [
        "PRIVACY STATEMENT",
        "",
        *_paragraph(
            f"The released model was trained so that {who(plan)} has little influence on it: whatever anyone concludes "
            f"from the model, they would have concluded with at most {odds:.3g} times other odds had that unit not "
            f"been in the training data, except with probability {plan.delta:g}.",
            indent="",
        ),
        "",
        f"  epsilon               {epsilon}   (an upper bound, rounded up; budget {plan.epsilon:g})",
        f"  delta                 {plan.delta:g}",
        f"  protected unit        {plan.unit}: {who(plan)}",
        f"  neighbouring datasets {relation} ({plan.neighboring_relation})",
        f"  against an attacker   who accepts 1 % false alarms: at most {found} % of members are found",
        f"  for comparison        a Gaussian mechanism of this epsilon and delta has mu {accounting.round_up(g.mu)}",
        f"  public count of units {plan.num_units:,}",
        "",
        "HOW",
        *_paragraph(
            f"Each of {g.steps_taken:,} steps drew every unit independently with probability {plan.sampling_prob:.6g}, "
            f"scaled {_clipping(plan)}, added Gaussian "
            f"noise of {plan.noise_multiplier:.6g} times that norm from a cryptographic generator, and divided by the "
            f"constant {plan.expected_batch_size:,}. Epsilon was computed from privacy loss distributions "
            f"(dp-accounting). Renyi accounting of the planned steps gives {_or_dash(plan.rdp_epsilon)}. Without "
            "amplification by sampling, for passes in an order known to the attacker, epsilon would be "
            f"{_or_dash(plan.unamplified_epsilon)}."
        ),
    ]
    if lost:
        lines += [f"  {lost} step(s) were lost and done again; they are charged twice ({g.steps_charged:,} in all)."]
    lines += [
        "",
        "THIS DATASET",
        f"  Together with all runs that protect this unit on the same data ({g.dataset_runs} in the ledger) epsilon is "
        f"{accounting.round_up(g.dataset_epsilon)}.",
        "",
        "WHAT IS RELEASED",
        "  The final weights, and every intermediate checkpoint, under the same guarantee.",
        "",
        "WHAT IS NOT COVERED",
        *(f"  * {item}" for item in NOT_COVERED),
    ]
    return "\n".join(lines) + "\n"


def _clipping(plan: Plan) -> str:
    what = "each layer of its gradient, so that the whole had" if plan.layerwise else "its gradient to"
    bound = f"a norm of at most {plan.clip_norm:g} ({plan.clipping} clipping)"
    if plan.clipping == "adaptive":
        bound = (
            f"a norm of at most a bound that began at {plan.clip_norm:g} and then followed noisy counts of the units "
            "within it, which are part of what the noise below covers"
        )
    return f"{what} {bound}"


def _paragraph(words: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(words, width=100, initial_indent=indent, subsequent_indent=indent)


def _or_dash(value: float | None) -> str:
    return "not available" if value is None else accounting.round_up(value)


def machine_readable(guarantee: Guarantee, versions: dict[str, str]) -> dict[str, Any]:
    """The content of privacy.json and of the model card's `dp:` metadata."""
    plan, g = guarantee.plan, guarantee
    return {
        "private": True,
        "epsilon": float(accounting.round_up(g.epsilon, 6)),
        "delta": plan.delta,
        "unit": plan.unit,
        "max_examples_per_unit": plan.max_examples_per_unit,
        "num_units": plan.num_units,
        "neighboring_relation": plan.neighboring_relation,
        "accountant": "PLD",
        "equivalent_gdp_mu": float(accounting.round_up(g.mu, 6)),
        "members_found_at_1_percent_false_alarms": float(accounting.round_up(g.detection_rate(0.01), 6)),
        "noise_multiplier": plan.noise_multiplier,
        "sampling": "poisson",
        "sampling_prob": plan.sampling_prob,
        "steps": g.steps_taken,
        "steps_charged": g.steps_charged,
        "clip_norm": plan.clip_norm,
        "clipping": plan.clipping,
        "layerwise": plan.layerwise,
        "expected_batch_size": plan.expected_batch_size,
        "epsilon_without_amplification": plan.unamplified_epsilon,
        "dataset_epsilon": float(accounting.round_up(g.dataset_epsilon, 6)),
        "released": "final weights and all checkpoints",
        "not_covered": list(NOT_COVERED),
        "versions": versions,
    }
