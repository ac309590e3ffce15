"""Runs a recipe with and without privacy on the same machine and prints one row for benchmarks/RESULTS.md.

    python benchmarks/recipes.py recipes/e2e.yaml [--set run.steps=50 ...]

A recipe without held-out data (shakespeare) gets a tenth of its units, chosen by a hash of their name.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import sotto
from sotto.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", choices=["private", "plain"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOTTO_LEDGER_DIR"] = f"{folder}/ledger"
        config = Config.load(args.recipe, [*args.set, f"output.dir={folder}/runs"])
        if config.data.eval is None and config.data.train.endswith(".jsonl"):
            config = hold_out(config, Path(folder))
        rows = {}
        if args.only != "plain":
            rows["private"] = one(config)
        if args.only != "private":
            rows["plain"] = one(config.with_overrides(["privacy.epsilon=none"]))
    print(f"{args.recipe.stem} | {datetime.date.today()} | {platform.machine()}, {os.cpu_count()} cores")
    for name, row in rows.items():
        print(f"  {name:<8} {json.dumps(row)}")


def one(config: Config) -> dict[str, object]:
    """Trains and scores once."""
    begun = time.perf_counter()
    run = sotto.train(config)
    seconds = time.perf_counter() - begun
    scores = sotto.evaluate(run.path)
    return {
        "epsilon": run.epsilon, "delta": config.privacy.delta, "steps": run.steps, "seconds": round(seconds),
        **{name: round(value, 4) for name, value in scores.items()},
    }  # fmt: skip


def hold_out(config: Config, folder: Path) -> Config:
    """Splits a JSON-lines file by unit into train and eval files."""
    kept, held = [], []
    for line in Path(config.data.train).read_text().splitlines():
        unit = str(json.loads(line)[config.privacy.unit])
        (held if hashlib.sha256(unit.encode()).digest()[0] % 10 == 0 else kept).append(line)
    for name, lines in (("train", kept), ("eval", held)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return config.with_overrides([
        f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl", f"privacy.num_units={len(kept)}",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
