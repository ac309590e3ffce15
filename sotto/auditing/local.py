"""Attacks on what one text, or one label, of a split run is promised: differential privacy in the local model.

The privatizer of the run is given its two worst inputs, half of the trials each: texts whose representations are as far
apart as the clipping leaves them, or two labels. The attacker knows both, sees what leaves, and guesses which it was.
Metric privacy (`dx_*`) promises no epsilon and is left to the attacks of `split`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sotto.auditing import bounds
from sotto.auditing.report import CERTAINTY, AuditReport
from sotto.config_split import SplitSetting
from sotto.privacy.noise import NoiseSource
from sotto.split.labels import LabelKeeper, randomise
from sotto.split.privatizers import Batch, GaussianRelease, Privatizer

TRIALS = 4000
_AT_ONCE = 200
_FAR = 1e3
"""How many times longer than the clipping norm a worst representation is before it is clipped."""


def audit_promises(
    setting: SplitSetting,
    privatizer: Privatizer,
    width: int,
    classes: int,
    uses: int,
    noise: NoiseSource,
    trials: int = TRIALS,
    confidence: float = 0.95,
) -> tuple[AuditReport, ...]:
    """One report for each epsilon that the setting promises; empty where it promises none.

    Args:
      privatizer: of the run.
      width: n, of a representation.
      classes, uses: of the labels, and how often each is answered for.
    """
    found = []
    if isinstance(privatizer, GaussianRelease):
        assert setting.epsilon is not None
        scores = text_scores(privatizer, width, noise, trials)
        found.append(_report("local privacy of a text", setting.epsilon, setting.delta, confidence, *scores))
    if setting.labels == "randomised":
        assert setting.label_epsilon is not None
        outcomes = randomised_scores(classes, setting.label_epsilon, trials)
        found.append(_report("randomised labels", setting.label_epsilon, 0.0, confidence, *outcomes))
    elif setting.labels == "kept":
        assert setting.label_epsilon is not None
        answers = kept_scores(setting, classes, uses, noise, trials)
        found.append(_report("kept labels", setting.label_epsilon, setting.delta, confidence, *answers))
    return tuple(found)


def text_scores(
    privatizer: GaussianRelease, width: int, noise: NoiseSource, trials: int
) -> tuple[np.ndarray, np.ndarray]:
    """(trials / 2,) each: what leaves of the one text, and of the other, along the line between them."""
    tokens, scores = 1 if privatizer.pooled else privatizer.rows, []
    for sign in (1.0, -1.0):
        parts = []
        for step, start in enumerate(range(0, trials // 2, _AT_ONCE)):
            size = min(_AT_ONCE, trials // 2 - start)
            hidden_BTn = torch.zeros(size, tokens, width)
            hidden_BTn[:, :, 0] = sign * _FAR * privatizer.clip_norm
            ids_BT, mask_BT = torch.zeros(size, tokens, dtype=torch.int64), torch.ones(size, tokens, dtype=torch.int64)
            released = privatizer.release(Batch(ids_BT, mask_BT, hidden_BTn), noise, 2 * step + int(sign > 0))
            rows_BR = released.rows.view(size, privatizer.rows, width)[:, :, 0]
            parts.append(rows_BR.double().sum(dim=1).numpy() / math.sqrt(privatizer.rows))
        scores.append(np.concatenate(parts))
    return scores[0], scores[1]


def randomised_scores(classes: int, epsilon: float, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether class 0 came out: where it was the label, and where class 1 was."""
    first, second = (np.array(randomise([label] * (trials // 2), classes, epsilon)) == 0 for label in (0, 1))
    return first.astype(float), second.astype(float)


def kept_scores(
    setting: SplitSetting, classes: int, uses: int, noise: NoiseSource, trials: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of all answers along the line between two labels."""
    assert setting.label_epsilon is not None
    labels = torch.arange(trials) % 2
    keeper = LabelKeeper(labels, classes, uses, setting.label_epsilon, setting.delta, noise)
    scores, level = torch.zeros(trials, dtype=torch.float64), torch.zeros(trials, classes)
    for _ in range(uses):
        answer = keeper.answer(torch.arange(trials), level).double()
        scores += answer[:, 1] - answer[:, 0]
    return scores[labels == 0].numpy(), scores[labels == 1].numpy()


def _report(
    attack: str, claimed: float, delta: float, confidence: float, inside: np.ndarray, outside: np.ndarray
) -> AuditReport:
    return AuditReport(
        attack=attack,
        claimed=claimed,
        delta=delta,
        confidence=confidence,
        bounds=_bounds(inside, outside, delta, confidence),
        certain=max(bound.epsilon for bound in _bounds(inside, outside, delta, CERTAINTY)),
        numbers={"trials": len(inside) + len(outside), "area_under_curve": bounds.area_under_curve(inside, outside)},
    )


def _bounds(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float) -> list[bounds.LowerBound]:
    """Zero lies half way between two inputs under Gaussian noise, whatever the noise is."""
    found = [bounds.clopper_pearson(inside, outside, delta, confidence)]
    return [bounds.gaussian(inside, outside, 0.0, delta, confidence), *found] if delta else found
