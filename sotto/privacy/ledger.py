"""What has been spent on a dataset, by all runs together: written before each step, never taken back.

One file per dataset. A step is reserved, and the reservation is on the disk, before the step touches data; so a crash
can only over-count. A step that is done again after a crash is a second release and is reserved again. The guarantees
of the file, and their limits, are those of `chain`.

Entries: `budget` (set by the data owner), `open` (a run and what it plans), `reserve` (one step), `close`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sotto.errors import BudgetExceeded, SottoError
from sotto.privacy import accounting
from sotto.privacy.chain import Chain, Entry, cannot_open
from sotto.privacy.events import (
    Event,
    Laplace,
    PoissonLaplace,
    check_count,
    check_number,
    check_relation,
    event_from_dict,
)


def ledger_dir() -> Path:
    """The folder of the ledgers: SOTTO_LEDGER_DIR, or XDG_DATA_HOME/sotto/ledger, or ~/.local/share/sotto/ledger.

    Raises:
      SottoError: SOT410, none of the three is known.
    """
    if explicit := os.environ.get("SOTTO_LEDGER_DIR"):
        return Path(explicit)
    home = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(home) if home else Path.home() / ".local" / "share") / "sotto" / "ledger"
    except RuntimeError:  # HOME is not set, and the user has no entry in passwd, as in some containers
        raise SottoError(
            "SOT410", what="this user has no home folder for the privacy ledger", where="SOTTO_LEDGER_DIR",
            why="without it, what earlier runs have spent is unknown",
            fix="set SOTTO_LEDGER_DIR to a folder that outlives this machine or container",
        ) from None  # fmt: skip


@dataclass
class RunRecord:
    """What the ledger knows of one run.

    Attributes:
      event: what one of its steps releases.
      planned: the most steps it may ever reserve, spare ones included.
      delta, neighboring_relation: those of the run's own guarantee.
      reserved: steps charged so far; a step that was done again counts again.
      closed: no more steps will be reserved.
      secret: nobody but the owner of the data may learn that there was this run: a trial of a sweep.
      whole: all planned steps count from the first one on, taken or not: how many are taken depends on the releases.
      attempts: step -> how often it was reserved.
    """

    event: Event
    planned: int
    delta: float
    neighboring_relation: str
    reserved: int = 0
    closed: bool = False
    secret: bool = False
    whole: bool = False
    attempts: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def left(self) -> int:
        """Steps that may still be reserved."""
        return 0 if self.closed else max(self.planned - self.reserved, 0)

    @property
    def charged(self) -> int:
        """Steps that count as spent."""
        return self.planned if self.whole and self.reserved else self.reserved

    @property
    def outstanding(self) -> int:
        """Steps that are held for the run and not charged yet."""
        return 0 if self.closed else max(self.planned - self.charged, 0)


class Ledger:
    """The ledger of one dataset. Make it with `Ledger.open`. Several processes may use one ledger at a time."""

    def __init__(self, path: Path, dataset_id: str):
        self.dataset_id = dataset_id
        self.path = path
        self._runs: dict[str, RunRecord] = {}
        self._budget: tuple[float, float] | None = None
        self._budget_relation = "add_or_remove_one"
        self._chain = Chain(path, f"sotto-ledger/1/{dataset_id}", self._apply)

    @classmethod
    def open(cls, dataset_id: str, directory: str | Path | None = None) -> Ledger:
        """Opens the ledger of a dataset, checks every entry, and creates it if there is none.

        Args:
          dataset_id: letters, digits, `.`, `_`, `-`; names the file.
          directory: default `ledger_dir()`.

        Raises:
          SottoError: SOT401, a bad id; SOT410, the file cannot be opened; SOT411, the ledger is damaged.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", dataset_id):
            raise SottoError(
                "SOT401",
                what=f"dataset id {dataset_id!r} cannot name a file",
                where="ledger",
                why="the ledger is a file of this name",
                fix="use 1 to 128 letters, digits, dots, dashes and underscores",
            )
        folder = Path(directory) if directory is not None else ledger_dir()
        ledger = cls(folder / f"{dataset_id}.jsonl", dataset_id)
        ledger.refresh()
        return ledger

    @staticmethod
    def exists(dataset_id: str) -> bool:
        """Whether anything was written for this dataset. Raises SOT410 where that cannot be known."""
        path = ledger_dir() / f"{dataset_id}.jsonl"
        try:
            return path.exists()
        except OSError as error:
            raise cannot_open(path, error) from error

    def refresh(self) -> None:
        """Reads what other processes have appended since."""
        with self._chain.locked():
            pass

    def open_run(
        self,
        run_id: str,
        event: Event,
        steps: int,
        *,
        delta: float,
        neighboring_relation: str = "add_or_remove_one",
        secret: bool = False,
        whole: bool = False,
    ) -> None:
        """Announces a run, if the dataset's budget allows all of it. Opening it again, unchanged, does nothing.

        Args:
          run_id: a name that no other run on this dataset has.
          event: what one step releases.
          steps: the most steps that it will reserve, spare ones included.
          delta, neighboring_relation: those of the run's own guarantee.
          secret: as in `RunRecord`.
          whole: all of these steps count from the first one on, because a look at releases may end the run.

        Raises:
          BudgetExceeded: SOT414, spent + planned by open runs + this run would pass the budget. Nothing was written.
          SottoError: SOT413, the run is known with another plan, or is closed; SOT412, the disk refused.
        """
        check_count("steps", steps, at_least=1)
        check_number("delta", delta, above=0, below=1)
        check_relation(neighboring_relation)
        event_from_dict(event.to_dict())  # refuse now what could not be read back later
        if not isinstance(run_id, str) or not run_id:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise self._misuse(f"run id {run_id!r} is not a name", "give the run a name")
        with self._chain.locked() as file:
            known = self._runs.get(run_id)
            if known is not None:
                plan = (known.event, known.planned, known.delta, known.neighboring_relation, known.whole)
                if known.closed or plan != (event, steps, delta, neighboring_relation, whole):
                    state = "closed" if known.closed else "open with another plan"
                    raise self._misuse(f"run {run_id!r} is already in the ledger, {state}", "give the run a new name")
                return
            self._check_budget(run_id, event, steps)
            self._chain.append(
                file,
                kind="open",
                run=run_id,
                event=event.to_dict(),
                steps=steps,
                delta=delta,
                neighboring_relation=neighboring_relation,
                **({"secret": True} if secret else {}),
                **({"whole": True} if whole else {}),
            )

    def reserve(self, run_id: str, step: int, event: Event) -> int:
        """Charges one step. Returns when the charge is on the disk: only then may the step read any data.

        Returns:
          How often this step was charged before, by whatever process: no two charges get the same answer, so none of
          them draws what another one drew.

        Raises:
          BudgetExceeded: SOT415, the run has no planned step left.
          SottoError: SOT412, the disk refused: nothing is charged; SOT413, the run is not open or the event is another.
        """
        check_count("step", step)
        with self._chain.locked() as file:
            run = self._open_record(run_id)
            if event != run.event:
                raise self._misuse(f"run {run_id!r} announced {run.event}, not {event}", "account for the noise in use")
            if run.left == 0:
                raise BudgetExceeded(
                    "SOT415",
                    what=f"run {run_id!r} has reserved all of its {run.planned} planned steps",
                    where=str(self.path),
                    why="the noise was calibrated for this many releases, redone steps included; one more would pass "
                    "the run's epsilon",
                    fix="end the run here, or start a new run with more run.spare_steps",
                )
            before = run.attempts.get(step, 0)
            self._chain.append(file, kind="reserve", run=run_id, step=step, event=event.to_dict())
        return before

    def close_run(self, run_id: str) -> None:
        """Says that the run reserves no more steps, which frees what it had planned and not used. May be repeated.

        Raises:
          SottoError: SOT413, no such run; SOT412, the disk refused.
        """
        with self._chain.locked() as file:
            record = self._runs.get(run_id)
            if record is None or not record.closed:
                reserved = self._open_record(run_id).reserved
                self._chain.append(file, kind="close", run=run_id, steps=reserved)

    def set_budget(self, epsilon: float, delta: float, neighboring_relation: str = "add_or_remove_one") -> None:
        """Sets what all runs together may spend. It is checked when a run opens; runs that are open may finish.

        Raises:
          SottoError: SOT401, a number is out of range; SOT412, the disk refused.
        """
        epsilon = check_number("epsilon", epsilon, above=0)
        delta = check_number("delta", delta, above=0, below=1)
        check_relation(neighboring_relation)
        with self._chain.locked() as file:
            self._chain.append(
                file, kind="budget", epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation
            )

    def budget(self) -> tuple[float, float] | None:
        """(epsilon, delta) of the dataset, or None if none was set."""
        return self._budget

    @property
    def budget_relation(self) -> str:
        """The neighbouring relation in which the budget is meant."""
        return self._budget_relation

    @property
    def runs(self) -> dict[str, RunRecord]:
        """Run id -> what is known of it, in the order of opening. Read only."""
        return dict(self._runs)

    def reserved(self, run_id: str) -> int:
        """How many steps this run has been charged, redone ones counted again; 0 for an unknown run."""
        return self._runs[run_id].reserved if run_id in self._runs else 0

    def charged(self, run_id: str) -> int:
        """How many steps of this run count as spent; 0 for an unknown run."""
        return self._runs[run_id].charged if run_id in self._runs else 0

    def attempts(self, run_id: str, step: int) -> int:
        """How often this step of this run has been charged."""
        return self._runs[run_id].attempts.get(step, 0) if run_id in self._runs else 0

    def events(self) -> list[tuple[Event, int]]:
        """Everything that was charged, by all runs."""
        counts: dict[Event, int] = {}
        for run in self._runs.values():
            counts[run.event] = counts.get(run.event, 0) + run.charged
        return [(event, count) for event, count in counts.items() if count]

    def outstanding(self, excluding: str | None = None) -> list[tuple[Event, int]]:
        """What runs that are open have planned and not yet reserved."""
        return [
            (run.event, run.outstanding) for name, run in self._runs.items() if name != excluding and run.outstanding
        ]

    def spent(self, delta: float, neighboring_relation: str = "add_or_remove_one") -> float:
        """Epsilon, at `delta`, of everything charged: an upper bound, composed by events and not by adding epsilons."""
        return _together(self.events(), delta, neighboring_relation)

    @property
    def secretive(self) -> bool:
        """Whether how many runs there were, or what they spent together, must not be published."""
        return any(run.secret for run in self._runs.values())

    def summary(self) -> dict[str, Any]:
        """For display: the dataset, its budget, what is spent (at the budget's delta) and every run."""
        spent = None
        if self._budget is not None:
            spent = self.spent(self._budget[1], self._budget_relation)
        runs = [
            {
                "run": name,
                "event": run.event.to_dict(),
                "planned": run.planned,
                "reserved": run.reserved,
                "charged": run.charged,
                "redone": run.reserved - len(run.attempts),
                "state": "closed" if run.closed else "open",
                "epsilon": accounting.composed_epsilon([(run.event, run.charged)], run.delta, run.neighboring_relation),
                "delta": run.delta,
                "neighboring_relation": run.neighboring_relation,
            }
            for name, run in self._runs.items()
        ]
        return {
            "dataset": self.dataset_id,
            "path": str(self.path),
            "entries": self._chain.entries,
            "budget": self._budget,
            "budget_relation": self._budget_relation,
            "spent": spent,
            "runs": runs,
        }

    def _check_budget(self, run_id: str, event: Event, steps: int) -> None:
        if self._budget is None:
            return
        epsilon, delta = self._budget
        planned = self.outstanding()
        total = _together([*self.events(), *planned, (event, steps)], delta, self._budget_relation)
        if total <= epsilon:
            return
        waiting = [f"{name} ({run.outstanding} steps)" for name, run in self._runs.items() if run.outstanding]
        spent = accounting.round_up(self.spent(delta, self._budget_relation))
        held = f"; planned by open runs: {', '.join(waiting)}" if waiting else ""
        raise BudgetExceeded(
            "SOT414",
            what=f"run {run_id!r} ({steps} steps) would bring this dataset to epsilon {accounting.round_up(total)}; "
            f"the budget is {epsilon:.4g} at delta {delta:g}",
            where=f"{self.path} (spent so far: {spent}{held})",
            why="the data owner's budget covers all runs on the dataset together",
            fix="lower privacy.epsilon or the steps of this run"
            + (", or close runs that will not go on: sotto ledger CONFIG --close RUN" if waiting else ""),
        )

    def _open_record(self, run_id: str) -> RunRecord:
        record = self._runs.get(run_id)
        if record is not None and not record.closed:
            return record
        state = "closed" if record is not None else "not in the ledger"
        raise self._misuse(f"run {run_id!r} is {state}", "open a run, under a new name, before reserving its steps")

    def _misuse(self, what: str, fix: str) -> SottoError:
        why = "the ledger must say what really happened"
        return SottoError("SOT413", what=what, where=str(self.path), why=why, fix=fix)

    def _apply(self, entry: Entry) -> None:
        """Takes one entry, old or just written, into account. Raises ValueError for what it does not understand."""
        kind = entry["kind"]
        if kind == "reserve":
            run, step = self._runs[entry["run"]], check_count("step", entry["step"])
            if entry["event"] != run.event.to_dict() or run.closed:
                raise ValueError("a reserve that does not fit its run")
            run.reserved += 1
            run.attempts[step] = run.attempts.get(step, 0) + 1
        elif kind == "open":
            if entry["run"] in self._runs:
                raise ValueError("a run that was opened twice")
            if entry.get("whole", True) is not True:
                raise ValueError("an open that is whole and is not")
            self._runs[entry["run"]] = RunRecord(
                event_from_dict(entry["event"]),
                check_count("steps", entry["steps"], at_least=1),
                check_number("delta", entry["delta"], above=0, below=1),
                check_relation(entry["neighboring_relation"]),
                secret=entry.get("secret") is True,
                whole="whole" in entry,
            )
        elif kind == "close":
            self._runs[entry["run"]].closed = True
        elif kind == "budget":
            self._budget = (check_number("epsilon", entry["epsilon"]), check_number("delta", entry["delta"]))
            self._budget_relation = check_relation(entry["neighboring_relation"])
        else:
            raise ValueError(f"unknown kind {kind!r}")


def _together(events: list[tuple[Event, int]], delta: float, relation: str) -> float:
    """Epsilon of runs of any kind, also of those that promised something under the other relation.

    No accountant is known to be right for Laplace noise under `replace_one`. Its epsilon is pure there too, and at most
    twice as large: one unit goes, and then another comes. A pure epsilon adds to that of the other events at their
    delta, in whatever order they were released.
    """
    pure = [(e, n) for e, n in events if isinstance(e, Laplace | PoissonLaplace)]
    if relation != "replace_one" or not pure:
        return accounting.composed_epsilon(events, delta, relation)
    rest = [(e, n) for e, n in events if not isinstance(e, Laplace | PoissonLaplace)]
    return accounting.composed_epsilon(rest, delta, relation) + 2 * accounting.pure_epsilon(pure)
