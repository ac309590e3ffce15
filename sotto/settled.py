"""What may not change between the start of a run and its resumption, because what it promised rests on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sotto.config import Config
from sotto.errors import SottoError
from sotto.metrics import steps_logged
from sotto.privacy.ledger import Ledger
from sotto.rundir import RunDir

SETTLED = "settled.json"
"""In the run's folder `private/`: the configuration that the run began with."""
FREE = frozenset({
    "data.train", "data.eval", "data.eval_split", "run.device", "run.memory", "run.microbatch_size",
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
