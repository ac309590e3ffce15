"""The engine is exact on every family of transformers that can be built here: full fine-tuning and LoRA.

`families.NOT_BUILT` and `NO_LORA` are the only exceptions; a family that is listed there and works after all fails its
test, so that the lists stay true.
"""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import CAUSAL, CLASSIFICATION
from gradient_oracle import differences, oracle

from sotto.config import MethodSection
from sotto.gradients.engine import attach
from sotto.models.trainable import prepare

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # advice about fast kernels and weight initialisation
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

UNITS = torch.tensor([5, 3, 5, 9])
MOST_STEPS = 9
PATIENT = ("inkling_text", "kimi_linear", "longformer", "nemotron_h", "t5gemma2")
"""Families whose plain code takes up to half a minute for a batch of four."""

NO_LORA: dict[tuple[str, str], str] = {
    (
        CAUSAL,
        "deepseek_v4",
    ): "its grouped output layer is a linear layer with a forward of another shape, which peft breaks",
    (CAUSAL, "llama4"): "its router is a linear layer that returns a tuple, which peft cannot wrap",
    (CAUSAL, "llama4_text"): "its router is a linear layer that returns a tuple, which peft cannot wrap",
    (CAUSAL, "phimoe"): "its router is a linear layer that returns a tuple, which peft cannot wrap",
    (CLASSIFICATION, "phimoe"): "its router is a linear layer that returns a tuple, which peft cannot wrap",
    (CAUSAL, "reformer"): "its reversible blocks need an input that requires a gradient",
    (CLASSIFICATION, "ibert"): "its linear layers are classes of its own, which peft does not know",
    (CLASSIFICATION, "modernvbert"): "peft takes the vision tower's pooling for the classification head",
}


def every(exceptions: Any = ()) -> list[Any]:
    return [
        pytest.param(kind, name, id=f"{kind}-{name}", marks=[pytest.mark.slow] if name in PATIENT else [])
        for kind in (CAUSAL, CLASSIFICATION)
        for name in families.NAMES[kind]
        if (kind, name) not in families.NOT_BUILT and (kind, name) not in exceptions
    ]


def assert_exact(model: Any, kind: str, name: str, algorithms: tuple[str, ...]) -> None:
    """Steps of each algorithm against plain autograd of the model without the engine, one unit at a time.

    As many as it takes until every parameter has found the module that is run again for it; then none is left for which
    the whole model is run once per unit. (XLNet, with its batch in the second dimension, is all there is around some.)
    """
    losses = families.losses_of(model, families.batch(), kind)
    expected = oracle(model, losses, families.B, UNITS)
    assert bool(torch.isfinite(expected.norms).all())
    assert float(expected.norms.min()) > 0
    # Many families compute norms and softmax in float32 whatever their weights are.
    tolerance = 2e-3 if name in families.NARROW else 1e-6
    for algorithm in algorithms:
        engine = attach(model, clip_norm=expected.clip_norm, algorithm=algorithm)  # type: ignore[arg-type]
        for step in range(MOST_STEPS):
            total = engine.backward(losses(torch.arange(families.B)), UNITS)
            worst = differences(total, expected)
            assert max(worst) < tolerance, (algorithm, step, worst)
            if step > 0 and not engine.slow and all(s.confirmed for s in engine.sites.values() if s.rule == "rerun"):
                break
        assert name == "xlnet" or [(r.path, r.reason) for r in engine.report() if r.slow] == []
        engine.detach()


@pytest.mark.parametrize(("kind", "name"), every())
def test_engine_is_exact_with_all_weights(kind: str, name: str) -> None:
    assert_exact(families.build(name, kind), kind, name, ("auto", "ghost"))


def adapted(kind: str, name: str) -> Any:
    """Adapters of peft on every linear layer, none of them at zero."""
    base = families.build(name, kind)
    dtype = next(base.parameters()).dtype
    model = prepare(base, MethodSection(train="lora", lora_rank=2, lora_alpha=4, lora_targets="all-linear")).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("kind", "name"), every(NO_LORA))
def test_engine_is_exact_with_adapters(kind: str, name: str) -> None:
    assert_exact(adapted(kind, name), kind, name, ("auto",))


@pytest.mark.parametrize(("kind", "name"), sorted(families.NOT_BUILT), ids="-".join)
def test_engine_families_that_cannot_be_built_are_still_out_of_reach(kind: str, name: str) -> None:
    def train() -> None:
        model = families.build(name, kind)
        families.losses_of(model, families.batch(), kind)(torch.arange(families.B)).sum().backward()

    with pytest.raises(Exception):  # noqa: B017 each fails in its own way
        train()


@pytest.mark.parametrize(("kind", "name"), sorted(NO_LORA), ids="-".join)
def test_engine_families_without_adapters_are_still_without(kind: str, name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        assert_exact(adapted(kind, name), kind, name, ("auto",))


# Not here: T5 and MPNet, whose table of relative positions is looked up once for the whole batch, so that the attention
# around it is run again; state-space models, whose mixers are; and mixtures of experts, whose experts and routers are.
MAINSTREAM = {
    CAUSAL: "bert roberta electra camembert gpt2 gpt_neo gpt_neox gptj gpt_bigcode opt bloom falcon llama mistral "
    "qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 cohere cohere2 starcoder2 stablelm granite "
    "smollm3 bart mbart pegasus xglm mpt codegen persimmon stablelm nemotron helium glm glm4 exaone4",
    CLASSIFICATION: "bert roberta distilbert electra albert deberta-v2 xlm-roberta camembert modernbert bart mbart "
    "gpt2 gpt_neo gptj opt bloom falcon llama mistral qwen2 qwen3 gemma gemma2 phi phi3 stablelm starcoder2 "
    "mobilebert squeezebert xlm nystromformer",
}


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in MAINSTREAM for n in dict.fromkeys(MAINSTREAM[k].split())], ids=str
)
def test_engine_has_a_rule_for_every_module_of_mainstream_models(kind: str, name: str) -> None:
    assert name in families.NAMES[kind], "not in this release of transformers: take it off the list"
    model = families.build(name, kind)
    losses = families.losses_of(model, families.batch(), kind)
    engine = attach(model)
    engine.backward(losses(torch.arange(families.B)))
    assert [(r.path, r.reason) for r in engine.report() if r.slow or r.rule == "rerun"] == []
    reported = {name for r in engine.report() for name in r.parameters}
    assert reported == set(engine.parameters)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma", "qwen3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("packed", [False, True], ids=["explicit", "packed"])
def test_engine_takes_position_ids(name: str, packed: bool) -> None:
    """Given for all rows, for one row to broadcast, or starting again in the middle: texts of one unit in one row."""
    model = families.build(name, CAUSAL)
    inputs = families.batch()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    restart = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]) if packed else torch.arange(families.T)
    for positions in (restart.expand(families.B, -1), restart[None]):

        def losses(rows: torch.Tensor, positions: torch.Tensor = positions) -> torch.Tensor:
            part = {key: value[rows] for key, value in inputs.items()}
            part["position_ids"] = positions if len(positions) == 1 else positions[rows]
            return model(**part).logits.logsumexp(-1).square().sum(1)

        expected = oracle(model, losses, families.B, UNITS)
        for algorithm in ("auto", "ghost"):
            engine = attach(model, clip_norm=expected.clip_norm, algorithm=algorithm)  # type: ignore[arg-type]
            for _ in range(2):
                total = engine.backward(losses(torch.arange(families.B)), UNITS)
                assert max(differences(total, expected)) < 1e-6
            engine.detach()
