"""Loads a pretrained model and its tokenizer for private training: safetensors only, no remote code, float32 weights.

The result is refused rather than repaired where training it would not mean what the user thinks: a backbone with random
weights, batch normalisation, a language model that sees the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sotto.config import DataSection, MethodSection, ModelSection
from sotto.errors import SottoError
from sotto.models import support
from sotto.models.pooling import MeanPooledClassifier, load_pooled
from sotto.models.source import ModelFacts, inspect, resolve

Task = Literal["classification", "generation"]
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for `trainable.prepare`.

    Attributes:
      model: in evaluation mode, float32, on the CPU; dropout is zero unless it was asked for.
      tokenizer: with a padding token.
      facts: what the folder says about the model.
      new_weights: parameters that the checkpoint does not hold and that start untrained: the classification head.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts
    new_weights: tuple[str, ...] = ()


def load_model(model: ModelSection, data: DataSection, method: MethodSection, seed: int) -> LoadedModel:
    """Loads what `model.name` names, with the head that `data` asks for.

    Args:
      seed: initialises new weights. The global random state is left alone.

    Raises:
      SottoError: SOT300 to SOT317, the model cannot be found, opened or trained privately.
    """
    path = resolve(model.name, model.revision)
    facts = inspect(path)
    if not Path(model.name).expanduser().is_dir():
        facts = replace(facts, name=model.name)
    tokenizer = load_tokenizer(path, build_config(facts, keep_dropout=True))
    network, new = build_network(
        facts, data.task, labels=data.labels or (), pooling=model.pooling, keep_dropout=method.dropout, seed=seed
    )
    _agree_on_padding(network, tokenizer, facts)
    support.refuse_batch_norm(network)
    if data.task == "generation":
        support.refuse_two_way_language_model(network)
    return LoadedModel(network, tokenizer, facts, new)


def build_network(
    facts: ModelFacts, task: Task, *, labels: Sequence[str], pooling: str, keep_dropout: bool, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """Builds the transformers model (or the mean-pooled one) and fills it from the folder.

    Returns:
      the model in evaluation mode, and the names of the weights that the folder does not hold.

    Raises:
      SottoError: SOT306, SOT310, SOT311, SOT314 or SOT317.
    """
    config = build_config(facts, keep_dropout=keep_dropout)
    # A head with the wrong number of classes is replaced below; a backbone that does not fit is refused there as well.
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    options |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
    if task == "classification":
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    try:
        with support.quiet(), support.seeded(seed):
            if task == "classification" and pooling == "mean":
                del options["trust_remote_code"]  # known to the Auto classes only
                network, report = load_pooled(facts, config, **options)
            else:
                auto = _auto_class(facts, task)
                network, report = auto.from_pretrained(
                    str(facts.path), config=config, output_loading_info=True, **options
                )
    except (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        raise SottoError(
            "SOT314",
            what=f"transformers could not load the model: {type(error).__name__}: {str(error).strip()[:200]}",
            where=str(facts.path),
            why="config.json and the weights do not fit each other, or not the installed transformers.",
            fix="Try `AutoModel.from_pretrained(folder)` in Python; if that fails too, download the model again.",
        ) from error
    _refuse_layers_left_out(network, report, facts)
    new = _new_weights(network, report, facts, task)
    if task == "classification" and (new or facts.labels != tuple(labels)):
        # A head that was trained for other classes (or the same in another order) is no better than a new one.
        new = tuple(sorted({*new, *zero_output_layer(network)}))
    return network.eval(), new


def build_config(facts: ModelFacts, *, keep_dropout: bool) -> PreTrainedConfig:
    """The transformers configuration, from the checked keys only. Dropout is switched off here, before construction:
    attention modules copy their rate into themselves when they are built.

    Raises:
      SottoError: SOT306, the values do not fit the architecture.
    """
    try:
        config_class: Any = CONFIG_MAPPING[facts.model_type]
        config = config_class.from_dict(dict(facts.config))
    except Exception as error:  # each configuration class checks in its own way
        raise SottoError(
            "SOT306",
            what=f"config.json does not describe a {facts.model_type} model: {str(error).strip()[:200]}",
            where=str(facts.path / "config.json"),
            why="The architecture cannot be built from these values.",
            fix="Download or copy the model's folder again, or upgrade transformers.",
        ) from error
    config._name_or_path = str(facts.path)
    remove_dropout(config, ("layerdrop",) if keep_dropout else ("drop", "jitter"))
    config.use_cache = False  # keys and values of past tokens serve generation; in training they only cost memory
    return config


def remove_dropout(config: PreTrainedConfig, words: tuple[str, ...] = ("drop", "jitter")) -> list[str]:
    """Sets every rate of random dropping (and routing jitter) to zero, in nested configurations as well.

    Under DP the noise regularises already, and a backward pass that is computed twice must see the same network.
    LayerDrop goes in any case: one draw for a whole microbatch is nobody's own (see `sotto.dropout`).

    Args:
      words: what the names of such rates hold.

    Returns:
      the names of the keys that were changed.
    """
    changed = []
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            changed += [f"{name}.{key}" for key in remove_dropout(value, words)]
        elif any(word in name for word in words) and isinstance(value, float | int) and value and value is not True:
            setattr(config, name, 0.0)
            changed.append(name)
    return changed


def zero_output_layer(model: nn.Module) -> list[str]:
    """Sets the layer that scores the classes to zero, and returns its parameters' names.

    Under DP a new classifier starts at zero. A random one makes confident mistakes at first: its loss and gradients
    are large, all of them are clipped, and the budget is spent on unlearning noise. From zero, every class is equally
    likely, and the first step is that of a linear probe (near-zero initialisation: Mehta et al. 2022, arXiv
    2205.02973). Only the *last* layer: behind two layers of zeros no gradient would ever arrive.
    """
    heads = support.head_names(model)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] in heads]
    if not linear:
        return []
    name, layer = linear[-1]
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return [f"{name}.{parameter}" for parameter, _ in layer.named_parameters()]


def add_tokens(model: nn.Module, count: int, seed: int) -> None:
    """Gives the model's vocabulary `count` more tokens, which its tokenizer does not know, for audits.

    Their rows are drawn like those of a new model, from the seed, and not from the rows that are there.
    """
    network = model.backbone if isinstance(model, MeanPooledClassifier) else model
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    with support.quiet(), support.seeded(seed):
        network.resize_token_embeddings(rows + count, mean_resizing=False)  # type: ignore[operator]


def _auto_class(facts: ModelFacts, task: Task) -> Any:
    """The transformers Auto class of a task, if the architecture has one."""
    if task == "classification":
        auto, known = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        advice = "Use a BERT-like encoder, or set model.pooling: mean."
    else:
        auto, known = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        advice = "Use a causal language model such as GPT-2, Llama or Qwen."
    if facts.model_type not in known:
        raise SottoError(
            "SOT310",
            what=f"transformers has no {task} class for models of type '{facts.model_type}'.",
            where=f"{facts.path / 'config.json'}: model_type",
            why=f"The configuration asks for {task}" + (" (data.label is set)." if task == "classification" else "."),
            fix=advice,
        )
    return auto


def _new_weights(network: nn.Module, report: dict[str, Any], facts: ModelFacts, task: Task) -> tuple[str, ...]:
    """Names of weights that the checkpoint lacks. Those of a head are expected; those of a backbone are refused."""
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    heads = support.head_names(network) if task == "classification" else []
    backbone = sorted(name for name in new if name.split(".")[0] not in heads)
    if backbone:
        pooler = all(".pooler." in name for name in backbone)
        language_head = task == "generation" and all(n.split(".")[0] in support.head_names(network) for n in backbone)
        fix = "Use a complete checkpoint of this architecture."
        if pooler:
            fix = "Set model.pooling: mean, which does not need the pooler."
        elif language_head:
            fix = "Use the checkpoint of the language model, not that of the bare backbone or of a classifier."
        raise SottoError(
            "SOT311",
            what=f"The checkpoint lacks {len(backbone)} weights of {type(network).__name__}, such as '{backbone[0]}'.",
            where=str(facts.path),
            why="They would start at random, and private training cannot afford to learn a backbone from nothing.",
            fix=fix,
        )
    return tuple(sorted(new))


def _refuse_layers_left_out(network: nn.Module, report: dict[str, Any], facts: ModelFacts) -> None:
    """Layers of the checkpoint beyond those of config.json would be left out without a word.

    Not so weights that a layer has no use for, such as keys of a layer that takes another one's, and the layers after
    the last that predict tokens further ahead, which config.json counts apart.
    """
    known = {_NUMBER.sub(".*", name) for name in network.state_dict()}
    layers = {layer for name in network.state_dict() for layer in _layers(name)}
    text = network.config.get_text_config()  # type: ignore[union-attr, operator]
    last = getattr(text, "num_hidden_layers", 0)
    ahead = range(last, last + (getattr(text, "num_nextn_predict_layers", 0) or 0))
    left_out = []
    for key in report["unexpected_keys"]:
        alike, of = _NUMBER.sub(".*", key), _layers(key)
        if not of or not any(_ends(alike, name) or _ends(name, alike) for name in known):
            continue
        there = all(any(_ends(layer, name) or _ends(name, layer) for name in layers) for layer in of)
        if not there and int(of[0].rsplit(".", 1)[1]) not in ahead:
            left_out.append(key)
    if left_out:
        raise SottoError(
            "SOT317",
            what=f"The checkpoint has {len(left_out)} weights of layers that config.json leaves out, such as "
            f"'{sorted(left_out)[0]}'.",
            where=str(facts.path),
            why="The model would be another, smaller one than its weights were trained for.",
            fix="Put the number of layers in config.json right. If fewer are meant, load the model in Python, and save "
            "it once with save_pretrained.",
        )


def _layers(name: str) -> list[str]:
    """The numbered modules that a weight is in, outermost first: "h.3.experts.7.w" is in h.3 and in h.3.experts.7."""
    return [name[: number.end()] for number in _NUMBER.finditer(name)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def load_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder; one without a padding token pads with its end-of-text token.

    Args:
      config: the checked configuration, so that transformers does not read config.json again by itself.

    Raises:
      SottoError: SOT313 there is none or it cannot be read, SOT315 it has nothing to pad with.
    """
    try:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            # transformers makes up an empty vocabulary then, and a run would pay for learning unknown tokens.
            raise FileNotFoundError(f"none of {', '.join(TOKENIZER_FILES)} is there")
        with support.quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=config, use_fast=True, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception from the Rust side
        raise SottoError(
            "SOT313",
            what=f"The tokenizer cannot be loaded: {type(error).__name__}: {str(error).strip()[:160]}",
            where=str(folder),
            why="Text becomes the numbers that the model knows only through its own tokenizer.",
            fix="Put the model's tokenizer.json and tokenizer_config.json into the folder.",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SottoError(
                "SOT315",
                what="The tokenizer has neither a padding token nor an end-of-text token.",
                where=str(folder / "tokenizer_config.json"),
                why="Texts of different lengths cannot stand in one batch.",
                fix='Name one of its tokens in tokenizer_config.json, for example "pad_token": "<pad>".',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _agree_on_padding(network: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> None:
    """Tells the model its padding token, and refuses a tokenizer that knows more tokens than the model."""
    rows = network.config.get_text_config().vocab_size  # type: ignore[union-attr]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise SottoError(
            "SOT313",
            what=f"The tokenizer knows token {largest}, but the model's vocabulary ends at {rows - 1}.",
            where=str(facts.path),
            why="A text with such a token would stop the run in the middle, which tells something about the text.",
            fix="Use the tokenizer that belongs to this model, or a checkpoint whose embedding was resized for it.",
        )
    support.set_padding(network, tokenizer.pad_token_id)  # type: ignore[arg-type]
