"""Time and memory of one clipped step, as ratios to the non-private step of the same model in the same run.

    python benchmarks/engine.py [--case bert-128x16 ...] [--steps 5]

Every case runs in a process of its own. Time is CPU seconds of forward and backward, median of the steps after the
first (which also holds the engine's probe); memory is the high-water mark above the built model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

CASES = {
    "bert-128x16": ("bert", 128, 16, "full"),
    "gpt2-128x8": ("gpt2", 128, 8, "full"),
    "bert-lora-128x16": ("bert", 128, 16, "lora"),
}
ALGORITHMS = ("non_private", "book_keeping", "ghost")


def build(kind: str, trained: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config

    if kind == "bert":
        model = AutoModelForSequenceClassification.from_config(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                       hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        )  # fmt: skip
    else:
        model = AutoModelForCausalLM.from_config(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    if trained == "lora":
        from sotto.config import MethodSection
        from sotto.models.trainable import prepare

        model = prepare(model, MethodSection(train="lora"))
    return model.train()


def measure(case: str, algorithm: str, steps: int) -> dict[str, float]:
    """Runs in a child process."""
    import torch
    import torch.nn.functional as F

    import sotto

    kind, length, batch, trained = CASES[case]
    torch.set_num_threads(2)
    model = build(kind, trained)
    ids = torch.randint(5, 20_000, (batch, length))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def losses() -> torch.Tensor:
        logits = model(input_ids=ids).logits
        if logits.dim() == 2:
            return F.cross_entropy(logits, ids[:, 0] % 2, reduction="none")
        return (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            .view(batch, -1)
            .mean(1)
        )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = None if algorithm == "non_private" else sotto.attach(model, algorithm=algorithm)
    seconds = []
    for _ in range(steps + 1):
        begun = time.process_time()
        if engine is None:
            torch.autograd.grad(losses().sum(), parameters, allow_unused=True)
        else:
            engine.backward(losses())
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds[1:]), "mebibytes": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.steps)))
        return
    print("| case | algorithm | CPU seconds | time ratio | MiB above the model | memory ratio |")
    print("|---|---|--:|--:|--:|--:|")
    for case in args.case or CASES:
        base: dict[str, float] = {}
        for algorithm in ALGORITHMS:
            command = [sys.executable, __file__, "--steps", str(args.steps), "--child", case, algorithm]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found
            time_ratio, memory_ratio = (found[key] / base[key] for key in ("seconds", "mebibytes"))
            seconds, mebibytes = found["seconds"], found["mebibytes"]
            print(f"| {case} | {algorithm} | {seconds:.2f} | {time_ratio:.2f} | {mebibytes:.0f} | {memory_ratio:.2f} |")


if __name__ == "__main__":
    main()
