"""Public text, which nobody needs protected: it must not be the text that is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sotto.config import Config
from sotto.data import Examples, LoadedData
from sotto.data.load import has_eval, load_dataset_for
from sotto.errors import SottoError

MOST_SHARED = 0.5
"""Texts that stand in private text too: single ones do by chance, more than this part of them do not."""


def read_public(public: str, where: str, config: Config, tokenizer: Any, private: Examples) -> LoadedData:
    """Reads a file of public text as if it were held-out text of this run.

    Args:
      where: the key that names the file.
      private: the text that is protected, where it is here; else none.

    Raises:
      SottoError: SOT937, it is the protected text; those of reading it.
    """
    if _same_file(Path(public), Path(config.data.train)):
        raise _private(where, "it is the file of data.train")
    section = config.data.model_copy(update={"eval": public, "eval_split": None})
    found = load_dataset_for(config.model_copy(update={"data": section}), tokenizer, "eval")
    known = set(_texts(private))
    shared = np.mean([text in known for text in _texts(found.examples)]) if known else 0.0
    if shared > MOST_SHARED:
        raise _private(where, f"{shared:.0%} of its texts stand there too")
    return found


def require_not_held_out(public: str, where: str, config: Config) -> None:
    """Refuses the file of `data.eval`: it may be private, and a score on it would no longer be of unseen text.

    Raises:
      SottoError: SOT215.
    """
    if has_eval(config.data) and _same_file(Path(public), Path(config.data.eval or config.data.train)):
        raise SottoError(
            "SOT215", what=f"{where} is the file of data.eval", where=where,
            why="held-out text counts as private, and a run that looked at it is not scored on it honestly",
            fix="name another file of public text; if this one is public, take it out of data.eval",
        )  # fmt: skip


def _same_file(a: Path, b: Path) -> bool:
    if not (a.is_file() and b.is_file()):
        return str(a) == str(b)
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())


def _texts(examples: Examples) -> list[bytes]:
    ids, ends = examples.input_ids, examples.offsets
    return [ids[start:end].tobytes() for start, end in pairwise(ends)]


def _private(where: str, why: str) -> SottoError:
    return SottoError(
        "SOT937", what=f"{where} is the protected text itself: {why}", where=where,
        why="what is made of it is used, and may be sent to everybody, without noise",
        fix="name a file of text that nobody needs protected",
    )  # fmt: skip
