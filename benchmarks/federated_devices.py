"""What one user's part in a round costs its device: memory above the model, time, and bytes that are sent.

    python benchmarks/federated_devices.py --model M --train sst2/train.tsv --eval sst2/dev.tsv

The user has `--examples` sentences of SST-2; the upper factors of adapters of rank 4 are trained (FFA-LoRA). Each row
counts from after a first answer, when libraries have taken what they keep. `losses` and `derivatives` look along
`--probes` directions, and so do users of a part; of six parts it is the lowest or the highest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine import HONEST_MALLOC, Meter

ROWS = ("training", "losses", "derivatives", "lowest part", "highest part", "with 30,522 rows", "with 1,000 rows")
PARTS = 6


def device(row: str, arguments: argparse.Namespace) -> tuple[Any, Any, int]:
    """A client, an order, and the number of a user whom it is for."""
    from federated import configuration, write_tables

    from sotto import session as sessions

    variant = "spry" if "part" in row else "rows" if "rows" in row else row
    arguments.embedding_rows = int(row.split()[1].replace(",", "")) if variant == "rows" else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(arguments, folder, write_tables(arguments, folder), variant)
        if config.method.zeroth_order:
            method = config.method.model_copy(update={"zeroth_probes": arguments.probes})
            config = config.model_copy(update={"method": method})
        engine: Any = sessions.load_parts(config, "key").engine
    order = engine.order(0)
    order = type(order)(0, order.clip_norm, {name: w.clone() for name, w in order.weights.items()})
    number = 0
    if "part" in row:
        wanted = 0 if row == "lowest part" else PARTS - 1
        number = next(n for n in range(1000) if engine.directions.part_for(0, n) == wanted)
    return engine.carrier.__closure__[0].cell_contents, order, number


def measure(row: str, arguments: argparse.Namespace) -> str:
    from federated import message_bytes

    client, order, number = device(row, arguments)
    sent = client.answer(order, 0, number)
    meter = Meter("cpu")
    found = meter.step(lambda: client.answer(order, 0, number))
    return f"{len(sent):,} | {message_bytes(sent):,} | {found['mebibytes']:.1f} | {found['cpu']:.2f}"


def main() -> None:
    if HONEST_MALLOC.items() - os.environ.items():  # which an allocator reads once, when it begins
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HONEST_MALLOC)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--probes", type=int, default=16)
    arguments = parser.parse_args()
    shared = {"data": "sst2", "users": 100, "cohort": 50, "rounds": 10, "method": "lora", "epsilon": 8.0, "clip": 0.3,
              "rate": 1e-3, "local_rate": 0.1, "local_batch": arguments.examples, "look_clip": 1.0, "parts": PARTS,
              "latent": 64}  # fmt: skip
    for name, value in shared.items():
        setattr(arguments, name, value)
    print(f"one user, {arguments.examples} examples, {arguments.probes} directions, one thread\n")
    print("| what the device does | numbers sent | bytes sent | peak of an answer, MiB | CPU seconds |")
    print("|---|--:|--:|--:|--:|")
    for row in ROWS:
        print(f"| {row} | {measure(row, arguments)} |", flush=True)


if __name__ == "__main__":
    main()
