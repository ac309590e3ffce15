"""What goes over the network, as Flower's records: a few kinds of message, and nothing beside what is written here.

    hello    server -> node   {}                       node -> server   which users it has, or why it takes no part
    train    server -> node   weights, order, users    node -> server   one vector for each of these users

With masks there are three more (`masking`), and train brings shares as well:

    keys     server -> node   round, users             node -> server   public keys of each user
    shares   server -> node   all keys of the round    node -> server   each user's encrypted shares for the others
    reveal   server -> node   who sent a vector        node -> server   shares that take the masks off the sum

An answer holds vectors and nothing else: no metric, no number of examples, no loss. A refusal holds the code of an
error, never its text, which could name files. Arrays are float32 or integers in numpy's own format, which cannot hold
objects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.array import SType

from sotto.errors import SottoError
from sotto.federated.client import Order
from sotto.federated.server import Agreement

HELLO, TRAIN = "query.hello", "train"
KEYS, SHARES, REVEAL = "query.keys", "query.shares", "query.reveal"
MOST_USERS = 1 << 20
"""Users of one node that a server believes."""


def packed(weights: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Weights for sending; made once a round."""
    return ArrayRecord({n: Array(w.detach().float().cpu().numpy()) for n, w in weights.items()})


def agreement_record(agreement: Agreement) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(dataclasses.asdict(agreement))})


def read_agreement(message: Message) -> Agreement:
    """The agreement that came with a hello.

    Raises:
      SottoError: SOT945, there is none.
    """
    try:
        return _agreement(message.content.config_records["agreement"]["json"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_order(error) from None


def _agreement(text: Any) -> Agreement:
    found = Agreement(**json.loads(text))
    for name in ("sampling_prob", "noise_multiplier", "clip_norm", "delta", "steps", "num_units"):
        if isinstance(value := getattr(found, name), bool) or not isinstance(value, int | float):
            raise ValueError(name)
    if not (isinstance(found.codec, dict) and isinstance(found.local, dict)):
        raise ValueError("codec or local")
    return found


def _no_order(error: Exception) -> SottoError:
    return SottoError(
        "SOT945", what=f"this is no order ({type(error).__name__})", where="message from the server",
        why="it lacks something, or its weights are not those of this device's model",
        fix="use the same version of Sotto and the same configuration on both sides",
    )  # fmt: skip


def order_message(
    tensors: Mapping[str, ArrayRecord],
    order: Order,
    agreement: Agreement,
    node: int,
    users: Sequence[int],
    group: str,
    masks: ConfigRecord | None = None,
) -> Message:
    """An order to one node, for those of its users who were drawn.

    Args:
      tensors: `weights`, and `codec` where the codec has a state: `packed`.
      masks: what users need to mask what they answer.
    """
    facts = {
        "run": order.run,
        "step": order.step,
        "clip_norm": order.clip_norm,
        "agreement": json.dumps(dataclasses.asdict(agreement)),
        "users": list(users),
    }
    content = RecordDict({**tensors, "order": ConfigRecord(facts)})  # type: ignore[arg-type]
    if masks is not None:
        content["masks"] = masks
    return Message(content, dst_node_id=node, message_type=TRAIN, group_id=group)


def read_order(message: Message, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Order, Agreement, list[int]]:
    """An order as a device understands it.

    Args:
      shapes: of the trained tensors of the device's own model.

    Raises:
      SottoError: SOT945, it is no order, or for tensors of other shapes.
    """
    try:
        facts = message.content.config_records["order"]
        agreement = _agreement(facts["agreement"])
        users = [int(user) for user in facts["users"]]  # type: ignore[union-attr]
        record = message.content.array_records["weights"]
        if record.keys() != shapes.keys():
            raise ValueError("names")
        weights = {name: _tensor(record[name], shapes[name]) for name in shapes}
        clip_norm, step = float(facts["clip_norm"]), int(facts["step"])  # type: ignore[arg-type]
        if not (0 < clip_norm < float("inf") and step >= 0 and all(user >= 0 for user in users)):
            raise ValueError("range")
        return Order(step, clip_norm, weights, str(facts["run"])), agreement, users
    except (KeyError, TypeError, ValueError) as error:
        raise _no_order(error) from None


def read_codec(message: Message, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The state of the codec that came with an order.

    Raises:
      SottoError: SOT945, it is not of these shapes.
    """
    try:
        record = message.content.array_records["codec"] if shapes else {}
        return {name: _tensor(record[name], shape) for name, shape in shapes.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _no_order(error) from None


def answer_content(vectors: Mapping[int, torch.Tensor | np.ndarray]) -> RecordDict:
    """What a node sends back: user -> (k,) float32, or integers."""
    whole = {u: v if isinstance(v, np.ndarray) else v.cpu().numpy() for u, v in vectors.items()}
    arrays = {str(user): Array(vector) for user, vector in whole.items()}
    return RecordDict({"update": ArrayRecord(arrays)})


def refusal_content(error: SottoError) -> RecordDict:
    return RecordDict({"refused": ConfigRecord({"code": error.code})})


def vectors_of(message: Message, users: Sequence[int], size: int, kind: str) -> Iterator[tuple[int, Any]]:
    """What a node sent for each of these users: a vector of this size and kind (`float32`, `int32`, ...), or None."""
    try:
        record = message.content.array_records["update"] if message.has_content() else {}
    except (KeyError, ValueError, TypeError):
        record = {}
    for user in users:
        array = record.get(str(user))
        yield user, None if array is None else _vector(array, size, kind)


def _vector(array: Array, size: int, kind: str) -> np.ndarray | None:
    try:
        return _read(array, (size,), kind)
    except (ValueError, TypeError):
        return None


def _tensor(array: Array, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(_read(array, shape))


def _read(array: Array, shape: tuple[int, ...], kind: str = "float32") -> np.ndarray:
    """The array, if it is of this shape and kind.

    Raises:
      ValueError: it is not, or the bytes are not what its header says.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if array.dtype != kind or tuple(array.shape) != shape or array.stype != SType.NUMPY:
        raise ValueError("another type or shape")
    # What numpy would have written in front, byte for byte: nothing that a stranger wrote is parsed.
    buffer, code = BytesIO(), np.dtype(kind).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(buffer, {"descr": code, "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    if len(array.data) != len(header) + np.dtype(kind).itemsize * count or not array.data.startswith(header):
        raise ValueError("another type, shape or length inside")
    return np.frombuffer(array.data, dtype=code, offset=len(header)).reshape(shape).copy()


def hello_content(first: int, every: int, count: int, model: str) -> RecordDict:
    """Which users a node has: `first`, `first + every`, ... , `count` of them; and its model."""
    return RecordDict({"node": ConfigRecord({"first": first, "every": every, "count": count, "model": model})})


def users_of(message: Message, model: str, registered: int) -> range | str:
    """The users that a node says it has, or why it is left out."""
    if not message.has_content():
        return "no answer"
    try:
        facts = message.content.config_records["node"]
        first, every, count = (int(facts[key]) for key in ("first", "every", "count"))  # type: ignore[arg-type]
        if facts["model"] != model:
            return "SOT941: it has another model"
    except (KeyError, TypeError, ValueError):
        refused = message.content.config_records.get("refused", {})
        return f"it refuses: {str(refused.get('code', 'no reason'))[:6]}"
    if not (0 <= first < registered and 1 <= every <= registered and 0 <= count <= MOST_USERS):
        return "its users are not in the register"
    return range(first, min(first + every * count, registered), every)


# ---- masked rounds


def masks_record(**values: object) -> ConfigRecord:
    return ConfigRecord(values)  # type: ignore[arg-type]


def stage_message(
    kind: str, records: Mapping[str, ConfigRecord], label: str, node: int, users: Sequence[int]
) -> Message:
    """A request of a masked round to one node, for those of its users who take part.

    Args:
      kind: `KEYS`, `SHARES` or `REVEAL`.
      records: what is asked with.
      label: names run and round.
    """
    round = ConfigRecord({"label": label, "users": list(users)})
    return Message(RecordDict({**records, "round": round}), dst_node_id=node, message_type=kind, group_id=label)


def bytes_content(answers: Mapping[int, bytes]) -> RecordDict:
    """What a node sends back for such a request: user -> bytes."""
    return RecordDict({"masks": ConfigRecord({str(user): answer for user, answer in answers.items()})})


def bytes_of(message: Message, users: Sequence[int]) -> Iterator[tuple[int, bytes | None]]:
    """What a node sent for each of these users, or None."""
    try:
        record = message.content.config_records["masks"] if message.has_content() else {}
    except (KeyError, ValueError, TypeError):
        record = {}
    for user in users:
        answer = record.get(str(user))
        yield user, answer if isinstance(answer, bytes) else None


def read_label(message: Message) -> str:
    """The name of the round that a request is for.

    Raises:
      SottoError: SOT945, as all of these: it is no request of this kind.
    """
    return str(_value(message, "round", "label"))


def read_users(message: Message) -> list[int]:
    """For whom a request is."""
    return _numbers(_value(message, "round", "users"))


def read_positions(message: Message, name: str) -> list[int]:
    """Positions in the list of a round, under this name in the record `survivors` or `masks`."""
    return _numbers(_value(message, "survivors" if name == "survivors" else "masks", name))


def read_roster(message: Message) -> list[bytes]:
    """The public keys of all users of a round."""
    found = _value(message, "roster", "roster")
    if not (isinstance(found, list) and all(isinstance(both, bytes) for both in found)):
        raise _no_order(TypeError())
    return found


def read_boxes(message: Message, user: int, length: int) -> bytes:
    """(length,) what the others have shared with a user."""
    found = _value(message, "masks", str(user))
    if not (isinstance(found, bytes) and len(found) == length):
        raise _no_order(ValueError())
    return found


def _numbers(found: object) -> list[int]:
    if not (isinstance(found, list) and all(isinstance(n, int) and n >= 0 for n in found)):
        raise _no_order(TypeError())
    return found


def _value(message: Message, record: str, name: str) -> Any:
    try:
        return message.content.config_records[record][name]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_order(error) from None
