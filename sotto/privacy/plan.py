"""The plan: the one frozen object in which sampling, clipping, noise and accounting meet.

Nothing else in Sotto derives a sampling probability, a divisor or a noise scale, so no two parts can disagree. A plan
is made from the configuration alone: it touches neither the data nor the model's weights.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from sotto.config import Config
from sotto.privacy import accounting
from sotto.privacy.accounting import PoissonGaussian, PoissonLaplace

EPSILONS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Alternative:
    """One row of what else the same data could give: a budget, a batch and the noise that they imply."""

    epsilon: float
    expected_batch_size: int
    steps: int
    noise_multiplier: float

    @property
    def noise_per_coordinate(self) -> float:
        """Standard deviation of the noise on the mean update, in clip norms: what utility feels."""
        return self.noise_multiplier / self.expected_batch_size


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it will cost.

    Attributes:
      unit, num_units, max_examples_per_unit, neighboring_relation: who is protected.
      epsilon, delta: the budget; epsilon is None when the run is not private.
      sampling_prob: the probability with which each unit joins a step, expected_batch_size / num_units.
      steps, spare_steps: steps to take, and those paid for in advance so that a crash does not shorten the run.
      noise_multiplier: standard deviation of the noise over the sensitivity. Calibrated so that steps + spare_steps
        fit the budget; never rounded down.
      planned_epsilon: the epsilon of `counted` steps (PLD, an upper bound).
      rdp_epsilon: the same by Renyi accounting, always the larger one; for comparison with other tools.
      unamplified_epsilon: what holds if batches had been passes over the data in an order known to the attacker.
      not_private: why there is no guarantee, or None.
      layerwise: every layer of a unit's gradient is clipped on its own; the noise covers all of them together.
      probes: how many numbers a step releases with zeroth-order gradients; 0 when it releases gradients.
      passes: forward passes of an example in a step, with zeroth-order gradients.
      optimizer, learning_rate: what turns releases into weights; post-processing.
      noise: the law of the noise. Laplace: numbers are clipped in L1 norm, and epsilon holds at delta 0.
      exact_noise: releases are whole multiples of a public grid, with exact noise; else noise is in float64.
      patience, look_every: of the rule that may end the run early, by public text; 0 where there is none.
      setting: of a federated run, what its section `setting` says; else None.
      split: of a split run, the same, and `data.max_length`; else None. What it promises is about what leaves.
      unused: keys of the configuration that were set and change nothing, and why.
      result: what `model/` will hold, and what cannot be merged into plain weights.
      memory: predicted bytes by part and the microbatch size that fits; performance only.
    """

    unit: str
    num_units: int
    max_examples_per_unit: int
    neighboring_relation: Literal["add_or_remove_one", "replace_one"]
    epsilon: float | None
    delta: float
    expected_batch_size: int
    sampling_prob: float
    steps: int
    spare_steps: int
    clip_norm: float
    clipping: str
    noise_multiplier: float
    planned_epsilon: float | None
    rdp_epsilon: float | None
    unamplified_epsilon: float | None
    not_private: str | None
    layerwise: bool = False
    probes: int = 0
    passes: int = 0
    optimizer: str = ""
    learning_rate: float = 0.0
    noise: Literal["gaussian", "laplace"] = "gaussian"
    exact_noise: bool = False
    patience: int = 0
    look_every: int = 0
    setting: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    unused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    result: str = ""
    memory: dict[str, int] | None = None

    @property
    def private(self) -> bool:
        return self.not_private is None

    @property
    def parts(self) -> int:
        """Into how many parts the trained tensors are split, of which a unit looks at one in each step."""
        return (self.setting or {}).get("parts", 1)

    @property
    def total_steps(self) -> int:
        """Steps that the budget pays for. The step after the last of them is never taken."""
        return self.steps + self.spare_steps

    @property
    def whole(self) -> bool:
        """Whether all planned steps count, taken or not: how many are taken depends on what they release."""
        return self.patience > 0

    @property
    def counted(self) -> int:
        """Steps that count, if nothing has to be done again: where the run may end early, all that are paid for."""
        return self.total_steps if self.whole else self.steps

    @property
    def pure(self) -> bool:
        """Whether the guarantee holds at delta 0."""
        return self.noise == "laplace"

    @property
    def event(self) -> PoissonGaussian | PoissonLaplace:
        """What one step releases: a noisy sum over a Poisson sample."""
        kind = PoissonLaplace if self.pure else PoissonGaussian
        return kind(noise_multiplier=self.noise_multiplier, sampling_prob=self.sampling_prob)

    def epsilon_after(self, steps: int) -> float:
        """The epsilon of `steps` steps, an upper bound: at delta (PLD), or at delta 0 where that is finite."""
        if self.pure:
            return accounting.pure_epsilon([(self.event, steps)])
        return self.epsilon_at(steps, self.delta)

    def epsilon_at(self, steps: int, delta: float, precision: Literal["fine", "coarse"] = "fine") -> float:
        """The epsilon of `steps` steps at another delta (PLD, an upper bound)."""
        return accounting.composed_epsilon([(self.event, steps)], delta, self.neighboring_relation, precision=precision)

    def unamplified_after(self, steps: int) -> float:
        """The epsilon of as many passes over the data, in an order that the attacker knows, as `steps` steps make."""
        passes = math.ceil(steps * self.sampling_prob)
        if self.pure:
            return accounting.pure_epsilon([(PoissonLaplace(self.noise_multiplier, 1.0), passes)])
        relation = self.neighboring_relation
        return accounting.epsilon_without_amplification(self.noise_multiplier, passes, self.delta, relation)

    def frontier(self, epsilon: tuple[float, ...] | list[float] = EPSILONS) -> list[Alternative]:
        """The noise for other budgets, all else equal."""
        return [
            Alternative(e, self.expected_batch_size, self.steps, self.noise_multiplier)
            if e == self.epsilon
            else self._alternative(e, self.expected_batch_size, self.steps)
            for e in epsilon
        ]

    def larger_batch(self, factor: int = 2) -> Alternative | None:
        """The same number of passes with a larger batch, or None if that is more than there are units."""
        batch = self.expected_batch_size * factor
        if batch > self.num_units:
            return None
        return self._alternative(self.epsilon or EPSILONS[-1], batch, max(1, round(self.steps / factor)))

    def _alternative(self, epsilon: float, batch: int, steps: int) -> Alternative:
        steps_paid, sampling_prob = (
            steps + max(1, math.ceil(self.spare_steps * steps / self.steps)),
            batch / self.num_units,
        )
        if self.pure:
            noise = accounting.laplace_noise_multiplier(epsilon, sampling_prob, steps_paid)
        else:
            noise = accounting.noise_multiplier(
                epsilon, sampling_prob, steps_paid, self.delta, self.neighboring_relation, precision="coarse"
            )
        return Alternative(epsilon, batch, steps, noise)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})


def make_plan(config: Config) -> Plan:
    """Derives everything that the guarantee depends on from the configuration.

    Raises:
      SottoError: the budget cannot be met, or a value is out of range.
    """
    privacy, run = config.privacy, config.stepping
    sampling_prob = config.sampling_prob
    relation = privacy.neighboring_relation
    noise, planned, rdp = 0.0, None, None
    counted = config.steps + (config.spare_steps if run.patience else 0)
    if privacy.epsilon != "none" and config.method.laplace:
        paid = config.steps + config.spare_steps
        noise = accounting.laplace_noise_multiplier(privacy.epsilon, sampling_prob, paid)
        planned = accounting.pure_epsilon([(PoissonLaplace(noise, sampling_prob), counted)])
    elif privacy.epsilon != "none":
        noise = accounting.noise_multiplier(
            epsilon=privacy.epsilon,
            sampling_prob=sampling_prob,
            steps=config.steps + config.spare_steps,
            delta=privacy.delta,
            neighboring_relation=relation,
        )
        arguments = (noise, sampling_prob, counted, privacy.delta)
        planned = min(accounting.epsilon(*arguments, neighboring_relation=relation), privacy.epsilon)
        if relation == "add_or_remove_one":
            rdp = accounting.epsilon(*arguments, accountant="rdp")
    plan = Plan(
        unit=privacy.unit,
        num_units=privacy.num_units,
        max_examples_per_unit=privacy.max_examples_per_unit,
        neighboring_relation=relation,
        epsilon=None if privacy.epsilon == "none" else privacy.epsilon,
        delta=privacy.delta,
        expected_batch_size=run.expected_batch_size,
        sampling_prob=sampling_prob,
        steps=config.steps,
        spare_steps=config.spare_steps if privacy.private else 0,
        clip_norm=config.method.clip_norm,
        clipping=config.method.clipping,
        noise_multiplier=noise,
        planned_epsilon=planned,
        rdp_epsilon=rdp,
        unamplified_epsilon=None,
        not_private=config.not_private,
        layerwise=config.method.gradient == "layerwise",
        probes=config.method.probes,
        passes=config.method.passes,
        optimizer=run.optimizer,
        learning_rate=run.learning_rate or 0.0,
        noise="laplace" if config.method.laplace else "gaussian",
        exact_noise=config.exact_noise,
        patience=run.patience or 0,
        look_every=(run.look_every or 0) if run.patience else 0,
        setting=federated_facts(config),
        split=_split_facts(config),
        unused=config.unused,
        result=_result(config),
    )
    return plan if planned is None else dataclasses.replace(plan, unamplified_epsilon=plan.unamplified_after(counted))


def federated_facts(config: Config) -> dict[str, Any] | None:
    """What the section `setting` of a federated run says; None for other runs."""
    return config.setting.model_dump(mode="json") if config.setting.kind == "federated" else None


def _split_facts(config: Config) -> dict[str, Any] | None:
    if config.setting.kind != "split":
        return None
    return {**config.setting.model_dump(mode="json", exclude_none=True), "max_length": config.data.max_length}


def _result(config: Config) -> str:
    method, export = config.method, config.output.export
    if config.setting.kind == "split":
        return "the trained part, in the checkpoints of the vendor's run folder; nothing is exported"
    if export == "none":
        return "checkpoints only"
    if export == "adapter":
        return "a peft adapter, of use only with its base model"
    if method.train == "side":
        return "the frozen model and its side network, which cannot be merged into plain weights (sotto.load opens it)"
    if method.train == "reversible":
        return "coupled layers, which cannot be merged into the plain model (sotto.load opens it)"
    merged = ", adapters merged into the weights" if method.train == "lora" else ""
    if config.model.pooling == "mean":
        return f"a folder that needs sotto.load, because it averages token vectors{merged}"
    return f"a plain Hugging Face folder{merged}"
