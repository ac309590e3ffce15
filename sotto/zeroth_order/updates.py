"""From released numbers to weights, and from their log to the same weights again.

A step's release is K numbers g, for each part of the tensors. The gradient that they stand for is, in each part,
sum_k g_k u_k / sqrt(K), times the root of the number of parts: for numbers that were not
clipped its mean over directions is the gradient of the smoothed loss, and noise of deviation s on each number becomes
noise of deviation s on each weight, whatever K is. Centred numbers (`probes`) added up to zero before there was noise
on them: their mean is noise alone and is taken away, and the rest is over sqrt(K - 1). SGD, momentum and AdamW on it
are post-processing, and so are stages (`presets`, DP-ZOPO): each halves the rate, and pulls the weights towards where
it began.

The start, the key of the directions and the log of all g determine the weights: a checkpoint is the log, 4 K bytes a
step. Replaying it gives the same bits on every device and under every sharding: sums over k have one order, and every
operation, in the type of the weights, is one that IEEE 754 rounds in one way. None is fused with another, and nothing
is divided by a number that is the same for all entries, because GPUs multiply with its reciprocal instead.

No gradient is ever whole: weights are updated a chunk at a time, so SGD needs no memory that grows with the model. With
one direction its step is a multiple of that, and is added to the weights themselves.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping

import torch
from torch import nn

from sotto.config import RunSection
from sotto.errors import SottoError
from sotto.optim import learning_rate
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.perturb import DEVICE_BLOCK
from sotto.zeroth_order.presets import PRESETS, Preset, stage_lengths
from sotto.zeroth_order.release import NAME
from sotto.zeroth_order.small import Group, groups

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's own for AdamW
LOG, START = "log", "start"
CHUNK = 1 << 20
"""Weights that are updated at a time on a CPU."""


class _Single:
    """A tensor that is moved alone, a chunk at a time; with what a `Group` has."""

    def __init__(self, name: str, parameter: nn.Parameter, directions: Directions):
        self.names, self._parameter, self._directions = [name], parameter, directions
        self.chunk = DEVICE_BLOCK if parameter.is_cuda else CHUNK

    def empty(self) -> torch.Tensor:
        return self._parameter.detach().new_empty(self._parameter.numel())

    def views(self, flat_e: torch.Tensor) -> list[torch.Tensor]:
        return [flat_e.view(self._parameter.shape)]

    def weights(self) -> torch.Tensor:
        """(e,) the tensor's own elements."""
        return self._parameter.detach().view(-1)

    def put(self, flat_e: torch.Tensor) -> torch.Tensor:
        return flat_e.copy_(self.weights())

    def take(self, flat_e: torch.Tensor) -> None:
        """Its elements are in the tensor already."""

    def add(self, step: int, k: int, factor: float, flat_e: torch.Tensor, first: int = 0) -> None:
        self._directions.add(self.names[0], step, k, factor, flat_e, first, flat_e, exact=True)


class Updates:
    """Applies releases to the weights, and keeps their log. It has the interface of `sotto.optim.Optimizer`.

    Attributes:
      log: a float32 tensor of released numbers for each step so far.
      state: what the optimizer holds, for weights that are moved together or one that is moved alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        directions: Directions,
        run: RunSection,
        steps: int,
        preset: Preset | None = None,
    ):
        """Takes the weights as they are for the start.

        Raises:
          SottoError: SOT605, a trainable weight is in half precision.
        """
        self.parameters, self.directions, self.run, self.steps = dict(parameters), directions, run, steps
        for name, p in self.parameters.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise SottoError(
                    "SOT605", what=f"the trainable parameter is stored in {p.dtype}", where=f"'{name}'",
                    why="a private update is small beside the weight and would vanish in half precision",
                    fix="keep trainable parameters in float32; frozen ones may be in any type",
                )  # fmt: skip
            if not p.is_contiguous():  # chunks are of flat elements
                p.data = p.data.contiguous()
        together = groups(self.parameters, directions, exact=True)
        alone = self.parameters.keys() - {name for group in together for name in group.names}
        single = [_Single(name, p, directions) for name, p in self.parameters.items() if name in alone]
        self._places: list[Group | _Single] = [*together, *single]
        kinds = ["exp_avg", "exp_avg_sq"] if run.optimizer == "adamw" else ["momentum"] * (run.momentum > 0)
        self.preset = preset or PRESETS["aggzo"]
        self.state = [{kind: place.empty().zero_() for kind in kinds} for place in self._places]
        self._averages = [place.put(place.empty()) for place in self._places] if run.ema_decay else []
        self.stage_starts = list(itertools.accumulate([0, *stage_lengths(steps, self.preset.stages)[:-1]]))
        self._anchor()
        self.log: list[torch.Tensor] = []

    def _anchor(self) -> None:
        """Here a stage begins."""
        if self.preset.proximal:
            for place, held in zip(self._places, self.state, strict=True):
                if "anchor" not in held:
                    held["anchor"] = place.empty()
                place.put(held["anchor"])

    @property
    def ema(self) -> dict[str, torch.Tensor]:
        """Name -> moving average of a parameter; empty where there is none."""
        found = {
            name: view
            for place, flat_e in zip(self._places if self._averages else [], self._averages, strict=True)
            for name, view in zip(place.names, place.views(flat_e), strict=True)
        }
        return {name: found[name] for name in self.parameters if found}

    def step(self, update: Mapping[str, torch.Tensor], step: int) -> None:
        """Applies one release: `update["directions"]` is (K,), of each part. Steps come one after another, from 0."""
        assert step == len(self.log)
        assert self.start is not None  # taken now if nobody has asked for it: from here on the weights are others
        g_K = update[NAME].detach().float().cpu()
        self.log.append(g_K)
        if step and step in self.stage_starts:
            self._anchor()
        with torch.no_grad():
            for i, place in enumerate(self._places):
                weights_e = place.weights()
                self._move(place, weights_e, self.state[i], step, self._numbers(place.names[0], g_K))
                place.take(weights_e)
                if self._averages:
                    decay = min(self.run.ema_decay, (1 + step) / (10 + step))
                    self._averages[i].add_(weights_e.sub(self._averages[i]).mul_(1 - decay))

    def _move(
        self,
        place: Group | _Single,
        weights_e: torch.Tensor,
        held: dict[str, torch.Tensor],
        step: int,
        numbers: list[float],
    ) -> None:
        if self._at_once:
            place.add(step, 0, -self._rate(step) * numbers[0], weights_e)
            return
        for start in range(0, len(weights_e), place.chunk):
            at = slice(start, min(start + place.chunk, len(weights_e)))
            gradient_e = torch.zeros_like(weights_e[at])
            for k, g in enumerate(numbers):
                place.add(step, k, g, gradient_e, start)
            self._apply(weights_e[at], gradient_e, {kind: flat_e[at] for kind, flat_e in held.items()}, step)

    @property
    def _at_once(self) -> bool:
        """Whether a step is one multiple of one direction, which is added to the weights themselves."""
        run = self.run
        plain = run.optimizer == "sgd" and not run.momentum and not run.weight_decay and not self.preset.proximal
        return plain and self.directions.count == 1

    def _rate(self, step: int) -> float:
        return learning_rate(self.run, step, self.steps) * 0.5 ** (sum(s <= step for s in self.stage_starts) - 1)

    def _numbers(self, name: str, g_K: torch.Tensor) -> list[float]:
        """What each direction is multiplied with, for the gradient of a tensor: g / root, of its part's numbers."""
        first = self.directions.part[name] * self.directions.count
        numbers = g_K[first : first + self.directions.count].double().tolist()
        mean = math.fsum(numbers) / len(numbers) if self.directions.centred else 0.0
        return [(number - mean) / self.directions.root for number in numbers]

    def _apply(self, weights: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], step: int) -> None:
        """One chunk. Each line is one operation, so that no device fuses two of them."""
        rate, run = self._rate(step), self.run
        if self.preset.proximal:
            gradient.add_(weights.sub(state["anchor"]).mul_(self.preset.proximal))
        if run.optimizer == "adamw":
            if run.weight_decay:
                weights.mul_(1 - rate * run.weight_decay)
            first = _blend(state["exp_avg"], gradient, BETAS[0])
            second = _blend(state["exp_avg_sq"], gradient.square(), BETAS[1])
            size = second.mul(1 / (1 - BETAS[1] ** (step + 1))).sqrt_()
            change = first.mul(1 / (1 - BETAS[0] ** (step + 1))).div_(size.add_(EPS))
        else:
            if run.weight_decay:
                gradient.add_(weights.mul(run.weight_decay))
            change = gradient
            if run.momentum:
                change = state["momentum"].mul_(run.momentum).add_(gradient).clone()
        weights.sub_(change.mul_(rate))

    def final_weights(self) -> dict[str, torch.Tensor]:
        """What the run releases: the moving average if there is one, else the last weights."""
        return self.ema or {n: p.detach() for n, p in self.parameters.items()}

    # ---- the log

    def stored_weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the weights: nothing, the log has it all."""
        return {}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The log, (steps, K) float32, and the fingerprint of the start: all that a checkpoint needs."""
        log = torch.stack(self.log) if self.log else torch.zeros(0, self.directions.width)
        return {LOG: log, START: self.start}

    def restore(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes all steps of a log, from the start.

        Args:
          weights: those of the checkpoint; there are none.
          tensors: what `state_tensors` gave.

        Raises:
          SottoError: SOT656, this is not the start of that run, its directions are others, or the log is no log.
        """
        log, start = tensors.get(LOG), tensors.get(START)
        known = start is not None and torch.equal(start, self.start) and not (self.log or weights)
        if not known or log is None or log.dim() != 2 or log.shape[1] != self.directions.width:
            raise SottoError(
                "SOT656", what="the log of releases belongs to other weights or directions", where="checkpoints",
                why="replayed on another start it gives weights that were never trained",
                fix="use the base model, config.yaml and version of Sotto that the run began with",
            )  # fmt: skip
        for step, g_K in enumerate(log):
            self.step({NAME: g_K}, step)

    @functools.cached_property
    def start(self) -> torch.Tensor:
        """(32,) uint8 fingerprint of the weights before the first step, and of the directions."""
        spec = {"directions": self.directions.spec(), "run": self.run.model_dump(mode="json"), "steps": self.steps}
        spec["stages"], spec["proximal"] = self.preset.stages, self.preset.proximal
        if self._at_once:
            spec["update"] = "at once"  # logs from before, which were rounded once more, are refused
        for key in (
            "microbatch_size",
            "memory",
            "checkpoint_every",
            "device",
            "patience",
            "look_every",
        ):  # these change no number
            spec["run"].pop(key)
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
        for name, p in self.parameters.items():
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
            bytes_n = p.detach().cpu().contiguous().view(-1).numpy().view("uint8")
            digest.update(bytes_n.data)  # not a copy, which could be the peak of a run
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _blend(held: torch.Tensor, new: torch.Tensor, keep: float) -> torch.Tensor:
    """Moves what is held towards `new`, and returns what is held."""
    return held.mul_(keep).add_(new.mul(1 - keep))
