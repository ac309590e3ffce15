"""Shamir's secret sharing: n shares of a secret, of which any t give it back, and t - 1 say nothing at all about it.

Shamir 1979, "How to share a secret" (CACM 22): the secret is the value at zero of a polynomial of degree t - 1 whose
other coefficients are uniform, and a share is its value at 1, 2, ..., n. The field is that of the integers modulo the
prime 2^130 - 5. The schemes in libraries work out the weights of a set of shares anew for every secret; the server of a
masked round needs as many secrets as users from one set, so the weights are a step of their own here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**130 - 5
SHARE_BYTES = 17
SECRET_BYTES = 16


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Returns `count` shares of `SHARE_BYTES` each, for positions 0 to count - 1.

    Args:
      secret: of `SECRET_BYTES`.
      threshold: t, shares that give the secret back, from 1 to `count`.
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= count
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value_at(place, coefficients).to_bytes(SHARE_BYTES, "big") for place in range(1, count + 1)]


def weights(positions: Sequence[int]) -> dict[int, int]:
    """Of the shares of these positions, all different, in the secret: Lagrange's, at zero."""
    found = {}
    for position in positions:
        above, below = 1, 1
        for other in positions:
            if other != position:
                above, below = above * (other + 1) % PRIME, below * (other - position) % PRIME
        found[position] = above * pow(below, -1, PRIME) % PRIME
    return found


def combine(shares: Mapping[int, bytes], by_weights: Mapping[int, int]) -> bytes:
    """The secret; other bytes where a share is wrong.

    Args:
      shares: position -> share, for all positions of the weights, which are as many as the threshold.
      by_weights: what `weights` gave.
    """
    value = sum(int.from_bytes(shares[position], "big") * weight for position, weight in by_weights.items()) % PRIME
    return (value % (1 << (8 * SECRET_BYTES))).to_bytes(SECRET_BYTES, "big")


def _value_at(place: int, coefficients: Sequence[int]) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value
