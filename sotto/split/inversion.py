"""Attacks that turn representations back into text.

Beside the nearest neighbour (see `nearest`) there are attacks that are not so easily defeated by depth: a network that
is trained on releases of other texts under the same noise (Song and Raghunathan, arXiv 2004.00053), a linear map, a
search for tokens whose representation fits (Chen et al., arXiv 2409.00960), and one that corrects the nearest
neighbours by their context.

Shape legend: E texts, T positions, n width, C candidate tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from sotto.models import support
from sotto.split.parts import Bottom
from sotto.split.view import View

HIDDEN, HEADS, BATCH = 256, 4, 32


class Inverter(nn.Module):
    """Rows to scores of candidate tokens: each row by itself, plus two layers that see its neighbours."""

    def __init__(self, width: int, candidates: int, most: int):
        super().__init__()
        self.scale = nn.LayerNorm(width)
        self.own = nn.Linear(width, HIDDEN)
        self.place = nn.Embedding(most, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, dropout=0.0, batch_first=True, norm_first=True)
        self.context = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(HIDDEN, candidates)

    def forward(self, rows_ETn: torch.Tensor, mask_ET: torch.Tensor) -> torch.Tensor:
        """(E, T, C) scores."""
        places = torch.arange(rows_ETn.shape[1]).clamp_max(self.place.num_embeddings - 1)
        own = self.own(self.scale(rows_ETn)) + self.place(places)
        return self.out(own + self.context(own, src_key_padding_mask=~mask_ET.bool()))


class Trained:
    """A network that was trained to invert, and the tokens that it knows."""

    def __init__(self, network: Inverter, candidates_C: torch.Tensor, rows: Callable[[View], torch.Tensor]):
        self.network, self.candidates_C, self._rows = network.eval(), candidates_C, rows

    @torch.no_grad()
    def scores(self, view: View) -> torch.Tensor:
        """(E, T, C) for all texts of a view."""
        rows = self._rows(view)
        parts = zip(rows.split(BATCH), view.mask_ET.split(BATCH), strict=True)
        return torch.cat([self.network(part, mask) for part, mask in parts])

    def guess(self, view: View) -> torch.Tensor:
        """(E, T) tokens."""
        return self.candidates_C[self.scores(view).argmax(dim=2)]


def train_inverter(
    fresh: Callable[[], View],
    rows: Callable[[View], torch.Tensor],
    passes: int,
    seed: int = 0,
    rate: float = 1e-3,
    most: int = 0,
) -> Trained:
    """Trains on views of the attacker's own texts, privatized anew for every pass.

    Args:
      fresh: gives one.
      rows: what of it the network sees: (E, T, n).
      passes: over the texts.
      most: positions of the longest text that will be attacked, where it is longer than all known ones.
    """
    view = fresh()
    candidates = view.ids_ET[view.mask_ET.bool()].unique()
    index = torch.zeros(int(candidates.max()) + 1, dtype=torch.int64)
    index[candidates] = torch.arange(len(candidates))
    with support.seeded(seed):
        longest = max(most, view.ids_ET.shape[1])
        network = Inverter(rows(view).shape[2], len(candidates), longest)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    total, step = passes * -(-len(view.ids_ET) // BATCH), 0
    generator = torch.Generator().manual_seed(seed)
    for number in range(passes):
        view = fresh() if number else view
        rows_ETn = rows(view)
        for chosen in torch.randperm(len(view.ids_ET), generator=generator).split(BATCH):
            part = view.part(chosen)
            keep = part.mask_ET.bool()
            scores = network(rows_ETn[chosen, : keep.shape[1]], part.mask_ET)[keep]
            optimizer.param_groups[0]["lr"] = rate * (1 - step / total)
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, index[part.ids_ET[keep]]).backward()
            optimizer.step()
            step += 1
    return Trained(network, candidates, rows)


class Linear:
    """The token whose embedding points most nearly where a linear map sends the row.

    Fitted by least squares from rows to embeddings of the attacker's own texts. It knows no context, but unlike a
    network with one output for each token it also recovers tokens that it has never seen.
    """

    def __init__(self, bottom: Bottom, tokens_V: torch.Tensor, views: Iterable[View], ridge: float = 1e-3):
        table = bottom.table_Vn.double()
        self._mean_n = table[tokens_V].mean(dim=0)
        wide = bottom.width + 1
        gram, cross = torch.zeros(wide, wide).double(), torch.zeros(wide, bottom.width).double()
        for view in views:
            keep = view.counted_ET
            rows = _with_one(view.values[keep])
            gram += rows.T @ rows
            cross += rows.T @ (table[view.ids_ET[keep]] - self._mean_n)
        gram += ridge * gram.diagonal().mean() * torch.eye(wide).double()
        self._map = torch.linalg.solve(gram, cross)
        directions = nn.functional.normalize(table[tokens_V] - self._mean_n, dim=1)
        self._directions_Vn, self._tokens_V = directions.float(), tokens_V

    def guess(self, view: View) -> torch.Tensor:
        """(E, T) tokens."""
        guesses = torch.zeros_like(view.ids_ET)
        keep = view.mask_ET.bool()
        aimed = (_with_one(view.values[keep]) @ self._map).float()
        best = [(some @ self._directions_Vn.T).argmax(dim=1) for some in aimed.split(512)]
        guesses[keep] = self._tokens_V[torch.cat(best)]
        return guesses


def _with_one(rows_Nn: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(rows_Nn.double(), (0, 1), value=1.0)


def search(view: View, bottom: Bottom, first: Trained, choices: int = 32, steps: int = 40) -> torch.Tensor:
    """(E, T) tokens whose representations are near the rows that were sent, sought by gradient.

    A mixture over the `choices` likeliest tokens of each place, as a trained inverter ranks them, is moved so that
    |bottom(mixture) - sent| falls; the inverter's own scores are where it starts.
    """
    assert not view.ids_sent
    guesses = []
    for chosen in torch.arange(len(view.ids_ET)).split(BATCH):
        part = view.part(chosen)
        scores = first.scores(part).log_softmax(dim=2)
        likely = scores.topk(min(choices, scores.shape[2]), dim=2)
        tokens = first.candidates_C[likely.indices]
        table = bottom.table_Vn[tokens]
        weights = likely.values.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=0.3)
        keep = part.mask_ET.bool().unsqueeze(-1)
        for _ in range(steps):
            mixture = (weights.softmax(dim=2).unsqueeze(-1) * table).sum(dim=2)
            wrong = (bottom.hidden_of_embeddings(mixture, part.mask_ET) - part.values) * keep
            optimizer.zero_grad()
            wrong.square().sum().backward()
            optimizer.step()
        found = tokens.gather(2, weights.argmax(dim=2, keepdim=True)).squeeze(2)
        padded = torch.zeros(len(chosen), view.ids_ET.shape[1], dtype=torch.int64)
        padded[:, : found.shape[1]] = found
        guesses.append(padded)
    return torch.cat(guesses)
