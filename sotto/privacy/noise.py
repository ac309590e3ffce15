"""Where noise comes from: a cryptographic generator by default, a seeded one for tests.

`SecureNoise` draws AES-128 in counter mode (randomgen.AESCounter, checked against the FIPS-197 vector at construction)
under a fresh key from `os.urandom` for every call and every chunk. No key is kept, stored, logged or derivable from any
seed, and objects refuse to be pickled or copied.

What this does not give. The draws of `normal` are float64 values of the ziggurat method, which are not exact. The set
of values that a float sum plus float noise can take depends, in its last bits, on the sum; attacks on these bits are
known (Mironov 2012; Haney et al. 2022, arXiv:2207.13793). The mechanism therefore adds in float64 and rounds to float32
afterwards, which leaves 29 bits below the last one that is released; this makes such attacks much harder and is no
proof. The epsilon that Sotto states is that of the ideal Gaussian. The draws of `rounded` are exact integers, and leave
no such bits (see the module `rounded`). Rejections, and draws that need more bits, make the running time depend (very
slightly) on the noise, never on the data.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
import random
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NoReturn, Protocol

import numpy as np
import torch

from sotto.errors import SottoError
from sotto.privacy.discrete import Below
from sotto.privacy.events import check_count, check_number
from sotto.privacy.rounded import rounded_normal

_randomgen: Any = importlib.import_module("randomgen")  # untyped
_CHUNK = 1 << 20
_Array = np.ndarray[Any, np.dtype[np.float64]]


class NoiseSource(Protocol):
    """Draws noise. `private` is False where someone else can recompute it."""

    private: ClassVar[bool]

    def normal(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """Returns independent N(0, std^2) draws.

        Args:
          shape: of the result.
          std: standard deviation, >= 0.
          step, name: which draw this is: the training step and the parameter. Every pair is drawn once per run.
          device: where the result goes.

        Returns:
          float64: the caller adds in float64 and rounds once, after the sum.
        """
        ...

    def rounded(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """Returns the integers nearest to independent N(0, std^2) draws, exactly (see `rounded`).

        Args, Returns: as for `normal`; std > 0.
        """
        ...

    def below(self, *, step: int, name: str) -> Below:
        """Returns what draws uniform integers in [0, n), of any size, for exact noise (`discrete`).

        Args:
          step, name: which draws these are, as for `normal`.
        """
        ...

    def gamma(self, shape: float, count: int, *, step: int, name: str) -> torch.Tensor:
        """Returns (count,) independent draws of Gamma(shape, 1), float64: lengths of noise vectors.

        Args:
          shape: > 0.
          step, name: which draw this is, as for `normal`.
        """
        ...


class SecureNoise:
    """Noise that nobody can recompute: AES-128-CTR under keys from the operating system, each used for one chunk.

    Thread-safe; holds no state. `step` and `name` are not used: calling twice gives two independent draws.
    """

    private: ClassVar[bool] = True

    def __init__(self, threads: int | None = None):
        """Checks the cipher.

        Args:
          threads: for tensors above a million elements; default: what the process may use.

        Raises:
          SottoError: SOT420, this build of randomgen does not compute AES-128.
        """
        self._threads = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else "1234")
        check_cipher()

    def normal(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """See `NoiseSource.normal`."""
        check_number("std", std, at_least=0)
        return self._filled(shape, functools.partial(_fill, std=std)).to(device)

    def rounded(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """See `NoiseSource.rounded`."""
        check_number("std", std, above=0)
        return self._filled(shape, functools.partial(_fill_rounded, std=std)).to(device)

    def _filled(self, shape: Sequence[int], fill: Callable[[_Array], None]) -> torch.Tensor:
        """Chunks are filled under keys of their own, by several threads."""
        out: _Array = np.empty(math.prod(shape))
        chunks = [out[start : start + _CHUNK] for start in range(0, out.size, _CHUNK)]
        if len(chunks) < 2 or self._threads < 2:
            for chunk in chunks:
                fill(chunk)
        else:
            with ThreadPoolExecutor(min(self._threads, len(chunks))) as pool:
                list(pool.map(fill, chunks))
        return _tensor(out).reshape(tuple(shape))

    def below(self, *, step: int, name: str) -> Below:
        """See `NoiseSource.below`: the operating system's generator."""
        return secrets.randbelow

    def gamma(self, shape: float, count: int, *, step: int, name: str) -> torch.Tensor:
        """See `NoiseSource.gamma`. By the rejection method of Marsaglia and Tsang 2000."""
        check_number("shape", shape, above=0)
        return _tensor(_fresh().standard_gamma(shape, count))

    def __repr__(self) -> str:
        return "SecureNoise()"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a noise source is never copied or stored; make a new one")


def _tensor(array: _Array) -> torch.Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def _fresh() -> np.random.Generator:
    """A generator under a key of its own, which nobody keeps."""
    key = np.frombuffer(os.urandom(16), dtype=np.uint64)
    return np.random.Generator(_randomgen.AESCounter(key=key))


def _fill(chunk: _Array, std: float) -> None:
    _fresh().standard_normal(out=chunk)
    np.multiply(chunk, std, out=chunk)


def _fill_rounded(chunk: _Array, std: float) -> None:
    chunk[:] = rounded_normal(chunk.size, std, _fresh().bit_generator.random_raw, secrets.randbelow)


def keyed_words(key: bytes, count: int, word: type[np.uint32] | type[np.uint64]) -> np.ndarray[Any, Any]:
    """(count,) uniform integers of the type `word`: a function of the key alone, AES-128 in counter mode from block 0.

    Args:
      key: 16 bytes, used for this one stream.
      count: how many, >= 0.
      word: np.uint32 or np.uint64.

    Raises:
      ValueError: the key has another length.
    """
    if len(key) != 16:
        raise ValueError("the key of a stream has 16 bytes")
    size = np.dtype(word).itemsize
    generator = _randomgen.AESCounter(key=np.frombuffer(key, dtype=np.uint64))
    return np.asarray(generator.random_raw(-(-count * size // 8)), dtype=np.uint64).view(word)[:count]


def check_cipher() -> None:
    """Compares randomgen's generator with the AES-128 example of FIPS-197, appendix C.1.

    Raises:
      SottoError: SOT420, they differ.
    """
    key = np.frombuffer(bytes(range(16)), dtype=np.uint64)
    plain = int.from_bytes(bytes.fromhex("00112233445566778899aabbccddeeff"), "little")
    block = _randomgen.AESCounter(key=key, counter=plain).random_raw(2).tobytes()
    if block.hex() != "69c4e0d86a7b0430d8cdb78070b4c55a":
        raise SottoError(
            "SOT420",
            what=f"randomgen {_randomgen.__version__} does not compute AES-128 on this machine",
            why="noise that can be predicted gives no privacy",
            fix="install another release of randomgen, or report the platform to Sotto",
        )


class DebugNoise:
    """FOR TESTS: noise that is a function of (seed, step, name) alone. A run with it is NOT PRIVATE.

    The order of calls does not matter, so that a resumed run can be compared bit by bit with one that was not stopped.
    """

    private: ClassVar[bool] = False

    def __init__(self, seed: int):
        self._seed = check_count("seed", seed)

    def normal(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """See `NoiseSource.normal`."""
        check_number("std", std, at_least=0)
        draws = self._generator(step, name).standard_normal(math.prod(shape)) * std
        return _tensor(draws).reshape(tuple(shape)).to(device)

    def rounded(self, shape: Sequence[int], std: float, *, step: int, name: str, device: torch.device) -> torch.Tensor:
        """See `NoiseSource.rounded`."""
        words: Any = self._generator(step, name).bit_generator.random_raw  # type: ignore[attr-defined]
        draws = rounded_normal(math.prod(shape), std, words, self.below(step=step, name=name))
        return _tensor(draws).reshape(tuple(shape)).to(device)

    def below(self, *, step: int, name: str) -> Below:
        """See `NoiseSource.below`."""
        return random.Random(self._key(step, name)).randrange  # noqa: S311  # not private, and says so

    def gamma(self, shape: float, count: int, *, step: int, name: str) -> torch.Tensor:
        """See `NoiseSource.gamma`."""
        check_number("shape", shape, above=0)
        return _tensor(self._generator(step, name).standard_gamma(shape, count))

    def _generator(self, step: int, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self._key(step, name)))

    def _key(self, step: int, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{step}/{name}".encode()).digest(), "little")

    def __repr__(self) -> str:
        return f"DebugNoise(seed={self._seed})  # NOT PRIVATE"
