"""Low-rank adapters on the linear layers, through peft.

LoRA: Hu et al. 2021, arXiv 2106.09685; under DP: Yu et al. 2022, arXiv 2110.06500. An adapter has far fewer weights
than its layer, so that far less noise is added in total and only the small factors need per-example gradients.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sotto.config import MethodSection
from sotto.errors import SottoError, did_you_mean
from sotto.models import support

# An allow-list, so that an initialisation that peft adds tomorrow is refused until somebody has read it. EVA, CorDA and
# LoRA-GA look at training data; PiSSA, OLoRA and LoftQ rewrite the base weights, so the adapter fits no other base.
_INITS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}

_BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The first number in a module's path is its block. peft reads `layers_to_transform` the same way."""
_FUSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Families whose fast kernels read the weight of `out_proj` past the layer, so that peft refuses an adapter there."""
_PEFT_HEADS = {"classifier", "score"}
"""Heads that peft saves for classification without being told."""


def add_lora(model: nn.Module, method: MethodSection, task: str, seed: int) -> PeftModel:
    """Wraps `model` with adapters. The base weights are frozen; adapters and the classification head are trained.

    Args:
      task: `classification` or `generation`.
      seed: draws the adapters. The global random state is left alone.

    Raises:
      SottoError: SOT321 unknown target, SOT322 unknown block, SOT323 refused initialisation, SOT325 odd rank.
    """
    init = _checked_init(method)
    heads = support.head_names(model) if task == "classification" else []
    layers = linear_layers(model)
    chosen = _in_blocks(_targets(model, layers, method.lora_targets), layers, method.lora_layers)
    conv1d = any(isinstance(layers[name], Conv1D) for name in chosen)
    alpha = method.lora_alpha
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=init,  # type: ignore[arg-type]
        task_type="SEQ_CLS" if task == "classification" else "CAUSAL_LM",
        modules_to_save=[h for h in heads if h not in _PEFT_HEADS],
        fan_in_fan_out=conv1d,
        **_spelled(model, chosen, method.lora_layers),
    )
    wrapped = wrap(model, config, seed)
    if method.lora_train == "up":
        # FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): the update is then linear in what is trained, so that noise on
        # the two factors does not multiply.
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".lora_A." not in name)
    return wrapped


def wrap(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """`get_peft_model` with seeded weights; checks that adapters and head are trainable and nothing else is."""
    heads = support.head_names(model) if config.task_type == "SEQ_CLS" else []
    with support.seeded(seed), support.quiet(), warnings.catch_warnings():
        # peft asks transformers for a property by its old name; the reader of this warning could do nothing about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # transformers renames the experts' adapters for peft, also where no expert has one.
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*", category=RuntimeWarning)
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(wrapped, PeftModel)
    saved = tuple(f"base_model.model.{head}.modules_to_save." for head in heads)
    for name, parameter in wrapped.named_parameters():
        expected = ".lora_" in name or name.startswith(saved)
        assert parameter.requires_grad == expected, f"peft left requires_grad={parameter.requires_grad} on {name}"
    return wrapped


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Paths of the layers that can have an adapter: linear ones, but neither the head nor the output embedding."""
    heads = set(support.head_names(model)) if support.is_classifier(model) else set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name.split(".")[0] not in heads
    }


def _checked_init(method: MethodSection) -> bool | str:
    if method.lora_init not in _INITS:
        raise SottoError(
            "SOT323",
            what=f"The adapter initialisation '{method.lora_init}' is not one of {', '.join(_INITS)}.",
            where="method.lora_init",
            why="Others look at training data (EVA, CorDA, LoRA-GA) or rewrite the base weights (PiSSA, OLoRA, LoftQ).",
            fix="Use default, gaussian or orthogonal.",
        )
    if method.lora_init == "orthogonal" and method.lora_rank % 2:
        raise SottoError(
            "SOT325",
            what=f"Orthogonal initialisation needs an even rank, not {method.lora_rank}.",
            where="method.lora_rank",
            why="It gives one half of the rank's directions to each of the two factors.",
            fix=f"Set method.lora_rank to {method.lora_rank + 1}, or method.lora_init to default.",
        )
    return _INITS[method.lora_init]


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _targets(model: nn.Module, layers: dict[str, nn.Module], targets: Sequence[str] | str) -> list[str]:
    """Paths of the layers that `lora_targets` names."""
    if isinstance(targets, str):  # "all-linear"
        kind = getattr(model.config, "model_type", None)
        return [path for path in layers if not (kind in _FUSED and path.rsplit(".", 1)[-1] == "out_proj")]
    for target in targets:
        if not target or not any(_matches(path, target) for path in layers):
            names = sorted({path.rsplit(".", 1)[-1] for path in layers})
            exists = any(_matches(path, target) for path, _ in model.named_modules())
            kind = "is not a linear layer below the head" if exists else "is the name of no layer"
            raise SottoError(
                "SOT321",
                what=f"'{target}' {kind} of {type(model).__name__}.{did_you_mean(target, names)}",
                where="method.lora_targets",
                why="An adapter stands beside a linear layer; without one, less would be trained than you asked for.",
                fix=f"Choose from: {', '.join(names)}; or write all-linear.",
            )
    return [path for path in layers if any(_matches(path, target) for target in targets)]


def _block(path: str) -> int | None:
    found = _BLOCK.match(path)
    return int(found[1]) if found else None


def _in_blocks(chosen: list[str], layers: dict[str, nn.Module], blocks: Sequence[int] | None) -> list[str]:
    """Keeps the paths inside the given blocks; all when `blocks` is None."""
    if blocks is None:
        return chosen
    present = sorted({b for path in layers if (b := _block(path)) is not None})
    unknown = [b for b in blocks if b not in present]
    kept = [path for path in chosen if _block(path) in blocks]
    if unknown or not kept:
        told = f"the blocks {present[0]} to {present[-1]}" if present else "no numbered blocks"
        raise SottoError(
            "SOT322",
            what=f"The model has no block {unknown[0]}." if unknown else "No targeted layer lies in these blocks.",
            where="method.lora_layers",
            why=f"This model has {told}; nothing would be trained there.",
            fix=f"Give numbers from {told}, or leave method.lora_layers out to adapt all.",
        )
    return kept


def _spelled(model: nn.Module, chosen: list[str], blocks: Sequence[int] | None) -> dict[str, Any]:
    """How to name `chosen` to peft: by short names (readable in adapter_config.json) if they mean exactly the same."""
    short = sorted({path.rsplit(".", 1)[-1] for path in chosen})
    heads = set(support.head_names(model)) if support.is_classifier(model) else set()
    meant = [
        path
        for path, _ in model.named_modules()
        if any(_matches(path, s) for s in short)
        and (blocks is None or _block(path) in blocks)
        and path.split(".")[0] not in heads
    ]
    if meant != chosen:
        return {"target_modules": chosen}
    return {"target_modules": short} | ({} if blocks is None else {"layers_to_transform": sorted(set(blocks))})
