"""Export: what is written gives the same scores, names no path of this machine, and leaves the live model as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sotto.config import MethodSection, ModelSection
from sotto.errors import SottoError
from sotto.models import export as export_module
from sotto.models import load, source, support, trainable
from sotto.models.export import export, load_exported, merged_state
from sotto.models.pooling import MeanPooledClassifier


def refused(code: str, call, *args, **kwargs) -> SottoError:
    with pytest.raises(SottoError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert error.code == code, error
    assert all((error.what, error.where, error.why, error.fix))
    return error


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("secret-project")
    return {kind: tiny.save(kind, root / f"tiny-{kind}") for kind in ["bert", "roberta", "gpt2", "llama"]}


@pytest.fixture
def trained(folders):
    """A model of a kind after something like training, and its tokenizer."""

    def build(kind: str, pooling: str, task: str, train: str = "lora", **method):
        data = tiny.CLASSIFY if task == "classification" else tiny.WRITE
        section = ModelSection(name=str(folders[kind]), pooling=pooling)  # type: ignore[arg-type]
        chosen = MethodSection(train=train, **method)  # type: ignore[arg-type]
        result = load.load_model(section, data, chosen, 0)
        model = trainable.prepare(result.model, chosen)
        tiny.perturb(model)
        return model.train(), result.tokenizer

    return build


def snapshot(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


KINDS = [
    ("bert", "mean", "classification"),
    ("bert", "model", "classification"),
    ("roberta", "model", "classification"),
    ("gpt2", "model", "classification"),
    ("llama", "model", "classification"),
    ("gpt2", "model", "generation"),
    ("llama", "model", "generation"),
]


@pytest.mark.parametrize(("kind", "pooling", "task"), KINDS)
@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_export_and_reload(trained, folders, tmp_path, kind, pooling, task, mode):
    model, tokenizer = trained(kind, pooling, task)
    bits, modes = snapshot(model), [m.training for m in model.modules()]
    scores = support.dummy_logits(model)
    out = tmp_path / "run" / "model"
    export(model, tokenizer, out, mode, {"epsilon": 3.0})

    assert snapshot(model) == bits, "the live model must be bit for bit as before"
    assert [m.training for m in model.modules()] == modes
    assert os.listdir(out.parent) == ["model"], "no temporary folder may stay"
    again = load_exported(out, base=folders[kind] if mode == "adapter" else None)
    assert not again.training
    close(support.dummy_logits(again), scores)
    assert len(AutoTokenizer.from_pretrained(str(out))) == tiny.VOCAB

    note = json.loads((out / "sotto.json").read_text()) if mode == "adapter" else source.inspect(out).sotto
    assert note["epsilon"] == 3.0
    allowed = {".safetensors", ".json", ".txt", ".jinja"}
    for file in out.rglob("*"):
        assert file.suffix in allowed
        content = file.read_bytes()
        for path in (tmp_path, folders[kind].parent, Path.home(), Path.cwd()):
            assert len(path.parts) < 2 or str(path).encode() + b"/" not in content, f"{file.name} names {path}"
        assert b"secret-project" not in content


@pytest.mark.parametrize("train", ["full", "bitfit", "head"])
def test_export_of_models_without_adapters(trained, tmp_path, train):
    model, tokenizer = trained("bert", "mean", "classification", train)
    export(model, tokenizer, tmp_path / "out", "merged")
    again = load_exported(tmp_path / "out")
    assert isinstance(again, MeanPooledClassifier)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "SOT330" in str(refused("SOT330", export, model, tokenizer, tmp_path / "no", "adapter"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", [{"lora_layers": (1,)}, {"lora_init": "orthogonal"}, {"lora_targets": ("c_proj",)}])
def test_adapter_variants(trained, folders, tmp_path, method):
    model, tokenizer = trained("gpt2", "model", "generation", **method)
    for mode in ("merged", "adapter"):
        export(model, tokenizer, tmp_path / mode, mode)
    close(support.dummy_logits(load_exported(tmp_path / "merged")), support.dummy_logits(model))


def test_merged_folder_opens_in_plain_transformers(trained, tmp_path):
    writer, tokenizer = trained("llama", "model", "generation")
    export(writer, tokenizer, tmp_path / "writer", "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "writer")
    close(support.dummy_logits(plain), support.dummy_logits(writer))
    assert plain.config.use_cache
    assert (tmp_path / "writer" / "generation_config.json").is_file()
    assert "lm_head.weight" not in load_file(tmp_path / "writer" / "model.safetensors"), "tied weights are stored once"

    judge, tokenizer = trained("roberta", "model", "classification")
    export(judge, tokenizer, tmp_path / "judge", "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    close(support.dummy_logits(plain), support.dummy_logits(judge))
    assert plain.config.id2label == {0: "bad", 1: "fair", 2: "good"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 with transformers 5.23
def test_adapter_opens_in_plain_peft(trained, folders, tmp_path):
    model, tokenizer = trained("gpt2", "model", "generation")
    export(model, tokenizer, tmp_path / "adapter", "adapter")
    base = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    close(support.dummy_logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), support.dummy_logits(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-gpt2"
    assert config["modules_to_save"] in (None, [])


def test_hub_models_are_named_as_on_the_hub(folders, tmp_path):
    cache = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123abcd"
    cache.parent.mkdir(parents=True)
    cache.symlink_to(folders["gpt2"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(cache), AutoTokenizer.from_pretrained(str(cache))
    model.config._name_or_path = str(cache)
    wrapped = trainable.prepare(model, MethodSection())
    export(wrapped, tokenizer, tmp_path / "out", "adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", "0123abcd")


def test_the_same_adapter_gives_the_same_bytes(trained, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification")
    for name in ("one", "two"):
        export(model, tokenizer, tmp_path / name, "adapter")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_exported_model_can_be_trained_on(trained, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification")
    export(model, tokenizer, tmp_path / "first", "merged")
    section = ModelSection(name=str(tmp_path / "first"), pooling="mean")
    again = load.load_model(section, tiny.CLASSIFY, MethodSection(), 0)
    assert again.new_weights == ()
    close(support.dummy_logits(again.model), support.dummy_logits(model))


def test_hooks_and_gradients_of_the_live_model_do_not_matter(trained, tmp_path):
    model, tokenizer = trained("llama", "model", "generation")
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(1))
    model(**support.dummy_batch(model)).logits.sum().backward()
    export(model, tokenizer, tmp_path / "out", "merged")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_weights_that_are_not_numbers_are_exported_as_they_are(trained, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification", "head")
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    export(model, tokenizer, tmp_path / "out", "merged")
    assert support.dummy_logits(load_exported(tmp_path / "out")).isnan().all()


# Atomicity


def test_an_earlier_export_is_replaced_and_other_folders_are_not(trained, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification")
    for mode in ("merged", "adapter"):
        export(model, tokenizer, tmp_path / "out", mode)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refused("SOT332", export, model, tokenizer, tmp_path / "mine", "merged")
    (tmp_path / "file").write_text("x")
    refused("SOT332", export, model, tokenizer, tmp_path / "file", "merged")
    refused("SOT332", export, model, tokenizer, tmp_path / "file" / "below", "merged")
    assert sorted(os.listdir(tmp_path)) == ["file", "mine", "out"]


def test_a_difference_after_reading_back_is_an_error_and_nothing_stays(trained, tmp_path, monkeypatch):
    model, tokenizer = trained("bert", "mean", "classification")

    def damaged(live):
        state = merged_state(live)
        state["classifier.bias"] = state["classifier.bias"] + 1e-3
        return state

    export(model, tokenizer, tmp_path / "out", "merged")
    good = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export_module, "merged_state", damaged)
    for folder in (tmp_path / "out", tmp_path / "new"):
        refused("SOT331", export, model, tokenizer, folder, "merged")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == good


def test_a_crash_leaves_no_folder(trained, tmp_path, monkeypatch):
    model, tokenizer = trained("bert", "mean", "classification")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", full)
    for mode in ("merged", "adapter"):
        with pytest.raises(OSError, match="No space"):
            export(model, tokenizer, tmp_path / "out", mode)
    assert os.listdir(tmp_path) == []


def test_a_local_path_in_a_file_is_refused(trained, folders, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification")
    tokenizer.init_kwargs["remembered"] = str(folders["bert"])
    error = refused("SOT333", export, model, tokenizer, tmp_path / "out", "merged")
    assert "tokenizer_config.json" in error.what
    assert os.listdir(tmp_path) == []


# Opening what came from elsewhere


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    model, tokenizer = trained("gpt2", "model", "generation")
    export(model, tokenizer, tmp_path / "adapter", "adapter")
    return tmp_path / "adapter"


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_adapter_without_its_base(adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "base=" in refused("SOT335", load_exported, adapter).fix


def test_adapter_finds_a_base_of_its_name(adapter, folders, monkeypatch):
    monkeypatch.chdir(folders["gpt2"].parent)
    assert isinstance(load_exported(adapter), PeftModel)


def test_adapter_on_the_wrong_base(adapter, folders, tmp_path):
    refused("SOT334", load_exported, adapter, base=folders["llama"])
    other = tiny.build("gpt2")
    tiny.perturb(other)
    other.save_pretrained(tmp_path / "other")
    assert "other weights" in refused("SOT334", load_exported, adapter, base=tmp_path / "other").what


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"megatron_config": {"x": 1}, "megatron_core": "evil"},
        {"bias": "all"},
        {"lora_bias": True},
        {"r": 3},
        {"r": "many"},
        {"target_modules": ["nothing"]},
    ],
)
def test_adapter_configurations_that_are_refused(adapter, folders, values):
    edit(adapter / "adapter_config.json", **values)
    refused("SOT334", load_exported, adapter, base=folders["gpt2"])


def test_adapter_initialisations_in_a_file_are_not_followed(adapter, folders):
    scores = support.dummy_logits(load_exported(adapter, base=folders["gpt2"]))
    edit(adapter / "adapter_config.json", init_lora_weights="pissa", auto_mapping={"parent_library": "evil"})
    close(support.dummy_logits(load_exported(adapter, base=folders["gpt2"])), scores)


def test_adapter_with_pickled_cut_or_missing_weights(adapter, folders):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    refused("SOT304", load_exported, adapter, base=folders["gpt2"])
    file.write_bytes(whole)
    stored = load_file(file)
    stored.popitem()
    save_file(stored, file)
    refused("SOT334", load_exported, adapter, base=folders["gpt2"])
    file.rename(adapter / "adapter_model.bin")
    refused("SOT334", load_exported, adapter, base=folders["gpt2"])


def test_classification_adapter_without_its_note(trained, folders, tmp_path):
    model, tokenizer = trained("bert", "mean", "classification")
    export(model, tokenizer, tmp_path / "out", "adapter")
    edit(tmp_path / "out" / "sotto.json", labels=[])
    refused("SOT334", load_exported, tmp_path / "out", base=folders["bert"])


def test_folders_that_are_no_exports(folders, trained, tmp_path):
    refused("SOT334", load_exported, folders["bert"])
    refused("SOT300", load_exported, tmp_path / "nothing")
    model, tokenizer = trained("bert", "mean", "classification")
    export(model, tokenizer, tmp_path / "out", "merged")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    del stored["classifier.bias"]
    save_file(stored, tmp_path / "out" / "model.safetensors")
    assert "classifier" in refused("SOT334", load_exported, tmp_path / "out").what


# Real models


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_minilm(tmp_path, mode):
    folder = tiny.minilm()
    result = load.load_model(ModelSection(name=str(folder), pooling="mean"), tiny.CLASSIFY, MethodSection(), 0)
    model = trainable.prepare(result.model, MethodSection())
    tiny.perturb(model, 0.02)
    export(model, result.tokenizer, tmp_path / "out", mode)
    again = load_exported(tmp_path / "out", base=folder if mode == "adapter" else None)
    text = AutoTokenizer.from_pretrained(str(tmp_path / "out"))(
        ["a fine film", "dull"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        close(again(**text).logits, model.eval()(**text).logits)


def test_stories_writes_the_same_text(tmp_path):
    result = load.load_model(ModelSection(name=str(tiny.stories())), tiny.WRITE, MethodSection(), 0)
    model = trainable.prepare(result.model, MethodSection())
    export(model, result.tokenizer, tmp_path / "out", "merged")
    again = load_exported(tmp_path / "out")
    prompt = result.tokenizer("Once upon a time", return_tensors="pt")
    inputs = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}
    texts = [m.generate(**inputs, max_new_tokens=12, do_sample=False).tolist() for m in (again, model.eval())]
    assert texts[0] == texts[1]
