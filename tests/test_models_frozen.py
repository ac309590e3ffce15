"""Frozen layers that are kept in fewer bits: rounding, exact gradients, whole runs, exports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import tiny_runs
import torch
import torch.nn.functional as F
from test_memory import CPU, LiveBytes, _Deaf, config_only, tiny_values
from torch import nn
from transformers.pytorch_utils import Conv1D

import sotto
from sotto.config import MethodSection
from sotto.errors import SottoError
from sotto.memory_estimate import estimate
from sotto.memory_forecast import MemoryLaw, _Run
from sotto.models import frozen, support
from sotto.models.activation_cache import fingerprint
from sotto.models.frozen import FrozenLinear
from sotto.models.source import inspect
from sotto.models.trainable import prepare

KINDS = ("bfloat16", "int8", "int4")
FAMILIES = ("bert_classifier", "gpt2", "llama")


def some_layer(p: int = 6, d: int = 100, transposed: bool = False) -> Any:
    torch.manual_seed(0)
    layer: Any = Conv1D(p, d) if transposed else nn.Linear(d, p)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    with torch.no_grad():
        (layer.weight[:, 1] if transposed else layer.weight[1]).zero_()
    return layer.requires_grad_(False)


# ---- rounding


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_moved_by_half_a_step_at_most(kind: str, transposed: bool):
    layer = some_layer(transposed=transposed)
    found = FrozenLinear(layer, kind)
    assert found.weight.shape == layer.weight.shape
    w_pd, rounded_pd = (x.T if transposed else x for x in (layer.weight, found.weight))
    largest = w_pd.abs().amax(1, keepdim=True).clamp_min(1e-30)
    if kind == "int4":
        padded = F.pad(w_pd, (0, 28)).unflatten(1, (2, 64)).abs().amax(2)
        largest = padded.repeat_interleave(64, 1)[:, :100]
    half_step = {"bfloat16": w_pd.abs() / 256, "int8": largest / 254, "int4": largest / 14}[kind]
    assert bool(((w_pd - rounded_pd).abs() <= half_step * (1 + 1e-5)).all())
    assert bool((rounded_pd[1] == 0).all())  # zeros stay zeros
    assert not torch.equal(w_pd, rounded_pd)


@pytest.mark.parametrize(("kind", "bits"), [("bfloat16", 16), ("int8", 8.1), ("int4", 4.6)])
def test_bytes_of_a_weight(kind: str, bits: float):
    found = FrozenLinear(some_layer(256, 512), kind)
    stored = sum(p.numel() * p.itemsize for n, p in found.named_parameters() if n != "bias")
    assert 8 * stored / (256 * 512) <= bits


# ---- the product and its gradient


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_with_the_rounded_weight_and_keeps_nothing_of_it(kind: str, transposed: bool):
    layer: Any = FrozenLinear(some_layer(transposed=transposed), kind)
    weight = (layer.weight.T if transposed else layer.weight).double()
    x = torch.randn(3, 4, 100, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not kept
    torch.testing.assert_close(y, F.linear(x, weight, layer.bias.double()), rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(found, g @ weight, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach().float()).dtype is torch.bfloat16


def both(family: str, train: str, kind: str) -> tuple[nn.Module, nn.Module]:
    """A model with rounded layers, and the same model whose layers hold the rounded numbers in float64."""
    made = []
    for way in (kind, "float32"):
        method = MethodSection(train=train, frozen_weights=way, side_reduction=2)  # type: ignore[arg-type]
        made.append(prepare(tiny.build(family).eval(), method, 3))
    ours, plain = made
    modules = dict(plain.named_modules())
    rounded = [(path, m) for path, m in ours.named_modules() if isinstance(m, FrozenLinear)]
    assert len(rounded) >= 8
    with torch.no_grad():
        for path, module in rounded:
            modules[path].weight.copy_(module.weight)  # type: ignore[union-attr, operator]
        torch.manual_seed(1)
        others = dict(plain.named_parameters())
        for name, p in ours.named_parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
                others[name].copy_(p)
    return ours.double().eval(), plain.double().eval()


def losses(model: nn.Module) -> torch.Tensor:
    batch = support.dummy_batch(tiny.build("llama"), rows=4)
    logits = model(**batch).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, torch.tensor([0, 1, 2, 1]), reduction="none")
    targets = batch["input_ids"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none").view(4, -1).mean(1)


def oracle(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clipped sum by plain autograd, one example at a time."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for loss in losses(model):
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
        factor = min(1.0, 0.1 / float(torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()))
        for n, g in found.items():
            total[n] += factor * g
    return total


def largest_difference(family: str, train: str, kind: str, algorithm: Any = "auto") -> float:
    ours, plain = both(family, train, kind)
    expected = oracle(plain)
    engine = sotto.attach(ours, clip_norm=0.1, algorithm=algorithm)
    total = engine.backward(losses(ours))
    assert not any(row.slow for row in engine.report()) or algorithm == "per_example"
    engine.detach()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert expected.keys() == total.gradients.keys()
    return max(float((total.gradients[n] - g).abs().max()) / scale for n, g in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", ["lora", "side"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_per_unit_are_those_of_the_rounded_model(family: str, train: str, kind: str):
    # The scales of `.double()` are exact, and sums of clipped gradients are kept in float32.
    assert largest_difference(family, train, kind) < 1e-6


@pytest.mark.parametrize("algorithm", ["per_example", "ghost", "book_keeping"])
def test_all_algorithms_agree(algorithm: str):
    assert largest_difference("gpt2", "lora", "int4", algorithm) < 1e-6


def test_reversible_networks_run_rounded_layers_again():
    assert largest_difference("llama", "reversible", "int8") < 1e-4  # streams of 64-bit integers round


def test_a_wrong_backward_pass_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    right = frozen._Product.backward
    monkeypatch.setattr(frozen._Product, "backward", staticmethod(lambda ctx, *g: right(ctx, *(1.01 * x for x in g))))
    assert largest_difference("gpt2", "lora", "int8") > 1e-4


# ---- which layers


@pytest.mark.parametrize("train", ["lora", "side", "reversible"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_frozen_layers_below_the_head_are_rounded(family: str, train: str):
    before = dict(tiny.build(family).state_dict())
    model = prepare(tiny.build(family), MethodSection(train=train, frozen_weights="int8"))  # type: ignore[arg-type]
    paths = [path for path, module in model.named_modules() if isinstance(module, FrozenLinear)]
    assert not any(word in path for path in paths for word in ("lm_head", "classifier", ".lora_", "side."))
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.dtype is torch.float32
        if "emb" in name or "wte" in name:
            assert any(parameter.shape == x.shape and torch.equal(parameter, x) for x in before.values())
    again = frozen.store(model, "int4")
    assert again == 0


def test_frozen_factors_of_adapters_stay_as_they_were_drawn():
    options: dict[str, Any] = {"train": "lora", "lora_train": "up", "frozen_weights": "int4"}
    model = prepare(tiny.build("llama"), MethodSection(**options))
    plain = prepare(tiny.build("llama"), MethodSection(train="lora", lora_train="up"))
    drawn = {n: p for n, p in plain.named_parameters() if ".lora_A." in n}
    found = dict(model.named_parameters())
    assert drawn
    assert all(torch.equal(found[n], p) for n, p in drawn.items())


def test_the_start_of_a_side_network_is_the_rounded_models_function():
    rounded = prepare(tiny.build("gpt2"), MethodSection(train="lora", frozen_weights="int8"))
    beside = prepare(tiny.build("gpt2"), MethodSection(train="side", frozen_weights="int8"))
    torch.testing.assert_close(support.dummy_logits(rounded), support.dummy_logits(beside), rtol=1e-5, atol=1e-5)


def test_stored_outputs_are_of_the_rounded_layers():
    made = [prepare(tiny.build("gpt2"), MethodSection(train="side", frozen_weights=k)) for k in ("float32", *KINDS)]  # type: ignore[arg-type]
    assert len({fingerprint(model, "data") for model in made}) == 4


# ---- whole runs


@pytest.mark.parametrize(
    ("train", "kind", "gradient"),
    [("lora", "int8", "auto"), ("lora", "int4", "zeroth_order"), ("side", "int4", "auto"), ("head", "int8", "auto"),
     ("reversible", "bfloat16", "layerwise")],
)  # fmt: skip
def test_a_run_is_exported_as_the_rounded_model(tmp_path: Path, train: str, kind: str, gradient: str):
    method = {"train": train, "frozen_weights": kind, "gradient": gradient}
    done = sotto.train(tiny_runs.config(tmp_path, method=method, run={"debug_noise_seed": 3}))
    assert done.finished
    assert frozen.kind_of(done.model) == kind
    stored = sotto.load(done.path / "model")
    assert frozen.kind_of(stored) == "float32"  # a plain model, of the rounded numbers
    ids = torch.randint(5, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, done.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from test_train_side import Stopped, stop_after

    changes: dict[str, Any] = {"method": {"train": "side", "frozen_weights": "int8", "side_cache": True},
                               "run": {"debug_noise_seed": 5}}  # fmt: skip
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = sotto.train(tiny_runs.config(tmp_path / "a", **changes))
    broken = tiny_runs.config(tmp_path / "b", **changes)
    with monkeypatch.context() as m:
        stop_after(m, 2)
        with pytest.raises(Stopped):
            sotto.train(broken)
    again = sotto.resume(tiny_runs.only_run(tmp_path / "b"))
    tiny_runs.assert_same(tiny_runs.final_weights(whole.path), tiny_runs.final_weights(again.path))


def test_an_adapter_is_opened_on_a_base_that_is_rounded_again(tmp_path: Path):
    method = {"train": "lora", "frozen_weights": "int4"}
    config = tiny_runs.config(tmp_path, "completion", method=method, output={"export": "adapter"})
    done = sotto.train(config)
    folder = done.path / "model"
    stored = sotto.load(folder, base=config.model.name)
    assert frozen.kind_of(stored) == "int4"
    ids = torch.randint(5, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, done.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    note = json.loads((folder / "sotto.json").read_text())
    (folder / "sotto.json").write_text(json.dumps(note | {"frozen_weights": "int3"}))
    with pytest.raises(SottoError, match="SOT334"):
        sotto.load(folder, base=config.model.name)


# ---- what is refused


@pytest.mark.parametrize(
    "method",
    [{"train": "full"}, {"train": "bitfit"}, {"train": "reversible", "reversible_train": "full"},
     {"train": "reversible", "reversible_train": "bitfit"}],
)  # fmt: skip
def test_layers_that_are_trained_are_not_rounded(tmp_path: Path, method: dict[str, Any]):
    with pytest.raises(SottoError) as caught:
        tiny_runs.config(tmp_path, method={**method, "frozen_weights": "int8"})
    assert "frozen_weights" in str(caught.value)
    assert all((caught.value.what, caught.value.where, caught.value.why, caught.value.fix))


def test_runs_on_several_machines_are_refused(tmp_path: Path):
    with pytest.raises(SottoError, match="one machine"):
        tiny_runs.config(tmp_path, method={"train": "lora", "frozen_weights": "int8"}, setting={"kind": "federated"})


# ---- memory


@pytest.mark.parametrize(
    ("shape", "train", "kind"),
    [
        ("bert", "lora", "int8"),
        pytest.param("llama", "side", "int4", marks=pytest.mark.slow),
        pytest.param("gpt2", "reversible", "int8", marks=pytest.mark.slow),
    ],
)
def test_the_forecast_is_what_real_tensors_take(tmp_path: Path, shape: str, train: str, kind: str):
    config = config_only(tmp_path, shape, 2, train, "book_keeping")
    config = config.with_overrides([f"method.frozen_weights={kind}"])
    law = MemoryLaw(config, CPU)
    said = law.at(4)
    torch.manual_seed(0)
    model = prepare(tiny_values(law._build(None)), config.method, 0)
    counted = LiveBytes()
    for x in (*model.parameters(), *model.buffers()):
        counted.note(x)
    with counted:
        run = _Run(_Deaf(), model.train(), config, CPU, 4)  # type: ignore[arg-type]
        run.check()
        run.step()
    assert said.peak == pytest.approx(counted.peak, rel=0.02)


def test_the_estimate_of_a_plan_knows_and_loading_is_counted(tmp_path: Path):
    tiny.save("llama", tmp_path / "model")
    config = tiny_runs.config(tmp_path, "completion", method={"train": "lora"})
    facts = inspect(Path(config.model.name))
    said = {}
    for kind in frozen.KINDS:
        changed = config.with_overrides([f"method.frozen_weights={kind}"])
        said[kind] = estimate(facts, changed).weights
        loading = MemoryLaw(changed, CPU, facts).loading
        assert loading == (0 if kind == "float32" else 4 * facts.parameters)
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of two layers
    assert said["float32"] - said["int8"] == 3 * matrices
    assert said["float32"] > said["bfloat16"] > said["int8"] > said["int4"]
