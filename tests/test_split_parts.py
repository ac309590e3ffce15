"""A model in two parts is the model, at every depth; the bottom is frozen, known by its hash, and sent alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sotto.config import MethodSection, ModelSection
from sotto.errors import SottoError
from sotto.models import load as models_load
from sotto.models import support
from sotto.models.trainable import prepare
from sotto.split.parts import Bottom, Top

LAYERS = 3
ENCODER: dict[str, Any] = tiny_models.ENCODER | {"num_hidden_layers": LAYERS}
NAMES: Any = {0: "a", 1: "b", 2: "c"}
FAMILIES = ["bert", "roberta", "gpt2", "llama", "pooled"]


def build(family: str, seed: int = 5) -> torch.nn.Module:
    named: dict[str, Any] = ENCODER | {"id2label": NAMES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "bert":
            model = BertForSequenceClassification(BertConfig(**named))
        elif family == "roberta":
            special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            model = RobertaForSequenceClassification(RobertaConfig(**named, **special))
        elif family == "gpt2":
            shape: dict[str, Any] = {"vocab_size": 100, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
            model = GPT2ForSequenceClassification(GPT2Config(**shape, pad_token_id=0, id2label=NAMES))
        else:
            model = LlamaForSequenceClassification(LlamaConfig(**named, num_key_value_heads=2, pad_token_id=0))
    return model.eval()


def pooled(folder: Path) -> torch.nn.Module:
    tiny_models.save("bert", folder)
    section = ModelSection(name=str(folder), pooling="mean")
    model = models_load.load_model(section, tiny_models.CLASSIFY, MethodSection(), 0).model
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[operator, union-attr]
    return model


def make(family: str, tmp_path: Path) -> torch.nn.Module:
    return pooled(tmp_path / "model") if family == "pooled" else build(family)


def batch_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    batch = support.dummy_batch(model, rows=3, length=9)
    # Padding by the padding token itself: models that read from the ids where the text ends must find the same place.
    batch["input_ids"] = batch["input_ids"].clamp_min(3) * batch["attention_mask"]
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_bottom_and_top_are_the_model_at_every_depth(family: str, tmp_path: Path) -> None:
    whole = make(family, tmp_path)
    batch = batch_of(whole)
    with torch.no_grad():
        expected = whole(**batch).logits
    assert float(expected.std()) > 1e-4
    depth = 2 if family == "pooled" else LAYERS
    for layer in range(depth + 1):
        bottom, top = Bottom(make(family, tmp_path), layer), Top(make(family, tmp_path), layer)
        with torch.no_grad():
            got = top(bottom.hidden(batch), batch["attention_mask"])
        assert torch.allclose(got, expected, atol=1e-6), layer
        wrong = bottom.hidden(batch).flip(-1)
        with torch.no_grad():
            assert not torch.allclose(top(wrong, batch["attention_mask"]), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_rows_of_segments_stand_where_their_tokens_stood(family: str, layer: int, tmp_path: Path) -> None:
    """Rows that are three tokens apart, against a text of three times the length with holes between them."""
    top = Top(make(family, tmp_path), layer)
    rows = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    wide_rows, wide_mask = torch.zeros(2, 12, 32), torch.zeros(2, 12, dtype=torch.int64)
    wide_rows[:, ::3], wide_mask[:, ::3] = rows, mask
    with torch.no_grad():
        expected = top(wide_rows, wide_mask)
        assert torch.allclose(top(rows, mask, 3), expected, atol=1e-5)
        beside = top(rows, mask)
    # The others have added their places below the cut, so that the rows alone tell where they stood.
    assert torch.allclose(beside, expected, atol=1e-5) == (family != "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_part_keeps_the_weights_of_the_other(family: str, tmp_path: Path) -> None:
    whole = make(family, tmp_path)
    bottom, top = Bottom(make(family, tmp_path), 1), Top(make(family, tmp_path), 1)
    sizes = {name: p.numel() for name, p in whole.named_parameters()}
    held = {name for name, p in bottom.model.named_parameters() if p.numel()}
    assert held == bottom.names
    trained = {name for name, p in top.model.named_parameters() if p.requires_grad}
    assert not trained & held, "no weight is on both sides"
    assert {n for n in trained | held if n in sizes} == trained | held
    kept = {name: p.numel() for name, p in top.model.named_parameters() if p.numel()}
    assert not any(f".{word}.weight" in name for name in kept for word in ("word_embeddings", "wte", "embed_tokens"))
    # Everything that the whole model computes with is in one of the two, but for a pooler that nobody calls.
    assert all("pooler" in name for name in sizes.keys() - held - trained)


def test_the_hash_knows_every_bit_and_the_place_of_the_cut() -> None:
    first = Bottom(build("bert"), 1).sha256()
    assert first == Bottom(build("bert"), 1).sha256()
    assert first != Bottom(build("bert"), 2).sha256()
    assert first != Bottom(build("bert", seed=6), 1).sha256()
    for name in Bottom(build("bert"), 1).names:
        other = build("bert")
        weight: torch.Tensor = dict(other.named_parameters())[name].data
        flat = weight.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        assert Bottom(other, 1).sha256() != first, name
    above = build("bert")
    with torch.no_grad():
        dict(above.named_parameters())["bert.encoder.layer.1.output.dense.bias"].add_(1)
    assert Bottom(above, 1).sha256() == first, "the customer neither has nor checks what lies above"


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "head"])
@pytest.mark.parametrize("layer", [0, 2])
def test_training_reaches_the_top_and_only_the_top(method: str, layer: int) -> None:
    top = Top(build("bert"), layer)
    section = MethodSection(train=method, lora_layers=top.trained_layers if method == "lora" else None)  # type: ignore[arg-type]
    top.model = prepare(top.model, section, 0)
    top.freeze_below()
    before = {name: p.detach().clone() for name, p in top.named_parameters()}
    hidden = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in top.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(2):
        torch.nn.functional.cross_entropy(top(hidden, torch.ones(4, 5).long()), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = {name for name, p in top.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == {name for name, p in top.named_parameters() if p.requires_grad}
    assert not any(f".layer.{i}." in name for name in moved for i in range(layer))
    assert not any("embeddings" in name for name in moved)
    if method != "head":
        assert any(f".layer.{layer}." in name for name in moved)


def test_a_cut_above_the_model_is_refused() -> None:
    for part in (Bottom, Top):
        with pytest.raises(SottoError) as caught:
            part(build("bert"), LAYERS + 1)
        assert caught.value.code == "SOT810"
