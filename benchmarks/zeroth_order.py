"""Zeroth-order probes against plain forward passes: peak memory above the weights, and time.

    python benchmarks/zeroth_order.py [--shape opt-1.3b] [--batch 8] [--length 128] [--probes 1] [--probes 4]
                                      [--trained lora] [--law sphere] [--dtype bfloat16] [--device cuda] [--memory]

A causal model (or a classifier of RoBERTa's kind) with random weights, all of them trained; with `--trained lora`
adapters of rank 8 instead, with `low_rank` all weights along directions of rank 1. Directions are signs, several of
them orthogonal, if `--law` does not say another law (`sphere` is that of the preset dpzero, `gaussian` that of dpzo).
Each row has a process of its own.
Memory is the high-water mark of a step (probes and update) above the built model; time is CPU seconds (with several
threads those of a clock, on CUDA the device's), of the probes and of the whole step, against two plain forward passes
of the same batch (with the logits of all tokens, as the model's own loss takes them) for each direction, or one where
differences are centred (several directions); such a pass is timed beside each step.
`--shape narrow --batch 2 --length 8` shows what a pass takes before anything is computed.
`sides`: up to so many moved models in one pass, by the time of one after another, in turns with it. `top`: the last
layer's weights alone are trained; the time to compare is that of the frozen layers once and of the last one once or
twice for each direction. Weights in bfloat16 are probed and not updated, which a run refuses. `--memory`: no times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import HONEST_MALLOC, Meter

SHAPES: dict[str, dict[str, int]] = {
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192, "num_attention_heads": 32,
                 "vocab_size": 50272, "word_embed_proj_dim": 2048},
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
                 "vocab_size": 50272, "word_embed_proj_dim": 768},
    "narrow": {"hidden_size": 64, "num_hidden_layers": 24, "ffn_dim": 128, "num_attention_heads": 4,
               "vocab_size": 1000, "word_embed_proj_dim": 64},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12,
               "vocab_size": 30522, "max_position_embeddings": 514},
    "roberta-large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
                      "num_attention_heads": 16, "vocab_size": 50265, "max_position_embeddings": 514},
}  # fmt: skip


def build(shape: str) -> tuple[Any, str]:
    import torch
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    if shape in ("minilm", "roberta-large"):
        return RobertaForSequenceClassification(RobertaConfig(**SHAPES[shape], num_labels=2)).eval(), "classification"
    # Without keys and values of past tokens, as a run loads its model.
    return OPTForCausalLM(OPTConfig(**SHAPES[shape], use_cache=False)).eval(), "generation"


def child(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from sotto.allocator import keep_freed_memory
    from sotto.config import MethodSection, RunSection
    from sotto.gradients.clipping import Flat
    from sotto.losses import forward_losses, look_at_head
    from sotto.models.trainable import prepare
    from sotto.zeroth_order.directions import Directions
    from sotto.zeroth_order.engine import ZerothOrder
    from sotto.zeroth_order.law import Law
    from sotto.zeroth_order.probes import trainable
    from sotto.zeroth_order.release import NAME
    from sotto.zeroth_order.updates import Updates

    keep_freed_memory()  # as a run does; not where memory is measured, whose environment says otherwise
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(getattr(torch, args.dtype))  # built in that type: never twice in memory
    with torch.device(args.device):
        model, task = build(args.shape)
    torch.set_default_dtype(torch.float32)
    if args.trained == "lora":
        model = prepare(model, MethodSection(train="lora", lora_rank=8), 0)
    kind, _, count = args.child.partition(":")
    last = f".{SHAPES[args.shape]['num_hidden_layers'] - 1}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (not kind.startswith("top") or last in name))
        parameter.sum()
    ids = torch.randint(5, 1000, (args.batch, args.length), device=args.device)
    labels = ids if task == "generation" else torch.zeros(args.batch, dtype=torch.long, device=args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def forward(inputs: Any) -> torch.Tensor:
        return forward_losses(model, dict(inputs), task, in_rows=True)

    def repeated(inputs: Any) -> torch.Tensor:
        return forward_losses(model, dict(inputs), task)

    def plain() -> None:
        """The logits of all tokens, and one loss over them, as the model's own loss does it."""
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
            wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if task == "generation" else labels
            torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), wanted.flatten(), reduction="none")

    if task == "generation":
        look_at_head(model, torch.device(args.device))

    update: Any = lambda: None  # noqa: E731
    if kind == "plain":
        run: Any = plain
    else:
        shapes = {name: p.shape for name, p in trainable(model).items()}
        low_rank = Law("rademacher", 1)
        law = low_rank if args.trained == "low_rank" else Law("orthogonal" if int(count) > 1 else "rademacher")
        law = Law(args.law) if args.law else law
        directions = Directions("00" * 16, shapes, int(count), law, centred=int(count) > 1)
        alone = ZerothOrder(model, forward, directions, Flat(1.0))
        engine = ZerothOrder(model, repeated, directions, Flat(1.0), sides=args.sides) if kind == "sides" else alone
        run = lambda: engine.clipped_sum(batch, None, 0)  # noqa: E731
        if kind == "sides":
            plain = lambda: alone.clipped_sum(batch, None, 0)  # noqa: E731
    if kind != "plain" and args.dtype == "float32":
        asked = RunSection(expected_batch_size=args.batch, steps=1000, optimizer="sgd", learning_rate=1e-6)
        updates = Updates(engine.parameters, directions, asked, 1000)
        steps = iter(range(1 << 30))
        run = lambda: engine.clipped_sum(batch, None, len(updates.log))  # noqa: E731
        update = lambda: updates.step({NAME: torch.ones(int(count))}, next(steps))  # noqa: E731
    meter = Meter(args.device)
    seconds = "cpu" if args.threads == 1 else "wall"
    found: dict[str, Any] = {"mebibytes": [], "plain": [], "probes": [], "step": []}
    for _ in range(args.steps + (not args.memory)):
        # Beside each step: processes differ in where their tensors lie, and minutes in who else computes.
        found["plain"].append(0.0 if args.memory or kind == "plain" else meter.step(plain)[seconds])
        first, second = meter.step(run), meter.step(update)
        found["mebibytes"].append(max(first["mebibytes"], second["mebibytes"]))
        found["probes"].append(first[seconds])
        found["step"].append(first[seconds] + second[seconds])
    return found


def measured(name: str, args: argparse.Namespace, memory: bool) -> dict[str, list[float]]:
    if args.device.startswith("cuda"):  # whose allocator tells apart what each row takes
        import torch

        made = child(argparse.Namespace(**{**vars(args), "child": name, "memory": memory}))
        gc.collect()
        torch.cuda.empty_cache()
        return made
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, env=environment | (HONEST_MALLOC if memory else {}), text=True,
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="opt-125m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--probes", type=int, action="append")
    parser.add_argument("--trained", choices=["full", "lora", "low_rank"], default="full")
    parser.add_argument("--law", choices=["rademacher", "gaussian", "sphere", "orthogonal"])
    parser.add_argument("--sides", type=int, default=0, help="also that many sides in one pass")
    parser.add_argument("--top", action="store_true", help="also with the last layer alone trained")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    counts = args.probes or [1, 4]
    rows = ["plain:0", *(f"probe:{k}" for k in counts)]
    rows += [f"sides:{max(counts)}"] * bool(args.sides) + [f"top:{k}" for k in counts] * args.top
    print(f"{args.shape}, {args.trained}, B={args.batch}, T={args.length}, {args.dtype}, {args.device}")
    print("| row | directions | MiB above the weights | ratio | probes, of their passes | step |")
    print("|---|--:|--:|--:|--:|--:|")
    base: dict[str, float] = {}
    for name in rows:
        kind, _, count = name.partition(":")
        inside = args.device.startswith("cuda")
        found = measured(name, args, not inside or args.memory)
        peaks = found["mebibytes"]
        peak = statistics.median(peaks[1:] or peaks)
        base.setdefault("peak", peak)
        if args.memory:
            print(f"| {kind} | {count} | {peak:.0f} | {peak / base['peak']:.2f} | | |", flush=True)
            continue
        timed = found if inside else measured(name, args, False)
        probes, step = statistics.median(timed["probes"][1:]), statistics.median(timed["step"][1:])
        pass_seconds = probes if kind == "plain" else statistics.median(timed["plain"][1:])
        passes = 1 if kind == "sides" else int(count) if int(count) > 1 else 1 + int(count)
        passes *= pass_seconds
        print(f"| {kind} | {count} | {peak:.0f} | {peak / base['peak']:.2f} | {probes / passes:.2f} ({probes:.3g} s) "
              f"| {'' if kind == 'sides' else f'{step / passes:.2f}'} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
