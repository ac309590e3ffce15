"""What is done to a text's representation before it leaves the customer.

| kind | leaves | guarantee |
|---|---|---|
| `none` | representations | none |
| `dx_tokens` | token ids, each the nearest to its noised embedding | eta * distance of embeddings, per token |
| `dx_hidden` | noised representations | eta * distance of representations, per token |
| `dx_pooled` | one noised row, the mean of the tokens | eta * distance of the means, per text |
| `dx_pooled`, `segment: m` | a noised mean of each m tokens | eta * distance of the means, per segment |
| `gaussian` | `max_length` noised rows | (epsilon, delta), for the replacement of the whole text |
| `gaussian_pooled` | one noised row, the mean of the tokens | (epsilon, delta), for the replacement of the whole text |

The metric ones: Shen et al., arXiv 2312.15603. The Gaussian ones: clipping, and the analytic Gaussian mechanism (Balle
and Wang, arXiv 1805.06530) with sensitivity 2 * clip_norm, because one text may stand for any other.

Shape legend: B examples, T positions of the longest, N tokens of all of them without padding, R rows that leave, n
numbers in a representation, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from sotto.config_split import SplitSetting
from sotto.errors import SottoError
from sotto.models.pooling import masked_mean
from sotto.privacy.bounds import gaussian_epsilon, gaussian_mu
from sotto.privacy.noise import NoiseSource
from sotto.split.metric import Table, dx_noise

WIRE_LARGEST = 65504.0
"""The largest float16. Released numbers are cut to it, after the noise: that is post-processing."""


@dataclass(frozen=True)
class Batch:
    """B examples on their way out.

    Attributes:
      ids_BT: token ids.
      mask_BT: 1 for text, 0 for padding on the right.
      hidden_BTn: representations, or None where only ids leave.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    hidden_BTn: torch.Tensor | None


@dataclass(frozen=True)
class Released:
    """What leaves of a batch: rows of B examples one after the other.

    Attributes:
      lengths_B: rows of each example.
      rows: (R, n) float16 representations, or (R,) int32 token ids.
    """

    lengths_B: torch.Tensor
    rows: torch.Tensor


class Privatizer(Protocol):
    """Makes one release of a batch. Calling it twice makes two releases; `cache.Outbox` sees to it that nobody does."""

    sends_ids: ClassVar[bool]

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released: ...


@dataclass(frozen=True)
class Plain:
    """Protects nothing."""

    sends_ids: ClassVar[bool] = False

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released:
        return Released(batch.mask_BT.sum(dim=1), to_wire(token_rows(batch)))


@dataclass(frozen=True)
class HiddenNoise:
    """d_X noise on each token's representation; none on those of exempt tokens, which is sound only at layer 0."""

    eta: float
    exempt_V: torch.Tensor | None = None
    sends_ids: ClassVar[bool] = False

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released:
        rows_Nn = token_rows(batch)
        drawn_Nn = dx_noise(len(rows_Nn), rows_Nn.shape[1], self.eta, noise, step=step)
        if self.exempt_V is not None:
            drawn_Nn[self.exempt_V[token_ids(batch)]] = 0.0
        return Released(batch.mask_BT.sum(dim=1), to_wire(drawn_Nn.add_(rows_Nn)))


@dataclass(frozen=True)
class PooledNoise:
    """d_X noise on means of consecutive tokens, which are all that leaves of a text: one for all, or one for each m.

    Guarantee. Two texts from which equally many rows leave are told apart by a factor of at most exp(eta * S), S the
    sum of the distances between their means, segment by segment; texts with different numbers of rows are not compared.
    Where a token's row depends on the token alone (layer 0), replacing one by another at distance d moves one mean, by
    d / m at most (d / length in a text shorter than m), and S is that. Above, one token moves the means of other
    segments too, and S adds all of it up.
    """

    eta: float
    segment: int | None = None
    sends_ids: ClassVar[bool] = False

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released:
        rows_Nn = token_rows(batch)
        tokens_B = batch.mask_BT.sum(dim=1)
        rows_B, owner_N = segments(tokens_B, self.segment)
        sums_Rn = torch.zeros(int(rows_B.sum()), rows_Nn.shape[1], dtype=torch.float64)
        sums_Rn.index_add_(0, owner_N, rows_Nn.double())
        means_Rn = sums_Rn / owner_N.bincount(minlength=len(sums_Rn)).clamp_min(1).unsqueeze(1)
        drawn_Rn = dx_noise(len(means_Rn), means_Rn.shape[1], self.eta, noise, step=step)
        return Released(rows_B, to_wire(drawn_Rn.add_(means_Rn)))


def segments(tokens_B: torch.Tensor, segment: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """How texts of so many tokens are cut: (B,) rows of each, and (N,) the row that each token belongs to.

    A rest that is shorter than a segment joins the last one, so that no token stands for less than a segment: the last
    of a text would often have a row of its own, with little to hide among.
    """
    rows_B = torch.ones_like(tokens_B) if segment is None else (tokens_B // segment).clamp_min(1)
    text_N = torch.arange(len(tokens_B)).repeat_interleave(tokens_B)
    place_N = torch.arange(len(text_N)) - (tokens_B.cumsum(0) - tokens_B)[text_N]
    within_N = torch.zeros_like(place_N) if segment is None else torch.minimum(place_N // segment, rows_B[text_N] - 1)
    return rows_B, (rows_B.cumsum(0) - rows_B)[text_N] + within_N


class TokenSubstitution:
    """d_X noise on each token's embedding, and the nearest token instead of the noised vector.

    Special tokens stay: they stand at the same places in every text. Exempt tokens stay too. The others are replaced
    only by others like them, so that a replacement is never taken for an exempt token.
    """

    sends_ids: ClassVar[bool] = True

    def __init__(self, table_Vn: torch.Tensor, eta: float, special: list[int], exempt_V: torch.Tensor | None = None):
        self.eta = eta
        self._table = table_Vn.detach().float()
        kept_V = torch.zeros(len(table_Vn), dtype=torch.bool)
        kept_V[special] = True
        if exempt_V is not None:
            kept_V |= exempt_V
        self._kept_V, self._candidates = kept_V, torch.nonzero(~kept_V).flatten()
        self._words = Table(self._table[self._candidates])

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released:
        ids_N = token_ids(batch).clone()
        changed = ~self._kept_V[ids_N]
        rows = self._table[ids_N[changed]]
        # Drawn for all tokens, so that how long it takes does not tell how many of them are exempt.
        drawn = dx_noise(len(ids_N), rows.shape[1], self.eta, noise, step=step)[changed]
        ids_N[changed] = self._candidates[self._words.nearest((rows.double() + drawn).float())]
        return Released(batch.mask_BT.sum(dim=1), ids_N.to(torch.int32))


@dataclass(frozen=True)
class GaussianRelease:
    """Clip and add Gaussian noise: (epsilon, delta)-DP in the local model, when any text replaces another.

    Attributes:
      rows: how many rows leave of every example: 1 for the mean of the tokens, else `max_length`, whatever the text's
        own length, which is thereby hidden as well.
      clip_norm: bound on the norm of all numbers that leave of one example, before the noise.
      std: of the noise on each number.
    """

    rows: int
    pooled: bool
    clip_norm: float
    std: float
    sends_ids: ClassVar[bool] = False

    @classmethod
    def calibrated(cls, rows: int, pooled: bool, clip_norm: float, epsilon: float, delta: float) -> GaussianRelease:
        """With the least noise that gives (epsilon, delta)."""
        return cls(rows, pooled, clip_norm, 2 * clip_norm / gaussian_mu(epsilon, delta))

    def epsilon(self, delta: float) -> float:
        """What the noise is worth, recomputed from it alone."""
        return gaussian_epsilon(2 * self.clip_norm / self.std, delta)

    def release(self, batch: Batch, noise: NoiseSource, step: int) -> Released:
        clipped_BRn = self.clipped(batch)
        drawn = noise.normal(tuple(clipped_BRn.shape), self.std, step=step, name="rows", device=torch.device("cpu"))
        lengths_B = torch.full((len(clipped_BRn),), self.rows)
        return Released(lengths_B, to_wire((clipped_BRn + drawn).flatten(0, 1)))

    def clipped(self, batch: Batch) -> torch.Tensor:
        """(B, rows, n) float64, each example of norm at most clip_norm. A value that is not finite counts as zero."""
        assert batch.hidden_BTn is not None
        hidden_BTn = batch.hidden_BTn.double().nan_to_num(0.0, 0.0, 0.0)
        if self.pooled:
            wide_BRn = masked_mean(hidden_BTn, batch.mask_BT).unsqueeze(1)
            bound = self.clip_norm
        else:
            most, n = hidden_BTn.shape[1:]
            wide_BRn = hidden_BTn.new_zeros(len(hidden_BTn), self.rows, n)
            wide_BRn[:, :most] = hidden_BTn * batch.mask_BT.unsqueeze(-1)
            # Each row has its share, so that a short text is not clipped less than a long one.
            bound = self.clip_norm / math.sqrt(self.rows)
        norms = wide_BRn.norm(dim=2, keepdim=True)
        return wide_BRn * (bound / norms.clamp_min(bound))


def token_rows(batch: Batch) -> torch.Tensor:
    """(N, n) representations without padding.

    Raises:
      SottoError: SOT802, one of them is not finite. Nothing has left.
    """
    assert batch.hidden_BTn is not None
    rows_Nn = batch.hidden_BTn[batch.mask_BT.bool()]
    # A sum is not finite if one of its terms is not, and it is read much faster than each term.
    if not bool(rows_Nn.sum().isfinite()) and not bool(rows_Nn.isfinite().all()):
        raise SottoError(
            "SOT802", what="the bottom of the model gave a value that is not finite", where="model.name",
            why="noise does not hide it, and the vendor could not train on it; nothing has left",
            fix="use model.dtype: float32, or another bottom",
        )  # fmt: skip
    return rows_Nn


def token_ids(batch: Batch) -> torch.Tensor:
    """(N,) token ids without padding."""
    return batch.ids_BT[batch.mask_BT.bool()]


def to_wire(rows_Nn: torch.Tensor) -> torch.Tensor:
    """Rounds to float16. The noise was added in float64 before, so this is post-processing."""
    return rows_Nn.clamp(-WIRE_LARGEST, WIRE_LARGEST).to(torch.float16)


def make(
    setting: SplitSetting,
    table_Vn: torch.Tensor,
    special: list[int],
    max_length: int,
    exempt_V: torch.Tensor | None = None,
) -> Privatizer:
    """The privatizer that the configuration names.

    Args:
      table_Vn: the embedding, for substitution.
      special: ids that substitution leaves alone and never gives.
      max_length: `data.max_length`.
      exempt_V: (V,) True for tokens that are sent as they are, or None.
    """
    kind = setting.privatizer
    if kind == "none":
        return Plain()
    if kind.startswith("dx_"):
        assert setting.eta is not None
        if kind == "dx_pooled":
            return PooledNoise(setting.eta, setting.segment)
        if kind == "dx_tokens":
            return TokenSubstitution(table_Vn, setting.eta, special, exempt_V)
        return HiddenNoise(setting.eta, exempt_V)
    assert setting.epsilon is not None
    rows = 1 if setting.pooled else max_length
    return GaussianRelease.calibrated(rows, setting.pooled, setting.clip_norm, setting.epsilon, setting.delta)
