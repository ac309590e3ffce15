"""The one-run audit of a whole training: canaries are planted among the units, and looked for.

Each canary is a unit of its own, and a fair coin decides whether it is planted, before the run's sampler is made: from
then on it is drawn, clipped and hidden like any unit. After a run that is private like any other, the attacker guesses
which coins fell how (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846): from the losses of input and new-token
canaries, which needs the final model alone, or from the coordinates of gradient canaries in all that the run released.
A language model is also asked to complete planted secrets (`extraction`).

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
from sotto.auditing import bounds, canaries, codes, extraction
from sotto.auditing.canaries import Diracs, Kind, Overheard
from sotto.auditing.codes import Secrets
from sotto.auditing.membership import losses
from sotto.auditing.report import CERTAINTY, AuditReport
from sotto.config import Config
from sotto.data import LoadedData
from sotto.errors import SottoError

SHOWN = 3
"""Secrets that a report repeats, at most, of those that the model gives away."""


@dataclass
class Planted:
    """What is planted, or not.

    Attributes:
      data: all canaries, one unit each.
      inside: (n,) bool, which of them are planted.
      before: (n,) losses before training.
      diracs: of gradient canaries.
      secrets: what they read, of secrets.
    """

    data: LoadedData
    inside: np.ndarray
    before: np.ndarray
    diracs: Diracs | None = None
    secrets: Secrets | None = None


FEWEST = 24
"""Canaries. Of so many, coins leave one side fewer than the four that a bound needs once in 3,600 audits."""


def audit_by_planting(config: Config, count: int, confidence: float = 0.95, kind: Kind = "input") -> AuditReport:
    """Trains once with canaries among the units, and attacks the result.

    Args:
      config: of the run; `output.export` is left out of account.
      count: how many canaries; about half of them are planted.
      confidence: of each bound.
      kind: of canaries, see `canaries`.

    Raises:
      SottoError: SOT703, the run is not private; SOT707, it cannot have such canaries; SOT702, they are too few; and
        those of `sotto.train`.
    """
    _check(config, kind, count)
    config = config.with_overrides(["output.export=none", "output.name=audit"])
    generator = np.random.default_rng(secrets.randbits(128))
    made: list[Planted] = []

    def plant(parts: sessions.Loaded) -> sessions.Loaded:
        first_new = _rows(parts.model) - count if kind == "new_token" else 0
        form = (config, parts.data, parts.tokenizer, count, generator)
        told = codes.make(*form) if kind == "secret" else None
        data = told.data if told else canaries.make(*form, first_new)
        inside = generator.random(count) < 0.5
        before = _losses(parts.model, parts.tokenizer, data, config, parts.device)
        parts.model.train()
        planted, diracs = np.flatnonzero(inside), None
        if kind == "gradient":
            first, clip_norm = len(parts.data.examples), config.method.clip_norm
            diracs = Diracs.build(parts.engine, clip_norm, first, planted, count, generator)
        made.append(Planted(data, inside, before, diracs, told))
        whole = canaries.among(parts.data, data, planted)
        return dataclasses.replace(parts, data=whole, planted=diracs.losses if diracs else None)

    session = sessions.start(config, "audit", plant, new_tokens=count if kind == "new_token" else 0)
    (found,) = made
    if found.diracs is not None:
        session.mechanism = Overheard(session.mechanism, found.diracs, session.plan.expected_batch_size)
    run = commands.run_session(session, None)
    if not run.finished or run.epsilon is None:
        raise SottoError(
            "SOT705", what="the audit's run was stopped", where=str(run.path),
            why="its canaries are not known to a resumed run, so it cannot be continued",
            fix=f"close it (sotto ledger <config> --close {run.path.name}) and audit again",
        )  # fmt: skip
    scores = found.diracs.scores if found.diracs else found.before - _losses(
        run.model, session.tokenizer, found.data, config, session.device
    )  # fmt: skip
    return _report(session, run, found, scores, kind, confidence)


def _check(config: Config, kind: Kind, count: int) -> None:
    if config.not_private is not None:
        raise SottoError(
            "SOT703", what=f"the run is not private: {config.not_private}", where="privacy",
            why="an audit compares what an attack proves with what is promised, and nothing is promised",
            fix="set privacy.epsilon, and take run.debug_noise_seed out",
        )  # fmt: skip
    central = config.setting.kind == "central"
    if not central or (kind == "gradient" and config.method.zeroth_order):
        raise SottoError(
            "SOT707", what=f"{kind} canaries cannot be planted in this run",
            where="method.gradient: zeroth_order" if central else f"setting.kind: {config.setting.kind}",
            why="nothing in it has a gradient" if central else "its text is read elsewhere",
            fix="audit its releases instead, without --plant" + (", or plant input canaries" if central else ""),
        )  # fmt: skip
    if count < FEWEST:
        raise SottoError(
            "SOT702", what=f"{count} canaries", where="--plant",
            why="coins decide which are planted; with so few, one side may be too small for a confidence interval, "
            "and the training would be charged in vain", fix=f"plant {FEWEST} or more; some hundreds prove more",
        )  # fmt: skip


def _rows(model: nn.Module) -> int:
    """Tokens that the model knows, those included that were added."""
    return model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator, no-any-return]


def _report(
    session: sessions.Session,
    run: commands.Run,
    found: Planted,
    scores: np.ndarray,
    kind: Kind,
    confidence: float,
) -> AuditReport:
    plan = session.plan
    inside, outside = scores[found.inside], scores[~found.inside]
    numbers: dict[str, float] = {
        "planted": len(inside),
        "left_out": len(outside),
        "share_of_a_batch": len(inside) / (len(inside) + plan.num_units),
        "area_under_curve": bounds.area_under_curve(inside, outside),
    }
    notes = [f"the run {run.path} was charged to the ledger of the dataset; its model has learnt the canaries"]
    if found.secrets is not None:
        more, told = _extracted(session, run.model, found.secrets, found.inside)
        numbers, notes = numbers | more, told + notes
    threshold = None
    if found.diracs is not None:
        threshold = found.diracs.strength * session.step * plan.sampling_prob / 2
    assert run.epsilon is not None
    return AuditReport(
        attack="planted secrets" if found.secrets else f"planted {kind.replace('_', '-')} canaries",
        claimed=run.epsilon,
        delta=plan.delta,
        confidence=confidence,
        bounds=_bounds(inside, outside, plan.delta, confidence, threshold),
        certain=max(bound.epsilon for bound in _bounds(inside, outside, plan.delta, CERTAINTY, threshold)),
        numbers=numbers,
        notes=notes,
    )


def _bounds(
    inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float, threshold: float | None
) -> list[bounds.LowerBound]:
    """A threshold that was fixed in advance, for sums of releases, allows the bound for Gaussians too."""
    return [
        *([] if threshold is None else [bounds.gaussian(inside, outside, threshold, delta, confidence)]),
        bounds.one_run(inside, outside, delta, confidence),
        bounds.clopper_pearson(inside, outside, delta, confidence),
    ]


def _extracted(
    session: sessions.Session, model: nn.Module, secrets: Secrets, inside: np.ndarray
) -> tuple[dict[str, float], list[str]]:
    """What the model gives away when it is prompted, in numbers and in words: the secrets are nobody's."""
    known = extraction.completed(model, session.tokenizer, secrets.data, session.device)
    numbers: dict[str, float] = {
        "planted_and_completed": int(known[inside].sum()),
        "left_out_and_completed": int(known[~inside].sum()),
        "codes": len(secrets.ends),
    }
    for name, of in (("planted", inside), ("left_out", ~inside)):
        chosen = np.flatnonzero(of)[: extraction.RANKED]
        bits = extraction.exposures(model, session.tokenizer, secrets, chosen, session.device)
        numbers |= {f"exposure_of_{name}_bits": float(bits.mean()), f"largest_of_{name}_bits": float(bits.max())}
    given_away = [secrets.texts[n] for n in np.flatnonzero(known & inside)[:SHOWN].tolist()]
    words = [f"a secret reads '{secrets.texts[0]}'; its code is one of {len(secrets.ends):,}, all equally likely"]
    return numbers, words + [f"the model gives away: {text}" for text in given_away]


def _losses(model: nn.Module, tokenizer: Any, data: LoadedData, config: Config, device: torch.device) -> np.ndarray:
    return losses(model, tokenizer, data, np.arange(len(data.examples)), config.data.task, device, 32)
