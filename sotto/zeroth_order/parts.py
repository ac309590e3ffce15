"""How trained tensors are split into parts, of which a user looks at one in each step (`setting.parts`).

Clients that each take some of a model's trainable tensors are those of Spry (Panchal et al. 2024, arXiv:2405.15551).
"""

from __future__ import annotations

from collections.abc import Mapping

from sotto.errors import SottoError


def split_in_order(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Name -> number of its part: tensors that follow one another, so that the largest part is as small as can be.

    Raises:
      SottoError: SOT650, there are more parts than tensors.
    """
    if not 1 <= parts <= len(sizes):
        raise SottoError(
            "SOT650", what=f"parts is {parts!r}", where="parts", why="each part has at least one trained tensor",
            fix=f"give a whole number from 1 to {len(sizes)}",
        )  # fmt: skip
    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:  # the least size of the largest part
        middle = (low + high) // 2
        low, high = (low, middle) if _runs(sizes, middle) <= parts else (middle + 1, high)
    found, part, filled = dict[str, int](), 0, 0
    for place, (name, size) in enumerate(sizes.items()):
        if place and (filled + size > low or len(sizes) - place < parts - part):
            part, filled = part + 1, 0
        found[name], filled = part, filled + size
    return found


def _runs(sizes: Mapping[str, int], most: int) -> int:
    """How many runs of tensors there are, each of at most so many entries."""
    runs, filled = 1, 0
    for size in sizes.values():
        runs, filled = (runs, filled + size) if filled + size <= most else (runs + 1, size)
    return runs
