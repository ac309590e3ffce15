"""Finding a model and reading its facts: what is refused, and that no weights and no torch are needed for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import save_file

from sotto.errors import SottoError
from sotto.models import config_json, headers, source


def refused(code: str, call, *args) -> SottoError:
    with pytest.raises(SottoError) as caught:
        call(*args)
    error = caught.value
    assert error.code == code, error
    assert all((error.what, error.where, error.why, error.fix))
    return error


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny.save("bert", tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(file: Path, **values) -> None:
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**known, **values}.items() if v is not None}))


def raw(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


# Facts


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_facts_agree_with_the_model(kind, tmp_path):
    model = tiny.build(kind)
    facts = source.inspect(tiny.save(kind, tmp_path / kind))
    assert facts.name == kind
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.hidden_size, facts.num_layers, facts.num_heads) == (32, 2, 4)
    assert (facts.vocab_size, facts.max_positions) == (tiny.VOCAB, 64)
    assert facts.architectures == (type(model).__name__,)
    assert facts.tied_embeddings == bool(model.config.tie_word_embeddings)
    stored = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: t.shape for n, t in facts.tensors.items()} == stored


def test_facts_of_a_sharded_model(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    facts = source.inspect(tmp_path / "sharded")
    assert facts.parameters == model.num_parameters()


def test_tied_weight_stored_twice_counts_once(tmp_path, copied):
    word = torch.zeros(7, 4)
    tensors = {
        "model.embed_tokens.weight": word,
        "lm_head.weight": word.clone(),
        "ids": torch.zeros(3, dtype=torch.int64),
    }
    save_file(tensors, copied / "model.safetensors")
    assert source.inspect(copied).parameters == 28
    edit(copied / "config.json", tie_word_embeddings=False)
    assert source.inspect(copied).parameters == 56


def test_labels_are_read_in_the_order_of_their_ids(copied):
    edit(copied / "config.json", id2label={"1": "b", "0": "a"})
    assert source.inspect(copied).labels == ("a", "b")
    edit(copied / "config.json", id2label={"7": "b", "0": "a"})
    assert source.inspect(copied).labels == ()


def test_inspect_needs_neither_torch_nor_transformers(bert):
    code = f"""
import sys
from pathlib import Path
from sotto.models import source
source.inspect(source.resolve({str(bert)!r}))
print(sorted({{'torch', 'transformers', 'peft', 'safetensors'}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_facts_of_minilm():
    facts = source.inspect(tiny.minilm())
    assert (facts.model_type, facts.parameters, facts.hidden_size, facts.num_layers) == ("bert", 22713216, 384, 6)


def test_facts_of_stories():
    facts = source.inspect(tiny.stories())
    assert (facts.model_type, facts.parameters, facts.tied_embeddings) == ("llama", 260032, True)


# Finding


def test_resolve_takes_a_folder(bert):
    assert source.resolve(str(bert)) == bert.resolve()


@pytest.mark.parametrize("form", ["{parent}/tiny-brt", "./tiny-brt", "models/x/y", "~/no-such-model-here"])
def test_missing_folder(form, bert):
    error = refused("SOT300", source.resolve, form.format(parent=bert.parent))
    if form.startswith("{"):
        assert "Did you mean 'tiny-bert'?" in error.what


def test_a_file_is_not_a_folder(bert):
    assert str(bert) in refused("SOT300", source.resolve, str(bert / "config.json")).fix


def test_hub_name_offline_and_not_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--tiny-bert").mkdir()
    error = refused("SOT300", source.resolve, "org/tiny-brt", "abc")
    assert "org/tiny-bert" in error.what
    assert "abc" in error.what


def test_hub_name_not_reachable(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "not reachable" in refused("SOT300", source.resolve, "org/name").why


def test_download_asks_only_for_safe_files(monkeypatch, bert):
    asked = []

    def download(name, *, local_files_only=False, **options):
        asked.append((local_files_only, options))
        if local_files_only:
            raise FileNotFoundError("not cached")
        return str(bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.resolve("org/name", "c0ffee") == bert
    assert [local for local, _ in asked] == [True, False]
    assert asked[1][1]["revision"] == "c0ffee"
    allowed = asked[1][1]["allow_patterns"]
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in allowed)


def test_complete_cache_needs_no_network(monkeypatch, bert):
    def download(name, *, local_files_only=False, **options):
        assert local_files_only
        return str(bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.resolve("org/name") == bert


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/a/hub/models--org--m/snapshots/12ab", ("org/m", "12ab")),
        ("/home/a/my/model", ("model", None)),
        ("org/m", ("m", None)),
        ("", ("model", None)),
    ],
)
def test_public_name_is_never_a_path(path, name):
    assert source.public_name(path) == name


# Refusals


def test_no_config(copied):
    (copied / "config.json").unlink()
    refused("SOT301", source.inspect, copied)
    (copied / "adapter_config.json").write_text("{}")
    assert "adapter" in refused("SOT301", source.inspect, copied).what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights(copied, name):
    (copied / "model.safetensors").rename(copied / name)
    error = refused("SOT302", source.inspect, copied)
    assert name in error.what
    assert "safetensors" in error.fix


def test_no_weights(copied):
    (copied / "model.safetensors").unlink()
    refused("SOT303", source.inspect, copied)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1, -1000])
def test_truncated_weights(copied, keep):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("SOT304", source.inspect, copied)


@pytest.mark.parametrize("bit", [0, 3, 9, 23, 31, 47, 63])
def test_flipped_bit_in_the_header_length(copied, bit):
    file = copied / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(content)
    refused("SOT304", source.inspect, copied)


def test_trailing_bytes(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused("SOT304", source.inspect, copied)


def test_a_million_entries(tmp_path):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    file = raw(tmp_path / "many.safetensors", ("{" + ",".join(entry % i for i in range(10**6)) + "}").encode())
    assert "at most" in refused("SOT304", headers.read_header, file).what


def test_more_tensors_than_any_model_has(tmp_path):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    count = headers.MAX_TENSORS + 1
    file = raw(tmp_path / "many.safetensors", ("{" + ",".join(entry % i for i in range(count)) + "}").encode())
    assert file.stat().st_size < headers.MAX_HEADER_BYTES
    assert "50001 tensors" in refused("SOT304", headers.read_header, file).what


def f32(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": f32([1], [0, 4], dtype="OBJECT")},
        {"a": f32([1], [0, 4], dtype=["F32"])},
        {"a": f32([2], [0, 4])},
        {"a": f32([-1], [0, 4])},
        {"a": f32([True], [0, 4])},
        {"a": f32([1.0], [0, 4])},
        {"a": f32([2**62, 2**62], [0, 4])},
        {"a": f32([1], [4, 0])},
        {"a": f32([1], [0, 4, 8])},
        {"a": f32([1], [4, 8])},
        {"a": f32([2], [0, 8])},
        {"a": f32([1], [0, 4]), "b": f32([1], [0, 4])},
    ],
)
def test_damaged_headers(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    refused("SOT304", headers.read_header, raw(tmp_path / "x.safetensors", text, b"\0" * 4))


def test_sound_header_with_metadata(tmp_path):
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": f32([1], [0, 4])}).encode()
    found = headers.read_header(raw(tmp_path / "x.safetensors", text, b"\0" * 4))
    assert found == {"a": headers.TensorHeader("F32", (1,))}


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x.safetensors", "model.bin", 3])
def test_index_that_leads_elsewhere(copied, shard):
    (copied / "model.safetensors").unlink()
    (copied / source.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    refused("SOT304", source.inspect, copied)


def test_index_with_missing_shard_or_tensor(copied):
    (copied / "model.safetensors").rename(copied / "one.safetensors")
    (copied / source.INDEX).write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    refused("SOT304", source.inspect, copied)
    (copied / source.INDEX).write_text(json.dumps({"weight_map": {"no.such.tensor": "one.safetensors"}}))
    assert "no.such.tensor" in refused("SOT304", source.inspect, copied).what


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"attn_implementation": {"": {"nested": "evil/kernel"}}},
        {"_experts_implementation_internal": "evil/kernel:fn"},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoModel": "x.Y"}}},
    ],
)
def test_config_that_asks_for_code(copied, values):
    edit(copied / "config.json", **values)
    error = refused("SOT305", source.inspect, copied)
    assert next(iter(values)) in error.where


def test_tokenizer_that_asks_for_code(copied):
    edit(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    refused("SOT305", source.inspect, copied)


def test_underscore_keys_are_dropped(copied):
    strange = {
        "_attn_implementation": "sdpa",
        "_what": 1,
        "sub": {"_deep": 2, "kept": 3},
        "_name_or_path": "/home/ann/x",
    }
    edit(copied / "config.json", **strange)
    config = source.inspect(copied).config
    assert not any(key.startswith("_") for key in config)
    assert config["sub"] == {"kept": 3}


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_unreadable_config(copied, text):
    (copied / "config.json").write_text(text)
    refused("SOT306", source.inspect, copied)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"text_config": {"num_layers": 1e9}}, {"num_hidden_layers": -1}]
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_number_of_layers_that_no_model_has(copied, change, weights):
    edit(copied / "config.json", **change)
    refused("SOT306", lambda folder: source.inspect(folder, weights=weights), copied)


def test_oversized_config(copied):
    (copied / "config.json").write_text(" " * (config_json.MAX_JSON_BYTES + 1))
    refused("SOT306", source.inspect, copied)


def test_unknown_model_type(copied):
    edit(copied / "config.json", model_type="bertt")
    assert "Did you mean 'bert'?" in refused("SOT307", source.inspect, copied).what
    edit(copied / "config.json", model_type=None)
    refused("SOT307", source.inspect, copied)


def test_known_model_types_are_those_of_transformers():
    from transformers import CONFIG_MAPPING

    own = {"sotto_side", "sotto_reversible"}  # registered when their modules are imported; opened by sotto.load only
    assert set(CONFIG_MAPPING.keys()) - own <= config_json.known_model_types()


def test_quantised_checkpoint(copied):
    edit(copied / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused("SOT308", source.inspect, copied)
