"""Random words that follow from where they stand: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405).

Word `i` of a stream is computed from (key, step, direction, i) alone, so that any part of a direction can be made
anywhere, in any order, on any device, and is the same. Everything here is integer arithmetic: it cannot round.

These words are public. Nothing that protects anyone may be drawn from them (`sotto.privacy.noise` does that).

Layout of the 128-bit counter: the lower 64 bits number the blocks of four words, then 32 bits of `index` (which
direction of the step), then 32 bits of `step`. The 64-bit key is a hash of the run's key, the tensor's name and what
the words are for.

Shape legend: n blocks, 4 words of each.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
import torch

_randomgen: Any = importlib.import_module("randomgen")  # untyped
Words = np.ndarray[Any, np.dtype[np.uint32]]

BLOCK = 4
_LOW = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_key(run_key: str, *names: str) -> int:
    """The 64-bit key of one stream. Each name enters with its length, so that ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in ("sotto directions", run_key, *names):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest()[:8], "little")


def words(key: int, step: int, index: int, start: int, stop: int) -> Words:
    """Words `start` to `stop` of a stream, on the CPU.

    Args:
      key: from `stream_key`.
      step, index: each in [0, 2^32).
      start, stop: word numbers, 0 <= start <= stop < 2^66.
    """
    first = start // BLOCK
    # The generator counts up before it draws.
    counter = (first + (index << 64) + (step << 96) - 1) % (1 << 128)
    philox = _randomgen.Philox(key=key, counter=counter, number=4, width=32)
    length = stop - first * BLOCK
    drawn = np.random.Generator(philox).integers(0, 1 << 32, size=length, dtype=np.uint32)
    return drawn[start - first * BLOCK :]


def blocks(key: int, step: int, index: int, block_n: torch.Tensor) -> torch.Tensor:
    """The words of any blocks, on any device: (..., n) int64 block numbers -> (..., n, 4) int64 words in [0, 2^32)."""
    c0, c1 = block_n & _LOW, block_n >> 32
    c2, c3 = torch.full_like(block_n, index), torch.full_like(block_n, step)
    k0, k1 = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        # Products of two 32-bit numbers wrap in int64; their 64 bits are right, and the mask takes the sign away.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], -1)
