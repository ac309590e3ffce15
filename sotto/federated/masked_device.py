"""The users' side of masked rounds over Flower.

Between the requests of a round a user's secrets are in Flower's state of the node, which is the SuperNode's memory: a
node that was started again has none, and has dropped out. What is kept is replaced when a round begins, and dropped
when a request of it fails, so that none is answered twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from sotto.errors import SottoError
from sotto.federated import messages
from sotto.federated.masking import BOX, Party, Word
from sotto.federated.shares import Shares

STATE = "masks"


@contextmanager
def parties(context: Context, label: str) -> Iterator[dict[int, Party]]:
    """user -> party of this round, as the last request left it; what it becomes is kept, or dropped on an error."""
    record = context.state.config_records.pop(STATE, ConfigRecord())
    kept = {int(user): Party.from_dict(json.loads(str(text))) for user, text in record.items()}
    mine = {user: party for user, party in kept.items() if party.label == label}
    yield mine
    keep(context, mine)


def keep(context: Context, found: dict[int, Party]) -> None:
    """Stores the parties of a round, and nothing of those before."""
    left = {str(user): json.dumps(party.to_dict()) for user, party in found.items() if party.stage != "done"}
    context.state.config_records[STATE] = ConfigRecord(left)  # type: ignore[arg-type]


def answer_keys(message: Message, context: Context, users: Sequence[int], least: int, others: int) -> RecordDict:
    """Begins a round: public keys of each user.

    Args:
      users: those of this node who were drawn.
      least, others: of `Party`.
    """
    label = messages.read_label(message)
    found = {user: Party(label, least, others) for user in users}
    answers = {user: party.keys() for user, party in found.items()}
    keep(context, found)
    return messages.bytes_content(answers)


def answer_shares(message: Message, context: Context) -> RecordDict:
    """Shares of each user's secrets, for all others.

    Raises:
      SottoError: SOT950, this is not what is due; SOT945, it is no request.
    """
    roster = messages.read_roster(message)
    return _each(message, context, lambda party: party.shares(roster))


def answer_reveal(message: Message, context: Context) -> RecordDict:
    """What takes the masks off the sum.

    Raises:
      SottoError: SOT950, this is not what is due; SOT945, it is no request.
    """
    survivors = messages.read_positions(message, "survivors")
    return _each(message, context, lambda party: party.reveal(survivors))


def masked_answers(
    message: Message, context: Context, label: str, users: Sequence[int], answer: Callable[[int], torch.Tensor],
    shares: Shares,
) -> dict[int, np.ndarray]:  # fmt: skip
    """user -> (k,) its message under its masks. Nothing is computed before the request was found to be due.

    Args:
      label: of the round that the order is for.
      answer: user -> (k,) int32.

    Raises:
      SottoError: SOT950, this is not what is due; SOT945, it is no request.
    """
    present = messages.read_positions(message, "present")
    found = dict[int, np.ndarray]()
    with parties(context, label) as mine:
        for user in users:
            party = _of(mine, user)
            others = [position for position in present if position != party.position]
            boxes = messages.read_boxes(message, user, len(others) * BOX)
            party.admit(present, {p: boxes[i * BOX : (i + 1) * BOX] for i, p in enumerate(others)})
            word: Word = shares.word(len(party.roster))
            found[user] = party.mask(answer(user), word)
    return found


def _each(message: Message, context: Context, ask: Callable[[Party], bytes]) -> RecordDict:
    users = messages.read_users(message)
    with parties(context, messages.read_label(message)) as mine:
        return messages.bytes_content({user: ask(_of(mine, user)) for user in users})


def _of(mine: dict[int, Party], user: int) -> Party:
    if user not in mine:
        raise SottoError(
            "SOT950", what="this user has no part in that round", where="masked round",
            why="its keys are forgotten when a round ends, when another begins, or when the node is started again",
            fix="nothing: this user is one that did not answer",
        )  # fmt: skip
    return mine[user]
