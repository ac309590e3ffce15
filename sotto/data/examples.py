"""Tokenised examples, stored flat: two numbers per example beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch

from sotto.data.units import ranges

IGNORED = -100  # the label value that every Hugging Face loss leaves out


@dataclass
class Examples:
    """E tokenised examples.

    Attributes:
      input_ids: int32, the tokens of all examples one after the other.
      offsets: (E+1,) int64; example e has the tokens `input_ids[offsets[e]:offsets[e+1]]`.
      token_type_ids: as `input_ids`, for tokenizers that give them; else None.
      prompt_lengths: (E,) int64 tokens at the front that take no loss; 0 for plain text and classification.
      labels: (E,) int64 classes, or None for generation.
      rows: (E,) int64 row of the table that each example came from; of a packed chunk, the row of its first token.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    token_type_ids: np.ndarray | None
    prompt_lengths: np.ndarray
    labels: np.ndarray | None
    rows: np.ndarray

    @classmethod
    def build(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        rows: Sequence[int],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        labels: np.ndarray | None = None,
    ) -> Examples:
        """Flattens E sequences."""
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        total = int(offsets[-1])
        return cls(
            input_ids=np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=total),
            offsets=offsets,
            token_type_ids=None
            if token_type_ids is None
            else np.fromiter(chain.from_iterable(token_type_ids), dtype=np.int32, count=total),
            prompt_lengths=np.asarray(prompt_lengths or [0] * len(sequences), dtype=np.int64),
            labels=labels,
            rows=np.asarray(rows, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(E,) number of tokens of each example."""
        return np.diff(self.offsets)

    def collate(self, indices: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        """The batch of B examples, padded on the right to the longest of them. Cost O(B T).

        Returns:
          `input_ids` and `attention_mask`, (B, T) int64; `token_type_ids` (B, T) if the tokenizer gives them; `labels`:
          (B,) classes, or for generation (B, T) with -100 on the prompt and on padding. Labels are not shifted: models
          of `transformers` do that themselves. Padding is told by position, so it may be the end-of-text token.
        """
        indices = np.asarray(indices, dtype=np.int64)
        starts = self.offsets[indices]
        lengths_B = self.offsets[indices + 1] - starts
        position_T = np.arange(int(lengths_B.max(initial=0)))
        mask_BT = position_T < lengths_B[:, None]
        source = ranges(starts, lengths_B)
        ids_BT = np.full(mask_BT.shape, pad_token_id, dtype=np.int64)
        ids_BT[mask_BT] = self.input_ids[source]
        batch = {"input_ids": torch.from_numpy(ids_BT), "attention_mask": torch.from_numpy(mask_BT.astype(np.int64))}
        if self.token_type_ids is not None:
            types_BT = np.zeros(mask_BT.shape, dtype=np.int64)
            types_BT[mask_BT] = self.token_type_ids[source]
            batch["token_type_ids"] = torch.from_numpy(types_BT)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[indices])
        else:
            learned_BT = mask_BT & (position_T >= self.prompt_lengths[indices, None])
            batch["labels"] = torch.from_numpy(np.where(learned_BT, ids_BT, IGNORED))
        return batch
