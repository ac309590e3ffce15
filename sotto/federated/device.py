"""The users' side on Flower: a ClientApp that answers hellos and orders, within its owner's policy.

The owner starts the SuperNode and says in its node configuration where the device's own recipe and policy are. The
server's app cannot change them: what it sends is compared with them, and refused where it asks for more.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from sotto.config import Config
from sotto.data.load import LoadedData, load_dataset_for
from sotto.devices import choose_device
from sotto.errors import SottoError
from sotto.federated import messages, policy
from sotto.federated.client import Client, Order
from sotto.federated.layout import Layout, model_fingerprint
from sotto.federated.masked_device import answer_keys, answer_reveal, answer_shares, masked_answers
from sotto.federated.server import (
    Agreement,
    codec_for,
    local_computation,
    noise_for,
    open_embedding,
    reach_for,
    setting_of,
    what_devices_do,
)
from sotto.federated.shares import Shares
from sotto.federated.site import Site, site_for
from sotto.models import load as models_load
from sotto.models.trainable import prepare
from sotto.privacy.adversaries import most_draws

TELEMETRY = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def quiet() -> None:
    """Switches off what Flower would report to its makers."""
    os.environ.update(TELEMETRY)


@dataclass
class Device:
    """One node: its model, its users' text and its owner's policy, read once per process.

    Attributes:
      first, every: its users are numbers first, first + every, ... of the register, in the order of their names.
      shared: the text is that of all users, of which this node has its share (simulations).
    """

    config: Config
    policy: policy.Policy
    attendance: policy.Attendance
    model: Any
    tokenizer: Any
    data: LoadedData
    fingerprint: str
    first: int
    every: int
    shared: bool
    sites: dict[str, Site] = field(default_factory=dict[str, Site])

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @classmethod
    def load(cls, recipe: Path, rules: Path, first: int, every: int, shared: bool) -> Device:
        """Reads everything that a node needs.

        Raises:
          SottoError: as for training; SOT944, no policy; SOT946, more users than are registered.
        """
        config, allowed = Config.load(recipe), policy.load(rules)
        setting_of(config)
        with contextlib.chdir(recipe.resolve().parent):  # Flower starts apps in folders of its own
            loaded = models_load.load_model(config.model, config.data, config.method, config.run.seed)
            data = load_dataset_for(config, loaded.tokenizer, "train", whole=False)
        model = prepare(loaded.model, config.method, config.run.seed).to(choose_device(config.run.device)).eval()
        open_embedding(config, model)
        attendance = policy.Attendance(rules.with_suffix(".attendance.json"))
        print_ = model_fingerprint(model)
        device = cls(config, allowed, attendance, model, loaded.tokenizer, data, print_, first, every, shared)
        registered = setting_of(config).sites or config.privacy.num_units
        if device.count and first + every * (device.count - 1) >= registered:
            raise SottoError(
                "SOT946", what=f"there are more than {device.count - 1:,} users here", where=config.data.train,
                why=f"the register has {config.privacy.num_units:,} users, each {every}th of them at this node",
                fix="correct privacy.num_units on both sides before the first round",
            )  # fmt: skip
        return device

    @property
    def count(self) -> int:
        """How many users it has; a site counts as one."""
        if setting_of(self.config).sites:
            return 1
        users = len(self.data.units)
        return len(range(self.first, users, self.every)) if self.shared else users

    def local(self, user: int) -> int:
        """The index in this node's data of a user of the register."""
        return user if self.shared else (user - self.first) // self.every

    def answer(self, message: Message, context: Context) -> RecordDict:
        """What is sent back for an order.

        Raises:
          SottoError: SOT940 to SOT945 and SOT950, the order is refused.
        """
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        layout = Layout.of(parameters)
        order, agreement, users = messages.read_order(message, dict(layout.shapes))
        self.check(agreement)
        if order.clip_norm > agreement.clip_norm and self.config.method.clipping != "adaptive":
            raise policy.refuse(f"the bound is {order.clip_norm:g}", "order.clip_norm", "keep to the agreed bound")
        source = self._site(agreement) if setting_of(self.config).sites else self._client(message, agreement)

        self.attendance.admit(order.run, agreement, self.policy)
        most = self.policy.max_rounds
        if not setting_of(self.config).sites:  # which are asked in every round
            most = min(most, most_draws(agreement.steps, agreement.sampling_prob))

        def answer(user: int) -> torch.Tensor:
            self.attendance.enter(order.run, user, order.step, most)
            return source(order, user)

        mine, shares = [user for user in users if self.has(user)], self.shares(agreement)
        if not setting_of(self.config).masks:
            return messages.answer_content({user: answer(user) for user in mine})
        assert shares is not None
        label = f"{order.run}/{order.step}"
        return messages.answer_content(masked_answers(message, context, label, mine, answer, shares))

    def begin_masked(self, message: Message, context: Context) -> RecordDict:
        """The public keys of its users in a masked round.

        Raises:
          SottoError: SOT940, SOT941, the run is not one that its owner allows; SOT945, this is no request of it.
        """
        agreement = messages.read_agreement(message)
        self.check(agreement)
        shares = self.shares(agreement)
        if shares is None or not setting_of(self.config).masks:
            raise policy.refuse("the round is masked", "setting.masks", "use the same recipe")
        mine = [user for user in messages.read_users(message) if self.has(user)]
        return answer_keys(message, context, mine, shares.least, self.policy.min_others or 0)

    def has(self, user: int) -> bool:
        """Whether a number of the register stands for this site, or for one of the users here."""
        if setting_of(self.config).sites:
            return user == self.first
        return user % self.every == self.first and self.local(user) < len(self.data.units)

    def _client(self, message: Message, agreement: Agreement) -> Callable[[Order, int], torch.Tensor]:
        key = _key(agreement)
        codec = codec_for(self.config, self.model, key)
        if state := codec.state():
            codec.restore(messages.read_codec(message, {n: tuple(t.shape) for n, t in state.items()}))
        compute = local_computation(self.config, self.model, self.data, self.pad, key, codec)
        client = Client(compute, codec, self.data, self.shares(agreement), noise_for(self.config))
        return lambda order, user: client.answer(order, self.local(user), user)

    def _site(self, agreement: Agreement) -> Callable[[Order, int], torch.Tensor]:
        if agreement.digest not in self.sites:  # the engine stays attached to the model from then on
            for site in self.sites.values():
                site.engine.detach()
            shares, noise = self.shares(agreement), noise_for(self.config)
            key = _key(agreement)
            made = site_for(self.config, self.model, self.tokenizer, self.data, key, shares, noise)
            self.sites = {agreement.digest: made}
        return self.sites[agreement.digest].answer

    def shares(self, agreement: Agreement) -> Shares | None:
        """The noise that is added here, from the agreed numbers."""
        setting = setting_of(self.config)
        if setting.noise != "clients":
            return None
        expected = setting.sites or self.config.run.expected_batch_size
        reach = reach_for(self.config)
        return Shares.of(agreement.clip_norm, agreement.noise_multiplier, expected, setting.dropouts, reach)

    def check(self, agreement: Agreement) -> None:
        """Refuses what the owner does not allow, and what this device would not compute as announced.

        Raises:
          SottoError: SOT940, SOT941.
        """
        policy.check(self.policy, agreement, self.fingerprint)
        announced = {"local": agreement.local, "unit": agreement.unit, "num_units": agreement.num_units}
        own = {
            "local": what_devices_do(self.config),
            "unit": self.config.privacy.unit,
            "num_units": self.config.privacy.num_units,
        }
        for name, value in own.items():
            if announced[name] != value:
                raise policy.refuse(f"the server's '{name}' is another", f"agreement.{name}", "use the same recipe")
        if agreement.codec.get("codec") != setting_of(self.config).codec:
            raise policy.refuse("the codec is another", "agreement.codec", "use the same recipe")


def _key(agreement: Agreement) -> str:
    return str(agreement.codec.get("key", agreement.directions or ""))


@functools.cache
def device_of(recipe: str, rules: str, first: int, every: int, shared: bool) -> Device:
    return Device.load(Path(recipe), Path(rules), first, every, shared)


def device_for(context: Context) -> Device:
    """The device of a SuperNode, from its node configuration.

    Raises:
      SottoError: SOT947, the node configuration lacks something.
    """
    node = context.node_config
    try:
        first, every = int(node["partition-id"]), int(node["num-partitions"])
        recipe, rules = str(node["recipe"]), str(node["policy"])
    except (KeyError, ValueError) as error:
        raise SottoError(
            "SOT947", what=f"the node configuration lacks {error}", where="flower-supernode --node-config",
            why="the owner of a device names its recipe, its policy and its place in the register",
            fix="--node-config 'partition-id=0 num-partitions=2 recipe=\"/…/device.yaml\" policy=\"/…/policy.yaml\"'",
        ) from None  # fmt: skip
    return device_of(recipe, rules, first, every, str(node.get("data", "own")) == "shared")


def hello(message: Message, context: Context) -> Message:
    """Says which users this node has, or that it does not take part."""
    device = device_for(context)
    device.check(messages.read_agreement(message))
    content = messages.hello_content(device.first, device.every, device.count, device.fingerprint)
    return Message(content, reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Computes what an order asks for."""
    return Message(device_for(context).answer(message, context), reply_to=message)


def keys(message: Message, context: Context) -> Message:
    """The first stage of a masked round."""
    return Message(device_for(context).begin_masked(message, context), reply_to=message)


def shares(message: Message, context: Context) -> Message:
    """The second."""
    return Message(answer_shares(message, context), reply_to=message)


def reveal(message: Message, context: Context) -> Message:
    """The last."""
    return Message(answer_reveal(message, context), reply_to=message)


def owner_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """The last thing before an answer leaves: an error becomes its code, and nothing leaves but what should.

    Exceptions of Python would be sent with their text, which may quote data.
    """
    try:
        reply = call_next(message, context)
        kinds = {name: type(record).__name__ for name, record in reply.content.items()}
        allowed = ({"update": "ArrayRecord"}, {"node": "ConfigRecord"}, {"masks": "ConfigRecord"})
        if kinds not in allowed:
            raise policy.refuse("the answer holds more than it should", "ClientApp", "remove other mods of the app")
        return reply
    except SottoError as error:
        print(error, flush=True)  # to the owner's own log
        return Message(messages.refusal_content(error), reply_to=message)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        failed = SottoError("SOT948", what="the device failed", where="ClientApp", why="see its log", fix="see its log")
        return Message(messages.refusal_content(failed), reply_to=message)


def client_app() -> ClientApp:
    """The ClientApp of a Sotto app."""
    quiet()
    app = ClientApp(mods=[owner_mod])
    app.query("hello")(hello)
    app.query("keys")(keys)
    app.query("shares")(shares)
    app.query("reveal")(reveal)
    app.train()(train)
    return app
