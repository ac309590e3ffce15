"""An exact search, where a token's row depends on nothing behind it and no noise was put on it.

Then the first token is the one whose row is what was sent, the second the one that gives the second row behind the
first, and so on: each place is a search through the vocabulary, and depth is no obstacle (Nikolaou et al., arXiv
2510.15511). Candidates are tried in the order in which another attack ranks them, so few are.

Shape legend: E texts, T positions, n width, C candidates.
"""

from __future__ import annotations

import torch

from sotto.split.inversion import Trained
from sotto.split.parts import Bottom
from sotto.split.view import View

TOLERANCE = 4e-3
"""A row that is no farther from the sent one, relative to its length, is it: float16 leaves less than 1e-3."""
FIRST = 32
"""Candidates that are tried at once at first; then eight times as many, up to `MOST`."""
MOST = 2048


def is_causal(bottom: Bottom) -> bool:
    """Whether rows stay as they are when later tokens change; seen by trying it."""
    ids = torch.arange(6).repeat(2, 1) % len(bottom.table_Vn)
    ids[1, 4:] = 0
    first, second = bottom.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, :4]
    return bottom.layer > 0 and bool(torch.allclose(first, second, atol=1e-5))


@torch.no_grad()
def search(view: View, bottom: Bottom, first: Trained) -> torch.Tensor:
    """(E, T) tokens, found one after the other from the left."""
    assert not view.ids_sent
    scores_ETC = first.scores(view)
    others = torch.ones(len(bottom.table_Vn), dtype=torch.bool)
    others[first.candidates_C] = False
    rest = torch.nonzero(others).flatten()
    found_ET = torch.zeros_like(view.ids_ET)
    for text in range(len(found_ET)):
        for place in range(int(view.mask_ET[text].sum())):
            ranked = first.candidates_C[scores_ETC[text, place].argsort(descending=True)]
            before = found_ET[text, :place]
            found_ET[text, place] = _next(before, view.values[text, place], torch.cat([ranked, rest]), bottom)
    return found_ET


def _next(before: torch.Tensor, sent_n: torch.Tensor, ranked: torch.Tensor, bottom: Bottom) -> int:
    """The candidate whose row behind these tokens is what was sent; else the nearest one that was tried."""
    best, least, start, size = int(ranked[0]), float("inf"), 0, FIRST
    while start < len(ranked) and least > TOLERANCE * float(sent_n.norm()):
        some = ranked[start : start + size]
        ids = torch.cat([before.expand(len(some), -1), some[:, None]], dim=1)
        rows_Cn = bottom.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        apart = (rows_Cn - sent_n).norm(dim=1)
        if float(apart.min()) < least:
            best, least = int(some[apart.argmin()]), float(apart.min())
        start, size = start + len(some), min(8 * size, MOST)
    return best
