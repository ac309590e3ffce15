"""Side networks: the start, exact gradients, what memory is held, and the way to disk and back."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from gradient_oracle import FAST, check, differences, oracle
from test_gradients_engine import UNITS, B, T, V, batch_of, losses_of
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BloomConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

import sotto
from sotto.errors import SottoError
from sotto.gradients.engine import attach
from sotto.models import load, stack, support
from sotto.models.export import export
from sotto.models.pooling import MeanPooledClassifier
from sotto.models.reload import load_exported
from sotto.models.side import SideOptions, add_side
from sotto.models.side_blocks import shrink, side_width
from sotto.models.source import inspect

SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 32}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LABELS = {0: "bad", 1: "fair", 2: "good"}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SMALL, id2label=LABELS),
    "roberta": RobertaConfig(**SMALL, **IDS, id2label=LABELS),
    "mean": BertConfig(**SMALL, id2label=LABELS),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=4, n_positions=32, **IDS),
    "llama": LlamaConfig(**GROUPED),
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, **IDS),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "bloom": BloomConfig(vocab_size=V, hidden_size=16, n_layer=3, n_head=4),
    "deberta": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mamba": MambaConfig(**SMALL, state_size=4, **IDS),
}
LAYERS = ("bert", "roberta", "mean", "gpt2", "llama", "opt", "qwen3")
LIGHT = ("bloom", "deberta", "mamba")
CLASSIFIERS = ("bert", "roberta", "mean", "deberta")


def build(family: str) -> Any:
    config = copy.deepcopy(CONFIGS[family])
    load.remove_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if family == "mean":
            return MeanPooledClassifier(BertModel(config, add_pooling_layer=False)).eval()
        auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
        return auto.from_config(config).eval()


def with_side(family: str, **options: Any) -> Any:
    """With a side network that has been trained a little, so that every parameter has a gradient."""
    whole = add_side(build(family), SideOptions(**{"reduction": 2, "every": 1, **options}), seed=0)
    tiny_models.perturb(whole)
    return whole


@pytest.mark.parametrize("init", ["random", "prune"])
@pytest.mark.parametrize("family", [*LAYERS, *LIGHT])
def test_the_start_is_the_backbone_bit_for_bit(family: str, init: str):
    model = build(family)
    before = support.dummy_logits(model)
    if init == "prune" and family in LIGHT:
        with pytest.raises(SottoError, match=r"SOT34[13]"):
            add_side(model, SideOptions(reduction=2, every=1, init="prune"), seed=0)
        torch.testing.assert_close(support.dummy_logits(model), before, rtol=0, atol=0)
        return
    whole = add_side(model, SideOptions(reduction=2, every=1, init=init), seed=0)  # type: ignore[arg-type]
    assert whole.config.options["block"] == ("light" if family in LIGHT else "layer")
    batch = support.dummy_batch(model)
    assert torch.equal(support.dummy_logits(whole, batch), before)
    assert type(whole).__name__ == ("SideForSequenceClassification" if family in CLASSIFIERS else "SideForCausalLM")
    tiny_models.perturb(whole)
    assert not torch.allclose(support.dummy_logits(whole, batch), before, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"block": "light"}, {"every": 2}, {"init": "prune"}], ids=str)
@pytest.mark.parametrize("family", ["bert", "roberta", "mean", "gpt2", "llama", "opt"])
def test_gradients_per_unit_are_exact_and_no_module_is_slow(family: str, options: dict[str, Any]):
    whole = with_side(family, **options).double().train()
    for fast in FAST:
        check(whole, losses_of(whole, batch_of()), B, algorithm=fast, units=UNITS, tolerance=1e-6, slow=set())


@pytest.mark.parametrize("family", LIGHT)
def test_light_blocks_have_no_slow_module_either(family: str):
    whole = with_side(family).double().train()
    check(whole, losses_of(whole, batch_of()), B, algorithm="book_keeping", tolerance=1e-6, slow=set())


def test_the_oracle_would_notice_a_wrong_gate():
    """Negative twin: the gates' gradients matter to the comparison."""
    whole = with_side("bert").double().train()
    expected = oracle(whole, losses_of(whole, batch_of()), B)
    engine = attach(whole, clip_norm=expected.clip_norm)
    total = engine.backward(losses_of(whole, batch_of())(torch.arange(B)))
    assert max(differences(total, expected)) < 1e-8
    total.gradients["side.gates.0.a"] *= 1.5
    assert differences(total, expected)[1] > 1e-6


def test_the_first_step_from_the_zero_start_is_exact_too():
    whole = add_side(build("gpt2"), SideOptions(reduction=2, every=1), seed=0).double().train()
    engine = check(whole, losses_of(whole, batch_of()), B, algorithm="book_keeping", tolerance=1e-8, slow=set())
    reached = {n for n, g in engine.zeros().gradients.items() if g is not None}
    assert "side.up.weight" in reached


def test_what_is_trained():
    whole = with_side("roberta")
    trained = {n for n, p in whole.named_parameters() if p.requires_grad}
    assert all(n.startswith(("side.", "backbone.classifier.")) for n in trained)
    assert {"side.up.weight", "side.entry.weight", "side.gates.0.a", "backbone.classifier.dense.weight"} <= trained
    assert all(p.dtype == torch.float32 for p in whole.parameters() if p.requires_grad)
    language = with_side("gpt2")
    assert all(n.startswith("side.") for n, p in language.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("every", "kept"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [2]), (7, [2])])
def test_every(every: int, kept: list[int]):
    side = with_side("bert", every=every).side
    assert side.kept == kept
    assert len(side.blocks) == len(side.ladders) == len(side.gates) == len(kept)


@pytest.mark.parametrize(
    ("config", "width", "heads", "shared"),
    [
        (RobertaConfig(hidden_size=1024, num_attention_heads=16, intermediate_size=4096), 128, 2, None),
        (BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536), 64, 2, None),
        (LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8), 512, 4, 1),
        (Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128), 128, 2, 1),
        (BertConfig(hidden_size=64, num_attention_heads=2), 32, 1, None),
    ],
    ids=["roberta-large", "minilm", "llama", "qwen3", "two heads"],
)
def test_the_width_is_whole_heads_of_the_models_own_size(config: Any, width: int, heads: int, shared: int | None):
    small = shrink(config, 8)
    assert side_width(config, 8) == small.hidden_size == width
    assert small.num_attention_heads == heads
    if shared is not None:
        assert small.num_key_value_heads == shared
        assert small.head_dim == config.head_dim
    else:
        assert width // heads == config.hidden_size // config.num_attention_heads


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (add_side(build("bert"), SideOptions(reduction=2, every=1), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(one.side.parameters(), two.side.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.side.entry.weight, other.side.entry.weight)


def test_pruning_keeps_the_largest_heads_and_neurons_and_fits_together():
    model = build("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight[linear.weight.shape[0] // 2 :] *= 10  # the second group of heads is the largest
        layer.mlp.up_proj.weight[[1, 5, 9]] *= 50
    side: Any = add_side(model, SideOptions(reduction=2, every=1, init="prune"), seed=0).side
    kept_s = side.entry.weight.nonzero()[:, 1]
    assert len(kept_s) == 8
    assert torch.equal(kept_s, kept_s.sort().values)
    block = side.blocks[0]
    torch.testing.assert_close(block.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[8:][:, kept_s])
    torch.testing.assert_close(block.self_attn.k_proj.weight, layer.self_attn.k_proj.weight[4:][:, kept_s])
    torch.testing.assert_close(block.self_attn.o_proj.weight, layer.self_attn.o_proj.weight[kept_s][:, 8:])
    neurons = [
        i
        for i in range(24)
        if any(torch.equal(r, layer.mlp.up_proj.weight[i, kept_s]) for r in block.mlp.up_proj.weight)
    ]
    assert {1, 5, 9} <= set(neurons)
    torch.testing.assert_close(block.mlp.down_proj.weight, layer.mlp.down_proj.weight[kept_s][:, neurons])
    torch.testing.assert_close(block.input_layernorm.weight, layer.input_layernorm.weight[kept_s])
    assert all(torch.equal(ladder.weight, side.entry.weight) for ladder in side.ladders)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom"])
def test_no_token_sees_a_later_one(family: str):
    support.refuse_two_way_language_model(with_side(family))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate_continues_with_the_side_network(family: str):
    whole = with_side(family)
    ids = batch_of(2, 4)["input_ids"]
    with torch.no_grad():
        written = ids
        for _ in range(4):
            written = torch.cat([written, whole(input_ids=written).logits[:, -1:].argmax(-1)], 1)
    got = whole.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(got, written)


def test_earlier_keys_and_values_are_refused():
    whole = with_side("llama")
    ids = batch_of(2, 4)["input_ids"]
    past = build("llama")(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(SottoError, match="SOT342"):
        whole(input_ids=ids[:, :1], past_key_values=past)


def test_the_backbone_runs_without_a_graph_and_in_evaluation_mode():
    config = BertConfig(**SMALL, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    whole: Any = add_side(
        AutoModelForSequenceClassification.from_config(config).eval(), SideOptions(reduction=2, every=1), 0
    )
    whole.train()
    assert whole.training
    assert whole.side.training
    assert not any(m.training for m in whole.stack.owner.modules())
    seen: list[torch.Tensor] = []
    hook = whole.stack.layers[1].attention.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    whole(**batch_of())
    embedded = whole.get_input_embeddings()(batch_of()["input_ids"]).detach().requires_grad_(True)
    whole(inputs_embeds=embedded, attention_mask=batch_of()["attention_mask"])
    hook.remove()
    assert len(seen) == 2
    assert not any(x.requires_grad for x in seen)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_no_activation_of_the_backbone_is_held(family: str):
    """The peak-memory trap: hooks of an engine that pin what passes through frozen layers."""
    whole = with_side(family).train()
    held: list[weakref.ref[torch.Tensor]] = []
    parts = [m for layer in whole.stack.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    parts += [m for layer in whole.stack.layers for m in layer.modules() if type(m).__name__ == "Conv1D"]
    hooks = [m.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out))) for m in parts]
    engine = attach(whole)
    losses = losses_of(whole, batch_of())(torch.arange(B))
    gc.collect()
    assert len(held) == len(parts) > 6
    assert not [r for r in held if r() is not None]
    engine.backward(losses)
    for hook in hooks:
        hook.remove()


def test_that_check_would_notice_a_graph_through_the_backbone():
    model = build("bert").train()
    held: list[weakref.ref[Any]] = []
    hook = model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda m, a, out: held.append(weakref.ref(out))  # type: ignore[arg-type]
    )
    losses = losses_of(model, batch_of())(torch.arange(B))
    hook.remove()
    assert held[0]() is not None
    del losses


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    whole = with_side("bert").train()
    failing = whole.stack.layers[2].register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole(**batch_of())
    failing.remove()
    assert whole.side._z_BTs is None
    whole(**batch_of()).logits.sum().backward()


def test_a_deep_copy_is_a_model_of_its_own():
    whole = with_side("gpt2")
    twin = copy.deepcopy(whole)
    before = support.dummy_logits(whole)
    assert torch.equal(support.dummy_logits(twin), before)
    with torch.no_grad():
        twin.side.up.weight.zero_()
    assert torch.equal(support.dummy_logits(whole), before)
    assert not torch.equal(support.dummy_logits(twin), before)


def test_under_bfloat16_autocast():
    whole = with_side("llama").train()
    plain = losses_of(whole, batch_of())

    def losses(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(rows)

    check(whole, losses, B, algorithm="book_keeping", units=UNITS, tolerance=5e-2, slow=set())


@pytest.mark.parametrize(("family", "first"), [*[(family, 0) for family in [*LAYERS, "bloom"]], ("bert", 1)])
def test_it_is_exported_and_opened_again(family: str, first: int, tmp_path: Path):
    whole = with_side(family, first=first)
    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load.load_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "model"
    export(whole, tokenizer, folder, "merged", {"dp": {"private": False}})
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors"}
    facts = inspect(folder)
    assert facts.model_type == "sotto_side"
    assert facts.hidden_size == 16
    assert facts.labels == (tuple(LABELS.values()) if family in CLASSIFIERS else ())
    batch = support.dummy_batch(whole)
    expected = support.dummy_logits(whole, batch)
    for opened in (load_exported(folder), sotto.load(folder)):
        torch.testing.assert_close(support.dummy_logits(opened, batch), expected, rtol=0, atol=1e-6)
        assert opened.state_dict().keys() == whole.state_dict().keys()
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    with support.quiet():
        plain = auto.from_pretrained(folder).eval()
    torch.testing.assert_close(support.dummy_logits(plain, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"options": {"reduction": 0}}, "SOT334"),
        ({"options": {"reduction": 2, "block": "layer", "shell": "x"}}, "SOT334"),
        ({"options": {"reduction": 4, "block": "layer"}}, "SOT334"),
        ({"architectures": ["BertForSequenceClassification"]}, "SOT334"),
        ({"text_config": {"model_type": "nonesuch"}}, "SOT307"),
        ({"text_config": None}, "SOT307"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "SOT305"),
    ],
    ids=str,
)
def test_a_folder_that_was_tampered_with_is_refused(change: dict[str, Any], code: str, tmp_path: Path):
    whole = with_side("bert")
    with support.quiet():
        whole.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SottoError, match=code):
        load_exported(tmp_path / "model")


def test_nested_keys_that_ask_for_code_are_refused(tmp_path: Path):
    with support.quiet():
        with_side("bert").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["auto_map"] = {"AutoModel": "x.Y"}
    file.write_text(json.dumps(values))
    with pytest.raises(SottoError, match="SOT305"):
        load_exported(tmp_path / "model")


def test_models_whose_layers_are_not_a_chain_are_refused():
    shared = AutoModelForSequenceClassification.from_config(AlbertConfig(**SMALL, embedding_size=8))
    with pytest.raises(SottoError, match=r"SOT340.*no list of 3 layers"):
        add_side(shared.eval(), SideOptions(), seed=0)
    doubled = build("bert")
    stack.replace_forward(doubled.bert.encoder, lambda x, *a, **k: _doubling(doubled.bert.encoder, x, *a, **k))
    with pytest.raises(SottoError, match=r"SOT340.*between two layers"):
        add_side(doubled, SideOptions(), seed=0)


def _doubling(encoder: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    for layer in encoder.layer:
        x = layer(x, *args) * 2
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


def test_a_class_that_cannot_be_shrunk_is_named_when_it_was_asked_for():
    model = build("deberta")
    before = support.dummy_logits(model)
    with pytest.raises(SottoError, match=r"SOT341.*DebertaV2Layer") as caught:
        add_side(model, SideOptions(reduction=2, every=1, block="layer"), seed=0)
    assert "light" in str(caught.value)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert torch.equal(support.dummy_logits(model), before)


@pytest.mark.parametrize(
    "options", [{"reduction": 0}, {"every": 0}, {"reduction": 1.5}, {"block": "x"}, {"init": "fisher"}, {"first": -1}]
)
def test_options_that_mean_nothing(options: dict[str, Any]):
    with pytest.raises(ValueError, match="no options"):
        SideOptions(**options)


def test_padding_on_the_right_changes_nothing():
    whole = with_side("gpt2")
    ids = batch_of(1, T)["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    alone = whole(input_ids=ids).logits
    torch.testing.assert_close(whole(input_ids=padded, attention_mask=mask).logits[:, :T], alone, rtol=0, atol=1e-5)
