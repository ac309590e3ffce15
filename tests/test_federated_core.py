"""What leaves a device, what the server accepts, and what the codecs keep: against slow oracles and adversaries."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sotto import session as sessions
from sotto.data.units import Units
from sotto.errors import SottoError
from sotto.federated.client import Client, LocalTraining, Order, bounded
from sotto.federated.codec import Identity, Srht, cosine, hadamard
from sotto.federated.cohort import LATENT, Cohort
from sotto.federated.layout import Layout, model_fingerprint
from sotto.federated.server import setting_of
from sotto.federated.shares import Shares
from sotto.gradients.clipping import Adaptive, Flat
from sotto.losses import forward_losses
from sotto.privacy.mechanism import AdaptiveGaussianMechanism, GaussianMechanism
from sotto.privacy.noise import DebugNoise, SecureNoise

FEDERATED = {"kind": "federated", "local_learning_rate": 0.1, "local_batch_size": 2}


def cohort(size: int = 4, clip_norm: float = 1.0, answers=None, clipping=None) -> Cohort:
    parameters = {"w": nn.Parameter(torch.zeros(size))}
    return Cohort(parameters, clipping or Flat(clip_norm), Identity(size), answers or (lambda order, users: []))


def total(engine: Cohort, users, answers) -> torch.Tensor:
    return engine.add_up(np.array(users), answers).gradients[LATENT]


# ---- the bound, on both sides


WEIRD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e38, 1e-45, 0.0, 1.0, 3.4e38]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(WEIRD), st.floats(width=32)), min_size=1, max_size=40),
    st.floats(min_value=1e-3, max_value=1e3),
)
def test_nothing_longer_than_the_bound_leaves(values: list[float], clip_norm: float):
    sent = bounded(torch.tensor(values, dtype=torch.float32), clip_norm)
    assert torch.isfinite(sent).all()
    assert float(sent.double().norm()) <= clip_norm


@pytest.mark.parametrize("values", [[3e38] * 4, [float("nan"), 1.0], [float("inf")], [1e-45, 5.0], [0.1] * 777])
def test_a_vector_that_is_too_long_is_cut_and_one_that_is_none_is_zero(values: list[float]):
    sent = bounded(torch.tensor(values), 0.7)
    assert torch.isfinite(sent).all()
    assert float(sent.double().norm()) <= 0.7
    assert (float(sent.norm()) > 0.69) == bool(np.isfinite(values).all())


def test_the_bound_is_on_what_leaves_and_not_on_what_is_encoded():
    """A codec may make a vector longer: a projection does, of what lies in its own directions."""
    codec = Srht(1000, 20, "key")
    update = codec.decode(torch.eye(20)[3], 0) * 50.0
    assert float(codec.encode(bounded(update, 1.0), 0).norm()) > 5.0, "the twin"
    users: Any = SimpleNamespace(units=Units.build(None, 1, 1, 0)[0])
    order = Order(0, 1.0, {})
    sent = Client(lambda *of: update, codec, users).answer(order, 0)
    assert 0.99 < float(sent.double().norm()) <= 1.0
    shares = Shares(1.0, 1e-4, 1, 1.0)
    message = Client(lambda *of: update, codec, users, shares, SecureNoise()).answer(order, 0).double() * shares.unit
    assert float((message - sent.double()).norm()) < 12 * 1e-4 * 20**0.5


def test_a_vector_within_the_bound_is_sent_as_it_is():
    vector = torch.tensor([0.3, -0.4])
    assert torch.equal(bounded(vector, 1.0), vector)
    torch.testing.assert_close(bounded(vector * 10, 1.0), vector / 0.5)


def replies(generator: np.random.Generator, size: int):
    """What a hostile or broken device may send."""
    kind = generator.integers(12)
    scale = 10.0 ** generator.integers(-30, 38)
    vector = (generator.standard_normal(size) * scale).astype(np.float32)
    if kind == 0:
        vector[generator.integers(size)] = np.nan
    elif kind == 1:
        vector[generator.integers(size)] = np.inf
    elif kind == 2:
        vector = np.full(size, 1e30, dtype=np.float32)
    elif kind == 3:
        return vector[: generator.integers(size)]
    elif kind == 4:
        return np.clip(vector, -1, 1).astype(np.float16)
    elif kind == 5:
        return np.zeros(size, dtype=np.int64)
    elif kind == 6:
        return vector.reshape(1, -1)
    elif kind == 7:
        return [None, "no", 3, {}, b"bytes"][generator.integers(5)]
    elif kind == 8:
        return np.array(["text"] * size)
    elif kind == 9:
        return torch.from_numpy(vector).to(torch.complex64)
    return vector


def test_no_answer_moves_the_sum_by_more_than_the_bound():
    """The influence of one user, over ten thousand answers, with the bound and the divisor that the noise covers."""
    generator, size, clip_norm, divisor = np.random.default_rng(7), 6, 0.5, 20.0
    engine = cohort(size, clip_norm)
    honest = [(user, generator.standard_normal(size).astype(np.float32)) for user in range(3)]
    without = total(engine, [0, 1, 2], honest)
    for _ in range(10_000):
        moved = total(engine, [0, 1, 2, 3], [*honest, (3, replies(generator, size))]) - without
        assert float(moved.norm()) / divisor <= clip_norm / divisor * (1 + 1e-6)


def test_negative_twin_a_server_that_trusts_its_devices_is_moved_further(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.federated.cohort.bounded", lambda vector, most: vector)
    moved = total(cohort(2, 1.0), [0], [(0, np.full(2, 1e30, dtype=np.float32))])
    assert float(moved.norm()) > 1.0


def test_only_those_who_were_asked_count_and_each_once():
    one = np.array([1.0, 0, 0, 0], dtype=np.float32)
    engine = cohort()
    assert total(engine, [3, 5], [(5, one), (5, one), (4, one), (-1, one)]).tolist() == [1, 0, 0, 0]
    assert engine.heard.answered == 1
    assert sum(engine.heard.refused.values()) == 3


def test_a_zero_update_is_an_update():
    """Flower's clipping divides by the norm here (its issue 7631)."""
    engine = cohort()
    assert total(engine, [0], [(0, np.zeros(4, dtype=np.float32))]).tolist() == [0] * 4
    assert engine.heard.answered == 1


def test_an_empty_round_asks_nobody_and_gives_zeros():
    def never(order, users):
        raise AssertionError("asked")

    assert cohort(answers=never).collect(np.zeros(0, dtype=np.int64), 0).gradients[LATENT].tolist() == [0] * 4


def test_answers_are_taken_one_at_a_time():
    """Memory does not grow with the users: an answer is added before the next one is asked for."""
    alive: list[int] = []

    def answers(order: Order, users: np.ndarray):
        for user in users.tolist():
            vector = np.ones(4, dtype=np.float32)
            alive.append(user)
            yield user, vector
            alive.remove(user)
            assert alive == []

    assert float(cohort(answers=answers, clip_norm=10.0).collect(np.arange(50), 0).gradients[LATENT][0]) == 50


# ---- noise and divisor


@pytest.mark.parametrize("users", [10, 100, 1000])
@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_noise_does_not_depend_on_who_answers(users: int, lost: float):
    """The deviation is noise_multiplier * C / (q N), within 0.6 %, whoever is silent."""
    size, z, clip_norm = 400_000, 0.8, 0.25
    zero = np.zeros(size, dtype=np.float32)
    engine = cohort(size, clip_norm)
    silent = int(users * lost)
    summed = engine.add_up(np.arange(users), ((user, zero) for user in range(users - silent)))
    released = GaussianMechanism(z, divisor=users, noise=SecureNoise()).privatize(summed, 0)[LATENT]
    expected = z * clip_norm / users
    assert float(released.double().std()) == pytest.approx(expected, rel=6e-3)
    assert float(released.double().std()) != pytest.approx(expected * 1.02, rel=6e-3)  # its twin


def test_noise_is_that_of_the_bound_of_this_round_and_the_bound_then_follows_unclipped_updates():
    """Flower's adaptive clipping moves the bound the wrong way and noises with the next one."""
    clipping = Adaptive(1.0, quantile=0.5)
    engine = cohort(1000, clipping=clipping)
    mechanism = AdaptiveGaussianMechanism(1e-6, 10.0, DebugNoise(1), clipping, 0.5)
    large = [(user, np.full(1000, 9.0, dtype=np.float32)) for user in range(10)]
    mechanism.privatize(engine.add_up(np.arange(10), large), 0)
    assert clipping.sensitivity > 1.0  # everybody was cut: the bound rises
    raised = clipping.sensitivity
    small = [(user, np.full(1000, 1e-6, dtype=np.float32)) for user in range(10)]
    mechanism.privatize(engine.add_up(np.arange(10), small), 1)
    assert clipping.sensitivity < raised


def test_an_update_that_its_device_cut_counts_as_cut():
    clipping = Adaptive(1.0)
    engine = cohort(3, clipping=clipping)
    cut = bounded(torch.tensor([3.0, 4.0, 0.0]), 1.0).numpy()
    norms = engine.add_up(np.arange(1), [(0, cut)]).group_norms
    assert clipping.count_unclipped(norms).tolist() == [-0.5]


# ---- codecs


@pytest.mark.parametrize("size", [1, 2, 64])
def test_hadamard_is_its_own_inverse_and_keeps_norms(size: int):
    rows = torch.randn(3, size, dtype=torch.float64)
    mixed = hadamard(rows)
    torch.testing.assert_close(hadamard(mixed), rows)
    torch.testing.assert_close(mixed.norm(dim=1), rows.norm(dim=1))


def matrix(codec: Srht, size: int, step: int) -> torch.Tensor:
    """(k, n) the map, column by column."""
    return torch.stack([codec.encode(column, step) for column in torch.eye(size)], dim=1)


@pytest.mark.parametrize("size", [16, 50])
def test_srht_has_orthogonal_rows_and_decodes_by_its_transpose(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.federated.codec.BLOCK", 16)
    codec = Srht(size, 12, "key")
    whole = matrix(codec, size, 3)
    latent = torch.randn(12)
    torch.testing.assert_close(codec.decode(latent, 3), whole.T @ latent, atol=1e-5, rtol=1e-5)
    if size == 16:  # a power of two: no padding
        torch.testing.assert_close(whole @ whole.T, torch.eye(12) * 16 / 12, atol=1e-5, rtol=1e-5)


def test_srht_is_right_on_average_new_every_round_and_the_same_on_both_sides():
    codec, again = Srht(40, 8, "key"), Srht(40, 8, "key")
    update = torch.randn(40)
    assert torch.equal(codec.encode(update, 5), again.encode(update, 5))
    assert not torch.equal(codec.encode(update, 5), codec.encode(update, 6))
    mean = torch.stack([codec.decode(codec.encode(update, step), step) for step in range(6000)]).mean(0)
    assert cosine(mean, update) > 0.99
    assert float(mean.norm() / update.norm()) == pytest.approx(1.0, abs=0.05)


def test_srht_keeps_the_cosine_that_its_size_allows():
    size, latent = 1 << 15, 1 << 9
    codec, update = Srht(size, latent, "key"), torch.randn(1 << 15)
    kept = cosine(codec.decode(codec.encode(update, 0), 0), update)
    assert kept == pytest.approx(math.sqrt(latent / size), rel=0.15)


def test_decoding_the_mean_is_the_mean_of_decodings():
    codec, latents = Srht(100, 30, "key"), torch.randn(5, 30)
    separately = torch.stack([codec.decode(latent, 1) for latent in latents]).mean(0)
    torch.testing.assert_close(codec.decode(latents.mean(0), 1), separately)


# ---- what a device computes


def local(folder, **setting) -> tuple[LocalTraining, sessions.Loaded]:
    config = tiny_runs.config(folder, setting={**FEDERATED, **setting})
    parts = sessions.load_parts(config, "key")
    trainer = LocalTraining(config, setting_of(config), parts.model, parts.data, parts.tokenizer.pad_token_id)
    return trainer, parts


def weights_of(parts: sessions.Loaded) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parts.engine.parameters.items()}


def test_local_training_is_plain_sgd(tmp_path):
    """Two epochs of steps of two examples, by hand."""
    trainer, parts = local(tmp_path, local_epochs=2)
    start, user = weights_of(parts), int(np.argmax(parts.data.units.sizes))
    examples = parts.data.units.members_of(np.array([user]))[0]
    update = trainer(Order(4, 1.0, start), examples)
    by_hand = {name: value.clone().requires_grad_() for name, value in start.items()}
    for epoch in range(2):
        for rows in trainer._batches(4, epoch, examples):
            batch = parts.data.examples.collate(rows, parts.tokenizer.pad_token_id)
            losses = torch.stack([
                _loss(parts.model, {k: v[row : row + 1] for k, v in batch.items()}, by_hand) for row in range(len(rows))
            ])  # fmt: skip
            gradients = torch.autograd.grad(losses.mean(), list(by_hand.values()))
            by_hand = {
                name: (value - 0.1 * g).detach().requires_grad_()
                for (name, value), g in zip(by_hand.items(), gradients, strict=True)
            }
    layout = Layout.of(start)
    torch.testing.assert_close(update, layout.flat(start) - layout.flat(by_hand), atol=1e-6, rtol=1e-4)
    assert all(torch.equal(p, start[name]) for name, p in parts.engine.parameters.items())  # the start is put back


def _loss(model: nn.Module, batch: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    class Stand(nn.Module):
        def forward(self, **inputs):
            return torch.func.functional_call(model, weights, (), inputs)

    return forward_losses(Stand(), batch, "classification")[0]


def test_each_user_starts_from_the_weights_of_the_round(tmp_path):
    trainer, parts = local(tmp_path)
    start = weights_of(parts)
    first, second = (parts.data.units.members_of(np.array([u]))[0] for u in (0, 1))
    alone = trainer(Order(0, 1.0, start), second)
    trainer(Order(0, 1.0, start), first)
    assert torch.equal(trainer(Order(0, 1.0, start), second), alone)


def test_the_fingerprint_is_of_frozen_bytes_and_of_trained_shapes():
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        made[0].requires_grad_(False)
        return made

    one, trained, frozen = model(), model(), model()
    trained[1].weight.data += 1
    frozen[0].weight.data[0, 0] += 1e-6
    assert model_fingerprint(one) == model_fingerprint(trained)
    assert model_fingerprint(one) != model_fingerprint(frozen)


def test_a_latent_larger_than_the_update_is_refused(tmp_path):
    with pytest.raises(SottoError, match="SOT932"):
        local(tmp_path, codec="srht", latent=10**9)
