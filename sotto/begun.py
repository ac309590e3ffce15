"""What this process has begun, so that whoever interrupts it is told what to go on with, or that there is nothing.

Each place that makes or opens a run folder, or charges a ledger without one, notes it beforehand. A folder that is gone
again was taken back whole, with nothing charged.
"""

from __future__ import annotations

from pathlib import Path

KEPT = "What was finished is on disk: see 'sotto ls', and go on with 'sotto resume'."
NOTHING = "Nothing was begun and nothing was charged."

_begun: list[tuple[Path | None, str]] = []


def note(path: Path | None, then: str = KEPT) -> None:
    """Before the first write.

    Args:
      path: the folder, or None where there is none that would say whether it came to that.
      then: what to tell. The first that was noted counts: what is begun within it is a part of it.
    """
    _begun.append((path, then))


def clear() -> None:
    """At the start of a command."""
    _begun.clear()


def told() -> str:
    """For whoever has interrupted the command."""
    return next((then for path, then in _begun if path is None or path.exists()), NOTHING)
