"""The vendor's side: trains the top of the model on what the customer sent, and scores what the customer asks.

No gradient leaves the top. The customer's part is frozen, and nothing is computed for it.

Shape legend: B examples, T rows of the longest, n width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto import checkpoint
from sotto.checkpoint import Checkpoint
from sotto.config import Config
from sotto.devices import choose_device
from sotto.errors import SottoError
from sotto.models import load as models_load
from sotto.models.trainable import prepare
from sotto.optim import Optimizer
from sotto.split.cache import Representations
from sotto.split.customer import agreement, load_bottom, setting_of
from sotto.split.labels import corrected_loss
from sotto.split.parts import Top, require_depth

SCORING_BATCH = 64

Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B,) examples and (B, K) scores to (B, K) noised gradients: the customer, when it keeps the labels."""


class Vendor:
    """Holds the model.

    Attributes:
      agreement: what it expects the customer to have.
      top: the part that is trained.
      step: training steps taken.
    """

    def __init__(self, config: Config):
        self.config, self.setting = config, setting_of(config)
        bottom, self.tokenizer = load_bottom(config)
        self.agreement = agreement(config, bottom)
        self._bottom = bottom if self.agreement.values == "ids" else None  # to turn ids into rows again
        self.device = choose_device(config.run.device)
        self.top = _trainable_top(config).to(self.device)
        self.step = 0
        trained = {name: p for name, p in self.top.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(trained, config.stepping, config.steps)

    def train(
        self,
        sent: Representations,
        checkpoints: Path | None = None,
        answer: Answer | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        """Trains to the end, from the newest checkpoint on.

        Args:
          checkpoints: an existing folder, or None to keep nothing.
          answer: the customer, if it keeps the labels.
          progress: called with (steps done, loss of the step; nan if the labels are kept).

        Raises:
          SottoError: SOT825, the customer keeps its labels and does not answer.
        """
        if (self.setting.labels == "kept") != (answer is not None):
            raise SottoError(
                "SOT825", what="nobody answers for the labels", where="setting.labels: kept",
                why="the vendor has no label to train on", fix="train with a customer that is connected",
            )  # fmt: skip
        if checkpoints is not None:
            self._restore(checkpoints)
        every = self.config.run.checkpoint_every or max(1, self.config.steps // 10)
        if answer is not None:
            every = 1  # a step that is done again would ask for answers that are not paid for
        self.top.train(self.config.method.dropout)
        for step, chosen in self._batches(len(sent)):
            loss = self._one(sent, chosen, answer)
            self.step = step + 1
            if progress is not None:
                progress(self.step, loss)
            if checkpoints is not None and (self.step % every == 0 or self.step == self.config.steps):
                self._save(checkpoints)
        with torch.no_grad():
            for name, value in self.optimizer.final_weights().items():
                self.optimizer.parameters[name].copy_(value)

    def _one(self, sent: Representations, chosen: np.ndarray, answer: Answer | None) -> float:
        values, mask_BT = sent.batch(chosen)
        scores_BK = self.scores(values, mask_BT)
        loss = float("nan")
        if answer is None:
            assert sent.labels_E is not None
            epsilon = self.setting.label_epsilon if self.setting.labels == "randomised" else None
            value = corrected_loss(scores_BK.float(), sent.labels_E[chosen].to(self.device), epsilon)
            value.backward()
            loss = float(value.detach())
        else:
            gradient_BK = answer(torch.from_numpy(chosen), scores_BK.detach().float().cpu())
            scores_BK.backward(gradient_BK.to(scores_BK) / len(chosen))
        parameters = self.optimizer.parameters
        self.optimizer.step(
            {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in parameters.items()}, self.step
        )
        return loss

    def scores(self, values: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """(B, K) scores of what was sent: rows (B, T, n), or ids (B, T)."""
        if self._bottom is not None:
            values = self._bottom.hidden({"input_ids": values, "attention_mask": mask_BT})
        return self.top(values.to(self.device), mask_BT.to(self.device), max(1, self.agreement.segment))

    @torch.no_grad()
    def predict(self, sent: Representations) -> torch.Tensor:
        """(E, K) scores of all examples of an upload or a query."""
        self.top.eval()
        parts: list[Any] = [None] * len(sent)
        order = np.argsort(sent.lengths_E, kind="stable")
        for start in range(0, len(order), SCORING_BATCH):
            chosen = order[start : start + SCORING_BATCH]
            for place, row in zip(chosen, self.scores(*sent.batch(chosen)).float().cpu(), strict=True):
                parts[place] = row
        return torch.stack(parts)

    def _batches(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, examples), from `self.step` on: passes in an order that depends on the seed and the pass alone."""
        size, per_pass = steps_of_a_pass(self.config, count)
        for step in range(self.step, self.config.steps):
            epoch, place = divmod(step, per_pass)
            order = np.random.default_rng([self.config.run.seed, epoch]).permutation(count)
            yield step, order[place * size : (place + 1) * size]

    def _save(self, folder: Path) -> None:
        weights = {name: p.detach() for name, p in self.optimizer.parameters.items()}
        checkpoint.save(folder, Checkpoint(self.step, weights, self.optimizer.state_tensors(), {}))

    def _restore(self, folder: Path) -> None:
        latest, _ = checkpoint.load_latest(folder)
        if latest is None:
            return
        self.optimizer.restore(latest.weights, latest.optimizer)
        self.step = latest.step


def steps_of_a_pass(config: Config, examples: int) -> tuple[int, int]:
    """Examples of a step, and steps of a pass over the data; what is left over in a pass waits for the next."""
    size = min(config.run.expected_batch_size, examples)
    return size, max(1, examples // size)


def passes(config: Config, examples: int) -> int:
    """How often an example is used at most."""
    return -(-config.steps // steps_of_a_pass(config, examples)[1])


def _trainable_top(config: Config) -> Top:
    method = config.method
    layer = setting_of(config).layer
    loaded = models_load.load_model(config.model, config.data, method, config.run.seed)
    if method.train == "side":
        return Top(_with_side(loaded.model, config, layer), layer)
    top = Top(loaded.model, layer)
    if method.train == "lora":
        wanted = method.lora_layers if method.lora_layers is not None else top.trained_layers
        blocks = tuple(block for block in wanted if block in top.trained_layers)
        if not blocks:
            raise SottoError(
                "SOT811", what="no block that may be trained lies above the cut", where="method.lora_layers",
                why="the customer's part is frozen, and an adapter below the cut would never run",
                fix="cut lower with setting.layer, or train the head with method.train: head",
            )  # fmt: skip
        method = method.model_copy(update={"lora_layers": blocks})
    top.model = prepare(top.model, method, config.run.seed)
    top.freeze_below()
    return top


def _with_side(model: nn.Module, config: Config, layer: int) -> nn.Module:
    """The whole model with a side network that begins at the cut.

    Before the model is cut, because only a whole one can be run on tokens, to see that the side network fits it and
    starts at its function. What enters it after the cut is what the customer sent.
    """
    if layer == len(require_depth(model, layer).layers):
        raise SottoError(
            "SOT811", what="no block lies above the cut", where="setting.layer",
            why="a side network stands beside blocks that the vendor runs, and the customer runs them all",
            fix="cut lower with setting.layer, or train the head with method.train: head",
        )  # fmt: skip
    return prepare(model, config.method, config.run.seed, first=layer)
