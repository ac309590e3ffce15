"""Side networks of encoder-decoders: beside the decoder's layers, looking at what the encoder gave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
import torch.nn.functional as F
from gradient_oracle import FAST, check
from test_gradients_engine import UNITS, B, T, V
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    MBartConfig,
    MT5Config,
    MvpConfig,
    PLBartConfig,
    PreTrainedConfig,
    T5Config,
    UMT5Config,
)

import sotto
from sotto.errors import SottoError
from sotto.gradients.engine import attach
from sotto.models import load, support
from sotto.models.export import export
from sotto.models.reload import load_exported
from sotto.models.reversible import ReversibleOptions, make_reversible
from sotto.models.side import SideOptions, add_side

IDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
BART: dict[str, Any] = {"vocab_size": V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
                        "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 20,
                        "decoder_ffn_dim": 24, "max_position_embeddings": 32, "num_labels": 3, **IDS,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": V, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3,
                      "num_heads": 4, "num_labels": 3, "pad_token_id": 1, "eos_token_id": 2,
                      "decoder_start_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bart": BartConfig(**BART),
    "mbart": MBartConfig(**BART),
    "t5": T5Config(**T5),
    "mt5": MT5Config(**T5, tie_word_embeddings=True),
    "mvp": MvpConfig(**BART),
    "plbart": PLBartConfig(**BART),
    "umt5": UMT5Config(**T5),
}


def build(family: str) -> Any:
    config = copy.deepcopy(CONFIGS[family])
    load.remove_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForSequenceClassification.from_config(config).eval()


def with_side(family: str, **options: Any) -> Any:
    whole = add_side(build(family), SideOptions(**{"reduction": 2, "every": 1, **options}), seed=0)
    tiny_models.perturb(whole)
    return whole


def batch_of() -> dict[str, torch.Tensor]:
    """Rows that end with one end-of-text token each, one of them with padding behind it."""
    torch.manual_seed(3)
    ids = torch.randint(3, V, (B, T))
    ids[:, -1] = 2
    ids[2, -3:] = torch.tensor([2, 1, 1])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def losses_of(model: Any) -> Any:
    batch = batch_of()

    def losses(rows: torch.Tensor) -> torch.Tensor:
        logits = model(**{name: x[rows] for name, x in batch.items()}).logits
        return F.cross_entropy(logits, batch["input_ids"][rows, 0] % 3, reduction="none")

    return losses


@pytest.mark.parametrize("block", ["auto", "light"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_start_is_the_backbone_bit_for_bit(family: str, block: Any):
    model = build(family)
    before = support.dummy_logits(model)
    whole = add_side(model, SideOptions(reduction=2, every=1, block=block), seed=0)
    assert whole.config.options["block"] == ("layer" if block == "auto" else "light")
    assert len(whole.side.blocks) == 3, "beside the decoder's layers"
    batch = support.dummy_batch(model)
    assert torch.equal(support.dummy_logits(whole, batch), before)
    tiny_models.perturb(whole)
    assert not torch.allclose(support.dummy_logits(whole, batch), before, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"block": "light"}, {"every": 2}], ids=str)
@pytest.mark.parametrize("family", ["bart", "mbart", "t5", "umt5"])
def test_gradients_per_unit_are_exact(family: str, options: dict[str, Any]):
    whole = with_side(family, **options).double().train()
    for fast in FAST:
        check(whole, losses_of(whole), B, algorithm=fast, units=UNITS, tolerance=1e-6, slow=set())


def test_side_layers_have_the_backbones_own_table_of_distances():
    whole: Any = add_side(build("t5"), SideOptions(reduction=2, every=1), seed=0)
    tables = [whole.stack.layers[0].layer[0].SelfAttention.relative_attention_bias.weight,
              whole.side.blocks[0].layer[0].SelfAttention.relative_attention_bias.weight]  # fmt: skip
    assert torch.equal(tables[0][:, :2], tables[1])
    assert not tables[1].requires_grad


def test_side_layers_look_at_what_the_encoder_gave():
    """Not only through the frozen layers: with those cut off, the scores still follow the encoder's text."""
    whole = with_side("bart")
    ids = batch_of()["input_ids"]
    states = []
    for text in (ids, torch.cat([ids[:, :1].roll(1, 0), ids[:, 1:]], 1)):
        hook = whole.side.across.register_forward_hook(lambda m, a, out: states.append(out))
        whole(input_ids=text)
        hook.remove()
    assert not torch.allclose(*states)
    engine = attach(whole.train())
    total = engine.backward(losses_of(whole)(torch.arange(B)))
    assert float(total.gradients["side.across.weight"].norm()) > 0


def test_no_graph_reaches_the_backbone():
    whole = with_side("t5").train()
    assert not any(p.requires_grad for n, p in whole.named_parameters() if "transformer." in n)
    seen: list[Any] = []
    parts = [m for part in (whole.stack.owner.encoder, whole.stack.owner.decoder) for m in part.modules()]
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in parts
             if isinstance(m, torch.nn.Linear)]  # fmt: skip
    losses_of(whole)(torch.arange(B)).sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) > 20
    assert not any(x.requires_grad for x in seen)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_it_is_exported_and_opened_again(family: str, tmp_path: Path):
    whole = with_side(family)
    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load.load_tokenizer(tmp_path / "tokenizer")
    export(whole, tokenizer, tmp_path / "model", "merged", {"dp": {"private": False}})
    batch = support.dummy_batch(whole.backbone)
    expected = support.dummy_logits(whole, batch)
    for opened in (load_exported(tmp_path / "model"), sotto.load(tmp_path / "model")):
        torch.testing.assert_close(support.dummy_logits(opened, batch), expected, rtol=0, atol=1e-6)
    with support.quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(support.dummy_logits(plain, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_stored_outputs_stand_in_for_the_decoders_layers(family: str):
    whole = with_side(family)
    batch = batch_of()
    expected = whole(**batch).logits
    outputs = whole.backbone_outputs(**batch)
    whole.release_layers()
    with whole.fed(outputs):
        torch.testing.assert_close(whole(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_made_for_two_stacks_is_refused():
    model = build("bart")
    with pytest.raises(SottoError, match="SOT343"):
        add_side(model, SideOptions(reduction=2, every=1, init="prune"), seed=0)
    with pytest.raises(SottoError, match=r"SOT340.*an encoder and a decoder"):
        make_reversible(build("t5"), ReversibleOptions())


def save_seq2seq(folder: Path, family: str) -> None:
    """A pretrained encoder-decoder without a classifier, and a tokenizer that ends each text, as theirs do."""
    config = copy.deepcopy(CONFIGS[family])
    config.vocab_size = tiny_models.VOCAB
    config.pad_token_id, config.eos_token_id = (tiny_models.SPECIAL[f"{n}_token_id"] for n in ("pad", "eos"))
    config.decoder_start_token_id = config.pad_token_id
    torch.manual_seed(5)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_models.save_tokenizer(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("train", ["side", "cached", "lora"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_private_run_from_start_to_export(tmp_path: Path, family: str, train: str):
    save_seq2seq(tmp_path / "seq2seq", family)
    method = {"train": "lora"} if train == "lora" else {"train": "side", "side_reduction": 2}
    config = tiny_runs.config(tmp_path, model={"name": str(tmp_path / "seq2seq")},
                              method={**method, "side_cache": train == "cached"})  # fmt: skip
    done = sotto.train(config)
    assert done.finished
    assert done.epsilon is not None
    assert 0 < done.epsilon <= 8.0
    assert sotto.evaluate(done.path, str(tmp_path / "notes.csv"))["examples"] > 100
    assert type(sotto.load(done.path / "model")).__name__.endswith("ForSequenceClassification")
