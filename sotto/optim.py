"""Optimizers on already private updates. Everything here is post-processing: it costs no privacy.

The optimizers are torch's own; the update is handed to them as `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from sotto.config import RunSection
from sotto.errors import SottoError


def learning_rate(run: RunSection, step: int, steps: int) -> float:
    """The learning rate of a step under `run.schedule`, after a linear warm-up.

    Args:
      run: as `Config.stepping` gives it.
    """
    assert run.learning_rate is not None
    warmup = math.ceil(run.warmup_ratio * steps)
    if step < warmup:
        return run.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return run.learning_rate * factor[run.schedule]


class Yogi(torch.optim.Optimizer):
    """AdamW with an additive second moment, v - (1 - b2) sign(v - g^2) g^2 (Zaheer et al. 2018; FedYogi, Reddi et al.
    2021, arXiv:2003.00295, algorithm 2, whose constants are used here): a large update raises the scale at once, and
    small ones lower it slowly. torch has AdamW and no Yogi.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99), "eps": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.full_like(p, group["eps"] ** 2)
                square = p.grad.square()
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].sub_((state["exp_avg_sq"] - square).sign() * square, alpha=1 - second)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])


class Optimizer:
    """AdamW, Yogi or SGD on the trainable parameters, with an optional moving average of the weights."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], run: RunSection, steps: int):
        """Sets up the optimizer.

        Args:
          run: as `Config.stepping` gives it.
        """
        assert run.learning_rate is not None
        self.parameters, self.run, self.steps = dict(parameters), run, steps
        values = list(self.parameters.values())
        if run.optimizer in ("adamw", "yogi"):
            kind = torch.optim.AdamW if run.optimizer == "adamw" else Yogi
            self.inner: torch.optim.Optimizer = kind(values, lr=run.learning_rate, weight_decay=run.weight_decay)
        else:
            self.inner = torch.optim.SGD(
                values, lr=run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
            )
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if run.ema_decay else {}

    def step(self, update: Mapping[str, torch.Tensor], step: int) -> None:
        """Applies one private update; `update[name]` has the parameter's shape."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.run, step, self.steps)
        for name, parameter in self.parameters.items():
            parameter.grad = update[name].to(parameter.dtype)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        decay = min(self.run.ema_decay, (1 + step) / (10 + step))  # short memory at first, so the start is forgotten
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.parameters[name], 1 - decay)

    def final_weights(self) -> dict[str, torch.Tensor]:
        """What the run releases: the moving average if there is one, else the last weights."""
        return self.ema or {n: p.detach() for n, p in self.parameters.items()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint needs besides the weights, by flat names."""
        tensors = {f"ema/{name}": value for name, value in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.inner.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{key}/{name}"] = torch.as_tensor(value)
        return tensors

    def stored_weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the weights."""
        return dict(self.parameters)

    def restore(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes weights and state from a checkpoint: what `stored_weights` and `state_tensors` gave.

        Raises:
          SottoError: SOT508, they are another model's.
        """
        if self.parameters.keys() != weights.keys():
            raise SottoError(
                "SOT508", what="the checkpoint belongs to another model", where="checkpoints",
                why="its parameters are not those of this configuration", fix="restore config.yaml of the run",
            )  # fmt: skip
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)
        for flat_name, value in tensors.items():
            key, _, name = flat_name.partition("/")
            parameter = self.parameters[name]
            if key == "ema":
                self.ema[name].copy_(value)
            else:  # AdamW keeps its step counter on the CPU
                self.inner.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device)
