"""A score on private data that may be shown: with noise, and charged to the ledger of that data.

What is released. Each unit u has a score a_u in [0, 1]: the share of its examples that were classified rightly, or
1 - (its nats per token) / B, with losses cut at B = log(vocabulary), what guessing costs. Released are

    sum over u of (2 a_u - 1)  and  the number of units,   each + N(0, 2 z^2),

one Gaussian mechanism with noise multiplier z: a unit that is added or removed moves the pair by at most sqrt(2). So it
holds for however many examples a unit has, and the number of units need not be public. Noise is the rounded Gaussian of
`privacy.discrete`, on whole multiples of 2^-20. Their quotient, and an interval from the known noise, are arithmetic on
what was released.

The mean is over units, each weighing the same; with `unit: record` that is the usual accuracy.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import begun
from sotto.config import Config
from sotto.data.load import LoadedData, ledger_id, load_dataset_for
from sotto.evaluation import exported_model, held_out
from sotto.losses import classification, to_device, token_losses
from sotto.privacy import accounting
from sotto.privacy.datasets import require_one_name
from sotto.privacy.discrete import Below, add_rounded_gaussian
from sotto.privacy.events import Gaussian
from sotto.privacy.ledger import Ledger
from sotto.rundir import RunDir

GRID = 1 << 20
"""Whole numbers that stand for 1."""
SENSITIVITY = math.isqrt(2 * GRID * GRID) + 1
"""L2 norm of what one unit adds to the pair, in units of the grid, rounded up."""
WITHIN = 1.96
"""Standard deviations of the noise that hold 95 % of it."""


def noisy_score(
    path: Path, data: str | None, epsilon: float, delta: float | None, batch_size: int = 64
) -> dict[str, float]:
    """See `sotto.evaluate`. The charge is on the disk before a score is computed, and stays if that fails.

    Raises:
      SottoError: SOT401, epsilon or delta is out of range; SOT414, the budget of the dataset does not allow it; SOT417,
        it has another name in the ledgers; those of reading the data.
    """
    run = RunDir.open(path)
    config = held_out(run.config(), data)
    delta = config.privacy.delta if delta is None else delta
    relation = config.privacy.neighboring_relation
    event = Gaussian(accounting.noise_multiplier(epsilon, 1.0, 1, delta, relation))
    spent = accounting.composed_epsilon([(event, 1)], delta, relation)
    assert spent <= epsilon
    run.verify_model()
    model, tokenizer = exported_model(run.path)
    # As training data: grouped by unit, with the bound on a unit's examples.
    section = config.data.model_copy(
        update={"train": config.data.eval or config.data.train, "split": config.data.eval_split or config.data.split}
    )
    given = config.model_copy(update={"data": section})
    loaded = load_dataset_for(given, tokenizer, "train", whole=False)
    dataset = ledger_id(given, loaded.fingerprint)
    require_one_name(dataset, loaded.fingerprint)
    ledger = Ledger.open(dataset)
    name = f"score-{run.id}-{secrets.token_hex(4)}"
    begun.note(None, "Whether the score was charged is in the ledger of its data: see 'sotto ledger'.")
    ledger.open_run(name, event, 1, delta=delta, neighboring_relation=relation)
    try:
        ledger.reserve(name, 0, event)
    finally:
        ledger.close_run(name)
    score, margin, units = release(unit_scores(model, tokenizer, given, loaded, batch_size), event.noise_multiplier)
    facts = {"units": units, "epsilon": spent, "delta": delta}
    if config.data.task == "classification":
        return {"accuracy": score, "margin_95": margin, **facts}
    worst = guess_nats(model)
    return {"nats_per_token": worst * (1 - score), "margin_95": worst * margin, **facts}


def release(scores_U: Sequence[float], noise_multiplier: float, below: Below = secrets.randbelow) -> tuple[float, ...]:
    """The mean of the units' scores, with noise.

    Args:
      scores_U: one of each unit, in [0, 1]. Others are cut; one that is no number counts as 0.

    Returns:
      The mean, half the width of the interval that holds the mean without noise with 95 %, and the number of units.
    """
    pair = add_rounded_gaussian(summed(scores_U), noise_multiplier * SENSITIVITY, below)
    total, units = pair[0] / GRID, max(1.0, pair[1] / GRID)
    ratio = min(1.0, max(-1.0, total / units))
    spread = noise_multiplier * math.sqrt(2) * math.sqrt(1 + ratio * ratio) / units
    return (1 + ratio) / 2, WITHIN * spread / 2, float(round(units))


def summed(scores_U: Sequence[float]) -> tuple[int, int]:
    """What is released, without the noise: the sum of 2 a - 1, and the number of units, on the grid."""
    whole = (0.0 if math.isnan(a) else min(1.0, max(0.0, a)) for a in scores_U)
    return sum(round((2 * a - 1) * GRID) for a in whole), len(scores_U) * GRID


@torch.inference_mode()
def unit_scores(model: nn.Module, tokenizer: Any, config: Config, loaded: LoadedData, batch_size: int) -> list[float]:
    """Each unit's score, in the order of the units."""
    examples, device = loaded.examples, next(model.parameters()).device
    good_E, weight_E, worst = np.zeros(len(examples)), np.zeros(len(examples)), guess_nats(model)
    order = loaded.units.members[np.argsort(examples.lengths[loaded.units.members], kind="stable")]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = to_device(examples.collate(chosen, tokenizer.pad_token_id), device)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if config.data.task == "classification":
            finite = torch.isfinite(classification(logits, labels))
            good_E[chosen] = ((logits.argmax(-1) == labels) & finite).cpu().numpy()
            weight_E[chosen] = 1.0
        else:
            losses_BT, counts_B = token_losses(logits, labels)
            cut_BT = losses_BT.double().nan_to_num(nan=worst).clamp(0.0, worst)
            good_E[chosen] = (counts_B - cut_BT.sum(dim=1) / worst).cpu().numpy()
            weight_E[chosen] = counts_B.cpu().numpy()
    found = []
    for unit in range(len(loaded.units)):
        members, _ = loaded.units.members_of(np.array([unit]))
        found.append(float(good_E[members].sum() / max(1.0, weight_E[members].sum())))
    return found


def guess_nats(model: nn.Module) -> float:
    """B: nats per token of guessing uniformly."""
    return math.log(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
