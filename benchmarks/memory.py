"""The memory that `sotto memory` predicts, against the peak of a run that really happens.

    python benchmarks/memory.py [--case bert-full-book_keeping-8 ...] [--device cuda] [--threads 1]

Every case is a whole private run of three steps on invented text, in a process of its own: `session.start`, the check
of the first batch, and the loop. What is measured is the high-water mark from the moment at which the model is built
until the last update, above what was there then. On CPU that is the resident set's, with every block above 64 KiB
returned to the system at once (MALLOC_MMAP_THRESHOLD_), so that it counts live tensors and not the allocator's
reserves; on CUDA it is `torch.cuda.max_memory_allocated`. The prediction is `memory_forecast`'s, made in another
process from config.json alone, less the bytes of the built model. Before anything is measured, a run of a tiny model
brings in the code of libraries, which is not the model's memory.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import HONEST_MALLOC, Meter

CASES = [f"bert-{t}-{g}-{b}" for t in ("full", "lora", "bitfit") for g in ("book_keeping", "ghost") for b in (4, 16)]
CASES += ["bert-full-per_example-4", "bert-lora-per_example-4", "bert-full-layerwise-16", "bert-side-book_keeping-16"]
CASES += ["bert-reversible-book_keeping-16"]
CASES += [f"gpt2-{t}-book_keeping-{b}" for t in ("full", "lora", "bitfit") for b in (2, 6)] + ["gpt2-full-ghost-6"]
LENGTH = 128


def save(kind: str, folder: Path, tiny: bool) -> None:
    """A model with random weights, and a tokenizer whose every word is one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    if kind == "bert":
        sizes: Any = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96} if tiny else {
            "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}  # fmt: skip
        model: Any = BertForSequenceClassification(BertConfig(num_attention_heads=12, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2) if tiny else GPT2Config())
    model.save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>"] + [f"w{i}" for i in range(model.config.vocab_size - 3)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **special).save_pretrained(folder)


def recipe(case: str, folder: Path, device: str, tiny: bool = False) -> dict[str, Any]:
    """Writes the data of a case and returns its configuration."""
    kind, train, gradient, size = case.split("-")
    model = folder / (f"{kind}-tiny" if tiny else kind)
    if not model.exists():
        save(kind, model, tiny)
    draw = random.Random(0)
    with open(folder / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for row in range(24 * int(size)):
            table.writerow([" ".join(f"w{draw.randrange(30_000)}" for _ in range(LENGTH)), "ab"[row % 2]])
    data: dict[str, Any] = {"train": str(folder / "data.csv"), "text": "text", "max_length": LENGTH}
    if kind == "bert":
        data |= {"label": "label", "labels": ["a", "b"]}
    return {
        "model": {"name": str(model)},
        "data": data,
        "privacy": {"unit": "record", "num_units": 24 * int(size), "epsilon": 8, "dataset": "benchmark"},
        "method": {"train": train, "gradient": gradient},
        "run": {
            "expected_batch_size": 2 * int(size), "steps": 3, "microbatch_size": int(size), "device": device,
            "checkpoint_every": 1000,
        },
        "output": {"dir": str(folder / "runs"), "export": "none"},
    }  # fmt: skip


def measured(case: str, folder: Path, device: str) -> dict[str, float]:
    """The peak of a run above its built model, in bytes."""
    from sotto import session as sessions
    from sotto import training
    from sotto.config import Config

    meters: list[Meter] = []
    peaks: list[float] = []
    check = sessions.check_gradients

    def first_batch(session: Any) -> None:
        for parameter in session.model.parameters():
            parameter.sum()  # weights are mapped from their file, and in memory only once they were read
        gc.collect()
        meters.append(Meter(device))
        meters[-1]._reset_peak()
        check(session)

    sessions.check_gradients = first_batch
    training.save_checkpoint = lambda session: peaks.append(meters[-1]._peak())  # before anything is written
    for tiny in (True, False):
        session = sessions.start(Config.from_dict(recipe(case, folder, device, tiny)), "benchmark")
        with session.held:
            training.train_loop(session, _Silent())  # type: ignore[arg-type]
        del session
    return {"peak": peaks[-1] - meters[-1].base}


class _Silent:
    def log(self, *values: Any) -> None:
        return None


def predicted(case: str, folder: Path, device: str) -> dict[str, float]:
    """The prediction, above the built model."""
    import time

    import torch

    from sotto.config import Config
    from sotto.memory_forecast import MemoryLaw

    begun = time.perf_counter()
    found = MemoryLaw(Config.from_dict(recipe(case, folder, device)), torch.device(device)).at(int(case.split("-")[3]))
    model = found.parts["weights"] + found.parts["trainables"]
    return {"peak": found.peak - model, "seconds": time.perf_counter() - begun}


def child(case: str, task: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "SOTTO_LEDGER_DIR": str(folder / "ledger"),
    }
    command = [sys.executable, __file__, "--child", task, str(folder), "--case", case, "--device", args.device]
    done = subprocess.run(command, env=env | HONEST_MALLOC, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task, folder = args.child
        make = {"measured": measured, "predicted": predicted}[task]
        print(json.dumps(make(args.case[0], Path(folder), args.device)))
        return
    print("| model | trained | gradient | microbatch | predicted MiB | measured MiB | error | seconds to predict |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case or CASES:
            said, was = (child(case, task, Path(folder), args) for task in ("predicted", "measured"))
            error = said["peak"] / was["peak"] - 1
            print(
                f"| {' | '.join(case.split('-'))} | {said['peak'] / 2**20:.0f} | {was['peak'] / 2**20:.0f} "
                f"| {error:+.1%} | {said['seconds']:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
