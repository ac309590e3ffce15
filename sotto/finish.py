"""The end of a run: final weights, statement, export and card. It can be repeated after a crash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sotto import activations, checkpoint
from sotto import session as sessions
from sotto.config import Config
from sotto.errors import SottoError
from sotto.models import export as models_export
from sotto.models import load as models_load
from sotto.models.trainable import prepare
from sotto.privacy import statement
from sotto.privacy.ledger import Ledger
from sotto.privacy.plan import Plan
from sotto.privacy.statement import Guarantee
from sotto.reporting import card, page
from sotto.rundir import RunDir
from sotto.session import LedgerBudget
from sotto.training import Session


def finish(session: Session) -> tuple[Guarantee | None, str | None]:
    """Puts the final weights in place, writes the statement, exports, and closes the run in the ledger."""
    with torch.no_grad():
        for name, value in session.optimizer.final_weights().items():
            session.engine.parameters[name].copy_(value)
    guarantee, words, privacy = None, None, None
    if isinstance(session.budget, LedgerBudget):
        guarantee = _guarantee(session, session.budget)
        words = statement.text(guarantee)
        privacy = statement.machine_readable(guarantee, _environment())
    facts = privacy or {"private": False, "reason": session.plan.not_private, "steps": session.step}
    session.engine.detach()
    if session.config.output.export != "none":
        trained = Trained(session.model, session.tokenizer, session.config, session.plan, session.run.id)
        write_model(trained, session.run.model, session.config.output.export, privacy, words)
        session.run.seal_model()
    if words is not None:
        session.run.write("statement.txt", words)
    page.save(page.render(session.run, facts), session.run.path / "report.html")
    activations.delete(session.run)
    # Last of all: its presence is what says that the run is finished.
    session.run.write("privacy.json", json.dumps(facts, indent=2) + "\n")
    if isinstance(session.budget, LedgerBudget):
        session.budget.ledger.close_run(session.run.id)
    return guarantee, words


def _guarantee(session: Session, budget: LedgerBudget) -> Guarantee:
    ledger, plan = budget.ledger, session.plan
    # How many trials a sweep took has to stay secret, and would show in the total and in the number of runs.
    spent = None if ledger.secretive else ledger.spent(plan.delta, plan.neighboring_relation)
    runs = None if ledger.secretive else len(ledger.runs)
    return statement.earned(plan, session.step, ledger.charged(session.run.id), spent, runs)


def _environment() -> dict[str, str]:
    """Versions that a result depends on, for privacy.json. A run does not end badly because one is not known."""
    from importlib.metadata import PackageNotFoundError, version

    from sotto import __version__

    found = {"sotto": __version__}  # which may run from a folder of sources, that no installer knows
    for name in ("torch", "transformers", "peft", "dp-accounting", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found | {"threads": str(torch.get_num_threads())}


@dataclass(frozen=True)
class Trained:
    """A model with its final weights, and what has to be said about it."""

    model: nn.Module
    tokenizer: Any
    config: Config
    plan: Plan
    title: str


def write_model(
    trained: Trained,
    folder: Path,
    mode: Literal["merged", "adapter"],
    privacy: dict[str, Any] | None,
    words: str | None,
) -> None:
    """Exports a trained model with its card and privacy.json."""
    config = trained.config
    models_export.export(trained.model, trained.tokenizer, folder, mode, {"dp": privacy or {"private": False}})
    form = "adapter" if mode == "adapter" else ("pooled" if config.model.pooling == "mean" else "plain")
    form = config.method.train if config.method.train in ("side", "reversible") else form
    name = config.model.name
    text = card.render(
        base=Path(name).name if Path(name).exists() else name,
        title=trained.title,
        task=config.data.task,
        form=form,
        privacy=privacy,
        statement=words,
        reason=trained.plan.not_private,
    )
    (folder / "README.md").write_text(text)
    if privacy is not None:
        (folder / "privacy.json").write_text(json.dumps(privacy, indent=2) + "\n")


def export_run(path: Path, to: Path, mode: Literal["merged", "adapter"]) -> Path:
    """See `sotto.export`."""
    run = RunDir.open(path)
    if not run.finished:
        raise SottoError(
            "SOT509", what="the run has not finished", where=str(run.path),
            why="its guarantee is not settled yet", fix=f"sotto resume {run.path}",
        )  # fmt: skip
    if to.exists():
        raise SottoError("SOT510", what="the folder exists already", where=str(to), why="nothing is overwritten",
                         fix="choose another --to")  # fmt: skip
    config: Config = run.config()
    if mode == "adapter" and config.method.train != "lora":
        raise SottoError("SOT511", what="there is no adapter to export", where=f"method.train: {config.method.train}",
                         why="only LoRA runs have one", fix="use --mode merged")  # fmt: skip
    facts = run.read_json("privacy.json")
    words = run.read("statement.txt") if facts.get("private") else None
    write_model(reopen(run, config), to, mode, facts if facts.get("private") else None, words)
    return to


def finished_again(run: RunDir) -> tuple[nn.Module, dict[str, Any], str | None]:
    """The model, privacy.json and statement of a run that is finished. Reads no training data and charges nothing."""
    plan, facts = run.plan(), run.read_json("privacy.json")
    with run.locked():
        if plan.private:  # a crash may have come between the last file and the last entry
            secret = run.read_json("private/secrets.json")
            Ledger.open(secret["ledger"]).close_run(secret["run"])
    words = run.read("statement.txt") if plan.private else None
    return reopen(run, run.config()).model, facts, words


def _replayed(run: RunDir, config: Config, model: nn.Module, latest: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """The final weights from the log of what each step released: a few numbers a step, and the base model."""
    key = run.read_json("plan.json")[sessions.DIRECTIONS]
    engine = sessions.make_engine(model, config, torch.device("cpu"), key)
    optimizer = sessions.make_optimizer(engine, config)
    optimizer.restore(latest.weights, latest.optimizer)
    return optimizer.final_weights()


def reopen(run: RunDir, config: Config) -> Trained:
    """The trained model from the run's last checkpoint."""
    latest, damaged = checkpoint.load_latest(run.checkpoints)
    if latest is None or damaged:  # an older one is not the model that the run ended with
        raise SottoError("SOT512", what="the run's last checkpoint is damaged or gone", where=str(run.checkpoints),
                         why="the weights are read from it", fix="use the folder model/ of the run")  # fmt: skip
    loaded = models_load.load_model(config.model, config.data, config.method, config.run.seed)
    model = prepare(loaded.model, config.method, config.run.seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plan = run.plan()
    if config.method.zeroth_order:
        final = _replayed(run, config, model.eval(), latest)
    else:
        averages = {n.removeprefix("ema/"): t for n, t in latest.optimizer.items() if n.startswith("ema/")}
        final = averages or latest.weights
    with torch.no_grad():
        for name, value in final.items():
            parameters[name].copy_(value)
    return Trained(model.eval(), loaded.tokenizer, config, plan, run.id)
