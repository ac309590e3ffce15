"""The commands of `sotto split`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="A customer keeps its text, a vendor keeps its model."
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file with setting.kind: split.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="A run folder to go on with.")]


def _load(path: Path, sets: list[str] | None) -> Any:
    from sotto.config import Config

    return Config.load(path, sets or [])


@app.command()
def meaning(config: ConfigPath, set: Sets = None, as_json: AsJson = False) -> None:
    """Show what eta means for this model, before any private text is read."""
    from sotto.split.simulate import explain

    found = explain(_load(config, set))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):<18} {value:,.4g}")


@app.command()
def simulate(config: ConfigPath, set: Sets = None, resume: Resume = None) -> None:
    """Play customer and vendor in one process, and print the statement."""
    from sotto.split.simulate import simulate

    run = simulate(_load(config, set), config.stem, resume)
    print(run.statement)
    if run.accuracy is not None:
        print(f"accuracy    {run.accuracy:.4f}   (an exact function of the evaluation data)")
    print(f"run folder: {run.path}")
