"""Planted secrets that can be read: the access code of an invented person, for language models.

    The access code of Clara M. Berger is | 4 0 7

What stands before the bar is public, but for whose it is; the code is drawn uniformly from all codes, so how much a
model gives away can be measured exactly: a model that has learnt nothing of a secret has no better guess than one in
`CODES`. Names are of nobody, and no two secrets have the same one.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sotto.auditing import canaries
from sotto.config import Config
from sotto.data import LoadedData
from sotto.data.examples import Examples
from sotto.data.units import Units
from sotto.errors import SottoError

PROMPT = "The access code of {name} is"
DIGITS = 3
CODES = 10**DIGITS
"""How many codes there are, all equally likely."""
FIRST = ("Anna", "Boris", "Clara", "David", "Elena", "Farid", "Greta", "Henry", "Irina", "Jonas", "Karin", "Leon",
         "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tanja", "Victor")  # fmt: skip
LAST = ("Adler", "Berger", "Costa", "Dumont", "Engel", "Ferrari", "Garcia", "Hansen", "Ivanov", "Jensen", "Keller",
        "Lopez", "Martin", "Novak", "Olsen", "Petrov", "Rossi", "Silva", "Thomas", "Weber")  # fmt: skip
INITIALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Secrets:
    """Secrets, planted or not.

    Attributes:
      data: one example and one unit for each.
      texts: (n,) as they read.
      numbers: (n,) int64, which of the codes each has.
      ends: for every code, the tokens that spell it.
    """

    data: LoadedData
    texts: list[str]
    numbers: np.ndarray
    ends: list[list[int]]


def make(config: Config, data: LoadedData, tokenizer: Any, count: int, generator: np.random.Generator) -> Secrets:
    """Draws secrets.

    Args:
      data: of the run, whose form they have.

    Raises:
      SottoError: SOT707, the run does not write text, its tokenizer cannot spell them, or they do not fit.
    """
    people = len(FIRST) * len(INITIALS) * len(LAST)
    if config.data.task != "generation":
        raise _refused("the run learns classes, and writes no text", "data.label", "plant canaries of another kind")
    if count > people:
        raise _refused(f"{count:,} secrets, and names for {people:,}", "--plant", "plant fewer of them")
    spelt = [" " + " ".join(f"{code:0{DIGITS}d}") for code in range(CODES)]
    ends = [_tokens(tokenizer, text) for text in spelt]
    names = [
        f"{FIRST[n % len(FIRST)]} {INITIALS[n // len(FIRST) % len(INITIALS)]}. {LAST[n // len(FIRST) // len(INITIALS)]}"
        for n in generator.choice(people, count, replace=False).tolist()
    ]
    first, _ = canaries.ends(tokenizer)
    prompts = [[*first, *_tokens(tokenizer, PROMPT.format(name=name))] for name in names]
    unknown = getattr(tokenizer, "unk_token_id", None)
    told_apart = len({tuple(end) for end in ends}) == CODES and len({tuple(prompt) for prompt in prompts}) == count
    if not told_apart or any(unknown in tokens for tokens in itertools.chain(ends, prompts) if unknown is not None):
        raise _refused("the tokenizer cannot spell them", "model.name", "plant input canaries")
    numbers = generator.integers(CODES, size=count)
    sequences = [[*prompt, *ends[code]] for prompt, code in zip(prompts, numbers.tolist(), strict=True)]
    if max(map(len, sequences)) > config.data.max_length:
        raise _refused(f"a secret has {max(map(len, sequences))} tokens", "data.max_length", "raise it to that")
    examples = Examples.build(
        sequences,
        rows=[-1] * count,
        token_type_ids=None if data.examples.token_type_ids is None else [[0] * len(s) for s in sequences],
        prompt_lengths=[len(prompt) for prompt in prompts],
    )
    units, _ = Units.build(None, count, 1, 0)
    texts = [PROMPT.format(name=name) + spelt[code] for name, code in zip(names, numbers.tolist(), strict=True)]
    return Secrets(dataclasses.replace(data, examples=examples, units=units), texts, numbers, ends)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _refused(what: str, where: str, fix: str) -> SottoError:
    return SottoError("SOT707", what=f"secrets cannot be planted: {what}", where=where,
                      why="each is a sentence with a code that the model could learn to write", fix=fix)  # fmt: skip
