"""Each rule against one unit at a time, over shapes, dtypes, groupings and algorithms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import FAST, UNEVEN, check
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from sotto.gradients import pieces
from sotto.gradients.engine import attach
from sotto.gradients.pieces import Factored, Indexed, Instantiated, Piece
from sotto.gradients.rows import Rows

B, V = 5, 11


class Head(nn.Module):
    """A frozen matrix, one module under test, and a loss that is nowhere symmetric in the tokens."""

    def __init__(self, layer: nn.Module, enter: Callable[[torch.Tensor], torch.Tensor] = lambda x: x):
        super().__init__()
        self.layer, self.enter = layer, enter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(self.enter(x)).reshape(x.shape[0], -1)
        return (torch.sin(y) * torch.linspace(0.5, 2, y.shape[1], dtype=y.dtype)).sum(1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, offset: float = 0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(size)), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.offset + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.0


class OffsetEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(input + 1, self.weight)


class Depthwise(nn.Conv1d):
    def __init__(self):
        super().__init__(6, 6, 3, padding=2, groups=6)


class Standardised(nn.Linear):
    """Computes its weight: the functional call sees another tensor than the parameter."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


FLOAT_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "linear_no_bias": lambda: nn.Linear(6, 4, bias=False),
    "linear_wide": lambda: nn.Linear(6, 90),
    "conv1d_of_gpt2": lambda: Conv1D(4, 6),
    "layer_norm": lambda: nn.LayerNorm(6),
    "layer_norm_no_bias": lambda: nn.LayerNorm(6, bias=False),
    "rms_norm": lambda: RMSNorm(6),
    "gemma_norm": lambda: RMSNorm(6, offset=1.0),
    "torch_rms_norm": lambda: nn.RMSNorm(6),
}
SHAPES = {
    "2d": ((B, 6), None),
    "3d": ((B, 7, 6), None),
    "4d": ((B, 2, 3, 6), None),
    "square": ((B, B, 6), None),
    "flat": ((B, 7, 6), lambda x: x.reshape(-1, 6)),
}
GROUPS = {"alone": None, "groups": UNEVEN, "together": torch.zeros(B, dtype=torch.long)}


def randomised(layer: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    for p in layer.parameters():
        nn.init.normal_(p, 0.3, 0.7)
    return layer.to(dtype)


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("units", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", FLOAT_LAYERS)
def test_layers_of_features(layer: str, shape: str, units: torch.Tensor | None, algorithm: str):
    size, enter = SHAPES[shape]
    model = Head(randomised(FLOAT_LAYERS[layer]()), enter or (lambda x: x))
    x = torch.randn(size, dtype=torch.float64)
    vmapped_on_flat_tokens = shape == "flat" and "norm" in layer and "layer" not in layer
    slow = {"layer"} if vmapped_on_flat_tokens else set()
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=units, slow=slow)


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("layer", FLOAT_LAYERS)
def test_float32_within_a_ten_thousandth(layer: str, algorithm: str):
    model = Head(randomised(FLOAT_LAYERS[layer](), torch.float32))
    x = torch.randn(B, 7, 6)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=UNEVEN, tolerance=1e-4)


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("units", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("shape", [(B, 7), (B, B), (B, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "padding", "scaled", "scaled_padding", "offset", "offset_padding"])
def test_embeddings(kind: str, shape: tuple[int, ...], units: torch.Tensor | None, algorithm: str):
    cls = {"plain": nn.Embedding, "scaled": ScaledEmbedding, "offset": OffsetEmbedding}[
        kind.split("_")[0].replace("padding", "plain")
    ]
    model = Head(randomised(cls(V, 6, padding_idx=2 if "padding" in kind else None)))
    ids = torch.randint(0, 4, shape)  # repeats within a row and across rows, and the padding index
    check(model, lambda rows: model(ids[rows]), B, algorithm=algorithm, units=units, slow=set())


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("units", GROUPS.values(), ids=GROUPS)
def test_depthwise_convolution_through_vmap(units: torch.Tensor | None, algorithm: str):
    model = Head(randomised(Depthwise()))
    x = torch.randn(B, 6, 9, dtype=torch.float64)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=units, slow=set())


class CalledTwice(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.layer(torch.tanh(self.layer(x)))) * torch.linspace(1, 2, 6).to(x)).sum((1, 2))


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).sum((1, 2))


class SharedTransposed(SharedWeight):
    """One square matrix as W in a linear layer and as its transpose in GPT-2's Conv1D."""

    def __init__(self):
        super().__init__()
        self.second = Conv1D(6, 6)
        self.second.weight = self.first.weight


class FunctionalUse(SharedWeight):
    """Uses another module's weight without calling the module: that use cannot be tapped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.first(x)), self.first.weight, self.second.bias).sin().sum((1, 2))


class BareParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * self.scale + self.shift).sum((1, 2))


class WeightNormed(BareParameters):
    """The weight is computed by a parametrization; only the bias is the linear layer's own."""

    def __init__(self):
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(6, 6))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.rms, self.third = RMSNorm(6), Conv1D(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += x
        h = self.norm(h.sin_())
        h.mul_(2)
        h = self.rms(self.second(h).tanh_())
        h += x
        return self.third(h).sin_().sum((1, 2))


class Routed(nn.Module):
    """Two experts that see tokens in any order; the routing depends on each token alone."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 6)
        choice = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            index = torch.nonzero(choice == bool(i)).flatten().flip(0)
            out = out.index_copy(0, index, expert(flat[index]))
        return self.head(out.view_as(x)).sin().sum((1, 2))


class TimeMajor(nn.Module):
    """Works on (T, B, d), as XLNet does."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.linear(x.transpose(0, 1))).transpose(0, 1)).sin().sum((1, 2))


ODD_ONES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear_twice": (lambda: CalledTwice(nn.Linear(6, 6)), set()),
    "conv1d_twice": (lambda: CalledTwice(Conv1D(6, 6)), set()),
    "norm_twice": (lambda: CalledTwice(nn.LayerNorm(6)), set()),
    "rms_norm_twice": (lambda: CalledTwice(RMSNorm(6)), set()),
    "shared_weight": (SharedWeight, set()),
    "shared_transposed": (SharedTransposed, set()),
    "functional_use": (FunctionalUse, {"first", "second"}),
    "bare_parameters": (BareParameters, {""}),
    "weight_norm": (WeightNormed, {"", "linear", "linear.parametrizations.weight"}),
    "computed_weight": (lambda: CalledTwice(Standardised(6, 6)), {"layer"}),
    "in_place": (InPlace, set()),
    "routed_experts": (Routed, {"experts.0", "experts.1"}),
    "time_major": (TimeMajor, {"linear"}),
}


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("units", [None, UNEVEN], ids=["alone", "groups"])
@pytest.mark.parametrize("tokens", [7, B], ids=["long", "square"])
@pytest.mark.parametrize("name", ODD_ONES)
def test_models_that_use_parameters_in_odd_ways(name: str, tokens: int, units: torch.Tensor | None, algorithm: str):
    make, slow = ODD_ONES[name]
    model = make().double()
    randomised(model)
    x = torch.randn(B, tokens, 6, dtype=torch.float64)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=units, slow=slow)


class Tied(nn.Module):
    """One matrix embeds tokens and scores them; learned positions are broadcast over the batch."""

    def __init__(self, functional: bool, padding_idx: int | None):
        super().__init__()
        self.embed, self.position = nn.Embedding(V, 6, padding_idx=padding_idx), nn.Embedding(9, 6)
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, V, bias=False)
        self.head.weight = self.embed.weight
        self.functional = functional

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        h += self.position(torch.arange(ids.shape[1])[None])
        h = torch.tanh(self.mid(h))
        logits = F.linear(h, self.embed.weight) if self.functional else self.head(h)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("units", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("functional", "padding_idx"), [(False, None), (False, 2), (True, None)])
def test_tied_embedding_and_head(functional: bool, padding_idx: int | None, units: torch.Tensor | None, algorithm: str):
    model = randomised(Tied(functional, padding_idx).double())
    ids = torch.randint(0, 5, (B, 7))
    slow = {"embed", "head"} if functional else set()
    check(model, lambda rows: model(ids[rows]), B, algorithm=algorithm, units=units, slow=slow)


@pytest.mark.parametrize("algorithm", FAST)
def test_frozen_weight_with_trainable_bias(algorithm: str):
    model = randomised(InPlace().double())
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    x = torch.randn(B, 7, 6, dtype=torch.float64)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=UNEVEN, slow=set())


@pytest.mark.parametrize("algorithm", ["per_example", *FAST])
def test_parameters_that_no_example_reached_are_zeros(algorithm: str):
    model = nn.ModuleDict({"used": nn.Linear(6, 1), "unused": nn.Linear(6, 1)}).double()
    engine = attach(model, algorithm=algorithm)  # type: ignore[arg-type]
    total = engine.backward(model["used"](torch.randn(B, 6, dtype=torch.float64)).flatten())
    assert set(total.gradients) == set(dict(model.named_parameters()))
    assert not total.gradients["unused.weight"].any()
    assert total.gradients["used.weight"].any()


def forms() -> dict[str, list[Piece]]:
    torch.manual_seed(2)
    a, g, e = (torch.randn(B, t, d, dtype=torch.float64) for t, d in ((3, 4), (3, V), (6, 4)))
    linear, ids = Factored(a, g, False), torch.randint(0, 4, (B, 6))
    transposed = Factored(g, a, True)
    embedding = Indexed(ids, e, V, None)
    full = Instantiated(torch.randn(3, V, 4, dtype=torch.float64))
    return {
        "linear": [linear],
        "transposed": [transposed],
        "embedding": [embedding],
        "linear_twice": [linear, Factored(a.flip(1), g, False)],
        "both_ways_up": [linear, transposed],
        "tied": [embedding, linear],
        "tied_twice": [linear, embedding, linear, embedding],
        "tied_transposed": [embedding, transposed],
        "with_full": [full, linear, embedding],
    }


@pytest.mark.parametrize("name", forms())
@pytest.mark.parametrize("keep", [True, False])
def test_every_form_equals_its_instantiation(name: str, keep: bool):
    rows = Rows.build(B, UNEVEN, torch.device("cpu"))
    uses = forms()[name]
    full = sum(copy.copy(p).instantiate(rows) for p in uses)
    factor = torch.rand(3, dtype=torch.float64)
    for found in (uses, pieces.combine(list(uses), rows, keep)):
        torch.testing.assert_close(
            sum(p.weighted_sum(factor, rows, None) for p in found), torch.einsum("u,uvd->vd", factor, full)
        )
    found = pieces.combine(list(uses), rows, keep)
    torch.testing.assert_close(pieces.squared_norms(found, rows), full.square().sum((1, 2)), rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("instantiate", [True, False])
def test_ghost_and_instantiated_norms_agree(instantiate: bool, algorithm: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Factored, "instantiation_is_cheaper", lambda self, rows, keep: instantiate)
    monkeypatch.setattr(pieces, "CHUNK", 30)  # instantiation in several parts
    model = randomised(InPlace().double())
    x = torch.randn(B, 7, 6, dtype=torch.float64)
    check(model, lambda rows: model(x[rows]), B, algorithm=algorithm, units=UNEVEN, slow=set())


def test_rows_keep_the_order_of_first_appearance():
    rows = Rows.build(5, torch.tensor([9, -4, 9, 9, 0]), torch.device("cpu"))
    assert rows.unit_of_B.tolist() == [0, 1, 0, 0, 2]
    assert rows.slots_UK is not None
    assert rows.slots_UK.tolist() == [[0, 2, 3], [1, -1, -1], [4, -1, -1]]
    assert Rows.build(3, torch.tensor([5, 4, 3]), torch.device("cpu")).slots_UK is None
