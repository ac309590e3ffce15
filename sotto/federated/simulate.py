"""Server and all users in one process: the same messages, checks, noise and ledger as over a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sotto import session
from sotto.commands import Run, run_session
from sotto.config import Config
from sotto.federated.server import setting_of


def simulate(
    config: Config | str | Path, progress: Callable[[int, dict[str, Any]], None] | None = None, stem: str = "run"
) -> Run:
    """Plays a federated run on one machine. `sotto.resume` goes on with one that was stopped.

    Args:
      config: a Config with `setting.kind: federated`, or the path of a YAML file; `data.train` holds the text of all
        users, and `privacy.unit` is the column that names them.
      progress: as for `sotto.train`; a step is a round.
      stem: names the run folder, for a Config.

    Raises:
      SottoError: as for `sotto.train`; SOT931, the setting is another.
    """
    if not isinstance(config, Config):
        stem, config = Path(config).stem, Config.load(config)
    setting_of(config)
    return run_session(session.start(config, stem), progress)
