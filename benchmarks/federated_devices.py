"""What one user's part in a round costs its device: memory above the model, time, and bytes that are sent.

    python benchmarks/federated_devices.py --model M --train sst2/train.tsv --eval sst2/dev.tsv

The user has `--examples` sentences of SST-2; the upper factors of adapters of rank 4 are trained (FFA-LoRA). Every row
runs in a process of its own, with an allocator that gives memory back, and its first answer is not counted. `losses`
and `derivatives` look along 16 directions, and so do users of a part; of six parts it is the lowest or the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine import HONEST_MALLOC, Meter

ROWS = ("training", "losses", "derivatives", "lowest part", "highest part", "with 30,522 rows", "with 1,000 rows")
PARTS = 6


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers of one user to the orders of two rounds."""
    import torch
    from federated import configuration, message_bytes, write_tables

    from sotto import session as sessions

    row = arguments.child
    variant = "spry" if "part" in row else "rows" if "rows" in row else row
    arguments.embedding_rows = int(row.split()[1].replace(",", "")) if variant == "rows" else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(arguments, folder, write_tables(arguments, folder), variant)
        engine: Any = sessions.load_parts(config, "key").engine
    client = engine.carrier.__closure__[0].cell_contents
    order = engine.order(0)
    order = type(order)(0, order.clip_norm, {name: w.clone() for name, w in order.weights.items()})
    number = 0
    if "part" in row:
        wanted = 0 if row == "lowest part" else PARTS - 1
        number = next(n for n in range(1000) if engine.directions.part_for(0, n) == wanted)
    found, meter = [], Meter("cpu")
    for _ in range(1 + arguments.repeats):
        found.append(meter.step(lambda: client.answer(order, 0, number)))
    sent = client.answer(order, 0, number)
    return {
        "mebibytes": max(each["mebibytes"] for each in found[1:]),
        "seconds": min(each["cpu"] for each in found[1:]),
        "numbers": int(torch.numel(sent)),
        "bytes": message_bytes(sent),
    }


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **HONEST_MALLOC}
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", row], env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shared = {"data": "sst2", "users": 1000, "cohort": 100, "rounds": 10, "method": "lora", "epsilon": 8.0, "clip": 0.3,
              "rate": 1e-3, "local_rate": 0.1, "local_batch": arguments.examples, "look_clip": 1.0, "parts": PARTS,
              "latent": 64}  # fmt: skip
    for name, value in shared.items():
        setattr(arguments, name, value)
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    print(f"one user, {arguments.examples} examples, one thread\n")
    print("| what the device does | numbers sent | bytes sent | peak above the model, MiB | CPU seconds |")
    print("|---|--:|--:|--:|--:|")
    for row in ROWS:
        found = measured(row, arguments)
        print(f"| {row} | {found['numbers']:,} | {found['bytes']:,} | {found['mebibytes']:.1f} "
              f"| {found['seconds']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
