"""The black-box audit of a finished run: can its training examples be told from held-out ones by their losses?

The oldest attack (Yeom et al. 2018, arXiv 1709.01604), made stronger for language models by subtracting the loss under
the model before training (Carlini et al. 2021, arXiv 2012.07805). One example of each unit is used, because several of
one unit are not independent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.auditing import bounds
from sotto.auditing.report import CERTAINTY, AuditReport
from sotto.data.load import LoadedData, has_eval, load_dataset_for
from sotto.devices import choose_device
from sotto.errors import SottoError
from sotto.finish import reopen
from sotto.losses import forward_losses, to_device
from sotto.models import load as models_load
from sotto.rundir import RunDir

FALSE_ALARMS = 0.01


def audit_membership(path: Path, limit: int = 2000, confidence: float = 0.95, batch_size: int = 32) -> AuditReport:
    """Attacks the model of a finished run.

    Args:
      path: a run folder; its configuration names held-out data (`data.eval`).
      limit: examples of each kind at most.
      confidence: of the lower bound.

    Returns:
      The report. Its numbers are exact functions of private data: they are for the owner of the data.

    Raises:
      SottoError: SOT509 the run has not finished, SOT703 it is not private, SOT704 there is no held-out data.
    """
    run = RunDir.open(path)
    config, facts = run.config(), run.read_json("privacy.json") if run.finished else {}
    if not facts.get("private"):
        raise SottoError(
            "SOT703", what="the run is not private, or has not finished", where=str(run.path),
            why="an audit compares what an attack proves with what is promised, and nothing is promised",
            fix=f"sotto resume {run.path}",
        )  # fmt: skip
    if not has_eval(config.data):
        raise SottoError(
            "SOT704", what="there is no held-out data", where="data.eval",
            why="an attack has to tell training examples from others of the same kind",
            fix="name a file of other units in data.eval of the run's config.yaml",
        )  # fmt: skip
    trained = reopen(run, config)
    device = choose_device(config.run.device)
    scores = {}
    for kind in ("train", "eval"):
        data = load_dataset_for(config, trained.tokenizer, kind)
        chosen = _one_of_each_unit(data, limit)
        scores[kind] = -losses(trained.model, trained.tokenizer, data, chosen, config.data.task, device, batch_size)
        if config.data.task == "generation":
            before = models_load.load_model(config.model, config.data, config.method, config.run.seed).model
            scores[kind] += losses(before, trained.tokenizer, data, chosen, config.data.task, device, batch_size)
    inside, outside = scores["train"], scores["eval"]
    return AuditReport(
        attack="membership",
        claimed=facts["epsilon"],
        delta=facts["delta"],
        confidence=confidence,
        bounds=[bounds.clopper_pearson(inside, outside, facts["delta"], confidence)],
        certain=bounds.clopper_pearson(inside, outside, facts["delta"], CERTAINTY).epsilon,
        numbers={
            "members": len(inside),
            "held_out": len(outside),
            "area_under_curve": bounds.area_under_curve(inside, outside),
            "caught_at_1_percent_false_alarms": bounds.true_positives_at(inside, outside, FALSE_ALARMS),
            "most_that_any_attack_finds": bounds.true_positives_allowed(facts["epsilon"], facts["delta"], FALSE_ALARMS),
        },
        notes=[
            "these numbers are functions of private data: keep them with it",
            "a held-out set of another kind than the training data, or several texts of one person in it, mislead it",
            "this attack is a weak one; what it does not find may be found by a better one",
        ],
    )


def _one_of_each_unit(data: LoadedData, limit: int) -> np.ndarray:
    """Examples in an order that has nothing to do with them, one of each unit."""
    generator = np.random.default_rng(0)
    units = generator.permutation(len(data.units))[:limit]
    starts, ends = data.units.offsets[units], data.units.offsets[units + 1]
    return data.units.members[starts + (generator.random(len(units)) * (ends - starts)).astype(np.int64)]


@torch.no_grad()
def losses(
    model: nn.Module, tokenizer: Any, data: LoadedData, chosen: np.ndarray, task: str, device: torch.device, size: int
) -> np.ndarray:
    """(n,) losses of the chosen examples, in their order."""
    model = model.to(device).eval()
    found = np.empty(len(chosen))
    order = np.argsort(data.examples.lengths[chosen], kind="stable")
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = to_device(data.examples.collate(chosen[part], tokenizer.pad_token_id), device)
        found[part] = forward_losses(model, batch, task).double().cpu().numpy()
    return np.nan_to_num(found, nan=0.0, posinf=1e6, neginf=-1e6)
