"""What may not change between the start of a run and its resumption, because what it promised rests on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sotto.config import Config
from sotto.data import LoadedData
from sotto.errors import SottoError
from sotto.metrics import steps_logged
from sotto.privacy.ledger import Ledger
from sotto.rundir import RunDir

SETTLED = "settled.json"
"""In the run's folder `private/`: the configuration that the run began with."""
FREE = frozenset({
    "data.train", "data.eval", "data.eval_split", "data.public", "run.device", "run.memory", "run.microbatch_size",
    "run.checkpoint_every", "setting.timeout", "output.dir", "output.name", "output.export", "output.tensorboard",
})  # fmt: skip
"""Keys that may be edited before a resume: where things lie, and how fast it goes. The data itself is compared."""


def settle(config: Config) -> str:
    """The content of `private/settled.json`."""
    return json.dumps(_by_key(config), indent=1) + "\n"


def require_same_configuration(config: Config, run: RunDir) -> None:
    """Refuses a configuration that was edited after the run began.

    Raises:
      SottoError: SOT514, which names the key.
    """
    now, then = _by_key(config), run.read_json(f"private/{SETTLED}")
    for key in sorted((now.keys() | then.keys()) - FREE):
        if now.get(key) != then.get(key):
            raise SottoError(
                "SOT514", what=f"{key} is not what it was when the run began", where=str(run.path / "config.yaml"),
                why="the guarantee of a run, and what it would have ended with, are settled before the first step",
                fix="restore the value, or start a new run with the new one",
            )  # fmt: skip


def digest(data: LoadedData) -> str:
    """What the loop sees of the data, exactly: tokens, labels, units, and their order."""
    found = hashlib.sha256()
    examples, units = data.examples, data.units
    for array in (examples.input_ids, examples.offsets, examples.labels, units.offsets, units.members):
        found.update(b"" if array is None else array.tobytes())
        found.update(b"|")
    return found.hexdigest()


def require_same_text(config: Config, private: str, public: str | None, secret: Mapping[str, Any]) -> None:
    """Refuses other text than the run began with.

    Args:
      private, public: `digest` of the training data, and of the public text that may end the run.

    Raises:
      SottoError: SOT507.
    """
    changed = None
    if private != secret["data"]:
        changed = "training data", config.data.train, "the guarantee is about one dataset, and its ledger is another"
    elif public != secret.get("public"):
        changed = "public text", str(config.data.public), "the run would end at another step than it would have"
    if changed is not None:
        raise SottoError(
            "SOT507", what=f"the {changed[0]} has changed since the run began", where=changed[1], why=changed[2],
            fix="put the original file back, or start a new run",
        )  # fmt: skip


def require_same_name(run: RunDir, secret: Mapping[str, Any]) -> None:
    """Refuses a folder that was renamed or copied. Raises SOT517."""
    if secret["run"] != run.id:
        raise SottoError(
            "SOT517", what=f"this is the folder of run {secret['run']!r}, under another name", where=str(run.path),
            why="the ledger knows what the run has spent by its name", fix="give the folder its name back",
        )  # fmt: skip


def require_known_steps(run: RunDir, step: int, ledger: Ledger) -> None:
    """Refuses a ledger that has lost steps, or another folder of ledgers: they would be released and never counted.

    Args:
      step: how many steps the run's last checkpoint has taken.

    Raises:
      SottoError: SOT416.
    """
    taken, known = max(step, steps_logged(run.path)), ledger.reserved(run.id)
    if taken > known:
        raise SottoError(
            "SOT416", what=f"the run has taken {taken} steps, but only {known} of them are charged",
            where=str(ledger.path), why="this is not the ledger that the run began with, or its entries were lost; "
            "the steps would be counted nowhere",
            fix="set SOTTO_LEDGER_DIR to the folder that it had before, or restore the ledger from a backup",
        )  # fmt: skip


def _by_key(config: Config) -> dict[str, Any]:
    """`section.key` -> value, as JSON writes it."""
    found: dict[str, Any] = {}
    for section, values in config.to_dict().items():
        found |= {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {
            section: values
        }  # fmt: skip
    return json.loads(json.dumps(found))
