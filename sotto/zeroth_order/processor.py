"""Where weights are moved on the CPU: signs, sizes and sums of a small part at a time, by as many threads as torch has.

What goes through memory once, and not through a cache, costs most of the time of a moved weight, so entries are made in
one small place, over and over. numpy's operations run in the thread that calls them and let the others go on; torch's
would each ask for all threads, which takes longer than so small a part.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from sotto.zeroth_order import laws, walsh

PIECE = 1 << 17
"""Entries of a part: small enough for the cache of one core."""
WORDS = 1 << 22
"""Entries whose words are drawn at a time. To begin with them takes as long as thousands of them."""
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_rooms = threading.local()


def add(stream: walsh.Stream | None, factor: float, source_e: torch.Tensor, first: int, target_e: torch.Tensor) -> bool:
    """target = source + factor * u, of the flat elements of a direction from number `first` on; False if not done.

    The target may be the source. Entries, their products with the factor, and the sums are each rounded to float32, as
    three operations would on any device; whatever the number of threads.
    """
    if stream is None or not target_e.device.type == source_e.device.type == "cpu":
        return False
    if not target_e.dtype == source_e.dtype == torch.float32:
        return False
    if isinstance(target_e, FakeTensor):  # in a forecast, what takes no memory is not run
        return True
    source, target = source_e.numpy(), target_e.numpy()
    for start in range(0, len(target), WORDS):
        part = slice(start, start + WORDS)
        _Sum(stream, factor, source[part], first + start, target[part]).run()
    return True


class _Sum:
    """One range of entries, in parts of which each can be done by another thread."""

    def __init__(self, stream: walsh.Stream, factor: float, source_e: _Floats, first: int, target_e: _Floats):
        self._stream, self._factor, self._source_e, self._target_e = stream, factor, source_e, target_e
        self._first, self._last = first, first + len(target_e)
        self._begin = first - first % laws.PER_WORD
        self._words_w = stream.words(self._begin // laws.PER_WORD, -(-self._last // laws.PER_WORD))
        self._sizes = stream.sizes(first, self._last)

    def run(self) -> None:
        starts = range(self._begin, self._last, PIECE)
        threads = min(torch.get_num_threads(), len(starts))
        if threads < 2:
            self._do(starts)
            return
        others: list[Future[None]] = []
        try:
            for i in range(1, threads):
                others.append(_pool(os.getpid()).submit(self._do, starts[i::threads]))
            self._do(starts[::threads])
        finally:  # nothing is written any more when this returns, whichever of them failed
            wait(others)
        for other in others:
            other.result()

    def _do(self, starts: Sequence[int]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # weights that grew too large are no news here, as in torch
            for start in starts:
                self._part(start)

    def _part(self, start: int) -> None:
        room, stretch = _room(), self._stream.stretch
        words_w = self._words_w[(start - self._begin) // laws.PER_WORD :][: PIECE // laws.PER_WORD]
        low, high = max(start, self._first), min(start + PIECE, self._last)
        if self._sizes is None:
            part_e = laws.signs(words_w, room, stretch, self._factor)[low - start : high - start]
        else:
            part_e = laws.signs(words_w, room)[low - start : high - start]
            self._sizes.give(part_e, low, stretch, self._factor)
        at = slice(low - self._first, high - self._first)
        np.add(self._source_e[at], part_e, out=self._target_e[at])


def _room() -> _Floats:
    """(PIECE,) of this thread."""
    if getattr(_rooms, "size", 0) != PIECE:
        _rooms.size, _rooms.room = PIECE, np.empty(PIECE, dtype=np.float32)
    return _rooms.room


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads beside the one that asks. A forked process has none of its parent's, so it gets its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sotto-entries")
