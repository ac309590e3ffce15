"""Numbers of a run, kept in two files: those that anyone may see, and those that are functions of private text.

Public: the step, the learning rate, the noise multiplier, the norm of the *noised* update. Private: batch sizes,
gradient norms, and without a guarantee the update's norm as well. Private values are written with mode 0600 and never
leave the run folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from sotto.errors import SottoError


class Metrics:
    """Appends one line per step to `metrics.public.jsonl` and `metrics.private.jsonl`."""

    def __init__(self, folder: Path, tensorboard: bool = False):
        self._public = _append(folder / "metrics.public.jsonl", 0o644)
        self._private = _append(folder / "metrics.private.jsonl", 0o600)
        self._board = _summary_writer(folder / "tensorboard") if tensorboard else None

    def log(self, step: int, public: dict[str, Any], private: dict[str, Any]) -> None:
        for file, values in ((self._public, public), (self._private, private)):
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
        if self._board is not None:
            for name, value in public.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._public.close()
        self._private.close()
        if self._board is not None:
            self._board.close()


def last_step(folder: Path) -> int:
    """The last step that was logged; 0 if there is none. A line that a crash cut short does not count."""
    for line in reversed(_lines(folder)):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue  # damaged; the one before it is nearly as good, because nothing is decided by it
    return 0


def steps_logged(folder: Path) -> int:
    """How many steps were taken and logged, those that were done again counted again."""
    return len(_lines(folder))


def _lines(folder: Path) -> list[bytes]:
    path = folder / "metrics.public.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _append(path: Path, mode: int) -> TextIO:
    """Opens a file of lines for appending, without the torn last line that a crash may have left."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)
    return os.fdopen(descriptor, "a")


def no_tensorboard() -> SottoError:
    return SottoError(
        "SOT504", what="TensorBoard is not installed", where="output.tensorboard",
        why="public metrics cannot be written for it", fix="pip install 'sotto[board]', or leave the option out",
    )  # fmt: skip


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise no_tensorboard() from None
    return SummaryWriter(str(folder))
