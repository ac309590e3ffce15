"""The command line: what each command prints, how fast it starts, and what `init` writes."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import typer

import sotto
from sotto import begun, cli, commands, sweeping
from sotto.config import Config

COMMANDS = [
    "init",
    "plan",
    "memory",
    "check",
    "train",
    "resume",
    "evaluate",
    "generate",
    "export",
    "ls",
    "show",
    "report",
    "ledger",
]
COMMANDS += ["audit", "doctor", "sweep"]


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["sotto", *map(str, words)])
    capsys.readouterr()
    cli.main()
    return capsys.readouterr().out


def process(*words: str | Path, code: str | None = None) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Runs a fresh interpreter; returns the seconds of processor time it took."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "sotto.cli")), *map(str, words)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = call(capsys, monkeypatch, name, "--help")
    assert f"sotto {name}" in text
    assert "\\" not in text
    assert (getattr(cli, name).__doc__ or "?").split(".")[0].split(":")[0] in " ".join(text.split())


def test_every_command_is_a_python_function_of_the_same_name() -> None:
    group = typer.main.get_command(cli.app)
    single = {name for name, command in group.commands.items() if not hasattr(command, "commands")}  # type: ignore[attr-defined]
    assert sorted(single) == sorted(COMMANDS)
    for name in COMMANDS:
        assert getattr(sotto, name) is getattr(sweeping if name == "sweep" else commands, name)


def test_help_starts_at_once() -> None:
    used, done = process("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert used < 1


def test_plan_starts_fast_and_without_torch(tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    (tmp_path / "notes.csv").unlink()  # it touches no data
    code = "import sys; from sotto import cli; cli.main(); sys.exit(' '.join({'torch', 'transformers', 'datasets'} & {*sys.modules}) or 0)"  # noqa: E501
    used, done = process("plan", config, code=code)
    assert done.returncode == 0, done.stderr
    assert "noise_multiplier" in done.stdout
    assert used < 4, "two seconds on an idle machine, and half as much again beside other programs"


def test_without_a_command_the_help_is_shown() -> None:
    _, done = process()
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "SOT" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    command = f"{sys.executable} -m sotto.cli plan {config} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    text = call(capsys, monkeypatch, "plan", config)
    for word in ("noise_multiplier", "sampling_prob", "steps", "epsilon", "delta", "what if", "memory"):
        assert word in text
    rows = [line.split() for line in text.splitlines() if re.match(r"\s+\d+\s+\d+\s+\d+\s", line)]
    assert [(row[0], row[1]) for row in rows] == [("1", "12"), ("2", "12"), ("4", "12"), ("8", "12"), ("8", "24")]
    values = json.loads(call(capsys, monkeypatch, "plan", config, "--json", "--set", "privacy.epsilon=2"))
    assert values["epsilon"] == 2
    assert values["noise_multiplier"] == sotto.plan(Config.load(config, ["privacy.epsilon=2"])).noise_multiplier
    assert "NOT PRIVATE" in call(capsys, monkeypatch, "plan", config, "--set", "privacy.epsilon=none")
    assert not (tmp_path / "runs").exists()


def test_a_whole_session(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_runs.write_csv(tmp_path / "held_out.csv", tiny_runs.rows(20, seed=9))
    config = tiny_runs.write_yaml(tmp_path)
    assert "no runs in" in call(capsys, monkeypatch, "ls")
    assert "units      60" in call(capsys, monkeypatch, "check", config)
    assert tiny_runs.CANARY not in call(capsys, monkeypatch, "check", config, "--json")
    text = call(capsys, monkeypatch, "train", config, "--set", "run.learning_rate=1e-3")
    assert text.startswith("PRIVACY STATEMENT")
    run = tiny_runs.only_run(tmp_path)
    assert text.endswith(f"run folder: {run}\n")
    assert call(capsys, monkeypatch, "resume", run) == text, "the statement is printed again"
    assert "1e-3" not in (run / "config.yaml").read_text()
    assert Config.load(run / "config.yaml").run.learning_rate == 1e-3
    assert "finished" in call(capsys, monkeypatch, "ls")
    assert json.loads(call(capsys, monkeypatch, "ls", "--json"))[0]["step"] == 4
    assert call(capsys, monkeypatch, "show", run).startswith("PRIVACY STATEMENT")
    assert "accuracy" in call(capsys, monkeypatch, "evaluate", run, "--data", "held_out.csv")
    scores = json.loads(call(capsys, monkeypatch, "evaluate", run, "--data", "held_out.csv", "--json"))
    assert scores["examples"] == len(tiny_runs.rows(20, seed=9))
    assert call(capsys, monkeypatch, "export", run, "--to", "out").strip() == "out"
    assert "4 of 5 steps charged" in call(capsys, monkeypatch, "ledger", config)
    assert json.loads(call(capsys, monkeypatch, "ledger", config, "--json"))["runs"][0]["state"] == "closed"
    text = call(capsys, monkeypatch, "ledger", config, "--budget-epsilon", "9")
    assert "budget of the dataset: epsilon 9" in text
    monkeypatch.setattr(sys, "argv", ["sotto", "train", str(config)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "SOT414" in capsys.readouterr().err


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = sotto.train(tiny_runs.config(tmp_path, "completion")).path
    words = ("generate", run, "--prompt", "w1 w2", "--max-new-tokens", "5")
    assert call(capsys, monkeypatch, *words) == call(capsys, monkeypatch, *words)
    sample = (*words, "--temperature", "1", "--seed", "3")
    assert call(capsys, monkeypatch, *sample) == call(capsys, monkeypatch, *sample)


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(capsys, monkeypatch, "doctor").startswith("ok ")
    checks = json.loads(call(capsys, monkeypatch, "doctor", "--json"))
    assert all(check["passed"] for check in checks)
    monkeypatch.setattr("sotto.diagnosis.examine", lambda: [("noise", False, "broken")])
    with pytest.raises(SystemExit) as stop:
        call(capsys, monkeypatch, "doctor")
    assert stop.value.code == 1


# ---- init

TASKS = {
    "classification": ["--text", "text", "--label", "label", "--unit", "who"],
    "record": ["--text", "text", "--label", "label", "--unit", "record"],
    "generation": ["--prompt", "prompt", "--completion", "completion", "--unit", "who"],
    "plain": ["--text", "text", "--unit", "who"],
}


def initialise(folder: Path, task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    kind = "classification" if task in ("classification", "record") else "completion"
    values = tiny_runs.KINDS[kind](folder)
    words = ["--model", values["model"]["name"], "--data", values["data"]["train"], *TASKS[task], "--epsilon", "3"]
    path = folder / "clinic.yaml"
    path.write_text(call(capsys, monkeypatch, "init", *words), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_what_plan_and_train_accept(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = initialise(tmp_path, task, capsys, monkeypatch)
    config = Config.load(path)
    assert config.privacy.epsilon == 3
    assert config.privacy.num_units == (60 if task != "record" else len(tiny_runs.rows()))
    assert config.privacy.delta < 1 / config.privacy.num_units
    assert config.data.labels == (tuple(sorted(tiny_runs.LABELS)) if "--label" in TASKS[task] else None)
    text = path.read_text()
    assert tiny_runs.CANARY not in text
    assert "noise_multiplier" in call(capsys, monkeypatch, "plan", path)
    short = ("--set", "run.steps=2", "--set", f"output.dir={tmp_path / 'runs'}", "--set", "run.device=cpu")
    assert "PRIVACY STATEMENT" in call(capsys, monkeypatch, "train", path, *short)


@pytest.mark.parametrize("task", TASKS)
def test_every_commented_key_may_be_uncommented(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = initialise(tmp_path, task, capsys, monkeypatch)
    lines = path.read_text().splitlines()
    expected, tried = Config.load(path), []
    for number, line in enumerate(lines):
        if re.match(r"  # [a-z_]+: ", line):
            changed = [*lines[:number], line.replace("  # ", "  ", 1), *lines[number + 1 :]]
            path.write_text("\n".join(changed), encoding="utf-8")
            assert Config.load(path) == expected, line
            tried.append(line)
    assert len(tried) > 30


def test_init_quotes_what_yaml_would_misread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["1e5", "yes", "null", "a: b", "#1", "é", "2024-01-31", "10"]
    table = [{"my text": f"t{i}", "the: label": labels[i % 8], "who": f"p{i}"} for i in range(40)]
    data = tiny_runs.write_csv(tmp_path / "a b.csv", table)
    path = tmp_path / "x.yaml"
    words = ("--model", "m", "--data", data, "--text", "my text", "--label", "the: label", "--unit", "who")
    path.write_text(call(capsys, monkeypatch, "init", *words), encoding="utf-8")
    config = Config.load(path)
    assert config.data.labels == tuple(sorted(labels))
    assert config.data.label == "the: label"


def test_init_says_that_a_model_is_no_folder_and_where_a_value_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_runs.write_csv(tmp_path / "notes.csv", tiny_runs.rows())
    words = ["init", "--data", str(data), *TASKS["classification"]]
    here = tmp_path / "model"
    here.mkdir()
    for model, said in ((here, ""), ("all-MiniLM", "note: there is no folder 'all-MiniLM' here")):
        monkeypatch.setattr(sys, "argv", ["sotto", *words, "--model", str(model)])
        cli.main()
        printed = capsys.readouterr()
        assert printed.err.startswith(said)
        assert bool(printed.err) == bool(said)
        assert printed.out.startswith("# sotto train notes.yaml")
    monkeypatch.setattr(sys, "argv", ["sotto", *words, "--model", str(here), "--epsilon", "-1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "sotto init (privacy.epsilon)" in capsys.readouterr().err


def test_an_interrupt_before_anything_is_on_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "ls", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        call(capsys, monkeypatch, "ls")
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"\nInterrupted. {begun.NOTHING}\n"


def interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, *words: str | Path
) -> str:
    """What a command says that is interrupted when it comes to `place`."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        with pytest.raises(SystemExit) as stop:
            call(capsys, patch, *words)
    assert stop.value.code == 130
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("sotto.session.load_parts", False),  # while the model is loaded
        ("sotto.session._open_budget", False),  # the folder was made, and is taken back
        ("sotto.commands.run_session", True),
    ],
)
def test_an_interrupt_says_whether_anything_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, there: bool
) -> None:
    config = tiny_runs.write_yaml(tmp_path)
    said = interrupted(capsys, monkeypatch, place, "train", config)
    assert said.endswith(f"\nInterrupted. {begun.KEPT if there else begun.NOTHING}\n")
    assert (tmp_path / "runs").exists() == there
    if there:
        said = interrupted(capsys, monkeypatch, "sotto.session.resume", "resume", tiny_runs.only_run(tmp_path))
        assert begun.KEPT in said, "it has begun, whoever began it"
        said = interrupted(capsys, monkeypatch, "sotto.commands.ls", "ls")
        assert begun.NOTHING in said, "what an earlier command began does not count"


def test_an_interrupted_score_or_sweep_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_runs.write_csv(tmp_path / "held_out.csv", tiny_runs.rows(20, seed=9))
    config = tiny_runs.write_yaml(tmp_path, data={"eval": str(tmp_path / "held_out.csv")})
    words = ("sweep", config, "--over", "run.learning_rate=1e-3", "--public-eval")
    assert "A sweep cannot be continued" in interrupted(capsys, monkeypatch, "sotto.sweeping._one", *words)
    run = sotto.train(Config.load(config, [f"output.dir={tmp_path / 'other'}"])).path
    for place, said in (("exported_model", begun.NOTHING), ("unit_scores", "see 'sotto ledger'")):
        words = ("evaluate", run, "--epsilon", "1")
        assert said in interrupted(capsys, monkeypatch, f"sotto.noisy_scores.{place}", *words)


def test_plan_and_train_name_what_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs.write_yaml(tmp_path, run={"steps": 1})
    assert "Not used" not in call(capsys, monkeypatch, "plan", config)
    set_ = [f"method.{key}" for key in ("zeroth_preset=dpzero", "zeroth_rank=2", "clip_share=0.02")]
    words = [word for item in set_ for word in ("--set", item)]
    line = (
        "Not used: method.zeroth_preset, method.zeroth_rank (method.gradient is not zeroth_order); method.clip_share "
        "(method.clipping is not adaptive)"
    )
    assert call(capsys, monkeypatch, "plan", config, *words).splitlines()[-1] == line
    made = json.loads(call(capsys, monkeypatch, "plan", config, *words, "--json"))
    assert made["unused"]["method.clip_share"] == "method.clipping is not adaptive"
    monkeypatch.setattr(sys, "argv", ["sotto", "train", str(config), *words])
    cli.main()
    assert line in capsys.readouterr().err.splitlines()
