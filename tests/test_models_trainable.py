"""What is trained: exactly the weights that the method names, in float32, the same from the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from torch import nn

from sotto.config import MethodSection, ModelSection
from sotto.errors import SottoError
from sotto.models import load, support, trainable
from sotto.models.lora import add_lora


def refused(code: str, call, *args) -> SottoError:
    with pytest.raises(SottoError) as caught:
        call(*args)
    error = caught.value
    assert error.code == code, error
    assert all((error.what, error.where, error.why, error.fix))
    return error


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, root / kind) for kind in ["bert", "roberta", "gpt2", "llama"]}


@pytest.fixture
def model_of(folders):
    def build(kind: str, pooling: str = "model", task: str = "classification") -> nn.Module:
        data = tiny.CLASSIFY if task == "classification" else tiny.WRITE
        section = ModelSection(name=str(folders[kind]), pooling=pooling)  # type: ignore[arg-type]
        return load.load_model(section, data, MethodSection(), 0).model

    return build


KINDS = [
    ("bert", "mean", "classification"),
    ("bert", "model", "classification"),
    ("roberta", "model", "classification"),
    ("gpt2", "model", "classification"),
    ("llama", "model", "classification"),
    ("gpt2", "model", "generation"),
    ("llama", "model", "generation"),
]


def gradients(model: nn.Module) -> set[str]:
    """Names of the parameters that a backward pass reaches with something other than zero."""
    model.train()
    model(**support.dummy_batch(model)).logits.square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(("kind", "pooling", "task"), KINDS)
def test_lora_trains_adapters_and_head_and_nothing_else(model_of, kind, pooling, task):
    plain = model_of(kind, pooling, task)
    before = {n: p.clone() for n, p in plain.named_parameters()}
    heads = support.head_names(plain) if task == "classification" else []
    scores = support.dummy_logits(plain)
    state = torch.get_rng_state()
    model = trainable.prepare(plain, MethodSection(train="lora"), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    names = trainable.describe(model)["names"]
    assert {n.split("base_model.model.")[1].split(".")[0] for n in names if ".lora_" not in n} == set(heads)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(support.dummy_logits(model), scores)  # the default initialisation changes nothing
    tiny.perturb(model)
    assert gradients(model) == set(names)
    frozen = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, value in before.items():
        if name.split(".")[0] not in heads:
            assert torch.equal(frozen[name], value)


@pytest.mark.parametrize(("kind", "pooling", "task"), KINDS)
def test_full_trains_everything(model_of, kind, pooling, task):
    model = trainable.prepare(model_of(kind, pooling, task), MethodSection(train="full"))
    described = trainable.describe(model)
    assert described["trainable"] == described["total"] == sum(p.numel() for p in model.parameters())
    assert described["share"] == 1.0


@pytest.mark.parametrize(("kind", "pooling", "task"), [k for k in KINDS if k[0] != "llama"])
def test_bitfit_trains_biases_and_head(model_of, kind, pooling, task):
    plain = model_of(kind, pooling, task)
    heads = support.head_names(plain) if task == "classification" else []
    model = trainable.prepare(plain, MethodSection(train="bitfit"))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") or name.split(".")[0] in heads)
    tiny.perturb(model)
    # A bias on the keys shifts all scores of a query alike, so that softmax removes it: its gradient is rounding.
    reached = gradients(model)
    assert all("key.bias" in n for n in set(trainable.describe(model)["names"]) - reached)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_bitfit_needs_biases(model_of, task):
    refused("SOT320", trainable.prepare, model_of("llama", task=task), MethodSection(train="bitfit"))


@pytest.mark.parametrize(("kind", "pooling", "task"), [k for k in KINDS if k[2] == "classification"])
def test_head_trains_the_head(model_of, kind, pooling, task):
    plain = model_of(kind, pooling, task)
    model = trainable.prepare(plain, MethodSection(train="head"))
    names = trainable.describe(model)["names"]
    assert names
    assert {n.split(".")[0] for n in names} == set(support.head_names(plain))
    tiny.perturb(model)
    assert gradients(model) == set(names)


def test_head_needs_a_head(model_of):
    refused("SOT324", trainable.prepare, model_of("llama", task="generation"), MethodSection(train="head"))


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_adapters_depend_on_the_seed_alone(model_of, init):
    method = MethodSection(lora_init=init)

    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # the global state must not matter
        model = add_lora(model_of("bert", "mean"), method, "classification", seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_" in n])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_orthogonal_needs_an_even_rank(model_of):
    method = MethodSection(lora_init="orthogonal", lora_rank=3)
    refused("SOT325", trainable.prepare, model_of("bert", "mean"), method)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "pissa", "olora", "loftq", "True", "tomorrows"])
def test_other_initialisations_are_refused_even_past_the_configuration(model_of, init):
    method = MethodSection().model_copy(update={"lora_init": init})
    refused("SOT323", add_lora, model_of("bert", "mean"), method, "classification", 0)


def adapted(model: nn.Module) -> set[str]:
    names = (n.removeprefix("base_model.model.") for n, _ in model.named_parameters())
    return {n.split(".lora_A")[0] for n in names if ".lora_A" in n}


def test_all_linear_leaves_out_head_and_output_embedding(model_of):
    bert = adapted(trainable.prepare(model_of("bert", "mean"), MethodSection()))
    assert len(bert) == 2 * 6
    roberta = adapted(trainable.prepare(model_of("roberta"), MethodSection()))
    assert len(roberta) == 2 * 6, "classifier.dense is trained whole, not adapted"
    llama = adapted(trainable.prepare(model_of("llama", task="generation"), MethodSection()))
    assert len(llama) == 2 * 7
    gpt2 = adapted(trainable.prepare(model_of("gpt2", task="generation"), MethodSection()))
    assert len(gpt2) == 2 * 4


def test_named_targets(model_of):
    model = trainable.prepare(model_of("llama", task="generation"), MethodSection(lora_targets=("q_proj", "v_proj")))
    assert {n.rsplit(".", 1)[-1] for n in adapted(model)} == {"q_proj", "v_proj"}
    model = trainable.prepare(model_of("bert", "mean"), MethodSection(lora_targets=("attention.output.dense",)))
    assert len(adapted(model)) == 2
    model = trainable.prepare(model_of("roberta"), MethodSection(lora_targets=("dense",)))
    assert not any(n.startswith("classifier") for n in adapted(model))


@pytest.mark.parametrize("target", ["q_prj", "embed_tokens", "mlp", "lm_head", ""])
def test_unknown_targets(model_of, target):
    method = MethodSection(lora_targets=("v_proj", target))
    error = refused("SOT321", trainable.prepare, model_of("llama", task="generation"), method)
    assert "q_proj" in error.fix
    if target == "q_prj":
        assert "Did you mean 'q_proj'?" in error.what


@pytest.mark.parametrize(("kind", "targets"), [("bert", "all-linear"), ("bert", ("query",)), ("gpt2", "all-linear")])
def test_chosen_blocks(model_of, kind, targets):
    method = MethodSection(lora_layers=(1,), lora_targets=targets)
    names = adapted(trainable.prepare(model_of(kind), method))
    assert names
    assert all(".1." in name for name in names)


def test_unknown_block(model_of):
    method = MethodSection(lora_layers=(0, 2))
    error = refused("SOT322", trainable.prepare, model_of("bert", "mean"), method)
    assert "0 to 1" in error.fix


def test_rank_and_scale(model_of):
    model = trainable.prepare(model_of("gpt2", task="generation"), MethodSection(lora_rank=4, lora_alpha=6))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == 1.5
    assert layer.fan_in_fan_out


def test_weights_in_half_precision_become_float32_where_trained(model_of):
    model = trainable.prepare(model_of("bert", "mean").bfloat16(), MethodSection(train="head"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_lora_on_minilm():
    section = ModelSection(name=str(tiny.minilm()), pooling="mean")
    model = load.load_model(section, tiny.CLASSIFY, MethodSection(), 0).model
    described = trainable.describe(trainable.prepare(model, MethodSection()))
    # 6 blocks x rank 8 x (4 square layers of 384 and two of 384 x 1536), and the head's 384 * 3 + 3.
    assert described["trainable"] == 6 * 8 * (4 * 768 + 2 * 1920) + 1155


def test_lora_on_stories():
    model = load.load_model(ModelSection(name=str(tiny.stories())), tiny.WRITE, MethodSection(), 0).model
    model = trainable.prepare(model, MethodSection(lora_rank=2))
    tiny.perturb(model)
    assert gradients(model) == set(trainable.describe(model)["names"])
