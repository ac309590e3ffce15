"""Three small things that loading, adapters and export share: silence, seeded initialisation, and what the head is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from sotto.errors import SottoError


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load report; Sotto says itself which weights are new."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New weights drawn inside depend on `seed` alone, and the global generator is as before afterwards.

    Only the CPU generator: weights are created there. `torch.manual_seed` would also reseed every GPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def backbone_prefix(model: nn.Module) -> str:
    """The attribute that holds the pretrained backbone: `bert`, `model`, `transformer`, ..."""
    return str(getattr(model, "base_model_prefix", ""))


def head_names(model: nn.Module) -> list[str]:
    """Names of the modules that sit on top of the backbone and hold weights: `classifier`, `score`, `lm_head`, ..."""
    prefix = backbone_prefix(model)
    return [n for n, child in model.named_children() if n != prefix and any(True for _ in child.parameters())]


def is_classifier(model: nn.Module) -> bool:
    """Whether the model (not wrapped by peft) scores classes rather than next tokens."""
    return type(model).__name__.endswith(("ForSequenceClassification", "MeanPooledClassifier"))


def dummy_batch(model: nn.Module, rows: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """A fixed batch `input_ids`, `attention_mask`, both (rows, length): to compare two models, not to learn.

    The last row is padded on the right by a quarter or more, so that masks are compared as well.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr]
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    device = next(model.parameters()).device
    ids = (torch.arange(rows * length, device=device) * 7 + 3).remainder(config.vocab_size).view(rows, length)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    if config.is_encoder_decoder:  # its classifiers read at the end-of-text token, of which every row has one
        ids[(ids == config.eos_token_id) | (ids == config.pad_token_id)] = config.vocab_size - 1
        ids[mask == 0] = config.pad_token_id
        ids[torch.arange(rows, device=device), mask.sum(1) - 1] = config.eos_token_id
    return {"input_ids": ids, "attention_mask": mask}


def set_padding(model: nn.Module, pad_token_id: int | None) -> None:
    """Tells a model its padding token, in all of its configurations.

    After construction: an embedding that is built with a padding index never learns that token's vector, and where
    padding borrows the end-of-text token, that vector matters.
    """
    config: Any = model.config
    for part in (config, config.get_text_config(), getattr(model, "generation_config", None)):
        if part is not None:
            part.pad_token_id = pad_token_id


@torch.no_grad()
def dummy_logits(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits of a fixed batch in evaluation mode, float32, on the CPU. Every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(**(batch or dummy_batch(model))).logits.float().cpu()
    finally:
        for module, training in modes:
            module.training = training


def probe(model: nn.Module) -> list[float]:
    """At most 16 logits of the fixed batch, spread over all of them: enough to tell two models apart."""
    logits = dummy_logits(model).flatten()
    return [round(value, 6) for value in logits[:: max(1, len(logits) // 16)][:16].tolist()]


def refuse_batch_norm(model: nn.Module) -> None:
    """Raises SOT312 when the model normalises over the batch, anywhere."""
    for path, module in model.named_modules():
        name = type(module).__name__
        known = isinstance(module, nn.modules.batchnorm._BatchNorm)
        leaf = not any(True for _ in module.children())
        if known or (leaf and "BatchNorm" in name and "Frozen" not in name):
            raise SottoError(
                "SOT312",
                what=f"The model uses batch normalisation ({name}).",
                where=f"module {path}",
                why="It mixes the examples of a batch, so that no example has a gradient of its own to clip.",
                fix="Use a model with layer or group normalisation; almost all language models are such.",
            )


def refuse_two_way_language_model(model: nn.Module) -> None:
    """Raises SOT316 when the scores of a token depend on later tokens. Found by trying: flags in configs differ.

    Two passes of four tokens, of which the last differs. A model that sees the answer learns to copy, not to write.
    """
    batch = dummy_batch(model, rows=1, length=4)
    batch["attention_mask"].fill_(1)  # a change behind the mask would prove nothing
    config: Any = model.config
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][0, -1] = (changed["input_ids"][0, -1] + 1) % config.get_text_config().vocab_size
    before, after = dummy_logits(model, batch)[:, :-1], dummy_logits(model, changed)[:, :-1]
    # A causal model computes the very same numbers; the margin is for kernels that sum in another order.
    margin = 1e-5 * float(before.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if not torch.allclose(before, after, rtol=0.0, atol=margin, equal_nan=True):
        raise SottoError(
            "SOT316",
            what=f"{type(model).__name__} reads text in both directions, so it cannot learn to write.",
            where="model.name",
            why="Each token's score already depends on the tokens after it.",
            fix="Use a causal language model (GPT-2, Llama, ...), or classification: give data.label and data.labels.",
        )
