"""Modules that are run again, one unit at a time: exact, found where they fit, and left alone where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_oracle import differences, oracle
from torch import nn

from sotto.errors import SottoError
from sotto.gradients.clipping import Flat
from sotto.gradients.engine import Engine, attach

B, T, D = 4, 6, 5
UNITS = torch.tensor([3, 1, 3, 8])
FAST = ("ghost", "book_keeping")
STEPS = 6  # enough for every parameter to find its place


class Mixer(nn.Module):
    """Bare parameters and a child, so that no other rule fits. Sums over the tokens seen so far."""

    def __init__(self):
        super().__init__()
        self.decay, self.inner = nn.Parameter(torch.rand(D)), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x) * torch.sigmoid(self.decay)).cumsum(1) + x * self.decay


class Around(nn.Module):
    """The module under test between two layers that have rules."""

    def __init__(self, *middle: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(D, D), nn.ModuleList(middle), nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for module in self.middle:
            x = x + module(x)
        return self.last(x).sin().sum((1, 2))


def inputs(rows: int = B, tokens: int = T) -> torch.Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(1)).double()


def settled(model: nn.Module, algorithm: str = "book_keeping", tokens: int = T, units: Any = UNITS) -> Engine:
    """Steps until every parameter has found its place, each of them exact."""
    x = inputs(B, tokens)
    losses = lambda rows: model(x[rows])  # noqa: E731
    expected = oracle(model, losses, B, units)
    engine = attach(model, clip_norm=expected.clip_norm, algorithm=algorithm)  # type: ignore[arg-type]
    for _ in range(STEPS):
        assert max(differences(engine.backward(losses(torch.arange(B)), units), expected)) < 1e-10
    return engine


def places(engine: Engine) -> dict[str, str]:
    """Module -> the module that is run again for its parameters, or `slow`."""
    return {
        r.path: "slow" if r.slow else r.reason.split("'")[1] for r in engine.report() if r.slow or r.rule == "rerun"
    }


@pytest.mark.parametrize("units", [None, UNITS], ids=["alone", "units"])
@pytest.mark.parametrize("algorithm", FAST)
def test_the_module_itself_is_enough(algorithm: str, units: Any):
    engine = settled(Around(Mixer()).double(), algorithm, units=units)
    assert places(engine) == {"middle.0": "middle.0"}


@pytest.mark.parametrize("algorithm", FAST)
def test_a_module_that_is_used_twice(algorithm: str):
    mixer = Mixer()
    engine = settled(Around(mixer, mixer).double(), algorithm)
    assert places(engine) == {"middle.0": "middle.0"}


def test_layers_that_are_clipped_on_their_own():
    model, x = Around(Mixer(), Mixer()).double(), inputs()
    found = {}
    for algorithm in ("per_example", "layerwise"):
        engine = attach(model, algorithm=algorithm, clipping=Flat(0.5, layerwise=True))  # type: ignore[arg-type]
        for _ in range(3):
            found[algorithm] = engine.backward(model(x), UNITS)
        engine.detach()
    for name, value in found["per_example"].gradients.items():
        torch.testing.assert_close(found["layerwise"].gradients[name], value)
    torch.testing.assert_close(found["layerwise"].group_norms, found["per_example"].group_norms)


class Table(nn.Module):
    """A table of relative positions, looked up once for the whole batch: its rows are positions, not examples."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2 * T, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        return torch.tanh(x[:, :, None] * self.table(at[:, None] - at[None] + T)).sum(2)


@pytest.mark.parametrize("tokens", [T, B], ids=["long", "square"])
@pytest.mark.parametrize("algorithm", FAST)
def test_the_module_around_is_taken_where_the_module_has_no_rows(algorithm: str, tokens: int):
    engine = settled(Around(Table()).double(), algorithm, tokens)
    assert places(engine) == {"middle.0.table": "middle.0"}


class Experts(nn.Module):
    """Fused experts that see the tokens of all examples in one long row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D, D) / D**0.5)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,ndp->np", x, self.weight[chosen])


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        return self.experts(flat, flat[:, :3].argmax(1)).view(x.shape)


def test_tokens_of_all_examples_in_one_row():
    engine = settled(Around(Routed()).double())
    assert places(engine) == {"middle.0.experts": "middle.0.experts"}


class Biased(nn.Module):
    """Given a table that is as long as the batch, of zeros, so that a row of it is as good as all."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(D)), nn.Identity()
        self.register_buffer("table", torch.zeros(B))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + (x[:, :, :B] + table).sum(-1, keepdim=True) * self.scale


class GivesTable(nn.Module):
    def __init__(self, copied: bool):
        super().__init__()
        self.biased, self.copied = Biased(), copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.biased(x, self.biased.table + 0 if self.copied else self.biased.table)


@pytest.mark.parametrize("copied", [False, True])
def test_a_tensor_that_only_happens_to_be_as_long_as_the_batch(copied: bool):
    """Units of two rows would get two entries of a table of four."""
    engine = settled(Around(GivesTable(copied)).double())
    assert places(engine) == {"middle.0.biased": "middle.0" if copied else "middle.0.biased"}


class Aside(nn.Module):
    """What it leaves behind has an effect that its output does not show."""

    left: torch.Tensor

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(D)), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left = self.scale * x
        return self.inner(x) * self.scale.square()


class UsesWhatWasLeft(nn.Module):
    def __init__(self):
        super().__init__()
        self.aside = Aside()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.aside(x) + self.aside.left.cos()


def test_effects_beyond_the_output_are_found():
    engine = settled(Around(UsesWhatWasLeft()).double())
    assert places(engine) == {"middle.0.aside": "middle.0"}


class Writes(nn.Module):
    """Writes into its input: to run it twice would spoil the batch."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(D)), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return self.inner(x) * self.scale


class Copies(nn.Module):
    def __init__(self):
        super().__init__()
        self.writes = Writes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.writes(x * 1)


def test_a_module_that_writes_into_its_input():
    engine = settled(Around(Copies()).double())
    assert places(engine) == {"middle.0.writes": "middle.0"}


def test_random_modules_are_not_run_again():
    """Dropout gives something else each time, so the parameters stay on the slow path, and no step fails."""
    model = Around(nn.Sequential(nn.Dropout(0.5), Mixer(), nn.Dropout(0.5)), WithDropout())
    x, engine = inputs().float(), attach(model)
    for _ in range(2 * STEPS):
        assert bool(torch.isfinite(engine.backward(model(x), UNITS).norms).all())
    assert places(engine) == {"middle.0.1": "middle.0.1", "middle.1": "slow"}


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(D)), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) * self.scale


def test_trying_leaves_the_random_numbers_alone():
    drawn = []
    for algorithm in ("per_example", "book_keeping"):
        model, x = Around(WithDropout()), inputs().float()
        engine = attach(model, algorithm=algorithm)  # type: ignore[arg-type]
        torch.manual_seed(5)
        for _ in range(3):
            engine.backward(model(x))
        drawn.append(torch.rand(1))
    assert torch.equal(drawn[0], drawn[1])


class Moody(Mixer):
    """Changes its ways when it is told to."""

    batch_matters = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out * len(x) if self.batch_matters else out


@pytest.mark.parametrize("algorithm", FAST)
def test_a_module_that_starts_to_look_at_the_batch(algorithm: str):
    """Examples that influence one another do not get through, also not after the first batch."""
    moody = Moody()
    model = Around(moody).double()
    engine = settled(model, algorithm)
    moody.batch_matters = True
    with pytest.raises(SottoError, match="SOT612") as caught:
        engine.backward(model(inputs()), UNITS)
    assert "middle.0" in caught.value.where


def test_batches_of_other_sizes():
    model = Around(Mixer(), Table()).double()
    batches = [inputs(rows, tokens) for rows, tokens in ((1, 3), (6, 2), (3, 3), (B, T))]
    norms = [oracle(model, lambda rows, x=x: model(x[rows]), len(x)).norms for x in batches]
    engine = settled(model)
    for x, expected in zip(batches, norms, strict=True):
        torch.testing.assert_close(engine.backward(model(x)).norms, expected)


def test_nothing_is_left_behind():
    model = Around(Mixer(), Table(), WithDropout(), Copies()).double().eval()
    before = {path: (dict(m.__dict__), dict(m._parameters)) for path, m in model.named_modules()}
    engine = settled(model)
    engine.detach()
    for path, module in model.named_modules():
        inside, parameters = before[path]
        assert "forward" not in module.__dict__
        assert module.__dict__.keys() == inside.keys()
        assert all(module._parameters[role] is p for role, p in parameters.items())


def test_a_step_runs_the_module_once_more_for_each_unit():
    calls: list[int] = []
    counted = Mixer()
    right: Callable[..., Any] = counted.inner.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return right(x)

    model = Around(counted).double()
    model.requires_grad_(False)
    counted.decay.requires_grad_(True)
    counted.inner.forward = forward  # type: ignore[method-assign]
    engine = settled(model, units=None)
    calls.clear()
    engine.backward(model(inputs()))
    assert calls == [B] + [1] * B, "the gradients of so few numbers are kept for the sum"
