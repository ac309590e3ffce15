"""`sotto sweep`: several trainings, of which the best is released, at a price that covers the choice."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import secrets
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sotto import begun
from sotto.config import Config
from sotto.data.load import has_eval
from sotto.errors import SottoError
from sotto.privacy import accounting, selection
from sotto.privacy.accounting import PoissonGaussian
from sotto.privacy.plan import Plan, make_plan
from sotto.privacy.selection import Law
from sotto.rundir import RunDir

FIXED = ("privacy", "run.expected_batch_size", "run.steps", "run.epochs", "run.spare_steps", "run.debug_noise_seed",
         "data", "setting", "output")  # fmt: skip
"""What no trial may change: all trials are drawn from one list and have one price."""


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do, before anything is read.

    Attributes:
      settings: the list that each trial's setting is drawn from, as overrides.
      mean, law: of the number of trials.
      epsilon, delta: of the released model, the choice included: an upper bound.
      trial_epsilon, noise_multiplier: of one trial.
    """

    settings: list[list[str]]
    mean: float
    law: Law
    epsilon: float
    delta: float
    trial_epsilon: float
    noise_multiplier: float


@dataclass
class Sweep:
    """A finished sweep: its folder, what was released, and what is promised."""

    path: Path
    setting: list[str]
    statement: str | None
    epsilon: float | None


def plan_sweep(
    config: Config, over: Mapping[str, Sequence[str]], mean: float = 5.0, law: Law = "geometric"
) -> tuple[SweepPlan, Config]:
    """Prices a sweep within `privacy.epsilon`. Reads nothing.

    Args:
      over: key -> values, as for `--set`; trials are drawn from all combinations.
      mean, law: of the number of trials.

    Returns:
      The plan, and the configuration of one trial.

    Raises:
      SottoError: SOT495, a key may not differ between trials, or the run is not of a kind that has a bound.
    """
    for key, values in over.items():
        if not values:
            raise _refused(f"no values for '{key}'", "--over", "a trial draws its value from a list",
                           "write --over SECTION.KEY=VALUE,VALUE")  # fmt: skip
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise _refused(f"'{key}' may not differ between trials", "--over",
                           "the choice has one price only if every trial has the same", "sweep other keys")  # fmt: skip
    private = config.privacy.epsilon
    bounded = config.privacy.neighboring_relation == "add_or_remove_one" and config.setting.kind == "central"
    if private == "none" or not bounded:
        raise _refused("this configuration has no bound for a choice between trials", "privacy and setting",
                       "it is proven for Gaussian noise under add_or_remove_one",
                       "use a central, private run with privacy.neighboring_relation: add_or_remove_one")  # fmt: skip
    settings = [
        [f"{key}={value}" for key, value in zip(over, values, strict=True)]
        for values in itertools.product(*over.values())
    ]
    for setting in settings:
        if config.with_overrides(setting).method.laplace:  # what is wrong with one of them is said now, too
            raise _refused("a trial would have Laplace noise", "method.zeroth_noise", "the price is that of a choice "
                           "between Gaussian releases", "set zeroth_noise: gaussian, in every trial")  # fmt: skip
    planned = make_plan(config)
    noise = selection.noise_multiplier(
        private, planned.sampling_prob, planned.total_steps, planned.delta, mean, law
    )  # fmt: skip
    while True:
        each = accounting.epsilon(noise, planned.sampling_prob, planned.total_steps, planned.delta)
        trial = config.with_overrides([f"privacy.epsilon={each!r}", "output.export=merged"])
        plan = make_plan(trial)
        event = PoissonGaussian(plan.noise_multiplier, plan.sampling_prob)
        total = selection.epsilon(event, plan.total_steps, plan.delta, mean, law)
        if total <= private:
            break
        noise *= 1 + 1e-3  # the noise that a trial is given for its epsilon is a little less than this one
    return SweepPlan(settings, mean, law, total, plan.delta, each, plan.noise_multiplier), trial


def sweep(
    config: Config,
    over: Mapping[str, Sequence[str]],
    mean: float = 5.0,
    law: Law = "geometric",
    public_eval: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Sweep:
    """Trains a random number of models with settings drawn from a list, and releases the best on public data.

    The dataset's ledger is charged for every trial as if all of them were released, which is more than the choice
    costs. What is not released (other models, scores, the number of trials) is private, and deleted at the end.

    Args:
      over, mean, law: as for `plan_sweep`.
      public_eval: that `data.eval` is public, or consented to: no bound here covers scores on private data.
      progress: called after each trial with its number and the number of trials, both private.

    A sweep that is stopped cannot be continued: the number of trials would have been drawn twice. What it trained stays
    charged.

    Raises:
      SottoError: SOT495, as for `plan_sweep`, or the scores would not be public; those of `sotto.train`.
    """
    planned, trial = plan_sweep(config, over, mean, law)
    if not has_eval(config.data) or not public_eval:
        raise _refused("there are no public scores to choose by", "data.eval",
                       "a score on private data is a release of its own, and is not paid for here",
                       "name public data in data.eval, and say so with --public-eval")  # fmt: skip
    folder = Path(config.output.dir) / f"{datetime.date.today().isoformat()}_sweep_{secrets.token_hex(3)}"
    begun.note(folder, "A sweep cannot be continued. What its trials have spent stays charged: see 'sotto ledger'.")
    (folder / "private").mkdir(parents=True)
    (folder / "private").chmod(0o700)
    random = secrets.SystemRandom()
    drawn = [random.choice(planned.settings) for _ in range(selection.draw_trials(mean, law))]
    best: tuple[float, Path, list[str]] | None = None
    price = make_plan(trial).event
    for number, setting in enumerate(drawn):
        path, score = _one(trial, setting, folder / "private" / "trials")
        if RunDir.open(path).plan().event != price:
            raise _refused("a trial does not release what was priced", "--over", "the choice has one price only if "
                           "every trial has the same; nothing is released", "report this, with the keys")  # fmt: skip
        if best is None or score > best[0]:
            best = (score, path, setting)
        progress(number + 1, len(drawn))
    assert best is not None
    words, facts = _release(planned, best[1], best[2], folder, config.output.export)
    shutil.rmtree(folder / "private")
    return Sweep(folder, best[2], words, facts.get("epsilon"))


def _one(trial: Config, setting: list[str], folder: Path) -> tuple[Path, float]:
    """One training; its run folder and its score, which is larger for a better model."""
    from sotto import commands, session

    config = trial.with_overrides([*setting, f"output.dir={folder}"])
    run = commands.run_session(session.start(config, "trial", trial=True), None)
    if not run.finished:
        raise KeyboardInterrupt
    scores = commands.evaluate(run.path)
    score = scores["accuracy"] if "accuracy" in scores else -scores["nats_per_token"]
    # The price is that of the best in one order: what is no number has no place in it, and would win if it came first.
    return run.path, -math.inf if math.isnan(score) else score


def _release(
    planned: SweepPlan, path: Path, setting: list[str], folder: Path, export: str
) -> tuple[str | None, dict[str, Any]]:
    """Writes the chosen model with the statement of the sweep."""
    from sotto import finish

    run = RunDir.open(path)
    plan, config = run.plan(), run.config()
    if plan.not_private:
        words, facts = None, {"private": False, "reason": plan.not_private}
    else:
        words, facts = text(planned, plan, setting), _facts(planned, run.read_json("privacy.json"))
    if export != "none":
        trained = replace(finish.reopen(run, config), title=folder.name)
        finish.write_model(trained, folder / "model", export, facts if words else None, words)  # type: ignore[arg-type]
    _write(folder / "sweep.json", {**asdict(planned), "setting": setting})
    if words is not None:
        (folder / "statement.txt").write_text(words)
    _write(folder / "privacy.json", facts)
    return words, facts


def _facts(planned: SweepPlan, trial: dict[str, Any]) -> dict[str, Any]:
    """privacy.json of the sweep: that of the trial, where it speaks of the whole.

    What the ledger knew when the chosen trial ended tells how many there had been, and the bound rests on that number
    being secret.
    """
    of_trial = ("equivalent_gdp_mu", "members_found_at_1_percent_false_alarms", "epsilon_without_amplification")
    of_ledger = ("steps_charged", "dataset_epsilon", "dataset_runs")
    kept = {key: value for key, value in trial.items() if key not in of_trial + of_ledger}
    return {
        **kept,
        "epsilon": float(accounting.round_up(planned.epsilon, 6)),
        "delta": planned.delta,
        "accountant": "RDP, private selection",
        "selection": {"mean_trials": planned.mean, "law": planned.law, "settings": len(planned.settings)},
    }


def text(planned: SweepPlan, plan: Plan, setting: list[str]) -> str:
    """The statement of a sweep."""
    from sotto.privacy.statement import not_covered, who

    chosen = ", ".join(setting) or "the configuration as it is"
    return (
        "\n".join(
            [
                "PRIVACY STATEMENT OF A SWEEP",
                "",
                *textwrap.wrap(
                    f"The released model is the best of several, chosen by its score on public data. It was made so "
                    f"that {who(plan)} has little influence on it, the choice included.",
                    width=100,
                ),
                "",
                f"  epsilon               {accounting.round_up(planned.epsilon)}   (an upper bound, rounded up)",
                f"  delta                 {planned.delta:g}",
                f"  protected unit        {plan.unit}: {who(plan)}",
                f"  neighbouring datasets one unit added or removed ({plan.neighboring_relation})",
                f"  public count of units {plan.num_units:,}",
                "",
                "HOW",
                f"  The number of trainings was drawn from a {planned.law} law of mean {planned.mean:g} and is not "
                f"published.",
                f"  Each had a setting drawn from {len(planned.settings)} settings. The released one: {chosen}.",
                f"  One training alone, of {plan.steps:,} steps with noise multiplier {plan.noise_multiplier:.6g} and",
                f"  sampling probability {plan.sampling_prob:.6g}, costs epsilon "
                f"{accounting.round_up(planned.trial_epsilon)}.",
                "  Epsilon is the Renyi bound of Papernot and Steinke 2022 (arXiv:2110.03620), from dp-accounting.",
                "",
                "WHAT IS RELEASED",
                "  The chosen model and its setting. Other models, all scores and the number of trainings are private.",
                "",
                "WHAT IS NOT COVERED",
                *(f"  * {item}" for item in not_covered(plan)[1:]),
            ]
        )
        + "\n"
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)


def _refused(what: str, where: str, why: str, fix: str) -> SottoError:
    return SottoError("SOT495", what=what, where=where, why=why, fix=fix)
