"""How one invented customer writes one message: facts about them, templates, and their way of writing."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import accumulate
from typing import TypeVar

from sotto.demo import words
from sotto.demo.phrases import INTENTS

FIRST_DAY = date(2025, 1, 1)
# Nothing is added beyond this length, which keeps messages within 64 tokens of a BERT vocabulary.
MAX_CHARS = 185

# How often each subject comes up, before personal preferences. In the order of INTENTS.
_POPULARITY = (11, 11, 11, 9, 8, 7, 8, 10, 8, 8, 8, 8)
# How hard the task is: plain messages are easy, the others are not.
_VAGUE = 0.06
_FRAMES = ((words.PLAIN, 66), (words.PASSING, 27), (words.CONTRAST, 7))
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_INNERMOST = re.compile(r"\(([^()]*)\)")
_PART = re.compile(r"\[([ab])\.(\w+)\]|\[help\]")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")
_WORD = re.compile(r"(?<![\w.@-])[a-z]{4,}\b(?![.@]\w)")  # not in e-mail addresses: a mistyped domain may exist
_CONTRACTIONS = (
    ("I am ", "I'm "),
    ("I have to ", "I must "),
    ("I have ", "I've "),
    ("cannot", "can't"),
    ("do not", "don't"),
    ("does not", "doesn't"),
    ("did not", "didn't"),
    ("would not", "wouldn't"),
    ("could not", "couldn't"),
    ("is not", "isn't"),
    ("it is ", "it's "),
    ("that is ", "that's "),
    ("I would ", "I'd "),
)
_SHORT_FORMS = (
    ("please", "pls"),
    ("account", "acct"),
    ("because", "cos"),
    ("number", "no."),
    ("thank you", "thx"),
    ("thanks", "thx"),
    ("message", "msg"),
    ("months", "mths"),
)

_T = TypeVar("_T")


class Dice:
    """Random choices built on `random()` alone: the other methods of `random.Random` may change between versions."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random  # noqa: S311 - demo text, not noise

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[_T]) -> _T:
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[tuple[_T, int]]) -> _T:
        totals = list(accumulate(weight for _, weight in items))
        return items[bisect_right(totals, self.below(totals[-1]))][0]

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def digits(self, n: int) -> str:
        return "".join(str(self.below(10)) for _ in range(n))

    def skewed(self, n: int) -> int:
        """A number below n; small ones are far more likely."""
        u = self._random()
        return int(u * u * u * n)


@dataclass(frozen=True)
class Customer:
    """Who writes, and how."""

    facts: Mapping[str, str]
    subjects: tuple[tuple[str, int], ...]
    """Intents, and how often this customer writes about each."""
    merchants: tuple[str, ...]
    money: str
    tone: str
    greeting: str
    sign_off: str
    greets: float
    signs: float
    details: float
    typos: float
    contracts: bool
    shortens: bool
    lower: bool


def new_customer(dice: Dice) -> Customer:
    first = dice.pick(words.FIRST_NAMES)
    last = dice.pick(words.SURNAME_STARTS) + dice.pick(words.SURNAME_ENDS)
    tone = dice.pick(("plain", "plain", "polite", "chatty", "annoyed", "terse"))
    facts = {
        "first": first,
        "last": last,
        "initials": f"{first[0]}.{last[0]}.",
        "email": f"{first.lower()}.{last.lower()}@example.com",
        "phone": dice.pick(("07700 900{}", "+44 7700 900{}", "07700-900{}")).format(dice.digits(3)),
        "account": _account(dice),
        "last4": dice.digits(4),
        "number": dice.digits(6),
        "born": f"{dice.between(1, 28)} {dice.pick(words.MONTHS)} {dice.between(1945, 2004)}",
        "card": dice.pick(("card", "card", "debit card", "credit card", "bank card")),
    }
    favourites = [dice.pick(tuple(INTENTS)) for _ in range(3)]
    return Customer(
        facts=facts,
        subjects=tuple((s, w * (4 if s in favourites else 1)) for s, w in zip(INTENTS, _POPULARITY, strict=True)),
        merchants=tuple(dice.pick(words.MERCHANTS) for _ in range(3)),
        money=dice.pick(("£{}", "£{}", "{} euros", "EUR {}", "€{}", "${}")),
        tone=tone,
        greeting=dice.pick(words.GREETINGS[tone]),
        sign_off=dice.pick(words.SIGN_OFFS[tone]).format_map(facts),
        greets=dice.pick((0.0, 0.1, 0.4, 0.8)),
        signs=dice.pick((0.0, 0.1, 0.4, 0.8)),
        details=dice.pick((0.0, 0.05, 0.15, 0.4)),
        typos=dice.pick((0.0, 0.0, 0.0, 0.03, 0.07)),
        contracts=dice.chance(0.4),
        shortens=tone == "terse" or dice.chance(0.05),
        lower=dice.chance(0.12),
    )


def write(dice: Dice, customer: Customer, day: int) -> tuple[str, str]:
    """Returns a message and the intent that it is about."""
    today = FIRST_DAY + timedelta(days=day)
    while True:
        intent = dice.weighted(customer.subjects)
        if dice.chance(_VAGUE):
            frame, intents = dice.pick(words.VAGUE)
            intent = dice.pick(intents)
        else:
            frame = dice.weighted(dice.weighted(_FRAMES))
        other = dice.pick([name for name in INTENTS if name != intent])
        facts = _Facts(dice, customer, today)
        core = _expand(dice, frame, intent, other).format_map(facts)
        if len(core) <= MAX_CHARS:
            return _in_their_way(dice, customer, core, facts), intent


def repeat(dice: Dice, text: str) -> str:
    """The same message once more, with a small edit."""
    again = dice.pick(words.AGAIN).format(text=text)
    return _mistype(dice, again if len(again) <= MAX_CHARS else text, 0.05)


def _expand(dice: Dice, template: str, intent: str = "", other: str = "") -> str:
    """Chooses among the alternatives of a template and fills in its parts; leaves the slots."""

    def part(match: re.Match[str]) -> str:
        if match[1] is None:
            return _ended(_expand(dice, dice.pick(words.HELP)))
        phrases = INTENTS[intent if match[1] == "a" else other]
        kind = match[2]
        source: str | tuple[str, ...] = getattr(phrases, kind)
        text = _expand(dice, source if isinstance(source, str) else dice.pick(source))
        return _ended(text) if kind == "asks" else text

    while "(" in template:
        template = _INNERMOST.sub(lambda match: dice.pick(match[1].split("|")), template)
    return _PART.sub(part, dice.pick(template.split("|")))


def _ended(sentence: str) -> str:
    sentence = sentence.rstrip()
    return sentence if sentence.endswith((".", "?", "!")) else sentence + "."


def _in_their_way(dice: Dice, customer: Customer, core: str, facts: _Facts) -> str:
    """Adds greeting, remark, detail and sign-off where there is room, then contractions, typos and case."""
    text = _tidy(core)
    if customer.contracts:
        text = _replace(text, _CONTRACTIONS)
    if customer.shortens:
        text = _replace(text, _SHORT_FORMS)
    if dice.chance(customer.greets):
        after_comma = core[0] + text[1:] if customer.greeting.endswith(",") else text
        text = f"{customer.greeting} {after_comma}"
    remarks = words.REMARKS[customer.tone]
    extras = (
        (customer.details, _tidy(dice.pick(words.DETAILS).format_map(facts))),
        (0.3, dice.pick(remarks) if remarks else ""),
        (customer.signs, customer.sign_off),
    )
    for probability, extra in extras:
        if dice.chance(probability) and len(text) + len(extra) < MAX_CHARS:
            text = f"{text} {extra}".rstrip()
    text = _mistype(dice, text, customer.typos)
    return text.lower().rstrip(".") if customer.lower else text


def _tidy(text: str) -> str:
    """Single spaces, capitals at the start of sentences, a full stop at the end."""
    text = re.sub(r"\s+([,.;:?!])", r"\1", " ".join(text.split()))
    return _ended(_SENTENCE_START.sub(lambda match: match[0].upper(), text))


def _replace(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    for long, short in pairs:
        text = text.replace(long, short)
    return text


def _mistype(dice: Dice, text: str, rate: float) -> str:
    """Swaps, drops or doubles a letter in some words. Numbers and names stay."""

    def mistyped(match: re.Match[str]) -> str:
        word = match[0]
        if rate == 0 or not dice.chance(rate):
            return word
        i = dice.between(1, len(word) - 2)
        swapped, dropped, doubled = word[i + 1] + word[i], word[i + 1], word[i] * 2 + word[i + 1]
        return word[:i] + dice.pick((swapped, dropped, doubled)) + word[i + 2 :]

    return _WORD.sub(mistyped, text)


def _account(dice: Dice) -> str:
    """Looks like an IBAN and is none: XX is no country, 00 no check digits, and the checksum is wrong as well."""
    while True:
        digits = dice.digits(12)
        if int(digits + "333300") % 97 != 1:  # in the checksum X counts as 33
            return f"XX00 {digits[:4]} {digits[4:8]} {digits[8:]}"


class _Facts(dict[str, str]):
    """What the slots of one message stand for; made up when first asked for."""

    def __init__(self, dice: Dice, customer: Customer, today: date):
        super().__init__(customer.facts)
        self._dice, self._customer, self._today = dice, customer, today

    def __missing__(self, slot: str) -> str:
        value = self[slot] = self._invent(slot)
        return value

    def _invent(self, slot: str) -> str:
        pick, between, today = self._dice.pick, self._dice.between, self._today
        weekday = _WEEKDAYS[(today - timedelta(days=between(2, 6))).weekday()]
        past = _spoken(today - timedelta(days=between(2, 20)))
        match slot:
            case "when":
                return pick((f"on {weekday}", f"on {past}", "yesterday", "last week", "this morning", "two days ago"))
            case "whenever":
                return pick((f"on {past}", "last week", "last month", "the other day"))
            case "day":
                return pick((weekday, past, "yesterday", "last week", "the weekend"))
            case "date":
                return _spoken(today + timedelta(days=between(3, 60)))
            case "month":
                return words.MONTHS[(today.month + between(0, 4)) % 12]
            case "days":
                return pick(words.DAYS)
            case "years":
                return str(between(2, 15))
            case "amount" | "amount2":
                return self._customer.money.format(f"{between(8, 900)}.{between(0, 19) * 5:02d}")
            case "small":
                return self._customer.money.format(f"{between(1, 29)}.{between(0, 19) * 5:02d}")
            case "big":
                return self._customer.money.format(f"{between(3, 60) * 500:,}")
            case "price":
                return self._customer.money.format(f"{between(24, 96) * 5},000")
            case "rate":
                return pick(("{}.{}%", "{}.{} %", "{}.{} percent")).format(between(1, 6), between(1, 9))
            case "merchant":
                return pick((*self._customer.merchants, pick(words.MERCHANTS)))
            case "service":
                return pick(words.SERVICES)
            case "town":
                return pick(words.TOWNS)
            case "address":
                return f"{between(1, 180)} {pick(words.STREETS)}, {pick(words.TOWNS)}"
            case "person":
                return pick((pick(words.FIRST_NAMES), f"my {pick(words.RELATIVES)}"))
            case "surname":
                return pick(words.SURNAME_STARTS) + pick(words.SURNAME_ENDS)
            case "payee_account":
                return _account(self._dice)
            case "country" | "currency":
                self["country"], self["currency"] = pick(words.COUNTRIES)
                return self[slot]
            case "err":
                return pick(words.ERRORS)
            case _:
                raise KeyError(slot)


def _spoken(day: date) -> str:
    return f"{day.day} {words.MONTHS[day.month - 1]}"
