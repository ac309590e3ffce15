"""Does a language model give a planted canary away when it is prompted with its beginning?

Two measures (Carlini et al. 2019, arXiv 1802.08232). Exact extraction: the likeliest continuation of the beginning is
the canary's end, token for token. Exposure: among so many random ends after the same beginning, the rank that the model
gives to the true one, in bits; of a canary that the model has never seen it is about 1.4 on average, whatever the
number of ends.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.auditing.canaries import ordinary
from sotto.auditing.membership import losses
from sotto.data import LoadedData
from sotto.data.examples import Examples
from sotto.data.units import Units
from sotto.losses import to_device

RIVALS = 127
"""Random ends that a true one is ranked among: the largest exposure is log2(RIVALS + 1)."""
RANKED = 32
"""Canaries of each kind whose exposure is measured, at most."""


@torch.no_grad()
def completed(model: nn.Module, tokenizer: Any, data: LoadedData, device: torch.device, size: int = 32) -> np.ndarray:
    """(n,) whether the likeliest continuation of a canary's beginning is its end.

    Every token of the end has to be the likeliest after those before it; then greedy generation writes the whole end.
    """
    found = np.zeros(len(data.examples), bool)
    for start in range(0, len(found), size):
        rows = np.arange(start, min(start + size, len(found)))
        batch = to_device(data.examples.collate(rows, tokenizer.pad_token_id), device)
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch).logits[:, :-1].argmax(-1)
        found[rows] = ((guesses == labels) | (labels < 0)).all(1).cpu().numpy()
    return found


def exposures(
    model: nn.Module,
    tokenizer: Any,
    data: LoadedData,
    chosen: np.ndarray,
    device: torch.device,
    generator: np.random.Generator,
    rivals: int = RIVALS,
) -> np.ndarray:
    """Bits of exposure of each chosen canary: log2(rivals + 1) - log2(rank). Ties are broken against the attacker."""
    found, usable = np.empty(len(chosen)), ordinary(tokenizer)
    for place, canary in enumerate(chosen.tolist()):
        tokens = data.examples.input_ids[data.examples.offsets[canary] : data.examples.offsets[canary + 1]]
        prompt = int(data.examples.prompt_lengths[canary])
        ends = usable[generator.integers(len(usable), size=(rivals, len(tokens) - prompt))]
        sequences = [tokens.tolist(), *([*tokens[:prompt].tolist(), *end.tolist()] for end in ends)]
        examples = Examples.build(
            sequences,
            rows=[-1] * len(sequences),
            token_type_ids=None if data.examples.token_type_ids is None else [[0] * len(s) for s in sequences],
            prompt_lengths=[prompt] * len(sequences),
        )
        units, _ = Units.build(None, len(sequences), 1, 0)
        ranked = dataclasses.replace(data, examples=examples, units=units)
        loss = losses(model, tokenizer, ranked, np.arange(len(sequences)), "generation", device, 64)
        rank = 1 + int((loss[1:] <= loss[0]).sum())
        found[place] = math.log2(rivals + 1) - math.log2(rank)
    return found
