"""A mutant is a named fault, planted in the running code, and the ordinary test that must turn red because of it.

The classes are ways in which real systems got differential privacy wrong. Each of them has a mutant.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sotto.errors import SottoError

TESTS = Path(__file__).parents[1]

CLASSES = {
    1: "batches are not drawn as the accountant believes",
    2: "the divisor or the sampling probability follows the size of the private data",
    3: "the clipping norm that is applied is not the one that the noise is scaled to",
    4: "the norm of a layer's gradient is wrong for its shape",
    5: "a parameter that is used twice is counted wrongly",
    6: "examples of a batch influence one another",
    7: "the loss of an example depends on padding, prompt or batch",
    8: "accumulation over microbatches changes clipping or noise",
    9: "the noise has the wrong scale",
    10: "noise of several processes is repeated, summed or missing",
    11: "noise is used more than once",
    12: "noise or sums in low precision",
    13: "the last bits of a release tell of the sum",
    14: "noise or sampling follows from a seed that somebody knows",
    15: "zeroth-order scalars are released more often than they are counted",
    16: "one broken example spoils the step or stops the run",
    17: "an empty batch is skipped or released without noise",
    18: "spent steps are forgotten, or counted only after the data was used",
    19: "thresholds that adapt are accounted for with the wrong noise",
    20: "several runs on one dataset are counted as one",
    21: "a function of the private data stands among the public numbers",
    22: "the unit that is clipped is not the unit that is promised",
    23: "the private data shapes what training starts from",
    24: "epsilon is computed by a formula that is no bound, or for another relation or delta",
    25: "a participant's own weight or absence decides how much noise there is",
    26: "local noise is not scaled to what a participant may send",
    27: "a file that is read runs code",
    28: "a key or a seed leaves the run folder",
}

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
      bug_class: which of `CLASSES` it is an example of.
      plant: puts the fault in place, for as long as the patch lasts.
      test: how the id of the test that must fail begins, below tests/: `file.py::name` or `file.py::name[case`.
    """

    bug_class: int
    plant: Plant
    test: str

    @property
    def name(self) -> str:
        return self.plant.__name__


CATALOGUE: list[Mutant] = []


def caught_by(test: str, bug_class: int) -> Callable[[Plant], Plant]:
    """Enters the fault into the catalogue, with the ordinary test that it must turn red."""

    def enter(plant: Plant) -> Plant:
        CATALOGUE.append(Mutant(bug_class, plant, test))
        return plant

    return enter


def wrapped(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces `owner.name` by `change(original, *args, **kwargs)`."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    patch.setattr(owner, name, replacement)


# ---- running one ordinary test, with or without a fault


@dataclass
class Outcome:
    """How the test ended: `errors` of its call, and `trouble` if it could not be run as a test at all."""

    ran: str = ""
    errors: list[BaseException] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


class _Selected:
    """A pytest plugin: keeps one test, plants the fault around its setup, call and teardown, and notes the outcome."""

    def __init__(self, test: str, plant: Plant | None):
        self.test, self.plant, self.outcome = test, plant, Outcome()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if f"{item.path.name}::{item.name}".startswith(self.test)][:1]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.outcome.ran = item.name
        with pytest.MonkeyPatch.context() as patch:
            if self.plant is not None:
                try:
                    self.plant(patch)
                except Exception as error:
                    self.outcome.trouble.append(f"the fault does not fit the code any more: {error!r}")
                    return True
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.excinfo is not None:
            if report.when == "call" and report.outcome == "failed":
                self.outcome.errors.append(call.excinfo.value)
            else:
                self.outcome.trouble.append(f"{report.outcome} in {report.when}: {call.excinfo.value!r}")
        return report


QUIET = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:unraisableexception")
"""What belongs to the outer run: its options, its cache, and the hooks that it has set for the whole process."""


def run(test: str, plant: Plant | None = None) -> Outcome:
    """Runs one ordinary test in this process, as pytest would, fixtures included."""
    selected, printed = _Selected(test, plant), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        where = (str(TESTS / test.partition("[")[0]), "--rootdir", str(TESTS.parent), "--basetemp", f"{folder}/tmp")
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            pytest.main([*where, *QUIET], plugins=[selected])
    if not selected.outcome.ran:
        selected.outcome.trouble.append(f"no such test: {test}\n{printed.getvalue()}")
    return selected.outcome


def noticed(error: BaseException) -> bool:
    """Whether a test fails like this because it has noticed something. Any other exception may be the fault's own."""
    if isinstance(error, BaseExceptionGroup):  # of hypothesis, when different inputs fail in different places
        return all(noticed(part) for part in error.exceptions)
    return isinstance(error, AssertionError | SottoError | pytest.fail.Exception)
