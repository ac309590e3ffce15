"""Where weights are moved on the CPU: signs, sizes and sums of a small part at a time.

What goes through memory once, and not through a cache, costs most of the time of a moved weight, so entries are made in
one small place, over and over: by one thread with numpy, or where a large tensor is moved and there is a C compiler, by
a loop that makes them where they are added (`compiled`). Torch's operations in the place of numpy's took as long where
its threads wait at work, and twice as long where they sleep and are woken for every one (`OMP_WAIT_POLICY=passive`).

Shape legend: e entries, n blocks of four words w, b bytes of signs, r runs of R entries, T tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from sotto.zeroth_order import compiled, counter, laws, walsh
from sotto.zeroth_order.entries import PIECE

WORDS = 1 << 22
"""Entries whose words are drawn at a time. To begin with them takes as long as thousands of them."""
FEW = 1 << 17
"""Entries of small tensors that are made together. Their words are drawn for all of them."""
_PER_BLOCK = counter.BLOCK * laws.PER_WORD
_rooms = threading.local()


class Few(NamedTuple):
    """Tensors whose entries are made together, and fit into a cache.

    Attributes:
      tensors, words, entries: which of all.
      lengths: the entries of a tensor and those of its last block that it does not need, for each tensor.
    """

    tensors: slice
    words: slice
    entries: slice
    lengths: list[int]


class Tables(NamedTuple):
    """Where the signs of many tensors come from, one tensor after another.

    Attributes:
      keys_n, block_n: of each block of 128 signs; a tensor's last block may have more than it needs.
      places_T: keys of the words that say where sizes begin.
      number_w: of each word, with the place of its tensor in the matrix (`walsh`).
    """

    keys_n: torch.Tensor
    block_n: torch.Tensor
    places_T: torch.Tensor
    number_w: np.ndarray[Any, np.dtype[np.int64]]
    groups: list[Few]


def reaches(stream: walsh.Stream | None, *tensors: torch.Tensor) -> bool:
    """Whether weights like these are moved here."""
    return stream is not None and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def add(stream: walsh.Stream | None, factor: float, source_e: torch.Tensor, first: int, target_e: torch.Tensor) -> bool:
    """target = source + factor * u, of the flat elements of a direction from number `first` on; False if not done.

    The target may be the source. Entries, their products with the factor, and the sums are each rounded to float32, as
    three operations would on any device; whatever the number of threads.
    """
    if stream is None or not reaches(stream, source_e, target_e):
        return False
    if isinstance(target_e, FakeTensor):  # in a forecast, what takes no memory is not run
        return True
    source, target = source_e.detach().numpy(), target_e.detach().numpy()
    if not compiled.move(stream, factor, source, first, target):
        for start in range(0, len(target), WORDS):
            part = slice(start, start + WORDS)
            _add(stream, factor, source[part], first + start, target[part])
    return True


def _add(stream: walsh.Stream, factor: float, source: laws.Floats, first: int, target: laws.Floats) -> None:
    room = _room("signs", PIECE).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # weights that grew too large are no news here, as in torch
        for low, high, shifts_e in stream.pieces(first, first + len(target), room, factor):
            at = slice(low - first, high - first)
            np.add(source[at], shifts_e, out=target[at])


def _room(name: str, size: int) -> torch.Tensor:
    """(size,) of this thread. Held by numpy, as a tensor would stay what torch was doing when it was made: of another
    device, for inference alone, or without numbers."""
    room = getattr(_rooms, name, None)
    if room is None or len(room) < size:
        room = np.empty(size, dtype=np.float32)
        setattr(_rooms, name, room)
    return torch.from_numpy(room[:size])


# ---- many small tensors at once


def tables(streams: list[walsh.Stream], sizes: list[int], device: torch.device) -> Tables:
    """For `add_many`: of these streams, and tensors of these sizes in a row, each with 2^16 entries at most."""
    assert all(n <= counter.BLOCK * laws.RUN for n in sizes)  # one block of words says where all its runs begin
    blocks_T = [-(-n // _PER_BLOCK) for n in sizes]
    with device:
        count_T, first_T = torch.tensor(blocks_T), torch.tensor([s.first_word for s in streams])
        keys_T = torch.tensor([counter.signed(s.key, 64) for s in streams])
        places_T = torch.tensor([counter.signed(s.places or 0, 64) for s in streams])
        block_n = torch.cat([torch.arange(n) for n in blocks_T])
        word_nw = block_n[:, None] * counter.BLOCK + torch.arange(counter.BLOCK)
    first_n = first_T.repeat_interleave(count_T)
    number_w = (word_nw + first_n[:, None]).flatten().numpy()
    return Tables(keys_T.repeat_interleave(count_T), block_n, places_T, number_w, _groups(sizes))


def _groups(sizes: list[int]) -> list[Few]:
    groups: list[Few] = []
    tensors, words, entries, lengths = 0, 0, 0, []
    for i, n in enumerate(sizes, 1):
        lengths += [n, -n % _PER_BLOCK]
        if i == len(sizes) or sum(lengths) + sizes[i] > FEW:
            ends = i, words + sum(lengths) // laws.PER_WORD, entries + sum(lengths[::2])
            groups.append(Few(slice(tensors, ends[0]), slice(words, ends[1]), slice(entries, ends[2]), lengths))
            (tensors, words, entries), lengths = ends, []
    return groups


def add_many(stream: walsh.Stream, shift: float, flat_e: torch.Tensor, tables: Tables) -> None:
    """Adds shift * u to tensors that lie in a row; the bits are those of `add`.

    Args:
      stream: of one of them; of the others, all but the keys and the first word are the same.
      tables: from `tables`.
    """
    step, index = stream.step, stream.index
    shift += 0.0  # as in `Directions.add`
    words_w = counter.blocks(tables.keys_n, step, index, tables.block_n).flatten().numpy().astype(np.uint32)
    words_w = stream.signed(words_w, tables.number_w)
    drawn_T4 = None
    if stream.places is not None:
        drawn_T4 = counter.blocks(tables.places_T, step, index, torch.zeros_like(tables.places_T))
    for few in tables.groups:
        drawn = None if drawn_T4 is None else laws.places(drawn_T4[few.tensors]).tolist()
        _add_few(stream.stretch, shift, words_w[few.words], drawn, few.lengths, flat_e[few.entries])


def _add_few(
    stretch: float, shift: float, words_w: counter.Words, places: list[list[int]] | None, lengths: list[int],
    flat_e: torch.Tensor,
) -> None:  # fmt: skip
    numbers = (stretch, shift) if places is None else (1.0, 1.0)
    whole_e = _room("signs", laws.PER_WORD * len(words_w))
    laws.signs(words_w, whole_e.numpy(), *numbers)
    signs_e = _joined("many signs", whole_e.split(lengths)[::2], flat_e)
    if places is None:
        flat_e.add_(signs_e)
        return
    table = torch.from_numpy(laws.stretched(stretch, shift))
    sizes = [
        table[place : place + min(laws.RUN, n - laws.RUN * run)]
        for n, of_each in zip(lengths[::2], places, strict=True)
        for run, place in enumerate(of_each[: -(-n // laws.RUN)])
    ]
    flat_e.addcmul_(signs_e, _joined("sizes", sizes, flat_e))


def _joined(name: str, parts: Sequence[torch.Tensor], like_e: torch.Tensor) -> torch.Tensor:
    """Fills a room, as memory that is new comes page by page, which takes longer than to fill it."""
    return torch.cat(list(parts), out=_room(name, like_e.numel()))
