"""Building a run: the model, the data, the engine and the ledger, in the order in which errors cost least.

Nothing is written and nothing is charged until everything has been read and checked, the first batch included.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sotto import checkpoint, memory_budget
from sotto.config import Config
from sotto.data import LoadedData, PoissonSampler, require_there
from sotto.data.load import ledger_id, load_dataset_for
from sotto.devices import device_of
from sotto.distributed import Followers, Group
from sotto.errors import SottoError
from sotto.federated import server as federation
from sotto.federated.cohort import Carrier, Cohort
from sotto.federated.server import Decoding
from sotto.federated.shares import Divided
from sotto.gradients.clipping import CLIPPINGS, Adaptive, Clipping, Unclipped
from sotto.gradients.engine import Engine, attach
from sotto.losses import autocast, forward_losses, look_at_head
from sotto.metrics import no_tensorboard
from sotto.models import load as models_load
from sotto.models.activation_cache import ActivationCache
from sotto.models.trainable import prepare
from sotto.optim import Optimizer
from sotto.privacy.datasets import require_one_name
from sotto.privacy.ledger import Ledger
from sotto.privacy.mechanism import (
    AdaptiveGaussianMechanism,
    GaussianMechanism,
    IdentityMechanism,
    LaplaceMechanism,
)
from sotto.privacy.noise import DebugNoise, NoiseSource, SecureNoise
from sotto.privacy.plan import Plan, make_plan
from sotto.rundir import RunDir, require_writable
from sotto.settled import (
    SETTLED,
    digest,
    require_known_steps,
    require_same_configuration,
    require_same_name,
    require_same_text,
    settle,
)
from sotto.stopping import StopRule, rule_for
from sotto.training import Mechanism, Planted, Session, check_gradients
from sotto.zeroth_order import engine as zeroth_order
from sotto.zeroth_order.directions import new_key
from sotto.zeroth_order.engine import ZerothOrder
from sotto.zeroth_order.perturb import Batch
from sotto.zeroth_order.presets import PRESETS
from sotto.zeroth_order.updates import Updates

DIRECTIONS = "directions_key"
"""In plan.json beside the plan: the key of a run's public directions and projections."""


@dataclass
class LedgerBudget:
    """Pays for steps in the dataset's ledger, up to what the plan bought."""

    ledger: Ledger
    run_id: str
    plan: Plan

    def reserve(self, step: int) -> int | None:
        if self.ledger.reserved(self.run_id) >= self.plan.total_steps:
            return None
        return self.ledger.reserve(self.run_id, step, self.plan.event)


@dataclass
class NoBudget:
    """Runs without a guarantee pay nothing; batches repeat exactly when a step is done again."""

    def reserve(self, step: int) -> int | None:
        return 0


@dataclass
class Loaded:
    """Model, tokenizer and data, read and checked; nothing written yet. It is a `training.Holder`."""

    config: Config
    model: torch.nn.Module
    tokenizer: Any
    engine: Engine | ZerothOrder | Cohort
    data: LoadedData
    microbatch_size: int
    device: torch.device
    activations: ActivationCache | None = None
    planted: Planted | None = None
    rule: StopRule | None = None


def load_parts(config: Config, directions_key: str, carrier: Carrier | None = None, new_tokens: int = 0) -> Loaded:
    """Reads the model and the data, and attaches the engine.

    Args:
      directions_key: the public key of the run's directions, with zeroth-order gradients, or of its codec.
      carrier: takes orders to users whose text is elsewhere, in a federated run.
      new_tokens: how many the model's vocabulary grows by, for audits.
    """
    device = device_of(config)
    size = memory_budget.microbatch_size(config, device)  # first: what does not fit is refused before anything is read
    loaded = models_load.load_model(config.model, config.data, config.method, config.run.seed)
    if new_tokens:
        models_load.add_tokens(loaded.model, new_tokens, config.run.seed)
    data = load_dataset_for(config, loaded.tokenizer, "train") if carrier is None else federation.register(config)
    model = prepare(loaded.model, config.method, config.run.seed).to(device)
    if config.setting.kind == "federated":
        federation.open_embedding(config, model)
        mine = (model, data, loaded.tokenizer, make_clipping(config))
        engine = federation.engine_for(config, *mine, directions_key, carrier)
    else:
        engine = make_engine(model, config, device, directions_key)
    rule = rule_for(config, loaded.tokenizer, data.examples, size)
    return Loaded(config, model, loaded.tokenizer, engine, data, size, device, rule=rule)


def make_engine(
    model: torch.nn.Module, config: Config, device: torch.device, directions_key: str
) -> Engine | ZerothOrder:
    """What makes clipped sums of a prepared model."""
    if config.method.gradient != "zeroth_order":
        return attach(model.train(), algorithm=config.method.gradient, clipping=make_clipping(config))

    losses = losses_along(model, config, device)
    return zeroth_order.build(model.eval(), config.method, losses, make_clipping(config), directions_key)


def losses_along(model: torch.nn.Module, config: Config, device: torch.device) -> Callable[[Batch], torch.Tensor]:
    """From a batch to its (B,) losses, for probes."""
    if config.data.task == "generation":
        look_at_head(model, device)

    def forward(batch: Batch) -> torch.Tensor:
        with autocast(config, device):
            return forward_losses(model, dict(batch), config.data.task, in_rows=config.method.zeroth_sides == 1)

    return forward


def make_clipping(config: Config) -> Clipping:
    method, layerwise = config.method, config.method.gradient == "layerwise"
    if not config.privacy.private:
        return Unclipped(layerwise=layerwise)
    if method.clipping == "adaptive":
        return Adaptive(method.clip_norm, layerwise, method.clip_quantile)
    return CLIPPINGS[method.clipping](method.clip_norm, layerwise)


def start(
    config: Config,
    stem: str,
    change: Callable[[Loaded], Loaded] = lambda parts: parts,
    carrier: Carrier | None = None,
    group: Group | None = None,
    new_tokens: int = 0,
    trial: bool = False,
) -> Session:
    """Begins a new run: central, or the server's side of a federated one.

    Args:
      change: what to make of model and data when they have been read, for audits.
      carrier: takes the orders of a federated run to users elsewhere; default: all text is here.
      group: the processes that compute it, this one first; default: this one alone.
      new_tokens: as for `load_parts`.
      trial: it is one of a sweep, so that nobody may learn that there was this run.
    """
    require_one_loop(config)
    require_writable(config)
    _require_board(config)
    if config.data.eval is not None and carrier is None:
        require_there(config.data.eval)  # it is read when the budget is spent
    plan = make_plan(config)
    debug = config.run.debug_noise_seed
    directions_key = new_key() if debug is None else hashlib.blake2b(f"directions {debug}".encode()).hexdigest()[:32]
    parts = change(load_parts(config, directions_key, carrier, new_tokens))
    key = secrets.token_bytes(16) if debug is None else hashlib.blake2b(str(debug).encode(), digest_size=16).digest()
    run = RunDir.planned(config, stem)
    secret = {
        "run": run.id,
        "sampling_key": key.hex(),
        "ledger": ledger_id(config, parts.data.fingerprint),
        "data": digest(parts.data),
        "public": None if parts.rule is None else parts.rule.digest,
        "elsewhere": carrier is not None,
        "trial": trial,
    }
    session = _assemble(config, plan, run, parts, secret)
    check_gradients(session)
    report = json.dumps(parts.data.report.to_dict(), indent=2)
    private_files = {"secrets.json": json.dumps(secret), "data_report.json": report, SETTLED: settle(config)}
    made = not session.run.path.parent.exists()
    session.run.create(config, plan.to_dict() | {DIRECTIONS: directions_key}, private_files)
    try:
        session.held.enter_context(session.run.locked())
        session.budget = _open_budget(session, secret)
    except BaseException:
        session.held.close()
        shutil.rmtree(session.run.path, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                session.run.path.parent.rmdir()
        raise
    return _led(session, group, directions_key, secret["data"])


def _led(session: Session, group: Group | None, directions_key: str, data: str) -> Session:
    """Has the other processes of a run follow it."""
    if group is not None:
        session.followers = Followers(group)
        session.followers.greet(session, directions_key, data)
    return session


def _require_board(config: Config) -> None:
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise no_tensorboard()


def _open_budget(session: Session, secret: dict[str, Any]) -> LedgerBudget | NoBudget:
    """Announces the run in the dataset's ledger; a run that is known there already goes on."""
    plan, run_id = session.plan, session.run.id
    if not plan.private:
        return NoBudget()
    if not secret["elsewhere"] and not Ledger.exists(secret["ledger"]):
        require_one_name(secret["ledger"], session.data.fingerprint)  # before a file of that name is made
    ledger = Ledger.open(secret["ledger"])
    known = run_id in ledger.runs
    require_known_steps(session.run, session.step, ledger)
    if not known and not secret["elsewhere"]:
        require_one_name(secret["ledger"], session.data.fingerprint)
    try:
        ledger.open_run(
            run_id, plan.event, plan.total_steps, delta=plan.delta, neighboring_relation=plan.neighboring_relation,
            secret=secret.get("trial", False),
            whole=plan.whole,
        )  # fmt: skip
    except BaseException:
        # Ctrl-C just after the entry was written: a run that never began must not hold on to what it had planned.
        if not known:
            with contextlib.suppress(SottoError):
                ledger.close_run(run_id)
        raise
    return LedgerBudget(ledger, run_id, plan)


def require_central(config: Config) -> None:
    """Refuses a configuration whose setting would be ignored by a command for central runs.

    Raises:
      SottoError: SOT110.
    """
    if config.setting.kind != "central":
        raise SottoError(
            "SOT110", what=f"this is the configuration of a {config.setting.kind} run", where="setting.kind",
            why="trained here, text and model would lie on one machine, and setting would protect nothing",
            fix=f"use 'sotto {config.setting.kind}'",
        )  # fmt: skip


def require_one_loop(config: Config) -> None:
    """Refuses a split run. Raises SOT110."""
    if config.setting.kind == "split":  # which has two sides, and neither is this loop
        require_central(config)


def resume(path: str | Path, carrier: Carrier | None = None, group: Group | None = None) -> Session:
    """Continues a run from its newest whole checkpoint, or from its start.

    Args:
      carrier, group: as for `start`.
    """
    run = RunDir.open(path)
    with ExitStack() as held:
        held.enter_context(run.locked())  # before anything is read that another process might still change
        session = _resume(run, carrier)
        session.held = held.pop_all()
    return _led(session, group, run.read_json("plan.json")[DIRECTIONS], digest(session.data))


def _resume(run: RunDir, carrier: Carrier | None) -> Session:
    config = run.config()
    require_one_loop(config)
    plan = run.plan()
    _require_board(config)
    require_same_configuration(config, run)
    secret = run.read_json("private/secrets.json")
    require_same_name(run, secret)
    if secret["elsewhere"] != (carrier is not None):
        raise SottoError(
            "SOT934", what="the users of this run are not where this command would look", where=str(run.path),
            why="a run that asks devices over a network goes on over it, and a simulation in one process",
            fix="'sotto resume RUN' for a simulation; 'flwr run APP --run-config resume=RUN' for the other",
        )  # fmt: skip
    parts = load_parts(config, run.read_json("plan.json")[DIRECTIONS], carrier)
    public = None if parts.rule is None else parts.rule.digest
    require_same_text(config, digest(parts.data), public, secret)
    session = _assemble(config, plan, run, parts, secret)
    latest, damaged = checkpoint.load_latest(run.checkpoints)
    session.notes += [f"checkpoint {name} is damaged and was passed over" for name in damaged]
    if latest is not None:
        _restore(session, latest)
    if not session.done:
        check_gradients(session)
    session.budget = _open_budget(session, secret)
    return session


def _assemble(config: Config, plan: Plan, run: RunDir, parts: Loaded, secret: dict[str, Any]) -> Session:
    optimizer = make_optimizer(parts.engine, config)
    if isinstance(parts.engine, Cohort):
        parts.engine.run = run.id
    key, debug = bytes.fromhex(secret["sampling_key"]), config.run.debug_noise_seed is not None
    sites: int | None = plan.setting["sites"] if plan.setting else None  # which draw their units themselves
    drawn = (sites, 1.0) if sites else (len(parts.data.units), plan.sampling_prob)
    sampler = PoissonSampler(*drawn, key, debug)
    return Session(
        config=config,
        plan=plan,
        run=run,
        model=parts.model,
        tokenizer=parts.tokenizer,
        engine=parts.engine,
        data=parts.data,
        sampler=sampler,
        mechanism=make_mechanism(config, plan, parts.engine.clipping),
        budget=NoBudget(),
        optimizer=optimizer,
        device=parts.device,
        microbatch_size=parts.microbatch_size,
        planted=parts.planted,
        rule=parts.rule,
        checkpoint_every=config.run.checkpoint_every or _checkpoint_every(parts.engine, plan.steps),
        notes=federation.notes_of(parts.engine) if isinstance(parts.engine, Cohort) else [],
    )


def make_optimizer(engine: Engine | ZerothOrder | Cohort, config: Config) -> Optimizer | Updates | Decoding:
    """What turns releases into weights."""
    if isinstance(engine, Engine):
        return Optimizer(engine.parameters, config.stepping, config.steps)
    if isinstance(engine, Cohort) and engine.directions is None:
        return Decoding(Optimizer(engine.parameters, config.stepping, config.steps), engine.codec)
    assert engine.directions is not None
    preset = PRESETS[config.method.zeroth_preset]
    return Updates(engine.parameters, engine.directions, config.stepping, config.steps, preset)


def make_mechanism(config: Config, plan: Plan, clipping: Clipping, noise: NoiseSource | None = None) -> Mechanism:
    """What turns clipped sums into releases."""
    if not config.privacy.private:
        return IdentityMechanism(divisor=plan.expected_batch_size)
    seed = config.run.debug_noise_seed
    noise = noise or (SecureNoise() if seed is None else DebugNoise(seed))
    if plan.setting is not None and plan.setting["noise"] == "clients":
        return Divided(plan.expected_batch_size, noise.private)
    if isinstance(clipping, Adaptive):
        share = config.method.clip_share
        return AdaptiveGaussianMechanism(
            plan.noise_multiplier, plan.expected_batch_size, noise, clipping, share, plan.exact_noise
        )
    if plan.pure:
        return LaplaceMechanism(plan.noise_multiplier, divisor=plan.expected_batch_size, noise=noise)
    return GaussianMechanism(plan.noise_multiplier, plan.expected_batch_size, noise, plan.exact_noise)


def _checkpoint_every(engine: Engine | ZerothOrder | Cohort, steps: int) -> int:
    """Small checkpoints often, large ones about ten times in a run: a crash charges what it lost a second time."""
    if not isinstance(engine, Engine) and engine.directions is not None:
        return 1  # the log of what was released
    megabytes = sum(p.numel() for p in engine.parameters.values()) * 12 / 1e6
    return 1 if megabytes < 10 else max(1, steps // (50 if megabytes < 100 else 10))


def _restore(session: Session, latest: checkpoint.Checkpoint) -> None:
    session.optimizer.restore(latest.weights, latest.optimizer)
    session.step = latest.step
    if session.rule is not None:
        session.rule.restore(latest.extra["rule"])
    if isinstance(session.engine.clipping, Adaptive):
        session.engine.clipping.thresholds = latest.extra["clip_thresholds"]
