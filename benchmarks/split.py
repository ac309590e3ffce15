"""Split runs: accuracy against empirical privacy, over privatizers, depths and noise.

python -m benchmarks.split --model <folder of all-MiniLM-L6-v2> --shared <folder with data/> --data sst2 --out <folder>

Each point trains the two topmost blocks with LoRA on what was sent, at every cut the same ones, scores privatized
queries, and attacks what was sent with everything in sotto/split. So two points differ by what left the customer, and
not by what the vendor trains. The frozen bottom runs once for all points of a cut. Each point is trained once for each
seed, and attacked at the first one. Points are written as they are done, so a broken run goes on. `points.jsonl`, a
table in Markdown and a plot come out. With `--gather FOLDER ...` these are made of what several runs have written.

With `--throughput` instead: what a customer does for 512 texts (the bottom of two blocks, noise, packing), against the
plain forward pass of that bottom on the same batches, in turn, in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sotto.auditing.split import audit_customer
from sotto.config import Config
from sotto.data.load import load_dataset_for
from sotto.privacy.noise import SecureNoise
from sotto.reporting.charts import round_ticks
from sotto.split.cache import Inbox, Outbox
from sotto.split.customer import Customer, load_bottom
from sotto.split.parts import Bottom
from sotto.split.simulate import ask_directly, evaluate
from sotto.split.vendor import Vendor

Point = dict[str, Any]

SELECTED = {"exempt": "selected", "exempt_epsilon": 2.0, "exempt_share": 0.005}
POOLED: list[Point] = [
    {"privatizer": "dx_pooled", "eta": 300.0},
    {"privatizer": "dx_pooled", "eta": 100.0},
    {"privatizer": "gaussian_pooled", "epsilon": 8.0, "clip_norm": 4.0},
]
NOISED: dict[int, list[float]] = {5: [40.0], 4: [80.0, 40.0, 20.0], 2: [80.0, 40.0], 0: [160.0, 80.0]}
"""Layer -> eta of `dx_hidden`."""
SEGMENTS = [2, 3, 4]
TOKENS: list[Point] = [
    {"eta": 100.0},
    {"eta": 100.0, **SELECTED},
    {"eta": 60.0},
    {"eta": 60.0, **SELECTED},
    {"eta": 140.0},
]
"""Of `dx_tokens`."""


def grid(layer: int) -> list[Point]:
    """The points of a cut, those that matter most first."""
    points: list[Point] = [{"privatizer": "none"}]
    if layer == 0:
        points += [{"privatizer": "dx_tokens", **point} for point in TOKENS]
    points += [{"privatizer": "dx_hidden", "eta": eta} for eta in NOISED[layer]]
    points += [{"privatizer": "dx_pooled", "segment": segment, "eta": 300.0} for segment in SEGMENTS]
    return [{"layer": layer, **point} for point in points + POOLED]


def config(point: Point, folder: Path, arguments: argparse.Namespace, seed: int = 0) -> Config:
    """The recipe of one point."""
    return Config.from_dict(
        {
            "model": {"name": arguments.model, "pooling": "mean"},
            "data": {
                "train": str(folder / "train.csv"),
                "eval": str(folder / "eval.csv"),
                "text": "text",
                "label": "label",
                "labels": LABELS[arguments.data],
                "max_length": arguments.max_length,
            },
            "privacy": {"unit": "record", "num_units": arguments.texts, "epsilon": "none"},
            "method": {"train": "lora", "lora_layers": [4, 5]} if point["layer"] < BLOCKS else {"train": "head"},
            "run": {
                "expected_batch_size": 32,
                "epochs": arguments.epochs or 1,
                "learning_rate": arguments.learning_rate,
                "seed": seed,
            },
            "output": {"dir": str(folder / "runs"), "export": "none"},
            "setting": {"kind": "split", **point},
        }
    )


BLOCKS = 6
"""Of MiniLM. Above a cut there the vendor has a linear layer to train, and nothing else."""
LABELS = {"sst2": ["0", "1"], "ag_news": ["1", "2", "3", "4"]}


def rows(arguments: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """(text, label) to train on and to ask about, in an order that is always the same."""
    folder = Path(arguments.shared) / "data" / arguments.data
    order = np.random.default_rng(0)
    if arguments.data == "sst2":
        found = []
        for name in ("train.tsv", "dev.tsv"):
            with open(folder / name, encoding="utf-8", newline="") as file:
                read = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
            found.append([read[i] for i in order.permutation(len(read))])
        train, asked = found
    else:
        with open(folder / "test.csv", encoding="utf-8", newline="") as file:
            read = [[f"{title} {text}", label] for label, title, text in csv.reader(file)]
        read = [read[i] for i in order.permutation(len(read))]
        train, asked = read[: arguments.texts], read[-arguments.queries :]
    return train[: arguments.texts], asked[: arguments.queries]


def write_data(arguments: argparse.Namespace, folder: Path) -> None:
    for name, some in zip(("train", "eval"), rows(arguments), strict=True):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *some])


class Remembered:
    """A bottom that runs once for each batch: its output does not depend on the noise that is put on it."""

    def __init__(self, bottom: Bottom):
        self._bottom, self._known = bottom, dict[bytes, torch.Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bottom, name)

    def hidden(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        key = hashlib.sha256(batch["input_ids"].numpy().tobytes() + batch["attention_mask"].numpy().tobytes()).digest()
        if self.layer == 0:  # runs in no time, and an attacker's table of all tokens would fill the memory
            return self._bottom.hidden(batch)
        if key not in self._known:
            self._known[key] = self._bottom.hidden(batch)
        return self._known[key].clone()


def measure(point: Point, seed: int, bottom: Any, tokenizer: Any, arguments: argparse.Namespace) -> Point:
    """Trains and scores one point, and attacks it at the first seed."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "private").mkdir()
        write_data(arguments, folder)
        made = config(point, folder, arguments, seed)
        customer, accuracy = Customer(made, bottom, tokenizer, SecureNoise()), None
        if arguments.epochs:
            accuracy = train(made, customer, folder)
        else:
            customer.settle(load_dataset_for(made, tokenizer, "train"))
        meaning, trained = customer.meaning(), time.process_time()
        report = None
        if arguments.attackers and seed == arguments.seeds[0]:
            report = audit_customer(customer, arguments.attackers, arguments.passes, searched=arguments.searched)
    return {
        **point,
        "accuracy": accuracy,
        "survival": meaning and meaning.survival,
        "recovered": report.recovered if report else {},
        "rare": report.rare if report else {},
        "baseline": report and report.baseline,
        "disclosed": report.exempt if report else 0.0,
        "attribute": report and report.attribute,
        "seconds": [round(trained - start, 1), round(time.process_time() - trained, 1)],
        "seed": seed,
        **{name: getattr(arguments, name) for name in ("data", "texts", "epochs", "queries", "attackers", "passes")},
    }


def train(made: Config, customer: Customer, folder: Path) -> float:
    """Accuracy of the vendor's model after training on what the customer sent."""
    vendor = Vendor(made)
    outbox = customer.prepare(folder / "private" / "outbox")
    inbox = Inbox.open(folder / "private" / "inbox", outbox.manifest.to_json(), vendor.agreement)
    while not inbox.complete:
        inbox.accept(inbox.received, outbox.read(inbox.received))
    vendor.train(inbox.open_all())
    return evaluate(customer, lambda piece: ask_directly(vendor, piece), folder)


def label(point: Point) -> str:
    """A point's name in table and plot."""
    amount = (
        f" eta {point['eta']:g}" if "eta" in point else f" epsilon {point['epsilon']:g}" if "epsilon" in point else ""
    )
    segment = f" of {point['segment']}" if point.get("segment") else ""
    return f"{point['privatizer']}{segment}{amount}{' + words' if point.get('exempt_share') else ''}"


def together(points: Sequence[Point]) -> list[Point]:
    """One for all seeds: accuracies of all of them, attacks of those that were attacked."""
    found: dict[tuple[Any, ...], Point] = {}
    for point in points:
        one = found.setdefault((point["data"], point["layer"], label(point)), {**point, "accuracies": []})
        if point["recovered"] and not one["recovered"]:
            one.update({name: point[name] for name in ("recovered", "rare", "baseline", "disclosed", "attribute")})
        if point["accuracy"] is not None:
            one["accuracies"].append(point["accuracy"])
    for one in found.values():
        one["accuracy"] = float(np.mean(one["accuracies"])) if one["accuracies"] else None
    return list(found.values())


def table(points: Sequence[Point]) -> str:
    """All points in Markdown, by layer."""
    lines = [
        "| layer | privatizer | accuracy | seeds | survival | EP nearest | EP strongest | strongest | EP unseen |"
        " disclosed | class |",
        "|--:|---|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for p in sorted(together(points), key=lambda p: (p["layer"], p["privatizer"], -(p.get("eta") or 0))):
        recovered, accuracies = p["recovered"], p["accuracies"]
        strongest = max(recovered, key=recovered.__getitem__, default="")
        near = f"{1 - recovered['nearest neighbour']:.3f}" if recovered else "-"
        best = f"{1 - recovered[strongest]:.3f}" if recovered else "-"
        survival = "-" if p["survival"] is None else f"{p['survival']:.3f}"
        mean = f"{p['accuracy']:.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})" if accuracies else "-"
        cells = [p["layer"], label(p), mean, len(accuracies), survival, near, best, strongest or "-"]
        guessed = "-" if p["attribute"] is None else f"{p['attribute']:.3f}"
        unseen = "-" if p["baseline"] is None else f"{1 - p['baseline']:.3f}"
        lines.append("| " + " | ".join(map(str, [*cells, unseen, f"{p['disclosed']:.3f}", guessed])) + " |")
    return "\n".join(lines) + "\n"


COLOURS = dict(enumerate(("#1f77b4", "#8c564b", "#ff7f0e", "#e377c2", "#2ca02c", "#d62728", "#9467bd")))
WIDTH, HEIGHT, MARGIN = 720, 440, 50
LEGEND = 240
"""Width of the column beside the plot that names the points, which lie close to one another."""


def plot(points: Sequence[Point]) -> str:
    """Accuracy against empirical privacy as SVG: open marks for the nearest neighbour, filled for the strongest."""
    points = [p for p in together(points) if p["recovered"] and p["accuracies"]]
    points.sort(key=lambda p: (p["layer"], -p["accuracy"]))
    low = min((p["accuracy"] for p in points), default=0.0) - 0.02
    high = max((p["accuracy"] for p in points), default=1.0) + 0.02

    def x(privacy: float) -> float:
        return MARGIN + privacy * (WIDTH - 2 * MARGIN)

    def y(accuracy: float) -> float:
        return HEIGHT - MARGIN - (accuracy - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [f'<rect width="{WIDTH + LEGEND}" height="{HEIGHT}" fill="white"/>']
    for tick in range(11):
        parts.append(f'<text x="{x(tick / 10):.0f}" y="{HEIGHT - 30}" text-anchor="middle">{tick / 10:g}</text>')
    for value, words in round_ticks(100 * low, 100 * high, 8):
        parts.append(f'<text x="{MARGIN - 6}" y="{y(value / 100) + 3:.0f}" text-anchor="end">{words}</text>')
    parts.append(f'<text x="10" y="{MARGIN - 30}">accuracy, %</text>')
    words = "empirical privacy (open: nearest neighbour; filled: strongest attack); colour: cut"
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 10}">{words}</text>')
    for number, p in enumerate(points):
        near, best = 1 - p["recovered"]["nearest neighbour"], 1 - max(p["recovered"].values())
        colour, height, letter = COLOURS[p["layer"]], y(p["accuracy"]), chr(ord("a") + number)
        parts.append(f'<path d="M{x(near):.1f} {height:.1f}H{x(best):.1f}" stroke="{colour}" opacity="0.4"/>')
        parts.append(f'<circle cx="{x(near):.1f}" cy="{height:.1f}" r="4" stroke="{colour}" fill="none"/>')
        parts.append(f'<circle cx="{x(best):.1f}" cy="{height:.1f}" r="4" fill="{colour}"/>')
        beside = x(best) + (-6 if near > best else 6)
        anchor = "end" if near > best else "start"
        parts.append(f'<text x="{beside:.1f}" y="{height + 3:.1f}" text-anchor="{anchor}">{letter}</text>')
        told = f"{letter}  cut {p['layer']}: {label(p)}, {100 * p['accuracy']:.1f} %"
        parts.append(f'<text x="{WIDTH - 20}" y="{MARGIN + 16 * number}" fill="{colour}">{told}</text>')
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEGEND}" height="{HEIGHT}" font-size="10">'
    return f"{head}\n{body}\n</svg>\n"


def throughput(arguments: argparse.Namespace, rounds: int = 9) -> list[float]:
    """Plain forward over the customer's work, sorted: 1 would mean that privatizing costs nothing.

    The customer's work is all from the tokens to the files that leave: bottom, noise, packing, checksums, writing.
    """
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments.texts = 512
        write_data(arguments, folder)
        setting = {"layer": 2, "privatizer": "dx_hidden", "eta": 10.0, "labels": "kept", "label_epsilon": 1.0}
        made = config(setting, folder, arguments)
        bottom, tokenizer = load_bottom(made)
        customer, data = Customer(made, bottom, tokenizer, SecureNoise()), load_dataset_for(made, tokenizer, "train")
        customer.settle(data)
        pieces = np.arange(512).reshape(2, 256)
        for number in range(rounds):
            begun = time.process_time()
            for chosen in pieces:
                order = chosen[np.argsort(data.examples.lengths[chosen], kind="stable")]
                for some in order.reshape(-1, 32):
                    batch = data.examples.collate(some, 0)
                    batch.pop("labels")
                    bottom.hidden(batch)
            between = time.process_time()
            Outbox.fill(
                folder / f"out{number}", customer.agreement, {}, [256, 256],
                lambda i: customer.query(data.examples, pieces[i]),
            )  # fmt: skip
            ratios.append((between - begun) / (time.process_time() - between))
    return sorted(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", required=True)
    parser.add_argument("--data", choices=sorted(LABELS), default="sst2")
    parser.add_argument("--out", type=Path, default=Path("runs/split"))
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=872)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2, help="0: points are attacked and not trained")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--attackers", type=int, default=1000, help="texts that they know; 0: nothing is attacked")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--searched", type=int, default=40, help="texts for the searches; 0: none of them")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 0, 2])
    parser.add_argument("--point", type=json.loads, action="append", help="one point instead of the grid, as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gather", type=Path, nargs="+", help="folders of earlier runs, whose points are put together")
    parser.add_argument("--throughput", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.throughput:
        print("plain forward over the customer's work:", " ".join(f"{r:.2f}" for r in throughput(arguments)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.gather:
        write(arguments.out, [point for folder in arguments.gather for point in stored(folder)])
        return
    run(arguments, arguments.point or [point for layer in arguments.layers for point in grid(layer)])


def stored(folder: Path) -> list[Point]:
    """The points that a run has written."""
    path = folder / "points.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, points: Sequence[Point]) -> None:
    """Table and plot."""
    (folder / "table.md").write_text(table(points), encoding="utf-8")
    (folder / "split.svg").write_text(plot(points), encoding="utf-8")


def run(arguments: argparse.Namespace, wanted: Sequence[Point]) -> None:
    """Measures the points that are not in the file yet, and writes table and plot of all that are."""
    points = stored(arguments.out)
    bottoms: dict[int, tuple[Any, Any]] = {}
    for point, seed in [(point, seed) for point in wanted for seed in arguments.seeds][len(points) :]:
        if point["layer"] not in bottoms:
            bottom, tokenizer = load_bottom(config(point, arguments.out, arguments))
            bottoms = {point["layer"]: (Remembered(bottom), tokenizer)}
        points.append(measure(point, seed, *bottoms[point["layer"]], arguments))
        with open(arguments.out / "points.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(points[-1]) + "\n")
        print(json.dumps(points[-1]), flush=True)
        write(arguments.out, points)
    print(table(points))


if __name__ == "__main__":
    main()
