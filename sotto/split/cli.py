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


Certificate = Annotated[Path | None, typer.Option(help="This side's certificate, PEM.")]
Key = Annotated[Path | None, typer.Option(help="Its private key, PEM.")]
Authority = Annotated[Path | None, typer.Option(help="The authority that signed the other side's, PEM.")]
Plaintext = Annotated[bool, typer.Option("--plaintext-on-loopback", help="No TLS. Between processes of this machine.")]


def _certificates(certificate: Path | None, key: Path | None, authority: Path | None) -> Any:
    from sotto.split.network import Certificates

    return Certificates(certificate, key, authority) if certificate and key and authority else None


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


@app.command()
def vendor(
    config: ConfigPath,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:9443",
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    plaintext: Plaintext = False,
    resume: Resume = None,
    set: Sets = None,
) -> None:
    """Serve one customer: take its upload, train the top, score its queries. Ctrl-C ends it."""
    from sotto.split import sides
    from sotto.split.watch import OnScreen

    def ready(run: Path, port: int) -> None:
        print(f"listening on port {port}; run folder: {run}", flush=True)

    certificates = _certificates(certificate, key, authority)
    sides.vendor(_load(config, set), config.stem, listen, certificates, plaintext, resume, ready, watch=OnScreen())


@app.command()
def customer(
    config: ConfigPath,
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="The vendor.")],
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    plaintext: Plaintext = False,
    resume: Resume = None,
    set: Sets = None,
) -> None:
    """Privatize the data, send it once, and ask for the scores of data.eval."""
    from sotto.split import sides

    def ready(run: Path) -> None:
        print(f"run folder: {run}", flush=True)

    certificates = _certificates(certificate, key, authority)
    _, accuracy, words = sides.customer(
        _load(config, set), config.stem, connect, certificates, plaintext, resume, ready
    )
    print(words)
    if accuracy is not None:
        print(f"accuracy    {accuracy:.4f}   (an exact function of the evaluation data)")
