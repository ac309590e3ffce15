"""Units that an audit plants among those of a dataset: four kinds, from what anyone could write to the worst case.

* `secret`: a sentence that can be read, with a code that a language model could give away (`codes`).
* `input`: random tokens, with a random class, or a beginning without loss and a random end with it.
* `new_token`: the same with a token that the model's vocabulary got for this canary alone. Nothing but the canary ever
  trains that token, so membership shows more clearly (Panda et al. 2025, arXiv 2503.06808).
* `gradient`: a unit whose loss is a number of the trained weights, times a large constant. Its gradient, once clipped,
  lies along a coordinate of its own: the Dirac canary, which the accounting is about, inside the real run (Nasr et al.
  2023, arXiv 2302.07956). Layer-wise, one coordinate of every layer that has enough of them. Slow: the parameter that
  holds the coordinates takes the engine's path for parameters that are used beyond the model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from sotto.config import Config
from sotto.data import LoadedData
from sotto.data.examples import Examples
from sotto.data.units import Units, ranges
from sotto.errors import SottoError
from sotto.gradients.base import ClippedSum
from sotto.gradients.clipping import Clipping
from sotto.training import Mechanism

Kind = Literal["secret", "input", "new_token", "gradient"]
LENGTH = 12
"""Tokens of a canary, half of them its beginning."""
STEEPNESS = 100.0
"""How many times longer than the clipping norm a gradient canary is before it is clipped."""


def make(
    config: Config, data: LoadedData, tokenizer: Any, count: int, generator: np.random.Generator, first_new: int = 0
) -> LoadedData:
    """Canaries of random tokens.

    Args:
      data: of the run, whose form they have.
      first_new: the first of `count` tokens that the model got for them; 0 for canaries without such a token.
    """
    usable = ordinary(tokenizer)
    length = min(LENGTH, config.data.max_length - 2)
    drawn = usable[generator.integers(len(usable), size=(count, length))]
    prompt = length // 2
    if first_new:
        drawn[:, prompt:] = (first_new + np.arange(count))[:, None]
    first, last = ends(tokenizer)
    sequences = [[*first, *row.tolist(), *last] for row in drawn]
    classes = len(config.data.labels or ())
    labels = None if config.data.task == "generation" else generator.integers(classes, size=count)
    examples = Examples.build(
        sequences,
        rows=[-1] * count,
        token_type_ids=None if data.examples.token_type_ids is None else [[0] * len(s) for s in sequences],
        prompt_lengths=[len(first) + prompt] * count if labels is None else None,
        labels=labels,
    )
    units, _ = Units.build(None, count, 1, 0)
    return dataclasses.replace(data, examples=examples, units=units)


def ordinary(tokenizer: Any) -> np.ndarray:
    """Tokens that are not special ones."""
    special = set(tokenizer.all_special_ids)
    return np.array([token for token in range(len(tokenizer)) if token not in special])


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and after a text."""
    first = [t for t in (tokenizer.cls_token_id, tokenizer.bos_token_id) if t is not None][:1]
    return first, [t for t in (tokenizer.sep_token_id,) if t is not None]


def among(data: LoadedData, canaries: LoadedData, chosen: np.ndarray) -> LoadedData:
    """The data with the chosen canaries after it, each a unit of its own."""
    a, b, n = data.examples, canaries.examples, len(data.examples)
    tokens = ranges(b.offsets[chosen], b.lengths[chosen])
    examples = Examples(
        input_ids=np.concatenate([a.input_ids, b.input_ids[tokens]]),
        offsets=np.concatenate([a.offsets, a.offsets[-1] + np.cumsum(b.lengths[chosen])]),
        token_type_ids=None
        if a.token_type_ids is None or b.token_type_ids is None
        else np.concatenate([a.token_type_ids, b.token_type_ids[tokens]]),
        prompt_lengths=np.concatenate([a.prompt_lengths, b.prompt_lengths[chosen]]),
        labels=None if a.labels is None or b.labels is None else np.concatenate([a.labels, b.labels[chosen]]),
        rows=np.concatenate([a.rows, b.rows[chosen]]),
    )
    units = Units(
        np.concatenate([data.units.offsets, data.units.offsets[-1] + np.arange(1, len(chosen) + 1)]),
        np.concatenate([data.units.members, n + np.arange(len(chosen))]),
    )
    return dataclasses.replace(data, examples=examples, units=units)


@dataclass
class Diracs:
    """Gradient canaries of one run, and what an attacker who sees every release adds up.

    Attributes:
      parameters: of the engine.
      places: parameter -> (n,) coordinate of each canary in it. One parameter of every group that is used.
      groups: how many groups are clipped on their own.
      clip_norm: of the configuration.
      first: index of the first planted example.
      planted: (m,) the canaries that are planted, in the order of their examples.
      scores: (n,) sums over the steps, in clipping norms.
    """

    parameters: dict[str, torch.nn.Parameter]
    places: dict[str, np.ndarray]
    groups: int
    clip_norm: float
    first: int
    planted: np.ndarray
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(next(iter(self.places.values()))))

    @property
    def strength(self) -> float:
        """What a canary adds to its score in a step that draws it, in clipping norms."""
        return math.sqrt(len(self.places) / self.groups)

    @classmethod
    def build(
        cls, engine: Any, clip_norm: float, first: int, planted: np.ndarray, count: int, generator: np.random.Generator
    ) -> Diracs:
        """Draws `count` coordinates, all different, in the smallest parameter of every group that has so many.

        Raises:
          SottoError: SOT707, no parameter has so many numbers.
        """
        clipping: Clipping = engine.clipping
        fitting: dict[int, list[str]] = {}
        group_of = clipping.group_of(engine.parameters)
        for name, group in group_of.items():
            if engine.parameters[name].numel() >= count:
                fitting.setdefault(group, []).append(name)
        if not fitting:
            raise SottoError(
                "SOT707", what=f"{count} gradient canaries, and no trained parameter has so many numbers",
                where="--plant", why="every canary needs a coordinate of its own", fix="plant fewer of them",
            )  # fmt: skip
        chosen = [min(names, key=lambda name: engine.parameters[name].numel()) for names in fitting.values()]
        places = {name: generator.choice(engine.parameters[name].numel(), count, replace=False) for name in chosen}
        return cls(dict(engine.parameters), places, len({*group_of.values()}), clip_norm, first, planted)

    def losses(self, losses_B: torch.Tensor, examples: np.ndarray) -> torch.Tensor:
        """The losses, with those of canaries replaced by their numbers. The text of a canary has no part in it.

        Every loss has the parameters of the canaries in its graph, so that no batch surprises the engine.
        """
        rows = np.flatnonzero(examples >= self.first)
        at = np.zeros(len(examples), np.int64)
        at[rows] = self.planted[examples[rows] - self.first]
        mine_B = losses_B.new_zeros(len(examples))
        for name, place in self.places.items():
            where_B = torch.from_numpy(place[at]).to(losses_B.device)
            mine_B = mine_B + self.parameters[name].reshape(-1)[where_B].to(losses_B.dtype)
        canary_B = torch.zeros(len(examples), dtype=torch.bool, device=losses_B.device)
        canary_B[torch.from_numpy(rows)] = True
        return torch.where(canary_B, STEEPNESS * self.clip_norm * mine_B, losses_B)

    def hear(self, released: dict[str, torch.Tensor], divisor: float, sensitivity: float) -> None:
        """Adds up a step's release along the canaries' coordinates, in clipping norms.

        The noise on a score is that on one coordinate.
        """
        step = np.zeros(len(self.scores))
        for name, place in self.places.items():
            value = released[name].reshape(-1)
            step += value[torch.from_numpy(place).to(value.device)].double().cpu().numpy()
        self.scores += step * divisor / sensitivity / math.sqrt(len(self.places))


class Overheard:
    """A run's mechanism whose releases are attacked as they are made."""

    def __init__(self, mechanism: Mechanism, diracs: Diracs, divisor: float):
        self._mechanism, self._diracs, self._divisor = mechanism, diracs, divisor

    def privatize(self, total: ClippedSum, step: int) -> dict[str, torch.Tensor]:
        """As the run's own mechanism does."""
        sensitivity = total.sensitivity
        released = self._mechanism.privatize(total, step)
        self._diracs.hear(released, self._divisor, sensitivity)
        return released
