"""Probes give the loss under really moved weights, leave the weights alone to the last bit, and refuse the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from sotto import losses
from sotto.errors import SottoError
from sotto.models.side import SideOptions, add_side
from sotto.zeroth_order import perturb
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import LAWS as KINDS
from sotto.zeroth_order.law import Law
from sotto.zeroth_order.perturb import Perturbed, Side
from sotto.zeroth_order.probes import Prober, trainable
from sotto.zeroth_order.tangents import Tangents

KEY = "00ff" * 8
ROWS, TOKENS = 5, 7
LAWS = [Law("rademacher"), Law("gaussian", 2)]


def batch(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, tiny_models.VOCAB, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.arange(ROWS) % 3 if kind == "bert_classifier" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def task(kind: str) -> str:
    return "classification" if kind == "bert_classifier" else "generation"


def build(kind: str, trained: str = "", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of which the parameters with `trained` in their name are trained."""
    model = tiny_models.build(kind).eval().to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return model


def prober(
    model: nn.Module, kind: str, count: int = 3, law: Law | None = None, *, centred: bool = False, **others: Any
) -> Prober:
    shapes = {name: p.shape for name, p in trainable(model).items()}

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses.forward_losses(model, inputs, task(kind))

    return Prober(model, forward, Directions(KEY, shapes, count, law, centred=centred), **{"smoothing": 1e-3, **others})  # type: ignore[arg-type]


def by_hand(model: nn.Module, kind: str, p: Prober, step: int) -> torch.Tensor:
    """(B, K) differences: a copy of the model whose weights are really changed, one row of the batch at a time."""
    d_BK, inputs = torch.zeros(ROWS, p.directions.count, dtype=torch.float64), batch(kind)
    for k in range(p.directions.count):
        for sign in (1, -1):
            other = copy.deepcopy(model)
            with torch.no_grad():
                for name, weight in trainable(other).items():
                    weight += sign * p.smoothing * p.directions.tensor(name, step, k).to(weight.dtype)
                for row in range(ROWS):
                    alone = {name: x[row : row + 1] for name, x in inputs.items()}
                    d_BK[row, k] += sign * losses.forward_losses(other, alone, task(kind))[0].double()
    return d_BK / (2 * p.smoothing)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- the numbers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_matrices_are_moved_block_by_block(monkeypatch, bias, dtype):
    torch.manual_seed(3)
    model = nn.Linear(6, 11, bias=bias).to(dtype)
    x = torch.randn(2, 4, 6).to(dtype)
    names = dict(model.named_parameters())
    directions = Directions(KEY, {name: p.shape for name, p in names.items()}, 2)
    side = Side(1, 0.25)
    with torch.no_grad(), Perturbed(names, directions, 7, [side]):
        whole = model(x)
    monkeypatch.setattr(perturb, "BLOCK", 13)  # two rows of six at a time
    with torch.no_grad(), Perturbed(names, directions, 7, [side]):
        torch.testing.assert_close(model(x), whole, rtol=1e-6 if dtype is not torch.bfloat16 else 1e-2, atol=1e-6)
    assert not torch.allclose(whole, model(x))


class Wide(nn.Module):
    """A layer of GPT-2: its weight has a row for each input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("inputs", [0, 1, 11])
@pytest.mark.parametrize("block", [3, 13, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrices_with_a_row_for_each_input(monkeypatch, dtype, block, inputs):
    torch.manual_seed(3)
    model, x, moved = Wide(inputs).to(dtype), torch.randn(4, inputs).to(dtype), []
    names = dict(model.named_parameters())
    directions = Directions(KEY, {name: p.shape for name, p in names.items()}, 2)
    other, genuine = copy.deepcopy(model), Perturbed._move
    monkeypatch.setattr(perturb, "BLOCK", block)
    monkeypatch.setattr(Perturbed, "_move", lambda *args: moved.append(args[-1].numel()) or genuine(*args))
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += (0.25 * directions.tensor(name, 7, 1)).to(dtype)
        with Perturbed(names, directions, 7, [Side(1, 0.25)]):
            found = model(x)
        tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, other(x), rtol=tolerance, atol=tolerance)
    assert max(moved) <= max(5, inputs * 5 if dtype is torch.bfloat16 else block + 5)


class Odd(nn.Module):
    """Calls that are rare: a parameter that goes through a layer, arguments by name alone, a layer of no outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.weight = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 6))
        self.bias, self.none = nn.Parameter(torch.randn(5)), nn.Parameter(torch.empty(0, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        asked = F.linear(self.query, self.weight)
        named = F.linear(input=x, weight=self.weight, bias=self.bias)
        found = torch.embedding(self.weight, torch.tensor([0, 3])) @ self.query.type(x.dtype).sum(0)
        return torch.cat([asked, named, F.layer_norm(input=named, normalized_shape=(5,), weight=self.bias)]).sum(1) + (
            F.linear(x, self.none).sum() + found.sum()
        )


@pytest.mark.parametrize("law", [Law("rademacher"), Law("sphere")], ids=["signs", "sphere"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rare_calls_read_moved_weights_too(law, dtype):
    torch.manual_seed(4)
    model, x = Odd().to(dtype), torch.randn(3, 6).to(dtype)
    names = dict(model.named_parameters())
    directions = Directions(KEY, {name: p.shape for name, p in names.items()}, 2, law)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += 0.25 * directions.tensor(name, 7, 1).to(dtype)
        with Perturbed(names, directions, 7, [Side(1, 0.25)]):
            found = model(x)
        torch.testing.assert_close(found, other(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, model(x))


@pytest.mark.parametrize("law", [*(Law(kind) for kind in KINDS), Law("gaussian", 2), "mask", "classes"], ids=str)
def test_rows_of_a_weight_are_those_of_the_moved_weight(law):
    """Of which no more is made."""
    torch.manual_seed(6)
    weights = {"w": nn.Parameter(torch.randn(9, 300)), "b": nn.Parameter(torch.randn(9))}
    masks = {"w": torch.rand(9, 300) < 0.5} if law == "mask" else {}
    shapes = {name: p.shape for name, p in weights.items()}
    made = Directions(
        KEY, shapes, 2, law if isinstance(law, Law) else Law("gaussian"), masks, ["w"] * (law == "classes")
    )
    with torch.no_grad():
        expected = {name: p + 0.25 * made.tensor(name, 7, 1) for name, p in weights.items()}
        for rows in (slice(2, 5), slice(None), slice(-3, None), slice(5, 2), slice(0, 9, 2), slice(4, 100)):
            for name, p in weights.items():
                with Perturbed(weights, made, 7, [Side(1, 0.25)]):
                    found = p[rows]
                torch.testing.assert_close(found, expected[name][rows], rtol=1e-6, atol=1e-6)
                with forward_ad.dual_level():
                    with Tangents(weights, made, 7, 1):
                        dual = forward_ad.unpack_dual(p[rows])
                    assert torch.equal(dual.primal, p[rows])
                    assert dual.tangent is not None
                    torch.testing.assert_close(dual.tangent, made.tensor(name, 7, 1)[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["layers", "parts of a layer"])
def test_gradients_through_moved_weights_are_those_of_each_layers_own(kind, monkeypatch):
    """Where autograd keeps a moved weight for later, the next one's may not be written over it."""
    torch.manual_seed(5)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(3, 6, requires_grad=True)
    if kind == "parts of a layer":
        model = Wide(6)
        monkeypatch.setattr(perturb, "BLOCK", 13)
    names = dict(model.named_parameters())
    directions = Directions(KEY, {name: p.shape for name, p in names.items()}, 2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += 0.25 * directions.tensor(name, 7, 1)
    with Perturbed(names, directions, 7, [Side(1, 0.25)]):
        loss = model(x).square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, other(x).square().sum())))


@pytest.mark.parametrize("ids", [[-1, 2], [2, 40]])
def test_a_row_that_is_not_there_is_not_another_one(ids):
    """On a GPU the same, see `kernels.add_rows`."""
    table = nn.Embedding(40, 3)
    names = dict(table.named_parameters())
    directions = Directions(KEY, {name: p.shape for name, p in names.items()}, 2)
    with torch.no_grad(), Perturbed(names, directions, 7, [Side(1, 0.25)]), pytest.raises(IndexError):
        table(torch.tensor(ids))


@pytest.mark.parametrize("kind", ["llama", "roberta", "gpt2"])
def test_blocks_change_no_number(monkeypatch, kind):
    model = build(kind)
    whole = prober(model, kind).differences(batch(kind), 3)
    monkeypatch.setattr(perturb, "BLOCK", 100)
    assert_close(prober(model, kind).differences(batch(kind), 3), whole)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("kind", ["bert_classifier", "llama", "gpt2", "roberta"])
def test_as_if_the_weights_were_moved(kind, law):
    model = build(kind)
    p = prober(model, kind, 2, law)
    p.check(batch(kind))
    expected = by_hand(model, kind, p, 4)
    assert_close(p.differences(batch(kind), 4), expected)
    for mutant in (p.differences(batch(kind), 5), -expected, 1.001 * expected):
        with pytest.raises(AssertionError):
            assert_close(mutant, expected)


def test_they_are_derivatives_along_the_directions():
    model = build("bert_classifier")
    p = prober(model, "bert_classifier", 4, smoothing=1e-5)
    weights = p.parameters
    found = p.differences(batch("bert_classifier"), 0)
    for row, loss in enumerate(p.forward(batch("bert_classifier"))):
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        for k in range(4):
            slope = sum(
                (g * p.directions.tensor(n, 0, k).double()).sum() for n, g in zip(weights, gradients, strict=True)
            )
            assert float(found[row, k]) == pytest.approx(float(slope), rel=1e-5)


TRAINED = {"all": "", "head": "classifier", "upper layer": "layer.1", "biases": "bias", "embeddings": "embeddings"}


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("trained", TRAINED)
def test_prefix_and_sides_change_no_number(trained, law):
    model = build("bert_classifier", TRAINED[trained])
    expected = prober(model, "bert_classifier", 3, law, reuse_prefix=False).differences(batch("bert_classifier"), 1)
    assert float(expected.abs().min()) > 0
    for sides in (1, 2, 4):
        for reuse_prefix in (True, False):
            p = prober(model, "bert_classifier", 3, law, sides=sides, reuse_prefix=reuse_prefix)
            p.check(batch("bert_classifier"))
            assert_close(p.differences(batch("bert_classifier"), 1), expected)
            assert_close(p.differences(batch("bert_classifier"), 1, probes=[2]), expected[:, 2:])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sides_of_a_decoder(kind):
    model = build(kind)
    expected = prober(model, kind, 2).differences(batch(kind), 1)
    assert_close(prober(model, kind, 2, sides=4).differences(batch(kind), 1), expected)


def beside(kind: str, block: str) -> Any:
    """A model with a side network, which alone is trained."""
    options = SideOptions(reduction=2, every=1, block=block)  # type: ignore[arg-type]
    whole = add_side(tiny_models.build(kind), options, seed=0).eval().to(torch.float64)
    tiny_models.perturb(whole)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name.startswith("side."))
    return whole


@pytest.mark.parametrize("block", ["layer", "light"])
@pytest.mark.parametrize("kind", ["bert_classifier", "llama"])
def test_the_layers_beside_a_side_network_run_once_for_all_directions(kind, block):
    model, calls = beside(kind, block), []
    expected = prober(model, kind, 3, reuse_prefix=False).differences(batch(kind), 1)
    assert float(expected.abs().min()) > 0
    for smoothing in (1e-3, 0.0):
        p = prober(model, kind, 3, smoothing=smoothing)
        p.check(batch(kind))
        torch.testing.assert_close(p.differences(batch(kind), 1), expected, rtol=1e-3, atol=1e-6)
    assert_close(prober(model, kind, 3).differences(batch(kind), 1), expected)
    inner = next(m for m in model.stack.layers[1].modules() if isinstance(m, nn.Linear))
    inner.register_forward_hook(lambda *args: calls.append(1))
    prober(model, kind, 8).differences(batch(kind), 1)
    assert len(calls) == 1
    prober(model, kind, 8, reuse_prefix=False).differences(batch(kind), 1)
    assert len(calls) == 17
    assert model.side.fed is None
    assert model.side.noted is None


def test_layers_that_are_moved_themselves_run_for_each_direction():
    """The twin: what stands beside the side network is not frozen here, so what it gave is no constant."""
    model = beside("bert_classifier", "light")
    model.stack.layers[1].requires_grad_(True)
    expected = prober(model, "bert_classifier", 3, reuse_prefix=False).differences(batch("bert_classifier"), 1)
    assert_close(prober(model, "bert_classifier", 3).differences(batch("bert_classifier"), 1), expected)


def test_frozen_layers_below_run_once_for_all_directions():
    model = build("bert_classifier", "layer.1")
    calls = [0, 0]
    for i in (0, 1):
        layer = model.bert.encoder.layer[i].attention
        layer.register_forward_pre_hook(lambda module, args, i=i: calls.__setitem__(i, calls[i] + 1))
    prober(model, "bert_classifier", 6).differences(batch("bert_classifier"), 0)
    assert calls[0] == 1
    assert calls[1] >= 12
    assert "forward" not in model.bert.encoder.layer[0].__dict__


def test_a_tied_weight_moves_once_and_everywhere():
    model = build("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    p = prober(model, "llama", 1)
    assert [name for name in p.parameters if "embed" in name or "lm_head" in name] == ["model.embed_tokens.weight"]
    both = by_hand(model, "llama", p, 0)
    assert_close(p.differences(batch("llama"), 0), both)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    with pytest.raises(AssertionError):
        assert_close(by_hand(untied, "llama", prober(untied, "llama", 1), 0), both)


def test_the_sketch_adds_up_each_units_rows():
    model = build("bert_classifier")
    p = prober(model, "bert_classifier", 4)
    units = torch.tensor([3, 1, 3, 7, 1])
    d_BK = p.differences(batch("bert_classifier"), 2)
    expected = torch.stack([d_BK[0] + d_BK[2], d_BK[1] + d_BK[4], d_BK[3]]) / 2
    assert_close(p.sketch(batch("bert_classifier"), 2, units), expected)
    assert_close(p.sketch(batch("bert_classifier"), 2), d_BK / 2)


def test_a_sketch_is_as_long_as_the_gradient_on_average():
    model = build("bert_classifier", "classifier")
    p = prober(model, "bert_classifier", 1000)
    inputs = {name: x[:1] for name, x in batch("bert_classifier").items()}
    gradients = torch.autograd.grad(p.forward(inputs)[0], list(p.parameters.values()))
    length = float(sum(g.square().sum() for g in gradients))
    # The squares have variance 2: 7 standard errors are 7 sqrt(2 / 1000) = 0.32.
    assert float(p.sketch(inputs, 0).square().sum()) == pytest.approx(length, rel=0.32)


# ---- centred differences


def test_centred_numbers_are_one_sided_losses_less_their_mean():
    model = build("bert_classifier")
    p = prober(model, "bert_classifier", 4, centred=True)
    inputs, losses_Bk = batch("bert_classifier"), []
    for k in range(4):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in trainable(other).items():
                weight += p.smoothing * p.directions.tensor(name, 2, k).double()
            losses_Bk.append(losses.forward_losses(other, inputs, "classification").double())
    losses_BK = torch.stack(losses_Bk, 1)
    expected = (losses_BK - losses_BK.mean(1, keepdim=True)) / p.smoothing / 3**0.5
    assert_close(p.sketch(inputs, 2), expected)
    assert float(p.sketch(inputs, 2).sum(1).abs().max()) < 1e-6
    units = torch.tensor([3, 1, 3, 7, 1])
    together = torch.stack([expected[0] + expected[2], expected[1] + expected[4], expected[3]])
    assert_close(p.sketch(inputs, 2, units), together)
    assert_close(prober(model, "bert_classifier", 4, centred=True, sides=4).sketch(inputs, 2), expected)


def test_centred_numbers_take_one_pass_for_each_direction():
    model = build("bert_classifier")
    for centred, passes in ((True, 4), (False, 8)):
        p = prober(model, "bert_classifier", 4, centred=centred)
        calls: list[int] = []
        forward = p.forward
        p.forward = lambda inputs, forward=forward, calls=calls: calls.append(1) or forward(inputs)  # type: ignore[func-returns-value]
        p.sketch(batch("bert_classifier"), 0)
        assert len(calls) == passes == p.directions.passes


def test_a_centred_sketch_is_as_long_as_the_gradient_on_average():
    model = build("bert_classifier", "classifier")
    inputs = {name: x[:1] for name, x in batch("bert_classifier").items()}
    p = prober(model, "bert_classifier", 4, centred=True, smoothing=1e-5)
    gradients = torch.autograd.grad(p.forward(inputs)[0], list(p.parameters.values()))
    length = float(sum(g.square().sum() for g in gradients))
    squares = torch.stack([p.sketch(inputs, step).square().sum() for step in range(800)])
    # A chi-squared variable of 3 over 3 has variance 2 / 3: 7 standard errors are 7 sqrt(2 / 3 / 800) = 0.2.
    assert float(squares.mean()) == pytest.approx(length, rel=0.2)
    assert float(squares.mean()) * 3 / 4 != pytest.approx(length, rel=0.2), "over sqrt(K) it would be shorter"


def test_what_curvature_adds_to_all_directions_alike_is_gone():
    """A loss with a large curvature and no slope: one-sided numbers would be large, centred ones are near zero."""
    net = nn.Linear(50, 1, bias=False)
    nn.init.zeros_(net.weight)
    names = {name: p.shape for name, p in net.named_parameters()}

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1e3 * net.weight.square().sum() + 0 * inputs["x"].sum(1)

    p = Prober(net, forward, Directions(KEY, names, 8, centred=True), reuse_prefix=False)
    inputs = {"x": torch.zeros(2, 50)}
    assert float(p.differences(inputs, 0).min()) > 40
    assert float(p.sketch(inputs, 0).abs().max()) < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_centred_loss_that_is_not_finite_stays_in_its_row(value):
    net = nn.Linear(3, 1)
    names = {name: p.shape for name, p in net.named_parameters()}
    bad = torch.tensor([0.0, value, 0.0])
    p = Prober(net, lambda b: net(b["x"])[:, 0] + bad, Directions(KEY, names, 4, centred=True), reuse_prefix=False)
    sketch_UK = p.sketch({"x": torch.ones(3, 3)}, 0)
    assert torch.isfinite(sketch_UK).all(1).tolist() == [True, False, True]


# ---- what is left as it was


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().view(torch.int16).numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sides", [1, 4])
def test_weights_in_bfloat16_keep_every_bit(sides):
    model = build("bert_classifier", dtype=torch.bfloat16)
    before, objects = bits(model), {name: (id(p), p._version) for name, p in model.named_parameters()}
    for step in range(3):
        prober(model, "bert_classifier", 4, sides=sides).differences(batch("bert_classifier"), step)
    assert bits(model) == before
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == objects
    assert all(p.grad is None for p in model.parameters())
    moved = Directions(KEY, {name: p.shape for name, p in trainable(model).items()}, 1)
    with torch.no_grad():  # what the usual way leaves behind
        for name, p in model.named_parameters():
            u = moved.tensor(name, 0, 0).bfloat16()
            p.add_(u, alpha=1e-3).sub_(u, alpha=2e-3).add_(u, alpha=1e-3)
    assert bits(model) != before


def test_a_forward_that_fails_leaves_the_model_whole():
    model = build("bert_classifier", "layer.1")
    p = prober(model, "bert_classifier", 2)
    calls = 0

    def forward(inputs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("broken")
        return losses.forward_losses(model, inputs, "classification")

    p.forward = forward
    with pytest.raises(ValueError, match="broken"):
        p.differences(batch("bert_classifier"), 0)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    p.forward = lambda inputs: losses.forward_losses(model, inputs, "classification")
    assert_close(p.differences(batch("bert_classifier"), 0), by_hand(model, "bert_classifier", p, 0))


def test_a_loss_that_is_not_finite_stays_in_its_row():
    model = build("bert_classifier")
    p = prober(model, "bert_classifier", 2)
    expected = p.differences(batch("bert_classifier"), 0)
    factor_B = torch.tensor([1, torch.nan, 1, torch.inf, 1], dtype=torch.float64)
    p.forward = lambda inputs: losses.forward_losses(model, inputs, "classification") * factor_B
    found = p.differences(batch("bert_classifier"), 0)
    assert torch.isfinite(found).all(1).tolist() == [True, False, True, False, True]
    assert torch.equal(found[::2], expected[::2])


# ---- what is refused


class Small(nn.Module):
    """A model whose loss can be given anything that has to be refused."""

    def __init__(self, **options: Any):
        super().__init__()
        self.table = nn.Embedding(11, 6, **options.pop("table", {}))
        self.out = nn.Linear(6, 1)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x).mean(1)
        for change in self.options.get("changes", []):
            h = change(h)
        return self.out(h)[:, 0].square()


INPUTS = {"x": torch.arange(12).view(4, 3) % 11}


def small(loss: Any = lambda losses_B: losses_B, model: nn.Module | None = None, **options: Any) -> Prober:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model or Small(**options)
    shapes = {name: p.shape for name, p in trainable(model).items()}
    sides = options.get("sides", 1)
    return Prober(model, lambda b: loss(model(b["x"])), Directions(KEY, shapes, 2), sides=sides)


def code(call: Any) -> str:
    with pytest.raises(SottoError) as caught:
        call()
    assert caught.value.fix
    return caught.value.code


def test_a_sound_loss_passes():
    p = small()
    p.check(INPUTS)
    assert p.differences(INPUTS, 0).shape == (4, 2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: x.mean(),
        lambda x: x.mean(0, keepdim=True),
        lambda x: x[:, None],
        lambda x: x.bfloat16(),
        lambda x: x[1:],
    ],
)
def test_a_loss_that_is_not_one_number_for_each_example(loss):
    assert code(lambda: small(loss).differences(INPUTS, 0)) == "SOT652"
    assert code(lambda: small(loss).check(INPUTS)) == "SOT652"


def test_losses_that_depend_on_other_rows():
    assert code(lambda: small(lambda x: x - x.mean() + 1).check(INPUTS)) == "SOT652"
    assert code(lambda: small(lambda x: x / x.max()).check(INPUTS)) == "SOT652"


def test_dropout_in_training_mode():
    drops = [nn.Dropout(0.1), lambda h: F.dropout(h, 0.1), lambda h: h * torch.rand_like(h),
             lambda h: h.sigmoid().bernoulli()]  # fmt: skip
    assert code(lambda: small(model=nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)))) == "SOT651"
    assert code(lambda: small(model=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))) == "SOT651"
    assert code(lambda: small(model=nn.TransformerEncoderLayer(4, 2))) == "SOT651"
    for drop in drops:
        assert code(lambda drop=drop: small(changes=[drop]).differences(INPUTS, 0)) == "SOT651"
    quiet = [nn.Dropout(0.1).eval(), lambda h: F.dropout(h, 0.1, training=False), lambda h: F.dropout(h, 0.0)]
    assert torch.equal(small(changes=quiet).differences(INPUTS, 0), small().differences(INPUTS, 0))


def test_weights_that_the_forward_pass_changes():
    assert code(lambda: small(table={"max_norm": 1.0}).differences(INPUTS, 0)) == "SOT654"

    class Writes(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.out.weight.mul_(1.0)
            return super().forward(x)

    assert code(lambda: small(model=Writes()).differences(INPUTS, 0)) == "SOT654"

    class Sets(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.out.weight[0] = 1.0
            return super().forward(x)

    assert code(lambda: small(model=Sets()).differences(INPUTS, 0)) == "SOT654"


def test_weights_that_are_read_out_of_sight():
    class Hidden(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
                return super().forward(x)

    assert code(lambda: small(model=Hidden()).check(INPUTS)) == "SOT655"


def test_an_operation_without_a_rule_for_sides():
    class Odd(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bd,od->bo", self.table(x).mean(1), self.out.weight)[:, 0].square()

    assert code(lambda: small(model=Odd(), sides=4).check(INPUTS)) == "SOT653"
    small(model=Odd()).check(INPUTS)


def test_bad_arguments():
    model = Small()
    fitting = Directions(KEY, {name: p.shape for name, p in trainable(model).items()}, 1)
    other = Directions(KEY, {"out.weight": torch.Size((1, 6))}, 1)

    def forward(b: Any) -> torch.Tensor:
        return model(b["x"])

    for smoothing in (-1e-3, float("nan")):
        assert code(lambda s=smoothing: Prober(model, forward, fitting, s)) == "SOT401"
    for sides in (0, 3, -2):
        assert code(lambda s=sides: Prober(model, forward, fitting, sides=s)) == "SOT650"
    assert code(lambda: Prober(model, forward, other)) == "SOT650"
    uneven = {**INPUTS, "y": torch.zeros(3)}
    assert code(lambda: Prober(model, forward, fitting).differences(uneven, 0)) == "SOT650"
