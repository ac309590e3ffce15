"""One dataset, one name: the same texts may not be charged to two ledgers that know nothing of one another.

A dataset is known by a fingerprint of its text, or by the name that `privacy.dataset` gives it. Who gives a name to
data that runs were charged for already, or a second name, would begin with an empty ledger. Beside the ledgers stands a
list of which texts each of them was used for; it is as private as they are.

What this does not see: texts that were edited, other columns of the same people, another folder of ledgers.
"""

from __future__ import annotations

import os
from pathlib import Path

from sotto.errors import SottoError
from sotto.privacy.ledger import Ledger, ledger_dir

CONTENTS = "contents"
"""One line for each pair of a fingerprint and a ledger."""


def require_one_name(dataset_id: str, content: str, directory: str | Path | None = None) -> None:
    """Notes that these texts are charged to this ledger.

    Args:
      dataset_id: of the ledger, which ends in the protected unit.
      content: the fingerprint of the texts.
      directory: default `ledger_dir()`.

    Raises:
      SottoError: SOT417, runs on these texts and this unit are in another ledger; SOT410, the list cannot be written.
    """
    folder = Path(directory) if directory is not None else ledger_dir()
    unit, path = dataset_id.rpartition(".")[2], folder / CONTENTS
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        others = {line.split(" ")[1] for line in lines if line.startswith(f"{content} ")} | {f"{content[:32]}.{unit}"}
        for other in sorted(others - {dataset_id}):
            if other.endswith(f".{unit}") and (folder / f"{other}.jsonl").exists() and Ledger.open(other, folder).runs:
                raise _two_names(other.removesuffix(f".{unit}"), path)
        if f"{content} {dataset_id}" not in lines:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{content} {dataset_id}\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise SottoError(
            "SOT410", what=f"cannot use the list of datasets: {error.strerror or error}", where=str(path),
            why="without it, one dataset could have two ledgers", fix="make the file readable and writable",
        ) from error  # fmt: skip


def _two_names(name: str, path: Path) -> SottoError:
    return SottoError(
        "SOT417", what=f"runs on these texts were charged under another name: {name}", where=f"privacy.dataset; {path}",
        why="two ledgers would each know a part of what was spent, and neither total would be an upper bound",
        fix=f"set privacy.dataset: {name}",
    )  # fmt: skip
