"""Bad input gets an error in four parts and exit code 2; nothing is written and nothing is charged."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import nn
from transformers import BertForSequenceClassification

from sotto import cli
from sotto.config import Config
from sotto.errors import SottoError
from sotto.privacy.ledger import ledger_dir


class Shell:
    """Runs `sotto ...` in this process and looks at what it left."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        self._monkeypatch.setattr(sys, "argv", ["sotto", *map(str, arguments)])
        self._capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        self.out, self.err = self._capsys.readouterr()
        return code

    def refuses(self, *arguments: str | Path) -> str:
        """Runs a command that must be refused, and returns the message with its four parts checked."""
        assert self(*arguments) == 2, self.err
        assert "Traceback" not in self.err
        assert re.match(r"SOT\d{3}  \S", self.err), self.err
        for part in ("\n  where:   ", "\n  why:     ", "\n  do this: "):
            assert part in self.err, (part, self.err)
        assert self.out == ""
        runs = self.folder / "runs"
        assert not runs.is_dir() or not [*runs.iterdir()]
        ledgers = [*ledger_dir().glob("*.jsonl")] if ledger_dir().exists() else []
        assert not any(ledger.read_bytes() for ledger in ledgers)
        return self.err


@pytest.fixture
def sotto(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys, monkeypatch)


def where(message: str) -> str:
    return message.split("where:")[1].split("\n")[0].strip()


def line_of(path: Path, text: str) -> str:
    """`file:line` of the first line that starts with some text."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip().startswith(text):
            return f"{path}:{number}"
    raise AssertionError(text)


# ---- the data


def rewrite(path: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
    tiny_runs.write_csv(path, change(tiny_runs.rows()))


def test_a_missing_data_file(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    (tmp_path / "notes.csv").rename(tmp_path / "nodes.csv")
    message = sotto.refuses("train", config)
    assert message.startswith("SOT200")
    assert str(tmp_path / "notes.csv") in message


def test_a_missing_held_out_file_is_noticed_before_the_budget_is_spent(sotto: Shell, tmp_path: Path) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, data={"eval": str(tmp_path / "held_out.csv")}))
    assert message.startswith("SOT200")
    assert "held_out.csv" in message


@pytest.mark.parametrize(
    ("key", "wrong", "right"), [("text", "txet", "text"), ("label", "lable", "label")], ids=["text", "label"]
)
def test_a_wrong_column(sotto: Shell, tmp_path: Path, key: str, wrong: str, right: str) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, data={key: wrong}))
    assert f"'{wrong}'" in message
    assert f"Did you mean '{right}'?" in message or f"did you mean '{right}'?" in message


def test_a_wrong_unit_column(sotto: Shell, tmp_path: Path) -> None:
    assert "'whom'" in sotto.refuses("train", tiny_runs.write_yaml(tmp_path, privacy={"unit": "whom"}))


def test_one_class_in_the_data(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    rewrite(tmp_path / "notes.csv", lambda table: [{**row, "label": "good"} for row in table])
    message = sotto.refuses("train", config)
    assert message.startswith("SOT212")
    assert "'good'" in message


def test_one_class_in_the_configuration(sotto: Shell, tmp_path: Path) -> None:
    assert "one class" in sotto.refuses("train", tiny_runs.write_yaml(tmp_path, data={"labels": ["good"]}))


@pytest.mark.parametrize(
    "content", ["", "text,label,who,prompt,completion\n", "\n\n"], ids=["empty", "header", "blank"]
)
def test_empty_data(sotto: Shell, tmp_path: Path, content: str) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    (tmp_path / "notes.csv").write_text(content)
    assert str(tmp_path / "notes.csv") in where(sotto.refuses("train", config))


def test_only_empty_texts(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    rewrite(tmp_path / "notes.csv", lambda table: [{**row, "text": "  "} for row in table])
    assert sotto.refuses("train", config).startswith("SOT211")


def test_labels_that_the_configuration_does_not_know(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, data={"labels": ["Bad", "Fair", "Good"]})
    assert sotto.refuses("train", config).startswith("SOT211")


def test_bad_rows_when_they_shall_stop_the_run(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, data={"bad_rows": "stop"})
    rewrite(tmp_path / "notes.csv", lambda table: [{**row, "text": "" if i == 3 else row["text"]} for i, row in enumerate(table)])  # fmt: skip  # noqa: E501
    message = sotto.refuses("train", config)
    assert message.startswith("SOT210")
    assert "line 5" in message


def test_more_units_asked_than_are_declared(sotto: Shell, tmp_path: Path) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, run={"expected_batch_size": 61}))
    assert "(61)" in message
    assert "(60)" in message


def test_more_units_asked_than_are_found(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, run={"expected_batch_size": 50})
    rewrite(tmp_path / "notes.csv", lambda table: [row for row in table if row["who"] < tiny_runs.unit_name(40)])
    message = sotto.refuses("train", config)
    assert message.startswith("SOT213")
    assert "40 units" in message


# ---- the budget


@pytest.mark.parametrize("epsilon", ["0", "-1", ".nan", ".inf", "-.inf", "all", "true", "[1]", "null"])
def test_an_epsilon_that_is_none(sotto: Shell, tmp_path: Path, epsilon: str) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    config.write_text(config.read_text().replace("epsilon: 8.0", f"epsilon: {epsilon}"))
    message = sotto.refuses("train", config)
    assert "privacy.epsilon" in message.split("\n")[0]
    assert where(message).startswith(line_of(config, "epsilon:"))


@pytest.mark.parametrize("delta", ["0", "1", "-1e-5", ".nan"])
def test_a_delta_out_of_range(sotto: Shell, tmp_path: Path, delta: str) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path), "--set", f"privacy.delta={delta}")
    assert where(message) == "--set privacy.delta"


def test_a_delta_above_one_over_n_warns(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, privacy={"delta": 0.02}, run={"steps": 1})
    assert sotto("plan", config) == 0
    assert "WARNING" in sotto.out
    assert "1/60" in sotto.out
    assert sotto("train", config) == 0
    assert "not below 1/num_units" in sotto.err
    assert sotto("train", config, "--set", "privacy.delta=0.001") == 0
    assert "1/num_units" not in sotto.err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"privacy": {"num_units": 0}}, "privacy.num_units"),
        ({"privacy": {"max_examples_per_unit": 0}}, "privacy.max_examples_per_unit"),
        ({"privacy": {"unit": "record"}}, "max_examples_per_unit must be 1"),
        ({"run": {"steps": 0}}, "run.steps"),
        ({"run": {"epochs": 1}}, "exactly one of steps and epochs"),
        ({"run": {"learning_rate": -1.0}}, "run.learning_rate"),
        ({"run": {"device": "tpu"}}, "run.device"),
        ({"method": {"lora_init": "eva"}}, "method.lora_init"),
        ({"method": {"gradient": "fast"}}, "method.gradient"),
        ({"output": {"export": "adapter"}}, "adapter"),
    ],
)
def test_other_values_out_of_range(sotto: Shell, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    assert named in sotto.refuses("train", tiny_runs.write_yaml(tmp_path, **change)).split("\n")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there(sotto: Shell, tmp_path: Path) -> None:
    assert sotto.refuses("train", tiny_runs.write_yaml(tmp_path, run={"device": "cuda"})).startswith("SOT506")


# ---- the model


def test_an_unknown_model_class(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    facts = tmp_path / "model-bert" / "config.json"
    facts.write_text(facts.read_text().replace('"bert"', '"brainwave"'))
    assert "brainwave" in sotto.refuses("train", config)


def test_a_model_that_is_not_there(sotto: Shell, tmp_path: Path) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, model={"name": str(tmp_path / "no" / "model")}))
    assert message.startswith("SOT300")


@pytest.mark.parametrize("damage", ["truncated", "header", "not_safetensors"])
def test_corrupt_safetensors(sotto: Shell, tmp_path: Path, damage: str) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    weights = tmp_path / "model-bert" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "header":
        weights.write_bytes(content[:20] + b"\xff" + content[21:])
    else:
        weights.write_bytes(b"PK\x03\x04" + bytes(2000))
    assert "model.safetensors" in sotto.refuses("train", config)


def test_pickled_weights(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    folder = tmp_path / "model-bert"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = sotto.refuses("train", config)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_batch_norm(sotto: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BertForSequenceClassification.__init__

    def with_batch_norm(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.classifier = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))

    monkeypatch.setattr(BertForSequenceClassification, "__init__", with_batch_norm)
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path))
    assert message.startswith("SOT312")
    assert "classifier.0" in where(message)


def test_a_language_model_for_classes_and_the_other_way(sotto: Shell, tmp_path: Path) -> None:
    bert = tiny_runs.classification(tmp_path)["model"]
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, "completion", model=bert))
    assert re.match(r"SOT31\d", message)


def test_a_folder_without_a_tokenizer(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model-bert" / name).unlink()
    assert sotto.refuses("train", config).startswith("SOT313")


# ---- the output folder


def test_a_file_where_the_output_folder_should_be(sotto: Shell, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("I was here first")
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path))
    assert message.startswith("SOT503")
    assert (tmp_path / "runs").read_text() == "I was here first"


def test_a_read_only_output_folder(sotto: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert sotto.refuses("train", tiny_runs.write_yaml(tmp_path)).startswith("SOT503")
    finally:
        folder.chmod(0o700)


def test_a_folder_that_turns_out_not_to_be_writable(
    sotto: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    original = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert sotto.refuses("train", config).startswith("SOT503")
    assert not (tmp_path / "runs").exists()


# ---- the configuration file


def edited(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    return config


def test_an_unknown_key(sotto: Shell, tmp_path: Path) -> None:
    config = edited(tiny_runs.write_yaml(tmp_path), "epsilon: 8.0", "epsilom: 8.0")
    message = sotto.refuses("train", config)
    assert message.startswith("SOT105")
    assert "Did you mean 'epsilon'?" in message
    assert where(message) == f"{line_of(config, 'epsilom')} (privacy.epsilom)"


def test_a_key_in_the_wrong_section(sotto: Shell, tmp_path: Path) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path, privacy={"learning_rate": 0.1}))
    assert "belongs in the section 'run'" in message


def test_a_misspelt_section(sotto: Shell, tmp_path: Path) -> None:
    config = edited(tiny_runs.write_yaml(tmp_path), "\nprivacy:", "\nprivcy:")
    message = sotto.refuses("train", config)
    assert "Did you mean 'privacy'?" in message
    assert where(message).startswith(line_of(config, "privcy"))


@pytest.mark.parametrize(
    ("item", "code", "said"),
    [
        ("run.learning_rat=1", "SOT105", "Did you mean 'learning_rate'?"),
        ("runn.steps=1", "SOT105", "Did you mean 'run'?"),
        ("learning_rate=1", "SOT103", "section.key=value"),
        ("run.learning_rate", "SOT103", "section.key=value"),
        ("run.=1", "SOT103", "section.key=value"),
        ("run.learning_rate=fast", "SOT107", "run.learning_rate"),
        ("run.learning_rate=[", "SOT107", "run.learning_rate"),
    ],
)
def test_a_typo_on_the_command_line(sotto: Shell, tmp_path: Path, item: str, code: str, said: str) -> None:
    message = sotto.refuses("train", tiny_runs.write_yaml(tmp_path), "--set", item)
    assert message.startswith(code)
    assert said in message
    assert "--set" in message


def test_yaml_that_is_none(sotto: Shell, tmp_path: Path) -> None:
    config = edited(tiny_runs.write_yaml(tmp_path), "  epsilon: 8.0", "  epsilon: [8.0")
    message = sotto.refuses("train", config)
    assert message.startswith("SOT101")
    assert re.match(re.escape(str(config)) + r":\d+$", where(message))


@pytest.mark.parametrize(
    "content",
    ["", "# nothing\n", "just words", "- a\n- b\n", "model: !!python/object/apply:os.system ['true']\n",
     "a: &a\n  b: *a\n", "\x00", "model: {name: x}\n---\nmodel: {name: y}\n"],
    ids=["empty", "comment", "words", "list", "code", "endless", "nul", "two_documents"],
)  # fmt: skip
def test_files_that_are_no_configuration(sotto: Shell, tmp_path: Path, content: str) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(content)
    assert sotto.refuses("train", config).startswith("SOT101")


def test_a_configuration_cannot_run_code(sotto: Shell, tmp_path: Path) -> None:
    config, trace = tmp_path / "x.yaml", tmp_path / "it-ran"
    config.write_text(f"model: !!python/object/apply:os.mkdir ['{trace}']\n")
    assert sotto.refuses("train", config).startswith("SOT101")
    assert not trace.exists()


def test_a_file_in_another_encoding(sotto: Shell, tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_bytes("model: {name: Zürich}".encode("latin-1"))
    assert "UTF-8" in sotto.refuses("train", config)


def test_a_file_that_is_far_too_long(sotto: Shell, tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_bytes(b"#" * (1 << 21))
    assert "1 MiB" in sotto.refuses("train", config)


def test_a_duplicate_key(sotto: Shell, tmp_path: Path) -> None:
    config = edited(tiny_runs.write_yaml(tmp_path), "  epsilon: 8.0\n", "  epsilon: 8.0\n  epsilon: 800.0\n")
    message = sotto.refuses("train", config)
    assert message.startswith("SOT102")
    first = int(line_of(config, "epsilon").rpartition(":")[2])
    assert where(message) == f"{config}:{first + 1} (first on line {first})"


@pytest.mark.parametrize("key", ["unit", "epsilon", "num_units"])
def test_decisions_that_nobody_else_can_take(sotto: Shell, tmp_path: Path, key: str) -> None:
    config = tiny_runs.write_yaml(tmp_path, privacy={key: ...})
    message = sotto.refuses("train", config)
    assert message.startswith(f"SOT106  privacy.{key} is missing")
    assert where(message).startswith(line_of(config, "privacy:"))
    assert f"write {key}:" in message


def test_a_missing_section(sotto: Shell, tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("model:\n  name: x\n")
    assert "data is missing" in sotto.refuses("train", config)


def test_a_missing_configuration(sotto: Shell, tmp_path: Path) -> None:
    tiny_runs.write_yaml(tmp_path)
    message = sotto.refuses("train", tmp_path / "clasification.yaml")
    assert message.startswith("SOT100")
    assert "Did you mean 'classification.yaml'?" in message


def test_a_folder_for_a_configuration(sotto: Shell, tmp_path: Path) -> None:
    assert "directory" in sotto.refuses("train", tmp_path)


def test_an_environment_variable_that_is_not_set(sotto: Shell, tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path, data={"train": "${NO_SUCH_PLACE}/notes.csv"})
    message = sotto.refuses("train", config)
    assert message.startswith("SOT104")
    assert "export NO_SUCH_PLACE=" in message
    assert where(message).startswith(line_of(config, "train: ${"))


@pytest.mark.parametrize("command", ["plan", "check", "ledger"])
def test_the_other_commands_on_a_configuration_refuse_alike(sotto: Shell, tmp_path: Path, command: str) -> None:
    good = tiny_runs.write_yaml(tmp_path)
    assert sotto.refuses(command, tmp_path / "none.yaml").startswith("SOT100")
    assert sotto.refuses(command, good, "--set", "privacy.epsilon=0").startswith("SOT107")
    assert sotto.refuses(command, good, "--set", f"model.name={tmp_path}/none").startswith("SOT300")


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tran", "x.yaml"], "train"),
        (["train"], "CONFIG"),
        (["train", "a.yaml", "b.yaml"], "b.yaml"),
        (["train", "a.yaml", "--sett", "x"], "--set"),
        (["--verbose"], "--verbose"),
        (["generate", "runs/x"], "--prompt"),
        (["generate", "runs/x", "--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["evaluate", "runs/x", "--batch-size", "0"], "0"),
        (["init", "--model", "x"], "--data"),
        (["init", "--model", "x", "--data", "y", "--text", "t"], "--unit"),
        (["init", "--model", "x", "--data", "y", "--unit", "record"], "--text"),
        (["init", "--model", "x", "--data", "y", "--unit", "record", "--label", "l"], "text"),
        (["resume", "runs/none"], "no such folder"),
        (["resume", "."], "not a run folder"),
        (["show", "runs/none"], "no such folder"),
        (["show", "."], "not a run folder"),
        (["evaluate", "runs/none"], "no such folder"),
        (["export", "runs/none", "--to", "x"], "no such folder"),
        (["export", ".", "--to", "x", "--mode", "onnx"], "onnx"),
        (["export", ".", "--to", "x"], "not a run folder"),
        (["generate", ".", "--prompt", "x"], "model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_words_that_cannot_be_understood(sotto: Shell, arguments: list[str], said: str) -> None:
    assert said in sotto.refuses(*arguments)


def test_init_on_data_that_is_not_there_or_empty(sotto: Shell, tmp_path: Path) -> None:
    words = ("init", "--model", "m", "--text", "text", "--label", "label", "--unit", "who", "--data")
    assert sotto.refuses(*words, "none.csv").startswith("SOT200")
    (tmp_path / "x.csv").write_text("text,label,who\n")
    assert sotto.refuses(*words, "x.csv")
    (tmp_path / "x.csv").write_text("text,label,who\na,b,\nc,d, \n")
    assert sotto.refuses(*words, "x.csv").startswith("SOT211")
    (tmp_path / "x.csv").write_text("text,label,who\na,b,1\nc,b,2\n")
    assert "one class" in sotto.refuses(*words, "x.csv")
    tiny_runs.write_csv(tmp_path / "x.csv")
    assert "epsilon" in sotto.refuses(*words, "x.csv", "--epsilon", "0")
    assert "different values" in sotto.refuses(
        "init", "--model", "m", "--text", "who", "--label", "text", "--unit", "who", "--data", many_classes(tmp_path)
    )


def many_classes(folder: Path) -> Path:
    return tiny_runs.write_csv(folder / "y.csv", [{"who": f"p{i}", "text": f"t{i}"} for i in range(300)])


def test_a_run_on_a_batch_norm_model_in_ones_own_loop(tmp_path: Path) -> None:
    import sotto as package

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(SottoError) as caught:
        package.attach(model)
    assert caught.value.code == "SOT603"


def test_errors_in_python_are_the_same(tmp_path: Path) -> None:
    with pytest.raises(SottoError) as caught:
        Config.from_dict(tiny_runs.classification(tmp_path, privacy={"epsilon": -1.0}))
    error = caught.value
    assert (error.code, error.exit_code) == ("SOT107", 2)
    assert all((error.what, error.where, error.why, error.fix))
    assert "<python>" in error.where
