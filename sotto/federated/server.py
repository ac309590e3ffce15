"""A federated run as the training loop sees it: the model and the register of users here, the text elsewhere.

The loop, the plan, the ledger, the noise, the checkpoints and the statement are those of every run. What differs is
where a clipped sum comes from (`cohort`), and that an update is decoded before the optimizer applies it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sotto.config import Config
from sotto.config_federated import FederatedSetting
from sotto.data import DataReport, Examples, LoadedData, Units
from sotto.errors import SottoError
from sotto.federated.autoencoder import Autoencoder
from sotto.federated.client import Client, Computes, LocalTraining, Order, Probing
from sotto.federated.codec import Codec, Identity, Srht
from sotto.federated.cohort import LATENT, Carrier, Cohort
from sotto.federated.embedding_rows import ROWS, EmbeddingRows, frequent, table_name, train_table
from sotto.federated.layout import Layout, model_fingerprint
from sotto.federated.shares import Shares
from sotto.federated.site import Sites
from sotto.federated.subspace import BASIS, Learned, Subspace, top_directions
from sotto.gradients.clipping import Clipping, Unclipped
from sotto.optim import Optimizer
from sotto.privacy.noise import DebugNoise, NoiseSource, SecureNoise
from sotto.privacy.plan import Plan, make_plan
from sotto.public_text import read_public
from sotto.zeroth_order import engine as zeroth_order
from sotto.zeroth_order.release import NAME


def setting_of(config: Config) -> FederatedSetting:
    """The section `setting` of a federated configuration.

    Raises:
      SottoError: SOT931, it is another kind.
    """
    if isinstance(config.setting, FederatedSetting):
        return config.setting
    raise SottoError(
        "SOT931", what=f"setting.kind is '{config.setting.kind}'", where="setting.kind",
        why="this command trains over the devices of users", fix="write setting: {kind: federated}",
    )  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """What server and devices must have in common. All of it is public.

    Attributes:
      model: fingerprint of the frozen weights and of the shape of the trained ones.
      codec: what `Codec.spec` gives.
      local: how a device trains.
      directions: the public key of zeroth-order directions, or None.
      unit, num_units, sampling_prob, steps, noise_multiplier, clip_norm, delta: of the plan; steps with spare ones.
    """

    model: str
    codec: dict[str, object]
    local: dict[str, object]
    directions: str | None
    unit: str
    num_units: int
    sampling_prob: float
    steps: int
    noise_multiplier: float
    clip_norm: float
    delta: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.__dict__, sort_keys=True).encode()).hexdigest()


class Decoding:
    """An optimizer whose updates come encoded. It has the interface of `sotto.optim.Optimizer`."""

    def __init__(self, inner: Optimizer, codec: Codec):
        self.inner, self.codec, self.layout = inner, codec, Layout.of(inner.parameters)

    def step(self, update: Mapping[str, torch.Tensor], step: int) -> None:
        """Applies one release: `update["latent"]` is (k,)."""
        decoded_n = self.codec.decode(update[LATENT], step)
        self.codec.learn(decoded_n)
        self.inner.step(self.layout.split(decoded_n), step)

    @property
    def ema(self) -> dict[str, torch.Tensor]:
        return self.inner.ema

    def final_weights(self) -> dict[str, torch.Tensor]:
        return self.inner.final_weights()

    def stored_weights(self) -> dict[str, torch.Tensor]:
        return self.inner.stored_weights()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.inner.state_tensors(), **{f"codec/{n}": t for n, t in self.codec.state().items()}}

    def restore(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        own = {n: t for n, t in tensors.items() if not n.startswith("codec/")}
        self.inner.restore(weights, own)
        self.codec.restore({n.removeprefix("codec/"): t for n, t in tensors.items() if n not in own})


def open_embedding(config: Config, model: nn.Module) -> None:
    """Makes the token embedding trainable too, where the setting says so."""
    if setting_of(config).embedding_rows is not None:
        train_table(model)


def codec_for(config: Config, model: nn.Module, key: str) -> Codec:
    """The codec of a configuration.

    Args:
      model: prepared for training.
      key: the run's public key.

    Raises:
      SottoError: SOT932, the latent is larger than the update.
    """
    setting, layout = setting_of(config), Layout.of({n: p for n, p in model.named_parameters() if p.requires_grad})
    size = layout.size
    if config.method.zeroth_order:
        return Identity(config.method.probes * setting.parts)
    if setting.embedding_rows is not None:
        public = setting.public_data is not None
        return EmbeddingRows(layout, table_name(model), setting.embedding_rows, key, public)
    if setting.latent is not None and setting.latent > size:
        raise SottoError(
            "SOT932", what=f"setting.latent is {setting.latent:,}, and an update has {size:,} numbers",
            where="setting.latent", why="a codec shortens", fix="lower setting.latent, or set setting.codec: none",
        )  # fmt: skip
    if setting.latent is None:
        return Identity(size)
    if setting.codec == "srht":
        return Srht(size, setting.latent, key)
    if setting.codec == "learned":
        return Learned(size, setting.latent, key)
    if setting.codec == "autoencoder":
        return Autoencoder(size, setting.latent, key, config.method.clip_norm)
    return Subspace(torch.zeros(setting.latent, size))  # until its directions are known


def engine_for(
    config: Config,
    model: nn.Module,
    data: LoadedData,
    tokenizer: Any,
    clipping: Clipping,
    key: str,
    carrier: Carrier | None,
) -> Cohort:
    """The engine of the server's loop.

    Args:
      data: the text of all users, where it is here; else their register.
      carrier: takes orders to users elsewhere; None: they are all here.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    codec, pad = codec_for(config, model, key), tokenizer.pad_token_id
    if (file := setting_of(config).public_data) is not None:
        public = read_public(file, "setting.public_data", config, tokenizer, data.examples)
        codec.restore(public_state(config, model, tokenizer, codec, public))
    probing = config.method.zeroth_order
    shares, noise = shares_for(config), noise_for(config)
    if carrier is None and (sites := setting_of(config).sites) is not None:
        carrier = in_process(Sites.of(config, model, tokenizer, data, key, shares, noise, sites))
    elif carrier is None:
        compute = local_computation(config, model, data, pad, key, codec)
        carrier = in_process(Client(compute, codec, data, shares, noise))
    cohort = Cohort(parameters, clipping, codec, carrier, NAME if probing else LATENT)
    cohort.shares, cohort.noise, cohort.reach = shares, noise, reach_for(config)
    cohort.masked = setting_of(config).masks
    if cohort.masked:
        require_masks()
    if probing:
        cohort.directions = zeroth_order.directions(model, config.method, key, setting_of(config).parts)
    return cohort


def notes_of(cohort: Cohort) -> list[str]:
    """What whoever starts a run should know of its codec."""
    if not isinstance(cohort.codec, Autoencoder):
        return []
    kept, part = cohort.codec.kept, cohort.codec.size / Layout.of(cohort.parameters).size
    return [
        f"the autoencoder keeps {kept:.2%} of the energy of random numbers, and a random projection to as many numbers "
        f"{part:.2%}; of an update, too, the network keeps about what a projection does"
    ]


def require_masks() -> None:
    """Refuses before anything is read, where the libraries of masks are missing.

    Raises:
      SottoError: SOT949.
    """
    if importlib.util.find_spec("cryptography") is None or importlib.util.find_spec("Crypto") is None:
        raise SottoError(
            "SOT949", what="the libraries that Flower encrypts with are not installed", where="setting.masks",
            why="masks are made of them, in a simulation too", fix="pip install 'sotto[federated]'",
        )  # fmt: skip


def shares_for(config: Config) -> Shares | None:
    """The noise that users add, or None where the server does."""
    setting, plan = setting_of(config), make_plan(config)
    if setting.noise != "clients":
        return None
    expected, registered = (setting.sites, None) if setting.sites else (plan.expected_batch_size, plan.num_units)
    return Shares.of(plan.clip_norm, plan.noise_multiplier, expected, setting.dropouts, reach_for(config), registered)


def reach_for(config: Config) -> float | None:
    """The norm of what an honest site may send: all of its units, clipped. None where users answer."""
    if setting_of(config).sites is None:
        return None
    return config.privacy.num_units * config.method.clip_norm


def noise_for(config: Config) -> NoiseSource:
    """The cryptographic source; a repeatable one only where the configuration says that the run is not private."""
    seed = config.run.debug_noise_seed
    return SecureNoise() if seed is None else DebugNoise(seed)


def public_state(
    config: Config, model: nn.Module, tokenizer: Any, codec: Codec, public: LoadedData
) -> dict[str, torch.Tensor]:
    """What a codec takes from public text: directions, or rows of the token embedding.

    Raises:
      SottoError: SOT936, there is too little of it.
    """
    if isinstance(codec, EmbeddingRows):
        rows = frequent(public.examples.input_ids, len(codec.rows_of(0)), codec.count)
        return {ROWS: rows.float()}
    return {BASIS: public_directions(config, model, tokenizer, public, codec.size)}


def public_directions(
    config: Config, model: nn.Module, tokenizer: Any, public: LoadedData, latent: int
) -> torch.Tensor:
    """(k, n) directions of the updates that devices would make of public text, twice as many of them as directions.

    Raises:
      SottoError: SOT936, there is too little public text.
    """
    setting = setting_of(config)
    trainer = LocalTraining(config, setting, model, public, tokenizer.pad_token_id)
    order = Order(0, 1.0, {n: p.detach().clone() for n, p in trainer.parameters.items()})
    size = setting.local_batch_size
    few = range(0, min(len(public.examples), 2 * latent * size), size)
    updates = [trainer(order, np.arange(at, min(at + size, len(public.examples)))) for at in few]
    return top_directions(torch.stack(updates), latent)


def local_computation(config: Config, model: nn.Module, data: LoadedData, pad: int, key: str, codec: Codec) -> Computes:
    """What a device does with an order, before encoding."""
    if not config.method.zeroth_order:
        return LocalTraining(config, setting_of(config), model, data, pad, codec)
    from sotto import session  # which asks for engines of federated runs here

    device = next(model.parameters()).device
    clipping = Unclipped()  # the bound of the round, which may follow norms, is put on whatever leaves (`bounded`)
    losses, parts = session.losses_along(model, config, device), setting_of(config).parts
    return Probing(zeroth_order.build(model.eval(), config.method, losses, clipping, key, parts), data, pad)


def in_process(client: Client | Sites) -> Carrier:
    """Carries orders to users or sites whose text is all here, one after the other."""

    def carry(order: Order, users: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
        # The trained weights of the client are those of the server, which the order must not change.
        kept = Order(order.step, order.clip_norm, {n: w.clone() for n, w in order.weights.items()}, order.run)
        for user in users.tolist():
            yield user, client.answer(kept, user)

    return carry


def what_devices_do(config: Config) -> dict[str, object]:
    """The part of a configuration that a device must have in common with the server."""
    setting = setting_of(config).model_dump(mode="json")
    others = ("sites", "noise", "dropouts", "masks", "parts", "embedding_rows")
    local = {k: v for k, v in setting.items() if k.startswith("local_") or k in others}
    local["expected_batch_size"] = config.run.expected_batch_size
    return {**local, "method": config.method.model_dump(mode="json"), "task": config.data.task}


def agreement(config: Config, plan: Plan, cohort: Cohort, model: nn.Module) -> Agreement:
    """What the server of a run asks devices to agree to."""
    return Agreement(
        model=model_fingerprint(model),
        codec=cohort.codec.spec(),
        local=what_devices_do(config),
        directions=None if cohort.directions is None else cohort.directions.key,
        unit=plan.unit,
        num_units=plan.num_units,
        sampling_prob=plan.sampling_prob,
        steps=plan.total_steps,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        delta=plan.delta,
    )


def register(config: Config) -> LoadedData:
    """The register of a run whose text is elsewhere: `privacy.num_units` users, of whom nothing is known here.

    Raises:
      SottoError: SOT933, the dataset has no name to keep its ledger under.
    """
    name, count = config.privacy.dataset, setting_of(config).sites or config.privacy.num_units
    if name is None:
        raise SottoError(
            "SOT933", what="privacy.dataset is missing", where="privacy.dataset",
            why="the ledger of a federated run cannot be found by its text, which the server never sees",
            fix="name the register of users: privacy: {dataset: clinic-phones}",
        )  # fmt: skip
    units = Units(np.zeros(count + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    report = DataReport("register", 0, 0, 0, 0, {}, count, (0, 0, 0), 0, 0, None, [])
    empty = Examples.build([], rows=[], labels=np.zeros(0, dtype=np.int64) if config.data.label else None)
    return LoadedData(empty, units, report, name)
