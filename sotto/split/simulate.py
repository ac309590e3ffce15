"""Both sides in one process: the same bytes, checked in the same way, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sotto import begun
from sotto.config import Config
from sotto.data.load import has_eval, load_dataset_for
from sotto.errors import SottoError
from sotto.privacy.noise import DebugNoise, NoiseSource, SecureNoise
from sotto.rundir import RunDir, require_writable
from sotto.split import statement, wire
from sotto.split.answers import AnswerBook
from sotto.split.cache import Inbox, Representations
from sotto.split.customer import Customer, load_bottom, setting_of
from sotto.split.labels import LabelKeeper
from sotto.split.queries import QueryBook
from sotto.split.vendor import Vendor, passes
from sotto.split.wire import Piece


@dataclass
class SplitRun:
    """A finished split run.

    Attributes:
      path: the run folder, or None where nothing is kept.
      accuracy: on `data.eval`, whose texts were privatized as queries; None without one.
      statement: what is promised about what the vendor saw.
      facts: the same for machines.
    """

    path: Path
    accuracy: float | None
    statement: str
    facts: dict[str, Any]
    customer: Customer
    vendor: Vendor


def explain(config: Config) -> dict[str, float]:
    """What eta means for a configuration's model; reads no data.

    Raises:
      SottoError: SOT804, the privatizer has no eta.
    """
    bottom, tokenizer = load_bottom(config)
    found = Customer(config, bottom, tokenizer, SecureNoise()).meaning()
    if found is None:
        raise SottoError(
            "SOT804", what=f"privatizer '{setting_of(config).privatizer}' has no eta", where="setting.privatizer",
            why="only the metric privatizers need to be explained by distances; the others state their epsilon",
            fix="set setting.privatizer to dx_tokens, dx_hidden or dx_pooled",
        )  # fmt: skip
    return {
        **asdict(found),
        "noise_length": found.noise_length,
        "eta_times_close_distance": found.close_ratio,
        "eta_times_median_distance": found.median_ratio,
    }


def noise_for(config: Config) -> NoiseSource:
    """The cryptographic source; a repeatable one only where the configuration says that the run is not private."""
    seed = config.run.debug_noise_seed
    return SecureNoise() if seed is None else DebugNoise(seed)


def simulate(config: Config, stem: str = "run", path: Path | None = None) -> SplitRun:
    """Runs customer and vendor one after the other.

    Args:
      path: a run folder to continue; default: a new one in `output.dir`.

    Raises:
      SottoError: bad input of either side.
    """
    setting_of(config)
    require_writable(config)
    run = RunDir(path) if path is not None else RunDir.planned(config, stem)
    to_go_on(run, "simulate")
    bottom, tokenizer = load_bottom(config)
    customer = Customer(config, bottom, tokenizer, noise_for(config))
    vendor = Vendor(config)
    if path is None:
        create(run, config)
    with run.locked():
        outbox = customer.prepare(run.path / "private" / "outbox")
        inbox = Inbox.open(run.path / "private" / "inbox", outbox.manifest.to_json(), vendor.agreement)
        while not inbox.complete:
            inbox.accept(inbox.received, outbox.read(inbox.received))
        book = answer_book(run, config, customer)
        vendor.train(inbox.open_all(), run.checkpoints, book.answer if book else None)
        accuracy = evaluate(customer, lambda p: ask_directly(vendor, p), run.path) if has_eval(config.data) else None
        words, facts = write_statement(run, config, customer, accuracy)
    return SplitRun(run.path, accuracy, words, facts, customer, vendor)


def to_go_on(run: RunDir, command: str) -> None:
    """What to tell whoever interrupts a side of a split run, which 'sotto resume' does not go on with."""
    begun.note(run.path, f"What was finished is on disk. Go on with: sotto split {command} ... --resume {run.path}")


def create(run: RunDir, config: Config) -> None:
    """Writes the folder of a split run, which the commands that list and show runs can read."""
    delta, why = setting_of(config).delta, config.not_private
    plan = {"kind": "split", "steps": config.steps, "delta": delta, "not_private": why}
    run.create(config, plan, {"secrets.json": "{}\n"})


def label_keeper(config: Config, customer: Customer) -> LabelKeeper:
    """The customer's answers: each example as often as the training passes over it, and no more."""
    setting, labels = setting_of(config), customer.data.examples.labels
    assert labels is not None
    assert setting.label_epsilon is not None
    classes, uses = customer.agreement.classes, passes(config, len(labels))
    return LabelKeeper(torch.from_numpy(labels), classes, uses, setting.label_epsilon, setting.delta, customer.noise)


def answer_book(run: RunDir, config: Config, customer: Customer) -> AnswerBook | None:
    """The customer's answers on disk, where it keeps the labels."""
    if setting_of(config).labels != "kept":
        return None
    return AnswerBook(run.path / "private" / "answers.bin", label_keeper(config, customer), customer.agreement.classes)


def evaluate(customer: Customer, ask: Callable[[Piece], torch.Tensor], run: Path) -> float:
    """Accuracy on `data.eval`: each text is privatized once, sent without its label, scored, and answered.

    Args:
      ask: from a query to (E, K) scores: the vendor.
      run: the folder that keeps what each text left as, for whoever asks again.
    """
    examples = load_dataset_for(customer.config, customer.tokenizer, "eval").examples
    assert examples.labels is not None
    book = QueryBook(run / "private" / "queries.bin", customer.agreement)
    hits, size = 0, customer.setting.chunk_examples
    for start in range(0, len(examples), size):
        chosen = np.arange(start, min(start + size, len(examples)))
        scores = ask(book.take(examples, chosen, customer.query))
        hits += int((scores.argmax(dim=1).numpy() == examples.labels[chosen]).sum())
    return hits / len(examples)


def ask_directly(vendor: Vendor, piece: Piece) -> torch.Tensor:
    """(E, K) scores of a query that is encoded, checked and decoded as if it had been sent."""
    agreed = wire.without_labels(vendor.agreement)
    data = wire.encode(piece)
    return vendor.predict(Representations([wire.decode(data, wire.facts_of(piece, data), agreed)], agreed))


def write_statement(
    run: RunDir, config: Config, customer: Customer, accuracy: float | None
) -> tuple[str, dict[str, Any]]:
    """Writes what is promised about what left, in words and for machines, and returns both."""
    facts = customer.facts()
    words = statement.text(facts)
    if config.run.debug_noise_seed is not None:
        words = "NOT PRIVATE: run.debug_noise_seed is set, so the noise can be recomputed.\n\n" + words
    assert customer.outbox is not None
    values = {
        **facts.to_dict(),
        "private": facts.protected and config.run.debug_noise_seed is None,
        "steps": config.steps,
        "upload_bytes": customer.outbox.bytes,
    }
    if accuracy is not None:
        run.write("private/accuracy.json", json.dumps({"accuracy": accuracy}) + "\n", private=True)
    run.write("statement.txt", words)
    run.write("privacy.json", json.dumps(values, indent=2) + "\n")
    return words, values
