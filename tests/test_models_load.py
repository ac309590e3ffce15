"""Loading: float32, no dropout, a head at zero, nothing random in the backbone, global random state untouched."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging as hf_logging

from sotto.config import DataSection, MethodSection, ModelSection
from sotto.errors import SottoError
from sotto.models import load, support
from sotto.models.pooling import MeanPooledClassifier, masked_mean
from sotto.models.source import inspect

LORA = MethodSection()


def refused(code: str, call, *args) -> SottoError:
    with pytest.raises(SottoError) as caught:
        call(*args)
    error = caught.value
    assert error.code == code, error
    assert all((error.what, error.where, error.why, error.fix))
    return error


def loaded(folder: Path, data: DataSection, pooling: str = "model", method=LORA, seed: int = 0) -> load.LoadedModel:
    return load.load_model(ModelSection(name=str(folder), pooling=pooling), data, method, seed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds = ["bert", "bert_mlm", "bert_classifier", "roberta", "gpt2", "llama"]
    return {kind: tiny.save(kind, root / kind) for kind in kinds}


@pytest.fixture
def copied(folders, tmp_path):
    def copy(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        for file in folders[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy


def edit(file: Path, **values) -> None:
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**known, **values}.items() if v is not None}))


CASES = [
    ("bert", "classification", "mean"),
    ("bert", "classification", "model"),
    ("roberta", "classification", "model"),
    ("gpt2", "classification", "model"),
    ("llama", "classification", "model"),
    ("llama", "classification", "mean"),
    ("gpt2", "generation", "model"),
    ("llama", "generation", "model"),
]


@pytest.mark.parametrize(("kind", "task", "pooling"), CASES)
def test_every_kind_loads_and_scores(folders, kind, task, pooling):
    data = tiny.CLASSIFY if task == "classification" else tiny.WRITE
    before = torch.get_rng_state()
    result = loaded(folders[kind], data, pooling)
    assert torch.equal(before, torch.get_rng_state())
    model = result.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    logits = support.dummy_logits(model)
    if task == "classification":
        assert torch.equal(logits, torch.zeros(2, 3)), "a new classifier starts at zero"
        assert {name.split(".")[0] for name in result.new_weights} == set(support.head_names(model))
        assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    else:
        assert logits.shape == (2, 8, tiny.VOCAB)
        assert result.new_weights == ()
    assert model.config.use_cache is False
    assert model.config.pad_token_id == result.tokenizer.pad_token_id == 0


@pytest.mark.parametrize(("kind", "task", "pooling"), CASES)
def test_dropout_is_off_unless_asked_for(folders, kind, task, pooling):
    data = tiny.CLASSIFY if task == "classification" else tiny.WRITE
    model = loaded(folders[kind], data, pooling).model.train()
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    batch = support.dummy_batch(model)
    tiny.perturb(model)
    first = model(**batch).logits
    assert torch.equal(first, model(**batch).logits), "training mode must be deterministic without dropout"
    kept = loaded(folders[kind], data, pooling, MethodSection(dropout=True)).model
    if kind != "llama":
        assert any(m.p > 0 for m in kept.modules() if isinstance(m, nn.Dropout))


def test_the_backbone_is_that_of_the_file(folders):
    stored = load_file(folders["bert"] / "model.safetensors")
    model = loaded(folders["bert"], tiny.CLASSIFY, "mean").model
    state = model.state_dict()
    assert {"classifier.weight", "classifier.bias"} == {k for k in state if not k.startswith("bert.")}
    for name, value in stored.items():
        if not name.startswith("pooler"):
            assert torch.equal(state[f"bert.{name}"], value)


def test_only_the_last_layer_of_a_head_is_zero_and_the_seed_draws_the_rest(folders):
    one, same, other = (loaded(folders["roberta"], tiny.CLASSIFY, seed=s).model.classifier for s in (1, 1, 2))
    assert not one.out_proj.weight.any()
    assert one.dense.weight.any()
    assert torch.equal(one.dense.weight, same.dense.weight)
    assert not torch.equal(one.dense.weight, other.dense.weight)


def test_a_trained_head_is_kept_only_for_the_same_classes(folders):
    kept = loaded(folders["bert_classifier"], tiny.CLASSIFY)
    assert kept.new_weights == ()
    assert kept.model.classifier.weight.any()
    for labels in (("good", "fair", "bad"), ("bad", "good"), ("a", "b", "c", "d")):
        data = tiny.CLASSIFY.model_copy(update={"labels": labels})
        new = loaded(folders["bert_classifier"], data)
        assert new.new_weights == ("classifier.bias", "classifier.weight")
        assert new.model.classifier.weight.shape[0] == len(labels)
        assert not new.model.classifier.weight.any()


def test_half_precision_files_are_trained_in_float32(folders, copied):
    folder = copied("llama")
    stored = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    model = loaded(folder, tiny.WRITE).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_loading_says_nothing_and_leaves_logging_as_it_was(folders, capsys, caplog):
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_info()
    try:
        with caplog.at_level(logging.INFO):
            loaded(folders["bert"], tiny.CLASSIFY)
        assert hf_logging.get_verbosity() == logging.INFO
    finally:
        hf_logging.set_verbosity(verbosity)
    assert hf_logging.is_progress_bar_enabled() == bars
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_pad_token_is_borrowed_from_end_of_text(tmp_path):
    result = loaded(tiny.save("gpt2", tmp_path / "gpt2", pad=False), tiny.WRITE)
    assert result.tokenizer.pad_token == "</s>"
    assert result.model.config.pad_token_id == result.model.generation_config.pad_token_id == 2
    assert result.model.get_input_embeddings().padding_idx is None


def test_nothing_to_pad_with(tmp_path):
    refused("SOT315", loaded, tiny.save("gpt2", tmp_path / "gpt2", pad=False, eos=False), tiny.WRITE)


def test_missing_or_damaged_tokenizer(copied):
    folder = copied("llama")
    (folder / "tokenizer.json").write_text("{}")
    refused("SOT313", loaded, folder, tiny.WRITE)


def test_tokenizer_larger_than_the_vocabulary(folders, tmp_path):
    from transformers import AutoTokenizer

    folder = tiny.save("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(str(folder))
    assert "101" in refused("SOT313", loaded, folder, tiny.WRITE).what


def test_missing_backbone_weights(copied):
    folder = copied("llama")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for data in (tiny.WRITE, tiny.CLASSIFY):
        assert "up_proj" in refused("SOT311", loaded, folder, data).what


@pytest.mark.parametrize(
    ("kind", "data", "pooling", "key"),
    [
        ("llama", tiny.WRITE, "model", "num_hidden_layers"),
        ("llama", tiny.CLASSIFY, "model", "num_hidden_layers"),
        ("gpt2", tiny.WRITE, "model", "n_layer"),
        ("bert", tiny.CLASSIFY, "model", "num_hidden_layers"),  # its names have no prefix
        ("bert_mlm", tiny.CLASSIFY, "mean", "num_hidden_layers"),  # and these one that the model has not
    ],
)
def test_layers_that_the_configuration_leaves_out(kind, data, pooling, key, copied):
    folder = copied(kind)
    loaded(folder, data, pooling)
    edit(folder / "config.json", **{key: 1})
    error = refused("SOT317", loaded, folder, data, pooling)
    assert ".1." in error.what
    assert "save_pretrained" in error.fix
    stored = {name: x for name, x in load_file(folder / "model.safetensors").items() if ".1." not in name}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    loaded(folder, data, pooling)


class Sharing(nn.Module):
    """Layers of which the second takes the keys of the first."""

    def __init__(self, **values: int):
        super().__init__()
        self.config = PreTrainedConfig(num_hidden_layers=2, **values)
        experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"key": nn.Linear(2, 2)}), nn.ModuleDict({"up": nn.Linear(2, 2), "experts": experts})]
        )


@pytest.mark.parametrize(
    ("key", "ahead", "left_out"),
    [
        ("layers.2.key.weight", 0, True),
        ("model.layers.2.key.weight", 0, True),
        ("layers.1.key.weight", 0, False),  # a layer that is there has no use for it
        ("layers.1.experts.2.weight", 0, True),
        ("layers.2.key.weight", 1, False),
        ("layers.3.key.weight", 1, True),
        ("layers.2.other.weight", 0, False),
        ("tower.2.key.weight", 0, False),
    ],
)
def test_only_whole_layers_are_left_out(folders, key, ahead, left_out):
    facts, report = inspect(folders["llama"]), {"unexpected_keys": {key}}
    network = Sharing(num_nextn_predict_layers=ahead)
    if left_out:
        assert key in refused("SOT317", load._refuse_layers_left_out, network, report, facts).what
    else:
        load._refuse_layers_left_out(network, report, facts)


def test_layers_that_predict_further_ahead_may_be_left_out(copied):
    folder = copied("llama")
    edit(folder / "config.json", num_hidden_layers=1, num_nextn_predict_layers=1)
    loaded(folder, tiny.WRITE)
    edit(folder / "config.json", num_nextn_predict_layers=0)
    refused("SOT317", loaded, folder, tiny.WRITE)


def test_wrong_shape_in_the_backbone(copied):
    folder = copied("llama")
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"] = torch.ones(33)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused("SOT311", loaded, folder, tiny.WRITE).what


def test_missing_pooler_is_explained(folders):
    error = refused("SOT311", loaded, folders["bert_mlm"], tiny.CLASSIFY)
    assert "model.pooling: mean" in error.fix
    assert loaded(folders["bert_mlm"], tiny.CLASSIFY, "mean").new_weights == ("classifier.bias", "classifier.weight")


def test_missing_language_model_head(folders):
    assert "language model" in refused("SOT311", loaded, folders["bert"], tiny.WRITE).fix


def test_encoder_cannot_write(folders):
    refused("SOT316", loaded, folders["bert_mlm"], tiny.WRITE)


def test_no_class_for_the_task(copied):
    folder = copied("bert")
    edit(folder / "config.json", model_type="vit")
    refused("SOT310", loaded, folder, tiny.CLASSIFY)
    refused("SOT310", loaded, folder, tiny.WRITE)


def test_config_that_describes_no_model(copied):
    folder = copied("bert")
    sound = (folder / "config.json").read_text()
    edit(folder / "config.json", hidden_size="wide")
    refused("SOT306", loaded, folder, tiny.CLASSIFY)
    for wrong in ({"hidden_size": 33}, {"num_attention_heads": 0}, {"vocab_size": 0}):
        (folder / "config.json").write_text(sound)
        edit(folder / "config.json", **wrong)
        refused("SOT314", loaded, folder, tiny.CLASSIFY)


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_batch_norm_is_refused_with_its_path():
    error = refused("SOT312", support.refuse_batch_norm, WithBatchNorm())
    assert "inner.1" in error.where
    support.refuse_batch_norm(nn.LayerNorm(2))


# Pooling


def test_masked_mean_ignores_padding_even_if_it_is_nan():
    hidden = torch.tensor([[[1.0], [3.0], [float("nan")]], [[5.0], [7.0], [9.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert masked_mean(hidden, mask).flatten().tolist() == [2.0, 7.0, 0.0]
    assert masked_mean(hidden.bfloat16(), mask).dtype == torch.float32
    assert masked_mean(hidden.double(), mask).dtype == torch.float64


def test_pooled_scores_do_not_depend_on_padding(folders):
    model = loaded(folders["bert"], tiny.CLASSIFY, "mean").model
    assert isinstance(model, MeanPooledClassifier)
    nn.init.normal_(model.classifier.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        short = model(input_ids=ids).logits
        long = model(input_ids=padded, attention_mask=mask, token_type_ids=torch.zeros_like(mask)).logits
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
    assert model(input_ids=ids, labels=torch.tensor([1])).loss.ndim == 0


def test_pooled_model_equals_backbone_and_linear_layer(folders):
    from transformers import AutoModel

    model = loaded(folders["bert"], tiny.CLASSIFY, "mean").model
    nn.init.normal_(model.classifier.weight)
    batch = support.dummy_batch(model)
    backbone = AutoModel.from_pretrained(folders["bert"], add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = backbone(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        expected = model.classifier((hidden * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(support.dummy_logits(model), expected, atol=1e-5, rtol=1e-5)


# Real models


def test_minilm_with_mean_pooling():
    result = loaded(tiny.minilm(), tiny.CLASSIFY, "mean")
    encoded = result.tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert result.model(**encoded).logits.shape == (2, 3)
    assert result.new_weights == ("classifier.bias", "classifier.weight")


def test_stories_predicts_text():
    result = loaded(tiny.stories(), tiny.WRITE)
    encoded = result.tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")
    ids = encoded["input_ids"]
    with torch.no_grad():
        loss = result.model(input_ids=ids, attention_mask=encoded["attention_mask"], labels=ids).loss
    assert loss < 3.0, "a pretrained model knows this sentence; random weights would give 6.2"
