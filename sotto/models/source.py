"""Finds a model on this machine (or fetches it) and reads its facts from headers alone: no torch, no weights in memory.

`sotto plan` uses this to know shapes and memory in well under two seconds, and `load.py` uses it to refuse a checkpoint
that is damaged, pickled or wants to run code, before any library opens it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sotto.errors import SottoError, did_you_mean
from sotto.models.config_json import read_config, read_json
from sotto.models.headers import TensorHeader, read_header

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]
# Folders hold other formats of the same weights; "consolidated" is Mistral's second copy of them.
_NOT_THESE = ["*/*", "consolidated*"]

_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "n_ctx"),
}
_DEPTHS = (*_ALIASES["num_layers"], "num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
MOST_LAYERS = 1000
"""More are believed only if there are as many tensors."""


@dataclass(frozen=True)
class ModelFacts:
    """What config.json and the safetensors headers say about a model.

    Attributes:
      path: the local folder.
      name: how the model is called in public: a Hub name, or the folder's last component. Never a local path.
      revision: the Hub commit when the folder is a Hub snapshot.
      model_type, architectures: as in config.json.
      parameters: number of floating-point weights, tied embeddings counted once. Buffers of integers are not counted.
      hidden_size, num_layers, num_heads, vocab_size, max_positions: 0 when config.json does not say.
      tied_embeddings: the output layer shares the input embedding's weight.
      labels: the class names of a classifier, in order; empty when config.json names none.
      tensors: tensor name -> type and shape, of all shards.
      config: config.json without the keys that could run code. The only form in which it is handed on.
      sotto: what Sotto noted at export (`{"pooling": "mean"}`), else empty.
    """

    path: Path
    name: str
    revision: str | None
    model_type: str
    architectures: tuple[str, ...]
    parameters: int
    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    labels: tuple[str, ...]
    tensors: Mapping[str, TensorHeader] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    sotto: Mapping[str, Any] = field(default_factory=dict)


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """Finds the local folder of a model: a folder, the Hub cache, or a download into that cache.

    A complete copy in the cache is used as it is, without asking the network whether it is the newest: the same recipe
    then gives the same model, and works offline. Only safetensors, JSON and tokenizer files are fetched.

    Raises:
      SottoError: SOT300, there is no such folder and the Hub does not give it (or is not reachable).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    text = str(name)
    if folder.is_file():
        raise _not_found(text, f"'{text}' is a file, not a folder", "A model is a folder.", f"Write '{folder.parent}'.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith((".", "-")):
        hint = did_you_mean(folder.name, _neighbours(folder.parent))
        raise _not_found(
            text,
            f"There is no folder '{text}'.{hint}",
            "The name is not of the form 'organisation/model' either, so it cannot be a Hub name.",
            "Check the path; it is taken relative to the folder in which you start Sotto.",
        )
    return _from_hub(text, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    """The snapshot folder of a Hub model: from the cache if complete, else downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": _PATTERNS, "ignore_patterns": _NOT_THESE}
    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
        if _complete(cached):
            return cached
    except (OSError, ValueError):  # not cached; LocalEntryNotFoundError is both
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except HFValidationError as error:
        reason, fix = f"It is not a valid Hub name ({str(error)[:100]}).", "Write a folder, or 'organisation/model'."
    except HfHubHTTPError as error:
        reason = f"The Hub refused: {type(error).__name__}."
        fix = "Check the name and the revision; for a gated model accept its licence and run `hf auth login`."
    except Exception as error:
        # Network stacks differ in what they raise (httpx, ssl, socket, proxies). All of it means: not reachable.
        reason = f"It is neither a folder nor in the Hub cache, and the Hub was not reachable ({type(error).__name__})."
        fix = "Download the model where there is a network (`hf download NAME`) and give its folder as model.name."
    hint = did_you_mean(name, [*_neighbours(Path(name).parent, name), *_cached_names()])
    shown = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    raise _not_found(name, f"The model {shown} was not found.{hint}", reason, fix)


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has all that is needed; an interrupted download has not."""
    try:
        return (folder / "config.json").is_file() and all(f.is_file() for f in weight_files(folder))
    except SottoError:
        return False


def _neighbours(folder: Path, like: str = "") -> list[str]:
    """Folders beside the one that was asked for, written the way it was asked for."""
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    return [f"{folder}/{name}" if "/" in like else name for name in names[:10_000]]


def _cached_names() -> list[str]:
    from huggingface_hub import constants

    folders = _neighbours(Path(constants.HF_HUB_CACHE))
    return [name.removeprefix("models--").replace("--", "/") for name in folders if name.startswith("models--")]


def _not_found(name: str, what: str, why: str, fix: str) -> SottoError:
    return SottoError("SOT300", what=what, where=f"model.name: {name}", why=why, fix=fix)


def public_name(path: str | Path) -> tuple[str, str | None]:
    """How a model is called in anything that leaves the machine: (name, Hub commit or None). Never a local path.

    >>> public_name("/home/ann/.cache/huggingface/hub/models--org--tiny/snapshots/0123abcd")
    ('org/tiny', '0123abcd')
    >>> public_name("/home/ann/secret-project/tiny")
    ('tiny', None)
    """
    parts = Path(path).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return (parts[-1] if parts else "model"), None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, in the order transformers looks for them.

    Raises:
      SottoError: SOT302 only pickled weights, SOT303 no weights at all, SOT304 an index that leads elsewhere.
    """
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _PICKLED)
    if pickled:
        raise SottoError(
            "SOT302",
            what=f"The weights are pickled ({', '.join(pickled[:3])}); there is no {SAFETENSORS}.",
            where=str(folder),
            why="Opening a pickle file runs whatever code its author put in it, on the machine that holds your data.",
            fix="Convert it once, on another machine: AutoModel.from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors; or use https://huggingface.co/spaces/safetensors/convert.",
        )
    raise SottoError(
        "SOT303",
        what=f"The folder holds no {SAFETENSORS} and no {INDEX}.",
        where=str(folder),
        why="There is nothing to start from, and Sotto does not train from random weights unasked.",
        fix="Give the folder of a pretrained model in safetensors format.",
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # A shard's name is a file in this folder: "../x" or "/x" would make an index read anything on the machine.
    if not weight_map or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in names):
        raise _bad_index(index, "its weight_map is missing or names something other than .safetensors files beside it")
    return weight_map  # type: ignore[return-value]


def _bad_index(index: Path, detail: str) -> SottoError:
    return SottoError(
        "SOT304",
        what=f"{index.name} is not sound: {detail}.",
        where=str(index),
        why="A model with missing shards would be filled up with random weights.",
        fix="Download or copy the model's folder again.",
    )


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise _bad_index(folder / INDEX, f"the shard {file.name} is not there")
        tensors.update(read_header(file))
    if not (folder / SAFETENSORS).is_file():
        absent = sorted(_weight_map(folder / INDEX).keys() - tensors.keys())
        if absent:
            raise _bad_index(folder / INDEX, f"{len(absent)} tensors are in no shard, for example '{absent[0][:80]}'")
    return tensors


def inspect(path: Path, *, weights: bool = True) -> ModelFacts:
    """Reads a model's facts from config.json and the safetensors headers. Takes milliseconds and no memory.

    Args:
      weights: False reads config.json alone; `tensors` is empty then, and `parameters` 0.

    Raises:
      SottoError: SOT301 to SOT308, the folder is not a model that Sotto may open.
    """
    path = Path(path)
    config = read_config(path)
    tensors = _read_tensors(path) if weights else {}
    name, revision = public_name(path.resolve())
    inner = config.get("text_config")
    layers = [config, inner] if isinstance(inner, dict) else [config]
    numbers = {fact: _number(layers, keys) for fact, keys in _ALIASES.items()}
    _refuse_endless(layers, max(MOST_LAYERS, len(tensors)), path / "config.json")
    tied = _tied(layers, tensors)
    noted = config.get("sotto")
    return ModelFacts(
        path=path,
        name=name,
        revision=revision,
        model_type=config["model_type"],
        architectures=tuple(str(a) for a in config.get("architectures") or ()),
        parameters=_count(tensors, tied),
        tied_embeddings=tied,
        labels=_labels(config),
        tensors=tensors,
        config=config,
        sotto=noted if isinstance(noted, dict) else {},
        **numbers,
    )


def _refuse_endless(layers: Iterable[dict[str, Any]], most: int, file: Path) -> None:
    """Modules are built layer by layer, before any weight is looked for: a billion of them would take all memory.

    With fewer than none, a model without its layers would be built and trained.
    """
    for key, value in ((key, layer[key]) for layer in layers for key in _DEPTHS if key in layer):
        if isinstance(value, int | float) and not 0 <= value <= most:
            raise SottoError(
                "SOT306",
                what=f"config.json says {key}: {str(value)[:40]}.",
                where=f"{file}: {key}",
                why="There is no model of less than no layers."
                if value < 0
                else f"It would take all memory to build them, and there is no model of more than {most} layers.",
                fix="Download or copy the model's folder again.",
            )


def _number(layers: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> int:
    found = (layer[key] for layer in layers for key in keys if type(layer.get(key)) is int)
    return next(found, 0)


def _is_output(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight", "decoder.weight"))


def _tied(layers: list[dict[str, Any]], tensors: Mapping[str, TensorHeader]) -> bool:
    """What config.json says; where it is silent, a language model without an output layer in its file ties it."""
    said = next((layer["tie_word_embeddings"] for layer in layers if "tie_word_embeddings" in layer), None)
    return bool(said) if said is not None else not any(_is_output(name) for name in tensors)


def _count(tensors: Mapping[str, TensorHeader], tied: bool) -> int:
    """Floating-point numbers in the file. A tied output layer that was stored all the same counts once."""
    shapes = {t.shape for name, t in tensors.items() if ("embed" in name or "wte" in name) and not _is_output(name)}
    twice = (t for name, t in tensors.items() if tied and _is_output(name) and t.shape in shapes)
    return sum(t.numel for t in tensors.values() if t.is_float) - sum(t.numel for t in twice)


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """`id2label` in the order of its ids; empty when it is absent or its ids are not 0, 1, 2, ..."""
    named = config.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))}:
        return ()
    return tuple(str(named[str(i)]) for i in range(len(named)))
