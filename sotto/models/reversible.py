"""Reversible networks: pretrained layers coupled so that each one's input can be recovered from its output.

After DP-MemArc (arXiv 2406.11087) and MEFT (Liao et al. 2023, arXiv 2306.00477), whose streams are `x1 <- factor * x1 +
layer(x2)`. Here the *difference* of the streams is what is scaled, as in momentum residual networks (Sander et al.
2021, arXiv 2102.07870): with h_0 the embeddings and h_{-1} = h_0,

    h_{n+1} = layer_n(h_n) + factor * (h_{n-1} - h_n)

Consecutive hidden states are alike, so the start is near the pretrained function at any depth; the first layer's output
is exactly the pretrained one. What is trained stands inside the layers (adapters, biases, or everything), and is chosen
before. How streams are kept is in `reversible_streams`, how activations come back in `reversible_run`.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationMixin

from sotto.errors import SottoError
from sotto.models import stack, support
from sotto.models.reversible_run import Run
from sotto.models.reversible_streams import FixedPoint, Floating, Streams
from sotto.models.wrapped import Wrapped, WrappedConfig

FACTOR_BITS = {"fixed": 8, "float64": 3, "float32": 2, "stored": 0}
ANCHOR_EVERY = {"fixed": 0, "float64": 6, "float32": 3, "stored": 0}


@dataclass(frozen=True)
class ReversibleOptions:
    """How activations are recovered.

    Attributes:
      streams: `fixed`, 64-bit integers and one byte per number and layer: exact. `float64` and `float32`, with anchors:
        near. `stored`, each layer's input as it is: exact, and the pretrained function itself (per-layer
        checkpointing).
      factor_bits: the factor is 2^-factor_bits; at most 8 for `fixed`. None takes the default of the streams.
      anchor_every: layers from anchor to anchor, for floating-point streams. None takes the default.
    """

    streams: Literal["fixed", "float64", "float32", "stored"] = "fixed"
    factor_bits: int | None = None
    anchor_every: int | None = None

    def __post_init__(self) -> None:
        bits, every = self.factor_bits, self.anchor_every
        sound = self.streams in FACTOR_BITS
        sound = sound and (bits is None or (type(bits) is int and 1 <= bits <= (8 if self.streams == "fixed" else 20)))
        if not sound or not (every is None or (type(every) is int and every >= 1)):
            raise ValueError(f"these are no options of a reversible network: {self}")

    def arithmetic(self) -> Streams | None:
        bits = FACTOR_BITS[self.streams] if self.factor_bits is None else self.factor_bits
        if self.streams == "stored":
            return None
        if self.streams == "fixed":
            return FixedPoint(bits)
        return Floating(getattr(torch, self.streams), 2.0**-bits)


class Coupling:
    """What the layers of one model share. `run` is the forward pass that is going on."""

    def __init__(self, options: ReversibleOptions, count: int):
        self.streams, self.count = options.arithmetic(), count
        every = ANCHOR_EVERY[options.streams] if options.anchor_every is None else options.anchor_every
        self.anchor_every = every if isinstance(self.streams, Floating) else None
        self.run: Run | None = None

    def forward(self, index: int, layer: stack.Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == 0:
            self.run = Run(self.streams, self.anchor_every, stack.hidden_of(args, kwargs))
        assert self.run is not None
        if torch.is_grad_enabled():  # to run a layer again must not write its keys and values once more
            stack.refuse_past(layer, args, kwargs)
            args, kwargs = stack.without_cache(layer, args, kwargs)
        out = self.run.layer(index, layer, args, kwargs)
        if index == self.count - 1:
            self.close()
        return out

    def close(self) -> None:
        """Ends the forward pass, also one that failed. From here on only the graph holds its run."""
        if self.run is not None:
            self.run.close()
        self.run = None


class Coupled:
    """Stands in for the forward of one layer."""

    def __init__(self, coupling: Coupling, index: int, layer: nn.Module):
        self.coupling, self.index = coupling, index
        self.original = stack.replace_forward(layer, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.coupling.forward(self.index, self.original, args, kwargs)


class ReversibleConfig(WrappedConfig):
    """Configuration of a reversible model; `options` are those of `ReversibleOptions`."""

    model_type = "sotto_reversible"


class _Reversible(Wrapped):
    layers_stand_alone = False
    """A layer cannot run where those below it have not: they share the two streams."""

    config_class = ReversibleConfig

    def _build(self) -> None:
        layers = self.stack.layers
        self.coupling = Coupling(ReversibleOptions(**self.config.options), len(layers))
        for index, layer in enumerate(layers):
            Coupled(self.coupling, index, layer)

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """See `Wrapped.forward`."""
        try:
            return super().forward(input_ids, **kwargs)
        finally:
            self.coupling.close()


class ReversibleForSequenceClassification(_Reversible):
    """A classifier with coupled layers."""

    classifies = True


class ReversibleForCausalLM(_Reversible, GenerationMixin):
    """A causal language model with coupled layers."""


AutoConfig.register(ReversibleConfig.model_type, ReversibleConfig, exist_ok=True)
AutoModelForSequenceClassification.register(ReversibleConfig, ReversibleForSequenceClassification, exist_ok=True)
AutoModelForCausalLM.register(ReversibleConfig, ReversibleForCausalLM, exist_ok=True)


def make_reversible(model: nn.Module, options: ReversibleOptions) -> _Reversible:
    """Couples the layers of a model whose trainable weights have been chosen.

    Args:
      model: what `trainable.prepare` returns. Of a `PeftModel` the inner model is taken, adapters included.

    Returns:
      a transformers model around it, with the same trainable parameters under names that begin with `backbone.`.

    Raises:
      SottoError: SOT340 the layers cannot be coupled, SOT345 dropout cannot be repeated on this device.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found = stack.find(inner)
    stack.require_one_stack(inner, found)
    stack.require_chain(inner, found)
    _require_replay(inner)
    wrapper = ReversibleForSequenceClassification if support.is_classifier(inner) else ReversibleForCausalLM
    whole = wrapper(ReversibleConfig.around(inner, asdict(options)), backbone=inner)
    return whole.train(model.training)  # type: ignore[return-value]


def _require_replay(model: nn.Module) -> None:
    from sotto.models.load import remove_dropout

    device: torch.device = next(model.parameters()).device
    dropped = remove_dropout(copy.deepcopy(model.config))  # type: ignore[arg-type]
    if dropped and device.type not in ("cpu", "cuda"):
        raise SottoError(
            "SOT345", what=f"the model has dropout ({dropped[0]})", where="method.dropout",
            why="a reversible network runs its layers twice, and the random numbers of this kind of device "
            f"({device.type}) cannot be repeated here", fix="set method.dropout: false",
        )  # fmt: skip
