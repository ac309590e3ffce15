"""The entries of the streams of a run: any of them, on any device, in any order.

A stream belongs to a tensor and a role ("entry", or the two factors of a matrix of low rank); its entries are numbered.
`laws` says what an entry is. On a CUDA device kernels make them (`kernels`), where they can.

Shape legend: w words, r runs, n rows of c columns, b blocks of four words, L runs of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sotto.zeroth_order import counter, kernels, laws, walsh
from sotto.zeroth_order.law import Law

CHUNK = 1 << 20
"""Entries made at a time. Their words take little room, and to begin with them takes as long as thousands of them."""
DEVICE_CHUNK = 1 << 22
"""Entries made at a time on a GPU, where every operation takes a while to start, however little it does."""
PIECE = 1 << 16
"""Entries in that place: with what they are added to it fits into the cache of a core."""
_RUN_BITS = laws.RUN.bit_length() - 1
_PLACES = " places"
"""Ends the role of the stream that says where a role's sizes are in the table."""


class Entries:
    """Makes entries. It holds none."""

    def __init__(self, key: str, law: Law, rows: walsh.Rows):
        """
        Args:
          key: of the run.
          law: of the directions, whose `entries` are made here.
          rows: of the Walsh-Hadamard matrix that multiplies signs where the law is `orthogonal`.
        """
        self.law, self._key, self._rows = law, key, rows
        self._room = np.empty(PIECE, dtype=np.float32)
        self._keys: dict[tuple[str, str], int] = {}

    def key(self, name: str, role: str) -> int:
        if (name, role) not in self._keys:
            self._keys[name, role] = counter.stream_key(self._key, name, role)
        return self._keys[name, role]

    def stream(self, name: str, role: str, step: int, k: int) -> walsh.Stream:
        """What the entries of a direction follow from."""
        key = self.key(name, role)
        if self.law.kind == "orthogonal":
            return self._rows.stream(name, key, step, k)
        places = self.key(name, role + _PLACES) if self.law.entries == "gaussian" else None
        return walsh.Stream(key, step, k, places=places)

    def flat(
        self, name: str, role: str, step: int, k: int, start: int, stop: int, device: torch.device
    ) -> torch.Tensor:
        """(stop - start,) float32 entries from number `start` on."""
        made = kernels.entries(self.stream(name, role, step, k), start, stop, device)
        if made is not None:
            return made
        chunk = chunk_on(device)
        if stop - start <= chunk:
            return self._chunk(name, role, step, k, start, stop, device)
        out = torch.empty(stop - start, dtype=torch.float32, device=device)
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            out[begin - start : end - start] = self._chunk(name, role, step, k, begin, end, device)
        return out

    def pieces(
        self, name: str, step: int, k: int, start: int, stop: int, stretch: float = 1.0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Entries `start` to `stop` of a direction on the CPU, each part in one place that is used over and over.

        Args:
          stretch: what Gaussian entries are multiplied with.
        """
        stream = self.stream(name, "entry", step, k)._replace(stretch=stretch)
        for begin in range(start, stop, CHUNK):
            for low, high, part_e in stream.pieces(begin, min(begin + CHUNK, stop), self._room):
                yield low, high, torch.from_numpy(part_e)  # pyright: ignore[reportUnknownMemberType]

    def rows(self, name: str, step: int, k: int, rows_n: torch.Tensor, columns: int) -> torch.Tensor:
        """(n, c) entries of some rows of a matrix, on the device of their numbers."""
        device, per_block = rows_n.device, counter.BLOCK * laws.PER_WORD
        first_n = rows_n * columns
        length = (columns + per_block - 2) // per_block + 1
        block_nb = (first_n // per_block)[:, None] + torch.arange(length, device=device)
        words = counter.blocks(self.key(name, "entry"), *self._counters(step, k), block_nb)
        if self.law.kind == "orthogonal":
            word_numbers = block_nb[..., None] * counter.BLOCK + torch.arange(counter.BLOCK, device=device)
            words = words ^ self._rows.signs_on_device(name, step, k, word_numbers)
        wide = laws.signs_on_device(words.flatten(1))
        columns_c = torch.arange(columns, device=device)
        part = wide.gather(1, (first_n % per_block)[:, None] + columns_c)
        if self.law.entries == "gaussian":
            part *= self._sizes_of_rows(name, step, k, first_n, columns_c)
        return part

    def squares(self, name: str, step: int, k: int, size: int) -> int:
        """Sum of the squares of the first entries of a Gaussian direction, in units of `laws.SCALE`^2."""
        sizes = self.stream(name, "entry", step, k).sizes(0, size)
        return 0 if sizes is None else sizes.squares(size)

    def _chunk(
        self, name: str, role: str, step: int, k: int, start: int, stop: int, device: torch.device
    ) -> torch.Tensor:
        first, last = start // laws.PER_WORD, -(-stop // laws.PER_WORD)
        at = slice(start - first * laws.PER_WORD, stop - first * laws.PER_WORD)
        if device.type == "cpu":
            stream = self.stream(name, role, step, k)
            words_w, sizes = stream.words(first, last), stream.sizes(start, stop)
            part = torch.from_numpy(laws.signs(words_w))[at]  # pyright: ignore[reportUnknownMemberType]
            if sizes is not None:
                sizes.give(part.numpy(), start)
            return part
        low = first // counter.BLOCK
        block_n = torch.arange(low, -(-last // counter.BLOCK), device=device)
        words = counter.blocks(self.key(name, role), *self._counters(step, k), block_n).flatten()
        words = words[first - low * counter.BLOCK :][: last - first]
        if self.law.kind == "orthogonal":
            words = words ^ self._rows.signs_on_device(name, step, k, torch.arange(first, last, device=device))
        part = laws.signs_on_device(words)[at]
        if self.law.entries == "gaussian":
            at_n, columns_c = torch.tensor([start], device=device), torch.arange(stop - start, device=device)
            part = part * self._sizes_of_rows(name, step, k, at_n, columns_c, role)[0]
        return part

    def _counters(self, step: int, k: int) -> tuple[int, int]:
        """Step and index of the words: a cycle of orthogonal directions has the same signs on its columns."""
        return (self._rows.cycle(step), 0) if self.law.kind == "orthogonal" else (step, k)

    def _sizes_of_rows(
        self, name: str, step: int, k: int, first_n: torch.Tensor, columns_c: torch.Tensor, role: str = "entry"
    ) -> torch.Tensor:
        """(n, c) float32 sizes of entries, of which row n has `len(columns_c)` from number `first_n` on."""
        run_nL = (first_n // laws.RUN)[:, None] + torch.arange(
            (len(columns_c) + laws.RUN - 2) // laws.RUN + 1, device=first_n.device
        )
        words_nL4 = counter.blocks(self.key(name, role + _PLACES), step, k, run_nL // counter.BLOCK)
        place_nL = laws.places(words_nL4.gather(2, (run_nL % counter.BLOCK)[..., None])[..., 0])
        number_nc = (first_n % laws.RUN)[:, None] + columns_c
        place_nc = place_nL.gather(1, number_nc >> _RUN_BITS)
        return laws.sizes_on(first_n.device)[place_nc + (number_nc & laws.RUN - 1)]


def chunk_on(device: torch.device) -> int:
    """How many entries are made at a time."""
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK
