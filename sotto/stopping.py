"""A run that ends when public text says that it learns no more: `run.patience`, `data.public`.

Every so many steps the weights that the run would release are scored on public text. When so many looks in a row have
not lowered the loss, the run ends there, with those weights.

Guarantee: the rule sees released weights and public text, so what is released is the transcript of all planned steps,
cut off by a function of itself: post-processing, under the epsilon of all planned steps, whatever the rule is. The
epsilon of the steps that were taken does not hold in general, because how many they are depends on the releases
(composition by privacy loss distributions is for a number that is fixed in advance; filters and odometers, Rogers et
al. 2016, arXiv:1605.08294, give less). So the plan is charged whole, spare steps included: the ledger counts it so from
the first step on, and the statement says it.

The rule draws nothing and changes no weight, so sampling and noise are those of a run without it. What was seen is part
of the checkpoint: a run that is resumed decides from there. Only the first of several processes looks; the others end
when it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sotto.config import Config
from sotto.data import Examples, LoadedData
from sotto.evaluation import score_examples
from sotto.public_text import read_public, require_not_held_out
from sotto.settled import digest

if TYPE_CHECKING:
    from sotto.training import Session

WHERE = "data.public"


@dataclass
class StopRule:
    """When to end, and what has been seen so far.

    Attributes:
      text: public.
      digest: of it.
      batch: examples in a forward pass. It is settled before any text is read: the last bits of a loss depend on it.
      patience: how many looks in a row may pass without a lower loss.
      every: steps between looks.
      best: the lowest loss yet.
      waited: looks since it was seen.
    """

    text: LoadedData
    batch: int
    patience: int
    every: int
    best: float = math.inf
    waited: int = 0

    @property
    def digest(self) -> str:
        return digest(self.text)

    @property
    def met(self) -> bool:
        """Whether the run is to end."""
        return self.waited >= self.patience

    @property
    def reason(self) -> str:
        """Why it ends, in words."""
        return f"{self.waited} look(s) in a row, {self.every} step(s) apart, have not lowered the loss on {WHERE}"

    def look(self, session: Session) -> dict[str, float]:
        """Scores the model, where it is time. Returns what was seen: it is public."""
        if session.step % self.every or self.met:
            return {}
        with _as_released(session), session.engine.paused():
            loss = self._loss(session)
        improved = loss < self.best  # never, where the loss is not a number
        self.best, self.waited = (loss, 0) if improved else (self.best, self.waited + 1)
        return {"public_loss": loss}

    def _loss(self, session: Session) -> float:
        """Of an example, or of a token where text is written."""
        task, pad = session.config.data.task, session.tokenizer.pad_token_id
        scores = score_examples(session.model, pad, self.text.examples, task, self.batch)
        return scores["loss"] if task == "classification" else scores["nats_per_token"]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best if math.isfinite(self.best) else None, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave."""
        best, self.waited = state["best"], state["waited"]
        self.best = math.inf if best is None else best


def rule_for(config: Config, tokenizer: Any, private: Examples, batch: int) -> StopRule | None:
    """The rule of a configuration, with its text read and checked; None where there is none.

    Raises:
      SottoError: SOT937, SOT215, the text is not public; those of reading it.
    """
    if config.data.public is None or config.run.patience is None:
        return None
    require_not_held_out(config.data.public, WHERE, config)
    public = read_public(config.data.public, WHERE, config, tokenizer, private)
    every = config.stepping.look_every
    assert every is not None
    return StopRule(public, batch, config.run.patience, every)


@contextmanager
def _as_released(session: Session) -> Iterator[None]:
    """Inside, the model has the weights that the run would release now: averages, where there are any."""
    parameters, final = session.engine.parameters, session.optimizer.final_weights()
    if not session.config.run.ema_decay:
        yield
        return
    kept = {name: parameters[name].detach().clone() for name in final}
    try:
        _put(parameters, final)
        yield
    finally:
        _put(parameters, kept)


def _put(parameters: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
