"""Scores on held-out data, and text from a trained model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.config import Config
from sotto.data import Examples
from sotto.data.load import has_eval, load_dataset_for
from sotto.devices import choose_device
from sotto.errors import SottoError
from sotto.losses import classification, to_device, token_losses
from sotto.models import load as models_load
from sotto.models.export import load_exported
from sotto.rundir import RunDir


def evaluate_run(path: Path, data: str | None, batch_size: int) -> dict[str, float]:
    """See `sotto.evaluate`."""
    run = RunDir.open(path)
    config = held_out(run.config(), data)
    run.verify_model()
    model, tokenizer = exported_model(run.path)
    return score(model, tokenizer, config, batch_size)


def held_out(config: Config, data: str | None) -> Config:
    """The configuration with the evaluation data that was named, if any.

    Raises:
      SottoError: SOT520, there is none.
    """
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"eval": data, "eval_split": None})})
    if not has_eval(config.data):
        raise SottoError(
            "SOT520", what="there is no evaluation data", where="data.eval",
            why="a score on the training data would say nothing, and would be private", fix="--data <file>",
        )  # fmt: skip
    return config


def score(model: nn.Module, tokenizer: Any, config: Config, batch_size: int = 64) -> dict[str, float]:
    """Runs the model over `data.eval`."""
    examples = load_dataset_for(config, tokenizer, "eval").examples
    return score_examples(model, tokenizer.pad_token_id, examples, config.data.task, batch_size)


def score_examples(model: nn.Module, pad: int, examples: Examples, task: str, batch_size: int = 64) -> dict[str, float]:
    """Runs the model over these examples. Batches hold texts of like length; the order does not matter."""
    device = next(model.parameters()).device
    order = np.argsort(examples.lengths, kind="stable")
    correct, loss, count, tokens = 0, 0.0, 0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = to_device(examples.collate(order[start : start + batch_size], pad), device)
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if task == "classification":
                loss += float(classification(logits, labels).sum())
                correct += int((logits.argmax(-1) == labels).sum())
            else:
                losses, counts = token_losses(logits, labels)
                loss, tokens = loss + float(losses.sum()), tokens + int(counts.sum())
            count += len(labels)
    model.train(was_training)
    if task == "classification":
        return {"accuracy": correct / count, "loss": loss / count, "examples": count}
    nats = loss / max(1, tokens)
    return {"nats_per_token": nats, "perplexity": math.exp(min(nats, 700)), "examples": count, "tokens": tokens}


def exported_model(path: Path) -> tuple[nn.Module, Any]:
    """The exported model of a run folder, or an exported folder itself."""
    folder = path / "model" if (path / "plan.json").exists() else path
    if not folder.is_dir():
        raise SottoError(
            "SOT521", what="there is no exported model", where=str(folder),
            why="the run has not finished, or output.export was none",
            fix=f"sotto resume {path}; for a finished run, sotto export {path} --to <folder>",
        )  # fmt: skip
    base = RunDir.open(path).config().model.name if folder != path else None
    model = load_exported(folder, base=base) if (folder / "adapter_config.json").exists() else load_exported(folder)
    return model.to(choose_device("auto")).eval(), models_load.load_tokenizer(folder)


def generate_text(path: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int | None) -> str:
    """See `sotto.generate`."""
    model, tokenizer = exported_model(path)
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: True)():
        raise SottoError("SOT522", what="this model classifies; it does not write", where=str(path),
                         why="it has no language model head", fix="use 'sotto evaluate'")  # fmt: skip
    if not 0 <= temperature < math.inf:
        raise SottoError("SOT523", what=f"temperature is {temperature}", where="--temperature",
                         why="0 is greedy, 1 is the model's own distribution", fix="give a number >= 0")  # fmt: skip
    ids = tokenizer(prompt)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; after the end there is nothing to write
    room = getattr(model.config, "max_position_embeddings", None) or math.inf  # type: ignore[union-attr]
    if not 0 < len(ids) < room:
        raise SottoError("SOT524", what=f"the prompt has {len(ids)} tokens", where="--prompt",
                         why=f"the model continues a text of 1 to {room - 1} tokens",
                         fix="shorten it" if ids else "give the first words of a text")  # fmt: skip
    device = next(model.parameters()).device
    inputs = torch.tensor([ids], device=device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=inputs, attention_mask=torch.ones_like(inputs), pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=int(min(max_new_tokens, room - len(ids))), **sampling,
        )  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
