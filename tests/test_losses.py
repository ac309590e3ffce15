"""One loss per example, and none of them knows of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sotto import losses


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 2, 3, 4], [1, 2, 3, -100, -100], [-100] * 5])
    return logits, labels


def test_classification_is_cross_entropy_without_the_mean() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = losses.classification(logits, labels)
    assert found.shape == (4,)
    assert torch.allclose(found.mean(), F.cross_entropy(logits, labels))


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
