"""A folder that appears whole or not at all, and small JSON files in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sotto.errors import SottoError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; on success it is flushed to disk and takes the name `folder`.

    An earlier export at that place is replaced; on failure it stays, and the temporary folder is removed.

    Raises:
      SottoError: SOT332, `folder` exists and is not an export, or cannot be created.
    """
    if folder.exists() and not _is_export(folder):
        raise _occupied(
            folder, "It exists and does not look like an exported model.", "Nothing of yours is overwritten."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise _occupied(
            folder, f"It cannot be created: {error.strerror}.", "The model must be written somewhere."
        ) from None
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would be the model's for good
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        _take_over(partial, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_over(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`. A crash in between leaves the old export, under its own or a hidden name."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = partial.with_suffix(".old")
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_export(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    return not names or "model.safetensors" in names or "adapter_config.json" in names


def _occupied(folder: Path, what: str, why: str) -> SottoError:
    return SottoError("SOT332", what=what, where=str(folder), why=why, fix="Choose another folder, or clear this one.")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def refuse_local_paths(folder: Path, paths: Iterable[str], shown: Path) -> None:
    """Raises SOT333 when a file of `folder` holds one of `paths`: where a model lay tells whose machine it was."""
    # Of "/" or "/models" every tokenizer has a copy; only paths that are long enough to tell something are looked for.
    needles = [path.encode() for path in paths if os.path.isabs(path) and len(Path(path).parts) > 2]
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix == ".safetensors":
            continue
        content = file.read_bytes()
        if any(needle in content for needle in needles):
            raise SottoError(
                "SOT333",
                what=f"The export would name a folder of this machine in {file.name}.",
                where=str(shown / file.name),
                why="Local paths name people and projects, and an exported model is made to be passed on.",
                fix="Remove the path from the base model's own JSON files, and export again.",
            )
