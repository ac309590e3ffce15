"""Contributing tokens: which words matter for the task, so that they may be left as they are.

A token contributes to class c if it is commoner there than elsewhere (Shen et al., arXiv 2312.15603). The score here is
smoothed, and damped for tokens that are too rare to tell. Published code of this score adds 1e10 - 5 to each count
where 1e-5 was meant, which makes it a list of the most frequent tokens.

Two things follow from leaving tokens as they are. Every occurrence of them is disclosed, with its place. And *which*
they are tells of the data they were chosen from. So the set is one for all texts, whatever their label (per class, the
pattern of changed and unchanged tokens would tell the label), and it comes either from a public list or from noisy
counts, which cost (epsilon, delta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sotto.privacy.bounds import gaussian_epsilon, gaussian_mu
from sotto.privacy.events import check_count, check_number
from sotto.privacy.noise import NoiseSource


def scores(counts_KV: np.ndarray, smoothing: float = 1.0, enough: float = 20.0) -> np.ndarray:
    """How much each token speaks for each class: (K, V).

    With f_c(t) the smoothed frequency of t in class c, the score is the sum over the other classes c' of
    log(f_c(t) / f_c'(t)), times min(1, count / enough).

    Args:
      counts_KV: occurrences of each token in each class, >= 0.
      smoothing: added to each count.
      enough: a count from which on a ratio is believed.
    """
    counts = np.asarray(counts_KV, dtype=np.float64)
    classes, vocabulary = counts.shape
    totals = counts.sum(axis=1, keepdims=True) + smoothing * vocabulary
    logs = np.log(counts + smoothing) - np.log(totals)
    ratios = classes * logs - logs.sum(axis=0, keepdims=True)
    return ratios * np.minimum(1.0, counts / enough)


def contributing(scores_KV: np.ndarray, share: float, special: Sequence[int]) -> np.ndarray:
    """Ids of the tokens that score highest for any class, sorted: the union over classes of the best `share * V`.

    Tokens without a positive score and special tokens are never among them.
    """
    ranked = np.array(scores_KV, dtype=np.float64)
    ranked[:, list(special)] = -math.inf
    most = max(1, round(check_number("share", share, above=0, below=1) * ranked.shape[1]))
    best = np.argsort(-ranked, axis=1, kind="stable")[:, :most]
    chosen = {int(token) for row, tokens in zip(ranked, best, strict=True) for token in tokens if row[token] > 0}
    return np.array(sorted(chosen), dtype=np.int64)


def class_counts(
    texts: Sequence[np.ndarray], labels: Sequence[int], classes: int, vocabulary: int, most: int | None = None
) -> np.ndarray:
    """(K, V) in how many texts of each class each token stands.

    Args:
      texts: token ids of each text.
      most: distinct tokens of one text that are counted at most: the first ones. None: all.
    """
    counts = np.zeros((classes, vocabulary))
    for ids, label in zip(texts, labels, strict=True):
        _, places = np.unique(ids, return_index=True)
        counts[label, ids[np.sort(places)[:most]]] += 1
    return counts


@dataclass(frozen=True)
class Selection:
    """Tokens that were chosen from private texts, and what that cost.

    Attributes:
      tokens: sorted ids.
      epsilon, delta: of the choice, for the replacement of one text together with its label.
      std: of the noise on each count.
    """

    tokens: np.ndarray
    epsilon: float
    delta: float
    std: float


def select_privately(
    texts: Sequence[np.ndarray],
    labels: Sequence[int],
    classes: int,
    vocabulary: int,
    *,
    share: float,
    special: Sequence[int],
    epsilon: float,
    delta: float,
    noise: NoiseSource,
    most: int = 16,
) -> Selection:
    """Chooses contributing tokens from noisy counts.

    Guarantee. One text adds 1 to at most `most` counts, so replacing it (and its label) by another moves the counts by
    at most sqrt(2 * most) in norm. Gaussian noise of that sensitivity is added to every count of every token of the
    vocabulary, also to those that do not occur. The rest is post-processing. A count is believed from three standard
    deviations on.
    """
    check_count("most", most, at_least=1)
    counts = class_counts(texts, labels, classes, vocabulary, most)
    sensitivity = math.sqrt(2 * most)
    std = sensitivity / gaussian_mu(epsilon, delta)
    drawn = noise.normal(counts.shape, std, step=0, name="token counts", device=torch.device("cpu")).numpy()
    noisy = np.maximum(counts + drawn - 3 * std, 0.0)
    found = contributing(scores(noisy, smoothing=max(1.0, std), enough=max(20.0, 3 * std)), share, special)
    return Selection(found, gaussian_epsilon(sensitivity / std, delta), delta, std)
