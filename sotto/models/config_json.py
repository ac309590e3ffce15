"""Reads a model's config.json without believing it: keys that would choose which code runs are refused or dropped.

Why by hand: transformers reads some keys of this file as instructions. `auto_map` names Python files to run, and up to
5.2 `_attn_implementation_internal` fetched kernels from the Hub although remote code was off (CVE-2026-4372). An
underscore marks what a library keeps for itself, so no underscore key of a file that came from elsewhere is passed on.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from sotto.errors import SottoError, did_you_mean

MAX_JSON_BYTES = 8 * 2**20

WRAPPED_TYPES = ("sotto_side", "sotto_reversible")
"""Model types of Sotto itself: a transformers model, whose configuration is `text_config`, inside another class."""

_CODE_KEYS = {"auto_map", "custom_pipelines", "custom_code", "trust_remote_code", "kernel_config", "use_kernels"}
_IMPLEMENTATION_KEYS = re.compile(r"_?(attn|experts|mlp)_implementation(_internal)?$")
# Names that transformers resolves to its own code. Anything else there (`org/repo`, ...) is fetched and run.
_BUILT_IN = {None, "", "eager", "sdpa", "flex_attention", "flash_attention_2", "grouped_mm", "batched_mm"}


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of at most 8 MB.

    Raises:
      SottoError: SOT306, the file is too large, is not JSON or is not an object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise SottoError(
            "SOT306",
            what=f"{file.name} cannot be read: {str(error)[:120]}.",
            where=str(file),
            why="It says which model this is; without it the weights have no meaning.",
            fix="Download or copy the model's folder again.",
        ) from None
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json` of a model folder, stripped of what could run code.

    Returns:
      the keys that may be handed to a transformers config class, underscore keys removed at every depth.

    Raises:
      SottoError: SOT301 no such file, SOT305 it asks for code, SOT306 unreadable, SOT307 unknown `model_type`, SOT308
        the weights are quantised.
    """
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise SottoError(
            "SOT301",
            what="The folder has no config.json." + (" It holds an adapter, not a whole model." if adapter else ""),
            where=str(folder),
            why="config.json says which architecture the weights belong to.",
            fix="Give the folder that holds config.json and model.safetensors"
            + (", that is the adapter's base model." if adapter else ", as `save_pretrained` writes it."),
        )
    values = _clean(read_json(file), file)
    for other in ("tokenizer_config.json", "generation_config.json"):
        if (folder / other).is_file():
            _clean(read_json(folder / other), folder / other)
    _check_model_type(values, file)
    if values.get("quantization_config") or values.get("compression_config"):
        raise SottoError(
            "SOT308",
            what="The checkpoint is quantised.",
            where=f"{file}: quantization_config",
            why="Sotto trains and clips in float32; gradients through packed weights are not exact.",
            fix="Use the unquantised checkpoint of the same model; method.frozen_weights: int8 rounds it here.",
        )
    return values


def _clean(values: dict[str, Any], file: Path, path: str = "") -> dict[str, Any]:
    """Returns a copy without underscore keys; refuses keys that select code."""
    kept = {}
    for key, value in values.items():
        asks_for_code = bool(value) if key in _CODE_KEYS else False
        if _IMPLEMENTATION_KEYS.match(key):
            named = list(value.values()) if isinstance(value, dict) else [value]
            asks_for_code = any(not isinstance(n, str | None) or n not in _BUILT_IN for n in named)
            value = None
        if asks_for_code:
            raise SottoError(
                "SOT305",
                what=f"{file.name} asks for code that is not part of transformers: key '{path}{key}'.",
                where=f"{file}: {path}{key}",
                why="Sotto never runs code that comes with a model: it could read the data that you protect.",
                fix=f"Use a model that transformers supports itself; if it does, remove '{key}' from a local copy.",
            )
        if key in _CODE_KEYS or _IMPLEMENTATION_KEYS.match(key) or key.startswith("_"):
            continue
        kept[key] = _clean(value, file, f"{path}{key}.") if isinstance(value, dict) else value
    return kept


def _check_model_type(values: dict[str, Any], file: Path) -> None:
    if values.get("model_type") in WRAPPED_TYPES:
        inner = values.get("text_config")
        values = inner if isinstance(inner, dict) else {}
    model_type, known = values.get("model_type"), known_model_types()
    if isinstance(model_type, str) and (model_type in known or not known):
        return
    said = "names no model_type" if model_type is None else f"names the unknown model_type {str(model_type)[:60]!r}"
    raise SottoError(
        "SOT307",
        what=f"config.json {said}.{did_you_mean(str(model_type), known)}",
        where=f"{file}: model_type",
        why="The installed transformers has no class of that name, and code from elsewhere is never run.",
        fix="Upgrade transformers (`pip install -U 'transformers<6'`), or use a model that it supports.",
    )


@functools.cache
def known_model_types() -> frozenset[str]:
    """The model types of the installed transformers, read from its source text; empty if that cannot be found.

    Importing transformers takes seconds, and `sotto plan` must answer in less than two. An empty answer only postpones
    the check to the moment when the model is loaded.
    """
    spec = importlib.util.find_spec("transformers")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found: set[str] = set()
    for folder in folders:
        for name in ("auto_mappings.py", "configuration_auto.py"):
            file = Path(folder) / "models" / "auto" / name
            if file.is_file():
                found.update(re.findall(r'"([\w.-]+)"[,:] "\w+Config"', file.read_text(encoding="utf-8")))
    return frozenset(found)
