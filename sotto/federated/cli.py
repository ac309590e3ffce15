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


@app.command("app")
def write(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
) -> None:
    """Write a Flower app whose server runs this configuration, for 'flwr run'."""
    _require_flower()
    from sotto.federated.app import write_app

    print(f"{write_app(config, out)}   (start it with: flwr run {out})")


@app.command()
def fingerprint(config: ConfigPath) -> None:
    """Print the fingerprint of the model, for a device owner's policy."""
    from sotto.config import Config
    from sotto.federated.layout import model_fingerprint
    from sotto.federated.server import open_embedding
    from sotto.models import load
    from sotto.models.trainable import prepare

    loaded = Config.load(config)
    model = load.load_model(loaded.model, loaded.data, loaded.method, loaded.run.seed).model
    model = prepare(model, loaded.method, loaded.run.seed)
    open_embedding(loaded, model)
    print(model_fingerprint(model))


def _require_flower() -> None:
    import importlib.util

    from sotto.errors import SottoError

    if importlib.util.find_spec("flwr") is None:
        raise SottoError(
            "SOT949", what="Flower is not installed", where="sotto federated",
            why="it carries messages between server and devices; 'simulate' does without it",
            fix="pip install 'sotto[federated]'",
        )  # fmt: skip
