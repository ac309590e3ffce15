"""Finds a model's stack of layers and puts something else in the place of a layer's `forward`.

Side and reversible networks need the same three facts of a pretrained model: which modules are its layers, that they
are run one after another on (B, T, d), and where each one's output goes. All three are found by trying, because
names and signatures differ between architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import nn

from sotto.errors import SottoError
from sotto.models import support

Forward = Callable[..., Any]
DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclass(frozen=True)
class Stack:
    """The layers of a model, in order.

    Attributes:
      owner: the module without a head that holds them (`bert`, `transformer`, `model`, ...).
      path: path of the list of layers inside `owner`.
      width: d, the size of the hidden states between layers.
      crosses: they are the decoder's of an encoder-decoder, and look at what the encoder gave.
    """

    owner: nn.Module
    path: str
    layers: nn.ModuleList
    width: int
    crosses: bool = False


def find(model: nn.Module) -> Stack:
    """Finds the layers by their number, which every configuration states. Of an encoder-decoder, the decoder's.

    Args:
      model: a transformers model or a `MeanPooledClassifier`.

    Raises:
      SottoError: SOT340, there is no such list.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    owner = getattr(model, support.backbone_prefix(model), model)
    crosses, wanted, within = bool(getattr(model.config, "is_encoder_decoder", False)), config.num_hidden_layers, ""
    if crosses:
        wanted = next((n for n in (getattr(config, name, None) for name in DECODER_DEPTHS) if n), wanted)
        within = "decoder."
    lists = [(n, m) for n, m in owner.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == wanted and n.startswith(within)]  # fmt: skip
    if not lists:
        _refuse(model, f"it has no list of {wanted} layers")
    path, layers = min(lists, key=lambda item: item[0].count("."))
    return Stack(owner, path, layers, config.hidden_size, crosses)


def require_one_stack(model: nn.Module, stack: Stack) -> None:
    """Raises SOT340 for an encoder-decoder."""
    if stack.crosses:
        _refuse(model, "it has two stacks, an encoder and a decoder", "Use an encoder or a decoder model, or side.")


@torch.no_grad()
def require_chain(model: nn.Module, stack: Stack) -> None:
    """Runs a fixed batch and checks that each layer takes what the layer before it gave, (B, T, d), exactly once.

    Raises:
      SottoError: SOT340, something else happens between the layers.
    """
    seen: list[tuple[int, Any, torch.Tensor]] = []

    def record(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs, out: seen.append((index, hidden_of(args, kwargs), first(out)))

    hooks = [m.register_forward_hook(record(i), with_kwargs=True) for i, m in enumerate(stack.layers)]
    batch = support.dummy_batch(model, rows=3, length=5)
    try:
        support.dummy_logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if [index for index, _, _ in seen] != list(range(len(stack.layers))):
        _refuse(model, "its layers are not run once each, in order")
    expected = (*batch["input_ids"].shape, stack.width)
    if any(tuple(x.shape) != expected for _, before, after in seen for x in (before, after)):
        _refuse(model, f"its hidden states are not of shape (batch, tokens, {stack.width})")
    if any(following[1] is not previous[2] for previous, following in pairwise(seen)):
        _refuse(model, "something is done to the hidden states between two layers")


def _refuse(model: nn.Module, detail: str, fix: str = "Set method.train: lora, which needs no such stack.") -> NoReturn:
    raise SottoError(
        "SOT340",
        what=f"The layers of {type(model).__name__} cannot be used one by one: {detail}.",
        where="method.train: side or reversible",
        why="Side and reversible networks stand between the layers of one stack, and must know what passes there.",
        fix=fix,
    )


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other hidden states."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


ENCODED = "encoder_hidden_states"
BIASES = ("position_bias", "encoder_decoder_position_bias")
"""What T5's first layer makes for all others, at its own number of heads."""


def encoded_of(layer: nn.Module | Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the encoder gave, among the arguments of a decoder's layer: (B, S, d), or None."""
    return (dict(zip(_names(layer), args, strict=False)) | kwargs).get(ENCODED)


def replaced(
    layer: nn.Module | Forward, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments, those that are named in `values` with other values. None is added."""
    args = tuple(values.get(name, value) for name, value in zip(_names(layer), args, strict=False))
    return args, {name: values.get(name, value) for name, value in kwargs.items()}


def first(out: Any) -> torch.Tensor:
    """The hidden states of what a layer returns: a tensor, or a tuple that begins with it."""
    return out[0] if isinstance(out, tuple | list) else out


def with_first(out: Any, x: torch.Tensor) -> Any:
    return type(out)((x, *out[1:])) if isinstance(out, tuple | list) else x


def _names(forward: nn.Module | Forward) -> list[str]:
    """Names of a layer's positional arguments; `forward` is bound, or a module."""
    plain = type(forward).forward if isinstance(forward, nn.Module) else forward.__func__  # type: ignore[attr-defined]
    return list(inspect.signature(plain).parameters)[1:]


def refuse_past(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises SOT342 when a layer's arguments hold keys and values of earlier tokens."""
    given = dict(zip(_names(forward), args, strict=False)) | kwargs
    if any(given[name].get_seq_length() for name in CACHES if given.get(name) is not None):
        raise SottoError(
            "SOT342", what="the model was given keys and values of earlier tokens", where="past_key_values",
            why="they are the plain layers' own; a side network, or a reversible one in training, needs the whole text",
            fix="pass all tokens and use_cache=False, or call generate()",
        )  # fmt: skip


def without_cache(
    layer: nn.Module | Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments for a layer that may neither read nor write the model's keys and values."""
    return replaced(layer, args, kwargs, {**dict.fromkeys(CACHES), "use_cache": False})


def replace_forward(module: nn.Module, forward: Forward) -> Forward:
    """Lets `forward` stand in for the module's own, which is returned.

    Callable objects rather than closures are put there, so that a deep copy of the model refers to the copy.
    """
    original = module.forward
    module.__dict__["forward"] = forward
    return original


def restore_forward(module: nn.Module, original: Forward) -> None:
    """Undoes `replace_forward`."""
    module.__dict__.pop("forward", None)
    if original != type(module).forward.__get__(module):
        module.__dict__["forward"] = original
