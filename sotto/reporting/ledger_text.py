"""The ledger of one dataset on one screen."""

from __future__ import annotations

from typing import Any

from sotto.privacy.accounting import round_up


def render(summary: dict[str, Any]) -> str:
    """What every run spent, the total composed by events (not by adding epsilons), and the budget if there is one."""
    lines = [f"ledger  {summary['path']}   ({summary['entries']} entries, chain intact)", ""]
    for run in summary["runs"]:
        redone = f", {run['redone']} of them again after a crash" if run["redone"] else ""
        early = run["charged"] - run["reserved"]
        redone += f", {early:,} of them not taken, as it might have" if early else ""
        lines.append(
            f"  {run['run']:<40} {run['state']:<7} {run['charged']:>6,} of {run['planned']:,} steps charged{redone}   "
            f"epsilon {round_up(run['epsilon'])} at delta {run['delta']:g}"
        )
    if not summary["runs"]:
        lines.append("  no run yet")
    lines += ["", f"  all runs together: epsilon {round_up(summary['total'])} at delta {summary['total_delta']:g}"]
    if summary["budget"] is not None:
        epsilon, delta = summary["budget"]
        lines.append(
            f"  budget of the dataset: epsilon {epsilon:g} at delta {delta:g}; runs that would pass it are refused"
        )
    else:
        lines.append("  no budget is set for the dataset: sotto ledger CONFIG --budget-epsilon 10")
    return "\n".join(lines)
