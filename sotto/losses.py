"""One loss per example, never an average over the batch: the batch average would couple the examples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def forward_losses(model: nn.Module, batch: dict[str, torch.Tensor], task: str) -> torch.Tensor:
    """Runs the model and returns (B,) losses.

    Args:
      batch: `input_ids`, `attention_mask` (B, T), optionally `token_type_ids`, and `labels`: (B,) classes, or (B, T)
        tokens with -100 where no loss is taken.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    return classification(logits, batch["labels"]) if task == "classification" else language(logits, batch["labels"])


def _float32_or_better(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def classification(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_float32_or_better(logits_BC), labels_B, reduction="none")


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) next-token losses, zero where no loss is taken, and the (B,) number of tokens that count."""
    # Shifting the labels instead of the logits saves a copy of the largest tensor of all.
    targets = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    logits = _float32_or_better(logits_BTV)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape), (targets != -100).sum(1)


def language(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B,) mean loss over each example's own tokens, in nats."""
    losses, counts = token_losses(logits_BTV, labels_BT)
    return losses.sum(1) / counts.clamp(min=1)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}
