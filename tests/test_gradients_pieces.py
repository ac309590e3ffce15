"""Forms of per-unit gradients: when each is taken, what is kept of it, and what is not copied or added in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_oracle import FAST, UNEVEN, check
from torch import nn

from sotto.errors import SottoError
from sotto.gradients import passes, pieces
from sotto.gradients.engine import Engine, attach
from sotto.gradients.pieces import Factored, Indexed, Instantiated
from sotto.gradients.rows import Rows

B, T, D = 4, 7, 6


def factored(length: int, d: int, p: int, dtype: torch.dtype = torch.float64, transposed: bool = False) -> Factored:
    generator = torch.Generator().manual_seed(length)
    a, g = (torch.randn(B, length, n, generator=generator, dtype=torch.float64).to(dtype) for n in (d, p))
    return Factored(a, g, transposed)


@pytest.mark.parametrize(
    ("length", "d", "p", "kept", "dropped"),
    [
        (128, 768, 768, False, False),  # a norm of 128 tokens costs less than moving 768 x 768 numbers
        (512, 768, 3072, True, False),  # kept: the product would be needed anyway
        (512, 768, 768, True, True),
        (128, 768, 8, True, True),  # a LoRA factor
        (4, 768, 8, False, False),
        (512, 768, 50257, True, False),  # an output layer
        (1, 8, 8, False, False),
    ],
    ids=str,
)
def test_which_form_is_cheaper(length: int, d: int, p: int, kept: bool, dropped: bool):
    rows = Rows.build(B, None, torch.device("cpu"))
    piece = Factored(torch.empty(B, length, d, device="meta"), torch.empty(B, length, p, device="meta"), False)
    assert piece.instantiation_is_cheaper(rows, keep=True) is kept
    assert piece.instantiation_is_cheaper(rows, keep=False) is dropped


def test_units_of_several_rows_are_longer():
    alone, together = (Rows.build(B, units, torch.device("cpu")) for units in (None, torch.zeros(B, dtype=torch.long)))
    piece = factored(10, 10, 10)
    assert not piece.instantiation_is_cheaper(alone, keep=True)
    assert piece.instantiation_is_cheaper(together, keep=True)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("units", [None, UNEVEN[:B]], ids=["alone", "groups"])
def test_ghost_norms_in_blocks(block: int, units: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch):
    rows, piece = Rows.build(B, units, torch.device("cpu")), factored(7, 5, 3)
    expected = piece.instantiate(rows).square().sum((1, 2))
    monkeypatch.setattr(pieces, "BLOCK", block)
    torch.testing.assert_close(piece.squared_norms(rows), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_norms_of_instantiated_gradients(size: int):
    rows, grad = Rows.build(2, None, torch.device("cpu")), torch.randn(2, size, dtype=torch.float64)
    torch.testing.assert_close(Instantiated(grad).squared_norms(rows), grad.square().sum(1), rtol=1e-13, atol=0)


def test_a_norm_of_many_equal_numbers_keeps_its_digits_in_float32():
    """One running sum in float32 would lose them: after 2^24 ones, another one changes nothing."""
    rows, grad = Rows.build(1, None, torch.device("cpu")), torch.ones(1, (1 << 24) + 12_345)
    assert float(Instantiated(grad).squared_norms(rows)) == pytest.approx(grad.shape[1], rel=1e-6)


def test_what_others_hold_is_not_added_to():
    rows = Rows.build(B, None, torch.device("cpu"))
    held = torch.randn(B, 3, 5, dtype=torch.float64)
    before = held.clone()
    embedding = Indexed(torch.zeros(B, 2, dtype=torch.long), torch.ones(B, 2, 5, dtype=torch.float64), 3, None)
    (combined,) = pieces.combine([Instantiated(held), embedding], rows, keep=True)
    assert torch.equal(held, before)
    assert isinstance(combined, Instantiated)
    assert float((combined.grad_U - before).sum()) == B * 2 * 5


def test_what_is_ours_is_added_to_in_place():
    rows, piece = Rows.build(B, None, torch.device("cpu")), factored(7, 5, 3)
    ours = Instantiated(piece.instantiate(rows), ours=True)
    (combined,) = pieces.combine([ours, factored(4, 5, 3)], rows, keep=True)
    assert isinstance(combined, Instantiated)
    assert combined.grad_U.data_ptr() == ours.grad_U.data_ptr()
    torch.testing.assert_close(combined.grad_U, piece.instantiate(rows) + factored(4, 5, 3).instantiate(rows))


class TwoNames(nn.Module):
    """Autograd gives the gradient of `a + b` to both as one tensor, and that of `c` as an expanded view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3))
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * 2 + (self.a + self.b)).sum(1) + self.c.sum()


@pytest.mark.parametrize("algorithm", FAST)
def test_no_two_sums_share_memory(algorithm: Any):
    model, x = TwoNames(), torch.randn(B, 3, dtype=torch.float64)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm)
    total = attach(model, clip_norm=1e9, algorithm=algorithm).backward(model(x))
    before = {name: g.clone() for name, g in total.gradients.items()}
    for g in total.gradients.values():
        g += 1  # as noise is added
    for name, g in total.gradients.items():
        assert torch.equal(g, before[name] + 1), name


class Branched(nn.Module):
    """A layer that always runs, but whose output only some batches use, like an encoder's pooler."""

    def __init__(self, coupled: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rarely, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.coupled = coupled

    def forward(self, x: torch.Tensor, rarely: bool = False) -> torch.Tensor:
        h = torch.tanh(self.always(x))
        pooled = torch.tanh(self.rarely(h))
        if rarely:
            h = pooled - 0.5 * pooled.mean(0) if self.coupled else pooled
        return self.head(h).sum((1, 2))


def passes_made(engine: Engine, losses: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(phase, whether the graph was kept) of each backward pass of one step."""
    made: list[tuple[str, bool]] = []
    right = passes._gradients

    def noted(losses: Any, parameters: Any, weight_B: Any, retain: bool) -> Any:
        made.append((engine.state.phase.name, retain))
        return right(losses, parameters, weight_B, retain)

    with monkeypatch.context() as m:
        m.setattr(passes, "_gradients", noted)
        engine.backward(losses)
    return made


@pytest.mark.parametrize("num_rows", [1, B])
def test_the_recording_pass_frees_the_graph_on_the_first_step_too(num_rows: int, monkeypatch: pytest.MonkeyPatch):
    model, x = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 1)), torch.randn(num_rows, T, D)
    engine = attach(model)
    made = [passes_made(engine, model(x).sin().sum((1, 2)), monkeypatch) for _ in range(3)]
    assert made[0] == [("PROBE", True), ("PROBE", True), ("RECORD", False)]
    assert made[1] == made[2] == [("RECORD", False)]


def test_a_first_batch_of_one_row_confirms_nothing(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
    engine = attach(model)
    for _ in range(2):
        engine.backward(model(torch.randn(1, D)).flatten())
    assert not any(site.confirmed for site in engine.sites.values())
    assert passes_made(engine, model(torch.randn(B, D)).flatten(), monkeypatch)[0][0] == "PROBE"
    assert all(site.confirmed for site in engine.sites.values())


@pytest.mark.parametrize("coupled", [False, True])
def test_a_layer_that_is_first_reached_late_is_compared_before_anything_is_released(coupled: bool):
    model, x = Branched(coupled).double(), torch.randn(B, T, D, dtype=torch.float64)
    engine = attach(model, clip_norm=1e9)
    for _ in range(5):
        engine.backward(model(x))
    with pytest.raises(SottoError, match="SOT609"):
        engine.backward(model(x, rarely=True))
    if coupled:
        with pytest.raises(SottoError, match="SOT601"):
            engine.backward(model(x, rarely=True))
        return
    total = engine.backward(model(x, rarely=True))
    wanted = torch.autograd.grad(model(x, rarely=True).sum(), list(model.parameters()))
    for found, grad in zip(total.gradients.values(), wanted, strict=True):
        torch.testing.assert_close(found, grad)
    assert engine.sites["rarely"].confirmed
