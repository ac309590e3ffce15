"""Partial embedding updates: of the token embedding a round trains and sends a few rows, chosen without looking at
private text.

Most of a small model's weights are rows of its token embedding, and noise grows with what is sent. In a round the rows
of a public set V_t are trained, with all other trained weights, and sent; the other rows stay as they are (PEU, Xu et
al. 2023, ICASSP, arXiv:2207.08988; the choice of the set is ours). The set is a draw from the run's public key, new in
every round, or the most frequent tokens of public text. It never is the words that users have: which rows were sent
would tell them, whatever the noise is. Every row of the set is sent and noised, whether a user has the token or not.

Sensitivity is that of every codec: the bound is put on what `encode` gives, rows and other weights together.

Shape legend: n elements of an update, k of a latent, V rows of the table, v of them in the set, d columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.errors import SottoError
from sotto.federated.layout import Layout

ROWS = "rows"


class EmbeddingRows:
    """A codec that sends some rows of one table, and every other trained weight as it is.

    Attributes:
      table: the name of the token embedding.
      count: V.
    """

    def __init__(self, layout: Layout, table: str, rows: int, key: str, public: bool):
        """Sets up the codec.

        Args:
          layout: of the trained tensors.
          table: the name of the token embedding among them.
          rows: v, how many rows are sent.
          key: the run's public key.
          public: whether the rows are those of public text (`restore`), and not drawn.

        Raises:
          SottoError: SOT932, the table has fewer rows.
        """
        shapes = dict(layout.shapes)
        self._layout, self.table, (self.count, self._columns) = layout, table, shapes[table]
        if rows > self.count:
            raise SottoError(
                "SOT932", what=f"setting.embedding_rows is {rows:,}, and the table has {self.count:,} rows",
                where="setting.embedding_rows", why="a partial update sends some of them",
                fix="lower setting.embedding_rows, or leave it out",
            )  # fmt: skip
        self._rows, self._key = rows, key
        self._chosen_v = torch.arange(rows) if public else None

    @property
    def size(self) -> int:
        return self._layout.size - (self.count - self._rows) * self._columns

    def rows_of(self, step: int) -> torch.Tensor:
        """(v,) the set of a round, in order."""
        if self._chosen_v is not None:
            return self._chosen_v
        seed = hashlib.sha256(f"embedding rows/{self._key}/{step}".encode()).digest()
        stream = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
        return torch.from_numpy(np.sort(stream.choice(self.count, self._rows, replace=False, shuffle=False)))

    def encode(self, update_n: torch.Tensor, step: int) -> torch.Tensor:
        parts = self._layout.split(update_n.float().cpu())
        parts[self.table] = parts[self.table][self.rows_of(step)]
        return torch.cat([part.reshape(-1) for part in parts.values()])

    def decode(self, latent_k: torch.Tensor, step: int) -> torch.Tensor:
        sizes = {name: torch.Size(shape).numel() for name, shape in self._layout.shapes}
        sizes[self.table] = self._rows * self._columns
        parts = dict(zip(sizes, latent_k.float().cpu().split(list(sizes.values())), strict=True))
        whole_Vd = torch.zeros(self.count, self._columns)
        whole_Vd[self.rows_of(step)] = parts[self.table].view(self._rows, self._columns)
        parts[self.table] = whole_Vd.view(-1)
        return torch.cat(list(parts.values()))

    def freeze_others(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Empties the gradients of all other rows, so that a local step leaves them where they are."""
        gradient_Vd = parameters[self.table].grad
        if gradient_Vd is not None:
            others_V = torch.ones(self.count, 1, dtype=gradient_Vd.dtype, device=gradient_Vd.device)
            others_V[self.rows_of(step).to(gradient_Vd.device)] = 0
            gradient_Vd.masked_fill_(others_V.bool(), 0)  # not times zero: one that is not finite would stay

    def spec(self) -> dict[str, Any]:
        kind = "public text" if self._chosen_v is not None else "drawn"
        return {"codec": "none", "size": self._layout.size, "latent": self.size, "embedding_rows": kind,
                "key": self._key}  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._chosen_v is None else {ROWS: self._chosen_v.float()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes the rows of public text.

        Raises:
          SottoError: SOT935, they are not as many different rows of this table, in order.
        """
        if self._chosen_v is None:
            return
        rows = state.get(ROWS)
        good = rows is not None and rows.shape == (self._rows,) and bool((rows == rows.trunc()).all())
        if good:
            assert rows is not None
            good = bool((rows[1:] > rows[:-1]).all()) and bool(rows[0] >= 0) and bool(rows[-1] < self.count)
        if not good:
            raise SottoError(
                "SOT935", what="these are not rows of this table", where="codec",
                why="an update would be turned into something else", fix="use the codec of the run's own checkpoint",
            )  # fmt: skip
        assert rows is not None
        self._chosen_v = rows.long()

    def learn(self, update_n: torch.Tensor) -> None:
        """Nothing: the set does not follow what was released."""


def train_table(model: nn.Module) -> None:
    """Makes the token embedding trainable as well, whatever else is trained."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    weight.requires_grad_(True)
    if weight.dtype != torch.float32:
        weight.data = weight.data.float()


def table_name(model: nn.Module) -> str:
    """The name of the token embedding."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, p in model.named_parameters() if p is weight)


def frequent(tokens: np.ndarray, count: int, vocabulary: int) -> torch.Tensor:
    """(v,) the most frequent tokens, in order of their numbers; of equally frequent ones those with lower numbers."""
    counts = np.bincount(tokens, minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))
