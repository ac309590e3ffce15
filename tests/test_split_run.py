"""Both sides in one process: a tiny model, invented people, every privatizer, and crashes in the middle."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

import sotto
from sotto import cli, config_file
from sotto.config import Config
from sotto.data.load import load_dataset_for
from sotto.errors import SottoError
from sotto.privacy.plan import Plan
from sotto.reporting import plan_text
from sotto.rundir import RunDir
from sotto.split import simulate as module
from sotto.split.answers import HEAD
from sotto.split.cache import Inbox
from sotto.split.customer import Customer, load_bottom
from sotto.split.labels import LabelKeeper
from sotto.split.simulate import label_keeper, simulate
from sotto.split.vendor import Vendor, passes

NONE = {"privatizer": "none", "layer": 1}


def config(folder: Path, setting: dict[str, Any] | None = None, **changes: dict[str, Any]) -> Config:
    values = tiny_runs.classification(
        folder,
        privacy={"unit": "record", "num_units": 180, "epsilon": "none", "delta": ..., "max_examples_per_unit": ...},
        method={"train": "lora"},
        run={"expected_batch_size": 20, "steps": ..., "epochs": 2, "learning_rate": 0.01, "microbatch_size": ...},
        data={"eval": str(folder / "notes.csv")},
        setting={"kind": "split", "chunk_examples": 50, **(setting or NONE)},
    )
    return Config.from_dict(tiny_runs.merge(values, changes))


@pytest.mark.parametrize(
    "setting",
    [
        NONE,
        {"privatizer": "dx_tokens", "eta": 50.0},
        {"privatizer": "dx_hidden", "eta": 300.0, "layer": 1, "labels": "randomised", "label_epsilon": 3.0},
        {"privatizer": "dx_pooled", "segment": 3, "eta": 300.0, "layer": 1},
        {"privatizer": "dx_hidden", "eta": 300.0, "exempt": "selected", "exempt_epsilon": 4.0, "exempt_share": 0.05},
        {"privatizer": "gaussian", "epsilon": 8.0, "layer": 1},
        {"privatizer": "gaussian_pooled", "epsilon": 8.0, "layer": 2, "labels": "kept", "label_epsilon": 4.0},
    ],
    ids=lambda s: s["privatizer"] + s.get("labels", "") + s.get("exempt", ""),
)
def test_every_privatizer_runs_from_text_to_statement(tmp_path: Path, setting: dict) -> None:
    method = {"train": "head"} if setting.get("layer") == 2 else {"train": "lora"}
    run = simulate(config(tmp_path, setting, method=method))
    assert run.accuracy is not None
    assert 0.0 <= run.accuracy <= 1.0
    facts = json.loads((run.path / "privacy.json").read_text())
    kinds = {"none": "none", "dx": "metric", "gaussian": "local differential privacy"}
    assert facts["kind_of_privacy"] == kinds[setting["privatizer"].split("_")[0]]
    assert facts["private"] == (setting["privatizer"] != "none")
    assert ("epsilon" in facts) == setting["privatizer"].startswith("gaussian"), "metric privacy has no epsilon"
    assert facts["examples"] == run.customer.outbox.manifest.examples  # type: ignore[union-attr]
    assert (run.path / "statement.txt").read_text() == run.statement
    for file in (run.path / "private").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


def test_learning_works_where_nothing_is_hidden(tmp_path: Path) -> None:
    changes = {"method": {"train": "full"}, "run": {"epochs": 25, "learning_rate": 0.003}}
    assert (simulate(config(tmp_path, **changes)).accuracy or 0) > 0.9
    blind = simulate(config(tmp_path, {"privatizer": "dx_hidden", "eta": 0.5, "layer": 1}, **changes))
    assert (blind.accuracy or 0) < 0.6, "noise of 60 times the signal leaves nothing to learn from"


def test_segments_are_trained_on_and_asked_about_alike(tmp_path: Path) -> None:
    setting = {"privatizer": "dx_pooled", "segment": 2, "eta": 1e6, "layer": 1}
    changes = {"method": {"train": "full"}, "run": {"epochs": 25, "learning_rate": 0.003}}
    run = simulate(config(tmp_path, setting, **changes))
    assert (run.accuracy or 0) > 0.9, "a query that left in other pieces would not be understood"
    sent = Inbox(run.path / "private" / "inbox", run.customer.outbox.manifest).open_all()  # type: ignore[union-attr]
    lengths = np.diff(run.customer.data.examples.offsets)
    assert sent.lengths_E.tolist() == np.maximum(1, lengths // 2).tolist()
    asked = run.customer.query(run.customer.data.examples, np.arange(5))
    assert asked.lengths_E.tolist() == sent.lengths_E[:5].tolist()
    assert "segment of 2 tokens" in " ".join(run.statement.split())


def test_what_leaves_is_the_bottoms_output_and_nothing_else(tmp_path: Path) -> None:
    made = config(tmp_path)
    run = simulate(made)
    bottom, tokenizer = load_bottom(made)
    examples = load_dataset_for(made, tokenizer, "train").examples
    assert run.customer.outbox is not None
    inbox = Inbox(run.path / "private" / "inbox", run.customer.outbox.manifest)
    sent = inbox.open_all()
    assert len(sent) == len(examples) > 150
    for e in (0, 17, len(examples) - 1):
        batch = examples.collate(np.array([e]), 0)
        hidden = bottom.hidden(batch)[0]
        assert torch.allclose(torch.from_numpy(sent.rows(e).astype(np.float32)), hidden, atol=2e-3)
    assert examples.labels is not None
    assert sent.labels_E is not None
    assert sent.labels_E.tolist() == examples.labels.tolist()
    stored = b"".join(f.read_bytes() for f in (run.path / "private").rglob("*") if f.is_file())
    assert tiny_runs.CANARY.encode() not in stored
    ids = examples.input_ids[:20].astype("<i4").tobytes()
    assert ids[:12] not in b"".join(f.read_bytes() for f in (run.path / "private" / "inbox").iterdir())


def test_the_upload_is_little_more_than_the_tensors(tmp_path: Path) -> None:
    manifest = simulate(config(tmp_path)).customer.outbox.manifest  # type: ignore[union-attr]
    agreed = manifest.agreement
    tensors = manifest.rows * agreed.width * 2
    # 8 bytes an example: a twentieth of a row of real width 384; here a row has 64 bytes.
    assert sum(agreed.piece_bytes(p.examples, p.rows) for p in manifest.pieces) == tensors + 8 * manifest.examples


def test_a_finished_outbox_is_sent_again_as_it_is(tmp_path: Path) -> None:
    made = config(tmp_path, {"privatizer": "dx_hidden", "eta": 30.0, "layer": 1})
    run = simulate(made)
    folder = run.path / "private" / "outbox"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    again = simulate(made, path=run.path)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert again.vendor.step == run.vendor.step
    with pytest.raises(SottoError) as caught:
        simulate(config(tmp_path, {"privatizer": "dx_hidden", "eta": 31.0, "layer": 1}), path=run.path)
    assert caught.value.code == "SOT822"


@pytest.mark.parametrize("where", ["prepare", "upload", "training"])
def test_a_crash_of_either_side_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    noise = {"run": {"debug_noise_seed": 3, "checkpoint_every": 1}}
    made = config(tmp_path, {"privatizer": "dx_hidden", "eta": 30.0, "layer": 1}, **noise)
    whole = simulate(made)
    owner, name, count = {
        "prepare": (Customer, "_piece", 2),
        "upload": (Inbox, "accept", 2),
        "training": (Vendor, "_one", 5),
    }[where]
    original, calls = getattr(owner, name), iter(range(1000))

    def crash(*arguments: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(owner, name, crash)
    path = tmp_path / "runs" / "broken"
    monkeypatch.setattr(module.RunDir, "planned", lambda config, stem: RunDir(path))
    with pytest.raises(KeyboardInterrupt):
        simulate(made)
    monkeypatch.undo()
    later = simulate(made, path=path)
    tiny_runs.assert_same(dict(later.vendor.top.state_dict()), dict(whole.vendor.top.state_dict()))
    assert later.accuracy == whole.accuracy
    assert later.statement.startswith("NOT PRIVATE: run.debug_noise_seed")


def test_kept_labels_are_answered_once_a_pass_and_paid_for(tmp_path: Path) -> None:
    setting = {"privatizer": "none", "layer": 1, "labels": "kept", "label_epsilon": 5.0}
    made = config(tmp_path, setting)
    run = simulate(made)
    count = run.customer.outbox.manifest.examples  # type: ignore[union-attr]
    keeper = label_keeper(made, run.customer)
    assert keeper.uses == passes(made, count) == -(-made.steps // (count // 20))
    used = np.zeros(count, dtype=int)
    run.vendor.step = 0
    for _, chosen in run.vendor._batches(count):
        used[chosen] += 1
    assert used.max() == keeper.uses, "exactly what is paid for, and not one more"
    assert "over all epochs: epsilon 5" in " ".join(run.statement.split())


def test_a_resumed_simulation_counts_the_answers_that_it_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, {"privatizer": "none", "layer": 1, "labels": "kept", "label_epsilon": 5.0})
    path, count, original = tmp_path / "runs" / "broken", iter(range(1000)), Vendor._save
    monkeypatch.setattr(module.RunDir, "planned", lambda config, stem: RunDir(path))

    def crash(self: Vendor, folder: Path) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt  # after the answer, before the step is kept
        original(self, folder)

    monkeypatch.setattr(Vendor, "_save", crash)
    with pytest.raises(KeyboardInterrupt):
        simulate(made)
    monkeypatch.undo()
    answers = path / "private" / "answers.bin"
    before = answers.read_bytes()
    run = simulate(made, path=path)
    assert answers.read_bytes().startswith(before)
    one = 32 + 4 + 20 * 4 * (1 + 3)  # the question's hash, and 20 examples with three numbers each
    assert len(answers.read_bytes()) == HEAD.size + run.vendor.step * one, "a step done again got the answer it had"


def test_labels_that_are_kept_never_reach_the_vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = {"privatizer": "none", "layer": 1, "labels": "kept", "label_epsilon": 5.0}
    seen: list[torch.Tensor] = []
    original = LabelKeeper.answer

    def watch(self: LabelKeeper, examples: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(original(self, examples, scores))
        return seen[-1]

    monkeypatch.setattr(LabelKeeper, "answer", watch)
    run = simulate(config(tmp_path, setting))
    sent = Inbox(run.path / "private" / "inbox", run.customer.outbox.manifest).open_all()  # type: ignore[union-attr]
    assert sent.labels_E is None
    assert len(seen) == run.vendor.step
    with pytest.raises(SottoError) as caught:
        run.vendor.train(sent)
    assert caught.value.code == "SOT825"


def test_the_vendor_needs_no_more_memory_than_the_top(tmp_path: Path) -> None:
    vendor = Vendor(config(tmp_path))
    held = sum(p.numel() for p in vendor.top.parameters())
    bottom, _ = load_bottom(config(tmp_path))
    below = sum(p.numel() for p in bottom.tensors().values())
    whole = sum(p.numel() for p in bottom.model.parameters()) + held
    assert held < whole - below + 64 * 32 + 200, "beyond the top: positions and a norm, which make place for the rows"


def test_a_private_choice_of_words_is_made_once(tmp_path: Path) -> None:
    setting = {"privatizer": "dx_tokens", "eta": 5.0, "exempt": "selected", "exempt_epsilon": 9.0, "exempt_share": 0.1}
    made = config(tmp_path, setting)
    bottom, tokenizer = load_bottom(made)
    chosen = []
    for _ in range(3):
        customer = Customer(made, bottom, tokenizer, module.SecureNoise())
        customer.prepare(tmp_path / "outbox")
        chosen.append(customer.exempt_V)
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    note = (tmp_path / "outbox.choice.json").read_bytes()
    tiny_runs.write_csv(tmp_path / "notes.csv", tiny_runs.rows(seed=4))
    with pytest.raises(SottoError) as caught:
        Customer(made, bottom, tokenizer, module.SecureNoise()).prepare(tmp_path / "outbox")
    assert caught.value.code == "SOT822"
    assert (tmp_path / "outbox.choice.json").read_bytes() == note, (
        "other data does not make a second choice in its place"
    )
    words = customer.facts().exempt
    assert set(words) <= set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)


def test_a_public_list_of_words_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("w40\nw41\nw42\n\n")
    setting = {"privatizer": "dx_tokens", "eta": 0.5, "exempt": "list", "exempt_file": str(tmp_path / "words.txt")}
    run = simulate(config(tmp_path, setting))
    assert set(run.facts["exempt"]) == {"w40", "w41", "w42"}
    exempt = run.customer.exempt_V
    sent = Inbox(run.path / "private" / "inbox", run.customer.outbox.manifest).open_all()  # type: ignore[union-attr]
    examples = run.customer.data.examples
    before = torch.from_numpy(examples.input_ids.astype(np.int64))
    after = torch.from_numpy(np.concatenate([sent.rows(e) for e in range(len(sent))]).astype(np.int64))
    assert torch.equal(exempt[before], exempt[after])
    assert torch.equal(before[exempt[before]], after[exempt[before]])
    assert float((before != after)[~exempt[before]].double().mean()) > 0.5
    missing = setting | {"exempt_file": str(tmp_path / "none.txt")}
    with pytest.raises(SottoError) as caught:
        simulate(config(tmp_path, missing))
    assert caught.value.code == "SOT803"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"setting": {**NONE, "layer": 3}}, "SOT810"),
        ({"method": {"lora_layers": [0]}}, "SOT811"),
        ({"setting": {**NONE, "layer": 2}}, "SOT811"),
        ({"setting": {**NONE, "layer": 2}, "method": {"train": "side"}}, "SOT811"),
        ({"setting": {**NONE, "layer": 3}, "method": {"train": "side"}}, "SOT810"),
    ],
)
def test_cuts_that_leave_nothing_to_train_are_refused(tmp_path: Path, changes: dict, code: str) -> None:
    with pytest.raises(SottoError) as caught:
        simulate(config(tmp_path, **changes))
    assert caught.value.code == code
    assert not list((tmp_path / "runs").glob("*")), "nothing was written"


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {"epsilon": 3.0}},
        {"setting": {"privatizer": "dx_pooled", "segment": 9, "eta": 1.0}},
        {"privacy": {"unit": "who"}},
        {"data": {"label": ..., "labels": ...}},
        {"method": {"train": "reversible"}},
        {"method": {"train": "side", "side_cache": True}},
    ],
)
def test_configurations_that_are_not_for_a_split_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(SottoError) as caught:
        config(tmp_path, **changes)
    assert caught.value.code == "SOT107"


def test_central_training_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    made = config(tmp_path)
    with pytest.raises(SottoError) as caught:
        sotto.train(made)
    assert caught.value.code == "SOT110"
    assert not (tmp_path / "runs").exists()
    run = simulate(made)
    with pytest.raises(SottoError) as caught:
        sotto.resume(run.path)
    assert caught.value.code == "SOT110"


def test_runs_are_listed_and_shown(tmp_path: Path) -> None:
    run = simulate(config(tmp_path, {"privatizer": "dx_hidden", "eta": 30.0, "layer": 1}))
    (listed,) = sotto.ls(tmp_path / "runs")
    assert (listed["state"], listed["step"], listed["steps"]) == ("finished", 18, 18)
    assert listed["private"]
    assert listed["epsilon"] is None
    assert sotto.show(run.path) == run.statement
    assert "embeddings and 1 block of" in " ".join(run.statement.split())
    for page in (lambda: sotto.report(run.path), lambda: sotto.export(run.path, tmp_path / "model")):
        with pytest.raises(SottoError, match=r"(?s)SOT110.*sotto show"):
            page()
    (run.path / "privacy.json").unlink()
    assert "sotto split ... --resume" in sotto.show(run.path)
    (listed,) = sotto.ls(tmp_path / "runs")
    assert (listed["state"], listed["step"]) == ("unfinished", 18), "trained, and without its statement"
    open_ = simulate(config(tmp_path))
    assert "NOT PRIVATE" in sotto.show(open_.path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"privatizer": "dx_tokens", "eta": 120.0}, "Metric privacy (d_X) with eta 120, for each token by itself."),
        ({"privatizer": "gaussian", "epsilon": 8.0, "layer": 1}, "Local differential privacy: epsilon 8.000"),
        ({"privatizer": "none", "layer": 1}, "None. Representations without noise can be turned back"),
    ],
)
def test_a_plan_says_what_protects_the_text(tmp_path: Path, setting: dict, said: str) -> None:
    made = config(tmp_path, setting)
    text = plan_text.render(sotto.plan(made))
    words = " ".join(text.split())
    assert said in words
    assert "Each text leaves once" in words
    assert "every label as it is" in words
    assert "epsilon: none This is about the training" in words
    assert "the vendor trains for 18 steps" in words
    assert "nothing is exported" in words
    assert "add_or_remove_one" not in words, "the statement is about the replacement of a text"
    open_ = setting["privatizer"] == "none"
    assert ("NOT PRIVATE: setting.privatizer is 'none'." in words) == open_
    assert ("NOT PRIVATE" in words) == open_
    assert max(map(len, text.splitlines())) <= 120
    assert sotto.plan(made).private == (made.not_private is None) == (not open_)
    seeded = made.with_overrides(["run.debug_noise_seed=1"])
    assert "NOT PRIVATE" in plan_text.render(sotto.plan(seeded))
    once = sotto.plan(made)  # as another one may find more or less memory free
    assert Plan.from_dict(json.loads(json.dumps(once.to_dict()))) == once


def test_an_interrupted_simulation_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(config_file.dump(config(tmp_path).to_dict()), encoding="utf-8")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def interrupted(part: str, *words: str) -> str:
        monkeypatch.setattr("sys.argv", ["sotto", "split", "simulate", str(path), *words])
        with monkeypatch.context() as patch:
            patch.setattr(Customer, part, interrupt)
            with pytest.raises(SystemExit) as stop:
                cli.main()
        assert stop.value.code == 130
        return capsys.readouterr().err

    assert "Nothing was begun and nothing was charged" in interrupted("__init__")
    assert not (tmp_path / "runs").exists()
    said = interrupted("prepare")
    run = tiny_runs.only_run(tmp_path)
    assert f"sotto split simulate ... --resume {run}" in said
    assert f"sotto split simulate ... --resume {run}" in interrupted("__init__", "--resume", str(run)), "it has begun"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    setting = {"privatizer": "dx_hidden", "eta": 30.0, "layer": 1}

    path = tmp_path / "recipe.yaml"
    path.write_text(config_file.dump(config(tmp_path, setting).to_dict()), encoding="utf-8")

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["sotto", "split", *words])
        cli.main()
        return capsys.readouterr().out

    assert "survival" in run("meaning", str(path))
    assert 0 <= json.loads(run("meaning", str(path), "--json"))["survival"] <= 1
    out = run("simulate", str(path), "--set", "run.epochs=1")
    assert "SPLIT STATEMENT" in out
    folder = out.strip().rpartition("run folder: ")[2]
    assert "accuracy" in run("simulate", str(path), "--set", "run.epochs=1", "--resume", folder)
    with pytest.raises(SystemExit) as stopped:
        run("meaning", str(path), "--set", "setting.privatizer=none", "--set", "setting.eta=null")
    assert stopped.value.code == 2
    assert "SOT804" in capsys.readouterr().err
