"""The engine on real families, and what it promises besides numbers: it leaves the model and other units alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import ALGORITHMS, FAST, Losses, check, differences, oracle, vector
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    XLNetConfig,
)

from sotto.gradients.engine import Engine, attach

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")  # within peft

B, T, V = 4, 7, 50
UNITS = torch.tensor([5, 3, 5, 9])
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 32}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
CONFIGS: dict[str, tuple[Any, Any]] = {
    "bert": (AutoModelForSequenceClassification, BertConfig(**SMALL, num_labels=3)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32, **IDS)),
    "opt": (AutoModelForCausalLM, OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, **IDS)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gemma": (AutoModelForCausalLM, GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=4)),
    "mistral": (AutoModelForCausalLM, MistralConfig(**SMALL, num_key_value_heads=2)),
    "qwen3": (AutoModelForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=4)),
    "mamba": (AutoModelForCausalLM, MambaConfig(**SMALL, state_size=4, **IDS)),
    "xlnet": (AutoModelForSequenceClassification, XLNetConfig(vocab_size=V, d_model=16, n_layer=2, n_head=4)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, **T5)),
}  # fmt: skip
MAINSTREAM = ("bert", "gpt2", "opt", "llama", "gemma", "mistral", "qwen3")


def without_dropout(config: Any) -> Any:
    """A copy: the table of configurations is shared by all tests, in whatever order they run."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def build(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    cls, config = CONFIGS[family]
    torch.manual_seed(0)
    return cls.from_config(without_dropout(config)).to(dtype).train()


def batch_of(num_rows: int = B, length: int = T) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, V, (num_rows, length))
    mask = torch.ones_like(ids)
    if num_rows > 2 and length > 4:
        mask[2, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def losses_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> Losses:
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def losses(rows: torch.Tensor) -> torch.Tensor:
        kwargs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        if getattr(model.config, "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = ids[rows].flip(1)[:, :5]
        logits = model(**kwargs).logits
        if logits.dim() == 2:
            return F.cross_entropy(logits, ids[rows, 0] % 2, reduction="none")
        targets = ids[rows][:, 1 : logits.shape[1]]
        keep = mask[rows][:, 1 : logits.shape[1]]
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none") * keep
        return each.sum(1) / keep.sum(1)

    return losses


@pytest.fixture
def gpt2() -> PreTrainedModel:
    return build("gpt2")


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


# Some families compute norms, rotary angles or softmax in float32 whatever the dtype of the weights.
@pytest.mark.parametrize("units", [None, UNITS], ids=["alone", "units"])
@pytest.mark.parametrize("family", CONFIGS)
def test_families_are_exact(family: str, units: torch.Tensor | None, algorithm: str):
    model = build(family)
    slow = set() if family in MAINSTREAM and algorithm != "per_example" else None
    check(model, losses_of(model, batch_of()), B, algorithm=algorithm, units=units, tolerance=1e-6, slow=slow)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "xlnet", "mamba"])
@pytest.mark.parametrize(("num_rows", "length"), [(7, 7), (1, 7), (3, 1)], ids=["square", "one_row", "one_token"])
def test_shapes_in_which_dimensions_can_be_confused(family: str, num_rows: int, length: int):
    model = build(family)
    batch = batch_of(num_rows, max(length, 2) if family not in ("bert", "xlnet") else length)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    check(model, losses_of(model, batch), num_rows, algorithm="book_keeping", tolerance=1e-6)


@pytest.mark.parametrize("fast", FAST)
def test_a_change_of_shape_after_the_first_batch(gpt2: PreTrainedModel, fast: str):
    """Nothing that is decided on one batch may be wrong for the next."""
    shapes = [(1, 7), (4, 4), (4, 7), (7, 4), (1, 1 + 1), (5, 3)]
    expected = [oracle(gpt2, losses_of(gpt2, batch_of(*s)), s[0]) for s in shapes]
    engine = attach(gpt2, clip_norm=1.0, algorithm=fast)  # type: ignore[arg-type]
    for shape, wanted in zip(shapes, expected, strict=True):
        total = engine.backward(losses_of(gpt2, batch_of(*shape))(torch.arange(shape[0])))
        torch.testing.assert_close(total.norms, wanted.norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_through_peft(family: str, algorithm: str):
    model = get_peft_model(build(family), LoraConfig(r=3, target_modules="all-linear")).double()  # type: ignore[arg-type]
    batch = batch_of()
    slow = None if algorithm == "per_example" else set[str]()
    check(model, losses_of(model, batch), B, algorithm=algorithm, units=UNITS, tolerance=1e-6, slow=slow, steps=1)
    for name, p in model.named_parameters():  # B starts at zero, so A has no gradient at first
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    check(model, losses_of(model, batch), B, algorithm=algorithm, tolerance=1e-6, slow=slow)
    merged = model.merge_and_unload()
    check(merged.requires_grad_(True), losses_of(merged, batch), B, algorithm=algorithm, tolerance=1e-6, slow=slow)


def test_lora_is_probed_again_once_it_has_a_gradient():
    model = get_peft_model(build("llama"), LoraConfig(r=3, target_modules="all-linear")).double()  # type: ignore[arg-type]
    engine = attach(model, algorithm="book_keeping")
    losses = losses_of(model, batch_of())
    engine.backward(losses(torch.arange(B)))
    factors = [site for path, site in engine.sites.items() if "lora_A" in path]
    assert factors
    assert not any(site.confirmed for site in factors)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    engine.backward(losses(torch.arange(B)))
    assert all(site.confirmed for site in factors)


def snapshot(model: nn.Module) -> list[Any]:
    found: list[Any] = [
        list(model.state_dict()),
        [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
    ]
    for module in model.modules():
        hooks = {k: dict(v) for k, v in module.__dict__.items() if "hooks" in k and isinstance(v, dict)}
        found.append((type(module), list(module.__dict__), hooks, module.training))
    return found


@pytest.mark.parametrize("family", ["bert", "mamba", "gemma"])
def test_detach_leaves_the_model_as_it_was(family: str, algorithm: str):
    model = build(family)
    before = snapshot(model)
    engine = attach(model, algorithm=algorithm)  # type: ignore[arg-type]
    keys = list(model.state_dict())
    engine.backward(losses_of(model, batch_of())(torch.arange(B)))
    assert list(model.state_dict()) == keys
    engine.detach()
    engine.detach()
    assert snapshot(model) == before


def test_a_forward_that_another_library_put_there_goes_on_running():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1)).double()
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    patched = model[0].forward
    x = torch.randn(B, 6, dtype=torch.float64)
    wanted = model(x)
    engine = attach(model)
    torch.testing.assert_close(model(x), wanted)
    total = engine.backward(model(x).flatten())
    engine.detach()
    assert model[0].forward is patched
    assert total.gradients["0.weight"].abs().sum() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_an_ordinary_backward_while_attached(family: str, algorithm: str):
    model = build(family)
    losses, everyone = losses_of(model, batch_of()), torch.arange(B)
    wanted = torch.autograd.grad(losses(everyone).sum(), list(model.parameters()))
    engine = attach(model, algorithm=algorithm)  # type: ignore[arg-type]
    engine.backward(losses(everyone))
    assert all(p.grad is None for p in model.parameters())
    losses(everyone).sum().backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mamba"])
def test_gradient_checkpointing(family: str, algorithm: str):
    model = build(family)
    model.activation_checkpointing_enable({"use_reentrant": False})
    check(model, losses_of(model, batch_of()), B, algorithm=algorithm, units=UNITS, tolerance=1e-6)


def test_checkpointing_over_a_site_that_is_declined_in_the_backward_pass():
    """Recomputation must do what the forward pass did, though the site is no longer tapped for new batches."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False).sin().sum((1, 2))  # type: ignore

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(torch.tanh(self.linear(x.transpose(0, 1)))).transpose(0, 1))

    model, x = Block().double(), torch.randn(B, T, 6, dtype=torch.float64)
    for fast in FAST:
        check(model, lambda rows: model(x[rows]), B, algorithm=fast, slow={"linear", "norm"})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_bfloat16_autocast(family: str):
    model = build(family, torch.float32)
    plain = losses_of(model, batch_of())

    def losses(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(rows)

    for fast in FAST:
        check(model, losses, B, algorithm=fast, units=UNITS, tolerance=5e-2, slow=set())


@pytest.mark.parametrize("first", ["compiled", "attached", "used"])
def test_a_compiled_model(first: str):
    """Attached before or after: it runs uncompiled as long as the engine counts along, and compiled again later."""
    torch.compiler.reset()
    model, compiles = build("bert"), list[Any]()
    expected = oracle(model, losses_of(model, batch_of()), B, UNITS)
    clip_norm = expected.clip_norm

    def backend(graph: Any, inputs: Any) -> Any:
        compiles.append(graph)
        return graph.forward

    engine = None if first != "attached" else attach(model, clip_norm=clip_norm)
    compiled: Any = torch.compile(model, backend=backend)
    losses, everyone = losses_of(compiled, batch_of()), torch.arange(B)
    if first == "used":
        losses(everyone)
        assert compiles
        compiles.clear()
    engine = engine or attach(compiled, clip_norm=clip_norm)
    for _ in range(2):
        total = engine.backward(losses(everyone), UNITS)
    assert not compiles
    engine.detach()
    assert max(differences(total, expected)) < 1e-6
    torch.compiler.reset()
    losses(everyone)
    assert compiles


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mamba"])
def test_microbatches_add_up_to_the_batch(family: str, algorithm: str):
    model = build(family)
    losses = losses_of(model, batch_of())
    engine = attach(model, clip_norm=0.5, algorithm=algorithm)  # type: ignore[arg-type]
    whole = engine.backward(losses(torch.arange(B)), UNITS)
    parts = engine.zeros()
    for rows in ([0, 2], [1], [3]):  # a unit's rows stay together
        parts += engine.backward(losses(torch.tensor(rows)), UNITS[rows])
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(vector(parts.gradients), vector(whole.gradients), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mamba"])
def test_changing_one_example_leaves_the_others_norms_bit_identical(family: str, algorithm: str):
    model = build(family, torch.float32)
    batch = batch_of()
    engine = attach(model, algorithm=algorithm)  # type: ignore[arg-type]
    for _ in range(4):  # until every module has found its rule
        before = engine.backward(losses_of(model, batch)(torch.arange(B))).norms
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1] = changed["input_ids"][1].flip(0) % 9 + 3
    after = engine.backward(losses_of(model, changed)(torch.arange(B))).norms
    others = torch.tensor([0, 2, 3])
    assert torch.equal(before[others], after[others])
    assert before[1] != after[1]


def drift(model: PreTrainedModel, engine: Engine, between: Callable[[], None]) -> Iterator[float]:
    wanted = None
    for _ in range(3):
        total = engine.backward(losses_of(model, batch_of())(torch.arange(B)))
        wanted = wanted if wanted is not None else total
        yield float((vector(total.gradients) - vector(wanted.gradients)).norm())
        between()


def test_forward_passes_that_are_thrown_away_do_no_harm(gpt2: PreTrainedModel, algorithm: str):
    engine = attach(gpt2, algorithm=algorithm)  # type: ignore[arg-type]

    def between() -> None:
        losses_of(gpt2, batch_of(6, 5))(torch.arange(6))  # with a graph
        with torch.no_grad():
            losses_of(gpt2, batch_of(2, 3))(torch.arange(2))

    between()
    assert max(drift(gpt2, engine, between)) < 1e-9


@pytest.mark.parametrize("fast", FAST)
def test_two_forward_passes_before_two_backward_passes(gpt2: PreTrainedModel, fast: str):
    """The second backward pass no longer knows from the forward pass that embedding and head are tied."""
    first, second = losses_of(gpt2, batch_of(4, 7)), losses_of(gpt2, batch_of(3, 5))
    expected = oracle(gpt2, first, 4), oracle(gpt2, second, 3)
    engine = attach(gpt2, clip_norm=1.0, algorithm=fast)  # type: ignore[arg-type]
    for _ in range(2):
        a, b = first(torch.arange(4)), second(torch.arange(3))
        torch.testing.assert_close(engine.backward(a).norms, expected[0].norms)
        torch.testing.assert_close(engine.backward(b).norms, expected[1].norms)


@pytest.mark.parametrize("fast", FAST)
def test_one_loss_from_two_forward_passes(gpt2: PreTrainedModel, fast: str):
    losses = losses_of(gpt2, batch_of())
    check(gpt2, lambda rows: losses(rows) + 2 * losses(rows).square(), B, algorithm=fast, tolerance=1e-8)
    check(gpt2, lambda rows: torch.cat([losses(r) for r in rows.split(2)]), B, algorithm=fast, tolerance=1e-8)


def test_two_engines_on_two_models(algorithm: str):
    one, two = build("gpt2"), build("bert")
    expected = oracle(one, losses_of(one, batch_of()), B), oracle(two, losses_of(two, batch_of()), B)
    engines = [attach(m, clip_norm=e.clip_norm, algorithm=algorithm) for m, e in zip((one, two), expected, strict=True)]  # type: ignore
    for _ in range(2):
        a, b = (losses_of(m, batch_of())(torch.arange(B)) for m in (one, two))
        assert max(differences(engines[1].backward(b), expected[1])) < 1e-8
        assert max(differences(engines[0].backward(a), expected[0])) < 1e-8


@pytest.mark.parametrize("fast", FAST)
def test_other_ways_to_call_a_model(gpt2: PreTrainedModel, fast: str):
    """Positional ids, labels first, embeddings instead of ids, a stale batch size, a sub-module: all exact."""
    batch = batch_of()
    ids, mask, losses = batch["input_ids"], batch["attention_mask"], losses_of(gpt2, batch)

    def of(out: Any, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out.logits.transpose(1, 2), ids[rows], reduction="none").sum(1)

    embedded = torch.randn(B, T, 16, dtype=torch.float64)
    positions = torch.arange(T)[None]
    ways = [
        lambda r: of(gpt2(ids[r]), r),
        lambda r: of(gpt2(inputs_embeds=embedded[r], attention_mask=mask[r]), r),
        lambda r: of(gpt2(position_ids=positions, input_ids=ids[r]), r),
        lambda r: of(gpt2(labels=ids[r], attention_mask=mask[r], input_ids=ids[r]), r),
        lambda r: gpt2.lm_head(gpt2.transformer(ids[r]).last_hidden_state).sin().sum((1, 2)),
        losses,
    ]
    expected = [oracle(gpt2, way, B) for way in ways]
    engine = attach(gpt2, clip_norm=1.0, algorithm=fast)  # type: ignore[arg-type]
    for order in (range(len(ways)), reversed(range(len(ways)))):
        losses_of(gpt2, batch_of(6, 7))(torch.arange(6))  # leaves another batch size behind
        for i in order:
            total = engine.backward(ways[i](torch.arange(B)))
            torch.testing.assert_close(
                total.norms, expected[i].norms, rtol=1e-8, atol=0, msg=lambda m, i=i: f"{i}: {m}"
            )


def test_rows_that_the_model_itself_multiplies():
    torch.manual_seed(0)
    model = BertForMultipleChoice(without_dropout(CONFIGS["bert"][1])).double().train()
    target = torch.arange(B) % 3
    for choices in (3, T):
        ids = torch.randint(3, V, (B, choices, T))
        for fast in FAST:
            check(
                model,
                lambda rows, ids=ids: F.cross_entropy(
                    model(input_ids=ids[rows]).logits, target[rows], reduction="none"
                ),
                B,
                algorithm=fast,
                tolerance=1e-8,
            )


def test_module_hooks_see_what_they_always_saw(gpt2: PreTrainedModel):
    seen: list[int] = []
    layer = gpt2.transformer.h[0].mlp.c_fc
    layer.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape[0]))
    check(gpt2, losses_of(gpt2, batch_of()), B, algorithm="book_keeping", tolerance=1e-8)
    assert seen
    assert B in seen


def test_a_parameter_frozen_or_freed_between_steps(gpt2: PreTrainedModel):
    losses = losses_of(gpt2, batch_of())
    gpt2.transformer.h[0].requires_grad_(False)
    engine = attach(gpt2, clip_norm=1.0)
    engine.backward(losses(torch.arange(B)))
    gpt2.transformer.h[0].requires_grad_(True)
    gpt2.transformer.h[1].requires_grad_(False)
    total = [engine.backward(losses(torch.arange(B))) for _ in range(2)][-1]
    engine.detach()
    torch.testing.assert_close(total.norms, oracle(gpt2, losses, B).norms)


def test_a_use_that_first_appears_later_is_refused_once_and_then_exact(gpt2: PreTrainedModel):
    plain = losses_of(gpt2, batch_of())
    surprise = lambda rows: plain(rows) + gpt2.transformer.ln_f.weight.square().sum()  # noqa: E731
    expected = oracle(gpt2, surprise, B)
    engine = attach(gpt2, clip_norm=1.0, algorithm="book_keeping")
    for _ in range(4):
        engine.backward(plain(torch.arange(B)))
    with pytest.raises(Exception, match="SOT609"):
        engine.backward(surprise(torch.arange(B)))
    for _ in range(6):  # it is tried in vain to run the layer, and what is around it, again
        torch.testing.assert_close(engine.backward(surprise(torch.arange(B))).norms, expected.norms)
    assert {r.path for r in engine.report() if r.slow} == {"transformer.ln_f"}


def test_nothing_keeps_the_graph_alive(gpt2: PreTrainedModel, algorithm: str):
    engine = attach(gpt2, algorithm=algorithm)  # type: ignore[arg-type]
    seen: list[weakref.ref[torch.Tensor]] = []
    for _ in range(2):
        seen.clear()
        hook = gpt2.transformer.ln_f.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
        total = engine.backward(losses_of(gpt2, batch_of())(torch.arange(B)))
        hook.remove()
        gc.collect()
        assert seen[0]() is None
        assert total.norms.shape == (B,)
    assert engine.state.book is None
    assert not any(site.reference for site in engine.sites.values())


def test_the_report_names_rules_and_reasons():
    model = build("mamba")
    engine = attach(model)
    engine.backward(losses_of(model, batch_of())(torch.arange(B)))
    report = {r.path: r for r in engine.report()}
    assert report["backbone.embeddings"].rule == "embedding"
    assert report["backbone.layers.0.mixer.in_proj"].rule == "linear"
    assert report["backbone.layers.0.norm"].rule == "vmap"
    mixer = report["backbone.layers.0.mixer"]
    assert mixer.rule == "rerun"
    assert mixer.reason == "run again one unit at a time, with all of 'backbone.layers.0.mixer'"
    assert not any(r.slow for r in report.values())
    assert any("A_log" in name for name in mixer.parameters)
    named = {name for r in report.values() for name in r.parameters}
    assert named == set(dict(model.named_parameters()))
