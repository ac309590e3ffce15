"""What an attacker is given: releases beside the texts they were made of, and as many more as it cares to simulate.

The attacker is the vendor, or whoever reads its disk. It knows the model and the privatizer, and has texts of the same
kind, which it can privatize itself as often as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sotto.data.examples import Examples
from sotto.split.customer import Customer


@dataclass(frozen=True)
class View:
    """E releases.

    Shape legend: E texts, T positions of the longest, R rows of the longest, S segments, n width.

    Attributes:
      values: (E, R, n) float32 rows as they were sent, or (E, T) int64 token ids. Padding is zero.
      ids_ET: the true tokens.
      mask_ET: 1 where there is a token.
      counted_ET: True where recovering the token counts: no special and no exempt ones.
      exempt_ET: True for exempt tokens.
      labels_E: the true classes.
      segment: tokens that a row stands for, 0 for all of a text.
      around_E2n: the rows that were sent before and behind the only one of this view; None where none were.
    """

    values: torch.Tensor
    ids_ET: torch.Tensor
    mask_ET: torch.Tensor
    counted_ET: torch.Tensor
    exempt_ET: torch.Tensor
    labels_E: torch.Tensor
    segment: int = 1
    around_E2n: torch.Tensor | None = None

    @property
    def ids_sent(self) -> bool:
        return self.values.ndim == 2

    @property
    def pooled(self) -> bool:
        """Whether one row was sent for all tokens together."""
        return self.segment == 0

    @property
    def rows_E(self) -> torch.Tensor:
        """Rows of each text."""
        tokens_E = self.mask_ET.sum(dim=1)
        return torch.ones_like(tokens_E) if self.pooled else (tokens_E // self.segment).clamp_min(1)

    def part(self, chosen: torch.Tensor) -> View:
        """Some of the texts, without the columns that none of them needs."""
        most = int(self.mask_ET[chosen].sum(dim=1).max())
        rows = 1 if self.pooled else most
        return View(
            self.values[chosen][:, :rows],
            self.ids_ET[chosen][:, :most],
            self.mask_ET[chosen][:, :most],
            self.counted_ET[chosen][:, :most],
            self.exempt_ET[chosen][:, :most],
            self.labels_E[chosen],
            self.segment,
            None if self.around_E2n is None else self.around_E2n[chosen],
        )

    def by_segment(self) -> View:
        """Each row with the tokens that it stands for, as if it were a text; the view itself where it is one."""
        if self.segment < 2:
            return self
        rows_E, most = self.rows_E, 2 * self.segment - 1
        text_S = torch.arange(len(rows_E)).repeat_interleave(rows_E)
        place_S = torch.arange(len(text_S)) - (rows_E.cumsum(0) - rows_E)[text_S]
        last_S = place_S + 1 == rows_E[text_S]
        size_S = torch.where(last_S, self.mask_ET.sum(dim=1)[text_S] - self.segment * place_S, self.segment)
        inside_SW = torch.arange(most) < size_S[:, None]
        token_SW = self.segment * place_S[:, None] + torch.arange(most)
        taken = text_S[:, None], token_SW.masked_fill(~inside_SW, 0)
        wide_EQn = nn.functional.pad(self.values, (0, 0, 1, 1))  # before the first and behind the last row: zeros
        return View(
            self.values[text_S, place_S].unsqueeze(1),
            self.ids_ET[taken] * inside_SW,
            inside_SW.to(self.mask_ET.dtype),
            self.counted_ET[taken] & inside_SW,
            self.exempt_ET[taken] & inside_SW,
            self.labels_E[text_S],
            0,
            torch.stack([wide_EQn[text_S, place_S], wide_EQn[text_S, place_S + 2]], dim=1),
        )


def look(customer: Customer, examples: Examples, chosen: np.ndarray) -> View:
    """One fresh release of some texts, as an attacker sees it."""
    piece = customer.query(examples, chosen)
    batch = examples.collate(chosen, customer.tokenizer.pad_token_id)
    ids_ET, mask_ET = batch["input_ids"], batch["attention_mask"]
    segment, most = customer.agreement.segment, ids_ET.shape[1]
    shape = (len(chosen), 1 if not segment else max(1, most // segment), *piece.values.shape[1:])
    values = torch.zeros(shape, dtype=torch.int64 if piece.values.ndim == 1 else torch.float32)
    ends = np.cumsum(piece.lengths_E)
    for place, (end, length) in enumerate(zip(ends, piece.lengths_E, strict=True)):
        # More rows than tokens leave where the length is hidden: the attacker is given those that belong to tokens.
        row = piece.values[end - length : end][: shape[1]]
        values[place, : len(row)] = torch.from_numpy(row.astype(np.int64 if row.ndim == 1 else np.float32))
    special = torch.zeros(len(customer.bottom.table_Vn), dtype=torch.bool)
    special[customer.special] = True
    exempt_ET = customer.exempt_V[ids_ET] & mask_ET.bool()
    counted_ET = mask_ET.bool() & ~special[ids_ET] & ~exempt_ET
    assert examples.labels is not None
    labels_E = torch.from_numpy(examples.labels[chosen])
    return View(values, ids_ET, mask_ET, counted_ET, exempt_ET, labels_E, segment)


def best_of(candidates_C: torch.Tensor, scores: Iterable[torch.Tensor], most: int) -> torch.Tensor:
    """(E, K) candidates, from their scores (., C) in parts."""
    orders = [best(some, most) for some in scores]
    return torch.cat([candidates_C[order].masked_fill(order < 0, -1) for order in orders])


def best(scores_EV: torch.Tensor, count: int) -> torch.Tensor:
    """(E, K) tokens with the highest scores; -1 in place of those that cannot be."""
    top = scores_EV.topk(min(count, scores_EV.shape[1]), dim=1)
    order_EK = top.indices.masked_fill(top.values == -torch.inf, -1)
    return nn.functional.pad(order_EK, (0, count - order_EK.shape[1]), value=-1)


def success(guesses_ET: torch.Tensor, view: View) -> float:
    """The part of the tokens that count that were guessed: the attack's success. 0 where none counts."""
    hits = (guesses_ET == view.ids_ET)[view.counted_ET]
    return float(hits.double().mean()) if len(hits) else 0.0


def rouge(guesses_ET: torch.Tensor, view: View) -> float:
    """ROUGE-L (Lin 2004) of what was guessed, over the tokens that count: mean over the texts that have any.

    Guess and truth are equally long, so precision, recall and their mean are one: the longest common subsequence over
    the length.
    """
    lengths_E = view.counted_ET.sum(dim=1)
    order_ET = (~view.counted_ET).to(torch.int8).argsort(dim=1, stable=True)[:, : int(lengths_E.max())]
    inside_ET = torch.arange(order_ET.shape[1]) < lengths_E[:, None]
    truth_ET = view.ids_ET.gather(1, order_ET).masked_fill(~inside_ET, -1)
    guess_ET = guesses_ET.gather(1, order_ET).masked_fill(~inside_ET, -2)
    longest = torch.zeros(len(lengths_E), order_ET.shape[1] + 1, dtype=torch.int64)
    for token_E in truth_ET.T:
        above = longest.clone()
        for place in range(order_ET.shape[1]):
            matched = above[:, place] + (token_E == guess_ET[:, place])
            longest[:, place + 1] = torch.stack([above[:, place + 1], longest[:, place], matched]).amax(dim=0)
    some_E = lengths_E > 0
    return float((longest[some_E, -1] / lengths_E[some_E]).double().mean()) if bool(some_E.any()) else 0.0


def rare(known: View, size: int, share: float = 0.005) -> torch.Tensor:
    """(V,) True for tokens that stand in few of the known texts, or in none: names and numbers are among them."""
    found = torch.zeros(len(known.ids_ET), size, dtype=torch.bool)
    texts, places = known.mask_ET.nonzero(as_tuple=True)
    found[texts, known.ids_ET[texts, places]] = True
    return found.double().mean(dim=0) <= share
