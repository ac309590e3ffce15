"""What becomes of the labels: sent as they are, randomised, or kept.

Randomised: K-ary randomised response (Warner 1965; Kairouz et al., arXiv 1407.1338) is epsilon-differentially private
for the label, and the vendor corrects its loss for it (Patrini et al., arXiv 1609.03683). Kept: the vendor sends scores
and gets back a noised gradient of the loss with respect to them; what that reveals of a label is a Gaussian mechanism,
because two labels give gradients that are exactly sqrt(2) apart, whatever scores the vendor sends.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F

from sotto.errors import SottoError
from sotto.privacy.bounds import gaussian_epsilon, gaussian_mu
from sotto.privacy.discrete import coin_exp
from sotto.privacy.events import check_number
from sotto.privacy.noise import NoiseSource

LABEL_DISTANCE = math.sqrt(2)
"""|(p - e_y) - (p - e_y')| for two different classes y and y'."""


def randomise(labels: Sequence[int], classes: int, epsilon: float, below: Callable[[int], int] = secrets.randbelow):
    """Returns each label, replaced by another class with probability (K - 1) / (e^epsilon + K - 1).

    By rejection: a uniform class is taken at once if it is the true one and with probability e^-epsilon otherwise, so
    the law is exact, with no float in it but epsilon itself.

    Args:
      labels: integers in [0, classes).
      below: uniform integers; a test may bring another source, and then nothing is private.

    Raises:
      SottoError: SOT401, epsilon is not a positive finite number.
    """
    exponent = Fraction(check_number("label epsilon", epsilon, above=0))
    return [_one(int(label), classes, exponent, below) for label in labels]


def _one(label: int, classes: int, exponent: Fraction, below: Callable[[int], int]) -> int:
    while True:
        drawn = below(classes)
        if drawn == label or coin_exp(exponent, below):
            return drawn


def corrected_loss(logits_BK: torch.Tensor, labels_B: torch.Tensor, epsilon: float | None) -> torch.Tensor:
    """Mean cross-entropy against labels that went through `randomise`: (), or plain if epsilon is None.

    The model's class probabilities are passed through the law of the randomisation before they are compared, so that
    the loss is least where they fit the true labels.
    """
    if epsilon is None:
        return F.cross_entropy(logits_BK, labels_B)
    classes = logits_BK.shape[1]
    # Stays finite for a large epsilon, where e^epsilon does not.
    other = math.exp(-epsilon) / (1 + (classes - 1) * math.exp(-epsilon))
    seen_BK = logits_BK.softmax(dim=1) * (1 - classes * other) + other
    return F.nll_loss(seen_BK.clamp_min(1e-30).log(), labels_B)


class LabelKeeper:
    """The customer's side of `labels: kept`: answers scores with noised gradients, each example so often and no more.

    Guarantee. For one label, all answers together are (epsilon, delta)-differentially private: `uses` Gaussian
    mechanisms of sensitivity sqrt(2) each, which compose exactly to one of sqrt(2 * uses).

    Attributes:
      std: of the noise on each number of a gradient.
    """

    def __init__(
        self, labels_E: torch.Tensor, classes: int, uses: int, epsilon: float, delta: float, noise: NoiseSource
    ):
        self._labels, self._classes, self._noise = labels_E, classes, noise
        self.uses, self.answers = uses, 0
        self._left = torch.full((len(labels_E),), uses, dtype=torch.int64)
        check_number("label epsilon", epsilon, above=0)
        check_number("label delta", delta, above=0, below=1)
        self.std = LABEL_DISTANCE * math.sqrt(uses) / gaussian_mu(epsilon, delta)
        self.epsilon = gaussian_epsilon(LABEL_DISTANCE * math.sqrt(uses) / self.std, delta)

    def spend(self, examples_B: torch.Tensor) -> None:
        """Counts an answer for each of the examples."""
        self._left[examples_B.to(torch.int64)] -= 1
        self.answers += 1

    def answer(self, examples_B: torch.Tensor, scores_BK: torch.Tensor) -> torch.Tensor:
        """Noised gradients of the summed cross-entropy with respect to the scores: (B, K) float32.

        Raises:
          SottoError: SOT801, the scores do not fit or are not finite, an example is asked for twice at once, or it has
            been answered as often as was paid for. Nothing is answered and nothing is counted then.
        """
        examples = examples_B.to(torch.int64)
        fits = (
            scores_BK.shape == (len(examples), self._classes)
            and bool(scores_BK.isfinite().all())
            and len(examples.unique()) == len(examples)
            and bool(((examples >= 0) & (examples < len(self._labels))).all())
        )
        if not fits or bool((self._left[examples] < 1).any()):
            raise SottoError(
                "SOT801",
                what="the vendor asked for gradients that were not agreed on"
                if not fits
                else f"the vendor asked for gradients of an example more than {self.uses} times",
                where="setting.labels: kept",
                why="every answer tells something about a label, and only so many are paid for",
                fix="stop; if this was no mistake, the vendor does not follow the protocol",
            )
        self.spend(examples)
        gradient = scores_BK.double().softmax(dim=1)
        gradient[torch.arange(len(examples)), self._labels[examples]] -= 1.0
        shape = tuple(gradient.shape)
        drawn = self._noise.normal(
            shape, self.std, step=self.answers, name="label gradient", device=torch.device("cpu")
        )
        return (gradient + drawn).float()
