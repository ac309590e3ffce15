"""What the engine refuses: each with the four parts of a SottoError, and before any gradient is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import FAST
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.clipping import Flat
from sotto.gradients.engine import attach

B, T, D = 5, 7, 6


def refused(code: str, call: Callable[[], Any]) -> SottoError:
    with pytest.raises(SottoError) as caught:
        call()
    error = caught.value
    assert error.code == code
    assert all((error.what, error.where, error.why, error.fix))
    return error


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), *layers, nn.Linear(D, 2))


@pytest.mark.parametrize("algorithm", ["per_example", *FAST])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm(layer: Any, algorithm: Any):
    model = net(layer(D))
    error = refused("SOT603", lambda: attach(model, algorithm=algorithm))
    assert "'1'" in error.where
    assert all("forward" not in m.__dict__ for m in model.modules())


class OverTheBatch(nn.Module):
    """Batch normalisation by hand."""

    def __init__(self, affine: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-3).sqrt()
        return y if self.weight is None else y * self.weight


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(B, D), (B, T, D), (B, B, D)], ids=str)
def test_a_model_that_normalises_over_the_batch(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype, algorithm: Any
):
    model = net(OverTheBatch(affine)).to(dtype)
    engine = attach(model, algorithm=algorithm)
    x = torch.randn(shape, dtype=dtype)
    refused("SOT601", lambda: engine.backward(model(x).sin().flatten(1).sum(1)))
    refused("SOT601", lambda: engine.backward(model(x).sin().flatten(1).sum(1)))  # and not only once


COUPLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda y: F.mse_loss(y, torch.ones_like(y)).expand(B),
    "contrastive": lambda y: F.cross_entropy(y.flatten(1) @ y.flatten(1).T, torch.arange(B), reduction="none"),
    "weak": lambda y: y.square().flatten(1).sum(1) + 1e-2 * y.mean().square(),
    "shifted": lambda y: y.roll(1, 0).square().flatten(1).sum(1),
}


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [(name, torch.float32) for name in COUPLED] + [(name, torch.bfloat16) for name in COUPLED if name != "weak"],
    ids=str,
)
def test_losses_that_couple_examples(loss: str, dtype: torch.dtype, algorithm: Any):
    model = net(nn.Tanh())
    engine = attach(model, algorithm=algorithm)
    x = torch.randn(B, T, D)

    def losses() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return COUPLED[loss](model(x).float())

    refused("SOT601", lambda: engine.backward(losses()))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_mix_examples(options: dict[str, Any]):
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(9, D, **options))
    refused("SOT602", lambda: attach(model))
    assert all("forward" not in m.__dict__ for m in model.modules()), "a refusal leaves the model as it was"
    model[1].requires_grad_(False)
    attach(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_parameters(dtype: torch.dtype):
    model = net()
    model[1].to(dtype)
    assert "1.weight" in refused("SOT605", lambda: attach(model)).where
    model[1].requires_grad_(False)
    attach(model)


def test_nothing_trainable():
    refused("SOT604", lambda: attach(net().requires_grad_(False)))


LOSSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mean": lambda y: y.mean(),
    "per_token": lambda y: y.sum(-1),
    "no_graph": lambda y: y.detach().flatten(1).sum(1),
    "empty": lambda y: y.flatten(1).sum(1)[:0],
    "number": lambda y: float(y.detach().sum()),
    "list": lambda y: [y.sum()],
}


@pytest.mark.parametrize("algorithm", ["per_example", *FAST])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_wrong_kind(name: str, algorithm: Any):
    model = net()
    engine = attach(model, algorithm=algorithm)
    refused("SOT607", lambda: engine.backward(LOSSES[name](model(torch.randn(B, T, D)))))


@pytest.mark.parametrize(
    "units",
    [torch.arange(B - 1), torch.arange(B)[None], torch.arange(B).double(), torch.ones(B).bool(), list(range(B)), 3],
    ids=["short", "two_dimensions", "float", "bool", "list", "number"],
)
def test_units_of_the_wrong_kind(units: Any):
    model = net()
    engine = attach(model)
    refused("SOT608", lambda: engine.backward(model(torch.randn(B, D)).sum(1), units))


@pytest.mark.parametrize("clip_norm", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1", None], ids=repr)
def test_clip_norms_that_bound_nothing(clip_norm: Any):
    refused("SOT600", lambda: attach(net(), clip_norm=clip_norm))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")], ids=repr)
def test_a_clipping_object_that_bounds_nothing(clip_norm: float):
    refused("SOT600", lambda: attach(net(), clipping=Flat(clip_norm)))


def test_unknown_names_come_with_a_suggestion():
    algorithm: Any = "book_keping"
    assert "'book_keeping'" in refused("SOT600", lambda: attach(net(), algorithm=algorithm)).what
    clipping: Any = "automatc"
    assert "'automatic'" in refused("SOT600", lambda: attach(net(), clipping=clipping)).what


def test_a_detached_engine():
    model = net()
    engine = attach(model)
    engine.detach()
    refused("SOT606", lambda: engine.backward(model(torch.randn(B, D)).sum(1)))


def test_two_engines_on_one_model():
    model = net()
    engine = attach(model)
    refused("SOT600", lambda: attach(model))
    engine.detach()
    attach(model).detach()
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_an_engine_goes_on_after_a_refusal():
    """What a refused batch left behind (pieces, references) must not reach the next."""
    model, x = net(), torch.randn(B, T, D)
    fresh = attach(model).backward(model(x).sin().sum((1, 2)))
    for module in model.modules():
        module.__dict__.pop("forward", None)
    engine = attach(model)
    refused("SOT601", lambda: engine.backward(model(x).sin().mean().expand(B)))
    for _ in range(2):
        assert torch.equal(engine.backward(model(x).sin().sum((1, 2))).norms, fresh.norms)
