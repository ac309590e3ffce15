"""Who reads a parameter in a pass of the probes, and what may not be random in one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sotto.errors import SottoError
from sotto.zeroth_order import deterministic, probes
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.probes import Prober, trainable
from sotto.zeroth_order.reading import Reading
from sotto.zeroth_order.small import groups

KEY = "0" * 32
X = torch.linspace(-1, 1, 24).view(4, 6)


class Doubles(Reading):
    """Gives functions twice the parameter, and notes which functions those are."""

    def __init__(self, model: nn.Module):
        super().__init__(dict(model.named_parameters()))
        self.functions: list[str] = []

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.functions.append(func.__name__)
        return func(*(2 * x if id(x) in self.names else x for x in args), **kwargs)


class Own(nn.Parameter):
    """A class of somebody else's."""


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))
    made[3].weight = Own(made[3].weight.detach())
    return made


def prober(made: nn.Module, forward: Callable[[Any], torch.Tensor] | None = None, k: int = 2, **options: Any) -> Prober:
    shapes = {name: p.shape for name, p in trainable(made).items()}
    centred = options.pop("centred", False)
    directions = Directions(KEY, shapes, k, centred=centred)
    return Prober(made, forward or (lambda b: made(b["x"])[:, 0].square()), directions, **options)


def kinds_and_bits(made: nn.Module) -> list[tuple[type, bytes]]:
    return [(type(p), p.detach().numpy().tobytes()) for p in made.parameters()]


# ---- who reads


def test_only_functions_that_get_a_parameter_are_asked_about():
    made = model()
    with torch.no_grad(), Doubles(made) as reading:
        made(X).relu().sum().item()
        _ = made[0].weight.shape, F.relu(X), X @ X.T
    assert [name for name in reading.functions if name != "__get__"] == ["linear", "layer_norm", "linear"]


def test_parameters_get_their_own_class_back_and_keep_their_bits():
    made = model()
    before, plain = kinds_and_bits(made), made(X)
    with torch.no_grad(), Doubles(made):
        assert isinstance(made[3].weight, Own)
        assert kinds_and_bits(made) != before
        moved = made(X)
    with pytest.raises(ZeroDivisionError), Doubles(made):
        raise ZeroDivisionError
    assert kinds_and_bits(made) == before
    assert torch.equal(made(X), plain)
    assert not torch.allclose(moved, plain)


def test_a_parameter_of_a_class_that_cannot_be_left_lets_the_others_go(monkeypatch):
    made = model()
    before, genuine = kinds_and_bits(made), nn.Parameter.__setattr__

    def stubborn(self: nn.Parameter, name: str, value: Any) -> None:
        if name == "__class__" and value is not Own and isinstance(self, Own) and type(self) is Own:
            raise TypeError("object layout differs")
        genuine(self, name, value)

    monkeypatch.setattr(Own, "__setattr__", stubborn)
    with pytest.raises(TypeError, match="layout"), Doubles(made):
        pass
    assert kinds_and_bits(made) == before


def test_one_probe_at_a_time():
    """Two would read as unmoved, or moved twice, what the other has; so a model is left as it is and both say no."""
    made, caught = model(), []
    before = kinds_and_bits(made)
    with torch.no_grad(), pytest.raises(SottoError, match="SOT658"), Doubles(made[0]), Doubles(made[2]):
        pass
    assert kinds_and_bits(made) == before

    def other() -> None:
        try:
            with Doubles(made):
                pass
        except SottoError as error:
            caught.append(error.code)

    with torch.no_grad(), Doubles(made):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert caught == ["SOT658"]
    assert kinds_and_bits(made) == before


def test_threads_with_models_of_their_own_leave_compilation_as_it_was():
    """The first to begin ends first, while the second goes on."""
    first, second, turn = Doubles(model()), Doubles(model()), [threading.Event() for _ in range(2)]

    def run() -> None:
        with second:
            turn[0].set()
            turn[1].wait(60)

    thread = threading.Thread(target=run)
    with first:
        thread.start()
        turn[0].wait(60)
    from torch._dynamo import eval_frame

    assert eval_frame._stance.stance == "force_eager"
    turn[1].set()
    thread.join()
    assert eval_frame._stance.stance == "default"


def test_copies_that_a_pass_keeps_are_ordinary_ones():
    made, kept = model(), []
    with torch.no_grad(), Doubles(made):
        kept.append(copy.deepcopy(made))
    assert [type(p) for p in kept[0].parameters()] == [type(p) for p in made.parameters()]


def test_another_thread_reads_what_is_there():
    made = model()
    plain, found = made(X).detach(), []
    with torch.no_grad(), Doubles(made):
        other = threading.Thread(target=lambda: found.append(made(X).detach()))
        other.start()
        other.join()
        assert torch.equal(found[0], plain)
        assert not torch.equal(made(X), plain)


def test_parameters_of_a_forecast_are_read_too():
    with FakeTensorMode():
        made = nn.Linear(6, 8)
        before = [type(p) for p in made.parameters()]
        with torch.no_grad(), Doubles(made) as reading:
            assert made(torch.empty(4, 6)).shape == (4, 8)
        assert reading.functions == ["linear"]
        assert [type(p) for p in made.parameters()] == before


def test_compiled_models_run_uncompiled_and_read_moved_weights():
    made = model()
    expected = prober(made).differences({"x": X}, 0)
    compiled: Any = torch.compile(made, backend="eager")
    p = prober(made, lambda b: compiled(b["x"])[:, 0].square())
    p.check({"x": X})
    assert torch.equal(p.differences({"x": X}, 0), expected)
    assert torch.equal(compiled(X), made(X))


def test_weights_that_no_function_shows_are_noticed():
    """A scripted copy that shares the weights: neither the probes nor the check can lend it others."""
    made = model()
    scripted: Any = torch.jit.trace(made, X)
    with pytest.raises(SottoError) as caught:
        prober(made, lambda b: scripted(b["x"])[:, 0].square()).check({"x": X})
    assert caught.value.code == "SOT655"
    assert "is given a trainable weight" in caught.value.what


def test_losses_that_are_a_view_of_a_weight_stay_what_they_were():
    """The next pass takes the place of the small weights of this one."""
    holder = nn.Module()
    holder.losses = nn.Parameter(torch.arange(4.0, dtype=torch.float64))
    holder.other = nn.Parameter(torch.arange(4.0))
    shapes = {name: p.shape for name, p in trainable(holder).items()}
    directions = Directions(KEY, shapes, 2)
    u_BK = torch.stack([directions.tensor("other", 0, k) for k in range(2)], 1).double()
    found_BK = Prober(holder, lambda b: holder.other[:], directions).differences({"x": X}, 0)
    torch.testing.assert_close(found_BK, u_BK, rtol=1e-3, atol=1e-3)
    u_BK = torch.stack([directions.tensor("losses", 0, k) for k in range(2)], 1).double()
    found_BK = Prober(holder, lambda b: holder.losses[:], directions).differences({"x": X}, 0)
    torch.testing.assert_close(found_BK, u_BK, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "centred"), [(5, True), (3, False)])
def test_the_last_sides_may_be_fewer(k, centred):
    made = model()
    one = prober(made, k=k, centred=centred).differences({"x": X}, 3)
    several = prober(made, k=k, centred=centred, sides=4).differences({"x": X}, 3)
    torch.testing.assert_close(several, one, rtol=1e-3, atol=1e-3)


# ---- what is random


def refused(draw: Callable[[torch.Tensor], torch.Tensor]) -> str:
    made = model()
    with pytest.raises(SottoError) as caught:
        prober(made, lambda b: draw(made(b["x"])[:, 0].square())).differences({"x": X}, 0)
    assert caught.value.code == "SOT651"
    return caught.value.where


def test_the_function_that_draws_is_named_where_it_is_known():
    assert refused(lambda h: F.dropout(h, 0.5)) == "dropout"
    assert refused(lambda h: h * torch.empty_like(h).uniform_()) == "uniform_"
    assert refused(lambda h: h * torch.randn(4)) == "the forward pass"
    assert refused(lambda h: h[torch.randperm(4)]) == "the forward pass"


@pytest.mark.parametrize("sides", [1, 2, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_numbers_that_change_no_loss_are_nobodys_business(frozen, sides):
    """Such as those that another thread draws for the next batch."""
    torch.manual_seed(0)
    made, x = nn.Sequential(nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 1)), torch.randn(3, 160)
    made[0].requires_grad_(not frozen)

    def forward(b: Any) -> torch.Tensor:
        return made(b["x"])[:, 0].square()

    def draws(b: Any) -> torch.Tensor:
        torch.randperm(100)
        return forward(b)

    expected = prober(made, forward, sides=sides).differences({"x": x}, 0)
    assert torch.equal(prober(made, draws, sides=sides).differences({"x": x}, 0), expected)


def test_a_generator_of_ones_own_is_seen_before_a_run_begins():
    made, own = model(), torch.Generator().manual_seed(1)

    def forward(b: Any) -> torch.Tensor:
        return made(b["x"])[:, 0].square() + 1e-5 * torch.empty(4).normal_(generator=own)

    with pytest.raises(SottoError) as caught:
        prober(made, forward).check({"x": X})
    assert (caught.value.code, caught.value.where) == ("SOT651", "normal_")


def test_a_pass_that_draws_nothing_runs_once():
    calls: list[int] = []
    losses = deterministic.run(lambda: calls.append(1) or torch.tensor([float("nan")]), [torch.device("meta")])
    assert calls == [1]
    assert losses.isnan().all()


# ---- small weights


def test_the_smallest_weights_have_a_place_for_the_whole_pass_and_the_others_one_for_a_call():
    made = model()
    sizes = {name: p.numel() for name, p in made.named_parameters()}
    directions = prober(made).directions
    kept: list[str] = []
    for most in (0, 1, *sizes.values(), sum(sizes.values()), None):
        kept = [name for group in groups(dict(made.named_parameters()), directions, most=most) for name in group.names]
        taken = sum(sizes[name] for name in kept)
        assert taken <= (most if most is not None else taken)
        rest = sizes.keys() - kept
        assert all(taken + sizes[name] > (most or 0) for name in rest)
        assert max((sizes[name] for name in kept), default=0) <= min((sizes[name] for name in rest), default=1 << 30)
    assert sorted(kept) == sorted(sizes), "without a limit all of them"


@pytest.mark.parametrize("most", [0, 20, 60])
def test_where_a_weight_is_moved_changes_no_bit(monkeypatch, most):
    made = model()
    together = prober(made, k=3).differences({"x": X}, 2)
    monkeypatch.setattr(probes, "MOST", most)
    assert torch.equal(prober(made, k=3).differences({"x": X}, 2), together)
