"""Split runs: accuracy against empirical privacy, over privatizers, depths and noise.

python -m benchmarks.split --model <folder of all-MiniLM-L6-v2> --train train.tsv --eval dev.tsv --out <folder>

The file has columns `sentence` and `label`. Each point trains the top with LoRA on what was sent, scores privatized
queries, and attacks what was sent with everything in sotto/split. Points are written as they are done, so a broken run
goes on. `points.jsonl`, a table in Markdown and a plot come out.

With `--throughput` instead: what a customer does for 512 texts (the bottom of two blocks, noise, packing), against the
plain forward pass of that bottom on the same batches, in turn, in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sotto.auditing.split import audit_split
from sotto.config import Config
from sotto.split.simulate import simulate

Point = dict[str, Any]

SELECTED = {"exempt": "selected", "exempt_epsilon": 2.0, "exempt_share": 0.005}
GRID: list[Point] = [
    {"privatizer": "none", "layer": 0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 100.0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 100.0, **SELECTED},
    {"privatizer": "none", "layer": 4},
    {"privatizer": "dx_hidden", "layer": 4, "eta": 8.0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 60.0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 60.0, **SELECTED},
    {"privatizer": "dx_hidden", "layer": 4, "eta": 4.0},
    {"privatizer": "none", "layer": 2},
    {"privatizer": "dx_hidden", "layer": 2, "eta": 8.0},
    {"privatizer": "gaussian_pooled", "layer": 4, "epsilon": 8.0, "clip_norm": 4.0},
    {"privatizer": "dx_hidden", "layer": 2, "eta": 4.0},
    {"privatizer": "dx_hidden", "layer": 4, "eta": 2.0},
    {"privatizer": "dx_hidden", "layer": 0, "eta": 8.0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 140.0},
    {"privatizer": "dx_tokens", "layer": 0, "eta": 30.0},
]


def config(point: Point, folder: Path, arguments: argparse.Namespace) -> Config:
    """The recipe of one point."""
    return Config.from_dict(
        {
            "model": {"name": arguments.model, "pooling": "mean"},
            "data": {
                "train": str(folder / "train.tsv"),
                "eval": str(folder / "eval.tsv"),
                "text": "sentence",
                "label": "label",
                "labels": arguments.labels,
                "max_length": 64,
            },
            "privacy": {"unit": "record", "num_units": arguments.texts, "epsilon": "none"},
            "method": {"train": "lora"},
            "run": {"expected_batch_size": 32, "epochs": arguments.epochs, "learning_rate": 1e-3},
            "output": {"dir": str(folder / "runs"), "export": "none"},
            "setting": {"kind": "split", **point},
        }
    )


def sample(source: str, target: Path, count: int) -> None:
    """The first `count` rows of a TSV file in an order that is always the same."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    order = np.random.default_rng(0).permutation(len(rows) - 1)[:count] + 1
    with open(target, "w", encoding="utf-8", newline="") as file:
        file.writelines("\t".join(rows[i]) + "\n" for i in [0, *order])


def measure(point: Point, arguments: argparse.Namespace) -> Point:
    """Trains, scores and attacks one point."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample(arguments.train, folder / "train.tsv", arguments.texts)
        sample(arguments.eval, folder / "eval.tsv", arguments.queries)
        made = config(point, folder, arguments)
        run = simulate(made)
        meaning = run.facts.get("meaning") or {}
        report = audit_split(made, arguments.attackers, arguments.passes)
    return {
        **point,
        "accuracy": run.accuracy,
        "survival": meaning.get("survival"),
        "recovered": report.recovered,
        "disclosed": report.exempt,
        "attribute": report.attribute,
        "seconds": round(time.perf_counter() - start, 1),
        "texts": arguments.texts,
    }


def label(point: Point) -> str:
    """A point's name in table and plot."""
    amount = (
        f" eta {point['eta']:g}" if "eta" in point else f" epsilon {point['epsilon']:g}" if "epsilon" in point else ""
    )
    return f"{point['privatizer']}{amount}{' + words' if point.get('exempt_share') else ''}"


def table(points: Sequence[Point]) -> str:
    """All points in Markdown, by layer."""
    lines = [
        "| layer | privatizer | accuracy | survival | EP nearest | EP strongest | strongest | disclosed | class |",
        "|--:|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for p in sorted(points, key=lambda p: (p["layer"], p["privatizer"], -(p.get("eta") or 0))):
        recovered = p["recovered"]
        strongest = max(recovered, key=recovered.__getitem__, default="")
        near = f"{1 - recovered['nearest neighbour']:.3f}" if recovered else "-"
        best = f"{1 - recovered[strongest]:.3f}" if recovered else "-"
        survival = "-" if p["survival"] is None else f"{p['survival']:.3f}"
        cells = [p["layer"], label(p), f"{p['accuracy']:.3f}", survival, near, best, strongest or "-"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{p['disclosed']:.3f}", f"{p['attribute']:.3f}"])) + " |")
    return "\n".join(lines) + "\n"


COLOURS = {0: "#1f77b4", 2: "#ff7f0e", 4: "#2ca02c"}
WIDTH, HEIGHT, MARGIN = 720, 440, 50


def plot(points: Sequence[Point]) -> str:
    """Accuracy against empirical privacy as SVG: open marks for the nearest neighbour, filled for the strongest."""
    low = min(p["accuracy"] for p in points) - 0.02
    high = max(p["accuracy"] for p in points) + 0.02

    def x(privacy: float) -> float:
        return MARGIN + privacy * (WIDTH - 2 * MARGIN)

    def y(accuracy: float) -> float:
        return HEIGHT - MARGIN - (accuracy - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(11):
        parts.append(f'<text x="{x(tick / 10):.0f}" y="{HEIGHT - 30}" text-anchor="middle">{tick / 10:g}</text>')
        value = low + tick / 10 * (high - low)
        parts.append(f'<text x="{MARGIN - 6}" y="{y(value):.0f}" text-anchor="end">{value:.2f}</text>')
    words = "empirical privacy (open: nearest neighbour; filled: strongest attack), against accuracy; colour: layer"
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 10}">{words}</text>')
    for p in points:
        if not p["recovered"]:
            continue
        near, best = 1 - p["recovered"]["nearest neighbour"], 1 - max(p["recovered"].values())
        colour, height = COLOURS[p["layer"]], y(p["accuracy"])
        parts.append(f'<path d="M{x(near):.1f} {height:.1f}H{x(best):.1f}" stroke="{colour}" opacity="0.4"/>')
        parts.append(f'<circle cx="{x(near):.1f}" cy="{height:.1f}" r="4" stroke="{colour}" fill="none"/>')
        parts.append(f'<circle cx="{x(best):.1f}" cy="{height:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x(best) + 6:.1f}" y="{height - 4:.1f}">{p["layer"]}: {label(p)}</text>')
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="10">'
    return f"{head}\n{body}\n</svg>\n"


def throughput(arguments: argparse.Namespace, rounds: int = 9) -> list[float]:
    """Plain forward over the customer's work, sorted: 1 would mean that privatizing costs nothing."""
    import torch

    from sotto.data.load import load_dataset_for
    from sotto.privacy.noise import SecureNoise
    from sotto.split.customer import Customer, load_bottom

    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample(arguments.train, folder / "train.tsv", 512)
        arguments.texts = 512
        made = config({"layer": 2, "privatizer": "dx_hidden", "eta": 10.0}, folder, arguments)
        bottom, tokenizer = load_bottom(made)
        customer, data = Customer(made, bottom, tokenizer, SecureNoise()), load_dataset_for(made, tokenizer, "train")
        customer.settle(data)
        rows = np.arange(512)
        order = rows[np.argsort(data.examples.lengths[rows], kind="stable")]
        for _ in range(rounds):
            begun = time.process_time()
            for start in range(0, 512, 32):
                batch = data.examples.collate(order[start : start + 32], 0)
                batch.pop("labels")
                bottom.hidden(batch)
            between = time.process_time()
            customer.query(data.examples, rows)
            ratios.append((between - begun) / (time.process_time() - between))
    return sorted(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/split"))
    parser.add_argument("--labels", nargs="+", default=["0", "1"])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=872)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--attackers", type=int, default=1000)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--points", type=int, default=len(GRID))
    parser.add_argument("--throughput", action="store_true")
    arguments = parser.parse_args()
    if arguments.throughput:
        print("plain forward over the customer's work:", " ".join(f"{r:.2f}" for r in throughput(arguments)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / "points.jsonl"
    points = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    for point in GRID[len(points) : arguments.points]:
        points.append(measure(point, arguments))
        with open(stored, "a", encoding="utf-8") as file:
            file.write(json.dumps(points[-1]) + "\n")
        print(json.dumps(points[-1]), flush=True)
        (arguments.out / "table.md").write_text(table(points), encoding="utf-8")
    (arguments.out / "split.svg").write_text(plot(points), encoding="utf-8")
    print(table(points))


if __name__ == "__main__":
    main()
