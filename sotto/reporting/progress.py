"""What a user sees while a run goes on: what is about to happen, then one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sotto.privacy.accounting import round_up
from sotto.privacy.plan import Plan
from sotto.reporting.plan_text import unused

if TYPE_CHECKING:
    from sotto.training import Session

GRID = 12


def announce(session: Session) -> None:
    """Says what was read and what will be trained, on standard error."""
    plan, data = session.plan, session.data
    console = Console(stderr=True, highlight=False)
    trained = sum(p.numel() for p in session.engine.parameters.values())
    console.print(data.report.render(), soft_wrap=True)
    start = f", continuing after step {session.step}" if session.step else ""
    console.print(
        f"training {trained:,} parameters for {plan.steps:,} steps of about {plan.expected_batch_size:,} units{start}"
        f" -> {session.run.path}",
        soft_wrap=True,
    )
    if plan.unused:
        console.print(unused(plan), soft_wrap=True, markup=False)
    if plan.not_private:
        console.print(f"[bold red]NOT PRIVATE: {plan.not_private}[/]")


@contextmanager
def progress_line(session: Session) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A progress bar with the epsilon spent; values behind a lock are functions of private data and stay on screen."""
    spent = spending_curve(session.plan)
    columns = (
        TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[spent]}"),
        TextColumn("{task.fields[locked]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("train", total=session.plan.steps, completed=session.step, spent="", locked="")

        def update(step: int, values: dict[str, Any]) -> None:
            clipped = values.get("clipped_fraction")
            locked = "" if clipped is None or session.plan.epsilon is None else f"\U0001f512 clipped {clipped:.0%}"
            bar.update(task, completed=step, spent=spent(step), locked=locked)

        yield update


def spending_curve(plan: Plan) -> Callable[[int], str]:
    """A function from steps to the epsilon spent so far: a few points of the curve, rounded up to the next of them."""
    if plan.epsilon is None or plan.not_private:
        return lambda step: "NOT PRIVATE"
    every = max(1, -(-plan.steps // GRID))
    points: dict[int, float] = {}
    if plan.whole:  # all of them count from the first on
        all_steps = f"epsilon <= {round_up(plan.epsilon_after(plan.total_steps))} of {plan.epsilon:g}"
        return lambda step: all_steps

    def spent(step: int) -> str:
        upper = min(plan.steps, -(-step // every) * every)
        if upper not in points:
            points[upper] = plan.epsilon_after(upper)
        return f"epsilon <= {round_up(points[upper])} of {plan.epsilon:g}"

    return spent
