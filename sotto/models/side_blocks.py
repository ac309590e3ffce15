"""What a side network is made of: layers of the model's own class at reduced width, or light blocks.

Initialisation looks at no data. The released code of Ladder Side-Tuning (Sung et al. 2022, arXiv 2206.06522) prunes the
backbone by gradients of a thousand training examples; under differential privacy that would be a release of its own.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sotto.models import support
from sotto.models.stack import Stack

POSITIONS = "relative_attention_bias"
"""T5's table of distances, which all examples of a batch share: no gradient of one example could be told from it
without running the model again. Side layers have the backbone's own, and it stays frozen."""

TEMPERATURE = 0.1
"""A gate's parameter is divided by this, so that it moves within the few steps that a private run has."""


class Gate(nn.Module):
    """How much of the way from below a side layer keeps: `g * z + (1 - g) * h` with `g = sigmoid(a / 0.1)`.

    A module of its own, so that the gradient of `a` has a rule. It starts in the middle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, z_BTs: torch.Tensor, h_BTs: torch.Tensor) -> torch.Tensor:
        g = torch.sigmoid(self.a / TEMPERATURE)
        return g * z_BTs + (1 - g) * h_BTs


class LightBlock(nn.Module):
    """Norm, then a low-rank MLP, added to what came in. Tokens do not see one another, so any model can have it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, z_BTs: torch.Tensor) -> torch.Tensor:
        return z_BTs + self.down(F.gelu(self.up(self.norm(z_BTs))))


def heads_of(config: Any) -> int:
    """Of a layer of the stack: in an encoder-decoder, the decoder's."""
    return getattr(config, "decoder_attention_heads", None) or config.num_attention_heads


def reduced_heads(config: Any, reduction: int) -> tuple[int, int]:
    """(heads, heads of keys and values) of a side layer: the nearest whole number, in whole groups."""
    heads = heads_of(config)
    group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    shared = max(1, round(heads / reduction / group))
    return shared * group, shared


def side_width(config: Any, reduction: int) -> int:
    """s, the width of a side network: whole heads of the model's own size, about d / reduction in total.

    Head sizes stay as they are, because what the model hands to each layer (rotary angles) is made for them, and
    fewer heads, unlike smaller ones, also shrink the attention maps.
    """
    heads, _ = reduced_heads(config, reduction)
    return max(1, config.hidden_size * heads // heads_of(config))


def shrink(config: Any, reduction: int) -> Any:
    """A copy of a configuration at reduced width. Its embeddings are next to nothing: only the layers are wanted."""
    small = copy.deepcopy(config)
    heads, shared = reduced_heads(config, reduction)
    share = heads / heads_of(config)
    if getattr(config, "head_dim", None) is not None:
        small.head_dim = config.head_dim
    if getattr(config, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = shared
    small.num_attention_heads = heads
    if getattr(config, "decoder_attention_heads", None) is not None:
        small.decoder_attention_heads = heads
    width = small.hidden_size = side_width(config, reduction)
    for name in ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"):
        if isinstance(value := getattr(config, name, None), int):
            setattr(small, name, max(1, round(value * share)))
    for name in ("word_embed_proj_dim", "embedding_size"):
        if getattr(config, name, None) is not None:
            setattr(small, name, width)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    small.vocab_size = 8
    return small


def shrunk_layers(stack: Stack, kept: list[int], reduction: int) -> nn.ModuleList:
    """New layers of the stack's own class, for the layers `kept`, at reduced width.

    The whole model is built at that width and its layers are taken, so that constructors, layer types and
    initialisation are the architecture's own.

    Raises:
      Exception: whatever the architecture raises where its width cannot be changed.
    """
    owner: Any = stack.owner
    small = shrink(owner.config, reduction)
    with support.quiet():
        layers = type(owner)(small).get_submodule(stack.path)
    chosen = [layers[i] for i in kept]  # type: ignore[index]
    gain = math.sqrt(stack.width / small.hidden_size)
    with torch.no_grad():
        for module in (m for layer in chosen for m in layer.modules()):
            if isinstance(module, nn.Linear | Conv1D):
                # The initialiser's range is made for width d; a narrower layer adds up fewer terms.
                module.weight.mul_(gain)
        for new, i in zip(chosen, kept, strict=True):
            for name, module in new.named_modules():
                if name.endswith(POSITIONS):  # (distances, heads): those of the first heads
                    pretrained: Any = stack.layers[i].get_submodule(name)
                    module.weight.copy_(pretrained.weight[:, : module.weight.shape[1]])  # type: ignore[operator,union-attr]
    return nn.ModuleList(chosen)
