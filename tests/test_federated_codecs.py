"""Codecs with a state, and noise that users add: what they keep, what they promise, what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from scipy import stats
from torch import nn

import sotto
from sotto.errors import SottoError
from sotto.federated.autoencoder import Autoencoder
from sotto.federated.client import bounded
from sotto.federated.codec import Identity, Srht, cosine
from sotto.federated.cohort import LATENT, Cohort
from sotto.federated.server import shares_for
from sotto.federated.shares import Divided, Shares
from sotto.federated.simulate import simulate
from sotto.federated.subspace import BASIS, Learned, Subspace, top_directions
from sotto.gradients.clipping import Flat
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.privacy.plan import make_plan

FEDERATED: dict[str, Any] = {"kind": "federated", "local_batch_size": 2}


# ---- public directions


def test_top_directions_are_those_of_the_singular_vectors():
    rows = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(5, 0.1, 12)[:, None]
    found = top_directions(rows, 4)
    wanted = torch.linalg.svd(rows, full_matrices=False)[2][:4]
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-5, rtol=0)
    # The same subspace: the projections agree, whatever the signs and the order.
    torch.testing.assert_close(found.T @ found, wanted.T @ wanted, atol=1e-4, rtol=0)


def test_a_subspace_keeps_what_lies_in_it_and_is_linear():
    basis = torch.linalg.qr(torch.randn(50, 5))[0].T
    codec, inside = Subspace(basis), basis.T @ torch.randn(5)
    torch.testing.assert_close(codec.decode(codec.encode(inside, 0), 0), inside)
    latents = torch.randn(7, 5)
    separately = torch.stack([codec.decode(z, 0) for z in latents]).mean(0)
    torch.testing.assert_close(codec.decode(latents.mean(0), 0), separately)
    assert float(codec.encode(torch.randn(50), 0).norm()) <= 50


def test_too_little_public_text_is_refused():
    with pytest.raises(SottoError, match="SOT936"):
        top_directions(torch.randn(3, 40), 4)


@pytest.mark.parametrize(
    "state", [{}, {BASIS: torch.zeros(2, 9)}, {BASIS: torch.ones(3, 9)}, {BASIS: torch.full((3, 9), torch.nan)}]
)
def test_only_orthonormal_directions_are_taken_from_others(state: dict[str, torch.Tensor]):
    for codec in (Subspace(torch.zeros(3, 9)), Learned(9, 4, "key")):
        with pytest.raises(SottoError, match="SOT935"):
            codec.restore(state)


def public_file(folder: Path) -> str:
    rows = tiny_runs.rows(80, seed=99)
    return str(tiny_runs.write_csv(folder / "public.csv", rows))


def test_a_run_with_public_directions_keeps_more_of_an_update_than_a_random_projection(tmp_path: Path):
    from sotto import session as sessions

    setting = {**FEDERATED, "codec": "subspace", "latent": 12, "public_data": public_file(tmp_path)}
    config = tiny_runs.config(tmp_path, setting=setting)
    parts = sessions.load_parts(config, "key")
    codec = parts.engine.codec  # type: ignore[union-attr]
    plain = sessions.load_parts(tiny_runs.config(tmp_path, setting=FEDERATED), "key")
    updates = plain.engine.collect(np.arange(40), 0).gradients[LATENT].float()  # type: ignore[union-attr]
    kept = cosine(codec.decode(codec.encode(updates, 0), 0), updates)
    random = Srht(len(updates), 12, "key")
    assert kept > 5 * cosine(random.decode(random.encode(updates, 0), 0), updates)
    run = simulate(config)
    assert run.finished


# ---- learned directions


def test_learned_directions_are_orthonormal_and_follow_releases():
    codec, direction = Learned(64, 8, "key"), torch.randn(64)
    before = cosine(codec.decode(codec.encode(direction, 0), 0), direction)
    for step in range(12):
        codec.learn(direction + 0.1 * torch.randn(64))
        basis = codec.state()[BASIS]
        used = basis[basis.norm(dim=1) > 0]
        torch.testing.assert_close(used @ used.T, torch.eye(len(used)), atol=1e-4, rtol=0)
        assert len(used) == min(step + 1, 6)
    assert cosine(codec.decode(codec.encode(direction, 0), 0), direction) > max(0.95, before)


def test_learned_codec_is_linear_and_restores():
    codec = Learned(64, 8, "key")
    for _ in range(3):
        codec.learn(torch.randn(64))
    again = Learned(64, 8, "key")
    again.restore(codec.state())
    update, latents = torch.randn(64), torch.randn(5, 8)
    assert torch.equal(codec.encode(update, 2), again.encode(update, 2))
    separately = torch.stack([codec.decode(z, 2) for z in latents]).mean(0)
    torch.testing.assert_close(codec.decode(latents.mean(0), 2), separately, atol=1e-5, rtol=1e-4)


def test_a_release_of_zeros_teaches_nothing():
    codec = Learned(64, 8, "key")
    codec.learn(torch.zeros(64))
    assert float(codec.state()[BASIS].norm()) == 0


# ---- the paper's autoencoder


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(2048, 256, "key", 1.0)


def test_an_autoencoder_of_random_numbers_keeps_no_more_than_its_share(autoencoder: Autoencoder):
    """k / n of the energy: what a random projection of that size keeps."""
    share = autoencoder.size / 2048
    assert 0.7 * share < autoencoder.kept < 1.03 * share
    updates = torch.randn(50, 2048) / math.sqrt(2048)
    kept = np.mean([cosine(autoencoder.decode(autoencoder.encode(u, 0), 0), u) for u in updates])
    assert kept == pytest.approx(math.sqrt(share), abs=0.08)


def test_the_autoencoder_is_the_same_for_the_same_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.federated.autoencoder.STEPS", 20)
    one, again, other = (Autoencoder(2048, 256, key, 1.0) for key in ("key", "key", "another"))
    update = torch.randn(2048)
    assert torch.equal(again.encode(update, 0), one.encode(update, 0))
    assert not torch.equal(other.encode(update, 0), one.encode(update, 0))
    other.restore(one.state())
    assert torch.equal(other.encode(update, 0), one.encode(update, 0))


# ---- noise that users add


def sharing(size: int, users: int, z: float, dropouts: float, noise: Any) -> Cohort:
    parameters = {"w": nn.Parameter(torch.zeros(size))}
    engine = Cohort(parameters, Flat(0.5), Identity(size), lambda order, asked: [])
    engine.shares, engine.noise = Shares.of(0.5, z, users, dropouts), noise
    return engine


@pytest.mark.parametrize(("answers", "factor"), [(0, 1.0), (10, 1.0), (40, 1.0), (50, math.sqrt(50 / 40))])
def test_the_sum_carries_the_noise_of_the_plan_whoever_answers(answers: int, factor: float):
    """50 users with a fifth of them allowed to be silent: 40 shares are all of it, and what lacks is added."""
    size, z, noise = 300_000, 0.9, SecureNoise()
    engine = sharing(size, 50, z, 0.2, noise)
    zero = torch.zeros(size)
    sent = ((u, engine.shares.message(zero, noise, 0, str(u)).numpy()) for u in range(answers))
    total = engine.add_up(np.arange(50), sent)
    released = Divided(50, True).privatize(total, 0)[LATENT]
    expected = z * 0.5 / 50 * factor
    assert float(released.std()) == pytest.approx(expected, rel=7e-3)
    assert float(released.std()) != pytest.approx(expected * 1.02, rel=7e-3)  # its twin


@pytest.mark.parametrize("answers", [0, 40, 50, 75])
def test_the_noise_does_not_tell_how_many_users_answered(answers: int):
    """Of a million numbers, the deviation tells one share of a hundred: it must be the same whoever answers."""
    noise = SecureNoise()
    engine = sharing(300_000, 50, 0.9, 0.2, noise)
    engine.shares = Shares.of(0.5, 0.9, 50, 0.2, registered=1000)
    assert stats.binom.sf(engine.shares.most, 1000, 0.05) < 1e-12 < stats.binom.sf(engine.shares.most - 1, 1000, 0.05)
    zero = torch.zeros(300_000)
    sent = ((u, engine.shares.message(zero, noise, 0, str(u)).numpy()) for u in range(answers))
    found = float(engine.add_up(np.arange(100), sent).gradients[LATENT].std())
    assert found == pytest.approx(0.9 * 0.5 * math.sqrt(engine.shares.most / 40), rel=7e-3)  # five standard errors
    assert found != pytest.approx(0.9 * 0.5 * math.sqrt((engine.shares.most + 4) / 40), rel=7e-3)  # its twin: nine


def test_a_server_adds_the_shares_of_silent_users_and_not_of_sites(tmp_path: Path):
    users = tiny_runs.config(tmp_path, setting={**FEDERATED, "noise": "clients"})
    found = shares_for(users)
    assert found is not None
    assert found.most > 12 > found.least
    sites = shares_for(tiny_runs.config(tmp_path, setting={**FEDERATED, "noise": "clients", "sites": 5}))
    assert sites is not None
    assert sites.most == 0


@pytest.mark.parametrize(("sites", "senders"), [(None, 12), (5, 5)])
def test_the_shares_of_a_run_make_up_the_noise_of_its_plan(tmp_path: Path, sites: int | None, senders: int):
    """Variances add up: those of the messages that must come are that of the plan, for the bound of the plan."""
    setting = {**FEDERATED, "noise": "clients", "dropouts": 0.2, "sites": sites}
    given = tiny_runs.config(tmp_path, setting=setting, method={"clip_norm": 0.3})
    plan, found = make_plan(given), shares_for(given)
    assert found is not None
    assert (found.clip_norm, found.least) == (0.3, int(0.8 * senders))
    assert found.least * found.std**2 == pytest.approx((plan.noise_multiplier * 0.3) ** 2)
    assert found.reach == pytest.approx(0.3 if sites is None else 0.3 * tiny_runs.UNITS)


def test_a_message_has_its_own_share_of_noise_and_is_right_on_average():
    shares, vector = Shares.of(1.0, 1.0, 16, 0.0), bounded(torch.randn(100_000), 1.0)
    message = shares.message(vector, SecureNoise(), 0, "x")
    assert message.dtype == torch.int32
    noise = message.double() * shares.unit - vector.double()
    assert float(noise.std()) == pytest.approx(0.25, rel=1.3e-2)  # six standard errors
    assert abs(float(noise.mean())) < 6 * 0.25 / math.sqrt(100_000)
    assert shares.std / shares.unit >= 64


def test_without_noise_a_message_is_the_vector_rounded_towards_zero():
    class Nothing(DebugNoise):
        def normal(self, shape, std, *, step, name, device):
            return torch.zeros(shape, dtype=torch.float64)

    shares, vector = Shares.of(1.0, 1.0, 16, 0.0), bounded(torch.randn(1000), 1.0)
    back = shares.message(vector, Nothing(0), 0, "x").double() * shares.unit
    assert float((back - vector).abs().max()) < shares.unit
    assert bool((back.abs() <= vector.double().abs()).all())


BAD = {
    "float": lambda size: np.zeros(size, dtype=np.float32),
    "64 bits": lambda size: np.zeros(size, dtype=np.int64),
    "too long": lambda size: np.full(size, 2**31 - 1, dtype=np.int32),
    "short": lambda size: np.zeros(size - 1, dtype=np.int32),
    "nothing": lambda size: None,
}


@pytest.mark.parametrize("name", BAD)
def test_messages_of_other_kinds_do_not_count_and_their_shares_are_replaced(name: str):
    engine = sharing(1000, 4, 1.0, 0.0, SecureNoise())
    total = engine.add_up(np.arange(4), [(u, BAD[name](1000)) for u in range(4)])
    assert engine.heard.answered == 0
    assert float(total.gradients[LATENT].std()) == pytest.approx(0.5, rel=0.15)


def test_an_honest_message_is_not_too_long():
    engine = sharing(5000, 100, 1.0, 0.2, SecureNoise())
    vector = bounded(torch.randn(5000), 0.5)
    for user in range(100):
        assert engine._add(torch.zeros(5000).double(), engine.shares.message(vector, SecureNoise(), 0, str(user)))


def test_a_run_with_noise_of_the_users(tmp_path: Path):
    run = simulate(tiny_runs.config(tmp_path, setting={**FEDERATED, "noise": "clients"}))
    assert run.finished
    assert "secure aggregation" in run.statement
    debug = tiny_runs.config(tmp_path, setting={**FEDERATED, "noise": "clients"}, run={"debug_noise_seed": 1})
    assert sotto.plan(debug).not_private
