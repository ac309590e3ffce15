"""Side and reversible networks against adapters and full fine-tuning: peak memory above the model, and time.

    python benchmarks/memarc.py [--model roberta] [--layers 24] [--shape B16] [--steps 2] [--row lora:book_keeping ...]

A RoBERTa-large-shaped classifier (or, with `gpt2l`, a GPT-2-large-shaped language model) with random weights, T=128,
measured as `benchmarks/engine.py` does: every row has a process of its own, memory is the high-water mark of a step
above the built model, time is a step's CPU seconds (on CUDA the device's); ratios are to the first row. A row is what
is trained and the algorithm; `reversible_stored` names the streams, `lora_int8` how frozen weights are kept. With
`--predicted` nothing is run: it prints what `sotto memory` says of the same shape, for models that a machine cannot
hold.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine import SHAPES, child, options

TITLES = {"roberta": "RoBERTa-large shape", "gpt2l": "GPT-2-large shape"}

ROWS = ("lora:book_keeping", "full:book_keeping", "bitfit:book_keeping", "side:book_keeping", "reversible:book_keeping",
        "reversible_stored:book_keeping")  # fmt: skip


def predict(kind: str, layers: int, batch: int, names: Sequence[str]) -> None:
    """The forecast of each row, from a config.json alone."""
    import torch
    from transformers import GPT2Config, RobertaConfig

    from sotto.config import Config
    from sotto.memory_forecast import MemoryLaw

    shape = {
        "roberta": RobertaConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16,
                                 intermediate_size=4096, vocab_size=50265, max_position_embeddings=514),
        "gpt2l": GPT2Config(n_embd=1280, n_head=20, n_layer=layers),
    }[kind]  # fmt: skip
    data = {"train": "none.csv", "text": "text", "max_length": 128}
    data |= {"label": "label", "labels": ["a", "b"]} if kind == "roberta" else {}
    print("| trained | algorithm | weights, MiB | peak of a run above them, MiB | ratio |")
    print("|---|---|--:|--:|--:|", flush=True)
    base = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(shape.to_json_string(use_diff=False))
        for name in names:
            trained, algorithm = name.split(":")
            method = options(trained) | {"gradient": algorithm}
            values = {"model": {"name": folder}, "data": data, "method": method,
                      "privacy": {"unit": "record", "num_units": 1000, "epsilon": 8},
                      "run": {"expected_batch_size": batch, "steps": 3, "device": "cpu"}}  # fmt: skip
            parts = MemoryLaw(Config.from_dict(values), torch.device("cpu")).at(batch).parts
            weights = parts["weights"] + parts["trainables"]
            peak = sum(parts.values()) - weights
            base = base or peak
            print(f"| {trained} | {algorithm} | {weights / 2**20:.0f} | {peak / 2**20:.0f} | {peak / base:.2f} |",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TITLES, default="roberta")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="B16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--row", action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--predicted", action="store_true")
    args = parser.parse_args()
    names = args.row or list(ROWS)
    title = f"{TITLES[args.model]}, {args.layers} layers, {args.shape}, T={SHAPES[args.shape][0]}"
    if args.predicted:
        print(title)
        predict(args.model, args.layers, SHAPES[args.shape][1], names)
        return
    found: dict[str, dict[str, list[float]]] = {name: {"mebibytes": [], "cpu": [], "wall": []} for name in names}
    errors: dict[str, str] = {}
    inside = args.device.startswith("cuda")  # there a step's memory and its time are measured at once
    for memory in (True,) if inside else (True, False):  # one at a time: the machine may not hold them all
        for name in names:
            trained, algorithm = name.split(":")
            row = child(f"{args.model}{args.layers}-{args.shape}-{trained}", algorithm, args, memory=memory)
            for step in range(1 + args.steps):
                taken = row.step()
                if taken is None:
                    errors[name] = row.error
                    break
                if step > 0:
                    for key in taken if inside else ("mebibytes",) if memory else ("cpu", "wall"):
                        found[name][key].append(taken[key])
            row.close()
    print(title)
    print("| trained | algorithm | MiB above the model | ratio | s a step | ratio |")
    print("|---|---|--:|--:|--:|--:|")
    base = {key: statistics.median(found[names[0]][key]) for key in ("mebibytes", "cpu")}
    for name in names:
        trained, algorithm = name.split(":")
        if name in errors:
            print(f"| {trained} | {algorithm} | {errors[name]} | | | |")
            continue
        peak, seconds = (statistics.median(found[name][key]) for key in ("mebibytes", "cpu"))
        print(f"| {trained} | {algorithm} | {peak:.0f} | {peak / base['mebibytes']:.2f} | {seconds:.3g} "
              f"| {seconds / base['cpu']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
