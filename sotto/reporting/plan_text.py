"""A plan on one screen."""

from __future__ import annotations

import textwrap
from typing import Any

from sotto.config_split import SplitSetting
from sotto.privacy.accounting import round_up
from sotto.privacy.adversaries import adversaries, lost_rounds
from sotto.privacy.plan import Alternative, Plan
from sotto.reporting.memory_text import PARTS
from sotto.split import statement

GIB = 1024**3
FEW_LOOKS = 1000
"""Steps times directions below which a plan warns: a tenth of the shortest published runs (DPZero, Zhang et al. 2024,
arXiv:2310.09639: 10,000 steps; MeZO, Malladi et al. 2023, arXiv:2305.17333: 20,000), which start from prompts."""


def render(plan: Plan) -> str:
    """The plan as plain text: who, budget, what follows from it, alternatives, memory."""
    lines = [] if plan.split else [_who(plan), ""]
    if plan.split:
        lines += _split(plan, plan.split)
    elif plan.epsilon is None:
        lines += [
            f"NOT PRIVATE: {plan.not_private}.",
            f"steps {plan.steps:,}, about {plan.expected_batch_size:,} units each",
        ]
    else:
        lines += _budget(plan) + [""] + _alternatives(plan)
        if plan.not_private:
            lines += ["", f"NOT PRIVATE: {plan.not_private}. The numbers above are what the run would have earned."]
    if plan.setting and plan.planned_epsilon is not None and not plan.not_private:
        lines += ["", *_against(plan, plan.planned_epsilon)]
    if plan.memory:
        lines += ["", *_memory(plan.memory)]
    if plan.result:
        lines.append(f"result           {plan.result}")
    if plan.unused:
        lines += ["", unused(plan)]
    return "\n".join(lines)


def _against(plan: Plan, epsilon: float) -> list[str]:
    found = adversaries(plan, epsilon, plan.steps)
    heads = ("against others", "a server of sums", "this server")
    if plan.setting and plan.setting.get("masks"):
        heads = ("against others", "one of them", "this server", "and half of them", "without masks")
    lines = [
        f"{head:<17}" + ("no guarantee" if a.epsilon is None else f"epsilon {round_up(a.epsilon)}")
        for head, a in zip(heads, found, strict=True)
    ]
    if (lost := lost_rounds(plan)) > 0:
        lines.append(f"lost rounds      {lost:.2g} of all draw fewer than masks need; setting.dropouts makes room")
    return lines


def unused(plan: Plan) -> str:
    """Which keys were set for nothing, those of one reason together."""
    reasons = {why: [key for key in plan.unused if plan.unused[key] == why] for why in plan.unused.values()}
    return "Not used: " + "; ".join(f"{', '.join(keys)} ({why})" for why, keys in reasons.items())


def _split(plan: Plan, facts: dict[str, Any]) -> list[str]:
    """What protects a text of a split run, in the words of its statement."""
    setting = SplitSetting.model_validate({key: value for key, value in facts.items() if key != "max_length"})
    training = "This is about the training: no noise is added there"
    training += "." if setting.privatizer != "none" else " either."
    paragraphs = [*statement.planned(setting, facts["max_length"]), ("epsilon: none", training)]
    lines = [f"NOT PRIVATE: {plan.not_private}.", ""] if plan.not_private else []
    lines.append(f"split run        {plan.num_units:,} texts of a customer; the vendor trains for {plan.steps:,} steps")
    for title, words in paragraphs:
        first, *rest = textwrap.wrap(words, 103)
        lines += [f"{title:<16} {first}", *(f"{'':<16} {line}" for line in rest)]
    return lines


def _who(plan: Plan) -> str:
    most = "" if plan.unit == "record" else f", at most {plan.max_examples_per_unit} examples of each"
    return f"protected unit   {plan.unit}   ({plan.num_units:,} units{most}; {plan.neighboring_relation})"


def _budget(plan: Plan) -> list[str]:
    delta = "0 (pure)" if plan.pure else f"{plan.delta:g}"
    lines = [
        f"budget           epsilon {plan.epsilon:g}, delta {delta}",
        f"noise_multiplier {plan.noise_multiplier:.6g}" + (", of Laplace noise" if plan.pure else ""),
        f"sampling_prob    {plan.sampling_prob:.6g}   (about {plan.expected_batch_size:,} units in a step)",
        f"steps            {plan.steps:,}   (+ {plan.spare_steps} paid for in advance, in case a crash loses some)",
        f"epsilon          {round_up(plan.planned_epsilon or 0.0)} by {'sums' if plan.pure else 'PLD'}"
        + (" whenever it ends" if plan.whole else " if nothing is lost")
        + (f"; {round_up(plan.rdp_epsilon)} by RDP" if plan.rdp_epsilon else "")
        + (f"; {round_up(plan.epsilon_at(plan.counted, plan.delta))} at delta {plan.delta:g}" if plan.pure else ""),
        f"{'':<16} {round_up(plan.unamplified_epsilon or 0.0)} if batches were passes in an order that is known",
    ]
    if plan.whole:
        looks = f"after {plan.patience} look(s) at public text without a lower loss, {plan.look_every:,} step(s) apart"
        lines.insert(4, f"{'':<16} fewer, {looks}; all of them count")
    if not plan.pure:
        curve = (
            f"{round_up(plan.epsilon_at(plan.counted, plan.delta / f, 'coarse'))} at delta {plan.delta / f:g}"
            for f in (10, 100)
        )
        lines.insert(-1, f"{'':<16} {', '.join(curve)}: the same run, read at other deltas")
    lines += _probes(plan) if plan.probes else []
    if plan.delta >= 1 / plan.num_units and not plan.pure:
        lines.append(
            f"WARNING          delta is not below 1/{plan.num_units:,}: publishing one unit's text would satisfy it"
        )
    return lines


def _probes(plan: Plan) -> list[str]:
    """What a zeroth-order run looks at, and whether it can learn from that.

    A unit's K numbers are no longer than the clip norm together, so neither is their mean; the noise is known. With
    fewer looks than weights a run learns only what lies in the few dimensions it has seen.
    """
    forwards, looks = plan.passes * plan.steps * plan.expected_batch_size, plan.probes * plan.parts * plan.steps
    root = plan.probes if plan.pure else plan.probes**0.5
    # Each part is seen by so many fewer units: their numbers add up to less, and each part has noise of its own.
    longest = plan.expected_batch_size / (plan.noise_multiplier * root * plan.parts)
    each = f" in each of {plan.parts} parts" if plan.parts > 1 else ""
    lines = [
        f"probes           {plan.probes} directions in a step{each}: about {forwards:,} forward passes of an example",
        f"{'':<16} the signal of a step is at most {longest:,.{0 if longest > 9 else 1}f} times its noise",
        f"updates          {plan.optimizer}, learning rate {plan.learning_rate:.3g}"
        + (f" = {plan.learning_rate * plan.clip_norm:.3g} / clip_norm" if plan.optimizer == "sgd" else ""),
    ]
    if longest < 1:
        lines.append("WARNING          a step is more noise than signal, even if all units agree: take a larger batch, "
                     "or fewer probes")  # fmt: skip
    trained = (plan.memory or {}).get("trainable", 0)
    if looks < min(FEW_LOOKS, trained):
        lines.append(
            f"WARNING          {looks:,} directions of {trained:,} dimensions: published runs take 10,000 and more. "
            "Take more steps or probes, or train fewer weights"
        )
    return lines


def _alternatives(plan: Plan) -> list[str]:
    rows = plan.frontier()
    if (larger := plan.larger_batch()) is not None:
        rows.append(larger)
    lines = ["what if          epsilon   batch    steps   noise_multiplier   noise / batch (in clip norms)"]
    return lines + [_row(row) for row in rows]


def _row(row: Alternative) -> str:
    size = f"{row.epsilon:<9g} {row.expected_batch_size:<8,} {row.steps:<7,}"
    return f"{'':<16} {size} {row.noise_multiplier:<18.4g} {row.noise_per_coordinate:.2e}"


def _memory(memory: dict[str, int]) -> list[str]:
    parts = "  ".join(f"{name} {memory[part] / GIB:.2f}" for part, name in PARTS.items() if memory.get(part))
    lines = [
        f"memory (GiB)     {memory['total'] / GIB:.2f} at the peak, of {memory['budget'] / GIB:.1f} "
        f"({memory['microbatch_size']} examples at a time)",
        f"{'':<16} {parts}",
        f"trained          {memory['trainable']:,} parameters",
    ]
    if memory["total"] > memory["room"]:
        lines.append("WARNING          that is more than there is: 'sotto memory' shows what would fit")
    return lines
