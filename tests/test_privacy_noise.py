"""Noise is normal, independent and of the right size; each check also rejects noise that is not (its negative twin)."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from randomgen import AESCounter
from scipy import stats

from sotto.errors import SottoError
from sotto.privacy import noise as noise_module
from sotto.privacy.noise import DebugNoise, SecureNoise

CPU = torch.device("cpu")
N = 1_000_000


def draw(source, *, n=N, std=1.0, step=0, name="w"):
    return source.normal((n,), std, step=step, name=name, device=CPU)


def check_standard_normal(x: np.ndarray) -> None:
    """Raises AssertionError unless x looks like N(0, 1). False alarms: below 1e-6."""
    n = x.size
    assert stats.kstest(x, "norm").pvalue > 1e-7
    assert abs(x.var() - 1) < 7.5e-3  # the std to 0.4 %: 5.3 standard errors at n = 1e6
    assert abs(x.mean()) < 5.5 / np.sqrt(n)
    assert len(np.unique(x)) > 0.999 * n
    for lag in (1, 2, 7, 1 << 10):
        check_unrelated(x[:-lag], x[lag:])


def check_unrelated(x: np.ndarray, y: np.ndarray) -> None:
    assert abs(np.corrcoef(x, y)[0, 1]) < 5.5 / np.sqrt(x.size)


@pytest.fixture(scope="module")
def sample():
    return draw(SecureNoise()).numpy()


@pytest.mark.parametrize("source", [SecureNoise(), SecureNoise(threads=1), DebugNoise(3)], ids=repr)
def test_standard_normal(source):
    check_standard_normal(draw(source).numpy())


@pytest.mark.parametrize("factor", [0.7, 1.3, 0.99, 1.01])
def test_the_check_rejects_a_wrong_scale(sample, factor):
    with pytest.raises(AssertionError):
        check_standard_normal(sample * factor)


def test_the_check_rejects_other_laws(sample):
    rng = np.random.default_rng(0)
    mutants = [
        rng.uniform(-np.sqrt(3), np.sqrt(3), N),
        rng.laplace(0, np.sqrt(0.5), N),
        torch.from_numpy(sample).bfloat16().double().numpy(),
        np.concatenate([sample[: N // 2]] * 2),
        np.zeros(N),
    ]
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check_standard_normal(mutant)


def test_streams_are_unrelated(sample):
    source = SecureNoise()
    first, second = draw(source).numpy(), draw(source).numpy()
    check_unrelated(first, second)
    check_unrelated(first, sample)
    check_unrelated(first, draw(source, step=1).numpy())
    with pytest.raises(AssertionError):  # the twin: a stream that is used again
        check_unrelated(first, -first)


def test_two_calls_share_no_value():
    source = SecureNoise()
    same = [draw(source, n=1000, step=0, name="w") for _ in range(2)]
    assert not (same[0] == same[1]).any()


def test_chunks_have_their_own_keys():
    x = SecureNoise(threads=2).normal((3, noise_module._CHUNK), 1.0, step=0, name="w", device=CPU).numpy()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        check_unrelated(x[a], x[b])
        assert not (x[a] == x[b]).any()


def test_each_chunk_takes_a_fresh_key_from_the_system(monkeypatch):
    taken = []
    genuine = os.urandom
    monkeypatch.setattr(noise_module.os, "urandom", lambda n: taken.append(genuine(n)) or taken[-1])
    source = SecureNoise(threads=1)
    draw(source, n=noise_module._CHUNK + 1)
    draw(source, n=5)
    assert len(taken) == len(set(taken)) == 3
    assert all(len(key) == 16 for key in taken)
    assert not [value for value in vars(source).values() if isinstance(value, (bytes, np.ndarray))]


def test_no_seed_reaches_it():
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        values.append(draw(SecureNoise(), n=100))
    assert not torch.equal(*values)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw(SecureNoise(), n=100)
    assert torch.equal(torch.rand(3), expected)


def test_the_generator_is_aes_128_in_counter_mode():
    for _ in range(5):
        key = os.urandom(16)
        raw = AESCounter(key=np.frombuffer(key, dtype=np.uint64)).random_raw(2 * 64).tobytes()
        cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        assert raw == b"".join(cipher.update(block.to_bytes(16, "little")) for block in range(64))


def test_draws_come_from_the_cipher(monkeypatch):
    """Statistics cannot tell AES from a generator that can be predicted: under a known key the numbers must agree."""
    key = bytes(range(16, 32))
    monkeypatch.setattr(noise_module.os, "urandom", lambda n: key)
    generator = np.random.Generator(AESCounter(key=np.frombuffer(key, dtype=np.uint64)))  # type: ignore[arg-type]
    assert np.array_equal(draw(SecureNoise(), n=1000, std=2.0).numpy(), generator.standard_normal(1000) * 2.0)


def test_a_build_without_aes_is_refused(monkeypatch):
    class Fake:
        AESCounter = staticmethod(lambda key, counter: np.random.PCG64(1))
        __version__ = "fake"

    noise_module.check_cipher()
    monkeypatch.setattr(noise_module, "_randomgen", Fake)
    with pytest.raises(SottoError) as caught:
        SecureNoise()
    assert caught.value.code == "SOT420"


def test_it_is_never_copied_or_stored():
    source = SecureNoise()
    for action in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            action(source)
    assert repr(source) == "SecureNoise()"


def test_private():
    assert SecureNoise.private
    assert not DebugNoise.private
    assert "NOT PRIVATE" in repr(DebugNoise(1))


def test_debug_noise_depends_on_seed_step_and_name_only():
    source = DebugNoise(7)
    first = draw(source, n=50, step=3, name="a")
    draw(source, n=9, step=4, name="b")
    assert torch.equal(first, draw(source, n=50, step=3, name="a"))
    assert torch.equal(first, draw(DebugNoise(7), n=50, step=3, name="a"))
    for other in (
        draw(DebugNoise(8), n=50, step=3, name="a"),
        draw(source, n=50, step=4, name="a"),
        draw(source, n=50),
    ):
        assert not (first == other).any()


@pytest.mark.parametrize("source", [SecureNoise(), DebugNoise(0)], ids=repr)
def test_shape_scale_and_type(source):
    x = source.normal((4, 0, 2), 1.0, step=0, name="w", device=CPU)
    assert x.shape == (4, 0, 2)
    x = source.normal((), 2.0, step=0, name="w", device=CPU)
    assert x.shape == ()
    assert x.dtype == torch.float64
    assert float(draw(source, std=1e-3, n=100_000).std()) == pytest.approx(1e-3, rel=0.02)
    assert not draw(source, std=0.0, n=10).any()
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SottoError):
            draw(source, std=bad)


@pytest.mark.parametrize("source", [SecureNoise(), DebugNoise(3)], ids=repr)
@pytest.mark.parametrize("shape", [0.5, 1.0, 384.0])
def test_gamma_draws_have_their_law(source: Any, shape: float) -> None:
    drawn = source.gamma(shape, 50_000, step=0, name="x")
    assert drawn.dtype == torch.float64
    assert stats.kstest(drawn.numpy(), stats.gamma(a=shape).cdf).pvalue > 1e-8
    assert stats.kstest(drawn.numpy(), stats.gamma(a=1.1 * shape).cdf).pvalue < 1e-8


def test_secure_gamma_draws_are_never_repeated_and_seeded_ones_are() -> None:
    drawn = [source.gamma(3.0, 4, step=0, name="x") for source in (SecureNoise(), DebugNoise(3)) for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[2], DebugNoise(3).gamma(3.0, 4, step=1, name="x"))
    assert not torch.equal(drawn[2], DebugNoise(3).gamma(3.0, 4, step=0, name="y"))
