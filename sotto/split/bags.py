"""Attacks on one row that stands for a whole text: which words does it hold?

Order is lost in a mean, words are not. Multi-label inversion after Song and Raghunathan (arXiv 2004.00053), linear
and with a hidden layer; the tokens whose own representation lies nearest; and orthogonal matching pursuit (Pati et al.
1993), which takes the best token, subtracts what it explains, and goes on.

Every attack is told how many different words a text has, and names as many: its success is the part of them that it
names, for all texts together.

Shape legend: E texts, V tokens of the vocabulary, C candidate tokens, n width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sotto.models import support
from sotto.split.parts import Bottom
from sotto.split.view import View

HIDDEN, BATCH, EPOCHS = 512, 32, 10
"""Of the learned attack; epochs over each fresh release of the known texts."""


def bags(view: View, size: int) -> torch.Tensor:
    """(E, V) True for the tokens that count of each text, each once."""
    found = torch.zeros(len(view.ids_ET), size, dtype=torch.bool)
    texts, places = view.counted_ET.nonzero(as_tuple=True)
    found[texts, view.ids_ET[texts, places]] = True
    return found


def named(scores_EV: torch.Tensor, truth_EV: torch.Tensor, of_V: torch.Tensor | None = None) -> float:
    """The part of the words that are among the highest scores, as many for each text as it has words.

    Args:
      of_V: (V,) True for the words that are looked for; default: all.
    """
    counts_E = truth_EV.sum(dim=1)
    wanted_EV = truth_EV if of_V is None else truth_EV & of_V
    if not int(wanted_EV.sum()):
        return 0.0
    order_EK = scores_EV.topk(int(counts_E.max()), dim=1).indices
    among_EK = torch.arange(order_EK.shape[1]) < counts_E[:, None]
    return float((wanted_EV.gather(1, order_EK) & among_EK).sum() / wanted_EV.sum())


def commonest(known: View, target: View, size: int) -> float:
    """What is named by always giving the commonest words, which needs nothing that was sent."""
    scores_V = bags(known, size).sum(dim=0).double()
    return named(scores_V.expand(len(target.ids_ET), -1), bags(target, size))


def recover(
    bottom: Bottom,
    tokens_V: torch.Tensor,
    target: View,
    fresh: Callable[[], View],
    passes: int,
    searched: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Attack -> (E, V) scores of words; matching pursuit gives those of the first `searched` texts.

    Args:
      tokens_V: candidates of the attacks that need no texts to learn from.
      fresh: a view of the attacker's own texts, privatized anew.
      searched: texts that matching pursuit is tried on.
    """
    size, known = len(bottom.table_Vn), [fresh() for _ in range(passes)]
    truth_EV = bags(target, size)
    away_n = torch.cat([view.values[:, 0] for view in known]).mean(dim=0)
    alone_Cn = _alone(bottom, tokens_V)
    rows_En = target.values[:, 0] - away_n
    scores_EV = torch.full(truth_EV.shape, -torch.inf)
    scores_EV[:, tokens_V] = rows_En @ nn.functional.normalize(alone_Cn, dim=1).T
    picked_EV = torch.full(truth_EV[:searched].shape, -torch.inf)
    for text, row_n in enumerate(rows_En[:searched]):
        chosen = pursue(row_n, alone_Cn, int(truth_EV[text].sum()))
        picked_EV[text, tokens_V[chosen]] = 1.0
    return {
        "nearest neighbour": scores_EV,
        **({"matching pursuit": picked_EV} if searched else {}),
        "linear inversion": linear(known, target, size).float(),
        "learned inversion": learned(known, target, size, seed),
    }


@torch.no_grad()
def _alone(bottom: Bottom, tokens_V: torch.Tensor) -> torch.Tensor:
    """(C, n) representations of tokens without a context, around their mean."""
    parts = []
    for some in tokens_V.split(4096):
        ids = some[:, None].expand(-1, 2)
        parts.append(bottom.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, 1])
    alone_Cn = torch.cat(parts)
    return alone_Cn - alone_Cn.mean(dim=0)


def pursue(row_n: torch.Tensor, alone_Cn: torch.Tensor, count: int) -> list[int]:
    """Indices of `count` candidates whose sum, each with a weight of its own, is near the row."""
    directions_Cn = nn.functional.normalize(alone_Cn, dim=1)
    left_n, chosen = row_n, list[int]()
    for _ in range(count):
        fit_C = directions_Cn @ left_n
        fit_C[chosen] = -torch.inf
        chosen.append(int(fit_C.argmax()))
        taken_nK = directions_Cn[chosen].T.double()
        weights_K = torch.linalg.lstsq(taken_nK, row_n.double().unsqueeze(1)).solution
        left_n = row_n - (taken_nK @ weights_K).squeeze(1).float()
    return chosen


def linear(known: list[View], target: View, size: int, ridge: float = 1e-3) -> torch.Tensor:
    """(E, V) scores by least squares from rows to words."""

    def features(view: View) -> torch.Tensor:
        return nn.functional.pad(view.values[:, 0].double(), (0, 1), value=1.0)

    wide = known[0].values.shape[2] + 1
    gram, cross = torch.zeros(wide, wide).double(), torch.zeros(wide, size).double()
    for view in known:
        given = features(view)
        gram += given.T @ given
        cross += given.T @ bags(view, size).double()
    gram += ridge * gram.diagonal().mean() * torch.eye(wide).double()
    return features(target) @ torch.linalg.solve(gram, cross)


def learned(known: list[View], target: View, size: int, seed: int, rate: float = 1e-3) -> torch.Tensor:
    """(E, V) scores by a network with one hidden layer; -inf for words that no known text has."""
    truth = [bags(view, size) for view in known]
    candidates_C = truth[0].any(dim=0).nonzero().flatten()
    width = known[0].values.shape[2]
    with support.seeded(seed):
        network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(candidates_C))
        )
        # Most words are in few texts: a start at their frequency spares the first hundred steps.
        share_C = truth[0][:, candidates_C].double().mean(dim=0).clamp(1e-4, 1 - 1e-4)
        nn.init.zeros_(network[3].weight)  # type: ignore[arg-type]
        network[3].bias.data.copy_(torch.logit(share_C))  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for view, words_EV in zip(known, truth, strict=True):
        rows_En, words_EC = view.values[:, 0], words_EV[:, candidates_C].float()
        orders = [torch.randperm(len(rows_En), generator=generator) for _ in range(EPOCHS)]
        for chosen in torch.cat(orders).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                network(rows_En[chosen]), words_EC[chosen], reduction="sum"
            )
            (loss / len(chosen)).backward()
            optimizer.step()
    scores_EV = torch.full((len(target.ids_ET), size), -torch.inf)
    with torch.no_grad():
        scores_EV[:, candidates_C] = network(target.values[:, 0])
    return scores_EV
