"""Writes a trained model as a folder that others can open, and opens it again.

What is covered: the folder appears whole or not at all; it was read back from disk and gave the same scores as the
live model; it holds safetensors and JSON, and no local path of this machine. What is not covered: whether the *weights*
may leave is the statement's business, not this module's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sotto.errors import SottoError
from sotto.models import folders, frozen, support
from sotto.models.pooling import MeanPooledClassifier
from sotto.models.reload import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NOTE, load_exported
from sotto.models.source import public_name

TOLERANCE = 1e-4
"""Largest difference of logits between the live model and what was read back, relative to logits above 1 (float32)."""

__all__ = ["export", "load_exported", "merged_state"]


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    mode: Literal["merged", "adapter"],
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model` to `folder`. The live model is not touched: every weight is bit for bit as before.

    Args:
      folder: is created; an earlier export there is replaced, anything else is not.
      mode: `merged`, a plain Hugging Face folder with adapters added into the weights; or `adapter`, peft's format.
      extra_config: public facts to keep with the model, under `sotto` in config.json (or in sotto.json for an adapter).

    Raises:
      SottoError: SOT330 there is no adapter, SOT331 what was read back differs, SOT332 the folder holds something else,
        SOT333 a file would name a local path. Nothing is left behind in these cases.
    """
    if mode == "adapter" and not isinstance(model, PeftModel):
        raise SottoError(
            "SOT330",
            what=f"{type(model).__name__} has no adapter to export.",
            where="output.export: adapter",
            why="Only method.train: lora trains an adapter; the other methods change the model's own weights.",
            fix="Set output.export: merged.",
        )
    folder = Path(folder).absolute()
    with folders.new_folder(folder) as partial, support.quiet():
        (write_merged if mode == "merged" else write_adapter)(model, partial, dict(extra_config or {}))
        _write_tokenizer(tokenizer, partial)
        source = str(_inner(model).config._name_or_path or "")  # type: ignore[union-attr]
        folders.refuse_local_paths(partial, [source, str(partial), str(folder)], shown=folder)
        _verify(model, partial, folder, source if mode == "adapter" else None)


def _inner(model: nn.Module) -> nn.Module:
    """The model below peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the plain model on the CPU: adapters added in, under the names of the model without adapters.

    Merged weights are new tensors: merging in place and subtracting afterwards would not give back the same bits. The
    others may share memory with the live model; read them only.
    """
    inner = _inner(model)
    adapted = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    state = {}
    for key, value in inner.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        layer, _, last = key.rpartition(".base_layer.")
        if last == "weight" and layer in adapted:
            value = value + adapted[layer].get_delta_weight("default").to(value.dtype)  # type: ignore[operator]
        name = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        state[name] = value.detach().cpu().contiguous()
    return state


def write_merged(model: nn.Module, folder: Path, extra: dict[str, Any]) -> None:
    """Writes weights, config.json and generation_config.json of the plain model."""
    inner = _inner(model)
    config: Any = copy.deepcopy(inner.config)
    config.use_cache = True  # off in training only
    note = dict(extra)
    state = merged_state(model)
    if isinstance(inner, MeanPooledClassifier):
        note["pooling"] = "mean"
        config.architectures = [type(inner.backbone).__name__]
        config.dtype = "float32"
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
    else:
        _skeleton(inner, config, state).save_pretrained(folder)
    values = _without_origin(folders.read(folder / "config.json"))
    folders.write(folder / "config.json", {**values, "sotto": note} if note else values)


def _without_origin(values: Any) -> Any:
    """A configuration without the place that the model came from, which configurations inside it remember as well."""
    if not isinstance(values, dict):
        return values
    return {key: _without_origin(value) for key, value in values.items() if key != "_name_or_path"}


def _skeleton(inner: nn.Module, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A fresh model of the same class that borrows `state`: it knows how its class is saved (tied weights, old names).

    Fresh, rather than a deep copy, because the live model may carry hooks with gradients behind them.
    """
    model_class: Any = type(inner)
    with torch.device("meta"), support.seeded(0):
        skeleton = model_class(config)
    skeleton.load_state_dict(state, assign=True)
    skeleton.tie_weights()
    if skeleton.can_generate():
        generation = copy.deepcopy(inner.generation_config)
        try:
            generation.validate(strict=True)  # type: ignore[union-attr]
        except ValueError:
            # Some published models contradict themselves here, and transformers then refuses to save them.
            generation = GenerationConfig.from_model_config(config)
        skeleton.generation_config = generation
    return skeleton


def write_adapter(model: nn.Module, folder: Path, extra: dict[str, Any]) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and what Sotto needs to rebuild the head around it."""
    assert isinstance(model, PeftModel)
    inner = _inner(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    config = copy.deepcopy(model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path, config.revision = public_name(inner.config._name_or_path)  # type: ignore[union-attr]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    # peft keeps names in sets, whose order changes from run to run; the same adapter shall give the same bytes.
    values = folders.read(folder / ADAPTER_CONFIG)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(set(values[key]))
    folders.write(folder / ADAPTER_CONFIG, values)

    classifier = support.is_classifier(inner)
    note = {
        "task": "classification" if classifier else "generation",
        "labels": list(inner.config.id2label.values()) if classifier else [],  # type: ignore[union-attr]
        "pooling": "mean" if isinstance(inner, MeanPooledClassifier) else "model",
        # Not every base model names a padding token, and without one a decoder cannot classify a batch.
        "pad_token_id": inner.config.get_text_config().pad_token_id,  # type: ignore[union-attr]
        # What the whole must answer on a fixed batch: a base model of the same shape but other weights is noticed.
        "probe": support.probe(model),
        "frozen_weights": frozen.kind_of(model),
    }
    folders.write(folder / NOTE, {**extra, **note})


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer without the paths that it remembers of where it came from."""
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    values = folders.read(file)
    for key in (
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "special_tokens_map_file",
        "local_files_only",
        "is_local",
    ):
        values.pop(key, None)
    if values.get("name_or_path"):
        values["name_or_path"] = public_name(values["name_or_path"])[0]
    folders.write(file, values)


def _verify(model: nn.Module, partial: Path, folder: Path, base: str | None) -> None:
    """Reads the folder back and compares its logits with the live model's on a fixed batch.

    Raises:
      SottoError: SOT331, they differ.
    """
    batch = support.dummy_batch(_inner(model))
    live = support.dummy_logits(model, batch)
    reread = load_exported(partial, base=base).to(batch["input_ids"].device)
    stored = support.dummy_logits(reread, batch)
    scale = max(1.0, float(live.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    if live.shape == stored.shape and torch.allclose(live, stored, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True):
        return
    difference = float((live - stored).abs().max()) if live.shape == stored.shape else float("inf")
    raise SottoError(
        "SOT331",
        what=f"The exported model gives other scores than the trained one (largest difference {difference:.2g}).",
        where=str(folder),
        why=f"Read back from disk, logits may differ by {TOLERANCE * scale:.2g} at most. The folder was removed.",
        fix="Check the disk and its free space, and export again; the trained weights are in the checkpoint.",
    )
