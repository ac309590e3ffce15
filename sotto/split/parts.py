"""Cuts a classifier at a block: the bottom for the customer, frozen and checked by its hash; the top for the vendor.

`Bottom` followed by `Top` is the whole model, number for number, at every depth. Nothing is rewritten to cut it: the
`forward` of layers is replaced, and the weights that no longer run are released. What runs on which side is found by
running it.

Shape legend: B examples, T positions, n width of the hidden states, K classes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sotto.errors import SottoError
from sotto.models import stack, support
from sotto.models.pooling import MeanPooledClassifier
from sotto.models.wrapped import Wrapped


class _Reached(Exception):
    """The bottom is done; what comes above it does not run."""

    def __init__(self, hidden_BTn: torch.Tensor):
        self.hidden_BTn = hidden_BTn


class _StopBefore:
    """Stands in for the first layer above the cut."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(stack.hidden_of(args, kwargs))


class _StopAfter:
    """Stands in for the last layer, when all of them lie below the cut."""

    def __init__(self, original: stack.Forward):
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(stack.first(self.original(*args, **kwargs)))


class _Pass:
    """Stands in for a layer below the cut: gives on what it got."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return stack.hidden_of(args, kwargs)


class _Enter:
    """Stands in for the lowest layer of the top: its input is what the customer sent."""

    def __init__(self, top: Top, original: stack.Forward | None):
        self.top, self.original = top, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTn = self.top.entering
        assert hidden_BTn is not None
        if self.original is None:  # every layer lies below the cut
            return hidden_BTn
        args, kwargs = stack.with_hidden(args, kwargs, hidden_BTn)
        return self.original(*args, **kwargs)


class _NoEmbedding:
    """Stands in for the table of tokens in the top, whose input is none: zeros of the right shape."""

    def __init__(self, like: torch.Tensor):
        self.zero = like.new_zeros(like.shape[1])

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.zero.to(input_ids.device).expand(*input_ids.shape, -1)


class Bottom:
    """Embeddings and the first `layer` blocks, frozen.

    Attributes:
      layer, width: b and n.
      names: of the weights that run, and that therefore belong to the bottom.
    """

    def __init__(self, model: nn.Module, layer: int):
        """Takes the model over: it cannot be used for anything else afterwards.

        Raises:
          SottoError: SOT810, it has fewer blocks; SOT340, its blocks are no chain.
        """
        found = require_depth(model, layer)
        self.model, self.layer, self.width = model.eval(), layer, found.width
        if layer == len(found.layers):
            last = found.layers[layer - 1]
            stack.replace_forward(last, _StopAfter(last.forward))
        else:
            stack.replace_forward(found.layers[layer], _StopBefore())
        batch = support.dummy_batch(model)
        self.names = frozenset(_running(model, lambda: self.hidden(batch)))
        _release(model, set(self.names))
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]

    @torch.no_grad()
    def hidden(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, n) hidden states at the cut of a batch of `input_ids`, `attention_mask`, ... (B, T)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        try:
            self.model(**inputs)
        except _Reached as reached:
            return reached.hidden_BTn
        raise AssertionError("the model did not run its layers")

    def hidden_of_embeddings(self, embeddings_BTn: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, n) hidden states of vectors that stand in the place of token embeddings, with their graph."""
        try:
            self.model(inputs_embeds=embeddings_BTn, attention_mask=mask_BT)
        except _Reached as reached:
            return reached.hidden_BTn
        raise AssertionError("the model did not run its layers")

    @property
    def table_Vn(self) -> torch.Tensor:
        """The table of token embeddings: (V, n)."""
        return self._embedding.weight.detach()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights of the bottom, by name."""
        return {name: value.detach() for name, value in self.model.named_parameters() if name in self.names}

    def sha256(self) -> str:
        """Of names, types, shapes and bytes of all weights: the same on every machine."""
        digest = hashlib.sha256(f"layer {self.layer}\n".encode())
        for name, value in sorted(self.tensors().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Top(nn.Module):
    """The rest of a classifier: takes hidden states instead of tokens.

    Attributes:
      model: the classifier, with a side network or without (or, after `prepare`, the PeftModel around it).
      trained_layers: indices of the blocks above the cut.
      entering: (B, T, n) input of the pass that is under way.
    """

    def __init__(self, model: nn.Module, layer: int):
        """Takes the model over: it cannot be used for anything else afterwards.

        Raises:
          SottoError: SOT810, it has fewer blocks; SOT340, its blocks are no chain.
        """
        super().__init__()
        found = require_depth(model, layer)
        before = _before(model, found.layers[0])
        self.model: nn.Module = model
        self._placed = _takes_places(model)
        self.entering: torch.Tensor | None = None
        self.trained_layers = tuple(range(layer, len(found.layers)))
        for below in found.layers[:layer]:
            stack.replace_forward(below, _Pass())
        if self.trained_layers:
            lowest = found.layers[layer]
            stack.replace_forward(lowest, _Enter(self, lowest.forward))
        else:
            stack.replace_forward(found.layers[-1], _Enter(self, None))
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        stack.replace_forward(embedding, _NoEmbedding(embedding.weight.detach()))
        # An id that is not padding: some models read from the ids where a text ends.
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)  # type: ignore[union-attr]
        self.pad = 0 if pad is None else pad
        self.other = 0 if self.pad else 1
        hidden = torch.zeros(2, 4, found.width)
        running = _running(model, lambda: self(hidden, torch.ones(2, 4, dtype=torch.int64)))
        _release(model, running)
        # What runs before the first layer makes a place for what the customer sent, and no more.
        self._trainable = frozenset(running - before)
        self.freeze_below()

    def freeze_below(self) -> None:
        """Nothing at or below the cut is trained. Called again after a training method has chosen its weights."""
        for name, parameter in self.model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            new = ".lora_" in name or ".modules_to_save." in name
            if plain not in self._trainable and not new:
                parameter.requires_grad_(False)

    def forward(self, hidden_BTn: torch.Tensor, mask_BT: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """(B, K) scores.

        Args:
          stride: tokens from one row to the next. Rows of segments are that far apart for a model that turns its keys
            by their places. One that adds places to its embeddings has done so below the cut.
        """
        ids_BT = torch.where(mask_BT.bool(), self.other, self.pad)
        self.entering = hidden_BTn
        try:
            return self.model(input_ids=ids_BT, attention_mask=mask_BT, **self._places(ids_BT, stride)).logits
        finally:
            self.entering = None

    def _places(self, ids_BT: torch.Tensor, stride: int) -> dict[str, torch.Tensor]:
        if stride == 1 or not self._placed:
            return {}
        places_T = stride * torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return {"position_ids": places_T.expand(ids_BT.shape[0], -1)}


def require_depth(model: nn.Module, layer: int) -> stack.Stack:
    """The model's stack of layers, which are a chain of at least `layer`.

    Raises:
      SottoError: SOT810 or SOT340.
    """
    found = stack.find(model)
    if layer > len(found.layers):
        raise SottoError(
            "SOT810", what=f"the model has {len(found.layers)} blocks, not {layer}", where="setting.layer",
            why="the cut lies between two blocks", fix=f"set setting.layer to 0 ... {len(found.layers)}",
        )  # fmt: skip
    stack.require_chain(model, found)
    return found


def _takes_places(model: nn.Module) -> bool:
    """Whether a model's own pass takes the places of its tokens."""
    inner = model
    while isinstance(inner, Wrapped | MeanPooledClassifier):  # around a backbone, every argument is given on
        inner = inner.backbone
    return "position_ids" in inspect.signature(inner.forward).parameters


def _before(model: nn.Module, first_layer: nn.Module) -> set[str]:
    """Names of the weights of modules that are called before the first layer is."""
    before: set[int] = set()
    reached = False

    def note(module: nn.Module, *_: Any) -> None:
        nonlocal reached
        reached = reached or module is first_layer
        if not reached:
            before.update(id(p) for p in module.parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        support.dummy_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, parameter in model.named_parameters() if id(parameter) in before}


def _running(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the weights of modules whose `forward` is called while `run` runs.

    A module that ends with `_Reached` has not finished, but its own weights may have been used: the hook is called
    before `forward`. A stack's owner has no weights of its own in any known architecture.
    """
    used: set[int] = set()

    def note(module: nn.Module, *_: Any) -> None:
        if not isinstance(module.__dict__.get("forward"), _Pass | _StopBefore | _NoEmbedding):
            used.update(id(p) for p in module.parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, parameter in model.named_parameters() if id(parameter) in used}


def _release(model: nn.Module, keep: set[str]) -> None:
    """Frees the memory of the weights that do not run."""
    for name, parameter in model.named_parameters():
        if name not in keep:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.new_empty(0)
