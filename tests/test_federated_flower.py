"""The strategy and the devices over Flower's messages: an in-memory grid with hostile nodes, and a real network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flower_network
import numpy as np
import pytest
import tiny_runs
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from sotto import session as sessions
from sotto.errors import SottoError
from sotto.federated import device as devices
from sotto.federated import messages, policy
from sotto.federated.app import serve, write_app
from sotto.federated.server import agreement
from sotto.federated.simulate import simulate
from sotto.federated.strategy import SottoStrategy, Streaming
from sotto.metrics import Metrics
from sotto.privacy import accounting
from sotto.privacy.adversaries import most_draws
from sotto.privacy.ledger import Ledger

SETTING: dict[str, Any] = {"kind": "federated", "local_batch_size": 2, "timeout": 5}
NODES = (11, 22)


def write_files(folder: Path, rules: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A recipe for the server, and a recipe, a policy and its own text for each of two nodes."""
    changes = {"setting": SETTING, "privacy": {"dataset": "phones"}, **changes}
    values = tiny_runs.classification(folder, **changes)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    rows = tiny_runs.rows()
    names = sorted({row["who"] for row in rows})
    for part in range(2):
        mine = set(names[part::2])
        tiny_runs.write_csv(folder / f"part{part}.csv", [row for row in rows if row["who"] in mine])
        own = {**values, "data": {**values["data"], "train": str(folder / f"part{part}.csv")}}
        (folder / f"device{part}.yaml").write_text(yaml.safe_dump(own))
        limits = {"max_epsilon": 9.0, "max_rounds": 50, "max_delta": 1e-4, **(rules or {})}
        (folder / f"policy{part}.yaml").write_text(yaml.safe_dump(limits))
    return recipe


def context(folder: Path, part: int) -> Context:
    node = {
        "partition-id": part,
        "num-partitions": 2,
        "recipe": str(folder / f"device{part}.yaml"),
        "policy": str(folder / f"policy{part}.yaml"),
    }
    return Context(run_id=1, node_id=NODES[part], node_config=node, state=RecordDict(), run_config={})


def handle(message: Message, at: Context) -> Message:
    """What a node's ClientApp does."""
    handlers = {
        messages.HELLO: devices.hello,
        messages.TRAIN: devices.train,
        messages.KEYS: devices.keys,
        messages.SHARES: devices.shares,
        messages.REVEAL: devices.reveal,
    }
    return devices.owner_mod(message, at, handlers[message.metadata.message_type])


class MemoryGrid(Grid):
    """Carries messages to handlers in this process. `tamper` may change what a node answers to an order."""

    def __init__(self, folder: Path, tamper: Callable[[Message, Message], list[Message]] | None = None):
        self.contexts = {node: context(folder, part) for part, node in enumerate(NODES)}
        self.tamper = tamper or (lambda order, reply: [reply])
        self.sent: list[Message] = []
        self.replies: dict[str, list[Message]] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            names.append(name)
            reply = handle(message, self.contexts[message.metadata.dst_node_id])
            self.replies[name] = self.tamper(message, reply) if message.metadata.message_type == "train" else [reply]
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for name in message_ids for reply in self.replies.pop(name, [])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


@pytest.fixture(autouse=True)
def forget_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sotto.federated.strategy.POLL_SECONDS", 0.01)
    for name in ("_run_id", "_node_id", "_task_id"):  # which Flower sets in the process of an app
        monkeypatch.setattr(TaskIdentity, name, 1)
    devices.device_of.cache_clear()


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[Any, SottoStrategy]]]:
    """Makes servers of new runs, and ends them."""
    made: list[SottoStrategy] = []

    def start(folder: Path, **changes: Any) -> tuple[Any, SottoStrategy]:
        recipe = write_files(folder, **changes)
        session = sessions.start(sessions.Config.load(recipe), "recipe", carrier=lambda order, users: [])
        agreed = agreement(session.config, session.plan, session.engine, session.model)  # type: ignore[arg-type]
        made.append(SottoStrategy(session, agreed, Metrics(session.run.path, False), 5))
        return session, made[-1]

    yield start
    for strategy in made:
        strategy.metrics.close()
        strategy.session.held.close()


def private_numbers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.private.jsonl").read_text().splitlines()]


METHODS = {
    "full": {},
    "srht": {"setting": {**SETTING, "codec": "srht", "latent": 200}},
    "adaptive": {"method": {"train": "full", "clipping": "adaptive"}},
    "learned": {"setting": {**SETTING, "codec": "learned", "latent": 20}},
    "noise of users": {"setting": {**SETTING, "noise": "clients", "dropouts": 0.5}},
    "sites": {"setting": {**SETTING, "sites": 2}},
    "sites with noise": {"setting": {**SETTING, "sites": 2, "noise": "clients"}},
    "masks": {"setting": {**SETTING, "noise": "clients", "dropouts": 0.5, "masks": True}},
    "masks on a codec": {
        "setting": {**SETTING, "codec": "srht", "latent": 200, "noise": "clients", "dropouts": 0.5, "masks": True}
    },
    "sites with masks": {"setting": {**SETTING, "sites": 2, "noise": "clients", "dropouts": 0.0, "masks": True}},
    "zeroth order": {"method": {"train": "head", "gradient": "zeroth_order", "zeroth_probes": 2}},
    "spry": {
        "method": {"train": "lora", "gradient": "zeroth_order", "zeroth_probes": 2, "zeroth_smoothing": 0},
        "setting": {**SETTING, "parts": 3},
    },
    "rows": {"setting": {**SETTING, "embedding_rows": 12}, "method": {"train": "lora"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_over_flower_the_weights_are_those_of_the_simulation(name: str, tmp_path: Path):
    debug = {"debug_noise_seed": 5}
    recipe = write_files(tmp_path, run=debug, **METHODS[name])
    over = serve(MemoryGrid(tmp_path), recipe)
    (tmp_path / "alone").mkdir()
    changes = {"setting": SETTING, **METHODS[name]}
    alone = simulate(tiny_runs.config(tmp_path / "alone", run=debug, **changes))
    assert over.steps == alone.steps == 4
    assert private_numbers(over.path)[0]["answers"]["refused"] == {}
    # Users come in the order of the register, and the two files have them in turn.
    tiny_runs.assert_same(tiny_runs.final_weights(over.path), tiny_runs.final_weights(alone.path), tolerance=1e-6)


def test_a_run_over_flower_is_charged_and_stated(tmp_path: Path):
    run = serve(MemoryGrid(tmp_path), write_files(tmp_path))
    assert run.finished
    assert "AGAINST WHOM" in run.statement
    secret = json.loads((run.path / "private" / "secrets.json").read_text())
    assert Ledger.open(secret["ledger"]).runs[run.path.name].reserved == 4
    assert all(n["answers"]["asked"] == n["answers"]["answered"] for n in private_numbers(run.path))


def test_orders_and_answers_hold_nothing_private(tmp_path: Path):
    answers: list[Message] = []

    def keep(order: Message, reply: Message) -> list[Message]:
        answers.append(reply)
        return [reply]

    grid = MemoryGrid(tmp_path, keep)
    serve(grid, write_files(tmp_path))
    assert answers
    for reply in answers:
        assert list(reply.content) == ["update"]
        for array in reply.content.array_records["update"].values():
            assert array.dtype == "float32"
            assert np.linalg.norm(array.numpy().astype(np.float64)) <= 1.0
    everything = b"".join(
        array.data for m in [*grid.sent, *answers] for r in m.content.array_records.values() for array in r.values()
    )
    words = json.dumps([dict(r) for m in grid.sent for r in m.content.config_records.values()], default=str)
    for secret in (tiny_runs.CANARY, "patient-", "sampling_key"):
        assert secret.encode() not in everything
        assert secret not in words


# ---- hostile nodes


def with_vectors(change: Callable[[np.ndarray], Any]) -> Callable[[Message, Message], list[Message]]:
    def tamper(order: Message, reply: Message) -> list[Message]:
        arrays = {user: change(a.numpy()) for user, a in reply.content.array_records["update"].items()}
        made = {user: a if isinstance(a, Array) else Array(a) for user, a in arrays.items() if a is not None}
        return [Message(RecordDict({"update": ArrayRecord(made)}), reply_to=order)]

    return tamper


def lying_header(vector: np.ndarray) -> Array:
    """Bytes whose own header asks for far more memory than is there."""
    honest = Array(vector)
    huge = honest.data.replace(f"({vector.size},)".encode(), b"(99999999999,)"[: len(f"({vector.size},)")])
    return Array("float32", (vector.size,), "numpy.ndarray", huge)


HOSTILE = {
    "huge": with_vectors(lambda v: np.full_like(v, 1e30)),
    "nan": with_vectors(lambda v: np.full_like(v, np.nan)),
    "another shape": with_vectors(lambda v: v[:-1]),
    "oversized": with_vectors(lambda v: np.tile(v, 1000)),
    "integers": with_vectors(lambda v: v.astype(np.int64)),
    "half precision": with_vectors(lambda v: v.astype(np.float16)),
    "nothing for its users": with_vectors(lambda v: None),
    "a lying header": with_vectors(lying_header),
    "pickled bytes": with_vectors(lambda v: Array("float32", v.shape, "numpy.ndarray", b"\x80\x04cos\nsystem\n.")),
    "another format": with_vectors(lambda v: Array("float32", v.shape, "torch", b"PK\x03\x04")),
    "an error": lambda order, reply: [Message(Error(code=0, reason="no"), reply_to=order)],
    "silence": lambda order, reply: [],
    "twice": lambda order, reply: [reply, reply],
    "metrics": lambda order, reply: [
        Message(RecordDict({"m": MetricRecord({"num-examples": 10**9})}), reply_to=order)  # type: ignore[arg-type]
    ],
    "a text": lambda order, reply: [Message(RecordDict({"update": ConfigRecord({"x": "y"})}), reply_to=order)],
}


def test_bytes_of_a_stranger_are_compared_and_not_parsed(monkeypatch: pytest.MonkeyPatch):
    honest = Array(np.ones(50, dtype=np.float32))
    assert messages._read(honest, (50,)).tolist() == [1.0] * 50
    longer = Array("float32", (50,), "numpy.ndarray", honest.data.replace(b"(50,)", b"(51,)"))
    by_columns = Array("float32", (50,), "numpy.ndarray", honest.data.replace(b"False", b"True "))
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("numpy parsed it"))
    for array in (longer, by_columns, Array("float32", (50,), "numpy.ndarray", honest.data[:-1])):
        with pytest.raises(ValueError, match="inside"):
            messages._read(array, (50,))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_node_moves_a_round_by_no_more_than_its_users_may(name: str, tmp_path: Path, started: Any):
    """Against the same round in which this node is silent."""
    sums, of_node = [], 0
    for label in (name, "silence"):
        folder = tmp_path / label.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        devices.device_of.cache_clear()
        session, strategy = started(folder, run={"debug_noise_seed": 3})

        def tamper(order: Message, reply: Message, label: str = label) -> list[Message]:
            return HOSTILE[label](order, reply) if order.metadata.dst_node_id == NODES[0] else [reply]

        grid = MemoryGrid(folder, tamper)
        orders = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
        assert strategy._open is not None
        replies = Streaming(grid).send_and_receive(orders, timeout=0)
        answers = strategy._answers(replies, f"{session.run.id}/0")
        sums.append(strategy._engine.add_up(strategy._open[1], answers).gradients["latent"])
        of_node = sum(user in strategy._homes[NODES[0]] for user in strategy._open[1].tolist())
    assert of_node
    assert float((sums[0] - sums[1]).norm()) <= of_node * session.plan.clip_norm * (1 + 1e-6)


def test_a_whole_round_through_flowers_interface(tmp_path: Path, started: Any):
    """As Flower's own loop, or somebody's test of a strategy, calls it; replies of other rounds do not count."""
    session, strategy = started(tmp_path, run={"expected_batch_size": 60})  # everybody, in every round
    grid = MemoryGrid(tmp_path)
    orders = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(orders))
    strategy.summary()
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is None
    assert arrays is not None
    assert session.step == 1
    assert private_numbers(session.run.path)[-1]["answers"]["answered"] == 60
    assert strategy.aggregate_train(1, replies) == (None, None)  # a round is closed once
    strategy.configure_train(2, arrays, ConfigRecord(), grid)
    before = session.step
    strategy.aggregate_train(2, replies)  # stale: of round 1
    assert session.step == before + 1
    assert private_numbers(session.run.path)[-1]["answers"]["answered"] == 0
    assert list(strategy.configure_evaluate(2, arrays, ConfigRecord(), grid)) == []
    assert strategy.aggregate_evaluate(2, []) is None


def test_a_device_with_one_user_and_one_class_takes_part(tmp_path: Path, started: Any):
    """That it has little to learn from is private, and no reason to say so."""
    _, strategy = started(tmp_path)
    rows = [row for row in tiny_runs.rows() if row["who"] == tiny_runs.unit_name(0)]
    tiny_runs.write_csv(tmp_path / "part0.csv", [{**row, "label": "good"} for row in rows])
    devices.device_of.cache_clear()
    device = devices.device_for(context(tmp_path, 0))
    assert device.count == 1
    device.check(strategy.agreement)


def test_two_nodes_cannot_claim_the_same_users(tmp_path: Path, started: Any):
    _, strategy = started(tmp_path)
    grid = MemoryGrid(tmp_path)
    grid.contexts[33] = context(tmp_path, 0)
    strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    assert sorted(strategy._homes) == list(NODES)
    assert strategy._left_out == {33}


def test_a_node_that_was_started_again_under_another_number_keeps_its_users(tmp_path: Path, started: Any):
    _, strategy = started(tmp_path)
    grid = MemoryGrid(tmp_path)
    strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    users = strategy._homes[NODES[0]]
    grid.contexts[33] = grid.contexts.pop(NODES[0])
    strategy.configure_train(2, ArrayRecord(), ConfigRecord(), grid)
    assert strategy._homes == {NODES[1]: strategy._homes[NODES[1]], 33: users}
    assert strategy._left_out == set()


def test_a_node_with_another_model_is_left_out_and_the_run_goes_on(tmp_path: Path):
    recipe = write_files(tmp_path)
    other = yaml.safe_load((tmp_path / "device0.yaml").read_text())
    other["method"] = {"train": "head"}
    (tmp_path / "device0.yaml").write_text(yaml.safe_dump(other))
    run = serve(MemoryGrid(tmp_path), recipe)
    assert run.finished
    assert sum(n["answers"]["answered"] for n in private_numbers(run.path)) < sum(
        n["answers"]["asked"] for n in private_numbers(run.path)
    )


# ---- masks


MASKED: dict[str, Any] = {**SETTING, "noise": "clients", "dropouts": 0.5, "masks": True}


def round_of(strategy: SottoStrategy, grid: MemoryGrid) -> dict[str, Any]:
    """Plays the next round as Flower does; returns the server's private counts."""
    orders = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    strategy.aggregate_train(1, Streaming(grid).send_and_receive(orders, timeout=0))
    return private_numbers(strategy.session.run.path)[-1]["answers"]


def drawn(session: Any, count: int) -> None:
    """The first users of the register are drawn in every round; they live at both nodes in turn."""
    session.sampler.draw = lambda step, attempt=0: np.arange(count)


def with_bytes(change: Callable[[bytes], Any]) -> Callable[[Message, Message], list[Message]]:
    def tamper(order: Message, reply: Message) -> list[Message]:
        found = {user: change(answer) for user, answer in reply.content.config_records["masks"].items()}
        return [Message(RecordDict({"masks": ConfigRecord(found)}), reply_to=order)]

    return tamper


HOSTILE_IN_MASKS = {
    "silence": lambda order, reply: [],
    "an error": lambda order, reply: [Message(Error(code=0, reason="no"), reply_to=order)],
    "a refusal": lambda order, reply: [
        Message(messages.refusal_content(SottoError("SOT950", what="", where="", why="", fix="")), reply_to=order)
    ],
    "short": with_bytes(lambda answer: answer[:-1]),
    "text": with_bytes(lambda answer: "text"),
    "a number": with_bytes(lambda answer: 5),
    "nothing": with_bytes(lambda answer: b""),
    "another record": lambda order, reply: [Message(RecordDict({"masks": MetricRecord({"x": 1})}), reply_to=order)],
    "twice": lambda order, reply: [reply, reply],
}


@pytest.mark.parametrize("kind", [messages.KEYS, messages.SHARES, messages.REVEAL])
def test_a_hostile_node_in_a_masked_round_has_dropped_out(kind: str, tmp_path: Path, started: Any):
    run = {"expected_batch_size": 12, "steps": len(HOSTILE_IN_MASKS)}
    session, strategy = started(tmp_path, setting={**MASKED, "dropouts": 0.8}, run=run)
    drawn(session, 6)
    grid, tamper = MemoryGrid(tmp_path), dict[str, Any]()
    right = grid.pull_messages

    def pull(names: Iterable[str]) -> Iterable[Message]:
        found = []
        for reply in right(names):
            order = next(m for m in grid.sent if m.metadata.message_id == reply.metadata.reply_to_message_id)
            at_node = order.metadata.message_type == kind and order.metadata.dst_node_id == NODES[0]
            found += tamper["now"](order, reply) if at_node else [reply]
        return found

    grid.pull_messages = pull  # type: ignore[method-assign]
    for step, (name, change) in enumerate(HOSTILE_IN_MASKS.items()):
        tamper["now"] = change
        answered = round_of(strategy, grid)["answered"]
        assert session.step == step + 1
        # Half of a list is no majority; where keys are lost the list is of the others alone.
        assert answered == (6 if name == "twice" else 3 if kind == messages.KEYS else 0), name


def test_a_node_that_was_started_again_in_a_masked_round_has_dropped_out(tmp_path: Path, started: Any):
    session, strategy = started(tmp_path, setting={**MASKED, "dropouts": 0.8})
    drawn(session, 6)
    grid = MemoryGrid(tmp_path)
    lost = {11: True}

    def forget(order: Message, reply: Message) -> list[Message]:
        if lost.pop(order.metadata.dst_node_id, None):
            grid.contexts[11] = context(tmp_path, 0)  # before it was asked to reveal
        return [reply]

    grid.tamper = forget
    heard = round_of(strategy, grid)
    assert (heard["asked"], heard["answered"]) == (6, 0)
    assert any("given up: too few reveals" in why for why in heard["refused"])
    assert round_of(strategy, grid)["answered"] == 6


def test_a_device_answers_each_request_of_a_masked_round_once(tmp_path: Path, started: Any):
    """Sent again, whether as it was or with other survivors, it is refused; and its secrets are gone."""
    session, strategy = started(tmp_path, setting=MASKED)
    drawn(session, 6)
    grid = MemoryGrid(tmp_path)
    round_of(strategy, grid)
    assert all(not at.state.config_records["masks"] for at in grid.contexts.values())
    for message in grid.sent:
        if message.metadata.message_type in (messages.SHARES, messages.TRAIN, messages.REVEAL):
            reply = handle(message, grid.contexts[message.metadata.dst_node_id])
            assert dict(reply.content.config_records["refused"]) == {"code": "SOT950"}


def test_a_masked_round_hides_messages_and_register(tmp_path: Path, started: Any):
    """What reaches a node names its own users alone; what reaches the server is not what was sent without masks."""
    session, strategy = started(tmp_path, setting=MASKED)
    drawn(session, 6)
    grid, words = MemoryGrid(tmp_path), dict[int, np.ndarray]()

    def keep(order: Message, reply: Message) -> list[Message]:
        words.update({int(u): a.numpy() for u, a in reply.content.array_records["update"].items()})
        return [reply]

    grid.tamper = keep
    round_of(strategy, grid)
    assert len(words) == 6
    for vector in words.values():  # uniform: no message is, which are short
        assert vector.dtype == np.uint32
        assert abs(np.mean(vector >> 31) - 0.5) < 0.02
    for message in grid.sent:
        if (record := message.content.config_records.get("round")) is not None:
            home = strategy._homes[message.metadata.dst_node_id]
            assert all(user in home for user in record["users"])  # type: ignore[union-attr]


def test_an_owner_can_ask_for_masks_and_for_others(tmp_path: Path, started: Any):
    _, plain = started(tmp_path, setting={**MASKED, "masks": False}, rules={"masks": True})
    with pytest.raises(SottoError, match="SOT940"):
        devices.device_for(context(tmp_path, 0)).check(plain.agreement)
    for others, answered in ((5, 6), (6, 0)):
        devices.device_of.cache_clear()
        folder = tmp_path / str(others)
        folder.mkdir()
        session, strategy = started(folder, setting=MASKED, rules={"min_others": others})
        drawn(session, 6)
        assert round_of(strategy, MemoryGrid(folder))["answered"] == answered


MALFORMED = {
    "no users": {"round": {"label": "r/0"}},
    "users that are none": {"round": {"label": "r/0", "users": ["a"]}},
    "no roster": {"round": {"label": "r/0", "users": [0]}},
    "a roster of numbers": {"round": {"label": "r/0", "users": [0]}, "roster": {"roster": [1]}},
    "a roster of text": {"round": {"label": "r/0", "users": [0]}, "roster": {"roster": "keys"}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_request_that_is_none_is_refused_by_the_device(name: str, tmp_path: Path):
    records = {key: ConfigRecord(values) for key, values in MALFORMED[name].items()}  # type: ignore[arg-type]
    message = Message(RecordDict(records), 11, messages.SHARES)  # type: ignore[arg-type]
    reply = handle(message, context(tmp_path, 0))
    assert dict(reply.content.config_records["refused"])["code"] in ("SOT945", "SOT950")


# ---- the owner's policy


REFUSED = {
    "epsilon": ({"max_epsilon": 1.0}, "SOT940"),
    "noise": ({"min_noise_multiplier": 50.0}, "SOT940"),
    "delta": ({"max_delta": 1e-9}, "SOT940"),
    "model": ({"model": "0" * 64}, "SOT940"),
    "codec": ({"codec": "srht"}, "SOT940"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_device_refuses_what_its_owner_does_not_allow(name: str, tmp_path: Path, started: Any):
    rules, code = REFUSED[name]
    _, strategy = started(tmp_path, rules=rules)
    device = devices.device_for(context(tmp_path, 0))
    with pytest.raises(SottoError, match=code):
        device.check(strategy.agreement)
    hello = Message(RecordDict({"agreement": messages.agreement_record(strategy.agreement)}), 11, messages.HELLO)
    reply = handle(hello, context(tmp_path, 0))
    assert dict(reply.content.config_records["refused"]) == {"code": code}  # a code, and no text


def test_rounds_are_counted_at_the_device_and_stale_ones_refused(tmp_path: Path):
    attendance = policy.Attendance(tmp_path / "a.json")
    attendance.enter("run", 4, 7, 2)
    with pytest.raises(SottoError, match="SOT942"):
        attendance.enter("run", 4, 6, 2)
    policy.Attendance(tmp_path / "a.json").enter("run", 4, 7, 2)  # the server began the round again
    with pytest.raises(SottoError, match="SOT940"):
        attendance.enter("run", 4, 8, 2)
    attendance.enter("run", 5, 0, 2)
    attendance.enter("another", 4, 0, 2)
    assert oct((tmp_path / "a.json").stat().st_mode & 0o777) == "0o600"
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(SottoError, match="SOT943"):
        attendance.enter("run", 9, 9, 9)


def test_a_server_that_begins_again_under_another_name_is_found_out(tmp_path: Path, started: Any):
    """Epsilon of one run is within the owner's limit, and of two not; the same run may ask as often as it likes."""
    _, strategy = started(tmp_path)
    agreed = strategy.agreement
    event = [(accounting.PoissonGaussian(agreed.noise_multiplier, agreed.sampling_prob), agreed.steps)]
    one = accounting.composed_epsilon(event, 1e-4, precision="coarse")
    rules = policy.Policy(max_epsilon=99, max_rounds=9, max_total_epsilon=1.1 * one)
    attendance = policy.Attendance(tmp_path / "a.json")
    attendance.admit("run", agreed, rules)
    attendance.admit("run", agreed, rules)
    other = dataclasses.replace(agreed, steps=agreed.steps + 1)
    for name, facts in (("another", agreed), ("run", other)):
        with pytest.raises(SottoError, match="SOT940"):
            policy.Attendance(tmp_path / "a.json").admit(name, facts, rules)
    generous = rules.model_copy(update={"max_total_epsilon": 3 * one})
    attendance.admit("another", agreed, generous)
    attendance.admit("free", other, policy.Policy(max_epsilon=99, max_rounds=9))
    (tmp_path / "a.runs.json").write_text("[")
    with pytest.raises(SottoError, match="SOT943"):
        attendance.admit("yet another", agreed, rules)


def test_a_user_who_is_drawn_too_often_for_the_announced_probability_stops_answering(tmp_path: Path, started: Any):
    _, strategy = started(tmp_path, rules={"max_epsilon": 99, "max_rounds": 1000})
    rare = dataclasses.replace(strategy.agreement, sampling_prob=0.001, steps=50)
    most = most_draws(50, 0.001)
    assert 1 <= most < 10
    weights = {"weights": messages.packed(strategy._engine.order(0).weights)}
    codes = []
    for step in range(most + 2):
        order = dataclasses.replace(strategy._engine.order(step))
        reply = handle(
            messages.order_message(weights, order, rare, 11, [0], f"{order.run}/{step}"), context(tmp_path, 0)
        )
        refused = reply.content.config_records.get("refused")
        codes.append(None if refused is None else refused["code"])
    assert codes == [None] * most + ["SOT940"] * 2


def test_a_server_that_claims_less_than_its_numbers_cost_is_refused(tmp_path: Path, started: Any):
    """The device computes epsilon itself."""
    _, strategy = started(tmp_path)
    device = devices.device_for(context(tmp_path, 0))
    device.check(strategy.agreement)
    for change in ({"steps": 10**6}, {"sampling_prob": 1.0}, {"noise_multiplier": 0.01}):
        with pytest.raises(SottoError, match="SOT940"):
            device.check(dataclasses.replace(strategy.agreement, **change))


def test_a_larger_bound_than_agreed_is_refused(tmp_path: Path, started: Any):
    _, strategy = started(tmp_path)
    order = strategy._engine.order(0)
    larger = type(order)(order.step, 100.0, order.weights, order.run)
    message = messages.order_message(
        {"weights": messages.packed(order.weights)}, larger, strategy.agreement, 11, [0], "g"
    )
    reply = handle(message, context(tmp_path, 0))
    assert dict(reply.content.config_records["refused"]) == {"code": "SOT940"}


def test_what_goes_wrong_at_a_device_stays_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def fails(message: Message, at: Context) -> Message:
        raise RuntimeError(f"could not read {tiny_runs.CANARY}")

    reply = devices.owner_mod(Message(RecordDict({}), 11, "train"), context(tmp_path, 0), fails)
    assert dict(reply.content.config_records["refused"]) == {"code": "SOT948"}
    assert tiny_runs.CANARY in capsys.readouterr().out

    def chatty(message: Message, at: Context) -> Message:
        record = MetricRecord({"loss": 0.5})
        return Message(RecordDict({"update": ArrayRecord(), "metrics": record}), reply_to=message)

    reply = devices.owner_mod(Message(RecordDict({}), 11, "train"), context(tmp_path, 0), chatty)
    assert dict(reply.content.config_records["refused"]) == {"code": "SOT940"}


@pytest.mark.parametrize("text", ["", "max_rounds: 3", "max_epsilon: -1\nmax_rounds: 3", "- a", "max_epsilonn: 3"])
def test_a_file_that_is_no_policy_is_refused(text: str, tmp_path: Path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SottoError, match="SOT944"):
        policy.load(tmp_path / "p.yaml")


def test_a_server_needs_a_name_for_its_register(tmp_path: Path):
    recipe = write_files(tmp_path, privacy={})
    with pytest.raises(SottoError, match="SOT933"):
        write_app(recipe, tmp_path / "app")


# ---- a real network


@pytest.mark.slow
def test_two_supernodes_over_tls_killed_in_the_middle_of_a_round(tmp_path: Path):
    """SuperLink, nodes and server are killed and started again; the run finishes, and every round is charged."""
    recipe = write_files(tmp_path, run={"steps": 6, "spare_steps": 10})
    app = write_app(recipe, tmp_path / "app")
    network = tmp_path / "network"
    network.mkdir()

    def lines(run: Path | None) -> int:
        return tiny_runs.steps_done(run) if run else 0

    def folder() -> Path | None:
        found = [p for p in (tmp_path / "runs").glob("[!.]*") if (p / "plan.json").exists()]
        return found[0] if found else None

    with flower_network.Network(network) as net:
        link = net.superlink()
        nodes = [net.supernode(f"node{p}", _node_config(tmp_path, p)) for p in range(2)]
        net.flwr("run", str(app), "here")
        flower_network.wait_for(lambda: lines(folder()) >= 2, 120, "two rounds")
        net.kill(nodes[0])
        net.kill(link)  # and with it the server of the run
        before = lines(folder())
    again = tmp_path / "again"
    again.mkdir()
    with flower_network.Network(again) as net:
        net.superlink()
        for part in range(2):
            net.supernode(f"node{part}", _node_config(tmp_path, part))
        run = folder()
        assert run is not None
        net.flwr("run", str(app), "here", "--run-config", f'resume="{run}"')
        flower_network.wait_for(lambda: (run / "privacy.json").exists(), 180, "the end of the run")
        assert lines(run) >= before
    facts = json.loads((run / "privacy.json").read_text())
    secret = json.loads((run / "private" / "secrets.json").read_text())
    entry = Ledger.open(secret["ledger"]).runs[run.name]
    assert facts["steps"] == 6
    assert entry.reserved == facts["steps_charged"] >= 6
    assert set(entry.attempts) == set(range(6))


@pytest.mark.slow
def test_masked_rounds_over_tls(tmp_path: Path):
    """Every message is handled by a process of its own: what a device keeps between them is kept by Flower."""
    recipe = write_files(tmp_path, setting={**MASKED, "timeout": 60}, run={"steps": 3})
    app = write_app(recipe, tmp_path / "app")
    network = tmp_path / "network"
    network.mkdir()
    with flower_network.Network(network) as net:
        net.superlink()
        for part in range(2):
            net.supernode(f"node{part}", _node_config(tmp_path, part))
        net.flwr("run", str(app), "here")
        flower_network.wait_for(lambda: any((tmp_path / "runs").glob("*/privacy.json")), 300, "the end of the run")
    run = next((tmp_path / "runs").glob("*/privacy.json")).parent
    rounds = [numbers["answers"] for numbers in private_numbers(run)]
    assert len(rounds) == 3
    # A round of fewer than six is given up; three in a row happen once in a million runs.
    assert any(heard["answered"] >= 6 for heard in rounds)
    for heard in rounds:
        assert heard["answered"] in (0, heard["asked"]), heard
        assert heard["answered"] or heard["asked"] < 6, heard


def _node_config(folder: Path, part: int) -> str:
    values = context(folder, part).node_config
    return " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in values.items())
