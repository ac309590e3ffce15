"""The one-run audit of a whole training: canaries of random tokens are planted among the units, and looked for.

Each canary is a unit of its own, and a fair coin decides whether it is planted. After a run that is private like any
other, the attacker guesses from the losses which coins fell how (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846);
and of a language model, whether it completes a canary's beginning with its end (Carlini et al. 2019, arXiv 1802.08232).

Planting costs the units of the dataset no privacy: each is drawn with the probability, and hidden by the noise, that
the plan says. It costs the run: its steps are charged to the dataset's ledger, and its model has learnt nonsense.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import commands
from sotto import session as sessions
from sotto.auditing import bounds
from sotto.auditing.membership import losses
from sotto.auditing.report import CERTAINTY, AuditReport
from sotto.config import Config
from sotto.data import LoadedData
from sotto.data.examples import Examples
from sotto.data.units import Units, ranges
from sotto.errors import SottoError
from sotto.losses import to_device

LENGTH = 12
"""Tokens of a canary, half of them its beginning."""


@dataclass
class Canaries:
    """What is planted, or not.

    Attributes:
      data: all canaries, one unit each.
      planted: (n,) bool.
      before: (n,) losses before training.
    """

    data: LoadedData
    planted: np.ndarray
    before: np.ndarray


def audit_by_planting(config: Config, canaries: int, confidence: float = 0.95) -> AuditReport:
    """Trains once with canaries among the units, and attacks the result.

    Args:
      config: of the run; `output.export` is left out of account.
      canaries: how many; about half of them are planted.
      confidence: of each bound.

    Raises:
      SottoError: SOT703, the run is not private; and those of `sotto.train`.
    """
    if config.not_private is not None:
        raise SottoError(
            "SOT703", what=f"the run is not private: {config.not_private}", where="privacy",
            why="an audit compares what an attack proves with what is promised, and nothing is promised",
            fix="set privacy.epsilon, and take run.debug_noise_seed out",
        )  # fmt: skip
    config = config.with_overrides(["output.export=none", "output.name=audit"])
    generator = np.random.default_rng(secrets.randbits(128))
    made: list[Canaries] = []

    def plant(parts: sessions.Loaded) -> sessions.Loaded:
        data = make(config, parts.data, parts.tokenizer, canaries, generator)
        planted = generator.random(canaries) < 0.5
        before = _losses(parts.model, parts.tokenizer, data, config, parts.device)
        parts.model.train()
        made.append(Canaries(data, planted, before))
        return dataclasses.replace(parts, data=among(parts.data, data, np.flatnonzero(planted)))

    session = sessions.start(config, "audit", plant)
    run = commands.run_session(session, None)
    if not run.finished or run.epsilon is None:
        raise SottoError(
            "SOT705", what="the audit's run was stopped", where=str(run.path),
            why="its canaries are not known to a resumed run, so it cannot be continued",
            fix=f"close it (sotto ledger <config> --close {run.path.name}) and audit again",
        )  # fmt: skip
    (found,) = made
    scores = found.before - _losses(run.model, session.tokenizer, found.data, config, session.device)
    inside, outside = scores[found.planted], scores[~found.planted]
    numbers: dict[str, float] = {
        "planted": len(inside),
        "left_out": len(outside),
        "area_under_curve": bounds.area_under_curve(inside, outside),
    }
    if config.data.task == "generation":
        known = completed(run.model, session.tokenizer, found.data, session.device)
        numbers |= {
            "planted_and_completed": int(known[found.planted].sum()),
            "left_out_and_completed": int(known[~found.planted].sum()),
        }
    delta = config.privacy.delta
    return AuditReport(
        attack="planted canaries",
        claimed=run.epsilon,
        delta=delta,
        confidence=confidence,
        bounds=_bounds(inside, outside, delta, confidence),
        certain=max(bound.epsilon for bound in _bounds(inside, outside, delta, CERTAINTY)),
        numbers=numbers,
        notes=[f"the run {run.path} was charged to the ledger of the dataset; its model has learnt the canaries"],
    )


def _bounds(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float) -> list[bounds.LowerBound]:
    return [
        bounds.one_run(inside, outside, delta, confidence),
        bounds.clopper_pearson(inside, outside, delta, confidence),
    ]


def make(config: Config, data: LoadedData, tokenizer: Any, count: int, generator: np.random.Generator) -> LoadedData:
    """Canaries of random tokens: with a random class, or a beginning without loss and an end with it."""
    special = set(tokenizer.all_special_ids)
    usable = np.array([token for token in range(len(tokenizer)) if token not in special])
    length = min(LENGTH, config.data.max_length - 2)
    drawn = usable[generator.integers(len(usable), size=(count, length))]
    first = [t for t in (tokenizer.cls_token_id, tokenizer.bos_token_id) if t is not None][:1]
    last = [t for t in (tokenizer.sep_token_id,) if t is not None]
    sequences = [[*first, *row.tolist(), *last] for row in drawn]
    classes = len(config.data.labels or ())
    labels = None if config.data.task == "generation" else generator.integers(classes, size=count)
    examples = Examples.build(
        sequences,
        rows=[-1] * count,
        token_type_ids=None if data.examples.token_type_ids is None else [[0] * len(s) for s in sequences],
        prompt_lengths=[len(first) + length // 2] * count if labels is None else None,
        labels=labels,
    )
    units, _ = Units.build(None, count, 1, 0)
    return dataclasses.replace(data, examples=examples, units=units)


def among(data: LoadedData, canaries: LoadedData, chosen: np.ndarray) -> LoadedData:
    """The data with the chosen canaries after it, each a unit of its own."""
    a, b, n = data.examples, canaries.examples, len(data.examples)
    tokens = ranges(b.offsets[chosen], b.lengths[chosen])
    examples = Examples(
        input_ids=np.concatenate([a.input_ids, b.input_ids[tokens]]),
        offsets=np.concatenate([a.offsets, a.offsets[-1] + np.cumsum(b.lengths[chosen])]),
        token_type_ids=None
        if a.token_type_ids is None or b.token_type_ids is None
        else np.concatenate([a.token_type_ids, b.token_type_ids[tokens]]),
        prompt_lengths=np.concatenate([a.prompt_lengths, b.prompt_lengths[chosen]]),
        labels=None if a.labels is None or b.labels is None else np.concatenate([a.labels, b.labels[chosen]]),
        rows=np.concatenate([a.rows, b.rows[chosen]]),
    )
    units = Units(
        np.concatenate([data.units.offsets, data.units.offsets[-1] + np.arange(1, len(chosen) + 1)]),
        np.concatenate([data.units.members, n + np.arange(len(chosen))]),
    )
    return dataclasses.replace(data, examples=examples, units=units)


def _losses(model: nn.Module, tokenizer: Any, data: LoadedData, config: Config, device: torch.device) -> np.ndarray:
    return losses(model, tokenizer, data, np.arange(len(data.examples)), config.data.task, device, 32)


@torch.no_grad()
def completed(model: nn.Module, tokenizer: Any, data: LoadedData, device: torch.device, size: int = 32) -> np.ndarray:
    """(n,) whether the likeliest continuation of a canary's beginning is its end."""
    found = np.zeros(len(data.examples), bool)
    for start in range(0, len(found), size):
        rows = np.arange(start, min(start + size, len(found)))
        batch = to_device(data.examples.collate(rows, tokenizer.pad_token_id), device)
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch).logits[:, :-1].argmax(-1)
        found[rows] = ((guesses == labels) | (labels < 0)).all(1).cpu().numpy()
    return found
