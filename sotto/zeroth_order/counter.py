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

import functools
import hashlib
import importlib
import threading
from collections.abc import Callable, Iterator
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
_MOST_HELD = 4096
_generators = threading.local()
_STATE: dict[str, Any] = {
    "bit_generator": "randomgen.philox.Philox",
    "buffer": np.zeros(BLOCK, dtype=np.uint32),
    "buffer_pos": BLOCK,  # nothing is left of what was drawn before
    "has_uint32": 0,
    "uinteger": 0,
    "number": BLOCK,
    "width": 32,
}


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
    first, philox = start // BLOCK, _philox()
    # The generator counts up before it draws.
    counter = (first + (index << 64) + (step << 96) - 1) % (1 << 128)
    philox.state = {**_STATE, "state": {"counter": _parts(counter, 4), "key": _parts(key, 2)}}
    drawn = philox.random_raw(stop - first * BLOCK).astype(np.uint32)
    return drawn[start - first * BLOCK :]


def _philox() -> Any:
    """The generator of this thread. To make a new one takes longer than a thousand words."""
    if not hasattr(_generators, "philox"):
        _generators.philox = _randomgen.Philox(key=0, counter=0, number=4, width=32)
    return _generators.philox


def _parts(number: int, count: int) -> Words:
    """A number's words, the lowest first."""
    return np.frombuffer(number.to_bytes(4 * count, "little"), dtype="<u4")


def signed(number: int, bits: int) -> int:
    """The number with the same bits, of which the highest is a sign."""
    return number - (number >> (bits - 1) << bits)


def blocks(key: int | torch.Tensor, step: int, index: int, block_n: torch.Tensor) -> torch.Tensor:
    """The words of any blocks, on any device: (..., n) int64 block numbers -> (..., n, 4) int64 words in [0, 2^32).

    Args:
      key: of all blocks, or (..., n) int64, the bits of a key for each.
    """
    # A GPU takes longer to be told of an operation than to do it, so the two halves of a round go through it together.
    wide = (2, *[1] * block_n.dim())
    even_2n = torch.stack([block_n & _LOW, torch.full_like(block_n, index)])  # c0 and c2; after every round turned
    odd_2n = torch.stack([torch.full_like(block_n, step), block_n >> 32])  # c3 and c1
    factors = [factor_2.view(wide) for factor_2 in _factors(block_n.device)]
    keys = _keys(key, block_n.device) if isinstance(key, int) else _keys_of_each(key)
    for key_2n, factor_2n in zip(keys, factors, strict=True):
        # Products of two 32-bit numbers wrap in int64; their 64 bits are right, and the mask takes the sign away.
        product_2n = even_2n * factor_2n
        key_2n = key_2n.view(wide) if isinstance(key, int) else key_2n
        even_2n = (product_2n >> 32).bitwise_and_(_LOW).bitwise_xor_(odd_2n).bitwise_xor_(key_2n)
        odd_2n = product_2n.bitwise_and_(_LOW).flip(0)
    (c0, c2), (c3, c1) = even_2n, odd_2n
    return torch.stack([c0, c1, c2, c3], -1)


def _kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes a constant once; but not what a forecast makes, which has no numbers."""
    held: dict[Any, torch.Tensor] = {}

    @functools.wraps(make)
    def get(*args: Any) -> torch.Tensor:
        if args in held:
            return held[args]
        made = make(*args)
        if type(made) is torch.Tensor:
            if len(held) >= _MOST_HELD:
                held.clear()
            held[args] = made
        return made

    return get


@_kept
def _keys(key: int, device: torch.device) -> torch.Tensor:
    """(10, 2) keys of the rounds, turned in every second one. Kept: a tensor has one key."""
    rounds = [((key & _LOW) + i * _WEYL[0] & _LOW, (key >> 32) + i * _WEYL[1] & _LOW) for i in range(_ROUNDS)]
    return torch.tensor([pair if i % 2 else pair[::-1] for i, pair in enumerate(rounds)], device=device)


def _keys_of_each(key_n: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same, (2, n) for each round, from the bits of a key for each block."""
    low_n, high_n = key_n & _LOW, (key_n >> 32) & _LOW
    for i in range(_ROUNDS):
        pair = (low_n + i * _WEYL[0]) & _LOW, (high_n + i * _WEYL[1]) & _LOW
        yield torch.stack(pair if i % 2 else pair[::-1])


@_kept
def _factors(device: torch.device) -> torch.Tensor:
    """(10, 2) multipliers of the rounds, turned in every second one."""
    return torch.tensor([_MULTIPLIER[::-1] if i % 2 else _MULTIPLIER for i in range(_ROUNDS)], device=device)
