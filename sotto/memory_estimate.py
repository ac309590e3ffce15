"""About how much memory a run needs, from the model's shapes by a formula: at once, and without torch.

For `sotto plan` and for runs without a memory budget. Where `run.memory` sets one, `memory_budget` counts byte for
byte instead. Here weights, gradients, optimizer and noise are exact and activations those of an ordinary transformer
block. A wrong estimate costs speed alone: when memory runs out the microbatch is halved within the same logical batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from sotto.config import Config
from sotto.models.headers import TensorHeader
from sotto.models.source import ModelFacts

LARGEST_MICROBATCH = 64
RESERVE = 0.8
"""Share of the memory budget that is planned with; the rest is left to the allocator and the libraries."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. `per_example` is what one more example in the microbatch costs at `data.max_length` tokens."""

    weights: int
    gradients: int
    optimizer: int
    noise: int
    per_example: int
    microbatch_size: int
    budget: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.noise

    @property
    def total(self) -> int:
        return self.fixed + self.per_example * self.microbatch_size

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the names that a forecast has too (`memory_trace.PARTS`)."""
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, "noise": self.noise,
            "activations": self.per_example * self.microbatch_size,
        }  # fmt: skip


def trainable_parameters(facts: ModelFacts, config: Config) -> int:
    """The number of trained parameters, from tensor shapes."""
    method, classes = config.method, len(config.data.labels or ())
    kind = method.reversible_train if method.train == "reversible" else method.train
    head = (facts.hidden_size + 1) * classes
    not_adapted = ("embed", "wte", "pooler") if config.model.pooling == "mean" else ("embed", "wte")
    matrices = [
        t.shape for name, t in facts.tensors.items() if len(t.shape) == 2 and not any(w in name for w in not_adapted)
    ]
    blocks = [s for s in matrices if max(s) < facts.vocab_size]
    if kind == "head":
        return head
    if kind == "bitfit":
        return head + sum(t.shape[0] for name, t in facts.tensors.items() if name.endswith("bias"))
    if kind == "lora":
        share = 1.0 if method.lora_layers is None else len(method.lora_layers) / max(1, facts.num_layers)
        trained = sum(a if method.lora_train == "up" else a + b for a, b in blocks)
        return head + round(share * method.lora_rank * trained)
    if kind == "side":
        vectors = sum(t.shape[0] for name, t in facts.tensors.items()
                      if len(t.shape) == 1 and not any(w in name for w in (*not_adapted, "pooler")))  # fmt: skip
        return head + _side_parameters(facts, config, sum(a * b for a, b in blocks), vectors)
    return facts.parameters + head


def _side_width(facts: ModelFacts, config: Config) -> int:
    """As `models.side_blocks.side_width`: whole heads, or whole groups of heads that share keys."""
    heads = facts.num_heads or 1
    group = heads // (facts.config.get("num_key_value_heads") or heads)
    return facts.hidden_size * max(1, round(heads / config.method.side_reduction / group)) * group // heads


def _side_parameters(facts: ModelFacts, config: Config, matrices: int, vectors: int) -> int:
    """Ladders, narrow layers and the way back up. Exact with `light` blocks.

    Args:
      matrices, vectors: how many weights of the model's layers stand in matrices, and in biases and norms.
    """
    d, s, layers = facts.hidden_size, _side_width(facts, config), -(-facts.num_layers // config.method.side_every)
    light = 4 * s * s + 5 * s
    narrow = (matrices * s / d + vectors) * s / d / max(1, facts.num_layers)
    each = light if config.method.side_block == "light" else round(narrow)
    return (layers + 1) * (d + 1) * s + layers * (each + 1) + 2 * s + (s + 1) * d


def free_memory() -> int:
    """Bytes that this process may take of what the machine has free: its share, if torchrun started several here."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def estimate(facts: ModelFacts, config: Config, budget: int | None = None) -> MemoryEstimate:
    """Predicts the peak of a training run and chooses the microbatch size.

    Args:
      budget: bytes; by default what the machine has free now.
    """
    if budget is None:
        budget = free_memory()
    trained = trainable_parameters(facts, config)
    run = config.stepping
    copies = (2 if run.optimizer == "adamw" else int(run.momentum > 0)) + int(run.ema_decay > 0)
    per_example = activations(facts, config)
    weights = _weights(facts, config)
    fixed = weights + 4 * trained * (copies + 3)
    size = config.run.microbatch_size
    if size == "auto":
        room = max(0, RESERVE * budget - fixed)
        size = max(1, min(LARGEST_MICROBATCH, int(room // max(1, per_example))))
    return MemoryEstimate(
        weights=weights,
        gradients=4 * trained * 2,  # the sum so far and this microbatch's
        optimizer=4 * trained * copies,
        noise=4 * trained,
        per_example=per_example,
        microbatch_size=size,
        budget=budget,
    )


def _weights(facts: ModelFacts, config: Config) -> int:
    """Bytes of the weights, of which those in the layers' matrices may be rounded; int4 has a scale for every 64."""
    saved = {"float32": 0.0, "bfloat16": 2.0, "int8": 3.0, "int4": 3.5 - 4 / 64}[config.method.frozen_weights]
    layers = sum(t.numel for name, t in facts.tensors.items() if len(t.shape) == 2 and _in_a_layer(name, t, facts))
    return 4 * facts.parameters - round(saved * layers)


def _in_a_layer(name: str, tensor: TensorHeader, facts: ModelFacts) -> bool:
    return "embed" not in name and "wte" not in name and max(tensor.shape) < facts.vocab_size


def activations(facts: ModelFacts, config: Config) -> int:
    """Bytes for one example of max_length tokens: what autograd saves in a block, and the logits."""
    method, tokens, width, layers = config.method, config.data.max_length, facts.hidden_size, facts.num_layers
    size = 2 if config.model.dtype == "bfloat16" else 4
    saved = 30 * width  # inputs of the linear layers, norms, attention and the activation, with a feed-forward of 4x
    kind = method.reversible_train if method.train == "reversible" else method.train
    kept = 9 * width if kind == "full" and method.gradient != "ghost" else 0  # output gradients
    logits = 3 * 4 * facts.vocab_size if config.data.task == "generation" else 0
    if method.train == "side":
        # One layer of the model at a time, the ladders' inputs, and a narrow network of which everything is saved.
        each = width + 39 * width / method.side_reduction
        return round(tokens * ((saved + layers / method.side_every * each) * size + logits))
    if method.train == "reversible":
        # Two streams and one layer's activations; a byte per number and layer, or the layer's input.
        each = {"fixed": 1, "stored": size, "float64": 8 / 6, "float32": 4 / 3}[method.reversible_streams]
        return round(tokens * (16 * width + saved * size + layers * width * each + layers * kept * size + logits))
    share = {"full": 1.0, "lora": 0.8, "bitfit": 0.6, "head": 0.1}[method.train]
    if method.train == "lora" and method.lora_layers is not None:
        share *= max(0.1, len(method.lora_layers) / max(1, layers))
    return round(tokens * (layers * (saved * share + kept) * size + logits))


def of_plan(config: Config, facts: ModelFacts) -> dict[str, int]:
    """Bytes by part: estimated at once, without torch; or, for a run with a memory budget, as it will be held to."""
    if config.run.memory is None:
        guess = estimate(facts, config)
        trained = trainable_parameters(facts, config)
        parts, total, size, budget = guess.parts, guess.total, guess.microbatch_size, guess.budget
        room = budget
    else:
        from sotto import memory_budget
        from sotto.devices import choose_device

        forecast, kept = memory_budget.choose(config, choose_device(config.run.device), facts)
        parts, total, size, trained = forecast.parts, forecast.peak, forecast.microbatch_size, forecast.trainable
        budget, room = kept.total, kept.room
    return {**parts, "total": total, "trainable": trained, "microbatch_size": size, "budget": budget, "room": room}
