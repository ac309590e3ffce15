"""Whole runs that take about a second: a tiny model on disk, tables of invented people, a configuration for each."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import tiny_models
import torch
import yaml
from safetensors.torch import load_file

from sotto import cli
from sotto.config import Config

UNITS = 60
LABELS = ("bad", "fair", "good")
CANARY = "Zanzibar-7319"
"""A word that stands in the private text and nowhere else."""


def unit_name(unit: int) -> str:
    return f"patient-{unit:04d}"


def _sentence(generator: random.Random, label: int) -> str:
    words = [f"w{generator.randrange(30)}" for _ in range(generator.randrange(3, 12))]
    return " ".join([*words, f"w{40 + label}", CANARY])


def rows(units: int = UNITS, seed: int = 3) -> list[dict[str, str]]:
    """Two to four rows for each unit: text, label, who, prompt, completion."""
    generator = random.Random(seed)
    found = []
    for unit in range(units):
        for _ in range(generator.randrange(2, 5)):
            label = generator.randrange(3)
            text = _sentence(generator, label)
            found.append({"text": text, "label": LABELS[label], "who": unit_name(unit), "prompt": f"{text} ",
                          "completion": _sentence(generator, label)})  # fmt: skip
    return found


def write_csv(path: Path, table: list[dict[str, str]] | None = None) -> Path:
    table = rows() if table is None else table
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def write_jsonl(path: Path, table: list[dict[str, str]] | None = None) -> Path:
    table = rows() if table is None else table
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def merge(values: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Nested dictionaries with the keys of `changes` put over them; a value of `...` removes its key."""
    result = {section: dict(content) for section, content in values.items()}
    for section, content in changes.items():
        result.setdefault(section, {}).update(content)
        result[section] = {key: value for key, value in result[section].items() if value is not ...}
    return result


def _base(folder: Path, kind: str) -> dict[str, Any]:
    model = folder / f"model-{kind}"
    if not model.exists():
        tiny_models.save(kind, model)
    return {
        "model": {"name": str(model)},
        "privacy": {"unit": "who", "num_units": UNITS, "epsilon": 8.0, "delta": 1e-4, "max_examples_per_unit": 3},
        "method": {"train": "full"},
        "run": {"expected_batch_size": 12, "steps": 4, "learning_rate": 0.01, "microbatch_size": 8, "device": "cpu"},
        "output": {"dir": str(folder / "runs")},
    }


def classification(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration, as nested dictionaries, of a classifier; its files are written to `folder`."""
    data = folder / "notes.csv"
    if not data.exists():
        write_csv(data)
    values = _base(folder, "bert")
    values["data"] = {"train": str(data), "text": "text", "label": "label", "labels": list(LABELS), "max_length": 16}
    return merge(values, changes)


def completion(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a language model that learns completions."""
    data = folder / "letters.jsonl"
    if not data.exists():
        write_jsonl(data)
    values = _base(folder, "llama")
    values["data"] = {"train": str(data), "prompt": "prompt", "completion": "completion", "max_length": 24}
    return merge(values, changes)


def plain_text(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a language model that learns plain text, packed within each unit."""
    values = completion(folder)
    values["data"] = {"train": values["data"]["train"], "text": "text", "max_length": 16}
    return merge(values, changes)


KINDS = {"classification": classification, "completion": completion, "plain_text": plain_text}


def config(folder: Path, kind: str = "classification", **changes: dict[str, Any]) -> Config:
    return Config.from_dict(KINDS[kind](folder, **changes))


def write_yaml(folder: Path, kind: str = "classification", **changes: dict[str, Any]) -> Path:
    """Writes the configuration as a file for the command line."""
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(KINDS[kind](folder, **changes), sort_keys=False), encoding="utf-8")
    return path


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run."""
    folder = run / "model"
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def only_run(folder: Path) -> Path:
    """The one run folder in `folder/runs`."""
    (found,) = (path for path in (folder / "runs").iterdir() if not path.name.startswith("."))
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Every weight is the same, bit for bit if the tolerance is zero."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if tolerance == 0.0:
            assert torch.equal(value, second[name]), name
        else:
            torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)


# ---- runs in processes of their own, to be killed

PRELOADED = ["tiny_runs", "sotto.session", "sotto.finish", "sotto.reporting.progress", "dp_accounting"]
PRELOADED += ["transformers.models.bert.modeling_bert"]
BOUNDARIES = ("fsync", "replace", "rename", "ftruncate", "mkdir")
"""Calls between which a crash finds different things on the disk."""


def _command(arguments: list[str], ledger: str, output: str, kill_at: int | None, delay: float) -> None:
    """Runs the command line; the process kills itself at, or some seconds after, the n-th boundary, if told to."""
    os.environ["SOTTO_LEDGER_DIR"] = ledger
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if kill_at is not None:
        countdown = iter(range(kill_at, -1, -1))
        for name in BOUNDARIES:
            setattr(os, name, _killing(getattr(os, name), countdown, delay))
    sys.argv = ["sotto", *arguments]
    cli.main()


def _killing(original: Any, countdown: Any, delay: float) -> Any:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(countdown, 1) == 0:
            kill() if delay == 0 else threading.Timer(delay, kill).start()
        return original(*args, **kwargs)

    return wrapped


def command(folder: Path, *arguments: str | Path, kill_at: int | None = None, delay: float = 0) -> Any:
    """Starts `sotto ...` in a process that has the libraries loaded already. `folder/output` gets what it prints."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    words = [str(argument) for argument in arguments]
    process = context.Process(
        target=_command, args=(words, os.environ["SOTTO_LEDGER_DIR"], str(folder / "output"), kill_at, delay)
    )
    process.start()
    return process


def steps_done(run: Path) -> int:
    """Steps that were logged so far."""
    lines = run / "metrics.public.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0
