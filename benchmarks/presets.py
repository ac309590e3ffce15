"""The default zeroth-order preset against `dpzero`: scores at the same epsilon and the same number of forward passes.

    python benchmarks/presets.py --model <all-MiniLM-L6-v2> --data <folder> [--task sst2] [--passes 1920] [--few 512]
    python benchmarks/presets.py --model <all-MiniLM-L6-v2> --data <folder> --task sst2 --write <folder> [--draw 1]

Each run trains a classifier's head on a frozen encoder from losses alone. Everything below the head gives the same for
all probes, so it is run once for each text, and the runs of a task share what it gave; sampling, probes, clipping,
noise and updates are those of `sotto train`, and so is the plan. `aggzo` has one pass for each of its 16 directions
(`--probes`) and `dpzero` two for its one, so both take `--passes` passes of a batch of `--batch` on average: `passes /
16` steps against `passes / 2`. `dpzero` is tried at its default rate and another, `aggzo` at its default one; `--rate`
tries others. `laplace` is `aggzo` with Laplace noise at pure epsilon 4.

The folder holds sst2/{train,dev}.tsv, sst5/stsa.fine.{train,test}, rte/{train,dev}.tsv, and ag_news/test.csv,
movie_review_sentences/all.csv, shakespeare/by_speaker.jsonl and pii/synth_dataset_v2.json, of which each tenth or
eighth row is held out. `--write` writes a task's train.csv, eval.csv and recipe to a folder, for
`benchmarks/methods.py`.
`--draw 1` takes other texts, and as many held-out ones from what is left of the training file: to choose a rate on.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import secrets
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

import sotto
from sotto import session as sessions
from sotto.data import PoissonSampler
from sotto.losses import classification
from sotto.training import batch_of
from sotto.zeroth_order import engine as zeroth_order
from sotto.zeroth_order.directions import new_key

GRID: dict[str, list[float | None]] = {"aggzo": [None], "dpzero": [None, 0.1], "laplace": [0.5, 1.5]}
"""Learning rates; None is the default."""
Rows = list[tuple[str, ...]]
"""Text, perhaps a second text, label."""


def tabbed(path: Path, *columns: str) -> Rows:
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [tuple(row[column] for column in columns) for row in rows]


def sst2(folder: Path) -> tuple[Rows, Rows]:
    return tabbed(folder / "sst2/train.tsv", "sentence", "label"), tabbed(folder / "sst2/dev.tsv", "sentence", "label")


def rte(folder: Path) -> tuple[Rows, Rows]:
    columns = "sentence1", "sentence2", "label"
    return tabbed(folder / "rte/train.tsv", *columns), tabbed(folder / "rte/dev.tsv", *columns)


def sst5(folder: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        lines = (folder / "sst5" / name).read_text(encoding="utf-8").splitlines()
        return [(text, label) for label, _, text in (line.partition(" ") for line in lines)]

    return read("stsa.fine.train"), read("stsa.fine.test")


def ag_news(folder: Path) -> tuple[Rows, Rows]:
    with open(folder / "ag_news" / "test.csv", newline="", encoding="utf-8") as file:
        rows: Rows = [(f"{row[1]} {row[2]}", row[0]) for row in csv.reader(file) if row[0].isdigit()]
    return _apart(rows, 10)


def movies(folder: Path) -> tuple[Rows, Rows]:
    with open(folder / "movie_review_sentences" / "all.csv", newline="", encoding="utf-8") as file:
        return _apart([(row["text"], row["label"]) for row in csv.DictReader(file)], 10)


def speakers(folder: Path) -> tuple[Rows, Rows]:
    """Which of the six who speak most in Shakespeare's plays says this."""
    with open(folder / "shakespeare" / "by_speaker.jsonl", encoding="utf-8") as file:
        most = sorted((json.loads(line) for line in file), key=lambda one: -one["n"])[:6]
    return _apart([(text.replace("\n", " "), one["speaker"]) for one in most for text in one["speeches"]], 8)


def entities(folder: Path) -> tuple[Rows, Rows]:
    """Of which kind the first personal detail of a synthetic text is; the six most frequent ones."""
    found = json.loads((folder / "pii" / "synth_dataset_v2.json").read_text(encoding="utf-8"))
    rows = [(one["full_text"], one["spans"][0]["entity_type"]) for one in found if one["spans"]]
    kinds = {kind for kind, _ in Counter(kind for _, kind in rows).most_common(6)}
    return _apart([row for row in rows if row[1] in kinds], 8)


def _apart(rows: Rows, every: int) -> tuple[Rows, Rows]:
    return [r for i, r in enumerate(rows) if i % every], rows[::every]


TASKS = {"sst2": sst2, "sst5": sst5, "ag_news": ag_news, "rte": rte, "movies": movies, "speakers": speakers,
         "entities": entities}  # fmt: skip


def few(rows: Rows, each: int, draw: int = 0) -> tuple[Rows, Rows]:
    """So many rows of each label, in a fixed random order: the few-shot sets on which DPZero and AggZO report.

    Returns:
      The rows, and those that no draw up to this one has.
    """
    rows = random.Random(0).sample(rows, len(rows))
    kept: dict[str, Rows] = {}
    for row in rows:
        kept.setdefault(row[-1], []).append(row)
    found = [row for of_label in kept.values() for row in of_label[draw * each : (draw + 1) * each]]
    return found, [row for of_label in kept.values() for row in of_label[(draw + 1) * each :]]


def texts(args: argparse.Namespace, task: str) -> tuple[Rows, Rows]:
    """The texts to train on, and those held out."""
    train, held = TASKS[task](args.data)
    if not args.few:
        return train, held
    train, rest = few(train, args.few, args.draw)
    return train, random.Random(1).sample(rest, min(len(rest), len(held))) if args.draw else held


def write_recipe(args: argparse.Namespace, task: str) -> None:
    """A task's texts and their recipe: `args.write` holds train.csv, eval.csv and <task>.yaml."""
    train, held = texts(args, task)
    args.write.mkdir(parents=True, exist_ok=True)
    write(args.write / "train.csv", train)
    write(args.write / "eval.csv", held)
    values = settings(args, args.write, len(train), sorted({row[-1] for row in train}), len(train[0]) == 3)
    values["data"]["eval"] = str(args.write / "eval.csv")
    values["run"] |= {"steps": args.passes // 16, "expected_batch_size": args.batch, "microbatch_size": 32}
    (args.write / f"{task}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def settings(
    args: argparse.Namespace, folder: Path, count: int, labels: list[str], pairs: bool, name: str = "train"
) -> dict[str, Any]:
    """The part of a configuration that all methods share."""
    data: dict[str, Any] = {"train": str(folder / f"{name}.csv"), "text": "text", "label": "label", "labels": labels}
    return {
        "model": {"name": args.model, "pooling": "mean"},
        "data": data | {"max_length": args.length} | ({"text_pair": "pair"} if pairs else {}),
        "privacy": {"unit": "record", "num_units": count, "epsilon": 2.0},
        "run": {"schedule": "linear"},
    }


def write(path: Path, rows: Rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "pair", "label"] if len(rows[0]) == 3 else ["text", "label"])
        writer.writerows(rows)


class Bench:
    """A task, with what the frozen encoder makes of its texts."""

    def __init__(self, args: argparse.Namespace, task: str, folder: Path):
        train, held = texts(args, task)
        self.args, self.folder, self.size = args, folder / task, len(train)
        self.pairs, self.labels = len(train[0]) == 3, sorted({row[-1] for row in train})
        self.folder.mkdir()
        write(self.folder / "train.csv", train)
        write(self.folder / "eval.csv", held)
        found = []
        for name in ("eval", "train"):
            parts = sessions.load_parts(self.config("aggzo", 1.0, 3.0, 16, name), new_key())
            found.append(self.features(parts))
        self.model = parts.model
        self.held, self.train = found

    def config(self, preset: str, rate: float | None, epsilon: float, passes: int, name: str = "train") -> sotto.Config:
        laplace, count = preset == "laplace", self.size if name == "train" else 1
        method = {"train": "head", "gradient": "zeroth_order", "zeroth_preset": "aggzo" if laplace else preset}
        method |= {"zeroth_noise": "laplace"} if laplace else {}
        values = settings(self.args, self.folder, count, self.labels, self.pairs, name) | {"method": method}
        values["privacy"]["epsilon"] = epsilon
        values["privacy"] |= {"neighboring_relation": "replace_one"} if preset == "dpzero" else {}
        method |= {} if preset == "dpzero" else {"zeroth_probes": self.args.probes}
        values["run"] |= {"steps": passes // (2 if preset == "dpzero" else self.args.probes), "optimizer": "sgd"}
        values["run"] |= {"expected_batch_size": min(self.args.batch, count)}
        values["run"] |= {"learning_rate": rate} if rate else {}
        return sotto.Config.from_dict(values)

    def features(self, parts: Any) -> dict[str, torch.Tensor]:
        """What goes into the head, for every text, and the labels."""
        seen: list[torch.Tensor] = []
        hook = parts.model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        order = parts.data.examples.lengths.argsort(kind="stable")
        holder: Any = parts
        with torch.no_grad():
            for start in range(0, len(order), 64):
                batch = batch_of(holder, order[start : start + 64])
                del batch["labels"]
                parts.model(**batch)
        hook.remove()
        rows = torch.empty(len(order), seen[0].shape[1])
        rows[torch.from_numpy(order)] = torch.cat(seen)
        return {"features": rows, "labels": torch.as_tensor(parts.data.examples.labels, dtype=torch.long)}

    def score(self, preset: str, rate: float | None, epsilon: float) -> float:
        """Accuracy of one run, in percent."""
        config = self.config(preset, rate, epsilon, self.args.passes)
        plan, head = sotto.plan(config), self.model.classifier
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)

        def forward(batch: Any) -> torch.Tensor:
            return classification(head(batch["features"]), batch["labels"])

        engine = zeroth_order.build(self.model, config.method, forward, sessions.make_clipping(config), new_key())
        optimizer = sessions.make_optimizer(engine, config)
        mechanism = sessions.make_mechanism(config, plan, engine.clipping)
        sampler = PoissonSampler(self.size, plan.sampling_prob, secrets.token_bytes(16))
        for step in range(plan.steps):
            drawn = torch.from_numpy(sampler.draw(step))
            total = engine.zeros()
            if len(drawn):
                total += engine.clipped_sum({name: x[drawn] for name, x in self.train.items()}, None, step)
            optimizer.step(mechanism.privatize(total, step), step)
        with torch.no_grad():
            guesses = head(self.held["features"]).argmax(1)
        return 100 * float((guesses == self.held["labels"]).float().mean())

    def ceiling(self) -> float:
        """Accuracy of the head trained by its gradient on all texts, without privacy: what there is to reach."""
        weight = torch.zeros(len(self.labels), self.train["features"].shape[1], requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(self.train["features"] @ weight.T, self.train["labels"]).backward()
            optimizer.step()
        guesses = (self.held["features"] @ weight.T).argmax(1)
        return 100 * float((guesses == self.held["labels"]).float().mean())


def said(scores: Iterable[float]) -> str:
    scores = list(scores)
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return f"{statistics.mean(scores):.1f} ± {spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--preset", action="append", choices=GRID)
    parser.add_argument("--epsilon", type=float, action="append")
    parser.add_argument("--rate", type=float, action="append")
    parser.add_argument("--probes", type=int, default=16, help="directions of a step; dpzero has one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1920, help="forward passes of a batch in a run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--few", type=int, default=512, help="so many records of each label; 0 for all")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", type=int, default=0, help="which texts, where there are few")
    parser.add_argument("--write", type=Path, help="write one task's texts and recipe, and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.write:
        write_recipe(args, args.task[0])
        return
    with tempfile.TemporaryDirectory() as name:
        for task in args.task or ["sst2", "sst5", "ag_news"]:
            begun = time.process_time()
            bench = Bench(args, task, Path(name))
            print(f"{task}: {bench.size} records, {len(bench.held['labels'])} held out; all of them, without privacy: "
                  f"{bench.ceiling():.1f} % ({time.process_time() - begun:.0f} s)", flush=True)  # fmt: skip
            for epsilon in args.epsilon or [2.0, 6.0]:
                for preset in args.preset or ["dpzero", "aggzo"]:
                    budget, begun = 4.0 if preset == "laplace" else epsilon, time.process_time()
                    rates = args.rate or GRID[preset]
                    scores = {r: said(bench.score(preset, r, budget) for _ in range(args.runs)) for r in rates}
                    print(f"| {task} | {budget:g} | {preset} | "
                          + ", ".join(f"{rate or 'default'}: {score}" for rate, score in scores.items())
                          + f" | {time.process_time() - begun:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
