"""Time and memory of one clipped step, as ratios to the non-private step of the same model on the same machine.

    python benchmarks/engine.py [--quick] [--case gpt2-T128-full ...] [--algorithm non_private ...] [--device cuda]

A step is forward, backward and, unless it is not private, clipping; no noise, no optimizer. Every algorithm has a
process of its own; on CUDA they share one, and seconds are the device's. They take turns step by step, so that a drift
of the machine hits all of them, and a ratio is the median over the rounds of a step's time by that of the same round's
non-private step.

Memory is measured in further processes: the high-water mark of each step above the built model. On CPU that is the
resident set's (reset before each step), with every block above 64 KiB returned to the system at once
(MALLOC_MMAP_THRESHOLD_), so that it counts live tensors and not the allocator's reserves; on CUDA it is the one that
the allocator reports, above the work buffers of the matrix libraries too. The first step is listed apart, because it
also holds the engine's probe.

`non_private` uses the loss that the model brings with it, as nearly everybody does. `non_private_own_loss` takes
Sotto's (`sotto.losses`), as our own algorithms do: the difference is what the loss alone saves. Explicit position ids
are given to all, because Opacus fails without. A peer that cannot run a case shows its error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS

MODELS = ("bert", "gpt2", "llama")
SHAPES = {"T128": (128, 8), "T512": (512, 2), "B32": (128, 32), "B16": (128, 16), "B8": (128, 8), "B4": (128, 4)}
TRAINED = ("full", "lora", "bitfit")
CASES = [f"{m}-{s}-{t}" for m in MODELS for s in ("T128", "T512") for t in TRAINED if (m, t) != ("llama", "bitfit")]
QUICK = ["bert-T128-full", "bert-T128-lora"]
OWN = ("book_keeping", "ghost", "layerwise")
ALGORITHMS = ("non_private", "non_private_own_loss", *OWN, *PEERS)
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def build(kind: str, trained: str) -> Any:
    """Randomly initialised, without dropout. `kind` may end with a number of layers: `roberta24`, `gpt2l36`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig  # isort: skip

    if kind.startswith("roberta"):
        large = RobertaConfig(hidden_size=1024, num_hidden_layers=int(kind[7:]), num_attention_heads=16,
                              intermediate_size=4096, vocab_size=50265, max_position_embeddings=514,
                              hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
        return methods(AutoModelForSequenceClassification.from_config(large), trained)
    if kind.startswith("gpt2l"):
        wide = GPT2Config(n_embd=1280, n_head=20, n_layer=int(kind[5:]), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                          use_cache=False)  # fmt: skip
        return methods(AutoModelForCausalLM.from_config(wide), trained)

    if kind == "bert":
        config: Any = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                                 hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config)
    elif kind == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    else:
        config = LlamaConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                             intermediate_size=1408, vocab_size=32000, use_cache=False)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        targets = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[kind]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
        for name, p in model.named_parameters():  # B starts at zero, which would leave A without a gradient
            if "lora_B" in name:
                p.data.normal_(std=0.02)
    elif trained == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    return model.train()


def methods(model: Any, trained: str) -> Any:
    """As a run prepares it: `lora`, `lora_int8`, `side`, `reversible`, `reversible_stored`, ..."""
    import torch

    from sotto.config import MethodSection
    from sotto.models.trainable import prepare

    torch.manual_seed(0)
    model = prepare(model, MethodSection.model_validate(options(trained)))
    for path, p in model.named_parameters():  # what starts at zero would leave the rest without a gradient
        if "lora_B" in path or path.endswith("side.up.weight"):
            p.data.normal_(std=0.02)
    return model.train()


def options(trained: str) -> dict[str, str]:
    """The method that a name stands for: what is trained, and how streams or frozen weights are kept."""
    name, _, kept = trained.partition("_")
    key = "reversible_streams" if name == "reversible" else "frozen_weights"
    return {"train": name} | ({key: kept} if kept else {})


class Task:
    """The batch of a case and its losses."""

    def __init__(self, kind: str, shape: str, device: str):
        import torch

        self.length, self.batch = SHAPES[shape]
        self.classifies = kind.startswith(("bert", "roberta"))
        torch.manual_seed(0)
        self.ids = torch.randint(5, 20_000, (self.batch, self.length), device=device)
        self.positions = torch.arange(self.length, device=device).repeat(self.batch, 1)

    def inputs(self, rows: Any) -> dict[str, Any]:
        return {"input_ids": self.ids[rows], "position_ids": self.positions[rows]}

    def common(self, model: Any, rows: Any) -> Any:
        """(B,) losses as a user writes them."""
        import torch.nn.functional as F

        logits, ids = model(**self.inputs(rows)).logits, self.ids[rows]
        if self.classifies:
            return F.cross_entropy(logits, ids[:, 0] % 2, reduction="none")
        flat, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        return F.cross_entropy(flat, targets, reduction="none").view(ids.shape[0], -1).mean(1)

    def own(self, model: Any) -> Any:
        """(B,) losses as Sotto's training takes them."""
        from sotto import losses

        everyone = slice(None)
        labels = self.ids[:, 0] % 2 if self.classifies else self.ids
        batch = {**self.inputs(everyone), "labels": labels}
        return losses.forward_losses(model, batch, "classification" if self.classifies else "generation")

    def built_in(self, model: Any) -> Any:
        """The mean loss that the model itself computes."""
        labels = self.ids[:, 0] % 2 if self.classifies else self.ids
        return model(**self.inputs(slice(None)), labels=labels).loss


def make(algorithm: str, model: Any, task: Task) -> Callable[[], Any]:
    """The step of an algorithm. What it returns is alive while memory is measured."""
    import torch

    import sotto

    if algorithm in PEERS:
        return PEERS[algorithm][1](model, task.common, task.batch)
    if algorithm in OWN:
        engine = sotto.attach(model, algorithm=algorithm)  # type: ignore[arg-type]
        return lambda: engine.backward(task.own(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    mean = task.built_in if algorithm == "non_private" else lambda model: task.own(model).mean()
    return lambda: torch.autograd.grad(mean(model), parameters, allow_unused=True)


def warm_up(device: str) -> None:
    """Lets the matrix libraries take their work buffers, which the allocator counts and no model has to do with."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(x @ x, x, x[0]).sum().backward()  # autograd has a thread, and buffers, of its own
    torch.cuda.synchronize()


class Meter:
    """Seconds and peak bytes of a step."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        if self.cuda:
            warm_up(device)
        gc.collect()
        self.base = self._resident()

    def _resident(self) -> float:
        if self.cuda:
            import torch

            return float(torch.cuda.memory_allocated())
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * resource.getpagesize()

    def _reset_peak(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # where this is not permitted, the peak is that of the process so far

    def _peak(self) -> float:
        if self.cuda:
            import torch

            return float(torch.cuda.max_memory_allocated())
        with open("/proc/self/status") as file:
            found = next((line for line in file if line.startswith("VmHWM")), None)
        return float(found.split()[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024

    def step(self, step: Callable[[], Any]) -> dict[str, float]:
        self._reset_peak()
        if self.cuda:
            import torch

            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            kept = step()
            ended.record()
            torch.cuda.synchronize()
            wall = cpu = begun.elapsed_time(ended) / 1000
        else:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            kept = step()
            wall, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        peak = self._peak() - self.base
        del kept
        return {"wall": wall, "cpu": cpu, "mebibytes": peak / 2**20}


def prepared(case: str, algorithm: str, device: str) -> tuple[Meter, Callable[[], Any]]:
    """A case's step, and what measures it above the built model."""
    kind, shape, trained = case.split("-")
    model = build(kind, trained).to(device)
    step = make(algorithm, model, Task(kind, shape, device))
    return Meter(device), step


def serve(case: str, algorithm: str, device: str, threads: int) -> None:
    """The child: makes one step for each line that it reads."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    warnings.simplefilter("ignore")
    try:
        import torch

        torch.set_num_threads(threads)
        meter, step = prepared(case, algorithm, device)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(meter.step(step)), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)[:200]}), file=answers, flush=True)


class Child:
    """A process that makes steps on demand."""

    def __init__(self, case: str, algorithm: str, args: argparse.Namespace, memory: bool):
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", case, algorithm, "--device", args.device]
        self.process = subprocess.Popen(
            [*command, "--threads", str(args.threads)], env=env | (HONEST_MALLOC if memory else {}), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.error = self._read().get("error", "")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"killed ({self.process.wait()})"}

    def step(self) -> dict[str, float] | None:
        if self.error:
            return None
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self._read()
        self.error = found.get("error", "")
        return None if self.error else found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Inside:
    """A `Child` within this process: on CUDA the allocator tells apart what each step takes, and starting is slow."""

    def __init__(self, case: str, algorithm: str, args: argparse.Namespace, memory: bool):
        self.error, self.parts = "", None
        try:
            self.parts = prepared(case, algorithm, args.device)
        except Exception as error:
            self.error = type(error).__name__

    def step(self) -> dict[str, float] | None:
        if self.parts is None:
            return None
        try:
            return self.parts[0].step(self.parts[1])
        except Exception as error:
            self.error, self.parts = type(error).__name__, None
            return None

    def close(self) -> None:
        import torch

        self.parts = None
        gc.collect()
        torch.cuda.empty_cache()


def child(case: str, algorithm: str, args: argparse.Namespace, memory: bool) -> Child | Inside:
    """Where the steps of a row are made."""
    return (Inside if args.device.startswith("cuda") else Child)(case, algorithm, args, memory)


def measure(case: str, algorithms: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of one case: algorithm -> figures, or an error."""
    rows: dict[str, dict[str, Any]] = {}
    for algorithm in algorithms:
        row = child(case, algorithm, args, memory=True)
        steps = [found["mebibytes"] for _ in range(2) if (found := row.step())]
        row.close()
        rows[algorithm] = {"error": row.error} if row.error else {"first": steps[0], "steady": steps[1]}
    children = {a: child(case, a, args, memory=False) for a in algorithms if not rows[a].get("error")}
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.steps + 1):
        rounds.append({a: found for a, row in children.items() if (found := row.step())})
    for algorithm, row in children.items():
        row.close()
        if row.error:
            rows[algorithm] = {"error": row.error}
            continue
        for clock in ("cpu", "wall"):
            ratios = [r[algorithm][clock] / r[algorithms[0]][clock] for r in rounds[1:]]
            rows[algorithm][clock] = statistics.median(r[algorithm][clock] for r in rounds[1:])
            rows[algorithm][f"{clock}_ratio"] = statistics.median(ratios)
            rows[algorithm][f"{clock}_range"] = (min(ratios), max(ratios))
    return rows


def show(case: str, rows: dict[str, dict[str, Any]]) -> None:
    base = next(iter(rows.values()))
    for algorithm, row in rows.items():
        if "error" in row:
            print(f"| {case} | {algorithm} | {row['error']} | | | | | | |", flush=True)
            continue
        low, high = row["cpu_range"]
        print(
            f"| {case} | {algorithm} | {row['cpu']:.3g} | {row['cpu_ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['wall_ratio']:.2f} | {row['steady']:.0f} | {row['steady'] / base['steady']:.2f} "
            f"| {row['first']:.0f} | {row['first'] / base['first']:.2f} |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="ratios are to the first")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)}, three steps")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, algorithm = args.child
        serve(case, algorithm, args.device, args.threads)
        return
    args.steps = 3 if args.quick else args.steps
    algorithms = args.algorithm or list(ALGORITHMS)
    for needed in sorted({n for a in algorithms if a in PEERS and (n := PEERS[a][0])}):
        if importlib.util.find_spec(needed) is None:
            print(f"left out: {', '.join(a for a in algorithms if a in PEERS and PEERS[a][0] == needed)} "
                  f"({needed} is not installed)")  # fmt: skip
            algorithms = [a for a in algorithms if a not in PEERS or PEERS[a][0] != needed]
    print(
        "| case | algorithm | CPU s | CPU time ratio (range) | wall ratio "
        "| steady MiB | ratio | first step MiB | ratio |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for case in args.case or (QUICK if args.quick else CASES):
        show(case, measure(case, algorithms, args))


if __name__ == "__main__":
    main()
