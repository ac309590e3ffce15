"""Updates from released numbers, against plain optimizers on the gradient that they stand for; replay of the log."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sotto.config import RunSection
from sotto.errors import SottoError
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import LAWS, Law
from sotto.zeroth_order.presets import PRESETS, Preset, stage_lengths
from sotto.zeroth_order.release import NAME
from sotto.zeroth_order.updates import Updates

KEY, STEPS, K = "0a" * 16, 9, 3
RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_ratio": 0.2},
    "average": {"optimizer": "sgd", "ema_decay": 0.9},
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)


def make(
    kind: str, net: nn.Module, key: str = KEY, preset: Preset | None = None, probes: int = K, law: str = "gaussian",
    **more: Any,
) -> Updates:  # fmt: skip
    run = RunSection(**{"expected_batch_size": 4, "steps": STEPS, "learning_rate": 0.05, **RUNS[kind], **more})
    shapes = {name: p.shape for name, p in net.named_parameters()}
    return Updates(dict(net.named_parameters()), Directions(key, shapes, probes, Law(law)), run, STEPS, preset)


def test_how_a_weight_lies_in_memory_changes_nothing():
    plain, turned = model(), model()
    turned[0].weight = nn.Parameter(turned[0].weight.detach().t().contiguous().t())
    assert not turned[0].weight.is_contiguous()
    for net in (plain, turned):
        make("adamw", net).step({NAME: numbers()[0]}, 0)
    assert torch.equal(weights(plain), weights(turned))


def test_centred_numbers_lose_their_mean_and_are_worth_one_direction_less():
    net = model(torch.float64)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    run = RunSection(expected_batch_size=4, steps=1, learning_rate=1.0, optimizer="sgd", schedule="constant")
    directions = Directions(KEY, shapes, K, Law("gaussian"), centred=True)
    before, g_K = weights(net).clone(), numbers()[0]
    Updates(dict(net.named_parameters()), directions, run, 1).step({NAME: g_K + 7.0}, 0)
    g_K = (g_K + 7.0).float().double()
    u_Kd = torch.stack([torch.cat([directions.tensor(n, 0, k).flatten() for n in shapes]) for k in range(K)]).double()
    expected_d = (g_K - g_K.mean()) @ u_Kd / math.sqrt(K - 1)
    torch.testing.assert_close(before - weights(net), expected_d, rtol=1e-6, atol=1e-6)


def test_centred_numbers_stand_for_the_gradient():
    """Numbers of a known gradient, over many steps: their updates average to it, and noise on them keeps its size."""
    net = nn.Linear(4, 2, bias=False).double()
    directions = Directions(KEY, {"weight": net.weight.shape}, K, Law("rademacher"), centred=True)
    gradient, steps = torch.arange(8.0).view(2, 4).double() - 3, 3000
    run = RunSection(expected_batch_size=4, steps=steps, learning_rate=1.0, optimizer="sgd", schedule="constant")
    updates, noise = Updates(dict(net.named_parameters()), directions, run, steps), torch.Generator().manual_seed(1)
    moves, noises = [], []
    for step in range(steps):
        u_K24 = torch.stack([directions.tensor("weight", step, k).double() for k in range(K)])
        slopes_K = (u_K24 * gradient).sum((1, 2))
        before = net.weight.detach().clone()
        updates.step({NAME: (slopes_K - slopes_K.mean()) / math.sqrt(K - 1)}, step)
        moves.append(before - net.weight.detach())
        g_K = torch.randn(K, generator=noise, dtype=torch.float64)
        noises.append(((g_K - g_K.mean())[:, None, None] * u_K24).sum(0) / math.sqrt(K - 1))
    mean = torch.stack(moves).mean(0)
    # A move's entries have a variance below |g|^2 / (K - 1) each.
    assert float((mean - gradient).abs().max()) < 7 * float(gradient.norm()) / math.sqrt((K - 1) * steps)
    assert float(torch.stack(noises).square().mean()) == pytest.approx(1, abs=7 * math.sqrt(2 / steps))


def numbers(probes: int = K) -> torch.Tensor:
    return torch.randn(STEPS, probes, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def trained(kind: str, net: nn.Module, probes: int = K, **more: Any) -> Updates:
    updates = make(kind, net, probes=probes, **more)
    for step, g_K in enumerate(numbers(probes)):
        updates.step({NAME: g_K}, step)
    return updates


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("probes", [1, K])
@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "average"])
def test_as_the_optimizer_on_the_gradient_that_the_numbers_stand_for(kind, probes):
    from sotto.optim import Optimizer

    net, plain = model(torch.float64), model(torch.float64)
    updates = trained(kind, net, probes)
    optimizer = Optimizer(dict(plain.named_parameters()), updates.run, STEPS)
    for step, g_K in enumerate(numbers(probes)):
        directions = updates.directions
        gradient = {
            name: sum(float(g_K[k].float()) * directions.tensor(name, step, k).double() for k in range(probes))
            / math.sqrt(probes)
            for name in updates.parameters
        }
        optimizer.step(gradient, step)  # type: ignore[arg-type]
    torch.testing.assert_close(weights(net), weights(plain), rtol=1e-9, atol=1e-9)
    assert not torch.equal(weights(net), weights(model(torch.float64)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_one_direction_is_a_multiple_of_it(law, dtype):
    """To the last bit: a product and a sum, which every device rounds alike."""
    net = model(dtype)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    run = RunSection(expected_batch_size=4, steps=2, learning_rate=0.3, optimizer="sgd", schedule="constant")
    updates = Updates(dict(net.named_parameters()), Directions(KEY, shapes, 1, Law(law)), run, 2)
    for step, number in enumerate([0.7, -1.3]):
        g = float(torch.tensor(number))
        expected = {
            name: p.detach() + updates.directions.tensor(name, step, 0).to(dtype) * (-0.3 * g)
            for name, p in updates.parameters.items()
        }
        updates.step({NAME: torch.tensor([number])}, step)
        for name, p in updates.parameters.items():
            assert torch.equal(p, expected[name])


def test_how_a_step_is_rounded_is_part_of_the_fingerprint(monkeypatch):
    plain = make("sgd", model(), probes=1)
    before = plain.start
    assert plain._at_once
    assert not make("sgd", model(), probes=K)._at_once
    assert not any(make(kind, model(), probes=1)._at_once for kind in ("momentum", "adamw"))
    assert not make("sgd", model(), preset=PRESETS["dpzopo"], probes=1)._at_once
    monkeypatch.setattr(Updates, "_at_once", False)
    assert not torch.equal(before, make("sgd", model(), probes=1).start)


@pytest.mark.parametrize("probes", [1, K])
@pytest.mark.parametrize("preset", [None, PRESETS["dpzopo"]], ids=["one stage", "stages"])
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("law", LAWS)
def test_a_replay_of_the_log_has_the_same_bits(law, kind, preset, probes, monkeypatch):
    """In other shards: small tensors together, and each alone in chunks of five."""
    net = model()
    done = trained(kind, net, probes, preset=preset, law=law)
    again = model()
    monkeypatch.setattr("sotto.zeroth_order.updates.CHUNK", 5)
    monkeypatch.setattr("sotto.zeroth_order.updates.groups", lambda *_, **__: [])
    fresh = make(kind, again, preset=preset, probes=probes, law=law)
    assert [len(x.names) for x in done._places] == [len(done.parameters)]
    assert [x.names for x in fresh._places] == [[name] for name in fresh.parameters]
    fresh.restore({}, done.state_tensors())
    assert torch.equal(weights(net), weights(again))
    for name, value in done.final_weights().items():
        assert torch.equal(value, fresh.final_weights()[name])
    assert done.stored_weights() == {}
    assert done.state_tensors()["log"].numel() == STEPS * probes


def test_a_run_goes_on_after_a_replay():
    net, half = model(), model()
    trained("adamw", net)
    first = make("adamw", half)
    for step in range(4):
        first.step({NAME: numbers()[step]}, step)
    other = model()
    second = make("adamw", other)
    second.restore({}, first.state_tensors())
    for step in range(4, STEPS):
        second.step({NAME: numbers()[step]}, step)
    assert torch.equal(weights(net), weights(other))


def test_a_log_on_another_start_is_refused():
    state = trained("sgd", model()).state_tensors()
    changed = model()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    others = [
        lambda: make("sgd", changed).restore({}, state),
        lambda: make("sgd", model(), key="0b" * 16).restore({}, state),
        lambda: make("sgd", model(), learning_rate=0.06).restore({}, state),
        lambda: make("sgd", model(), preset=PRESETS["dpzopo"]).restore({}, state),
        lambda: make("sgd", model()).restore({}, {"log": state["log"][:, :2], "start": state["start"]}),
        lambda: make("sgd", model()).restore({}, {}),
        lambda: make("sgd", model()).restore({"0.weight": torch.zeros(5, 7)}, state),
    ]
    for other in others:
        with pytest.raises(SottoError) as caught:
            other()
        assert caught.value.code == "SOT656"
    make("sgd", model(), microbatch_size=3, memory="1GiB").restore({}, state)  # these change no number


def test_weights_in_half_precision_are_refused():
    with pytest.raises(SottoError) as caught:
        make("sgd", model(torch.bfloat16))
    assert caught.value.code == "SOT605"


@pytest.mark.parametrize(
    ("steps", "stages", "lengths"), [(7, 3, [1, 2, 4]), (10, 3, [1, 2, 7]), (2, 3, [2]), (5, 1, [5])]
)
def test_stages_double(steps, stages, lengths):
    assert stage_lengths(steps, stages) == lengths


def test_each_stage_halves_the_rate_and_pulls_to_where_it_began():
    """SGD by hand, in float64."""
    preset = Preset("gaussian", stages=2, proximal=0.5)
    net, plain = model(torch.float64), model(torch.float64)
    updates = trained("sgd", net, preset=preset, schedule="constant")
    second = stage_lengths(STEPS, 2)[0]
    values = {name: p.detach().clone() for name, p in plain.named_parameters()}
    anchor = dict(values)
    for step, g_K in enumerate(numbers()):
        if step == second:
            anchor = dict(values)
        rate = 0.05 * (1 if step < second else 0.5)
        for name, value in values.items():
            u = [updates.directions.tensor(name, step, k).double() for k in range(K)]
            gradient = sum(float(g_K[k].float()) * u[k] for k in range(K)) / math.sqrt(K)
            values[name] = value - rate * (gradient + 0.5 * (value - anchor[name]))
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), values[name], rtol=1e-12, atol=1e-12)
