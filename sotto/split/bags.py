"""Attacks on one row that stands for several tokens, a segment or a whole text: which words does it hold?

Order is lost in a mean, words are not. Multi-label inversion after Song and Raghunathan (arXiv 2004.00053), linear
and with a hidden layer; the tokens that lie nearest; and orthogonal matching pursuit (Pati et al. 1993), which takes
the best token, subtracts what it explains, and goes on: among the representations of single tokens, and among
embeddings, to whose sum a linear map leads. Where a text has several rows, those that learn also see the rows before
and behind, which tell of the same tokens above the embeddings.

Every attack is told how many different words a row stands for, and names as many: its success is the part of them that
it names, for all rows together.

Shape legend: E rows, each with its tokens, V tokens of the vocabulary, C candidate tokens, K words that are named at
most, n width, F numbers that an attack sees of one row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sotto.models import support
from sotto.split.nearest import Nearest, alone, unit
from sotto.split.parts import Bottom
from sotto.split.view import View, best, best_of

HIDDEN, BATCH, EPOCHS = 512, 32, 10
"""Of the learned attack; epochs over each fresh release of the known texts, fewer where a text has several rows."""
_AT_ONCE = 1024
"""Rows whose words are held at once."""


def bags(view: View, size: int) -> torch.Tensor:
    """(E, V) True for the tokens that count of each row, each once."""
    found = torch.zeros(len(view.ids_ET), size, dtype=torch.bool)
    texts, places = view.counted_ET.nonzero(as_tuple=True)
    found[texts, view.ids_ET[texts, places]] = True
    return found


def named(order_EK: torch.Tensor, truth_EV: torch.Tensor, of_V: torch.Tensor | None = None) -> float:
    """The part of the words that are named, where as many are named of each row as it has words.

    Args:
      order_EK: tokens, the likeliest first; -1 where there is no more.
      of_V: (V,) True for the words that are looked for; default: all.
    """
    wanted_EV = truth_EV if of_V is None else truth_EV & of_V
    if not int(wanted_EV.sum()):
        return 0.0
    among_EK = (torch.arange(order_EK.shape[1]) < truth_EV.sum(dim=1)[:, None]) & (order_EK >= 0)
    return float((wanted_EV.gather(1, order_EK.clamp_min(0)) & among_EK).sum() / wanted_EV.sum())


def commonest(known: View, target: View, size: int) -> float:
    """What is named by always giving the commonest words, which needs nothing that was sent."""
    texts, places = known.counted_ET.nonzero(as_tuple=True)
    once = torch.unique(torch.stack([texts, known.ids_ET[texts, places]]), dim=1)[1]
    truth_EV = bags(target, size)
    order_1K = best(once.bincount(minlength=size)[None].double(), int(truth_EV.sum(dim=1).max()))
    return named(order_1K.expand(len(target.ids_ET), -1), truth_EV)


def recover(
    bottom: Bottom,
    tokens_V: torch.Tensor,
    target: View,
    fresh: Callable[[], View],
    passes: int,
    searched: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Attack -> (E, K) words, the likeliest first; plain matching pursuit those of the first `searched` texts.

    Args:
      tokens_V: candidates of the attacks that need no texts to learn from.
      fresh: a view of the attacker's own texts, privatized anew.
      searched: texts that matching pursuit is tried on.
    """
    known, rows = [fresh() for _ in range(passes)], target.by_segment()
    counts_E = bags(rows, len(bottom.table_Vn)).sum(dim=1)
    most = int(counts_E.max())
    away_n = torch.cat([view.by_segment().values[:, 0] for view in known]).mean(dim=0)
    tried = rows.values[: int(target.rows_E[:searched].sum()), 0] - away_n
    found = {
        "nearest neighbour": Nearest(bottom, tokens_V, known[0]).named(rows.values[:, 0], most),
        "linear inversion": linear(known, rows, most),
        "linear pursuit": taken_apart(known, rows, bottom.table_Vn, tokens_V, counts_E),
        "learned inversion": learned(known, rows, most, seed),
    }
    if len(tried):
        picked_EK = pursue(tried, unit(alone(bottom, tokens_V)), counts_E[: len(tried)])
        found["matching pursuit"] = _tokens(tokens_V, picked_EK)
    return found


def _tokens(tokens_C: torch.Tensor, order_EK: torch.Tensor) -> torch.Tensor:
    return tokens_C[order_EK].masked_fill(order_EK < 0, -1)


def pursue(rows_En: torch.Tensor, directions_Cn: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """(E, K) indices of unit vectors whose sum, each with a weight of its own, is near the row.

    Args:
      counts_E: how many of each row; -1 stands behind them.
    """
    most = int(counts_E.max()) if len(counts_E) else 0
    parts = [_pursued(some, directions_Cn, most) for some in rows_En.split(256)]
    found_EK = torch.cat(parts) if parts else torch.zeros(0, most, dtype=torch.int64)
    return found_EK.masked_fill(torch.arange(most) >= counts_E[:, None], -1)


def _pursued(rows_En: torch.Tensor, directions_Cn: torch.Tensor, most: int) -> torch.Tensor:
    chosen_EK = torch.zeros(len(rows_En), most, dtype=torch.int64)
    left_En = rows_En
    for taken in range(most):
        fit_EC = (left_En @ directions_Cn.T).scatter_(1, chosen_EK[:, :taken], -torch.inf)
        chosen_EK[:, taken] = fit_EC.argmax(dim=1)
        some_EKn = directions_Cn[chosen_EK[:, : taken + 1]].double()
        # Least squares; a ridge that is nothing keeps two vectors that are the same from having no solution.
        gram_EKK = some_EKn @ some_EKn.mT + 1e-9 * torch.eye(taken + 1).double()
        weights_EK1 = torch.linalg.solve(gram_EKK, some_EKn @ rows_En.double().unsqueeze(2))
        left_En = rows_En - (some_EKn.mT @ weights_EK1).squeeze(2).float()
    return chosen_EK


def _seen(view: View) -> torch.Tensor:
    """(E, 1 or 3, n) what the attacks that learn see of each row: itself, and the ones beside it if any are."""
    return view.values if view.around_E2n is None else torch.cat([view.values, view.around_E2n], dim=1)


def _candidates(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """(C,) tokens that the known texts have, and the place of each among them by its id."""
    candidates_C = view.ids_ET[view.counted_ET].unique()
    index_V = torch.zeros(int(candidates_C.max()) + 1, dtype=torch.int64)
    index_V[candidates_C] = torch.arange(len(candidates_C))
    return candidates_C, index_V


def _words(view: View, chosen: torch.Tensor, index_V: torch.Tensor, count: int) -> torch.Tensor:
    """(B, C) 1 for the words of some rows."""
    found = torch.zeros(len(chosen), count)
    rows, places = view.counted_ET[chosen].nonzero(as_tuple=True)
    found[rows, index_V[view.ids_ET[chosen[rows], places]]] = 1.0
    return found


def _features(seen_ERn: torch.Tensor) -> torch.Tensor:
    """(E, F) float64, with a one."""
    return nn.functional.pad(seen_ERn.flatten(1).double(), (0, 1), value=1.0)


def _fitted(known: list[View], target: View, wanted: Callable[[View, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(E, .) what a linear map says of the target's rows, fitted by least squares to what is wanted of known rows.

    Args:
      wanted: (B, .) float64 of some rows of a view.
    """
    wide, ridge, cross = _seen(target)[0].numel() + 1, 1e-3, torch.zeros(())
    gram = torch.zeros(wide, wide).double()
    for view in known:
        rows = view.by_segment()
        seen_ERn = _seen(rows)
        for chosen in torch.arange(len(seen_ERn)).split(_AT_ONCE):
            given = _features(seen_ERn[chosen])
            gram += given.T @ given
            cross = cross + given.T @ wanted(rows, chosen)
    gram += ridge * gram.diagonal().mean() * torch.eye(wide).double()
    return _features(_seen(target)) @ torch.linalg.solve(gram, cross)


def linear(known: list[View], target: View, most: int) -> torch.Tensor:
    """(E, K) words by a linear map from rows to words."""
    candidates_C, index_V = _candidates(known[0])

    def words(rows: View, chosen: torch.Tensor) -> torch.Tensor:
        return _words(rows, chosen, index_V, len(candidates_C)).double()

    return _tokens(candidates_C, best(_fitted(known, target, words), most))


def taken_apart(
    known: list[View], target: View, table_Vn: torch.Tensor, tokens_V: torch.Tensor, counts_E: torch.Tensor
) -> torch.Tensor:
    """(E, K) words by a linear map from rows to the sum of the embeddings of their words, and matching pursuit there.

    Unlike the other attacks that learn it also names words that no known text has.
    """
    table = table_Vn.double()
    mean_n = table[tokens_V].mean(dim=0)

    def sums(rows: View, chosen: torch.Tensor) -> torch.Tensor:
        counted_BT = rows.counted_ET[chosen]
        given, places = counted_BT.nonzero(as_tuple=True)
        summed = torch.zeros(len(chosen), table.shape[1]).double()
        return summed.index_add_(0, given, table[rows.ids_ET[chosen[given], places]] - mean_n)

    aimed_En = _fitted(known, target, sums).float()
    return _tokens(tokens_V, pursue(aimed_En, unit(table[tokens_V]).float(), counts_E))


class _Namer(nn.Module):
    """Rows to scores of words, with one hidden layer."""

    def __init__(self, rows: int, width: int, share_C: torch.Tensor):
        super().__init__()
        self.scale, self.hidden = nn.LayerNorm(width), nn.Linear(rows * width, HIDDEN)
        self.out = nn.Linear(HIDDEN, len(share_C))
        # Most words are in few texts: a start at their frequency spares the first hundred steps.
        nn.init.zeros_(self.out.weight)
        self.out.bias.data.copy_(torch.logit(share_C))

    def forward(self, rows_ERn: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.scale(rows_ERn).flatten(1)).relu())


def learned(known: list[View], target: View, most: int, seed: int, rate: float = 1e-3) -> torch.Tensor:
    """(E, K) words by a network with one hidden layer; -1 in place of words that no known text has."""
    first = known[0].by_segment()
    candidates_C, index_V = _candidates(first)
    everything = torch.arange(len(first.ids_ET))
    counts = [_words(first, some, index_V, len(candidates_C)).sum(dim=0) for some in everything.split(_AT_ONCE)]
    share_C = (torch.stack(counts).sum(dim=0).double() / len(everything)).clamp(1e-4, 1 - 1e-4)
    with support.seeded(seed):
        network = _Namer(_seen(target).shape[1], target.values.shape[2], share_C)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for view in known:
        rows = view.by_segment()
        seen_ERn = _seen(rows)
        epochs = max(1, EPOCHS * len(view.ids_ET) // len(seen_ERn))
        orders = [torch.randperm(len(seen_ERn), generator=generator) for _ in range(epochs)]
        for chosen in torch.cat(orders).split(BATCH):
            optimizer.zero_grad()
            truth_BC = _words(rows, chosen, index_V, len(candidates_C))
            loss = nn.functional.binary_cross_entropy_with_logits(network(seen_ERn[chosen]), truth_BC, reduction="sum")
            (loss / len(chosen)).backward()
            optimizer.step()
    with torch.no_grad():
        return best_of(candidates_C, (network(some) for some in _seen(target).split(_AT_ONCE)), most)
