"""The section `method`: what is trained, and how the clipped sum of gradients is obtained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sotto.config_types import Count, Fraction, Natural, Positive, Real, Section

ZEROTH_RATES = {"head": 0.5, "bitfit": 0.1, "lora": 0.1, "side": 0.1, "reversible": 0.1, "full": 1e-3}
"""SGD's rate times the clip norm with 16 directions, for zeroth-order runs that give no rate. `head`, `lora` and
`bitfit` were measured (benchmarks/RESULTS.md); `full` is what DP-AggZO's recipes come to in these units, 4e-4 to 4e-3;
the others stand to it as MeZO's rates for LoRA to those for all weights, and were not measured."""


class MethodSection(Section):
    """What is trained, and how the clipped sum of gradients is obtained."""

    train: Literal["full", "lora", "bitfit", "head", "side", "reversible"] = "lora"
    """`full`: all weights. `lora`: low-rank adapters. `bitfit`: biases. `head`: the classification head alone.
    `side`: a narrow network beside the frozen model, in the memory of inference. `reversible`: the model's layers
    coupled so that their activations are recomputed, with what `reversible_train` names inside them."""
    lora_rank: Count = 8
    """Width of the adapters: each trained matrix of (d, p) becomes rank * (d + p) trained numbers."""
    lora_alpha: Positive = 16
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters."""
    lora_init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Adapter initialisation. Those that look at data (EVA, CorDA, LoRA-GA) are refused: they would not be private."""
    lora_layers: tuple[int, ...] | None = None
    """Indices of the blocks that get adapters; all when absent. Fewer upper blocks train faster."""
    lora_train: Literal["both", "up"] = "both"
    """`up`: the factors that read a layer's input stay as they were drawn, and only the others are trained (FFA-LoRA):
    half the numbers to noise, and to send in a federated run."""
    side_reduction: Count = 8
    """How much narrower a side network is than the model."""
    side_every: Count = 2
    """A side layer beside every so many of the model's layers, counted from the last."""
    side_block: Literal["auto", "layer", "light"] = "auto"
    """`layer`: the model's own kind of layer at reduced width. `light`: a norm and a low-rank MLP. `auto`: the first of
    them that fits the model."""
    side_init: Literal["random", "prune"] = "random"
    """`random`, or `prune`: the largest rows and columns of the model's own weights. Neither looks at data."""
    side_cache: bool = False
    """Store what the frozen model's layers give for each example (`private/activations`, 2 bytes a number, wiped at the
    end), so that later steps do not run them."""
    reversible_train: Literal["lora", "bitfit", "full"] = "lora"
    """What is trained inside the layers of a reversible network."""
    reversible_streams: Literal["fixed", "float64", "float32", "stored"] = "fixed"
    """How activations come back. `fixed`: from integers, exactly. `float64`, `float32`: nearly, with anchors, checked.
    `stored`: from each layer's stored input, exactly, with the model's own function."""
    frozen_weights: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """How weights of linear layers that are not trained are kept in memory: rounded to 2, 1 or about half a byte each.
    For `lora`, `head`, `side`, and `reversible` with LoRA inside. What is exported is the rounded model."""
    gradient: Literal["auto", "per_example", "ghost", "book_keeping", "layerwise", "zeroth_order"] = "auto"
    """How clipped sums are computed. `auto` is book_keeping: one backward pass. ghost: two, in less memory.
    per_example: one for each unit; slow, to check the others. These give the same numbers. layerwise clips every layer
    to clip_norm / sqrt(layers) within one pass: least time and memory, another sum under the same guarantee.
    zeroth_order needs no backward pass: it learns from losses along random directions, in the memory of inference."""
    zeroth_preset: Literal["aggzo", "dpzero", "dpzo", "dpzopo"] = "aggzo"
    """Zeroth order, as published as: `aggzo`, many directions clipped together; `dpzero` and `dpzo`, one direction;
    `dpzopo`, one direction of few weights, in stages."""
    zeroth_probes: Count | None = None
    """Directions in a step, and numbers that it releases. They cost no privacy; each costs one forward pass with
    `aggzo`, and two where a step has a single one. Default: 16 for `aggzo`, else 1."""
    zeroth_smoothing: Annotated[Real, Field(ge=0)] = 1e-3
    """How far the weights are moved along a direction to see how the loss changes. Adapters can take 1e-2. 0: not at
    all; the exact derivative, by forward-mode differentiation (forward gradients, Spry), in twice the memory of a
    forward pass and somewhat more time than the two that a difference takes."""
    zeroth_directions: Literal["preset", "rademacher", "gaussian", "sphere", "orthogonal"] = "preset"
    """The law of the directions. They are public, and drawn from a generator that shares nothing with the noise."""
    zeroth_rank: Natural = 0
    """Rank of the directions of matrices; 0 for all entries on their own."""
    zeroth_noise: Literal["gaussian", "laplace"] = "gaussian"
    """`laplace` gives pure epsilon-DP, with delta 0: for few steps and few directions."""
    zeroth_sides: Count = 1
    """How many perturbed models run in one forward pass: 1, or an even number, for that many times the activations.
    On a CPU fewer, or one, where a pass is too large to gain from it; memory is planned for all of them."""
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    """`flat`: scale down to clip_norm. `automatic`: normalise every unit to clip_norm (AUTO-S); nothing to tune.
    `adaptive`: flat, from clip_norm on, with a threshold that follows a quantile of the norms."""
    clip_norm: Positive = 1.0
    """Bound on the norm of one unit's gradient. The noise is proportional to it."""
    clip_quantile: Annotated[Fraction, Field(gt=0)] = 0.5
    """Adaptive clipping: the part of the units that should stay unclipped."""
    clip_share: Annotated[Fraction, Field(gt=0)] = 0.01
    """Adaptive clipping: the part of each step's privacy that pays for measuring it. Epsilon stays the same, and the
    noise on the gradients grows by half this part."""
    dropout: bool = False
    """Keep the model's dropout. Off by default: noise already regularises."""

    @property
    def zeroth_order(self) -> bool:
        return self.gradient == "zeroth_order"

    @property
    def probes(self) -> int:
        """Directions in a step, and numbers that it releases; 0 where gradients are released."""
        if not self.zeroth_order:
            return 0
        return self.zeroth_probes or (16 if self.zeroth_preset == "aggzo" else 1)

    @property
    def zeroth_centred(self) -> bool:
        """Whether each direction is probed on one side, and compared with the mean over those of the step."""
        return self.zeroth_preset == "aggzo" and self.probes > 1 and self.zeroth_smoothing > 0

    @property
    def passes(self) -> int:
        """Forward passes of an example in a step; 0 where gradients are released."""
        return self.probes if self.zeroth_centred else 2 * self.probes

    @property
    def zeroth_rate(self) -> float:
        """The learning rate of SGD on released numbers, where none is given.

        An update is about `clip_norm` long for each unit, so the rate goes as its inverse. The fewer directions a step
        has, the more steps the same forward passes give, each as noisy: the best rates for 1, 4, 16 and 64 went as
        their number (benchmarks/RESULTS.md). What is left depends on what is trained.
        """
        return ZEROTH_RATES[self.train] * self.probes / 16 / self.clip_norm

    @property
    def laplace(self) -> bool:
        """Whether releases are covered by Laplace noise, and the guarantee holds at delta 0."""
        return self.zeroth_order and self.zeroth_noise == "laplace"

    @model_validator(mode="after")
    def _rounded_weights_are_frozen(self) -> MethodSection:
        inside = self.reversible_train if self.train == "reversible" else self.train
        if self.frozen_weights != "float32" and inside in ("full", "bitfit"):
            key = "reversible_train" if self.train == "reversible" else "train"
            raise ValueError(
                f"frozen_weights: {self.frozen_weights} rounds the layers that {key}: {inside} trains, and a step is "
                f"smaller than what is rounded away: set {key}: lora, or frozen_weights: float32"
            )
        return self

    @model_validator(mode="after")
    def _zeroth_order_fits(self) -> MethodSection:
        if not self.zeroth_order:
            return self
        if self.dropout:
            raise ValueError("gradient: zeroth_order compares losses, which dropout would drown: set dropout: false")
        if self.zeroth_sides % 2 and self.zeroth_sides != 1:
            raise ValueError("zeroth_sides is 1 or an even number: both losses of a direction belong in one pass")
        if self.zeroth_smoothing == 0 and self.zeroth_sides != 1:
            raise ValueError("zeroth_smoothing: 0 takes a derivative in each pass: set zeroth_sides: 1")
        if self.side_cache:
            raise ValueError("side_cache is not for gradient: zeroth_order, which computes frozen layers once anyway")
        if self.zeroth_rank and self.zeroth_directions in ("sphere", "orthogonal"):
            raise ValueError("zeroth_rank needs zeroth_directions: rademacher or gaussian")
        if self.zeroth_preset == "dpzopo" and (self.train != "full" or self.zeroth_rank):
            raise ValueError(
                "zeroth_preset: dpzopo picks among the model's weights: it needs train: full, zeroth_rank: 0"
            )
        if self.zeroth_preset == "dpzero" and (self.zeroth_probes or 1) != 1:
            raise ValueError("zeroth_preset: dpzero takes one direction: use aggzo for several")
        if self.laplace and self.clipping == "adaptive":
            raise ValueError("zeroth_noise: laplace covers fixed bounds only: use clipping: flat or automatic")
        return self
