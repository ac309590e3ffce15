"""One loss per example, and none of them knows of the others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import ALGORITHMS, check
from torch import nn

from sotto import losses


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 2, 3, 4], [1, 2, 3, -100, -100], [-100] * 5])
    return logits, labels


def test_classification_is_cross_entropy_without_the_mean() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = losses.classification(logits, labels)
    assert torch.allclose(found, torch.stack([F.cross_entropy(logits[i], labels[i]) for i in range(4)]))


def test_language_is_the_mean_over_each_examples_own_tokens() -> None:
    logits, labels = batch()
    found = losses.language(logits, labels)
    first = F.cross_entropy(logits[0, 1:4], labels[0, 2:5])
    second = F.cross_entropy(logits[1, 0:2], labels[1, 1:3])
    assert torch.allclose(found, torch.stack([first, second, torch.tensor(0.0)]))


def test_an_example_without_a_token_has_loss_zero_and_a_gradient_of_zero() -> None:
    logits, labels = batch()
    logits.requires_grad_()
    losses.language(logits, labels).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[2].abs().max()) == 0
    assert bool(logits.grad.isfinite().all())


def test_padding_and_neighbours_do_not_matter() -> None:
    logits, labels = batch()
    alone = losses.language(logits[:1], labels[:1])
    longer = F.pad(logits, (0, 0, 0, 3), value=9.0), F.pad(labels, (0, 3), value=-100)
    assert torch.equal(losses.language(logits, labels)[:1], alone)
    assert torch.allclose(losses.language(*longer)[:1], alone)


def test_tokens_are_counted() -> None:
    logits, labels = batch()
    values, counts = losses.token_losses(logits, labels)
    assert counts.tolist() == [3, 2, 0]
    assert values.shape == (3, 5)
    assert [int((row != 0).sum()) for row in values] == [3, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = batch()
    assert losses.language(logits.to(dtype), labels).dtype == torch.float32
    assert losses.classification(logits[:, 0].to(dtype), torch.tensor([0, 1, 2])).dtype == torch.float32


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One example and one token at a time."""
    total = []
    for row, targets in zip(logits, labels, strict=True):
        kept = [F.cross_entropy(row[t], targets[t + 1]) for t in range(len(targets) - 1) if targets[t + 1] != -100]
        total.append(torch.stack(kept).mean() if kept else row.sum() * 0)
    return torch.stack(total)


@pytest.mark.parametrize("chunk", [1, 20, 1 << 20])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 3.0]], ids=str)
def test_the_gradient_is_that_of_cross_entropy(
    weights: list[float], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    logits, labels = batch()
    logits = logits.double().requires_grad_()
    before, weight_B = logits.detach().clone(), torch.tensor(weights, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(reference(logits, labels), logits, weight_B)
    found = losses.language(logits, labels)
    torch.testing.assert_close(found, reference(logits, labels))
    for retain in (True, False):
        (grad,) = torch.autograd.grad(found, logits, weight_B, retain_graph=retain)
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    assert torch.equal(logits, before), "only our own training may overwrite"


def test_the_gradient_of_half_precision_logits() -> None:
    logits, labels = batch()
    logits = logits.bfloat16().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(logits.float(), labels).sum(), logits)
    (grad,) = torch.autograd.grad(losses.language(logits, labels).sum(), logits)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=1e-3)


class Tiny(nn.Module):
    """What `forward_losses` needs of a language model. `after` is what the family does to its logits."""

    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.after = after
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.after(self.head(torch.tanh(self.body(self.embed(input_ids))))))


AFTER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_it_is": lambda x: x,
    "float": lambda x: x.double(),
    "scaled": lambda x: x * 0.3,
    "capped": lambda x: torch.tanh(x / 2) * 2,
    "kept": lambda x: torch.tanh(x),
    "kept_and_viewed": lambda x: torch.sigmoid(x).view(x.shape),
    "sliced": lambda x: x[..., :7],
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", AFTER)
def test_training_losses_of_any_family(name: str, frozen: bool) -> None:
    model, (_, labels) = Tiny(AFTER[name]), batch()
    model.head.requires_grad_(not frozen)
    ids, parameters = labels.clamp(min=0), [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(reference(model(ids).logits, labels).sum(), parameters)
    for _ in range(2):
        found = losses.forward_losses(model, {"input_ids": ids, "labels": labels}, "generation")
        torch.testing.assert_close(found, reference(model(ids).logits, labels))
        for grad, expected in zip(torch.autograd.grad(found.sum(), parameters), wanted, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
    assert "forward" not in model.head.__dict__


@pytest.mark.parametrize(("name", "frozen", "copies"), [("as_it_is", False, 1), ("as_it_is", True, 0)])
def test_how_many_tensors_of_the_size_of_the_logits_are_kept(name: str, frozen: bool, copies: int) -> None:
    model, (_, labels) = Tiny(AFTER[name]), batch()
    model.head.requires_grad_(not frozen)
    kept: set[int] = set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == labels.numel() * 7:
            kept.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = losses.forward_losses(model, {"input_ids": labels.clamp(min=0), "labels": labels}, "generation")
    assert len(kept) == copies
    assert found.requires_grad


def test_a_frozen_head_takes_no_logits_of_tokens_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, labels) = Tiny(), batch()
    model.head.requires_grad_(False)
    seen: list[int] = []
    right = losses._to_gradient

    def noted(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return right(logits, *rest)

    monkeypatch.setattr(losses, "_to_gradient", noted)
    losses.forward_losses(model, {"input_ids": labels.clamp(min=0), "labels": labels}, "generation")
    assert sum(seen) == 5


@pytest.mark.parametrize("chunk", [1, 20, 1 << 20])
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("name", AFTER)
def test_losses_without_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, in_rows: bool, frozen: bool, looked: bool, chunk: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    model, (_, labels) = Reads(AFTER[name]), batch()
    model.head.requires_grad_(not frozen)
    ids = labels.clamp(min=0)
    if looked:
        losses.look_at_head(model, torch.device("cpu"))
    rows: list[int] = []
    with torch.no_grad():
        wanted = reference(model(ids).logits, labels)
        right = F.linear
        monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(x[..., 0].numel()) or right(x, *rest))
        found = losses.forward_losses(model, {"input_ids": ids, "labels": labels}, "generation", in_rows)
    torch.testing.assert_close(found, wanted)
    lean = looked and (frozen or in_rows) and name in ("as_it_is", "float")
    assert set(rows[1:]) == {5 if lean else ids.numel()}, "the body, and then the head: of tokens with a loss alone"
    assert "forward" not in model.head.__dict__
    with torch.no_grad():
        nothing = {"input_ids": ids, "labels": torch.full_like(labels, losses.IGNORED)}
        assert not losses.forward_losses(model, nothing, "generation", in_rows).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_losses_without_gradients_of_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """In whichever part of the vocabulary: their own example has no number, and the others have theirs."""
    monkeypatch.setattr(losses, "CHUNK", 1)
    model, (ids, labels) = Reads(), (torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    losses.look_at_head(model, torch.device("cpu"))
    with torch.no_grad():
        wanted = losses.forward_losses(model, {"input_ids": ids, "labels": labels}, "generation", in_rows=True)
        model.embed.weight[4] = bad
        model.body.weight.abs_()
        found = losses.forward_losses(model, {"input_ids": ids, "labels": labels}, "generation", in_rows=True)
    assert wanted.isfinite().all()
    assert found[0].isfinite()
    if bad != bad:
        assert not found[1].isfinite()


class Reads(Tiny):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return super().forward(input_ids)


def test_a_head_with_a_hook_or_another_forward_is_left_alone() -> None:
    model, (_, labels) = Tiny(), batch()
    model.head.requires_grad_(False)
    calls: list[int] = []
    model.head.register_forward_hook(lambda *args: calls.append(1))
    losses.forward_losses(model, {"input_ids": labels.clamp(min=0), "labels": labels}, "generation")
    assert calls == [1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_example_that_is_not_finite_spoils_no_other(frozen: bool, bad: float) -> None:
    model, (_, labels) = Tiny(), batch()
    model.head.requires_grad_(not frozen)
    weight = model.embed.weight
    with torch.no_grad():
        weight[5] = bad
    ids = labels.clamp(min=0)
    ids[0, 2] = 5  # only in the first example
    found = losses.forward_losses(model, {"input_ids": ids, "labels": labels}, "generation")
    alone = losses.forward_losses(model, {"input_ids": ids[1:], "labels": labels[1:]}, "generation")
    torch.testing.assert_close(found[1:], alone)
    assert not bool(found[0].isfinite())


@pytest.mark.parametrize("algorithm", [*ALGORITHMS])
@pytest.mark.parametrize("frozen", [False, True])
def test_clipped_sums_of_our_own_losses(frozen: bool, algorithm: str) -> None:
    model, (_, labels) = Tiny(), batch()
    model.head.requires_grad_(not frozen)
    labels = labels[:2].repeat(2, 1) + (torch.arange(4) % 2)[:, None] * (labels[:2].repeat(2, 1) > 0)

    def own(rows: torch.Tensor) -> torch.Tensor:
        rows_of = {"input_ids": labels[rows].clamp(min=0), "labels": labels[rows]}
        return losses.forward_losses(model, rows_of, "generation")

    check(model, own, 4, algorithm=algorithm, units=torch.tensor([0, 1, 0, 2]), tolerance=1e-10)


def test_evaluation_builds_no_gradient() -> None:
    model, (_, labels) = Tiny(), batch()
    with torch.no_grad():
        found = losses.forward_losses(model, {"input_ids": labels.clamp(min=0), "labels": labels}, "generation")
        torch.testing.assert_close(found, reference(model(labels.clamp(min=0)).logits, labels))
