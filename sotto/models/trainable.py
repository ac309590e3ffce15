"""Chooses which weights are trained: all, adapters, biases, the head alone, or those of a side network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sotto.config import MethodSection
from sotto.errors import SottoError
from sotto.models import support


def prepare(model: nn.Module, method: MethodSection, seed: int = 0, first: int = 0) -> nn.Module:
    """Marks what `method.train` names as trainable and freezes the rest.

    Args:
      model: as `load_model` gives it.
      seed: draws adapters and side networks; the other methods have no new weights.
      first: the lowest layer that a side network looks at; of no matter to the other methods.

    Returns:
      the same model; for `lora` the `PeftModel` around it; for `side` and `reversible` a transformers model around it.
      Trainable weights are float32; those of frozen linear layers are kept as `method.frozen_weights` says.

    Raises:
      SottoError: SOT320 to SOT325, there is nothing of that kind to train; SOT340 to SOT345, the layers cannot be used
        in that way.
    """
    if method.train == "reversible":
        from sotto.models.reversible import ReversibleOptions, make_reversible

        inner = prepare(model, method.model_copy(update={"train": method.reversible_train}), seed)
        return make_reversible(inner, ReversibleOptions(streams=method.reversible_streams))
    if method.train == "side":
        from sotto.models.side import SideOptions, add_side

        options = SideOptions(method.side_reduction, method.side_every, method.side_block, method.side_init, first)
        model = add_side(model, options, seed)
    elif method.train == "lora":
        from sotto.models.lora import add_lora

        task = "classification" if support.is_classifier(model) else "generation"
        model = add_lora(model, method, task, seed)
    elif method.train == "bitfit":
        _bitfit(model)
    elif method.train == "head":
        _head(model)
    # full: everything as loaded. Fixed tables (sinusoidal positions) are frozen by their own class, and stay so.
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            # Clipping and noise are computed in the weights' own precision; half precision would round the noise.
            parameter.data = parameter.data.float()
    if method.frozen_weights != "float32":
        from sotto.models import frozen

        frozen.store(model, method.frozen_weights)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """What would be trained: `trainable` and `total` numbers of weights, `share`, and the trainable `names`.

    Weights shared between modules count once.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    count = sum(trainable.values())
    return {"trainable": count, "total": total, "share": count / max(1, total), "names": list(trainable)}


def _head_parameters(model: nn.Module) -> set[str]:
    """Names of the classification head's parameters; empty for a language model, whose output layer is pretrained."""
    if not support.is_classifier(model):
        return set()
    heads = support.head_names(model)
    return {name for name, _ in model.named_parameters() if name.split(".")[0] in heads}


def _only(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _bitfit(model: nn.Module) -> None:
    """Trains the bias terms and the head (Ben Zaken et al., arXiv 2106.10199; under DP: Bu et al., arXiv 2210.00036).

    A bias' per-example gradient is the sum of the output gradients over tokens: it needs no stored activation at all.
    """
    head = _head_parameters(model)
    biases = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1].endswith("bias")}
    if not biases - head:
        raise SottoError(
            "SOT320",
            what=f"{type(model).__name__} has no bias terms to train.",
            where="method.train: bitfit",
            why="Llama-like models have linear layers and norms without biases.",
            fix="Set method.train: lora.",
        )
    _only(model, biases | head)


def _head(model: nn.Module) -> None:
    """A linear probe: the backbone gives fixed features, and only what stands on them is trained."""
    head = _head_parameters(model)
    if not head:
        raise SottoError(
            "SOT324",
            what=f"{type(model).__name__} has no classification head.",
            where="method.train: head",
            why="A language model's output layer belongs to what was pretrained, and is often its input embedding.",
            fix="Set method.train: lora, or give data.label and data.labels to classify.",
        )
    _only(model, head)
