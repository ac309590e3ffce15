"""Side and reversible networks against adapters and full fine-tuning: peak memory above the model, and time.

    python benchmarks/memarc.py [--layers 24] [--shape B16] [--steps 2] [--row lora:book_keeping ...]

A RoBERTa-large-shaped classifier with random weights, T=128, measured as `benchmarks/engine.py` does: every row has a
process of its own, memory is the high-water mark of a step above the built model, time is a step's CPU seconds; ratios
are to the first row. A row is what is trained and the algorithm; `reversible_stored` names the streams.
"""

from __future__ import annotations

import argparse
import statistics

from engine import SHAPES, Child

ROWS = ("lora:book_keeping", "full:book_keeping", "bitfit:book_keeping", "side:book_keeping", "reversible:book_keeping",
        "reversible_stored:book_keeping")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="B16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--row", action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    names = args.row or list(ROWS)
    found: dict[str, dict[str, list[float]]] = {name: {"mebibytes": [], "cpu": [], "wall": []} for name in names}
    errors: dict[str, str] = {}
    for memory in (True, False):  # one process at a time where memory is measured: the machine may not hold them all
        for name in names:
            trained, algorithm = name.split(":")
            child = Child(f"roberta{args.layers}-{args.shape}-{trained}", algorithm, args, memory=memory)
            for step in range(1 + args.steps):
                taken = child.step()
                if taken is None:
                    errors[name] = child.error
                    break
                if step > 0:
                    for key in ("mebibytes",) if memory else ("cpu", "wall"):
                        found[name][key].append(taken[key])
            child.close()
    print(f"RoBERTa-large shape, {args.layers} layers, {args.shape}, T=128")
    print("| trained | algorithm | MiB above the model | ratio | CPU s a step | ratio |")
    print("|---|---|--:|--:|--:|--:|")
    base = {key: statistics.median(found[names[0]][key]) for key in ("mebibytes", "cpu")}
    for name in names:
        trained, algorithm = name.split(":")
        if name in errors:
            print(f"| {trained} | {algorithm} | {errors[name]} | | | |")
            continue
        peak, seconds = (statistics.median(found[name][key]) for key in ("mebibytes", "cpu"))
        print(f"| {trained} | {algorithm} | {peak:.0f} | {peak / base['mebibytes']:.2f} | {seconds:.1f} "
              f"| {seconds / base['cpu']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
