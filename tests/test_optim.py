"""Optimizers, schedules and the moving average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sotto.config import RunSection
from sotto.optim import Optimizer, learning_rate


def section(**values: Any) -> RunSection:
    return RunSection.model_validate({"expected_batch_size": 1, "steps": 10, "learning_rate": 0.1, **values})


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.arange(6.0).view(2, 3)), "b": nn.Parameter(torch.ones(2))}


def updates(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.randn(2, 3, generator=generator), "b": torch.randn(2, generator=generator)}


def train(run: RunSection, steps: int, resume_at: int | None = None) -> tuple[dict[str, torch.Tensor], Optimizer]:
    values = parameters()
    optimizer = Optimizer(values, run, 10)
    for step in range(steps):
        if step == resume_at:
            stored = {name: value.clone() for name, value in optimizer.state_tensors().items()}
            weights = {name: value.detach().clone() for name, value in optimizer.stored_weights().items()}
            values = parameters()
            optimizer = Optimizer(values, run, 10)
            optimizer.restore(weights, stored)
        optimizer.step(updates(step), step)
    return {name: value.detach() for name, value in values.items()}, optimizer


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
def test_learning_rates(schedule: str, warmup: float) -> None:
    run = section(schedule=schedule, warmup_ratio=warmup)
    rates = [learning_rate(run, step, 10) for step in range(10)]
    assert all(0 < rate < 0.1 + 1e-9 for rate in rates), "no step is wasted on a rate of zero"
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(0.1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak == max(0, math.ceil(warmup * 10) - 1)


def test_known_values() -> None:
    assert learning_rate(section(), 5, 10) == pytest.approx(0.05)
    assert learning_rate(section(schedule="cosine"), 5, 10) == pytest.approx(0.05)
    assert learning_rate(section(schedule="constant"), 9, 10) == pytest.approx(0.1)
    assert learning_rate(section(warmup_ratio=0.5), 0, 10) == pytest.approx(0.02)


def test_sgd_is_sgd() -> None:
    values, _ = train(section(optimizer="sgd", schedule="constant"), 3)
    expected = parameters()
    for name, value in expected.items():
        assert torch.allclose(values[name], value - 0.1 * sum(updates(step)[name] for step in range(3)))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_steps_are_torchs_own(optimizer: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
    values = list(parameters().values())
    inner = torch.optim.AdamW(values, **options) if optimizer == "adamw" else torch.optim.SGD(values, **options)
    for step in range(4):
        for value, update in zip(values, updates(step).values(), strict=True):
            value.grad = update
        inner.step()
    found, _ = train(section(optimizer=optimizer, schedule="constant", weight_decay=0.01), 4)
    for have, want in zip(found.values(), values, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {"ema_decay": 0.9, "weight_decay": 0.1}],
)
@pytest.mark.parametrize("resume_at", [0, 1, 4])
def test_state_survives_bit_for_bit(changes: dict[str, Any], resume_at: int) -> None:
    run = section(**changes)
    (whole, first), (resumed, second) = train(run, 6), train(run, 6, resume_at)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
        assert torch.equal(first.final_weights()[name], second.final_weights()[name])
    assert first.state_tensors().keys() == second.state_tensors().keys()


def test_the_moving_average_forgets_its_start() -> None:
    _, optimizer = train(section(ema_decay=0.999, optimizer="sgd", schedule="constant"), 10)
    last, average = optimizer.parameters["a"].detach(), optimizer.final_weights()["a"]
    start = parameters()["a"].detach()
    assert 0 < float((average - last).norm()) < float((start - last).norm())
    values, plain = train(section(), 2)
    assert torch.equal(plain.final_weights()["a"], values["a"])


def test_updates_in_another_precision_are_taken() -> None:
    values = parameters()
    Optimizer(values, section(), 10).step({name: u.double() for name, u in updates(0).items()}, 0)
    assert all(value.dtype == torch.float32 and value.grad is None for value in values.values())


def test_a_missing_update_is_an_error() -> None:
    with pytest.raises(KeyError):
        Optimizer(parameters(), section(), 10).step({"a": torch.zeros(2, 3)}, 0)
