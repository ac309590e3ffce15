"""A side network: a narrow trained network beside a frozen backbone, into which no gradient ever enters.

After Ladder Side-Tuning (Sung et al. 2022, arXiv 2206.06522) and DP-MemArc (arXiv 2406.11087), with what privacy asks
for: initialisation that looks at no data, and a start at exactly the frozen model's function. With h_0 the embeddings,
h_i the output of the backbone's layer i and n() a norm without parameters:

    z = W_0 n(h_0)
    z = layer_i(g_i z + (1 - g_i) W_i n(h_i))        for each layer that has a side layer
    h_L <- h_L + rms(h_L) W_up norm(z)               before the final norm, pooler and head;  W_up starts at zero

The side network can begin above the embeddings, at a layer `first`: then h_0 is what enters that layer, and nothing
stands beside those below.

Of an encoder-decoder the layers are the decoder's. Side layers of its own class look at W_e n(e), what the encoder gave
at their width; light blocks know of the encoder only what the decoder's layers make of it. Nothing is put beside the
encoder: its output enters frozen layers, and a gradient would have to come back through them.

The backbone keeps no graph, so the memory is that of inference, plus the ladders' inputs n(h_i) (B, T, d), plus a
network of width s = d / reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationMixin

from sotto.errors import SottoError
from sotto.models import stack, support
from sotto.models.side_blocks import POSITIONS, Gate, LightBlock, shrink, shrunk_layers, side_width
from sotto.models.side_prune import prune_into
from sotto.models.wrapped import Wrapped, WrappedConfig


@dataclass(frozen=True)
class SideOptions:
    """The shape of a side network.

    Attributes:
      reduction: how much narrower than the backbone; the width is the nearest whole number of attention heads.
      every: every how many layers of the backbone there is a side layer. The last layer always has one.
      block: `layer`, the model's own class; `light`, norm and low-rank MLP; `auto`, the first where it can be shrunk.
      init: `random`, or `prune`: the largest rows and columns of the backbone's own weights.
      first: the lowest layer that the side network looks at. More than 0 where somebody else runs those below.
    """

    reduction: int = 8
    every: int = 2
    block: Literal["auto", "layer", "light"] = "auto"
    init: Literal["random", "prune"] = "random"
    first: int = 0

    def __post_init__(self) -> None:
        whole = all(type(n) is int and n >= 1 for n in (self.reduction, self.every))
        whole = whole and type(self.first) is int and self.first >= 0
        if not whole or self.block not in ("auto", "layer", "light") or self.init not in ("random", "prune"):
            raise ValueError(f"these are no options of a side network: {self}")


class SideNetwork(nn.Module):
    """The trained part.

    Shape legend: B rows, T tokens, d width of the backbone, s width of the side network.
    """

    def __init__(self, found: stack.Stack, options: SideOptions):
        super().__init__()
        count, d = len(found.layers), found.width
        config: Any = found.owner.config
        s = side_width(config, options.reduction)
        self.options, self.first, self.last = options, options.first, count - 1
        self.kept = [i for i in range(options.first, count) if (count - 1 - i) % options.every == 0]
        if not self.kept:
            raise ValueError(f"of {count} layers none is left from layer {options.first} on")
        if options.block == "layer":
            self.blocks = shrunk_layers(found, self.kept, options.reduction)
        else:
            self.blocks = nn.ModuleList(LightBlock(s) for _ in self.kept)
        self.entry = nn.Linear(d, s)
        self.across = nn.Linear(d, s) if found.crosses and options.block == "layer" else None
        self.ladders = nn.ModuleList(nn.Linear(d, s) for _ in self.kept)
        self.gates = nn.ModuleList(Gate() for _ in self.kept)
        self.norm = nn.LayerNorm(s)
        self.up = nn.Linear(s, d)
        for ladder in (self.entry, *self.ladders, *([self.across] if self.across is not None else [])):
            nn.init.normal_(ladder.weight, std=d**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(ladder.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self._z_BTs: torch.Tensor | None = None
        self._encoded_BSs: torch.Tensor | None = None
        self.fed: Mapping[int, torch.Tensor] | None = None
        """Outputs of the backbone's layers by index, (B, T, d), that stand in for running them."""
        self.extras: int | None = -1
        """How many other things a layer returns in a tuple; None if it returns hidden states, -1 if not known yet."""
        self.noted: dict[int, torch.Tensor] | None = None
        """Where outputs of the backbone's layers are put; the side network does not run meanwhile."""

    def forward(self, index: int, layer: stack.Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one layer of the backbone, and the side layer beside it if there is one.

        Args:
          index: of the layer.
          layer: its own forward.
          args, kwargs: what the backbone gave to the layer: hidden states (B, T, d), masks, rotary angles.

        Returns:
          what the layer returns; for the last one with the side network's output added to the hidden states.
        """
        hidden_BTd = stack.hidden_of(args, kwargs).detach()  # no gradient enters the backbone
        args, kwargs = stack.with_hidden(args, kwargs, hidden_BTd)
        if index == 0:
            stack.refuse_past(layer, args, kwargs)
        if self.fed is None or index < self.first:
            with torch.no_grad():
                out = layer(*args, **kwargs)
            self.extras = len(out) - 1 if isinstance(out, tuple) else None
        else:
            out = self.fed.get(index, hidden_BTd)
            out = out if self.extras is None else (out, *[None] * self.extras)
        if index < self.first:
            return out
        if self.noted is not None:
            if index in self.kept:
                self.noted[index] = stack.first(out)
            return out
        if index == self.first:
            self._z_BTs = self.entry(_normed(hidden_BTd))
            if self.across is not None:
                self._encoded_BSs = self.across(_normed(stack.encoded_of(layer, args, kwargs).detach()))
        if index in self.kept:
            self._climb(index, stack.first(out), args, kwargs)
        if index != self.last:
            return out
        z_BTs, self._z_BTs, self._encoded_BSs = self._z_BTs, None, None
        h_BTd = stack.first(out)
        size_BT1 = h_BTd.float().square().mean(-1, keepdim=True).sqrt()
        update_BTd = size_BT1.to(h_BTd.dtype) * self.up(self.norm(z_BTs)).to(h_BTd.dtype)
        return stack.with_first(out, h_BTd + update_BTd)

    def _climb(self, index: int, h_BTd: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        j = self.kept.index(index)
        z_BTs = self.gates[j](self._z_BTs, self.ladders[j](_normed(h_BTd)))
        if self.options.block == "light":
            self._z_BTs = self.blocks[j](z_BTs)
        else:
            block = self.blocks[j]
            if self.across is not None:
                new = {**dict.fromkeys(stack.BIASES), stack.ENCODED: self._encoded_BSs}
                args, kwargs = stack.replaced(block, args, kwargs, new)
            args, kwargs = stack.with_hidden(*stack.without_cache(block, args, kwargs), z_BTs)
            self._z_BTs = stack.first(self.blocks[j](*args, **kwargs))

    def forget(self) -> None:
        """Drops what a forward pass that ended in an error has left."""
        self._z_BTs = self._encoded_BSs = None


def _normed(h_BTd: torch.Tensor) -> torch.Tensor:
    """Hidden states of decoders hold a few values that are thousands of times the others; a ladder must not see that.
    One example's gradient would be all outlier, and clipping would leave nothing of the rest."""
    return F.layer_norm(h_BTd, h_BTd.shape[-1:])


class Rung:
    """Stands in for the forward of one layer of the backbone."""

    def __init__(self, side: SideNetwork, index: int, layer: nn.Module):
        self.side, self.index = side, index
        self.original = stack.replace_forward(layer, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.side(self.index, self.original, args, kwargs)


class SideConfig(WrappedConfig):
    """Configuration of a model with a side network; `options` are those of `SideOptions`."""

    model_type = "sotto_side"


class _Side(Wrapped):
    config_class = SideConfig

    def _build(self) -> None:
        found = self.stack
        self.side = SideNetwork(found, SideOptions(**self.config.options))
        for index, layer in enumerate(found.layers):
            Rung(self.side, index, layer)

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """See `Wrapped.forward`. Keys and values of past tokens are not kept."""
        if self.side.fed is None and next(self.stack.layers[-1].parameters()).is_meta:
            raise SottoError(
                "SOT344", what="the backbone's layers have been released", where="release_layers",
                why="only stored outputs of them can be used now",
                fix="run it inside fed(...), or load the model again",
            )  # fmt: skip
        if not self.classifies or self.stack.crosses:
            kwargs["use_cache"] = False
        try:
            return super().forward(input_ids, **kwargs)
        finally:
            self.side.forget()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's `generate`, but recomputing the whole text for each token."""
        return super().generate(*args, **{**kwargs, "use_cache": False})

    @torch.no_grad()
    def backbone_outputs(self, **batch: torch.Tensor) -> dict[int, torch.Tensor]:
        """What the side network sees of the backbone: layer index -> (B, T, d), for the layers `side.kept`.

        Args:
          batch: `input_ids`, `attention_mask` and the like, each (B, T).
        """
        with self.noting() as outputs:
            self(**batch)
        return outputs

    @contextmanager
    def noting(self) -> Iterator[dict[int, torch.Tensor]]:
        """Inside, the side network does not run, and what it would see of the backbone is put in the dictionary."""
        outputs: dict[int, torch.Tensor] = {}
        self.side.noted = outputs
        try:
            yield outputs
        finally:
            self.side.noted = None

    @contextmanager
    def fed(self, outputs: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Inside, layers from `first` on do not run: `outputs`, as `backbone_outputs` gives them, stand in for them.

        Embeddings, masks, final norm and head run as ever. Padding may differ from what the layers would have given:
        no token of the text sees it.
        """
        self._know_form()
        self.side.fed = outputs
        try:
            yield
        finally:
            self.side.fed = None

    def release_layers(self) -> None:
        """Gives back the memory of the layers from `first` on. After that the model runs only inside `fed`."""
        self._know_form()
        self.stack.layers[self.side.first :].to("meta")

    def _know_form(self) -> None:
        if self.side.extras == -1:
            support.dummy_logits(self)

    def train(self, mode: bool = True) -> _Side:
        """The frozen backbone stays in evaluation mode: its dropout would only be noise on the side network's input."""
        super().train(mode)
        self.stack.owner.eval()
        return self


class SideForSequenceClassification(_Side):
    """A classifier with a side network."""

    classifies = True


class SideForCausalLM(_Side, GenerationMixin):
    """A causal language model with a side network."""


def add_side(model: nn.Module, options: SideOptions, seed: int) -> _Side:
    """Puts a side network beside a model, which becomes the frozen backbone. Trained are the side network and a
    classifier's head.

    Args:
      model: as `load_model` gives it.
      seed: draws the new weights. The global random state is left alone.

    Returns:
      a transformers model around `model`, whose scores are bit for bit those of `model`.

    Raises:
      SottoError: SOT340 the layers cannot be used one by one, SOT341 their class cannot be shrunk (with
        `block: layer`), SOT343 they cannot be pruned.
    """
    found = stack.find(model)
    stack.require_chain(model, found)
    before = support.dummy_logits(model)
    if options.block != "light":
        try:
            return _tried(_with_side(model, replace(options, block="layer"), seed), before)
        except Exception as error:  # each class fails in its own way; a light block fits all of them
            _remove(found)
            if options.block == "layer" or options.init == "prune":
                raise _cannot_shrink(found, error) from error
    return _tried(_with_side(model, replace(options, block="light"), seed), before)


def _with_side(model: nn.Module, options: SideOptions, seed: int) -> _Side:
    wrapper = SideForSequenceClassification if support.is_classifier(model) else SideForCausalLM
    with support.seeded(seed):
        whole = wrapper(SideConfig.around(model, asdict(options)), backbone=model)
    if options.init == "prune":
        found = whole.stack
        prune_into(whole.side, found.layers, found.owner.config, shrink(found.owner.config, options.reduction))
    heads = support.head_names(model) if whole.classifies else []
    for name, parameter in whole.named_parameters():
        ours = name.startswith(("side.", *(f"backbone.{head}." for head in heads)))
        parameter.requires_grad_(ours and not name.endswith(f"{POSITIONS}.weight"))
    return whole.eval()  # type: ignore[return-value]


def _tried(whole: _Side, before: torch.Tensor) -> _Side:
    """Checks the start, and that tokens of a language model do not see later ones through the side network."""
    batch = support.dummy_batch(whole.backbone)
    after = support.dummy_logits(whole, batch)
    if not torch.equal(before.nan_to_num(), after.nan_to_num()):
        raise ValueError("the scores at the start are not those of the backbone")
    with torch.no_grad(), support.seeded(0):
        nn.init.normal_(whole.side.up.weight, std=whole.side.up.weight.shape[1] ** -0.5)
        try:
            changed = support.dummy_logits(whole, batch)
            if not whole.classifies:
                support.refuse_two_way_language_model(whole)
        finally:
            nn.init.zeros_(whole.side.up.weight)
    if any(True for b in whole.side.blocks for m in b.modules() if any(m.children()) and any(m.parameters(False))):
        raise ValueError("its parts own parameters whose gradients per example would cost one pass per unit")
    if not bool(torch.isfinite(changed).all()) and bool(torch.isfinite(before).all()):
        raise ValueError("its output is not finite")
    return whole


def _remove(found: stack.Stack) -> None:
    for layer in found.layers:
        if isinstance(rung := layer.__dict__.get("forward"), Rung):
            stack.restore_forward(layer, rung.original)


def _cannot_shrink(found: stack.Stack, error: Exception) -> SottoError:
    if isinstance(error, SottoError):
        return error
    return SottoError(
        "SOT341",
        what=f"{type(found.layers[0]).__name__} cannot be built at reduced width: {str(error).strip()[:160]}",
        where="the side network's block: layer",
        why="Its parts, or what the model hands to it, are made for one width.",
        fix="Use light blocks (block: light), which fit every model.",
    )


AutoConfig.register(SideConfig.model_type, SideConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SideConfig, SideForSequenceClassification, exist_ok=True)
AutoModelForCausalLM.register(SideConfig, SideForCausalLM, exist_ok=True)
