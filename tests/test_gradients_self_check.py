"""`verify` accepts right models, and catches rules that somebody broke and examples that influence one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sotto.errors import SottoError
from sotto.gradients import pieces
from sotto.gradients.engine import attach
from sotto.gradients.pieces import Factored, Indexed, Instantiated, Piece
from sotto.gradients.rows import Rows
from sotto.gradients.rules import linear
from sotto.gradients.rules.call import Call
from sotto.gradients.self_check import verify
from sotto.gradients.taps import Book, Site

B, T, D, V = 5, 7, 6, 11
UNITS = torch.tensor([7, 2, 7, 7, 5])


class Model(nn.Module):
    """Tied embedding and head around a linear layer and norms, with a bare gate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear = nn.Embedding(V, D), nn.Linear(D, D)
        self.norm, self.rms, self.head = nn.LayerNorm(D), nn.RMSNorm(D), nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight
        self.gate = nn.Parameter(torch.ones(D))
        self.coupled = False
        self.decay = 0.0
        """What a loss adds for the gate, outside the model's forward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.tanh(self.linear(self.embed(ids))) * self.gate)
        if self.coupled:  # detached: no gradient tells that examples are mixed
            h = h - h.detach().mean(0, keepdim=True) * 0.1
        return self.head(self.rms(h))


@pytest.fixture
def model() -> Model:
    return Model()


def losses_of(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 4, (B, T))

    def losses(rows: torch.Tensor) -> torch.Tensor:
        logits = model(ids[rows])
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[rows][:, 1:], reduction="none").sum(1)
        return losses + model.decay * model.gate.square().sum() if model.decay else losses

    return losses


def check(model: Model, algorithm: Any = "book_keeping", units: torch.Tensor = UNITS) -> float:
    engine = attach(model, clip_norm=3.0, algorithm=algorithm)
    try:
        return verify(engine, losses_of(model), units)
    finally:
        engine.detach()


@pytest.mark.parametrize("algorithm", ["per_example", "ghost", "book_keeping"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    "units", [UNITS, torch.arange(B), torch.zeros(B, dtype=torch.long)], ids=["uneven", "alone", "one"]
)
def test_a_right_model_passes(model: Model, units: torch.Tensor, decay: float, algorithm: str):
    model.decay = decay
    assert check(model, algorithm, units) < 1e-5


def test_a_unit_that_is_not_finite_on_both_sides_passes(model: Model):
    losses = losses_of(model)
    engine = attach(model)
    weight = torch.tensor([1, torch.nan, 1, 1, 1])
    assert verify(engine, lambda rows: losses(rows) * weight[rows], UNITS) < 1e-5


def test_autocast_has_a_wider_tolerance(model: Model):
    losses = losses_of(model)
    engine = attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(engine, losses, UNITS) < 5e-2


def scaled(function: Callable[..., torch.Tensor], by: float) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: function(*args, **kwargs) * by


def norm_off_by_a_tenth(m: pytest.MonkeyPatch) -> None:
    m.setattr(Factored, "squared_norms", scaled(Factored.squared_norms, 1.1**2))
    m.setattr(Instantiated, "squared_norms", scaled(Instantiated.squared_norms, 1.1**2))


def sum_off_by_a_hundredth(m: pytest.MonkeyPatch) -> None:
    m.setattr(Instantiated, "weighted_sum", scaled(Instantiated.weighted_sum, 1.01))


def bias_norm_per_token(m: pytest.MonkeyPatch) -> None:
    """|G|^2 summed over the tokens, instead of the square of the tokens' sum."""
    right = Site.receive

    def receive(self: Site, g: torch.Tensor, found: Callable[[Rows], dict[str, Piece]]) -> bool:
        def wrong(rows: Rows) -> dict[str, Piece]:
            uses = found(rows)
            if "bias" in uses:
                per_token = rows.add_up(g.square().flatten(1).sum(1, keepdim=True))[:, 0]
                uses["bias"].squared_norms = lambda rows: per_token  # type: ignore[method-assign]
            return uses

        return right(self, g, wrong)

    m.setattr(Site, "receive", receive)


def missing_bias(m: pytest.MonkeyPatch) -> None:
    right = Book.add
    m.setattr(Book, "add", lambda self, name, piece: None if "bias" in name else right(self, name, piece))


def swapped_rows(m: pytest.MonkeyPatch) -> None:
    right = linear.Factored

    def wrong(a: torch.Tensor, g: torch.Tensor, transposed: bool) -> Factored:
        return right(a.roll(1, 0), g, transposed)

    m.setattr(linear, "Factored", wrong)


def ghost_norms_only(m: pytest.MonkeyPatch) -> None:
    m.setattr(Factored, "instantiation_is_cheaper", lambda self, rows, keep: False)


def repeats_ignored(m: pytest.MonkeyPatch) -> None:
    ghost_norms_only(m)
    m.setattr(Indexed, "squared_norms", lambda self, rows: rows.add_up(self.g_BTd.square().sum((1, 2))[:, None])[:, 0])


def tied_cross_term_dropped(m: pytest.MonkeyPatch) -> None:
    ghost_norms_only(m)
    m.setattr(pieces, "_tied_inner_product", lambda e, h, rows: torch.zeros(rows.num_units))


def slow_parameters_forgotten(m: pytest.MonkeyPatch) -> None:
    m.setattr("sotto.gradients.passes._add_slow_norms", lambda *args: None)


def a_parameter_never_summed(m: pytest.MonkeyPatch) -> None:
    m.setattr("sotto.gradients.passes.add_slow", lambda *args: None)


def rerun_parameters_forgotten(m: pytest.MonkeyPatch) -> None:
    m.setattr(Call, "pieces", lambda self, rows: {})


def rerun_off_by_a_tenth(m: pytest.MonkeyPatch) -> None:
    right = Call.recorded
    m.setattr(Call, "recorded", lambda *args: {name: 1.1 * grad for name, grad in right(*args).items()})


BREAKS = (
    norm_off_by_a_tenth, sum_off_by_a_hundredth, bias_norm_per_token, missing_bias, swapped_rows, repeats_ignored,
    tied_cross_term_dropped, rerun_parameters_forgotten, rerun_off_by_a_tenth,
    slow_parameters_forgotten, a_parameter_never_summed,
)  # fmt: skip


@pytest.mark.parametrize("plant", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_rule_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], model: Model, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch)
    model.decay = 0.3 if plant in (slow_parameters_forgotten, a_parameter_never_summed) else 0.0
    with pytest.raises(SottoError) as caught:
        check(model)
    assert caught.value.code == "SOT610"
    assert all((caught.value.what, caught.value.where, caught.value.why, caught.value.fix))


@pytest.mark.parametrize("units", [UNITS, torch.zeros(B, dtype=torch.long)], ids=["uneven", "one"])
def test_ignored_units_are_caught(units: torch.Tensor, model: Model):
    engine = attach(model, clip_norm=3.0)
    right = engine.backward
    engine.backward = lambda losses, units=None: right(losses)  # type: ignore[method-assign]
    with pytest.raises(SottoError, match="SOT610"):
        verify(engine, losses_of(model), units)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["embed.weight", "gate"])
def test_a_sum_that_is_not_finite_is_caught(name: str, value: float, model: Model):
    engine = attach(model, clip_norm=3.0)
    right = engine.backward

    def wrong(losses: torch.Tensor, units: torch.Tensor | None = None) -> Any:
        total = right(losses, units)
        total.gradients[name][0] = value
        return total

    engine.backward = wrong  # type: ignore[method-assign]
    with pytest.raises(SottoError, match="SOT610"):
        verify(engine, losses_of(model), UNITS)


@pytest.mark.parametrize("algorithm", ["per_example", "ghost", "book_keeping"])
def test_examples_coupled_through_forward_values_alone_are_caught(model: Model, algorithm: str):
    model.coupled = True
    with pytest.raises(SottoError, match="SOT610"):
        check(model, algorithm)
