"""A sketch tells rows apart about as well as the rows themselves would, whatever they look like."""

from __future__ import annotations

import pytest
import torch

from sotto.gradients.sketch import Sketch

B = 6
WEIGHTS = torch.exp2(torch.tensor([0.0, 3.0, -2.0, 1.0, -4.0, 2.0]))
SHAPES = [(B, 5), (B, 4, 5), (B, 2, 3, 50), (B, 1, 1), (B, B, 3)]


def rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times(x: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    return x * weight_B.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_times_their_weights_follow(shape: tuple[int, ...], dtype: torch.dtype):
    x = rows(shape, 0, dtype)
    assert Sketch.of(x).follows(times(x, WEIGHTS), WEIGHTS)
    assert not Sketch.of(x).follows(times(x, WEIGHTS.flip(0)), WEIGHTS)


def differences(shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Changes of one row, each of norm 1, from spread out to a few equal numbers that could cancel."""
    spread, single, pair = rows(shape, seed + 100)[0], torch.zeros(shape[1:]), torch.zeros(shape[1:])
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(single.numel(), generator=generator)[:2]
    single.view(-1)[at[0]] = 1
    pair.view(-1)[at] = 2**-0.5
    constant = torch.full(shape[1:], single.numel() ** -0.5)
    return {"spread": spread / spread.norm(), "single": single, "pair": pair, "constant": constant}


@pytest.mark.parametrize("shape", [(B, 5), (B, 4, 5), (B, 2, 3, 50)], ids=str)
@pytest.mark.parametrize("kind", ["spread", "single", "pair", "constant"])
def test_a_change_of_a_thousandth_is_always_seen(kind: str, shape: tuple[int, ...]):
    """The tolerance is twice a ten-thousandth: a comparison of all numbers sees 2e-4, a sketch surely sees 1e-3."""
    for seed in range(50):
        x = rows(shape, seed)
        x = x / x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        y = times(x, WEIGHTS)
        y[seed % B] += 1e-3 * WEIGHTS[seed % B] * differences(shape, seed)[kind]
        assert not Sketch.of(x).follows(y, WEIGHTS), seed


def test_a_change_below_the_tolerance_is_rounding():
    x = rows((B, 4, 50), 0)
    assert Sketch.of(x).follows(times(x + 1e-7 * rows((B, 4, 50), 1), WEIGHTS), WEIGHTS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_say_nothing_about_the_others(bad: float):
    x = rows((B, 4, 5), 0)
    x[2, 1, 1] = bad
    sketch = Sketch.of(x)
    assert sketch.rows_with_gradient == B - 1
    assert sketch.follows(times(x, WEIGHTS), WEIGHTS)
    wrong = times(x, WEIGHTS)
    wrong[4] *= 2
    assert not sketch.follows(wrong, WEIGHTS)
    assert Sketch.of(torch.full((B, 3), bad)).follows(torch.full((B, 3), bad), WEIGHTS)


def test_rows_without_a_gradient_are_counted():
    x = torch.zeros(B, 3, 4)
    assert Sketch.of(x).rows_with_gradient == 0
    x[1:3] = 1e-30
    assert Sketch.of(x).rows_with_gradient == 2


def test_columns_are_kept_only_where_they_may_be_the_batch():
    square, long = rows((B, B, 3), 0), rows((B, B + 1, 3), 0)
    assert Sketch.of(long).across is None
    across = Sketch.of(square).across
    assert across is not None
    assert across.follows(times(square.transpose(0, 1), WEIGHTS), WEIGHTS)
    assert not across.follows(times(square, WEIGHTS), WEIGHTS)


def test_its_size_does_not_grow_with_the_tensor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.gradients.sketch.CHUNK", 64)  # in many parts
    small, large = Sketch.of(rows((B, 2, 3), 0)), Sketch.of(rows((B, 40, 300), 0))
    assert small.projections_BK.shape == large.projections_BK.shape
    torch.testing.assert_close(large.norms_B, rows((B, 40, 300), 0).flatten(1).norm(dim=1))
