"""The command line: each sub-command calls the public function of the same name and prints what it returns."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core as typer_core

from sotto import begun
from sotto.allocator import keep_freed_memory
from sotto.errors import SottoError
from sotto.federated.cli import app as federated_app
from sotto.rundir import find_run
from sotto.split.cli import app as split_app

# Else typer escapes "[required]" for rich, which prints no help here, and loads it for that.
typer_core.HAS_RICH = False
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Fine-tune language models on sensitive text under a privacy and a memory budget.")  # fmt: skip
app.add_typer(split_app, name="split")
app.add_typer(federated_app, name="federated")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as 'sotto init' writes it.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


INTERRUPTED = 130


def main() -> None:
    """Runs the command line; errors that a user can cause are printed without a traceback."""
    begun.clear()
    keep_freed_memory()
    try:
        # Typer turns Ctrl-C into an exit code that it returns, or, in older releases, into an exception of its own.
        if app(standalone_mode=False) == INTERRUPTED:
            _exit_interrupted()
        sys.stdout.flush()  # here, where a reader that has gone away is no error
    except SottoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _exit_interrupted()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        _exit_on_usage(error)
        raise


def _exit_interrupted() -> None:
    print(f"\nInterrupted. {begun.told()}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _exit_on_usage(error: Exception) -> None:
    """Says what is wrong with the command line, like every other error. `sotto` alone shows the help instead."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(message) or not isinstance(code, int):
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "sotto"
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message(), file=sys.stderr)
    else:
        print(SottoError("SOT109", what=str(message()), where=command, why="the command cannot be understood",
                         fix=f"{command} --help"), file=sys.stderr)  # fmt: skip
    sys.exit(code)


def _load(path: Path, sets: list[str] | None) -> Any:
    from sotto.config import Config

    return Config.load(path, sets or [])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


@app.command()
def init(
    model: Annotated[str, typer.Option(help="A local folder or a Hub name.")],
    data: Annotated[str, typer.Option(help="The training file.")],
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the class.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    completion: Annotated[str | None, typer.Option(help="Column of the completion.")] = None,
    unit: Annotated[str | None, typer.Option(help="Column of the protected person, or 'record'.")] = None,
    epsilon: Annotated[float, typer.Option(help="The privacy budget.")] = 4.0,
) -> None:
    """Print a commented configuration for a model and a data file."""
    from sotto import commands
    from sotto.initialise import note_on

    print(commands.init(model, data, text, label, unit, epsilon, prompt, completion))
    if note := note_on(model):
        print(note, file=sys.stderr)


@app.command()
def plan(config: ConfigPath, set: Sets = None, as_json: AsJson = False) -> None:
    """Show noise, steps, epsilon, memory and alternatives. No data is touched."""
    from sotto import commands
    from sotto.reporting import plan_text

    made = commands.plan(_load(config, set))
    if as_json:
        _print_json(made.to_dict())
    else:
        print(plan_text.render(made))


@app.command()
def memory(config: ConfigPath, set: Sets = None, as_json: AsJson = False) -> None:
    """Show what memory every method needs, and what fits. Nothing is read but the model's config.json."""
    from sotto import commands
    from sotto.reporting import memory_text

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} methods", end="\n" if done == of else "", file=sys.stderr, flush=True)

    table = commands.memory(_load(config, set), progress, workers=min(os.cpu_count() or 1, 8))
    _print_json(table.to_dict()) if as_json else print(memory_text.render(table))


@app.command()
def check(config: ConfigPath, set: Sets = None, as_json: AsJson = False) -> None:
    """Examine the dataset: rows, units, duplicates. Prints counts and line numbers, never text."""
    from sotto import commands

    report = commands.check(_load(config, set))
    _print_json(report.to_dict()) if as_json else print(report.render())


@app.command()
def train(config: ConfigPath, set: Sets = None) -> None:
    """Fine-tune a model within its privacy budget."""
    from sotto import commands, distributed, session

    loaded = _load(config, set)
    session.require_central(loaded)
    if distributed.follows():
        commands.train(loaded)
    else:
        work(session.start(loaded, config.stem, group=distributed.lead(loaded)))


@app.command()
def sweep(
    config: ConfigPath,
    over: Annotated[
        list[str], typer.Option("--over", metavar="SECTION.KEY=V1,V2", help="Values to draw from. Repeatable.")
    ],
    trials: Annotated[float, typer.Option(help="How many trainings to expect; how many there are is secret.")] = 5.0,
    distribution: Annotated[str, typer.Option(help="Of that number: geometric or logarithmic.")] = "geometric",
    public_eval: Annotated[
        bool, typer.Option("--public-eval", help="data.eval is public, so models may be compared on it.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would cost.")] = False,
    set: Sets = None,
) -> None:
    """Train several models and release the best. The price covers the choice."""
    from sotto import sweeping

    parts = [item.partition("=") for item in over]
    grid = {key: [value for value in text.split(",") if value] for key, _, text in parts}
    law: Any = distribution
    if plan:
        _print_json(dataclasses.asdict(sweeping.plan_sweep(_load(config, set), grid, trials, law)[0]))
        return
    done = sweeping.sweep(_load(config, set), grid, trials, law, public_eval)
    print(done.statement or "NOT PRIVATE")
    print(f"released: {done.path}")


@app.command()
def resume(run: RunPath) -> None:
    """Continue a run after a crash or Ctrl-C."""
    from sotto import commands, distributed, session
    from sotto.rundir import RunDir

    path = find_run(run)
    begun.note(path)
    if (done := commands._finished(path)) is not None:
        _report(done)
    elif distributed.follows():
        commands.resume(path)
    else:
        work(session.resume(path, group=distributed.lead(RunDir.open(path).config())))


def work(session: Any) -> None:
    """Runs a session with its progress on the terminal, and prints what it earned."""
    from sotto import commands
    from sotto.reporting.progress import announce, progress_line

    announce(session)
    with progress_line(session) as update:
        run = commands.run_session(session, update)
    _report(run)


def _report(run: Any) -> None:
    from sotto import commands

    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    if not run.finished:
        print(f"Stopped after step {run.steps}. Continue with: sotto resume {run.path}", file=sys.stderr)
        sys.exit(130)
    print(run.statement or commands.show(run.path))
    print(f"run folder: {run.path}")


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option(help="Held-out file; default: data.eval of the run.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    epsilon: Annotated[float | None, typer.Option(help="For a noisy score, charged to that data's ledger.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of the noisy score; default: the run's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a run on held-out data. The score is exact, and as private as that data, or has noise (--epsilon)."""
    from sotto import commands

    scores = commands.evaluate(find_run(run), data, batch_size, epsilon, delta)
    if as_json:
        _print_json(scores)
    else:
        for name, value in scores.items():
            whole = isinstance(value, int) or (value.is_integer() and abs(value) > 1)
            print(f"{name:<15} {value:,.0f}" if whole else f"{name:<15} {value:,.4f}")


@app.command()
def audit(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A configuration file, or a run folder.")],
    set: Sets = None,
    canaries: Annotated[int, typer.Option(min=8, help="For a configuration: how many.")] = 5000,
    plant: Annotated[
        int | None, typer.Option(min=8, help="Train with half of so many canaries among the units.")
    ] = None,
    kind: Annotated[str, typer.Option(help="With --plant: secret, input, new_token or gradient.")] = "input",
    limit: Annotated[int, typer.Option(min=8, help="For a run: examples of each kind.")] = 2000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999)] = 0.95,
    split: Annotated[bool, typer.Option("--split", help="Attack what the customer of a split run would send.")] = False,
    as_json: AsJson = False,
) -> None:
    """Attack your own training. Sets what an attack proves beside the promise; exits with 2 if it proves more."""
    from sotto import commands

    is_run = target.is_dir()
    aim = find_run(target) if is_run else _load(target, set)
    if split:
        from sotto.split.customer import setting_of

        setting_of(_load(target, set))
    if kind not in ("secret", "input", "new_token", "gradient"):
        raise SottoError("SOT707", what=f"unknown kind '{kind}'", where="--kind", why="there are four of canaries",
                         fix="secret, input, new_token or gradient")  # fmt: skip
    report = commands.audit(aim, canaries, plant, limit, confidence, kind)
    _print_json(report.to_dict()) if as_json else print(report.render())
    if report.bug:
        sys.exit(2)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the same sample.")] = None,
) -> None:
    """Continue a prompt with a trained model."""
    from sotto import commands

    print(commands.generate(find_run(run), prompt, max_new_tokens, temperature, seed))


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    mode: Annotated[str, typer.Option(help="merged or adapter.")] = "merged",
) -> None:
    """Write a run's model as a Hugging Face folder or a peft adapter."""
    from sotto import commands

    if mode not in ("merged", "adapter"):
        raise SottoError("SOT511", what=f"unknown mode '{mode}'", where="--mode", why="there are two forms",
                         fix="merged or adapter")  # fmt: skip
    print(commands.export(find_run(run), to, mode))


@app.command()
def ls(directory: Annotated[Path, typer.Argument()] = Path("runs"), as_json: AsJson = False) -> None:
    """List runs."""
    from sotto import commands
    from sotto.privacy.accounting import round_up

    runs = commands.ls(directory)
    if as_json:
        _print_json(runs)
    elif not runs:
        print(f"no runs in {directory}")
    else:
        for run in runs:
            spent = round_up(run["epsilon"]) if run["epsilon"] else "-"
            epsilon = f"epsilon {spent}" if run["private"] else "NOT PRIVATE"
            print(f"{run['run']:<50} {run['state']:<11} {run['step']}/{run['steps']} steps   {epsilon}")


@app.command()
def show(run: RunPath) -> None:
    """Print the statement of a run."""
    from sotto import commands

    print(commands.show(find_run(run)))


@app.command()
def report(
    run: RunPath,
    to: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run folder.")] = None,
    audit: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What 'sotto audit CONFIG --json' printed. Repeatable.")
    ] = None,
) -> None:
    """Write one page for whoever has to sign a run."""
    from sotto import commands

    print(commands.report(find_run(run), to, tuple(audit or ())))


@app.command()
def ledger(
    config: ConfigPath,
    set: Sets = None,
    budget_epsilon: Annotated[float | None, typer.Option(help="Set the dataset's own budget.")] = None,
    budget_delta: Annotated[float | None, typer.Option(help="Its delta; default: privacy.delta.")] = None,
    close: Annotated[str | None, typer.Option(metavar="RUN", help="A run that will not go on: free its plan.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what all runs have spent on a dataset. Also sets its budget, or closes a run."""
    from sotto import commands
    from sotto.reporting import ledger_text

    summary = commands.ledger(_load(config, set), budget_epsilon, budget_delta, close)
    _print_json(summary) if as_json else print(ledger_text.render(summary))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine."""
    from sotto import commands

    checks = commands.doctor()
    if as_json:
        _print_json([{"check": name, "passed": passed, "detail": detail} for name, passed, detail in checks])
    else:
        for name, passed, detail in checks:
            print(f"{'ok  ' if passed else 'FAIL'}  {name:<14} {detail}")
    if not all(passed for _, passed, _ in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
