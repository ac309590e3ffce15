"""Memory forecasts: against live bytes counted on real tensors, against whole traces, and what a budget does."""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BertConfig, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

import sotto
from sotto import memory_budget, training
from sotto.errors import SottoError
from sotto.memory_forecast import MemoryLaw, _Run, full_examples_take_more
from sotto.memory_trace import PARTS, NotAlike, Recorder, Segment, extended, pretend
from sotto.models.trainable import prepare

CPU = torch.device("cpu")
DEEP: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
                        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "bert": lambda n: BertConfig(**DEEP, num_hidden_layers=n),
    "gpt2": lambda n: GPT2Config(vocab_size=100, n_embd=32, n_head=4, n_positions=64, n_layer=n),
    "llama": lambda n: LlamaConfig(**DEEP, num_hidden_layers=n, num_key_value_heads=2),
    "gemma2": lambda n: Gemma2Config(**DEEP, num_hidden_layers=n, num_key_value_heads=2, head_dim=8),
    "qwen3": lambda n: Qwen3Config(**DEEP, num_hidden_layers=n, num_key_value_heads=2, head_dim=8),
}


def config_only(folder: Path, kind: str, layers: int, train: str, gradient: str, **run: Any) -> sotto.Config:
    """A model folder that holds nothing but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(SHAPES[kind](layers).to_json_string(use_diff=False))
    data: dict[str, Any] = {"train": "nowhere.csv", "text": "text", "max_length": 16}
    if kind == "bert":
        data |= {"label": "label", "labels": ["a", "b"]}
    return sotto.Config.from_dict(
        {"model": {"name": str(folder)}, "data": data,
         "method": {"train": train, "gradient": gradient, "lora_rank": 32},
         "privacy": {"unit": "record", "num_units": 1000, "epsilon": 3},
         "run": {"expected_batch_size": 32, "steps": 10, "device": "cpu", **run}}
    )  # fmt: skip


# ---- the trace, against real tensors


class LiveBytes(TorchDispatchMode):
    """The oracle: bytes of storages that exist after each operation, on real tensors, and the largest sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def note(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)
            self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.note(x)
        return out


class _Deaf:
    """Stands for a recorder where the tensors are real."""

    def during(self, phase: str) -> Any:
        return contextlib.nullcontext()

    def assign(self, tensors: Any, part: str) -> None:
        return None


@pytest.mark.parametrize(
    ("kind", "train", "gradient"),
    [("bert", "full", "book_keeping"), ("bert", "lora", "ghost"), ("llama", "lora", "per_example")],
)
def test_the_forecast_is_what_real_tensors_take(tmp_path: Path, kind: str, train: str, gradient: str) -> None:
    """The same steps with data. They may differ by what depends on values, which is little."""
    config = config_only(tmp_path, kind, 2, train, gradient)
    said = MemoryLaw(config, CPU).at(4)
    law = MemoryLaw(config, CPU)
    torch.manual_seed(0)
    model = prepare(law._build(None), config.method, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and bool(parameter.any()):
                parameter.normal_(std=0.05)
    model = tiny_values(model)
    oracle = LiveBytes()
    for x in (*model.parameters(), *model.buffers()):
        oracle.note(x)
    with oracle:
        run = _Run(_Deaf(), model.train(), config, CPU, 4)  # type: ignore[arg-type]
        run.check()
        run.step()
    assert said.peak == pytest.approx(oracle.peak, rel=0.01)


def tiny_values(model: torch.nn.Module) -> torch.nn.Module:
    """A model without weights gets some: modules built without initialisation hold whatever was in memory."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()) or parameter.abs().max() > 10:
                parameter.normal_(std=0.05)
            if "norm" in name.lower() or "ln_" in name:
                parameter.fill_(float(name.endswith("weight")))
    return model


def test_bytes_that_die_are_not_counted() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with Recorder(fake) as recorder:
        x = torch.empty(2**21)
        del x
        y = torch.empty(2**21)
        z = y[:5] + 1
    assert recorder.segments(0)[0].bytes_PE.sum(0).tolist() == [4 * 2**21, 4 * 2**21, 4 * 2**21, 4 * 2**21 + 20]
    del z


def test_parts_add_up_and_weights_are_exact(tmp_path: Path) -> None:
    config = config_only(tmp_path, "llama", 2, "full", "book_keeping")
    forecast = MemoryLaw(config, CPU).at(4)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(SHAPES["llama"](2))
    count = sum(p.numel() for p in model.parameters())
    assert forecast.trainable == count
    assert forecast.parts["trainables"] == 4 * count
    assert sum(forecast.parts.values()) == forecast.peak
    assert set(forecast.parts) == set(PARTS)


# ---- fewer layers and other microbatches


@pytest.mark.parametrize(
    ("kind", "train", "gradient"),
    [pytest.param("bert", "lora", "book_keeping", marks=pytest.mark.slow), ("gpt2", "full", "ghost"),
     pytest.param("qwen3", "lora", "layerwise", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_few_layers_tell_of_all(tmp_path: Path, kind: str, train: str, gradient: str) -> None:
    """What is followed from three and four layers must be the whole trace's, to the byte, wherever the step is."""
    law = MemoryLaw(config_only(tmp_path, kind, 7, train, gradient), CPU)
    assert law._depths == (3, 4, 4)
    guess, whole = law._at_depth(3, check=True), law._trace(3, None, True)
    for few, all_layers in zip(guess, whole, strict=True):
        for one, other in zip(few, all_layers, strict=True):
            assert one.phase == other.phase
            assert one.bytes_PE.sum(0).max() == other.bytes_PE.sum(0).max()


def test_layers_of_two_kinds_are_traced_in_pairs(tmp_path: Path) -> None:
    law = MemoryLaw(config_only(tmp_path, "gemma2", 26, "full", "ghost"), CPU)
    assert law._depths == (6, 8, 10)
    some = config_only(tmp_path, "bert", 26, "lora", "ghost").with_overrides(["method.lora_layers=[24, 25]"])
    assert MemoryLaw(some, CPU)._depths is None


def test_two_microbatches_tell_of_others(tmp_path: Path) -> None:
    law = MemoryLaw(config_only(tmp_path, "bert", 2, "full", "book_keeping"), CPU)
    exact = max(int(s.bytes_PE.sum(0).max()) for part in law._trace(17, None, True) for s in part)
    assert law.at(17).peak == pytest.approx(exact, rel=5e-3)
    assert law.largest(law.at(11).peak, 64) == 11
    assert law.largest(law.at(1).peak - 1, 64) == 0


def test_what_is_no_repetition_is_refused() -> None:
    def segment(names: list[int]) -> list[Segment]:
        row = np.array(names)
        return [Segment("noise", row, row * 0, np.tile(row, (len(PARTS), 1)))]

    with pytest.raises(NotAlike):
        extended(segment([1, 2, 3, 4]), segment([1, 2, 9, 3, 4]), 1, sizes=False)
    with pytest.raises(NotAlike):
        extended(segment([1, 2, 3]), segment([1, 2]), 1, sizes=False)
    repeated = extended(segment([1, 2, 3, 2, 3, 4]), segment([1, 2, 3, 2, 3, 2, 3, 4]), 1, sizes=False)
    assert sorted(repeated[0].names_E.tolist()) == [1, 2, 2, 3, 3, 4]


def test_weights_of_zeros_stay_known_as_such() -> None:
    """They decide whether a gradient exists that the engine can compare: a LoRA factor's is zero at first."""
    model = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(model.weight)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    pretend(model, fake, CPU)
    with Recorder(fake):
        x = torch.empty(3, 4)
        assert float((x @ model.weight.T).norm().detach()) == 0
        assert not bool((x @ model.weight.T).norm() > 0)
        assert bool(model.bias.norm() > 0)


# ---- the budget


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29)]
)
def test_sizes_have_units(tmp_path: Path, text: str, size: int) -> None:
    config = config_only(tmp_path, "bert", 2, "lora", "auto", memory=text)
    assert config.run.memory_bytes == size


@pytest.mark.parametrize("bad", ["8", 8, "8 gigabytes", "0GiB", "-1GiB", "8TiB", True, "GiB"])
def test_other_sizes_are_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(SottoError, match="8GiB, 8GB or 512MiB") as caught:
        config_only(tmp_path, "bert", 2, "lora", "auto", memory=bad)
    assert caught.value.code == "SOT107"


def test_a_budget_below_the_floor_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "THRIFTY", ("head",))  # a forecast of each takes its time
    config = config_only(tmp_path, "bert", 2, "full", "book_keeping", memory="1MiB")
    with pytest.raises(SottoError, match="at least") as caught:
        sotto.train(config)
    assert caught.value.code == "SOT515"
    assert "run.memory:" in caught.value.fix


def test_a_budget_chooses_the_microbatch_and_training_obeys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_runs.config(tmp_path, run={"microbatch_size": "auto", "steps": 2}, method={"train": "bitfit"})
    law = MemoryLaw(config, CPU)
    wanted = law.at(5).peak
    room = memory_budget.Budget(wanted, wanted, True)
    monkeypatch.setattr(memory_budget.Budget, "of", classmethod(lambda cls, config, device: room))
    assert memory_budget.microbatch_size(config, CPU) == 5
    seen: list[int] = []
    backward = training.Engine.backward

    def noting(self: Any, losses: torch.Tensor, units: torch.Tensor | None = None) -> Any:
        seen.append(len(losses))
        return backward(self, losses, units)

    monkeypatch.setattr(training.Engine, "backward", noting)
    assert sotto.train(config).steps == 2
    assert 1 < max(seen) <= 5


def test_the_table_knows_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = config_only(tmp_path, "bert", 2, "lora", "ghost", microbatch_size=2)
    monkeypatch.setattr(memory_budget, "get_args", lambda annotation: [a for a in ("lora", "bitfit", "ghost") if a in
                                                                       str(annotation)])  # fmt: skip
    table = sotto.memory(config)
    assert [(r.train, r.gradient) for r in table.rows] == [("lora", "ghost"), ("bitfit", "ghost")]
    assert table.pick is table.rows[0]
    from sotto.reporting import memory_text

    text = memory_text.render(table)
    assert "lora" in text
    json.dumps(table.to_dict())


@pytest.mark.slow
def test_processes_share_the_table_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_only(tmp_path, "bert", 2, "lora", "ghost", microbatch_size=2)
    words = ("full", "lora", "bitfit", "side", "ghost")
    monkeypatch.setattr(memory_budget, "get_args", lambda annotation: [a for a in words if a in str(annotation)])
    alone = memory_budget.table(config, CPU)
    monkeypatch.setattr(memory_budget, "PATIENCE", 0.0)
    told: list[tuple[int, int]] = []
    shared = memory_budget.table(config, CPU, lambda done, of: told.append((done, of)), workers=2)
    assert [row.forecast for row in shared.rows] == [row.forecast for row in alone.rows]
    assert told == [(n, 4) for n in range(5)]


@pytest.mark.parametrize(
    ("kind", "gradient", "train"),
    [*(("bert", "zeroth_order", train) for train in ("lora", "side", "reversible")),
     pytest.param("bart", "book_keeping", "lora", marks=pytest.mark.slow),
     *(("bart", "book_keeping", train) for train in ("side", "reversible"))],
)  # fmt: skip
def test_a_row_of_a_model_with_a_large_table(tmp_path: Path, kind: str, gradient: str, train: str) -> None:
    """Large enough for tensors without data; with adapters above a frozen layer, and an encoder-decoder."""
    config = config_only(tmp_path, "bert", 2, train, gradient, microbatch_size=2)
    config = config.with_overrides(["method.lora_layers=[1]"] if kind == "bert" and "side" not in train else [])
    large: Any = BertConfig(**{**DEEP, "vocab_size": 40_000}, num_hidden_layers=2)
    if kind == "bart":
        large = BartConfig(vocab_size=40_000, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
                           decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)  # fmt: skip
    (tmp_path / "config.json").write_text(large.to_json_string(use_diff=False))
    row = memory_budget._row(config, CPU, train, gradient, 2, memory_budget.Budget.of(config, CPU))
    if kind == "bart" and train == "reversible":
        assert row.refused.startswith("SOT340")
    else:
        assert row.forecast is not None, row.refused
        assert row.forecast.peak > 4 * 40_000 * 32


@pytest.mark.parametrize("vocabulary", [64, 40_000])
def test_a_forecast_takes_masks_of_weights_that_nobody_has_read(tmp_path: Path, vocabulary: int) -> None:
    config = config_only(tmp_path, "bert", 2, "full", "zeroth_order", microbatch_size=2)
    large = BertConfig(**{**DEEP, "vocab_size": vocabulary}, num_hidden_layers=2)
    (tmp_path / "config.json").write_text(large.to_json_string(use_diff=False))
    masked = MemoryLaw(config.with_overrides(["method.zeroth_preset=dpzopo"]), CPU).at(2)
    assert masked.peak > MemoryLaw(config, CPU).at(2).peak


def test_a_row_that_cannot_be_trained_says_why(tmp_path: Path) -> None:
    config = config_only(tmp_path, "llama", 2, "lora", "ghost", microbatch_size=2)
    row = memory_budget._row(config, CPU, "bitfit", "ghost", 2, memory_budget.Budget.of(config, CPU))
    assert row.forecast is None
    assert row.refused.startswith("SOT320")


def test_seventy_billion_weights_take_no_memory(tmp_path: Path) -> None:
    large: dict[str, Any] = {"vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80,
                             "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
    }  # fmt: skip
    config = config_only(tmp_path, "llama", 2, "bitfit", "book_keeping")
    (tmp_path / "config.json").write_text(LlamaConfig(**large).to_json_string(use_diff=False))
    law = MemoryLaw(config.with_overrides(["method.train=lora", "data.max_length=512"]), CPU)
    assert law._depths == (3, 4, 77)
    _, segments = law._at_depth(3, check=False)
    weights = segments[0].bytes_PE[PARTS.index("weights")].max()
    with torch.device("meta"):
        assert weights >= 4 * sum(p.numel() for p in law._build(None).parameters()) > 4 * 70e9


@pytest.mark.slow
def test_methods_that_keep_less_need_less(tmp_path: Path) -> None:
    """Of activations, all layers' are kept, or each layer's input, or less than that."""
    config = config_only(tmp_path, "bert", 5, "lora", "layerwise").with_overrides(["data.max_length=128"])
    above = [i for i, part in enumerate(PARTS) if part not in ("weights", "trainables")]

    def peak(*changes: str) -> int:
        law = MemoryLaw(config.with_overrides([f"method.{c}" for c in changes]), CPU)
        return max(int(s.bytes_PE[above].sum(0).max()) for s in law._trace(3, None, False)[1])

    plain = peak()
    stored, fixed = (peak("train=reversible", f"reversible_streams={s}") for s in ("stored", "fixed"))
    assert max(stored, fixed, peak("train=side")) < plain / 2


def test_fake_weights_go_to_another_device():
    """As those of a run do, which is prepared on the processor. That they are on the other one is all that is known."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    pretend(model, fake, CPU)
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cpu"}
    shapes = {n: (x.shape, x.dtype, x.requires_grad) for n, x in model.state_dict(keep_vars=True).items()}
    pretend(model, fake, torch.device("cuda"))
    held = [*model.parameters(), *model.buffers()]
    assert {str(x.device) for x in held} == {"cuda:0"}  # with a number, as tensors that are made there have
    assert all(x.is_cuda for x in held)
    assert model[2].weight is model[0].weight
    assert {n: (x.shape, x.dtype, x.requires_grad) for n, x in model.state_dict(keep_vars=True).items()} == shapes
    again = model[0].weight
    pretend(model, fake, torch.device("cuda"))
    assert model[0].weight is again


def test_where_examples_without_padding_take_more():
    cuda, grouped = torch.device("cuda"), LlamaConfig(**DEEP, num_key_value_heads=2)
    assert full_examples_take_more(grouped, "float32", cuda)
    assert not full_examples_take_more(grouped, "bfloat16", cuda)
    assert not full_examples_take_more(grouped, "float32", CPU)
    assert not full_examples_take_more(LlamaConfig(**DEEP), "float32", cuda)
    assert not full_examples_take_more(GPT2Config(), "float32", cuda)
