"""The default zeroth-order preset against `dpzero`: scores at the same epsilon and the same number of forward passes.

    python benchmarks/presets.py --model <all-MiniLM-L6-v2> --data <folder> [--task sst2] [--steps 15] [--few 512]

Each run trains a classifier's head on a frozen encoder from losses alone (the layers below the head are computed once
per batch, by both presets). `aggzo` takes `--steps` steps of 16 directions, `dpzero` 16 times as many steps of one:
both evaluate the loss of 32 x steps x batch examples. Learning rates are the best of a grid for each preset on the
first task, by one run each; the table has mean and deviation of further runs. `laplace` is `dpzo` with Laplace noise
at pure epsilon 4, against the untrained model.

The folder holds sst2/{train,dev}.tsv, sst5/stsa.fine.{train,test} and ag_news/test.csv, of which a tenth is held out.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import tempfile
from pathlib import Path

import torch

import sotto
from sotto import commands

PROBES = 16
GRID = {"aggzo": [3e-2, 1e-1, 3e-1], "dpzero": [3e-3, 1e-2, 3e-2, 1e-1], "laplace": [3e-3, 1e-2, 3e-2]}
Rows = list[tuple[str, str]]


def sst2(folder: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        with open(folder / "sst2" / name, newline="", encoding="utf-8") as file:
            return [
                (row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            ]

    return read("train.tsv"), read("dev.tsv")


def sst5(folder: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        lines = (folder / "sst5" / name).read_text(encoding="utf-8").splitlines()
        return [(text, label) for label, _, text in (line.partition(" ") for line in lines)]

    return read("stsa.fine.train"), read("stsa.fine.test")


def ag_news(folder: Path) -> tuple[Rows, Rows]:
    with open(folder / "ag_news" / "test.csv", newline="", encoding="utf-8") as file:
        rows = [(f"{row[1]} {row[2]}", row[0]) for row in csv.reader(file)]
    rows = [(text, label) for text, label in rows if label.isdigit()]
    return [r for i, r in enumerate(rows) if i % 10], rows[::10]


TASKS = {"sst2": sst2, "sst5": sst5, "ag_news": ag_news}


def few(rows: Rows, each: int) -> Rows:
    """So many rows of each label, in a fixed random order: the few-shot sets on which DPZero and AggZO report."""
    rows = random.Random(0).sample(rows, len(rows))
    kept: dict[str, Rows] = {}
    for row in rows:
        kept.setdefault(row[1], []).append(row)
    return [row for of_label in kept.values() for row in of_label[:each]]


def write(path: Path, rows: Rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


class Bench:
    def __init__(self, args: argparse.Namespace, task: str, folder: Path):
        train, held = TASKS[task](args.data)
        if args.few:
            train = few(train, args.few)
        self.args, self.folder, self.size = args, folder / task, len(train)
        self.folder.mkdir()
        write(self.folder / "train.csv", train)
        write(self.folder / "eval.csv", held)
        self.labels = sorted({label for _, label in train})

    def score(self, preset: str, rate: float, steps: int | None = None) -> float:
        """Accuracy of one run, in percent; with `steps=0` that of the model that has not been trained."""
        laplace = preset == "laplace"
        method = {"train": "head", "gradient": "zeroth_order", "zeroth_smoothing": 1e-2}
        method |= {"zeroth_preset": "dpzo", "zeroth_noise": "laplace"} if laplace else {"zeroth_preset": preset}
        privacy = {"unit": "record", "num_units": self.size, "epsilon": 4.0 if laplace else self.args.epsilon}
        if preset == "dpzero":
            privacy |= {"neighboring_relation": "replace_one"}
        taken = steps if steps is not None else self.args.steps * (PROBES if preset == "dpzero" else 1)
        config = sotto.Config.from_dict({
            "model": {"name": self.args.model, "pooling": "mean"},
            "data": {"train": str(self.folder / "train.csv"), "eval": str(self.folder / "eval.csv"), "text": "text",
                     "label": "label", "labels": self.labels, "max_length": self.args.length},
            "privacy": privacy if rate else {"unit": "record", "num_units": self.size, "epsilon": "none"},
            "method": method,
            "run": {"steps": max(1, taken), "expected_batch_size": self.args.batch if rate else 1,
                    "learning_rate": rate or 1e-30, "schedule": "linear", "microbatch_size": 64},
            "output": {"dir": str(self.folder / "runs")},
        })  # fmt: skip
        return 100 * commands.evaluate(sotto.train(config).path)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--preset", action="append", choices=GRID)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--few", type=int, help="train on so many records of each label; default: all")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SOTTO_LEDGER_DIR"] = str(folder / "ledger")
        for task in args.task or list(TASKS):
            bench = Bench(args, task, folder)
            print(f"{task}: {bench.size} records; untrained {bench.score('aggzo', 0.0, 0):.1f} %", flush=True)
            for preset in args.preset or ["aggzo", "dpzero"]:
                if preset not in best:
                    tried = {rate: bench.score(preset, rate) for rate in GRID[preset]}
                    best[preset] = max(tried, key=lambda rate: tried[rate])
                    print(f"  {preset}: rates {tried}", flush=True)
                scores = [bench.score(preset, best[preset]) for _ in range(args.runs)]
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                print(
                    f"| {task} | {preset} | {best[preset]:g} | {statistics.mean(scores):.1f} | {spread:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
