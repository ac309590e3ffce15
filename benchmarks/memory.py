"""The memory that `sotto memory` predicts, against the peak of a run that really happens.

    python benchmarks/memory.py [--case bert-full-book_keeping-8 ...] [--device cuda] [--threads 1] [--workers 8]

Every case is a whole private run of three steps on invented text, in a process of its own: `session.start`, the check
of the first batch, and the loop. What is measured is the high-water mark from the moment at which the model is built
until the last update, above what was there then. On CPU that is the resident set's, with every block above 64 KiB
returned to the system at once (MALLOC_MMAP_THRESHOLD_), so that it counts live tensors and not the allocator's
reserves; on CUDA it is `torch.cuda.max_memory_allocated`, above the work buffers of the matrix libraries too. The
prediction is `memory_forecast`'s, made in another process from config.json alone, less the bytes of the built model;
`--workers` are at work on predictions at once, while cases are measured one after another.
Before anything is measured, a run of a tiny model brings in the code of libraries, which is not the model's memory.
"""

from __future__ import annotations

import argparse
import csv
import gc
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import HONEST_MALLOC, Meter

ENGINE = ("book_keeping", "ghost", "layerwise")
CASES = [f"bert-{t}-{g}-{b}" for t in ("full", "lora", "bitfit") for g in ("book_keeping", "ghost") for b in (4, 16)]
CASES += ["bert-full-per_example-4", "bert-lora-per_example-4", "bert-full-layerwise-16", "bert-side-book_keeping-16"]
CASES += ["bert-reversible-book_keeping-16", "bert-head-book_keeping-16", "bert-lora-zeroth_order-16"]
CASES += [f"gpt2-{t}-book_keeping-{b}" for t in ("full", "lora", "bitfit") for b in (2, 6)] + ["gpt2-full-ghost-6"]
CASES += [f"gpt2-{t}-{g}-4" for t in ("side", "reversible") for g in ENGINE]
CASES += [f"llama-{t}-{g}-4" for t in ("full", "lora", "side", "reversible") for g in ENGINE]
CASES += ["llama-lora-per_example-2", "llama-full-book_keeping-2-256", "llama-lora-zeroth_order-4"]
CASES += [f"roberta-{t}-book_keeping-4" for t in ("full", "lora", "bitfit", "head", "side", "reversible")]
CASES += ["roberta-lora-book_keeping-16-32", "roberta-lora-book_keeping-2-512"]
CASES += [f"{m}-{t}-book_keeping-4" for m in ("t5", "bart") for t in ("full", "lora", "side")]
CASES += [f"roberta-{t}-book_keeping-4-128-{kind}" for t in ("lora", "side") for kind in ("bfloat16", "int8", "int4")]
DECODERS = ("gpt2", "llama")
LENGTH = 128
"""Tokens per example where a case does not say another number. What may follow it is `method.frozen_weights`."""
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bert": ({"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12},
             {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}),
    "roberta": ({"vocab_size": 50265, "max_position_embeddings": 514, "num_hidden_layers": 4},
                {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
                 "max_position_embeddings": 514}),
    "gpt2": ({"n_layer": 4}, {"n_embd": 48, "n_layer": 2}),
    "llama": ({"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
               "intermediate_size": 1408},
              {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 96}),
    "t5": ({"num_layers": 2}, {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}),
    "bart": ({"d_model": 512, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 2048,
              "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
             {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
              "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
}  # fmt: skip
"""What differs from the defaults of the model's configuration: of the case, and of the tiny model that warms up."""


def save(kind: str, folder: Path, tiny: bool) -> None:
    """A model with random weights, and a tokenizer whose every word is one token and whose texts have an end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    special_ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 0}
    config = CONFIG_MAPPING[kind](**special_ids, **SIZES[kind][tiny])
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>"] + [f"w{i}" for i in range(config.vocab_size - 3)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special).save_pretrained(folder)


def recipe(case: str, folder: Path, device: str, tiny: bool = False) -> dict[str, Any]:
    """Writes the data of a case and returns its configuration."""
    kind, train, gradient, size, *rest = case.split("-")
    length = int(rest[0]) if rest else LENGTH
    model = folder / (f"{kind}-tiny" if tiny else kind)
    if not model.exists():
        save(kind, model, tiny)
    draw = random.Random(0)
    with open(folder / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for row in range(24 * int(size)):
            table.writerow([" ".join(f"w{draw.randrange(30_000)}" for _ in range(length)), "ab"[row % 2]])
    data: dict[str, Any] = {"train": str(folder / "data.csv"), "text": "text", "max_length": length}
    if kind not in DECODERS:
        data |= {"label": "label", "labels": ["a", "b"]}
    return {
        "model": {"name": str(model)},
        "data": data,
        "privacy": {"unit": "record", "num_units": 24 * int(size), "epsilon": 8, "dataset": "benchmark"},
        "method": {"train": train, "gradient": gradient, "frozen_weights": rest[1] if rest[1:] else "float32"},
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

    sessions.check_gradients, save = first_batch, training.save_checkpoint
    training.save_checkpoint = lambda session: peaks.append(meters[-1]._peak())  # before anything is written
    try:
        for tiny in (True, False):
            session = sessions.start(Config.from_dict(recipe(case, folder, device, tiny)), "benchmark")
            with session.held:
                training.train_loop(session, _Silent())  # type: ignore[arg-type]
            del session
    finally:
        sessions.check_gradients, training.save_checkpoint = check, save
    return {"peak": peaks[-1] - meters[-1].base}


class _Silent:
    def log(self, *values: Any) -> None:
        return None


def predicted(case: str, folder: Path, device: str) -> dict[str, float]:
    """The prediction, above the built model."""
    import torch

    from sotto.config import Config
    from sotto.memory_forecast import MemoryLaw

    begun = time.process_time()
    found = MemoryLaw(Config.from_dict(recipe(case, folder, device)), torch.device(device)).at(int(case.split("-")[3]))
    model = found.parts["weights"] + found.parts["trainables"]
    return {"peak": found.peak - model, "seconds": time.process_time() - begun}


def alone(case: str, folder: Path, device: str) -> dict[str, float]:
    """Measures a case in a fork of this process, which has loaded the libraries and done nothing with them.

    On CUDA, which does not survive a fork, in this process: the allocator tells apart what each case takes.
    """
    if device.startswith("cuda"):
        return measured(case, folder, device)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measured, (case, folder, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    wanted = HONEST_MALLOC | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    import sotto.memory_forecast
    import sotto.training  # noqa: F401

    print("| model | trained | gradient | microbatch | predicted MiB | measured MiB | error | CPU s to predict |")
    print("|---|---|---|--:|--:|--:|--:|--:|", flush=True)
    cases = args.case or CASES
    with tempfile.TemporaryDirectory() as place, multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        os.environ["SOTTO_LEDGER_DIR"] = f"{place}/ledger"
        folders = [Path(place) / which / case for case in cases for which in ("predicted", "measured")]
        for folder in folders:
            folder.mkdir(parents=True)
        asked = [pool.apply_async(predicted, (c, f, args.device)) for c, f in zip(cases, folders[::2], strict=True)]
        for case, folder, answer in zip(cases, folders[1::2], asked, strict=True):
            was, said = alone(case, folder, args.device), answer.get()
            shutil.rmtree(folder)
            error = said["peak"] / was["peak"] - 1
            print(
                f"| {' | '.join(case.split('-'))} | {said['peak'] / 2**20:.0f} | {was['peak'] / 2**20:.0f} "
                f"| {error:+.1%} | {said['seconds']:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
