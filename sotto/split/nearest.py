"""The nearest neighbour: which token lies closest to a row, by whichever way of comparing serves the attacker best.

The attacker of the Split-and-Privatize paper (arXiv 2312.15603). "Nearest" needs a measure, and the obvious one is weak
above the embeddings: a row lies far from all of them. Three are tried here on texts that the attacker knows, and the
one that finds most is taken: the distance to a token's representation without a context, the angle to it, and the angle
to the token's embedding, the angles around the mean of all rows. A residual stream keeps the direction of its embedding
through many blocks, so the last one often wins.

Shape legend: E texts, T positions, N rows, n width, C candidate tokens, K tokens that are named at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sotto.split.parts import Bottom
from sotto.split.view import View, best_of

KNOWN = 512
"""Rows of known texts on which the measures are compared."""


@dataclass(frozen=True)
class Measure:
    """Scores tokens for rows: the product of row and token around their means, less what long tokens gain by length."""

    name: str
    away_n: torch.Tensor
    directions_Cn: torch.Tensor
    less_C: torch.Tensor

    def scores(self, rows_Nn: torch.Tensor) -> torch.Tensor:
        """(N, C), the highest for the nearest."""
        return (rows_Nn - self.away_n) @ self.directions_Cn.T - self.less_C


@torch.no_grad()
def alone(bottom: Bottom, tokens_V: torch.Tensor) -> torch.Tensor:
    """(C, n) representations of tokens without a context: each behind itself."""
    parts = []
    for some in tokens_V.split(4096):
        ids = some[:, None].expand(-1, 2)
        parts.append(bottom.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, 1])
    return torch.cat(parts)


def measures(bottom: Bottom, tokens_V: torch.Tensor, mean_n: torch.Tensor) -> list[Measure]:
    """The ways of comparing.

    Args:
      mean_n: of the rows that the attacker has seen.
    """
    alone_Cn, none_C = alone(bottom, tokens_V), torch.zeros(len(tokens_V))
    table_Cn = bottom.table_Vn[tokens_V].float()
    return [
        Measure("distance", torch.zeros_like(mean_n), alone_Cn, alone_Cn.square().sum(dim=1) / 2),
        Measure("angle", mean_n, unit(alone_Cn), none_C),
        Measure("angle to the embedding", mean_n, unit(table_Cn), none_C),
    ]


def unit(rows_Cn: torch.Tensor) -> torch.Tensor:
    """Directions around the mean."""
    return nn.functional.normalize(rows_Cn - rows_Cn.mean(dim=0), dim=1)


class Nearest:
    """Names the tokens that are nearest to each row; ids that were sent, as they are.

    At layer 0 a token's representation depends on nothing but its place. So where a row stands for one token, it is
    compared with every token at its own place, and that distance is the likelihood of the noise: no other measure is
    tried.

    Attributes:
      measure: the one that found most in known texts.
    """

    def __init__(self, bottom: Bottom, tokens_V: torch.Tensor, known: View):
        """Compares the measures on `known`, a view of the attacker's own texts."""
        self.bottom, self.tokens_V = bottom, tokens_V
        self._by_place = bottom.layer == 0 and known.segment == 1
        if known.ids_sent or self._by_place:
            return
        keep_ER = torch.arange(known.values.shape[1]) < known.rows_E[:, None]
        mean_n = known.values[keep_ER].mean(dim=0)
        found = [(self._success(measure, known), measure) for measure in measures(bottom, tokens_V, mean_n)]
        self.measure = max(found, key=lambda pair: pair[0])[1]

    def _success(self, measure: Measure, known: View) -> int:
        """How many of some rows' words are named; each row's own as many as it has."""
        rows = known.by_segment()
        if not rows.pooled:
            keep = rows.counted_ET
            order_N1 = self._order(measure, rows.values[keep][:KNOWN], 1)
            return int((order_N1[:, 0] == rows.ids_ET[keep][:KNOWN]).sum())
        words_NT = rows.ids_ET[:KNOWN].masked_fill(~rows.counted_ET[:KNOWN], -1)
        order_NK = self._order(measure, rows.values[:KNOWN, 0], rows.ids_ET.shape[1])
        among_NK = torch.arange(order_NK.shape[1]) < rows.counted_ET[:KNOWN].sum(dim=1)[:, None]
        return int(((order_NK[:, :, None] == words_NT[:, None, :]).any(dim=2) & among_NK).sum())

    def _order(self, measure: Measure, rows_Nn: torch.Tensor, most: int) -> torch.Tensor:
        return best_of(self.tokens_V, (measure.scores(some) for some in rows_Nn.split(512)), most)

    def named(self, rows_Nn: torch.Tensor, most: int) -> torch.Tensor:
        """(N, K) tokens of rows, the nearest first."""
        return self._order(self.measure, rows_Nn, most)

    def guess(self, view: View) -> torch.Tensor:
        """(E, T) tokens, where a row stands for each."""
        if view.ids_sent:
            return view.values
        if self._by_place:
            return self._at_their_places(view)
        guesses_ET, keep = torch.zeros_like(view.ids_ET), view.mask_ET.bool()
        guesses_ET[keep] = self.named(view.values[keep], 1)[:, 0]
        return guesses_ET

    def _tables(self, places: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(some tokens, their representations at every place (C, places, n)); all of them at once do not fit."""
        for some in self.tokens_V.split(max(1, 65536 // places)):
            ids = some[:, None].expand(-1, places)
            yield some, self.bottom.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    @torch.no_grad()
    def _at_their_places(self, view: View) -> torch.Tensor:
        guesses, places = torch.zeros_like(view.ids_ET), view.ids_ET.shape[1]
        best_ET = torch.full(guesses.shape, -torch.inf)
        for some, hidden_CPn in self._tables(places):
            for place in range(places):
                there, table_Cn = view.mask_ET[:, place].bool(), hidden_CPn[:, place]
                fit = view.values[there, place] @ table_Cn.T - table_Cn.square().sum(dim=1) / 2
                value, index = fit.max(dim=1)
                better = value > best_ET[there, place]
                best_ET[there, place] = torch.where(better, value, best_ET[there, place])
                guesses[there, place] = torch.where(better, some[index], guesses[there, place])
        return guesses
