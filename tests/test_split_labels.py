"""Labels that are randomised or kept, and tokens that are chosen: laws, counts, and budgets that end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sotto.errors import SottoError
from sotto.privacy.bounds import gaussian_epsilon
from sotto.privacy.noise import DebugNoise, SecureNoise
from sotto.split import importance
from sotto.split.labels import LABEL_DISTANCE, LabelKeeper, corrected_loss, randomise


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (5, 0.3), (3, 4.0)])
def test_randomised_response_has_its_law(classes: int, epsilon: float) -> None:
    trials = 20_000
    for label in range(classes):
        counts = np.bincount(randomise([label] * trials, classes, epsilon), minlength=classes)
        keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
        expected = np.full(classes, (1 - keep) / (classes - 1))
        expected[label] = keep
        deviation = np.sqrt(trials * expected * (1 - expected))
        assert (np.abs(counts - trials * expected) < 5.5 * deviation).all()
        twin = math.exp(2 * epsilon) / (math.exp(2 * epsilon) + classes - 1)
        if abs(twin - keep) > 0.02:
            assert abs(counts[label] - trials * twin) > 5.5 * deviation[label]


def test_the_corrected_loss_is_least_at_the_truth() -> None:
    """Trained on randomised labels, the probabilities come out as those of the true ones; plain training's do not."""
    generator = torch.Generator().manual_seed(0)
    true = (torch.rand(40_000, generator=generator) < 0.9).long()
    noisy = torch.tensor(randomise(true.tolist(), 2, 1.0))
    found = {}
    for epsilon in (1.0, None):
        logit = torch.zeros(1, 2, requires_grad=True)
        optimizer = torch.optim.LBFGS([logit], max_iter=50)

        def closure(logit: torch.Tensor = logit, optimizer: torch.optim.LBFGS = optimizer, e: float | None = epsilon):
            optimizer.zero_grad()
            loss = corrected_loss(logit.expand(len(noisy), 2), noisy, e)
            loss.backward()
            return loss

        optimizer.step(closure)
        found[epsilon] = float(logit.detach().softmax(1)[0, 1])
    assert found[1.0] == pytest.approx(0.9, abs=0.032)  # six standard errors: of 40,000 randomised labels it has 0.005
    assert found[None] < 0.75


def test_a_huge_epsilon_is_no_correction() -> None:
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    assert corrected_loss(logits, labels, 5000.0) == pytest.approx(
        float(corrected_loss(logits, labels, None)), rel=1e-5
    )


def keeper(noise: object = None, uses: int = 3, epsilon: float = 2.0) -> LabelKeeper:
    labels = torch.arange(12) % 3
    return LabelKeeper(labels, 3, uses, epsilon, 1e-5, noise or DebugNoise(0))  # type: ignore[arg-type]


def test_answers_are_gradients_and_noise() -> None:
    kept, scores = keeper(uses=1), torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.nn.functional.cross_entropy(scores, torch.arange(12) % 3, reduction="sum").backward()
    got = kept.answer(torch.arange(12), scores.detach())
    drawn = DebugNoise(0).normal((12, 3), kept.std, step=1, name="label gradient", device=torch.device("cpu"))
    assert scores.grad is not None
    assert torch.allclose(got, (scores.grad + drawn).float(), atol=1e-5)


def test_two_labels_are_sqrt_two_apart_and_the_noise_is_scaled_to_that() -> None:
    scores = torch.randn(1, 3, generator=torch.Generator().manual_seed(1)) * 7
    p = scores.double().softmax(1)
    apart = [(p - torch.eye(3)[a]) - (p - torch.eye(3)[b]) for a in range(3) for b in range(3) if a != b]
    assert all(float(d.norm()) == pytest.approx(LABEL_DISTANCE) for d in apart)
    kept = keeper(uses=5)
    # Five Gaussian releases of sensitivity sqrt(2) are one of sqrt(10).
    assert kept.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(10) / kept.std, 1e-5))
    assert 1.999 < kept.epsilon <= 2.0 + 1e-9


def test_the_noise_on_answers_has_its_deviation() -> None:
    kept = LabelKeeper(torch.zeros(20_000, dtype=torch.int64), 2, 1, 1.0, 1e-5, SecureNoise())
    scores = torch.zeros(20_000, 2)
    drawn = kept.answer(torch.arange(20_000), scores) - torch.tensor([-0.5, 0.5])
    assert float(drawn.std()) == pytest.approx(kept.std, rel=0.02)


@pytest.mark.parametrize(
    ("examples", "scores"),
    [
        (torch.tensor([0, 0]), torch.zeros(2, 3)),
        (torch.tensor([0, 12]), torch.zeros(2, 3)),
        (torch.tensor([-1]), torch.zeros(1, 3)),
        (torch.tensor([0]), torch.zeros(1, 4)),
        (torch.tensor([0]), torch.full((1, 3), math.nan)),
        (torch.tensor([0]), torch.full((1, 3), math.inf)),
    ],
)
def test_what_was_not_agreed_on_is_not_answered(examples: torch.Tensor, scores: torch.Tensor) -> None:
    kept = keeper(uses=1)
    with pytest.raises(SottoError) as caught:
        kept.answer(examples, scores)
    assert caught.value.code == "SOT801"
    kept.answer(torch.arange(12), torch.zeros(12, 3))  # nothing was counted


def test_no_example_is_answered_more_often_than_paid_for() -> None:
    kept = keeper(uses=2)
    kept.answer(torch.tensor([1, 2]), torch.zeros(2, 3))
    kept.answer(torch.tensor([2, 3]), torch.zeros(2, 3))
    with pytest.raises(SottoError, match="more than 2 times"):
        kept.answer(torch.tensor([1, 2]), torch.zeros(2, 3))
    kept.answer(torch.tensor([1, 3]), torch.zeros(2, 3))


# ---- contributing tokens


def texts(seed: int = 0, count: int = 3000) -> tuple[list[np.ndarray], list[int]]:
    """Token 10 belongs to class 0, token 11 to class 1; 12 is frequent everywhere; 13 is rare and in class 1 only."""
    generator = np.random.default_rng(seed)
    out, labels = [], []
    for i in range(count):
        label = int(generator.integers(2))
        ids = generator.integers(20, 200, 8)
        ids[0] = 12
        if generator.random() < 0.5:
            ids[1] = 10 + label
        if i == 7:
            ids[2], label = 13, 1
        out.append(ids)
        labels.append(label)
    return out, labels


def test_tokens_of_one_class_score_and_frequent_ones_do_not() -> None:
    found = importance.scores(importance.class_counts(*texts(), classes=2, vocabulary=200))
    assert importance.contributing(found, 1 / 200, special=[]).tolist() == [10, 11]
    assert abs(found[0, 12]) < 0.1
    assert found[1, 13] < found[1, 11], "one sighting proves nothing"


def test_the_published_constant_would_list_frequent_tokens() -> None:
    counts = importance.class_counts(*texts(), classes=2, vocabulary=200)
    wrong = counts[0] / (counts[1] + 1e10 - 5)
    assert int(wrong.argmax()) == 12
    assert int(importance.scores(counts)[0].argmax()) == 10


def test_the_score_is_the_log_ratio() -> None:
    counts = np.array([[30.0, 5, 0], [20, 40, 2], [25, 25, 4]])
    b, v = 1.0, 3
    f = (counts + b) / (counts.sum(1, keepdims=True) + b * v)
    for c in range(3):
        for t in range(3):
            slow = sum(math.log(f[c, t] / f[d, t]) for d in range(3) if d != c) * min(1, counts[c, t] / 20)
            assert importance.scores(counts)[c, t] == pytest.approx(slow)


def test_special_tokens_are_never_chosen() -> None:
    found = importance.scores(importance.class_counts(*texts(), classes=2, vocabulary=200))
    assert 10 not in importance.contributing(found, 1 / 200, special=[10])


def test_one_text_moves_the_counts_by_no_more_than_the_sensitivity() -> None:
    long = np.arange(100)
    one = importance.class_counts([long], [0], 2, 200, most=16)
    other = importance.class_counts([np.repeat(long[::-1], 3)], [1], 2, 200, most=16)
    assert one.sum() == other.sum() == 16
    assert np.linalg.norm(one - other) == pytest.approx(math.sqrt(32))


def test_private_selection_finds_the_obvious_and_pays_for_it() -> None:
    chosen = importance.select_privately(
        *texts(), 2, 200, share=1 / 200, special=[], epsilon=2.0, delta=1e-5, noise=SecureNoise()
    )
    assert chosen.tokens.tolist() == [10, 11]
    assert chosen.epsilon == pytest.approx(2.0, rel=1e-6)
    assert chosen.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(32) / chosen.std, 1e-5))


def test_a_token_of_one_text_is_practically_never_chosen() -> None:
    """3 deviations are taken off each count, so that one sighting among 200 empty counts does not get through."""
    for seed in range(20):
        chosen = importance.select_privately(
            *texts(count=200), 2, 200, share=0.1, special=[], epsilon=1.0, delta=1e-5, noise=DebugNoise(seed)
        )
        assert 13 not in chosen.tokens
