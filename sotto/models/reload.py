"""Opens a model that Sotto exported: plain, mean-pooled, with a side network, reversible, or an adapter on its base.

The folder may have come by mail. It is checked like any other model (`source.inspect`), an adapter's configuration is
read key by key from an allow-list, and no pickle is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sotto.errors import SottoError
from sotto.models import frozen, lora, support
from sotto.models.config_json import WRAPPED_TYPES, read_json
from sotto.models.headers import read_header
from sotto.models.load import build_network
from sotto.models.source import ModelFacts, inspect, resolve

ADAPTER_CONFIG, ADAPTER_WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "sotto.json"

# peft's other keys turn on initialisations from data, import modules by name (megatron_core) or name files.
_LORA_KEYS = {
    "r", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type",
    "modules_to_save", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# Without these an adapter means something else, so they must be off rather than ignored.
_MUST_BE_OFF = (
    "use_dora",
    "lora_bias",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
)


def load_exported(folder: str | Path, base: str | Path | None = None) -> nn.Module:
    """Opens an exported model for use. This is `sotto.load`.

    Args:
      folder: what `export` wrote.
      base: for an adapter, the folder or Hub name of the model it belongs to; default: the name that it was exported
        with, which is a Hub name or a folder here.

    Returns:
      a transformers model (side and reversible ones too), a `MeanPooledClassifier`, or a `PeftModel`; in evaluation
      mode, on the CPU. Its output has `.logits`.

    Raises:
      SottoError: SOT334 the folder is not such a model, SOT335 the adapter's base model is not here.
    """
    folder = resolve(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, base)
    facts = inspect(folder)
    architecture = facts.architectures[0] if facts.architectures else ""
    if facts.model_type in WRAPPED_TYPES:
        return _for_use(_load_wrapped(facts, architecture))
    if facts.sotto.get("pooling") == "mean":
        task, pooling = "classification", "mean"
    elif architecture.endswith("ForSequenceClassification"):
        task, pooling = "classification", "model"
    elif MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(facts.model_type) == architecture:
        task, pooling = "generation", "model"
    else:
        raise _not_an_export(folder, f"its architecture is '{architecture}'")
    network, new = build_network(facts, task, labels=facts.labels, pooling=pooling, keep_dropout=True, seed=0)
    if new:
        raise _not_an_export(folder, f"it lacks the weights {', '.join(new[:3])}")
    return _for_use(network)


def _load_wrapped(facts: ModelFacts, architecture: str) -> nn.Module:
    """A model with a side network, or a reversible one."""
    from sotto.models import reversible, side

    classes = (
        side.SideForSequenceClassification, side.SideForCausalLM,
        reversible.ReversibleForSequenceClassification, reversible.ReversibleForCausalLM,
    )  # fmt: skip
    wrapper: Any = next((c for c in classes if c.__name__ == architecture), None)
    if wrapper is None:
        raise _not_an_export(facts.path, f"its architecture is '{architecture}'")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    try:
        with support.quiet(), support.seeded(0):
            config = wrapper.config_class.from_dict(dict(facts.config))
            network, report = wrapper.from_pretrained(
                str(facts.path), config=config, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        raise _not_an_export(facts.path, f"{type(error).__name__}: {str(error).strip()[:160]}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise _not_an_export(facts.path, f"it lacks the weight {min([*report['missing_keys'], '(other shapes)'])}")
    return network


def _for_use(network: nn.Module) -> nn.Module:
    """Back from training to generation: keep keys and values of past tokens."""
    if getattr(network, "generation_config", None) is not None:
        network.config.use_cache = True  # type: ignore[union-attr]
    return network.eval()


def _load_adapter(folder: Path, base: str | Path | None) -> PeftModel:
    values = read_json(folder / ADAPTER_CONFIG)
    note = read_json(folder / NOTE) if (folder / NOTE).is_file() else {"task": "generation"}
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _not_an_export(folder, f"it has no {ADAPTER_WEIGHTS}")
    read_header(folder / ADAPTER_WEIGHTS)
    config = _lora_config(folder, values)
    facts = inspect(_base_folder(folder, values, base))
    labels, task = note.get("labels") or (), note.get("task")
    if task not in ("classification", "generation") or (task == "classification" and len(labels) < 2):
        raise _not_an_export(folder, f"{NOTE} does not say which classes it has")
    if note.get("frozen_weights", "float32") not in frozen.KINDS:
        raise _not_an_export(folder, f"{NOTE} does not say how its base model is kept")
    network, _ = build_network(
        facts, task, labels=labels, pooling=note.get("pooling", "model"), keep_dropout=True, seed=0
    )
    if note.get("pad_token_id") is not None:
        support.set_padding(network, int(note["pad_token_id"]))
    try:
        wrapped = lora.wrap(_for_use(network), config, seed=0)
        own = {name for name, p in wrapped.named_parameters() if p.requires_grad}
        stored = load_file(folder / ADAPTER_WEIGHTS)
        result = set_peft_model_state_dict(wrapped, stored)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _not_an_export(folder, f"it does not fit its base model ({str(error).strip()[:120]})") from error
    frozen.store(wrapped.requires_grad_(False), note.get("frozen_weights", "float32"))
    lacking = own & set(result.missing_keys)
    if lacking or result.unexpected_keys:
        name = sorted(lacking or result.unexpected_keys)[0]
        raise _not_an_export(folder, f"it does not fit its base model (weight {name[:80]})")
    _check_base(folder, wrapped, note.get("probe"))
    return wrapped.eval()


def _check_base(folder: Path, model: PeftModel, probe: Any) -> None:
    """Compares with what the model answered at export, loosely: other machines round differently."""
    if not isinstance(probe, list):
        return
    expected, found = torch.tensor(probe), torch.tensor(support.probe(model))
    scale = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=0, atol=1e-2 * scale, equal_nan=True):
        raise _not_an_export(folder, "its base model has other weights than the one it was trained on")


def _lora_config(folder: Path, values: dict[str, Any]) -> LoraConfig:
    on = [key for key in _MUST_BE_OFF if values.get(key)]
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or on:
        raise _not_an_export(folder, f"it is not a plain LoRA adapter ({', '.join(on) or values.get('peft_type')})")
    kept = {key: value for key, value in values.items() if key in _LORA_KEYS and value is not None}
    # peft adds its two usual heads itself; said twice they would be wrapped twice.
    kept["modules_to_save"] = [n for n in kept.get("modules_to_save", []) if n not in ("classifier", "score")]
    return LoraConfig(lora_dropout=0.0, bias="none", init_lora_weights=True, **kept)


def _base_folder(folder: Path, values: dict[str, Any], base: str | Path | None) -> Path:
    name = base or values.get("base_model_name_or_path") or ""
    try:
        return resolve(name, values.get("revision") if base is None else None)
    except SottoError as error:
        raise SottoError(
            "SOT335",
            what=f"The adapter's base model '{name}' is not here.",
            where=str(folder / ADAPTER_CONFIG),
            why=f"An adapter is a change to another model, and useless without it. {error.what}",
            fix="Give its folder: sotto.load(adapter, base='path/to/base-model').",
        ) from error


def _not_an_export(folder: Path, detail: str) -> SottoError:
    return SottoError(
        "SOT334",
        what=f"The folder is not a model that Sotto can open: {detail}.",
        where=str(folder),
        why="A model that is opened half would answer, and answer wrongly.",
        fix="Give a folder that `sotto train` exported (it holds config.json or adapter_config.json).",
    )
