"""Layer-wise clipping against each layer of each unit, one at a time, and thresholds that follow a quantile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_gradients_engine as families
import torch
from gradient_oracle import UNEVEN, oracle, vector
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.clipping import Adaptive, Automatic, Flat, Unclipped, by_layer
from sotto.gradients.engine import attach
from sotto.gradients.self_check import verify

B, T, D = 5, 4, 6
ALGORITHMS = ("layerwise", "per_example", "book_keeping")


class Model(nn.Module):
    """A linear layer, a norm, one matrix that embeds and scores, a bare parameter and a layer that is used twice."""

    def __init__(self, slow: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.norm = nn.Embedding(9, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.head = nn.Linear(D, 9)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(9)) if slow else None
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.head(self.norm(self.mix(torch.tanh(self.mix(self.embed(ids))))))
        return out if self.scale is None else out * self.scale


def setting(slow: bool = False, dtype: torch.dtype = torch.float64):
    model = Model(slow).to(dtype)
    ids = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(B, dtype=dtype) + 0.5
    return model, weights, lambda rows: model(ids[rows]).square().sum((1, 2)) * weights[rows]


def expected_sum(gradients: list[dict[str, torch.Tensor]], thresholds: list[float]) -> dict[str, torch.Tensor]:
    """The slow, obvious form: each unit, each layer, scaled down to its threshold; not finite contributes zero."""
    layers: dict[str, list[str]] = {}
    for name in gradients[0]:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
    for unit in gradients:
        for names, threshold in zip(layers.values(), thresholds, strict=True):
            norm = float(torch.cat([unit[name].flatten() for name in names]).norm())
            if math.isfinite(norm):
                for name in names:
                    total[name] += unit[name] * min(1.0, threshold / max(norm, 1e-300))
    return total


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert float((vector(found) - vector(wanted)).norm() / vector(wanted).norm()) < tolerance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("units", [None, UNEVEN], ids=["alone", "units"])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_each_layer_is_clipped_on_its_own(algorithm: Any, units: torch.Tensor | None, slow: bool):
    model, _, losses_of = setting(slow)
    found = oracle(model, losses_of, B, units)
    groups = by_layer(dict(model.named_parameters()))
    count = max(groups.values()) + 1
    assert count == 5 + slow, "embed (tied to head.weight), mix, norm, head (its bias), unused, and the bare one"
    threshold = float(found.norms.median()) / count**0.5
    wanted = expected_sum(found.gradients, [threshold] * count)
    engine = attach(model, algorithm=algorithm, clipping=Flat(threshold * count**0.5, layerwise=True))
    for _ in range(3):
        total = engine.backward(losses_of(torch.arange(B)), units)
        assert_close(total.gradients, wanted)
        assert total.sensitivity == pytest.approx(threshold * count**0.5)
        assert total.group_norms.shape == (len(found.norms), count)
        torch.testing.assert_close(total.norms, found.norms)
    clipped = (total.group_norms > threshold).double().mean()
    assert 0 < clipped < 1, "some layers of some units are clipped, others not"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_a_loss_that_is_not_finite_contributes_nothing(algorithm: Any, slow: bool):
    model, weights, losses_of = setting(slow)
    engine = attach(model, algorithm=algorithm, clipping=Flat(0.3, layerwise=True))
    rest = torch.tensor([0, 2, 3, 4])
    without = [engine.backward(losses_of(rest)) for _ in range(2)][-1]
    weights[1] = torch.nan
    total = engine.backward(losses_of(torch.arange(B)))
    assert_close(total.gradients, without.gradients)
    assert not torch.isfinite(total.norms[1])


def test_no_unit_moves_the_sum_by_more_than_the_sensitivity():
    for layerwise_model in (False, True):
        model, weights, losses_of = setting(layerwise_model)
        weights *= 1e6
        engine = attach(model, clip_norm=0.7, algorithm="layerwise")
        whole = engine.backward(losses_of(torch.arange(B)))
        for left_out in range(B):
            rest = torch.tensor([i for i in range(B) if i != left_out])
            moved = vector(whole.gradients) - vector(engine.backward(losses_of(rest)).gradients)
            assert 0.5 < float(moved.norm()) <= 0.7 * (1 + 1e-9)
        engine.detach()


def test_microbatches_add_up():
    model, _, losses_of = setting()
    engine = attach(model, clip_norm=0.5, algorithm="layerwise")
    whole = engine.backward(losses_of(torch.arange(B)))
    parts = engine.zeros()
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):
        parts += engine.backward(losses_of(rows))
    assert_close(parts.gradients, whole.gradients)
    torch.testing.assert_close(parts.group_norms, whole.group_norms)


def test_pieces_are_dropped_as_the_backward_pass_goes():
    """When a lower layer's gradient arrives, nothing of the layers above is held."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    engine = attach(model, algorithm="layerwise")
    x = torch.randn(3, 5, 8)
    for _ in range(2):
        held: list[int] = []
        h = x
        for layer in model:
            h = layer(h)
            h.register_hook(
                lambda g, held=held: held.append(len(engine.state.book.kept)) if engine.state.book else None
            )
        engine.backward(h.square().sum((1, 2)))
    assert held[-6:] == [0] * 6


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mamba"])
def test_real_models(family: str):
    model = families.build(family)
    losses_of = families.losses_of(model, families.batch_of(4))
    found = oracle(model, losses_of, 4)
    count = max(by_layer(found.gradients[0]).values()) + 1
    wanted = expected_sum(found.gradients, [found.clip_norm / count**0.5] * count)
    engine = attach(model, clip_norm=found.clip_norm, algorithm="layerwise")
    for _ in range(2):
        assert_close(engine.backward(losses_of(torch.arange(4))).gradients, wanted)
    verify(engine, losses_of, torch.arange(4))


def test_automatic_normalises_each_layer():
    model, _, losses_of = setting()
    engine = attach(model, clip_norm=2.0, algorithm="layerwise", clipping="automatic")
    total = engine.backward(losses_of(torch.tensor([3])))
    norms = total.group_norms[0]
    per_layer = 2.0 / len(norms) ** 0.5 * norms / (norms + 0.01)
    torch.testing.assert_close(vector(total.gradients).norm(), per_layer.norm())
    assert isinstance(engine.clipping, Automatic)
    assert engine.clipping.layerwise


def test_without_clipping_layers_add_up_to_the_plain_gradient():
    model, _, losses_of = setting()
    found = oracle(model, losses_of, B)
    plain = {name: torch.stack([g[name] for g in found.gradients]).sum(0) for name in found.gradients[0]}
    engine = attach(model, algorithm="layerwise", clipping=Unclipped(layerwise=True))
    assert_close(engine.backward(losses_of(torch.arange(B))).gradients, plain)


def test_ghost_and_layerwise_do_not_go_together():
    for algorithm, clipping in (("ghost", Flat(1.0, layerwise=True)), ("layerwise", Flat(1.0))):
        with pytest.raises(SottoError, match="SOT600"):
            attach(Model(), algorithm=algorithm, clipping=clipping)  # type: ignore[arg-type]
    assert attach(Model(), clipping=Flat(1.0, layerwise=True)).algorithm == "layerwise"


# ---- thresholds that follow a quantile


@pytest.mark.parametrize("layerwise", [False, True])
def test_adaptive_clips_at_this_steps_threshold(layerwise: bool):
    model, _, losses_of = setting()
    found = oracle(model, losses_of, B)
    clipping = Adaptive(float(found.norms.median()), layerwise)
    engine = attach(model, clipping=clipping)
    count = len(clipping.thresholds)
    assert count == (5 if layerwise else 1)
    assert clipping.sensitivity == pytest.approx(float(found.norms.median()))
    clipping.follow(torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    total = engine.backward(losses_of(torch.arange(B)))
    assert total.sensitivity == pytest.approx(math.hypot(*clipping.thresholds))
    if layerwise:
        assert_close(total.gradients, expected_sum(found.gradients, clipping.thresholds))
    else:
        factors = [min(1.0, clipping.thresholds[0] / float(n)) for n in found.norms]
        flat = {n: sum(f * g[n] for f, g in zip(factors, found.gradients, strict=True)) for n in found.gradients[0]}
        assert_close(total.gradients, flat)
    before = clipping.sensitivity
    clipping.follow(torch.ones(count))  # nobody was clipped: the threshold may come down
    assert clipping.sensitivity < before
    with pytest.raises(ValueError, match="same engine"):
        total += engine.zeros()


def test_the_count_of_unclipped_units_moves_by_one_half():
    clipping = Adaptive(1.0, thresholds=[1.0, 2.0])
    norms = torch.tensor([[0.5, 0.5], [1.5, 1.5], [3.0, 3.0], [torch.nan, torch.inf]], dtype=torch.float64)
    assert clipping.count_unclipped(norms).tolist() == [-1.0, 0.0]
    assert clipping.count_unclipped(norms[:0]).tolist() == [0.0, 0.0]
    for row in range(len(norms)):
        rest = torch.cat([norms[:row], norms[row + 1 :]])
        moved = clipping.count_unclipped(norms) - clipping.count_unclipped(rest)
        assert moved.abs().tolist() == [0.5, 0.5]


def test_the_threshold_finds_the_quantile():
    """Geometric updates (Andrew et al., equation 3): up when too many are clipped, and it settles at the quantile."""
    norms = torch.exp(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for start in (0.01, 100.0):
        clipping = Adaptive(start, quantile=0.3, thresholds=[start])
        for _ in range(200):
            clipping.follow(clipping.count_unclipped(norms) / len(norms) + 0.5)
        assert clipping.thresholds[0] == pytest.approx(float(norms.quantile(0.3)), rel=0.02)
