"""The one exception that users meet: what went wrong, where, why, and what to do.

Every error that a user can cause is a `SottoError`. The command line prints it and exits with code 2; nothing has been
written and nothing charged to the privacy ledger at that point unless the message says otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SottoError(Exception):
    """A problem stated in four parts.

    Attributes:
      code: a stable identifier such as `SOT101`, for searching the documentation.
      what: what is wrong, naming the offending value.
      where: the file and line, the configuration key, the module path or the column.
      why: why Sotto refuses to go on.
      fix: one action that the reader can take.
    """

    exit_code = 2

    def __init__(self, code: str, *, what: str, where: str = "", why: str = "", fix: str = ""):
        self.code, self.what, self.where, self.why, self.fix = code, what, where, why, fix
        super().__init__(self.__str__())

    def __str__(self) -> str:
        parts = [f"{self.code}  {self.what}"]
        for label, text in (("where", self.where), ("why", self.why), ("do this", self.fix)):
            if text:
                parts.append(f"  {label + ':':<9}{text}")
        return "\n".join(parts)


class BudgetExceeded(SottoError):
    """The privacy budget does not allow what was asked. The command line exits with code 3."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
