"""Exact derivatives along directions: those of autograd, over any prefix and part, and refusals of the rest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import test_zeroth_probes as probes
import torch
from torch import nn

from sotto import losses
from sotto.errors import SottoError
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import Law
from sotto.zeroth_order.parts import split_in_order
from sotto.zeroth_order.probes import Prober, trainable

KEY = "0ff0" * 8


def by_autograd(model: nn.Module, kind: str, p: Prober, step: int, part: int = 0) -> torch.Tensor:
    """(B, K) gradient of each row's loss times each direction, from one backward pass for each row."""
    losses_B, moved = losses.forward_losses(model, probes.batch(kind), probes.task(kind)), p.moved(part)
    found = torch.zeros(len(losses_B), p.directions.count, dtype=torch.float64)
    for row, k in itertools.product(range(len(losses_B)), range(p.directions.count)):
        gradients = torch.autograd.grad(losses_B[row], list(moved.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(moved, gradients, strict=True):
            if gradient is not None:
                found[row, k] += (gradient.double() * p.directions.tensor(name, step, k).double()).sum()
    return found


@pytest.mark.parametrize("law", probes.LAWS)
@pytest.mark.parametrize("trained", ["", "layer.1", "embed", "bias"])
def test_derivatives_are_gradients_times_directions(trained: str, law: Law):
    model = probes.build("bert_classifier", trained)
    p = probes.prober(model, "bert_classifier", law=law, smoothing=0.0)
    found, expected = p.differences(probes.batch("bert_classifier"), 3), by_autograd(model, "bert_classifier", p, 3)
    assert float(expected.abs().min()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_derivatives_of_decoders_with_tied_tables(kind: str):
    """llama's norms are computed in float32 whatever the weights are."""
    model = probes.build(kind)
    p = probes.prober(model, kind, smoothing=0.0)
    tolerance = 1e-5 if kind == "llama" else 1e-10
    expected = by_autograd(model, kind, p, 0)
    torch.testing.assert_close(p.differences(probes.batch(kind), 0), expected, rtol=tolerance, atol=tolerance)


def test_differences_tend_to_derivatives():
    """The error of a central difference falls with the square of how far the weights are moved."""
    model = probes.build("bert_classifier")
    exact = probes.prober(model, "bert_classifier", smoothing=0.0).differences(probes.batch("bert_classifier"), 0)
    errors = [
        float((probes.prober(model, "bert_classifier", smoothing=s).differences(probes.batch("bert_classifier"), 0)
               - exact).norm()) for s in (4e-3, 2e-3)
    ]  # fmt: skip
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_the_model_keeps_its_bits_and_has_no_gradients():
    model = probes.build("bert_classifier", "layer.1", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    p = probes.prober(model, "bert_classifier", smoothing=0.0)
    assert bool(torch.isfinite(p.differences(probes.batch("bert_classifier"), 0)).all())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("kind", ["bert_classifier", "gpt2", "llama"])
def test_a_sound_model_passes_the_check(kind: str):
    probes.prober(probes.build(kind), kind, smoothing=0.0).check(probes.batch(kind))


def test_the_check_finds_a_tangent_that_goes_missing():
    class Cut(probes.Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
                square = self.out.weight.square().sum()
                return out + square - square.detach()

    model = Cut()

    def forward(batch: Any) -> torch.Tensor:
        return model(batch["x"])

    directions = Directions(KEY, {n: p.shape for n, p in trainable(model).items()}, 1)
    with pytest.raises(SottoError) as caught:
        Prober(model, forward, directions, 0.0).check(probes.INPUTS)
    assert caught.value.code == "SOT655"


def test_what_has_no_forward_derivative_is_refused():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x**3

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    class Odd(probes.Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Cube.apply(super().forward(x))  # type: ignore[no-any-return]

    model = Odd()

    def forward(batch: Any) -> torch.Tensor:
        return model(batch["x"])

    directions = Directions(KEY, {n: p.shape for n, p in trainable(model).items()}, 1)
    with pytest.raises(SottoError) as caught:
        Prober(model, forward, directions, 0.0).differences(probes.INPUTS, 0)
    assert caught.value.code == "SOT657"
    Prober(model, forward, directions, 1e-3).differences(probes.INPUTS, 0)
    with pytest.raises(SottoError) as caught:
        Prober(model, forward, directions, 0.0, sides=2)
    assert caught.value.code == "SOT650"


# ---- parts


@pytest.mark.parametrize(("smoothing", "sides"), [(0.0, 1), (1e-4, 1), (1e-4, 2)])
def test_a_part_is_probed_alone(smoothing: float, sides: int):
    model = probes.build("bert_classifier", "bias")
    shapes = {name: p.shape for name, p in trainable(model).items()}

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses.forward_losses(model, inputs, "classification")

    p = Prober(model, forward, Directions(KEY, shapes, 2, parts=3), smoothing, sides=sides)  # type: ignore[arg-type]
    for part in range(3):
        found = p.differences(probes.batch("bert_classifier"), 1, part=part)
        torch.testing.assert_close(found, by_autograd(model, "bert_classifier", p, 1, part), rtol=1e-5, atol=1e-7)
        sketch = p.sketch(probes.batch("bert_classifier"), 1, part=part)
        torch.testing.assert_close(sketch, found * math.sqrt(3 / 2))


@pytest.mark.parametrize("seed", range(6))
def test_tensors_are_split_as_evenly_as_their_order_allows(seed: int):
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"t{i}": int(torch.randint(1, 50, (1,), generator=generator)) for i in range(8)}
    for parts in range(1, 9):
        found = split_in_order(sizes, parts)
        assert list(found) == list(sizes)
        numbers = list(found.values())
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(parts))
        largest = max(sum(sizes[n] for n in sizes if found[n] == part) for part in range(parts))
        best = min(
            max(sum(list(sizes.values())[a:b]) for a, b in itertools.pairwise((0, *cuts, 8)))
            for cuts in itertools.combinations(range(1, 8), parts - 1)
        )
        assert largest == best
    with pytest.raises(SottoError) as caught:
        split_in_order(sizes, 9)
    assert caught.value.code == "SOT650"


def test_every_part_is_as_likely_and_new_in_each_step():
    directions = Directions(KEY, {f"t{i}": torch.Size((4,)) for i in range(8)}, 2, parts=4)
    drawn = torch.tensor([[directions.part_for(step, unit) for unit in range(1000)] for step in range(2)])
    for row in drawn:
        counts = row.bincount(minlength=4)
        assert float(((counts - 250) ** 2 / 250).sum()) < 22  # chi squared of 3: once in 15,000 keys
    assert 150 < int((drawn[0] == drawn[1]).sum()) < 350
    assert directions.part_for(0, 5) == Directions(KEY, directions.shapes, 2, parts=4).part_for(0, 5)


def test_an_update_is_the_gradient_on_average_over_the_parts():
    """K orthogonal sign directions of K entries span them: the mean over a unit's parts is then the gradient itself."""
    shapes = {"a": torch.Size((8,)), "b": torch.Size((2, 4))}
    directions = Directions(KEY, shapes, 8, Law("orthogonal"), parts=2)
    gradient = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()}
    for name, expected in gradient.items():
        along_K = torch.stack([(directions.tensor(name, 0, k) * expected).sum() for k in range(8)])
        sent_K = along_K / directions.root
        update = sum((float(g) / directions.root) * directions.tensor(name, 0, k) for k, g in enumerate(sent_K))
        torch.testing.assert_close(update / directions.parts, expected)  # half of the units look here
