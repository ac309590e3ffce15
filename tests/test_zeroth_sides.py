"""Several sides in a pass: how many a pass takes, and that no row of one is taken for a row of another."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from sotto import losses
from sotto.errors import SottoError
from sotto.zeroth_order import perturb, sides
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import Law
from sotto.zeroth_order.probes import Prober, trainable

IDS = torch.randint(5, tiny_models.VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))


def prober(model: nn.Module, forward: Any, count: int = 4, law: Law | None = None, **others: Any) -> Prober:
    shapes = {name: p.shape for name, p in trainable(model).items()}
    return Prober(model, forward, Directions("00ff" * 8, shapes, count, law, centred=True), **others)


def opt() -> nn.Module:
    """Lays the tokens of all rows one after another in its MLP."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**sizes, vocab_size=tiny_models.VOCAB, num_hidden_layers=2, num_attention_heads=4))


def language(kind: str, count: int = 4, law: Law | None = None, **others: Any) -> Prober:
    model = (opt() if kind == "opt" else tiny_models.build(kind)).eval().double()

    def forward(batch: Any) -> torch.Tensor:
        return losses.forward_losses(model, dict(batch), "generation")

    return prober(model, forward, count, law, **others)


def texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = IDS[:rows, :length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# ---- the products


@pytest.mark.parametrize("law", [Law("rademacher"), Law("gaussian"), Law("orthogonal")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("block", [13, 1 << 21])
def test_large_matrices_are_multiplied_one_after_another(
    monkeypatch: pytest.MonkeyPatch, kind: str, law: Law, block: int
):
    expected = language(kind, 4, law).differences(texts(3, 7), 1)
    monkeypatch.setattr(sides, "CPU_SMALL", 0)
    monkeypatch.setattr(perturb, "BLOCK", block)
    found = language(kind, 4, law, sides=4).differences(texts(3, 7), 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("small", [0, 1 << 18])
def test_products_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(sides, "CPU_SMALL", small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 300, bias=False), nn.Linear(300, 1))
    batch, kinds = {"x": torch.randn(5, 6)}, set()

    def forward(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch["x"])
        kinds.add(out.dtype)
        return out[:, 0].float().square()

    one, four = (prober(model, forward, smoothing=0.1, sides=n).differences(batch, 0) for n in (1, 4))
    assert kinds == {torch.bfloat16}
    torch.testing.assert_close(four, one, rtol=3e-2, atol=3e-2)


# ---- how many


def rows_of_passes(p: Prober, batch: dict[str, torch.Tensor]) -> list[int]:
    rows, forward = [], p.forward
    p.reuse_prefix = False
    p.forward = lambda b: rows.append(len(b["input_ids"])) or forward(b)
    p.differences(batch, 0)
    return rows


def test_on_a_cpu_a_pass_takes_as_many_as_gain_something(monkeypatch: pytest.MonkeyPatch):
    p = language("llama", 8, sides=8)
    widest = max(max(w.shape) for w in p.parameters.values())
    assert widest == tiny_models.VOCAB, "a trained output layer gives that many numbers for each token"
    assert rows_of_passes(p, texts(3, 7)) == [24]
    for most, expected in [(8, [24]), (7, [18, 6]), (4, [12, 12]), (2, [6] * 4), (1, [3] * 8), (0, [3] * 8)]:
        monkeypatch.setattr(sides, "WIDEST", most * widest * 3 * 7)
        assert rows_of_passes(language("llama", 8, sides=8), texts(3, 7)) == expected
    monkeypatch.setattr(sides, "WIDEST", 4 * widest * 3 * 7)
    assert rows_of_passes(language("llama", 8, sides=8), texts(2, 7)) == [12, 4], "a smaller batch leaves room for more"
    assert rows_of_passes(language("llama", 8, sides=8), texts(1, 7)) == [1] * 8, "what lies first may be its tokens"


def test_of_a_frozen_output_layer_few_words_exist_at_a_time():
    p = language("llama", 2, sides=2)
    assert p.width == tiny_models.VOCAB
    p.model.get_output_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    inner = max(max(m.weight.shape) for n, m in p.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert sides.width_of(p.model) == inner < tiny_models.VOCAB


# ---- whose row is whose


class Selects(nn.Module):
    """A layer that gets half of all tokens, as an expert does: of whichever side, but a number that can be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x_BTc: torch.Tensor) -> torch.Tensor:
        h_Nd = self.first(x_BTc).flatten(0, 1)
        chosen = h_Nd[:, 0].argsort()[: len(h_Nd) // 2]
        h_Nd = h_Nd.index_copy(0, chosen, self.expert(h_Nd[chosen]))
        return self.out(h_Nd).view(len(x_BTc), -1).square().mean(1)


class Routes(nn.Module):
    """Two experts, of which the weights of a frozen router choose one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 2).requires_grad_(False)
        self.first, self.experts, self.out = nn.Linear(3, 6), nn.ModuleList([nn.Linear(6, 6)] * 2), nn.Linear(6, 1)

    def forward(self, x_BTc: torch.Tensor) -> torch.Tensor:
        h_Nd, chosen = self.first(x_BTc).flatten(0, 1), self.router(x_BTc).flatten(0, 1).argmax(1)
        out_Nd = torch.zeros_like(h_Nd)
        for i, expert in enumerate(self.experts):
            (at,) = torch.where(chosen == i)
            out_Nd.index_add_(0, at, expert(h_Nd[at]))
        return self.out(out_Nd).view(len(x_BTc), -1).square().mean(1)


def refused(model: nn.Module, forward: Any, batch: dict[str, torch.Tensor]) -> SottoError:
    """What the check says of four sides, where it has nothing against one."""
    prober(model, forward).check(batch)
    with pytest.raises(SottoError) as caught:
        prober(model, forward, sides=4).check(batch)
    return caught.value


def written_by_a_view(h: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros_like(h)
    seen = whole.view(len(h), 2, -1)
    whole.view(-1, h.shape[1])[at] = h
    return seen.flatten(1)


def passes_apart(model: nn.Module, forward: Any, x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> str:
    """Why a batch is probed one side at a time, which says the same as with sides=1."""
    one, four = (prober(model, forward, sides=n).differences({"x": x}, 0) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-5, atol=1e-5)
    assert len(caplog.messages) == 1
    return caplog.messages[0]


@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("kind", [Selects, Routes])
def test_rows_that_a_model_selects_belong_to_no_side(kind: type[nn.Module], tokens: int, caplog: Any):
    """Else a text's loss would depend on what others select."""
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(8, tokens, 3).double()
    if kind is Routes:
        assert "rows that the model selected" in passes_apart(model, lambda b: model(b["x"]), x, caplog)
    with pytest.raises(SottoError) as caught:
        prober(model, lambda b: model(b["x"]), sides=4).check({"x": x})
    assert caught.value.code == ("SOT653" if kind is Routes else "SOT652"), "tokens that compete for places are coupled"


@pytest.mark.parametrize(
    "select",
    [
        lambda h, at: h.index_select(0, at),
        lambda h, at: h.gather(0, at[:, None].expand(-1, h.shape[1])),
        lambda h, at: h.sort(0).values,
        lambda h, at: h[at > -1],
        lambda h, at: h[at.tolist()],
        lambda h, at: h.masked_select(at[:, None] >= 0).view(h.shape),
        lambda h, at: torch.zeros_like(h).index_copy(0, at, h),
        lambda h, at: torch.zeros_like(h).index_put_((at,), h),
        lambda h, at: 1 + h[at].tanh(),
        lambda h, at: nn.functional.embedding(at, h),
        lambda h, at: h[None, at][0],
        lambda h, at: h[..., at, :],
        lambda h, at: h[at.numpy()],
        lambda h, at: torch.ops.aten.index.Tensor(h, [at]),
        lambda h, at: torch.ops.aten.index_select(h, 0, at),
        lambda h, at: torch.ops.aten.gather.default(h, 0, at[:, None].expand(-1, 6)),
        lambda h, at: torch.zeros_like(h).masked_scatter(at[:, None] > -1, h),
        lambda h, at: torch.zeros_like(h).put_(at[:, None] * 6 + torch.arange(6), h),
        lambda h, at: h.msort(),
        lambda h, at: h.flipud(),
        lambda h, at: h.unique(dim=0),
        lambda h, at: h.repeat_interleave((at % 2 == 0).long() * 2, 0),
        lambda h, at: h.repeat_interleave(torch.ones(h.numel(), dtype=torch.long)).view(h.shape),
        lambda h, at: nn.functional.embedding_bag(at[:, None], h),
        lambda h, at: torch.take_along_dim(h, at[:, None] * 6 + torch.arange(6)).view(h.shape),
        lambda h, at: h.flip((0,)),
        lambda h, at: written_by_a_view(h, at),
        lambda h, at: h.t()[:, at].t(),
        lambda h, at: h.t()[..., at].t(),
        lambda h, at: h[None][:, at][0],
        lambda h, at: h.t().index_select(1, at).t(),
        lambda h, at: h.t().sort(1).values.t(),
        lambda h, at: torch.take_along_dim(h.t(), at[None], 1).t(),
        lambda h, at: h.t()[:, at > -1].t(),
    ],
)
def test_ways_to_select(select: Any, caplog: Any):
    torch.manual_seed(0)
    first, out = nn.Linear(3, 6).double(), nn.Linear(6, 1).double()

    def forward(batch: Any) -> torch.Tensor:
        h = first(batch["x"])
        at = h[:, 0].argsort()
        return out(select(h, at))[:, 0].square()[at.argsort()]

    p = prober(nn.Sequential(first, out), forward, sides=4)
    p.differences({"x": torch.randn(8, 3).double()}, 0)
    assert len(caplog.messages) == 1
    assert "rows that the model selected" in caplog.messages[0]


@pytest.mark.parametrize(
    "order",
    [
        lambda b, ids: ids[b["attention_mask"].sum(1).argsort()],
        lambda b, ids: torch.stack([ids[i] for i in b["attention_mask"].sum(1).argsort().tolist()]),
        lambda b, ids: torch.stack([ids.unbind()[i] for i in b["attention_mask"].sum(1).argsort().tolist()]),
        lambda b, ids: torch.stack([list(ids)[i] for i in b["attention_mask"].sum(1).argsort().tolist()]),
        lambda b, ids: torch.cat([ids[i : i + 1] for i in b["attention_mask"].sum(1).argsort().tolist()]),
        lambda b, ids: torch.cat([ids.split(1)[i] for i in b["attention_mask"].sum(1).argsort().tolist()]),
    ],
)
def test_texts_that_are_sorted_by_their_lengths(order: Any):
    """Here no batch but one of several lengths shows it, and the check makes its own."""
    torch.manual_seed(0)
    table, out = nn.Embedding(11, 6), nn.Linear(6, 1)

    def forward(batch: Any) -> torch.Tensor:
        at = batch["attention_mask"].sum(1).argsort()
        mask = batch["attention_mask"][at, :, None]
        return out((table(order(batch, batch["x"])) * mask).sum(1))[:, 0].square()[at.argsort()]

    batch = {"x": IDS % 11, "attention_mask": torch.ones_like(IDS)}
    assert refused(nn.Sequential(table, out), forward, batch).code == "SOT653"


def test_texts_in_another_order_by_a_product():
    """Of which the order is followed, as it came of sorting."""
    torch.manual_seed(0)
    first, inner, out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(batch: Any) -> torch.Tensor:
        at = batch["attention_mask"].sum(1).argsort(stable=True)
        h = first(batch["x"])
        turn = nn.functional.one_hot(at, len(at)).float()
        h = inner(torch.einsum("ij,jtd->itd", turn, h)).tanh()
        return out(torch.einsum("ij,itd->jtd", turn, h)).square().mean((1, 2))

    batch = {"x": torch.randn(4, 5, 3), "attention_mask": torch.ones(4, 5)}
    assert refused(nn.Sequential(first, inner, out), forward, batch).code == "SOT653"


def test_what_selects_no_rows_of_the_batch():
    """A stored table and columns: their places depend on nothing in the batch."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double(), torch.randn(5, 4, 3).double()
    model.register_buffer("table", torch.randn(7, 3).double())

    def forward(batch: Any) -> torch.Tensor:
        h = model[0](batch["x"])[:, [3, 1, 0]] + model.table[torch.arange(3)]
        return model[1](h).square().mean((1, 2))

    one, four = (prober(model, forward, sides=n).differences({"x": x}, 0) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-6, atol=1e-6)


def test_what_lies_along_another_axis_may_be_as_long_as_all_rows():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double(), torch.randn(2, 8, 3).double()

    def forward(batch: Any) -> torch.Tensor:
        h = model[0](batch["x"])
        h = h[:, h[0, :, 0].argsort().sort().values].gather(1, torch.arange(8)[None, :, None].expand(h.shape))
        h = h.repeat_interleave(2, 1)[:, ::2]
        return model[1](h).square().mean((1, 2))

    one, four = (prober(model, forward, sides=n).differences({"x": x}, 0) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-6, atol=1e-6)


def test_a_model_that_takes_no_repeated_batch_is_refused_before_it_is_trained():
    torch.manual_seed(0)
    model, x, most = nn.Linear(3, 1), torch.randn(4, 3), torch.ones(4, 1)

    def forward(batch: Any) -> torch.Tensor:
        return (model(batch["x"]) * most[: len(batch["x"])]).square()[:, 0]

    prober(model, forward).check({"x": x})
    with pytest.raises(SottoError) as caught:
        prober(model, forward, sides=2).check({"x": x})
    assert caught.value.code == "SOT653"
    assert "RuntimeError: The size of tensor" in caught.value.why
    with pytest.raises(RuntimeError, match="size of tensor"):
        prober(model, forward).check({"x": torch.randn(5, 3)})


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_norms_of_all_sides_together(kind: torch.dtype):
    torch.manual_seed(0)
    norms = nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm((4, 6))
    model, x = nn.Sequential(nn.Linear(3, 6), *norms, nn.Flatten(), nn.Linear(24, 1)).to(kind), torch.randn(5, 4, 3)

    def forward(batch: Any) -> torch.Tensor:
        return model(batch["x"].to(kind))[:, 0].square()

    one, four = (prober(model, forward, sides=n, smoothing=0.1).differences({"x": x}, 0) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-4)


def test_one_number_as_a_weight_changes_no_type():
    """`torch` takes a tensor without axes for a plain number."""
    torch.manual_seed(0)
    model = nn.Linear(3, 6).bfloat16().requires_grad_(False)
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    kinds: list[torch.dtype] = []

    def forward(batch: Any) -> torch.Tensor:
        out = model(batch["x"].bfloat16()) * model.scale
        kinds.append(out.dtype)
        return out.float().square().sum(1)

    x = torch.randn(5, 3)
    one, two = (prober(model, forward, sides=n, smoothing=0.1).differences({"x": x}, 0) for n in (1, 2))
    assert set(kinds) == {torch.bfloat16}
    torch.testing.assert_close(two, one, rtol=3e-2, atol=3e-2)


def test_the_check_compares_every_side():
    """A row that all share is moved for each side, of which this model takes the mean for all."""
    torch.manual_seed(0)
    table, places, out = nn.Embedding(11, 6), nn.Embedding(7, 6), nn.Linear(6, 1)

    def forward(batch: Any) -> torch.Tensor:
        h = table(batch["x"]) + places(torch.arange(7)[None]).mean(0)
        return out(h.mean(1))[:, 0].square()

    batch = {"x": IDS % 11}
    prober(nn.Sequential(table, places, out), forward).check(batch)
    with pytest.raises(SottoError) as caught:
        prober(nn.Sequential(table, places, out), forward, sides=4).check(batch)
    assert caught.value.code == "SOT655"


def test_a_norm_of_a_weight_reads_it_moved():
    torch.manual_seed(0)
    model = nn.Linear(3, 6).double()
    model.register_parameter("query", nn.Parameter(torch.randn(1, 4, 6).double()))

    def forward(batch: Any) -> torch.Tensor:
        return (
            (model(batch["x"]) + nn.functional.layer_norm(model.query, (6,), torch.ones(6).double())).sin().mean((1, 2))
        )

    x = torch.randn(5, 4, 3).double()
    one, two = (prober(model, forward, sides=n).differences({"x": x}, 0) for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)
    with pytest.raises(SottoError) as caught:
        prober(model, forward, sides=2).check({"x": x})
    assert caught.value.code == "SOT653"


def test_a_wide_batch_does_not_hide_that_smaller_ones_share_a_pass(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sides, "WIDEST", 2 * 6 * 9 * 5 * 3)
    first, inner, out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(batch: Any) -> torch.Tensor:
        h = first(batch["x"]).transpose(0, 1)
        return out(inner(h.flatten(0, 1)).view(h.shape).transpose(0, 1).sin()).square().mean((1, 2))

    p = prober(nn.Sequential(first, inner, out), forward, sides=4)
    assert sides.how_many(4, p.width, {"x": torch.randn(9, 5, 3)}) == 2
    assert sides.how_many(4, p.width, {"x": torch.randn(30, 5, 3)}) == 1
    with pytest.raises(SottoError) as caught:
        p.check({"x": torch.randn(30, 5, 3)})
    assert caught.value.code == "SOT655"


def test_a_loss_that_only_another_side_makes_infinite_is_seen():
    torch.manual_seed(0)
    first, inner, out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)
    torch.nn.init.uniform_(inner.weight, -0.04, 0.04)

    def forward(batch: Any) -> torch.Tensor:
        h = first(batch["x"])
        by_time = inner(h.transpose(0, 1).flatten(0, 1)).view(h.shape[1], len(h), 6).transpose(0, 1)
        return out(h + 1e-7 * (30 * by_time).exp()).square().mean((1, 2))

    with pytest.raises(SottoError) as caught:
        prober(nn.Sequential(first, inner, out), forward, sides=4).check({"x": torch.randn(4, 5, 3)})
    assert caught.value.code == "SOT655"


def test_a_batch_that_cannot_share_a_pass_goes_one_side_at_a_time(caplog: pytest.LogCaptureFixture):
    """Once is said, whatever number of batches follows; and what is wrong with one side too is an error."""
    torch.manual_seed(0)
    model, table = nn.Linear(3, 1), torch.ones(8, 1)

    def forward(batch: Any) -> torch.Tensor:
        return (model(batch["x"]) * table[: len(batch["x"])]).square()[:, 0]

    one, two = (prober(model, forward, sides=n) for n in (1, 2))
    for rows in (3, 5, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(two.differences({"x": x}, 0), one.differences({"x": x}, 0), rtol=1e-4, atol=1e-4)
    assert len(caplog.messages) == 1
    assert "one side at a time" in caplog.messages[0]
    with pytest.raises(RuntimeError, match="size of tensor"):
        two.differences({"x": torch.randn(9, 3)}, 0)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_check_sees_what_is_as_long_as_all_rows_by_chance(rows: int):
    """A table of places, of which each side would get a part, and which says too little for the losses to differ."""
    torch.manual_seed(0)
    table, places, out = nn.Embedding(11, 6), nn.Embedding(7, 6), nn.Linear(6, 1)
    nn.init.zeros_(places.weight)

    def forward(batch: Any) -> torch.Tensor:
        h = table(batch["x"]) + 1e-9 * places(torch.arange(batch["x"].shape[1]))
        return out(h.mean(1))[:, 0].square()

    batch = {"x": IDS[:rows, : 2 * rows] % 11}
    model = nn.Sequential(table, places, out)
    assert prober(model, forward, sides=2).differences(batch, 0).isfinite().all(), "nothing else finds it"
    with pytest.raises(SottoError) as caught:
        prober(model, forward, sides=2).check(batch)
    assert caught.value.code == "SOT653"


def test_the_check_sees_a_little_of_another_side():
    """Tokens by their time and then by their text: of the right number, and each in the place of another's."""
    torch.manual_seed(0)
    first, inner, out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(batch: Any, mixed: bool = True) -> torch.Tensor:
        h = first(batch["x"])
        by_time = h.transpose(0, 1) if mixed else h
        h = h + 1e-3 * inner(by_time.flatten(0, 1)).view(by_time.shape).transpose(0, int(mixed))
        return out(h).square().mean((1, 2))

    batch, model = {"x": torch.randn(4, 5, 3)}, nn.Sequential(first, inner, out)
    prober(model, forward).check(batch)
    prober(model, lambda b: forward(b, mixed=False), sides=4).check(batch)
    with pytest.raises(SottoError) as caught:
        prober(model, forward, sides=4).check(batch)
    assert caught.value.code == "SOT655"
    assert "one of several sides" in caught.value.what


def test_tokens_one_after_another_are_the_rows_they_come_from():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Embedding(11, 6), nn.Flatten(0, 1), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)),
        IDS % 11,
    )
    model.double()

    def forward(batch: Any) -> torch.Tensor:
        return model(batch["x"]).view(len(batch["x"]), -1).square().mean(1)

    one, four = (prober(model, forward, sides=n).differences({"x": x}, 0) for n in (1, 4))
    torch.testing.assert_close(four, one, rtol=1e-6, atol=1e-6)
