"""The white-box audit: does what a run releases at each step hide one unit as well as its plan says?

Canaries are units whose gradient is known: canary j's clipped gradient is a vector of length clip_norm along coordinate
j. A fair coin decides whether it takes part in the run. The run's own sampler, engine, clipping, noise and divisor then
make one release after another, and the attacker, who sees all of them, adds up each canary's coordinate. That is the
worst case that the accounting is about, so a sound implementation comes close to its epsilon and never passes it (Nasr
et al. 2021, arXiv 2101.04535; 2023, arXiv 2302.07956).

In a federated run every canary is a user, or one unit of a site, that sends its vector through the bound of its device,
its share of the noise, and everything that the server does with what comes in.

With zeroth-order gradients canary j has the number clip_norm at place j, and a step releases as many numbers as there
are canaries: the guarantee is the same for every number of them.

No private data and no model is touched, so an audit costs nothing and can be repeated. What it covers is the mechanism,
not the data pipeline or the gradients of the real model; those are compared with plain autograd in every run.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import session as sessions
from sotto.auditing import bounds
from sotto.auditing.bounds import LowerBound
from sotto.auditing.report import CERTAINTY, AuditReport
from sotto.config import Config
from sotto.data.sampling import PoissonSampler
from sotto.errors import SottoError
from sotto.federated import server as federation
from sotto.federated.client import bounded
from sotto.federated.codec import Identity
from sotto.federated.cohort import Cohort
from sotto.gradients.base import ClippedSum
from sotto.gradients.engine import attach
from sotto.privacy.plan import Plan, make_plan
from sotto.zeroth_order.release import Release

STEEPNESS = 100.0
"""How many times longer than the clipping norm a canary's gradient is before it is clipped."""


class Canaries(nn.Module):
    """One number for each canary; its loss is that number, so its gradient is a unit vector."""

    def __init__(self, count: int):
        super().__init__()
        self.table = nn.Embedding(count, 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, canaries: torch.Tensor) -> torch.Tensor:
        return self.table(canaries).squeeze(-1)


def audit_mechanism(config: Config, canaries: int = 5000, confidence: float = 0.95) -> AuditReport:
    """Attacks a whole run's releases.

    Args:
      config: its privacy, method and run sections count.
      canaries: how many; more give tighter bounds.
      confidence: that of each bound.

    Raises:
      SottoError: SOT703, the run is not private.
    """
    plan = make_plan(config)
    if plan.epsilon is None or not plan.private:
        raise SottoError(
            "SOT703", what=f"the run is not private: {plan.not_private}", where="privacy",
            why="an audit compares what an attack proves with what is promised, and nothing is promised",
            fix="set privacy.epsilon, and take run.debug_noise_seed out",
        )  # fmt: skip
    member = np.random.default_rng(secrets.randbits(128)).random(canaries) < 0.5
    return judge(plan, attack(config, plan, member), member, confidence)


@dataclass(frozen=True)
class Scores:
    """What an attacker has after all steps, in clipping norms along each canary's coordinate.

    Attributes:
      sums: (canaries,) of what was released: of a member as many as the steps that drew it, plus noise; of others noise
        alone.
      magnitudes: (canaries,) the same of absolute values.
    """

    sums: np.ndarray
    magnitudes: np.ndarray


def attack(config: Config, plan: Plan, member: np.ndarray) -> Scores:
    """Makes all releases of a run.

    Args:
      member: (canaries,) bool, which of them take part.
    """
    if config.method.zeroth_order:
        source: _Numbers | _Users | _Gradients = _Numbers(config, len(member))
    else:
        source = (_Users if config.setting.kind == "federated" else _Gradients)(config, len(member))
    mechanism = sessions.make_mechanism(config, plan, source.clipping)
    sampler = PoissonSampler(len(member), plan.sampling_prob, secrets.token_bytes(16))
    scores = Scores(np.zeros(len(member)), np.zeros(len(member)))
    for step in range(plan.steps):
        drawn = sampler.draw(step)
        total = source.clipped_sum(drawn[member[drawn]], step)
        sensitivity = total.sensitivity
        (released,) = mechanism.privatize(total, step).values()
        seen = released.double().view(-1).numpy() * plan.expected_batch_size / sensitivity
        scores.sums[:] += seen
        scores.magnitudes[:] += np.abs(seen)
    return scores


class _Gradients:
    """Canaries' clipped gradients, from the run's engine."""

    def __init__(self, config: Config, canaries: int):
        self.clipping, self.steepness = sessions.make_clipping(config), STEEPNESS * config.method.clip_norm
        self.model: Any = Canaries(canaries)
        assert config.method.gradient != "zeroth_order"
        self.engine = attach(self.model, algorithm=config.method.gradient, clipping=self.clipping)

    def clipped_sum(self, drawn: np.ndarray, step: int) -> ClippedSum:
        if len(drawn) == 0:
            return self.engine.zeros()
        losses = self.model(torch.from_numpy(drawn)) * self.steepness
        return self.engine.backward(losses, torch.from_numpy(drawn))


class _Numbers:
    """Canaries' clipped numbers, as if each had been seen along a direction of its own."""

    def __init__(self, config: Config, canaries: int):
        self.clipping, self.steepness = sessions.make_clipping(config), STEEPNESS * config.method.clip_norm
        self.release = Release(self.clipping, canaries, 1 if config.method.laplace else 2)

    def clipped_sum(self, drawn: np.ndarray, step: int) -> ClippedSum:
        sketch_UK = torch.zeros(len(drawn), self.release.count, dtype=torch.float64)
        sketch_UK[torch.arange(len(drawn)), torch.from_numpy(drawn)] = self.steepness
        return self.release.clipped_sum(sketch_UK)


class _Users:
    """Canaries as users of a federated run, or as units dealt out to its sites."""

    def __init__(self, config: Config, canaries: int):
        self.clipping, self.steepness = sessions.make_clipping(config), STEEPNESS * config.method.clip_norm
        self.cohort = Cohort({}, self.clipping, Identity(canaries), lambda order, users: ())
        self.cohort.shares, self.cohort.reach = federation.shares_for(config), federation.reach_for(config)
        self.cohort.noise = self.noise = federation.noise_for(config)
        self.sites = federation.setting_of(config).sites

    def clipped_sum(self, drawn: np.ndarray, step: int) -> ClippedSum:
        if self.sites is None:
            return self.cohort.add_up(drawn, ((j, self._message([j], j, step)) for j in drawn.tolist()), step)
        parts = [(s, [j for j in drawn.tolist() if j % self.sites == s]) for s in range(self.sites)]
        return self.cohort.add_up(np.arange(self.sites), ((s, self._message(part, s, step)) for s, part in parts), step)

    def _message(self, canaries: list[int], sender: int, step: int) -> torch.Tensor:
        """What a user sends whose update is its canary, or a site for those of its units that it drew."""
        vector = torch.zeros(self.cohort.codec.size)
        for j in canaries:
            one = torch.zeros(self.cohort.codec.size)
            one[j] = self.steepness
            vector += bounded(one, self.clipping.sensitivity)
        if self.cohort.shares is None:
            return vector
        return self.cohort.shares.message(vector, self.noise, step, f"share of {sender}")


def judge(plan: Plan, scores: Scores, member: np.ndarray, confidence: float) -> AuditReport:
    """Bounds from the scores of `attack`. A pure epsilon is attacked at delta 0."""
    return AuditReport(
        attack="mechanism",
        claimed=plan.epsilon_after(plan.steps),
        delta=0.0 if plan.pure else plan.delta,
        confidence=confidence,
        bounds=_bounds(plan, scores, member, confidence),
        certain=max(bound.epsilon for bound in _bounds(plan, scores, member, CERTAINTY)),
        numbers={
            "canaries": len(member),
            "steps": plan.steps,
            "area_under_curve": bounds.area_under_curve(scores.sums[member], scores.sums[~member]),
        },
    )


def _bounds(plan: Plan, scores: Scores, member: np.ndarray, confidence: float) -> list[LowerBound]:
    inside, outside = scores.sums[member], scores.sums[~member]
    steps, sampling_prob, delta = plan.steps, plan.sampling_prob, 0.0 if plan.pure else plan.delta
    if plan.pure:
        of_noise = [
            bounds.sampled_laplace(inside, scores.magnitudes[~member], steps, sampling_prob, confidence),
        ]
    else:
        threshold = steps * sampling_prob / 2  # half of what a member's steps add on average
        of_noise = [
            bounds.sampled_gaussian(inside, outside, steps, sampling_prob, delta, confidence),
            bounds.gaussian(inside, outside, threshold, delta, confidence),
        ]
    return [
        *of_noise,
        bounds.clopper_pearson(inside, outside, delta, confidence),
        bounds.one_run(inside, outside, delta, confidence),
    ]
