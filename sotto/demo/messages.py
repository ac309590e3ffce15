"""Synthetic messages of bank customers, for the demo and the tests: NO REAL PERSON, BANK OR ACCOUNT IS IN THEM.

`generate` writes messages from a small grammar (`phrases.py`, `words.py`, `writer.py`). Each customer has a name, an
account, a way of writing and a few subjects that they come back to, so the same person is in many rows: that is what
makes the privacy unit a customer and not a row. The task, telling what a message asks for, is meant to be hard for a
linear probe: messages mention other subjects in passing, some are vague, and about 3 % of the labels are wrong on
purpose.

Account numbers fail the IBAN check, telephone numbers are from a range reserved for fiction, e-mail addresses are at
example.com, and every row says `source = synthetic`.

One seed gives the same bytes on every machine and Python version: choices use `random.Random(seed).random()` and plain
arithmetic only, and nothing depends on the order of a set.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

from sotto.demo import phrases, writer
from sotto.demo.writer import Dice
from sotto.errors import SottoError

INTENTS: tuple[str, ...] = tuple(phrases.INTENTS)
SOURCE = "synthetic"
MOST_PER_CUSTOMER = 25
LABEL_NOISE = 0.03
REPEATS = 0.05


@dataclass(frozen=True)
class Message:
    """One row of the file."""

    message_id: str
    customer_id: str
    date: str
    text: str
    intent: str
    source: str


@dataclass(frozen=True)
class _Draft:
    """A message before it gets its number. `meant` is what it is about; `intent` is the label, which may be wrong."""

    customer: int
    day: int
    text: str
    meant: str
    intent: str


def generate(num_customers: int = 1500, num_messages: int = 10_000, seed: int = 7) -> list[Message]:
    """Writes `num_messages` messages by `num_customers` customers, 1 to 25 each, in the order of their dates.

    Raises:
      SottoError: the messages cannot be spread so that every customer has between 1 and 25.
    """
    return [
        Message(
            message_id=f"m{number:05d}",
            customer_id=f"c{draft.customer:04d}",
            date=(writer.FIRST_DAY + timedelta(days=draft.day)).isoformat(),
            text=draft.text,
            intent=draft.intent,
            source=SOURCE,
        )
        for number, draft in enumerate(_drafts(num_customers, num_messages, seed), start=1)
    ]


def write_csv(messages: Sequence[Message], path: str | Path) -> None:
    """Writes the messages as UTF-8 with a header, the same bytes on every system."""
    columns = [field.name for field in fields(Message)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows([getattr(message, column) for column in columns] for message in messages)


def split_by_customer(
    messages: Sequence[Message], test_fraction: float = 0.15, seed: int = 7
) -> tuple[list[Message], list[Message]]:
    """Splits into train and test such that no customer is in both. The fraction counts customers.

    Raises:
      SottoError: one of the two sides would be empty.
    """
    customers = sorted({message.customer_id for message in messages})
    count = round(test_fraction * len(customers))
    if not 0 < count < len(customers):
        raise SottoError(
            "SOT901",
            what=f"test_fraction = {test_fraction} of {len(customers)} customers leaves one side empty",
            where="sotto.demo.messages.split_by_customer",
            why="a training file and a test file both need at least one customer",
            fix="choose a fraction between 0 and 1, or generate more customers",
        )
    held_out = frozenset(Dice(seed).shuffled(customers)[:count])
    train = [message for message in messages if message.customer_id not in held_out]
    test = [message for message in messages if message.customer_id in held_out]
    return train, test


def _drafts(num_customers: int, num_messages: int, seed: int) -> list[_Draft]:
    dice = Dice(seed)
    out: list[_Draft] = []
    for number, count in enumerate(_counts(dice, num_customers, num_messages), start=1):
        customer = writer.new_customer(dice)
        last: _Draft | None = None
        for day in sorted(dice.below(360) for _ in range(count)):
            if last is not None and dice.chance(REPEATS):
                day, text, meant = last.day + dice.below(4), writer.repeat(dice, last.text), last.meant
            else:
                text, meant = writer.write(dice, customer, day)
            last = _Draft(number, day, text, meant, _label(dice, meant))
            out.append(last)
    return sorted(out, key=lambda draft: draft.day)  # stable: ties keep the order of the customers


def _label(dice: Dice, meant: str) -> str:
    if not dice.chance(LABEL_NOISE):
        return meant
    return dice.pick([intent for intent in INTENTS if intent != meant])


def _counts(dice: Dice, num_customers: int, num_messages: int) -> list[int]:
    """How many messages each customer writes: most write a few, some write many."""
    if not 0 < num_customers <= num_messages <= MOST_PER_CUSTOMER * num_customers:
        raise SottoError(
            "SOT902",
            what=f"{num_messages} messages cannot be spread over {num_customers} customers",
            where="sotto.demo.messages.generate",
            why=f"there must be a customer, and every customer writes 1 to {MOST_PER_CUSTOMER} messages",
            fix=f"ask for 1 to {MOST_PER_CUSTOMER} times as many messages as customers",
        )
    totals = list(accumulate(1 + dice.skewed(30) for _ in range(num_customers)))
    counts = [1] * num_customers
    for _ in range(num_messages - num_customers):
        who = bisect_right(totals, dice.below(totals[-1]))
        while counts[who] == MOST_PER_CUSTOMER:
            who = (who + 1) % num_customers
        counts[who] += 1
    return counts
