"""The commands of `sotto federated`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Text stays with its users; a server sees bounded vectors."
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file with setting.kind: federated.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value. Repeatable.")
]


@app.command()
def simulate(config: ConfigPath, set: Sets = None) -> None:
    """Play the server and all users in one process. 'sotto resume' goes on with one that was stopped."""
    from sotto import session
    from sotto.cli import work
    from sotto.config import Config
    from sotto.federated.server import setting_of

    loaded = Config.load(config, set or [])
    setting_of(loaded)
    work(session.start(loaded, config.stem))
