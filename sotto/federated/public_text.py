"""Public text of a federated run, which is not protected: it must not be the text that is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sotto.config import Config
from sotto.data import Examples, LoadedData
from sotto.data.load import load_dataset_for
from sotto.errors import SottoError

MOST_SHARED = 0.5
"""Texts that stand in private text too: single ones do by chance, more than this part of them do not."""


def read_public(public: str, config: Config, tokenizer: Any, private: Examples) -> LoadedData:
    """Reads a file of public text as if it were held-out text of this run.

    Args:
      private: the text of the users, where it is here; else none.

    Raises:
      SottoError: SOT937, it is the users' own text; those of reading it.
    """
    if _same_file(Path(public), Path(config.data.train)):
        raise _private("it is the file of data.train")
    section = config.data.model_copy(update={"eval": public, "eval_split": None})
    found = load_dataset_for(config.model_copy(update={"data": section}), tokenizer, "eval")
    known = set(_texts(private))
    shared = np.mean([text in known for text in _texts(found.examples)]) if known else 0.0
    if shared > MOST_SHARED:
        raise _private(f"{shared:.0%} of its texts stand there too")
    return found


def _same_file(a: Path, b: Path) -> bool:
    if not (a.is_file() and b.is_file()):
        return str(a) == str(b)
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())


def _texts(examples: Examples) -> list[bytes]:
    ids, ends = examples.input_ids, examples.offsets
    return [ids[start:end].tobytes() for start, end in pairwise(ends)]


def _private(why: str) -> SottoError:
    return SottoError(
        "SOT937", what=f"setting.public_data is the users' own text: {why}", where="setting.public_data",
        why="what is made of it (directions, rows) is sent to everybody without noise",
        fix="name a file of text that nobody needs protected",
    )  # fmt: skip
