"""A Flower app: the few files that `flwr run` sends to a SuperLink, and what its server does."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sotto import session as sessions
from sotto.commands import Run, run_session
from sotto.config import Config
from sotto.errors import SottoError
from sotto.federated.client import Order
from sotto.federated.device import quiet
from sotto.federated.server import agreement, register, setting_of
from sotto.federated.strategy import SottoStrategy
from sotto.metrics import Metrics
from sotto.training import Session

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "sotto-federated"
version = "1.0.0"
description = "Federated private fine-tuning with Sotto"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41,<1.42", "sotto[federated]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "sotto"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "sotto_app.server:app"
clientapp = "sotto_app.client:app"

[tool.flwr.app.config]
recipe = {recipe}
resume = ""
"""

_FILES = {
    "sotto_app/__init__.py": '"""A Flower app that runs Sotto."""\n',
    "sotto_app/server.py": "from sotto.federated.app import server_app\n\napp = server_app()\n",
    "sotto_app/client.py": "from sotto.federated.device import client_app\n\napp = client_app()\n",
    "LICENSE": "Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n",
    "README.md": "# Federated private fine-tuning with Sotto\n\nSee docs/federated.md of Sotto.\n",
}


def write_app(recipe: Path, to: Path) -> Path:
    """Writes an app for a recipe, which stays where it is: on the server's machine.

    Args:
      recipe: a configuration with `setting.kind: federated`.
      to: the folder to write; it must not exist.

    Raises:
      SottoError: the recipe is no federated one, or SOT510, the folder exists.
    """
    import json

    config = Config.load(recipe)
    setting_of(config)
    register(config)  # says what a server needs that a simulation does not
    if to.exists():
        raise SottoError("SOT510", what="the folder exists already", where=str(to), why="nothing is overwritten",
                         fix="choose another --out")  # fmt: skip
    (to / "sotto_app").mkdir(parents=True)
    for name, text in _FILES.items():
        (to / name).write_text(text)
    (to / "pyproject.toml").write_text(_PYPROJECT.format(recipe=json.dumps(str(recipe.resolve()))))
    return to


def serve(grid: Grid, recipe: Path, resume: str = "", hello_seconds: float = 60.0) -> Run:
    """Runs the server of a federated run over a grid, from its start or from a run folder.

    Args:
      grid: Flower's.
      recipe: the configuration, for a new run.
      resume: a run folder to go on with, or "".
      hello_seconds: how long new nodes have to say which users they have.

    Raises:
      SottoError: as for `sotto.train`; SOT933, the dataset has no name.
    """
    quiet()
    with contextlib.chdir(recipe.resolve().parent):  # Flower starts apps in folders of its own
        return _serve(grid, recipe.resolve(), resume, hello_seconds)


def _serve(grid: Grid, recipe: Path, resume: str, hello_seconds: float) -> Run:
    if resume:
        session = sessions.resume(resume, carrier=_by_strategy)
    else:
        config = Config.load(recipe)
        setting_of(config)
        session = sessions.start(config, recipe.stem, carrier=_by_strategy)
    setting = setting_of(session.config)

    def loop(session: Session, metrics: Metrics) -> bool:
        agreed = agreement(session.config, session.plan, session.engine, session.model)  # type: ignore[arg-type]
        return SottoStrategy(session, agreed, metrics, hello_seconds).run(grid, setting.timeout)

    print(f"run folder: {session.run.path.resolve()}", flush=True)
    return run_session(session, None, loop)


def _by_strategy(order: Order, users: Any) -> Any:
    raise AssertionError("orders of this run are carried by its strategy")


def server_app() -> ServerApp:
    """The ServerApp of a Sotto app."""
    quiet()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        recipe, resume = (str(context.run_config[key]) for key in ("recipe", "resume"))
        try:
            run = serve(grid, Path(recipe), resume)
        except SottoError as error:
            print(error, file=sys.stderr, flush=True)
            raise
        print(run.statement or f"Stopped after round {run.steps}.", flush=True)

    return app
