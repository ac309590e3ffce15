"""Reversible networks: gradients against plain autograd, recovered activations, memory, and the way to disk."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from gradient_oracle import FAST, check, differences, oracle
from test_gradients_engine import UNITS, B, T, batch_of, losses_of
from test_models_side import CLASSIFIERS, SMALL, build
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import sotto
from sotto.config import MethodSection
from sotto.errors import SottoError
from sotto.gradients.engine import attach
from sotto.models import load, reversible_run, stack, support
from sotto.models.export import export
from sotto.models.reload import load_exported
from sotto.models.reversible import ReversibleOptions, make_reversible
from sotto.models.reversible_streams import FixedPoint, Floating
from sotto.models.source import inspect
from sotto.models.trainable import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")  # within peft
FAMILIES = ("bert", "roberta", "mean", "gpt2", "llama", "opt")
STREAMS: dict[str, dict[str, Any]] = {
    "fixed": {}, "float64": {"anchor_every": 2}, "float32": {"anchor_every": 1}, "stored": {},
}  # fmt: skip
EVERYONE = torch.arange(B)


def plain_coupling(model: nn.Module, factor: float) -> Any:
    """The oracle: the same function, by plain autograd on ordinary layers. All activations are kept."""
    before: dict[str, torch.Tensor] = {}

    def coupled(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            v = stack.hidden_of(args, kwargs)
            if index == 0:
                before["u"] = v
            out = original(*args, **kwargs)
            u, before["u"] = before["u"], v
            return stack.with_first(out, stack.first(out) + factor * (u - v))

        return forward

    for index, layer in enumerate(stack.find(model).layers):
        stack.replace_forward(layer, coupled(index, layer.forward))
    return model


def deep(layers: int, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = BertConfig(**{**SMALL, "num_hidden_layers": layers, "hidden_dropout_prob": 0.0, **more})
    config.attention_probs_dropout_prob = config.hidden_dropout_prob
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = AutoModelForSequenceClassification.from_config(config).to(dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".layer." in name:
                nn.init.normal_(parameter, std=0.2)
    return model.train()


def reversible_and_oracle(model: nn.Module, streams: str, **options: Any) -> tuple[Any, Any]:
    twin = copy.deepcopy(model)
    whole: Any = make_reversible(model, ReversibleOptions(streams=streams, **options))  # type: ignore[arg-type]
    factor = whole.coupling.streams.factor if whole.coupling.streams else 0.0
    return whole, plain_coupling(twin, factor)


def gradients(model: nn.Module, losses: torch.Tensor, **options: Any) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, **options)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("streams", ["fixed", "float64", "stored"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "bloom", "deberta", "mamba"])
def test_gradients_are_those_of_plain_autograd(family: str, streams: str):
    whole, plain = reversible_and_oracle(build(family).double().train(), streams, **STREAMS[streams])
    losses, expected = losses_of(whole, batch_of())(EVERYONE), losses_of(plain, batch_of())(EVERYONE)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-8)
    assert difference(gradients(whole, losses), gradients(plain, expected)) < 1e-8


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("layers", [1, 2, 6, 24])
def test_gradients_at_depth_in_float32(layers: int, streams: str):
    whole, plain = reversible_and_oracle(deep(layers), streams, **STREAMS[streams])
    losses, expected = losses_of(whole, batch_of())(EVERYONE), losses_of(plain, batch_of())(EVERYONE)
    found, wanted = gradients(whole, losses), gradients(plain, expected)
    assert difference(found, wanted) < (1e-3 if streams == "float32" else 2e-4)


def test_a_wrong_factor_would_be_noticed():
    """Negative twin of the two tests above."""
    whole, plain = reversible_and_oracle(deep(6, torch.float64), "fixed", factor_bits=4)
    other = plain_coupling(deep(6, torch.float64), 2.0**-5)
    batch = batch_of()
    found = gradients(whole, losses_of(whole, batch)(EVERYONE))
    assert difference(found, gradients(plain, losses_of(plain, batch)(EVERYONE))) < 1e-8
    assert difference(found, gradients(other, losses_of(other, batch)(EVERYONE))) > 1e-4


@pytest.mark.parametrize("units", [None, UNITS], ids=["alone", "units"])
@pytest.mark.parametrize("streams", ["fixed", "float64", "stored"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_gradients_per_unit_are_exact(family: str, streams: str, units: torch.Tensor | None):
    whole, _ = reversible_and_oracle(build(family).double().train(), streams, **STREAMS[streams])
    for fast in FAST:
        check(whole, losses_of(whole, batch_of()), B, algorithm=fast, units=units, tolerance=1e-6, slow=set())


@pytest.mark.parametrize("family", ["bert", "mean", "gpt2", "llama"])
def test_with_adapters_inside(family: str):
    model = prepare(build(family), MethodSection(train="lora", lora_rank=3), seed=0)
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    tiny_models.perturb(model)
    whole: Any = make_reversible(model, ReversibleOptions()).double().train()
    assert {n.removeprefix("backbone.") for n, p in whole.named_parameters() if p.requires_grad} == trained
    for fast in FAST:
        check(whole, losses_of(whole, batch_of()), B, algorithm=fast, units=UNITS, tolerance=1e-6, slow=set())


@pytest.mark.parametrize("train", ["bitfit", "head"])
def test_with_little_that_is_trained(train: str):
    model = prepare(build("bert"), MethodSection(train=train), seed=0)  # type: ignore[arg-type]
    whole: Any = make_reversible(model, ReversibleOptions()).double().train()
    check(whole, losses_of(whole, batch_of()), B, algorithm="book_keeping", tolerance=1e-8, slow=set())


def test_layers_below_the_first_trained_one_are_not_run_again():
    model = prepare(build("bert"), MethodSection(train="lora", lora_rank=2, lora_layers=(2,)), seed=0)
    tiny_models.perturb(model)
    whole: Any = make_reversible(model, ReversibleOptions()).double().train()
    ran: list[int] = []
    for index, layer in enumerate(whole.stack.layers):
        layer.attention.register_forward_pre_hook(lambda m, a, index=index: ran.append(index))
    check(whole, losses_of(whole, batch_of()), B, algorithm="book_keeping", tolerance=1e-8, slow=set())
    ran.clear()
    gradients(whole, losses_of(whole, batch_of())(EVERYONE))
    assert ran == [0, 1, 2, 2]


@pytest.mark.parametrize("streams", STREAMS)
def test_two_backward_passes_give_the_same_bits(streams: str):
    whole, _ = reversible_and_oracle(deep(5), streams, **STREAMS[streams])
    losses = losses_of(whole, batch_of())(EVERYONE)
    first = gradients(whole, losses, retain_graph=True)
    assert torch.equal(gradients(whole, losses, retain_graph=True), first)
    assert torch.equal(gradients(whole, losses), first)


@pytest.mark.parametrize("streams", STREAMS)
def test_two_forward_passes_before_two_backward_passes(streams: str):
    whole, _ = reversible_and_oracle(deep(5), streams, **STREAMS[streams])
    one, two = batch_of(4, 7), batch_of(3, 5)
    alone = [gradients(whole, losses_of(whole, b)(torch.arange(len(b["input_ids"])))) for b in (one, two)]
    losses = [losses_of(whole, b)(torch.arange(len(b["input_ids"]))) for b in (one, two)]
    assert torch.equal(gradients(whole, losses[0]), alone[0])
    assert torch.equal(gradients(whole, losses[1]), alone[1])


# ---- how well activations are recovered


def inversion_error(monkeypatch: pytest.MonkeyPatch, layers: int, streams: str, **options: Any) -> float:
    runs: list[reversible_run.Run] = []
    plain = reversible_run.Run.close
    monkeypatch.setattr(reversible_run.Run, "close", lambda run: (runs.append(run), plain(run))[1])
    whole, _ = reversible_and_oracle(deep(layers), streams, **options)
    gradients(whole, losses_of(whole, batch_of())(EVERYONE))
    return runs[-1].inversion_error


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("layers", [6, 24, 48])
def test_fixed_streams_are_recovered_bit_for_bit(layers: int, bits: int, monkeypatch: pytest.MonkeyPatch):
    assert inversion_error(monkeypatch, layers, "fixed", factor_bits=bits) == 0.0


@pytest.mark.parametrize("layers", [6, 24, 48])
def test_floating_streams_are_near(layers: int, monkeypatch: pytest.MonkeyPatch):
    assert inversion_error(monkeypatch, layers, "float64") < 1e-6
    assert 0.0 < inversion_error(monkeypatch, layers, "float32") < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"streams": "float32", "anchor_every": 24}, {"streams": "float64", "anchor_every": 24, "factor_bits": 6},
        {"streams": "float32", "factor_bits": 8},
    ],
    ids=str,
)  # fmt: skip
def test_an_error_above_the_bound_stops_the_step(options: dict[str, Any]):
    whole, _ = reversible_and_oracle(deep(24), **options)
    engine = attach(whole, algorithm="book_keeping")
    with pytest.raises(SottoError, match=r"SOT346.*off by"):
        engine.backward(losses_of(whole, batch_of())(EVERYONE))


def test_a_layer_that_does_not_repeat_is_noticed():
    """Weights that change between forward and backward stand for kernels that do not repeat."""
    whole, _ = reversible_and_oracle(deep(6), "fixed")
    losses = losses_of(whole, batch_of())(EVERYONE)
    with torch.no_grad():
        whole.stack.layers[5].output.dense.bias += 1
    with pytest.raises(SottoError, match="SOT346"):
        gradients(whole, losses)


@pytest.mark.parametrize("bits", range(1, 9))
def test_fixed_point_arithmetic_undoes_itself_on_any_values(bits: int):
    streams = FixedPoint(bits)
    torch.manual_seed(bits)
    values = [torch.randn(3, 5, 64) * scale for scale in (1e-9, 1.0, 1e5)]
    values.append(torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 5e-13]).expand(3, 5, 8))
    u_, v_, y = (torch.cat([x.roll(shift, 1) for x in values], 2) for shift in (0, 1, 2))
    u, v = streams.enter(u_), streams.enter(v_)
    new, lost = streams.step(u, v, y)
    assert lost.dtype == torch.uint8
    assert torch.equal(streams.undo(new, v, y, lost), u)
    fine = torch.isfinite(u_ + v_ + y) & (u_.abs() < 1e6) & (v_.abs() < 1e6) & (y.abs() < 1e6)
    expected = y.double() + streams.factor * (u_.double() - v_.double())
    torch.testing.assert_close(streams.read(new, torch.float64)[fine], expected[fine], rtol=0, atol=1e-11)


def test_floating_arithmetic_undoes_itself_nearly():
    streams = Floating(torch.float64, 0.125)
    torch.manual_seed(0)
    u, v, y = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(3))
    new, _ = streams.step(u, v, y)
    torch.testing.assert_close(streams.undo(new, v, y, None), u, rtol=0, atol=1e-14)


# ---- the start


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_pretrained_function_or_near_it(family: str):
    model = build(family)
    tiny_models.perturb(model)  # a pooled classifier starts at zero
    batch = support.dummy_batch(model)
    before = support.dummy_logits(model, batch)
    deviation = {}
    for streams, bits in (("fixed", 8), ("fixed", 4), ("float64", 3)):
        whole = make_reversible(copy.deepcopy(model), ReversibleOptions(streams=streams, factor_bits=bits))  # type: ignore[arg-type]
        deviation[bits] = float((support.dummy_logits(whole, batch) - before).norm() / before.norm())
    assert deviation[8] < 2e-2
    assert deviation[8] < deviation[4] < deviation[3]
    stored = make_reversible(model, ReversibleOptions(streams="stored"))
    assert torch.equal(support.dummy_logits(stored, batch), before)


@torch.no_grad()
def test_a_real_encoder_starts_close(shared: Path):
    facts = inspect(tiny_models.minilm())
    network, _ = load.build_network(
        facts, "classification", labels=("a", "b"), pooling="mean", keep_dropout=False, seed=0
    )
    batch = support.dummy_batch(network, rows=4, length=16)
    vectors = [network.backbone(**batch).last_hidden_state]  # type: ignore[union-attr]
    whole: Any = make_reversible(network, ReversibleOptions())
    vectors.append(whole.backbone.backbone(**batch).last_hidden_state)
    similarity = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=-1)
    assert float(similarity.min()) > 0.999


# ---- repetition: random numbers, autocast, modes


def test_dropout_is_repeated_and_the_callers_random_numbers_are_left_alone():
    whole, plain = reversible_and_oracle(deep(6, torch.float64, hidden_dropout_prob=0.3), "fixed")
    batch = batch_of()
    torch.manual_seed(9)
    losses = losses_of(whole, batch)(EVERYONE)
    state = torch.get_rng_state()
    found = gradients(whole, losses)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    expected = gradients(plain, losses_of(plain, batch)(EVERYONE))
    assert difference(found, expected) < 1e-8
    torch.manual_seed(10)
    assert difference(found, gradients(plain, losses_of(plain, batch)(EVERYONE))) > 1e-2


def test_without_the_random_state_the_gradients_would_be_wrong(monkeypatch: pytest.MonkeyPatch):
    """Negative twin: new random numbers in the second run are noticed, because the streams are not recovered."""
    whole, _ = reversible_and_oracle(deep(6, torch.float64, hidden_dropout_prob=0.3), "fixed")
    losses = losses_of(whole, batch_of())(EVERYONE)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: torch.manual_seed(123))
    with pytest.raises(SottoError, match="SOT346"):
        gradients(whole, losses)


def test_dropout_on_a_device_whose_random_numbers_cannot_be_repeated():
    model = deep(2, hidden_dropout_prob=0.3)

    class Elsewhere:
        device = torch.device("mps")

    model.parameters = lambda: iter([Elsewhere()])
    from sotto.models.reversible import _require_replay

    with pytest.raises(SottoError, match=r"SOT345.*dropout"):
        _require_replay(model)
    model = deep(2)
    model.parameters = lambda: iter([Elsewhere()])
    _require_replay(model)


def test_autocast_is_repeated():
    whole, plain = reversible_and_oracle(deep(6), "fixed")
    found = []
    for model in (whole, plain):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, batch_of())(EVERYONE)
        found.append(gradients(model, losses))  # outside, where the layers run again
    assert difference(found[0], found[1]) < 1e-2
    engine = attach(whole, clip_norm=1.0)

    def half(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of(whole, batch_of())(rows)

    engine.detach()
    check(whole, half, B, algorithm="book_keeping", units=UNITS, tolerance=5e-2, slow=set())


def test_a_change_of_mode_in_between_is_noticed():
    whole, _ = reversible_and_oracle(deep(4, hidden_dropout_prob=0.3), "stored")
    losses = losses_of(whole, batch_of())(EVERYONE)
    whole.eval()
    with pytest.raises(SottoError, match="SOT347"):
        gradients(whole, losses)


def test_gradient_checkpointing_on_top_is_refused_and_would_change_nothing():
    whole, _ = reversible_and_oracle(deep(4), "fixed")
    alone = gradients(whole, losses_of(whole, batch_of())(EVERYONE))
    with pytest.raises(ValueError, match="does not support"):
        whole.gradient_checkpointing_enable()
    whole.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(whole, losses_of(whole, batch_of())(EVERYONE)), alone)


def test_hidden_states_that_are_changed_between_layers_are_noticed():
    whole, _ = reversible_and_oracle(deep(4), "fixed")
    whole.stack.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    with pytest.raises(SottoError, match=r"SOT340.*Layer 2"):
        whole(**batch_of())


# ---- memory


def alive(references: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(r() is not None for r in references)


@pytest.mark.parametrize("streams", STREAMS)
def test_activations_inside_layers_are_not_held(streams: str):
    """Under an engine, whose taps must not pin what they see in the forward pass."""
    whole, _ = reversible_and_oracle(deep(6), streams, **STREAMS[streams])
    held: list[weakref.ref[torch.Tensor]] = []
    for layer in whole.stack.layers:
        layer.intermediate.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out)))
        layer.attention.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out[0])))
    engine = attach(whole)
    losses = losses_of(whole, batch_of())(EVERYONE)
    assert len(held) == 12
    assert alive(held) == 0
    engine.backward(losses)


def stored_numbers(run: reversible_run.Run) -> dict[int, int]:
    """Bytes that are kept for each layer, besides arguments that all of them share."""
    found = {}
    for index, layer in run.layers.items():
        kept = [layer.lost, layer.input, layer.before, *(layer.after or ()), *layer.values.values()]
        found[index] = sum(x.numel() * x.element_size() for x in kept if x is not None)
    return found


def test_what_is_kept_for_a_layer_and_when_it_is_freed(monkeypatch: pytest.MonkeyPatch):
    runs: list[reversible_run.Run] = []
    plain = reversible_run.Run.close
    monkeypatch.setattr(reversible_run.Run, "close", lambda run: (runs.append(run), plain(run))[1])
    one = B * T * 16  # numbers of one hidden state
    whole, _ = reversible_and_oracle(deep(6), "fixed")
    losses = losses_of(whole, batch_of())(EVERYONE)
    assert stored_numbers(runs[-1]) == {0: one + 4 * one, **dict.fromkeys(range(1, 5), one), 5: one + 16 * one}
    seen: list[int] = []

    def watch(module: nn.Module, args: Any, out: Any) -> None:
        out[0].register_hook(lambda g: seen.append(alive_layers(runs[-1])))

    whole.stack.layers[1].attention.register_forward_hook(watch)
    losses = losses_of(whole, batch_of())(EVERYONE)
    gradients(whole, losses)
    assert seen == [2]  # layers 0 and 1: those above have been freed on the way
    assert alive_layers(runs[-1]) == 0
    stored, _ = reversible_and_oracle(deep(6), "stored")
    losses = losses_of(stored, batch_of())(EVERYONE)
    assert set(stored_numbers(runs[-1]).values()) == {4 * one}


def alive_layers(run: reversible_run.Run) -> int:
    gc.collect()
    return len(run.layers)


@pytest.mark.parametrize("streams", STREAMS)
def test_forward_passes_that_are_thrown_away_are_freed(streams: str, monkeypatch: pytest.MonkeyPatch):
    runs: list[weakref.ref[Any]] = []
    plain = reversible_run.Run.close
    monkeypatch.setattr(reversible_run.Run, "close", lambda run: (runs.append(weakref.ref(run)), plain(run))[1])
    whole, _ = reversible_and_oracle(deep(4), streams, **STREAMS[streams])
    losses = losses_of(whole, batch_of())(EVERYONE)
    assert alive(runs) == 1
    del losses
    failing = whole.stack.layers[2].attention.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole(**batch_of())
    failing.remove()
    with torch.no_grad():
        whole(**batch_of())
    gradients(whole, losses_of(whole, batch_of())(EVERYONE))
    assert len(runs) == 4
    assert alive(runs) == 0


# ---- as a model


@pytest.mark.parametrize("streams", ["fixed", "stored"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate_with_and_without_keys_and_values_is_the_same(family: str, streams: str):
    whole: Any = make_reversible(build(family), ReversibleOptions(streams=streams))  # type: ignore[arg-type]
    ids = batch_of(2, 4)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = [whole.generate(ids, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(written[0], written[1])
    support.refuse_two_way_language_model(whole)


def test_one_bad_example_leaves_the_others_alone():
    whole, _ = reversible_and_oracle(deep(4), "fixed")
    whole.get_input_embeddings().weight.requires_grad_(False)
    batch = batch_of()
    engine = attach(whole)
    for _ in range(2):
        before = engine.backward(losses_of(whole, batch)(EVERYONE)).norms
    with torch.no_grad():
        whole.get_input_embeddings().weight[2] = torch.inf
    batch["input_ids"][1] = 2
    total = engine.backward(losses_of(whole, batch)(EVERYONE))
    others = torch.tensor([0, 2, 3])
    assert torch.equal(total.norms[others], before[others])
    assert all(bool(torch.isfinite(g).all()) for g in total.gradients.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exported_and_opened_again(family: str, tmp_path: Path):
    model = prepare(build(family), MethodSection(train="lora", lora_rank=2), seed=0)
    tiny_models.perturb(model)
    whole: Any = make_reversible(model, ReversibleOptions(factor_bits=3)).eval()
    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "model"
    export(whole, load.load_tokenizer(tmp_path / "tokenizer"), folder, "merged")
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors"}
    assert inspect(folder).model_type == "sotto_reversible"
    batch = support.dummy_batch(whole)
    expected = support.dummy_logits(whole, batch)
    opened: list[Any] = [load_exported(folder), sotto.load(folder)]
    with support.quiet():
        auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
        opened.append(auto.from_pretrained(folder).eval())
    for again in opened:
        assert again.coupling.streams.factor == 0.125
        assert not any("lora" in name for name, _ in again.named_parameters())
        torch.testing.assert_close(support.dummy_logits(again, batch), expected, rtol=0, atol=1e-5)


def test_the_export_is_not_the_plain_model(tmp_path: Path):
    """Without the coupling the same weights answer otherwise, so the folder must not open as the plain model."""
    model = build("llama")
    before = support.dummy_logits(model)
    whole: Any = make_reversible(model, ReversibleOptions(factor_bits=1)).eval()
    assert not torch.allclose(support.dummy_logits(whole, support.dummy_batch(model)), before, atol=1e-3)
    with support.quiet():
        whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sotto_reversible"


@pytest.mark.parametrize(
    "options", [{"streams": "float8"}, {"factor_bits": 9}, {"factor_bits": 0}, {"anchor_every": 0}]
)
def test_options_that_mean_nothing(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match="no options"):
        ReversibleOptions(**options)
    with support.quiet():
        make_reversible(build("bert"), ReversibleOptions()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["options"] |= options
    file.write_text(json.dumps(values))
    with pytest.raises(SottoError, match="SOT334"):
        load_exported(tmp_path / "model")


def test_a_deep_copy_is_a_model_of_its_own():
    whole: Any = make_reversible(build("gpt2"), ReversibleOptions())
    twin: Any = copy.deepcopy(whole)
    before = support.dummy_logits(whole)
    assert torch.equal(support.dummy_logits(twin), before)
    with torch.no_grad():
        twin.stack.layers[0].mlp.c_fc.weight.zero_()
    assert torch.equal(support.dummy_logits(whole), before)
    assert not torch.equal(support.dummy_logits(twin), before)


def test_detaching_an_engine_leaves_the_coupling_in_place():
    whole, plain = reversible_and_oracle(deep(4, torch.float64), "fixed")
    expected = oracle(whole, losses_of(whole, batch_of()), B)
    engine = attach(whole, clip_norm=expected.clip_norm)
    assert max(differences(engine.backward(losses_of(whole, batch_of())(EVERYONE)), expected)) < 1e-8
    engine.detach()
    found = losses_of(whole, batch_of())(EVERYONE)
    torch.testing.assert_close(found, losses_of(plain, batch_of())(EVERYONE), rtol=0, atol=1e-10)


def test_rotary_models_at_depth():
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 12, "num_key_value_heads": 2})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().train()
    whole, plain = reversible_and_oracle(model, "fixed")
    found = gradients(whole, losses_of(whole, batch_of())(EVERYONE))
    assert difference(found, gradients(plain, losses_of(plain, batch_of())(EVERYONE))) < 1e-7
