"""The cryptography of masked rounds, from libraries but for the arithmetic of `secret_sharing`.

Agreement of keys is X25519, keys are derived by HKDF-SHA256, shares travel under AES-128-GCM (all `cryptography`), and
a key becomes a mask by AES-128 in counter mode (`privacy/noise`). Every key is derived for one purpose in one round,
and encrypts one message; so the nonce is constant.

Secrets that are shared have 16 bytes, the strength of AES-128.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sotto.federated import secret_sharing
from sotto.privacy.noise import keyed_words

SEED, PUBLIC, SHARE, TAG, COMMITMENT = secret_sharing.SECRET_BYTES, 32, secret_sharing.SHARE_BYTES, 16, 32
"""Lengths in bytes: of a secret, a public key, a share, what encryption adds, and a commitment."""
_NONCE = bytes(12)


def new_seed() -> bytes:
    return os.urandom(SEED)


def private_key(seed: bytes) -> X25519PrivateKey:
    """The private key that a seed stands for."""
    return X25519PrivateKey.from_private_bytes(_derived(seed, b"private key", 32))


def public_key(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def agreed_key(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    """(16 bytes) the key that two parties have in common, for one purpose.

    Raises:
      ValueError: the public key is none, or of low order.
    """
    return _derived(private.exchange(X25519PublicKey.from_public_bytes(public)), purpose, SEED)


def is_public_key(public: bytes) -> bool:
    """Whether a stranger's bytes can be agreed with at all."""
    try:
        agreed_key(X25519PrivateKey.generate(), public, b"trial")
    except ValueError:
        return False
    return True


def commitment(seed: bytes, purpose: bytes) -> bytes:
    """(32 bytes) what tells whether a secret was put together rightly, and tells nothing of it to who lacks it."""
    return hashlib.sha256(b"commitment|" + seed + purpose).digest()


def sealed(key: bytes, plain: bytes, purpose: bytes) -> bytes:
    """Encrypts and authenticates; the key is for this message alone."""
    return AESGCM(key).encrypt(_NONCE, plain, purpose)


def opened(key: bytes, box: bytes, purpose: bytes) -> bytes | None:
    """What was sealed, or None if a bit of it, the key or the purpose is another."""
    try:
        return AESGCM(key).decrypt(_NONCE, box, purpose)
    except (InvalidTag, ValueError):
        return None


def split(seed: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret, for positions 0 to count - 1; any `threshold` of them give it back, fewer tell nothing."""
    return secret_sharing.split(seed, threshold, count)


def combined(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly `threshold` shares, by position; other bytes where one of them is wrong."""
    return secret_sharing.combine(shares, _weights(tuple(sorted(shares))))


def mask(seed: bytes, purpose: bytes, size: int, word: type[np.uint32] | type[np.uint64]) -> np.ndarray:
    """(size,) uniform integers that only who has the seed can tell."""
    return keyed_words(_derived(seed, purpose, SEED), size, word)


_weights = lru_cache(maxsize=16)(secret_sharing.weights)  # a round puts all of its secrets together from one set


def _derived(secret: bytes, purpose: bytes, length: int) -> bytes:
    info = b"sotto masked round 1|" + purpose
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(secret)
