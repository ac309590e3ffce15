"""The public functions, the Python twins of the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

import sotto
from sotto import commands
from sotto import session as sessions
from sotto.errors import SottoError


def test_importing_sotto_does_not_import_torch() -> None:
    code = "import sys, sotto; sotto.Config, sotto.train, sotto.ls('nowhere'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in sotto.__all__:
        assert getattr(sotto, name) is not None
    assert sotto.privacy.accounting.epsilon(noise_multiplier=1.0, sampling_prob=0.01, steps=10, delta=1e-5) > 0
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sotto.trian  # noqa: B018
    assert "train" in dir(sotto)


def test_functions_take_a_config_or_a_path(tmp_path: Path) -> None:
    path = tiny_runs.write_yaml(tmp_path)
    for given in (path, str(path), sotto.Config.load(path)):
        assert sotto.plan(given).steps == 4
    assert "_classification_" in sotto.train(path).path.name
    assert "_run_" in sotto.train(tiny_runs.config(tmp_path)).path.name
    assert "_mine_" in sotto.train(tiny_runs.config(tmp_path, output={"name": "mine"})).path.name


def test_plan_reads_neither_data_nor_weights(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path, data={"train": "nowhere.csv"})
    planned = sotto.plan(config)
    assert planned.planned_epsilon is not None
    assert planned.planned_epsilon <= 8
    assert planned.memory is not None
    assert planned.memory["total"] > 0
    assert [row.epsilon for row in planned.frontier()] == [1, 2, 4, 8]


FORMS: list[dict[str, Any]] = [
    {"method": {"train": "full"}},
    {"method": {"train": "lora"}},
    {"method": {"train": "lora"}, "output": {"export": "adapter"}},
    {"method": {"train": "lora"}, "model": {"pooling": "mean"}},
    {"method": {"train": "lora"}, "model": {"pooling": "mean"}, "output": {"export": "adapter"}},
    {"method": {"train": "head"}, "model": {"pooling": "mean"}},
]


@pytest.mark.parametrize("form", FORMS, ids=["full", "lora", "adapter", "pooled", "pooled_adapter", "pooled_head"])
def test_what_is_exported_can_be_loaded_and_scored(tmp_path: Path, form: dict[str, Any]) -> None:
    held_out = tiny_runs.write_csv(tmp_path / "held_out.csv", tiny_runs.rows(20, seed=9))
    done = sotto.train(tiny_runs.config(tmp_path, **form, data={"eval": str(held_out)}))
    scores = sotto.evaluate(done.path)
    from sotto.evaluation import score
    from sotto.models.load import load_tokenizer
    from sotto.rundir import RunDir

    live = score(done.model, load_tokenizer(done.path / "model"), RunDir.open(done.path).config())
    assert scores == pytest.approx(live, abs=1e-4)
    assert scores["examples"] == len(tiny_runs.rows(20, seed=9))
    assert 0 <= scores["accuracy"] <= 1
    assert sotto.evaluate(done.path, batch_size=3) == pytest.approx(scores, abs=1e-4)
    if form.get("output", {}).get("export") != "adapter":
        assert sum(1 for _ in sotto.load(done.path / "model").parameters())


def test_evaluation_of_a_language_model(tmp_path: Path) -> None:
    held_out = tiny_runs.write_jsonl(tmp_path / "held_out.jsonl", tiny_runs.rows(10, seed=9))
    done = sotto.train(tiny_runs.config(tmp_path, "completion"))
    scores = sotto.evaluate(done.path, str(held_out))
    assert set(scores) == {"nats_per_token", "perplexity", "examples", "tokens"}
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["nats_per_token"]).exp().item(), rel=1e-4)
    with pytest.raises(SottoError) as caught:
        sotto.evaluate(done.path)
    assert caught.value.code == "SOT520"


def test_export(tmp_path: Path) -> None:
    done = sotto.train(tiny_runs.config(tmp_path, method={"train": "lora"}))
    merged = sotto.export(done.path, tmp_path / "merged")
    adapter = sotto.export(done.path, tmp_path / "adapter", mode="adapter")
    assert (adapter / "adapter_config.json").exists()
    for folder in (merged, adapter):
        assert (done.statement or "?") in (folder / "README.md").read_text()
        assert json.loads((folder / "privacy.json").read_text())["private"] is True
    tiny_runs.assert_same(
        tiny_runs.final_weights(done.path), tiny_runs.load_file(merged / "model.safetensors"), tolerance=1e-6
    )
    for existing in (merged, done.path):
        with pytest.raises(SottoError) as caught:
            sotto.export(done.path, existing)
        assert caught.value.code == "SOT510"
    full = sotto.train(tiny_runs.config(tmp_path))
    with pytest.raises(SottoError) as caught:
        sotto.export(full.path, tmp_path / "x", mode="adapter")
    assert caught.value.code == "SOT511"
    assert not (tmp_path / "x").exists()


def test_a_run_without_an_export(tmp_path: Path) -> None:
    done = sotto.train(tiny_runs.config(tmp_path, output={"export": "none"}))
    assert not (done.path / "model").exists()
    with pytest.raises(SottoError) as caught:
        sotto.generate(done.path, "w1")
    assert caught.value.code == "SOT521"
    assert "sotto export" in caught.value.fix
    exported = sotto.export(done.path, tmp_path / "out")
    assert sotto.load(exported) is not None
    assert sotto.resume(done.path).finished


def test_unfinished_and_finished_runs_are_listed_and_shown(tmp_path: Path) -> None:
    session = sessions.start(tiny_runs.config(tmp_path), "x")
    session.stop_requested = True
    assert not commands.run_session(session, None).finished
    (listed,) = sotto.ls(tmp_path / "runs")
    assert listed == {
        "run": str(session.run.path), "state": "unfinished", "step": 1, "steps": 4, "epsilon": None, "delta": 1e-4,
        "private": True,
    }  # fmt: skip
    assert "sotto resume" in sotto.show(session.run.path)
    with pytest.raises(SottoError) as caught:
        sotto.export(session.run.path, tmp_path / "x")
    assert caught.value.code == "SOT509"
    with pytest.raises(SottoError) as caught:
        sotto.evaluate(session.run.path, str(tmp_path / "notes.csv"))
    assert caught.value.code == "SOT521"
    done = sotto.resume(session.run.path)
    (listed,) = sotto.ls(tmp_path / "runs")
    assert (listed["state"], listed["step"]) == ("finished", 4)
    assert listed["epsilon"] >= (done.epsilon or 9) - 1e-9
    assert sotto.show(done.path) == done.statement


def test_foreign_folders_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text('{"what": "somebody else\'s"}')
    (tmp_path / ".x.new" / "private").mkdir(parents=True)
    (tmp_path / ".x.new" / "plan.json").write_text("{")
    assert sotto.ls(tmp_path) == []
    assert sotto.ls(tmp_path / "absent") == []


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOTTO_LEDGER_DIR", str(folder / "ledger"))
        return sotto.train(tiny_runs.config(folder, "completion")).path


def test_generate(writer: Path) -> None:
    greedy = sotto.generate(writer, "w1 w2", max_new_tokens=8)
    assert greedy == sotto.generate(writer / "model", "w1 w2", max_new_tokens=8)
    assert len(greedy.split()) <= 8
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    samples = {sotto.generate(writer, "w1", max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2, 3)}
    assert len(samples) == 3
    assert torch.equal(torch.rand(1), expected), "the caller's random state is left alone"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"prompt": ""}, "SOT524"),
        ({"prompt": "w1 " * 64}, "SOT524"),
        ({"prompt": "w1", "temperature": -1.0}, "SOT523"),
        ({"prompt": "w1", "temperature": float("nan")}, "SOT523"),
    ],
)
def test_what_cannot_be_continued(writer: Path, arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(SottoError) as caught:
        sotto.generate(writer, **arguments)
    assert caught.value.code == code


def test_text_ends_where_the_model_does(writer: Path) -> None:
    assert len(sotto.generate(writer, "w1 " * 60, max_new_tokens=50).split()) <= 4


def test_a_classifier_does_not_write(tmp_path: Path) -> None:
    done = sotto.train(tiny_runs.config(tmp_path))
    with pytest.raises(SottoError) as caught:
        sotto.generate(done.path, "w1")
    assert caught.value.code == "SOT522"


def test_check_counts_and_names_no_text(tmp_path: Path) -> None:
    report = sotto.check(tiny_runs.config(tmp_path))
    assert report.units == 60
    assert tiny_runs.CANARY not in report.render() + json.dumps(report.to_dict())


def test_a_run_that_will_not_go_on_can_be_closed(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path)
    session = sessions.start(config, "abandoned")
    session.held.close()
    assert sotto.ledger(config)["runs"][0]["state"] == "open"
    assert sotto.ledger(config, close=session.run.id)["runs"][0]["state"] == "closed"
    with pytest.raises(SottoError, match="SOT413"):
        sotto.ledger(config, close="nobody")


def test_the_ledger_of_a_dataset(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path)
    assert sotto.ledger(config)["runs"] == []
    with pytest.raises(SottoError) as caught:
        sotto.ledger(config, delta=1e-6)
    assert caught.value.code == "SOT401"
    assert sotto.ledger(config, epsilon=5.0)["budget"] == (5.0, config.privacy.delta)
    replaced = tiny_runs.config(tmp_path, privacy={"neighboring_relation": "replace_one"})
    assert sotto.ledger(replaced, epsilon=6.0, delta=1e-6)["budget_relation"] == "replace_one"


def test_doctor() -> None:
    assert {name for name, passed, _ in sotto.doctor() if passed} >= {"torch", "noise", "ledger", "network"}
