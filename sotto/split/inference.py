"""Attacks that infer a fact about a text rather than its words: a class, an attribute, a label that was kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sotto.models import support
from sotto.models.pooling import masked_mean
from sotto.split.labels import LabelKeeper
from sotto.split.view import View

EPOCHS = 4
"""Over each fresh release of the known texts."""


def features(view: View, table_Vn: torch.Tensor) -> torch.Tensor:
    """(E, n) what was sent of each text, as one vector: the mean of its rows."""
    rows = table_Vn[view.values] if view.ids_sent else view.values
    return masked_mean(rows, torch.arange(rows.shape[1]) < view.rows_E[:, None])


def infer_attribute(
    fresh: Callable[[], View], target: View, table_Vn: torch.Tensor, classes: int, passes: int, seed: int = 0
) -> float:
    """Accuracy of a two-layer network that guesses the class of a text from what was sent of it.

    Args:
      fresh: a view of the attacker's own texts, privatized anew; their classes are known to it.
    """
    width = table_Vn.shape[1]
    with support.seeded(seed):
        network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, classes)
        )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        view = fresh()
        given, labels = features(view, table_Vn), view.labels_E
        orders = [torch.randperm(len(given), generator=generator) for _ in range(EPOCHS)]
        for chosen in torch.cat(orders).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(given[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        guesses = network(features(target, table_Vn)).argmax(dim=1)
    return float((guesses == target.labels_E).double().mean())


def infer_labels(keeper: LabelKeeper, labels_E: torch.Tensor, classes: int) -> float:
    """Accuracy of the guess that a label is where the sum of all answers is least.

    The attacker sends the same scores every time, which makes the sum sufficient for the label: no attack on these
    answers is better.
    """
    total = torch.zeros(len(labels_E), classes)
    for _ in range(keeper.uses):
        total += keeper.answer(torch.arange(len(labels_E)), torch.zeros(len(labels_E), classes))
    return float((total.argmin(dim=1) == labels_E).double().mean())


def best_guess(labels_E: torch.Tensor) -> float:
    """Accuracy of naming the commonest class every time."""
    return float(labels_E.bincount().max()) / max(1, len(labels_E))
