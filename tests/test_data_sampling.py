import math
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sotto.data.sampling import PoissonSampler, microbatches

KEY = bytes(range(16))
N, Q, STEPS = 40, 0.25, 4000
TOO_UNLIKELY = 1e-6


def faults(draws: list[np.ndarray], num_units: int, prob: float) -> list[str]:
    """What shows that these draws, one per step, are no Poisson sampling. Empty if nothing does.

    Each test rejects a right sampler with probability of about `TOO_UNLIKELY`.
    """
    steps = len(draws)
    drawn = np.zeros((steps, num_units))
    for step, units in enumerate(draws):
        np.add.at(drawn[step], units, 1.0)
    found = []
    if drawn.max() > 1:
        found.append("a unit twice in one draw")
    limit = float(stats.norm.isf(TOO_UNLIKELY / 2))
    variance = num_units * prob * (1 - prob)
    sizes = drawn.sum(1)
    if abs(sizes.mean() - num_units * prob) > limit * math.sqrt(variance / steps):
        found.append("mean of the batch size")
    excess = (1 - 6 * prob * (1 - prob)) / variance  # kurtosis of the binomial, above 3
    if abs(sizes.var() / variance - 1) > limit * math.sqrt((2 + excess) / steps):
        found.append("variance of the batch size")
    counts_z = (drawn.sum(0) - steps * prob) / math.sqrt(steps * prob * (1 - prob))
    if not TOO_UNLIKELY < stats.chi2.sf((counts_z**2).sum(), num_units) < 1 - TOO_UNLIKELY:
        found.append("participations of a unit")
    centred = (drawn - prob) / math.sqrt(prob * (1 - prob))
    pairs_z = (centred.T @ centred)[np.triu_indices(num_units, 1)] / math.sqrt(steps)
    if not TOO_UNLIKELY < stats.chi2.sf((pairs_z**2).sum(), len(pairs_z)) < 1 - TOO_UNLIKELY:
        found.append("pairs of units")
    for lag in (1, 2, 3, 4):
        together = (centred[lag:] * centred[:-lag]).sum() / math.sqrt((steps - lag) * num_units)
        if abs(together) > limit:
            found.append(f"steps {lag} apart")
    return found


def right(num_units: int = N, prob: float = Q, key: bytes = KEY, steps: int = STEPS) -> list[np.ndarray]:
    sampler = PoissonSampler(num_units, prob, key)
    return [sampler.draw(step) for step in range(steps)]


def fixed_size(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.choice(N, int(N * Q), replace=False) for _ in range(STEPS)]


def shuffled_epochs(rng: np.random.Generator) -> list[np.ndarray]:
    return [b for _ in range(STEPS * 10 // N) for b in np.split(rng.permutation(N), N // 10)]


def bernoulli(rng: np.random.Generator, prob: float) -> np.ndarray:
    return np.flatnonzero(rng.random(N) < prob)


def stuck(rng: np.random.Generator) -> list[np.ndarray]:
    return [b for _ in range(STEPS // 2) for b in [bernoulli(rng, Q)] * 2]


def couples(rng: np.random.Generator) -> list[np.ndarray]:
    return [np.concatenate([2 * (p := np.flatnonzero(rng.random(N // 2) < Q)), 2 * p + 1]) for _ in range(STEPS)]


def one_left_out(rng: np.random.Generator) -> list[np.ndarray]:
    return [b[b > 0] for b in (bernoulli(rng, Q) for _ in range(STEPS))]


def with_replacement(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, N, rng.binomial(N, Q)) for _ in range(STEPS)]


WRONG = {
    "fixed size": fixed_size,
    "shuffled epochs": shuffled_epochs,
    "q 10 % too high": lambda rng: [bernoulli(rng, 1.1 * Q) for _ in range(STEPS)],
    "q 10 % too low": lambda rng: [bernoulli(rng, 0.9 * Q) for _ in range(STEPS)],
    "same draw twice": stuck,
    "units in couples": couples,
    "one unit never drawn": one_left_out,
    "with replacement": with_replacement,
}


@pytest.mark.parametrize("key", [KEY, bytes(16), b"\xff" * 16])
@pytest.mark.parametrize(("num_units", "prob"), [(N, Q), (N, 0.6), (200, 0.02)])
def test_the_sampler_is_poisson(num_units, prob, key):
    assert faults(right(num_units, prob, key), num_units, prob) == []


@pytest.mark.parametrize("attempts", [[0], range(5)])
def test_attempts_are_fresh_draws(attempts):
    sampler = PoissonSampler(N, Q, KEY)
    draws = [sampler.draw(step, attempt) for step in range(STEPS // len(attempts)) for attempt in attempts]
    assert faults(draws, N, Q) == []


@pytest.mark.parametrize("name", WRONG)
def test_the_test_rejects_wrong_samplers(name):
    assert faults(WRONG[name](np.random.default_rng(0)), N, Q) != []


def test_the_test_accepts_plain_bernoulli_draws():
    rng = np.random.default_rng(0)
    assert faults([bernoulli(rng, Q) for _ in range(STEPS)], N, Q) == []


def test_every_subset_has_its_probability():
    draws = right(3, 0.4, steps=20_000)
    counts = np.bincount([int((1 << units).sum()) for units in draws], minlength=8)
    expected = [20_000 * 0.4 ** subset.bit_count() * 0.6 ** (3 - subset.bit_count()) for subset in range(8)]
    assert stats.chisquare(counts, expected).pvalue > TOO_UNLIKELY
    assert counts[0] > 0  # empty draws are draws


def test_a_draw_is_sorted_without_repetition_and_within_range():
    for step in range(200):
        units = PoissonSampler(1000, 0.1, KEY).draw(step)
        assert units.dtype == np.int64
        assert (np.diff(units) > 0).all()
        assert units.min() >= 0
        assert units.max() < 1000


def test_a_draw_depends_on_key_step_and_attempt_alone():
    sampler = PoissonSampler(1000, 0.1, KEY)
    first = [sampler.draw(step).tolist() for step in range(5)]
    assert [PoissonSampler(1000, 0.1, KEY).draw(step).tolist() for step in (4, 3, 2, 1, 0)] == first[::-1]
    assert pickle.loads(pickle.dumps(sampler)).draw(3).tolist() == first[3]
    distinct = [tuple(sampler.draw(s, a)) for s in range(20) for a in range(20)]
    distinct += [tuple(PoissonSampler(1000, 0.1, bytes([i]) * 16).draw(0)) for i in range(20)]
    assert len(set(distinct)) == 420


def test_streams_of_different_steps_and_attempts_never_meet():
    sampler = PoissonSampler(10, 0.5, KEY)
    raws = [sampler._stream(s, a).bit_generator.random_raw(4) for s in range(30) for a in range(30)]
    assert len(set(np.concatenate(raws).tolist())) == 30 * 30 * 4
    assert sampler._stream(256, 0).integers(1 << 60) != sampler._stream(0, 256).integers(1 << 60)


def test_the_stream_is_aes_in_counter_mode():
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    import hashlib

    message = (7).to_bytes(8, "little") + (2).to_bytes(8, "little")
    key = hashlib.blake2b(message, key=KEY, digest_size=16, person=b"sotto.sampling").digest()
    aes = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.ECB()).encryptor()
    blocks = b"".join(counter.to_bytes(16, "little") for counter in range(8))
    expected = np.frombuffer(aes.update(blocks), dtype="<u8")
    assert PoissonSampler(5, 0.5, KEY)._stream(7, 2).bit_generator.random_raw(16).tolist() == expected.tolist()


def test_edges():
    assert PoissonSampler(0, 0.5, KEY).draw(0).tolist() == []
    assert PoissonSampler(5, 0.0, KEY).draw(0).tolist() == []
    assert PoissonSampler(5, 1.0, KEY).draw(0).tolist() == [0, 1, 2, 3, 4]
    for bad in ((-1, 0.5, KEY), (5, 1.1, KEY), (5, math.nan, KEY), (5, -0.1, KEY), (5, 0.5, b"short")):
        with pytest.raises(ValueError):
            PoissonSampler(*bad)
    with pytest.raises(OverflowError):
        PoissonSampler(5, 0.5, KEY).draw(-1)


def test_the_key_is_not_shown():
    sampler = PoissonSampler(5, 0.5, b"0123456789abcdef", debug=True)
    assert "0123456789abcdef" not in repr(sampler)
    assert "debug=True" in repr(sampler)


def test_cost_follows_the_batch_and_not_the_data():
    import tracemalloc

    sampler = PoissonSampler(100_000_000, 2.56e-6, KEY)
    sampler.draw(0)
    tracemalloc.start()
    start = time.perf_counter()
    for step in range(20):
        sampler.draw(step)
    took, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20  # one int64 per unit would be 763 MiB
    assert took < 2


BATCHES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), max_size=30)


@given(BATCHES, st.integers(1, 8))
@settings(deadline=None)
def test_microbatches_hold_whole_units_and_every_position_once(batch, size):
    units = np.array([unit for unit, _ in batch], dtype=np.int64)
    lengths = np.array([0] + [length for _, length in batch])
    examples = np.arange(1, len(batch) + 1)
    parts = microbatches(examples, units, lengths, size)
    assert sorted(p for part in parts for p in part.tolist()) == list(range(len(batch)))
    homes = [set(units[part].tolist()) for part in parts]
    assert sum(map(len, homes)) == len(set(units.tolist()))
    for part, home in zip(parts, homes, strict=True):
        assert 0 < len(part) <= size or len(home) == 1
    longest = [int(lengths[examples[part]].max()) for part in parts]
    assert longest == sorted(longest, reverse=True)
    again = microbatches(examples, units, lengths, size)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_microbatches_group_like_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 256)
    examples = rng.permutation(256)
    parts = microbatches(examples, np.arange(256), lengths, 32)
    padded = sum(len(p) * lengths[examples[p]].max() for p in parts)
    assert len(parts) == 8
    assert padded < 1.15 * lengths.sum()


def test_microbatches_of_nothing_and_of_nonsense():
    none = np.array([], dtype=np.int64)
    assert microbatches(none, none, np.array([3]), 4) == []
    with pytest.raises(ValueError):
        microbatches(none, none, np.array([3]), 0)
