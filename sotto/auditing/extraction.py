"""Does a language model give a planted secret away when it is prompted with its beginning?

Two measures (Carlini et al. 2019, arXiv 1802.08232). Exact extraction: the likeliest continuation of the beginning is
the code, token for token. Exposure: the rank that the model gives to the true code among all that it could be, in bits:
log2(codes) - log2(rank). It is computed exactly, by the probability of each code; of a secret that the model has never
seen it is about 1.4 on average, whatever the number of codes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.auditing.codes import Secrets
from sotto.data import LoadedData
from sotto.losses import to_device

RANKED = 32
"""Secrets of each kind whose exposure is measured, at most."""


@torch.no_grad()
def completed(model: nn.Module, tokenizer: Any, data: LoadedData, device: torch.device, size: int = 32) -> np.ndarray:
    """(n,) whether the likeliest continuation of a secret's beginning is its end.

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
    model: nn.Module, tokenizer: Any, secrets: Secrets, chosen: np.ndarray, device: torch.device
) -> np.ndarray:
    """Bits of exposure of each chosen secret. Ties are broken against the attacker."""
    found, examples = np.empty(len(chosen)), secrets.data.examples
    for place, secret in enumerate(chosen.tolist()):
        start = examples.offsets[secret]
        prompt = examples.input_ids[start : start + examples.prompt_lengths[secret]].tolist()
        likely = log_likelihoods(model, tokenizer, prompt, secrets.ends, device)
        rank = int((likely >= likely[secrets.numbers[secret]]).sum())
        found[place] = math.log2(len(likely)) - math.log2(rank)
    return found


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, tokenizer: Any, prompt: list[int], ends: list[list[int]], device: torch.device, size: int = 64
) -> np.ndarray:
    """(n,) log-probability of each end after the prompt. Beginnings that ends have in common are read once."""
    begun = sorted({tuple(end[:n]) for end in ends for n in range(len(end))}, key=lambda begin: (len(begin), begin))
    number = {begin: at for at, begin in enumerate(begun)}
    wanted: list[list[int]] = [sorted({end[len(b)] for end in ends if tuple(end[: len(b)]) == b}) for b in begun]
    steps: dict[tuple[int, ...], float] = {}
    for start in range(0, len(begun), size):
        some = begun[start : start + size]
        length = len(prompt) + max(map(len, some))
        ids = torch.full((len(some), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, begin in enumerate(some):
            whole = torch.tensor([*prompt, *begin])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().log_softmax(-1).cpu()
        for row, begin in enumerate(some):
            last = logits[row, len(prompt) + len(begin) - 1]
            steps |= {(*begin, token): float(last[token]) for token in wanted[number[begin]]}
    return np.array([sum(steps[tuple(end[: n + 1])] for n in range(len(end))) for end in ends])
