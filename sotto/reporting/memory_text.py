"""The table of `sotto memory`, and the forecast of a plan, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sotto.memory_budget import MemoryTable, MethodRow

GIB = 2**30
PARTS = {
    "weights": "weights", "trainables": "trained", "gradients": "gradients", "optimizer": "optimizer",
    "activations": "activat.", "logits": "logits", "per_unit_terms": "per unit", "noise": "noise",
}  # fmt: skip


def render(table: MemoryTable) -> str:
    """Every method: its peak at one microbatch size, by parts, and the largest microbatch that fits."""
    budget, pick = table.budget, table.pick
    given = "budget" if budget.given else "free"
    chosen = "nothing fits: more memory, a smaller data.max_length, or a smaller model"
    if pick is not None:
        chosen = f"method.train: {pick.train}, method.gradient: {pick.gradient}"
    lines = [
        f"memory           {budget.total / GIB:.2f} GiB {given}, {max(0, budget.room) / GIB:.2f} GiB of it for tensors",
        f"peaks in GiB     with {table.microbatch_size} examples at a time",
        "",
        f"{'train':<11}{'gradient':<13}{'peak':>8}{'fits up to':>12}  " + "".join(f"{n:>10}" for n in PARTS.values()),
    ]
    return "\n".join([*lines, *(_line(row) for row in table.rows), "", f"pick             {chosen}"])


def _line(row: MethodRow) -> str:
    head = f"{row.train:<11}{row.gradient:<13}"
    if row.forecast is None:
        return f"{head}{'-':>8}{'-':>12}  {row.refused}"
    parts = "".join(f"{row.forecast.parts[part] / GIB:>10.3f}" for part in PARTS)
    return f"{head}{row.forecast.peak / GIB:>8.3f}{row.largest or 'no':>12}  {parts}"
