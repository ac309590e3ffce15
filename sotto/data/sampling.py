"""How batches are drawn: Poisson sampling of units, and the cutting of a batch into microbatches.

The sampler is part of the mechanism that the accountant analyses. Microbatches are performance only: they change which
examples share a forward pass and never which examples are used.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from randomgen import AESCounter

KEY_BYTES = 16


class PoissonSampler:
    """Draws each unit independently with probability `sampling_prob` at every step.

    Formal guarantees:
      - `draw(step, attempt)` is a Binomial(num_units, sampling_prob) number of units, and given that number a uniform
        subset of that size without replacement. That is the law of independent Bernoulli draws of every unit (Poisson
        sampling). A draw may be empty; it is never padded, cut or redrawn.
      - Draws for different (step, attempt) come from AES-128 in counter mode under different keys, derived from `key`
        with BLAKE2b. They are independent up to the security of these two, and nobody without `key` can predict them.
      - The same (key, step, attempt) gives the same draw, so a run resumes with no state but the key and the step.
        A step that is done again after a crash must use another `attempt`, and is charged again by the ledger.
      - Time and memory are O(size of the draw), not O(num_units): at most a constant factor (20) more.

    What is not covered: randomness has the 53 bits of a double, and numpy's binomial cuts the far tail (more than about
    10 standard deviations away, of probability below 1e-12). The drawn indices and their number are private values.

    Attributes:
      num_units: how many units there are to draw from.
      sampling_prob: probability of each.
      debug: True if the key came from a stored seed. Then draws can be recomputed and the run is NOT PRIVATE; the
        sampler only carries the mark.
    """

    def __init__(self, num_units: int, sampling_prob: float, key: bytes, debug: bool = False):
        if num_units < 0:
            raise ValueError("num_units must not be negative")
        if not 0.0 <= sampling_prob <= 1.0:
            raise ValueError("sampling_prob must lie in [0, 1]")
        if len(key) != KEY_BYTES:
            raise ValueError(f"key must be {KEY_BYTES} bytes")
        self.num_units = num_units
        self.sampling_prob = sampling_prob
        self.debug = debug
        self._key = key

    def __repr__(self) -> str:
        # Without the key: it must not reach a log.
        return f"PoissonSampler(num_units={self.num_units}, sampling_prob={self.sampling_prob}, debug={self.debug})"

    def draw(self, step: int, attempt: int = 0) -> np.ndarray:
        """The units of one step: int64 indices in [0, num_units), ascending, without repetition; may be empty."""
        generator = self._stream(step, attempt)
        count = int(generator.binomial(self.num_units, self.sampling_prob))
        return np.sort(generator.choice(self.num_units, count, replace=False, shuffle=False)).astype(np.int64)

    def _stream(self, step: int, attempt: int) -> np.random.Generator:
        # Fixed widths, so that no two (step, attempt) are the same message. Negative numbers raise.
        message = step.to_bytes(8, "little") + attempt.to_bytes(8, "little")
        derived = hashlib.blake2b(message, key=self._key, digest_size=KEY_BYTES, person=b"sotto.sampling").digest()
        stream: Any = AESCounter(key=int.from_bytes(derived, "little"))  # a BitGenerator, which its stub does not say
        return np.random.Generator(stream)


def microbatches(
    example_indices: np.ndarray, unit_of_each: np.ndarray, lengths: np.ndarray, microbatch_size: int
) -> list[np.ndarray]:
    """Cuts a batch into microbatches that hold whole units, units of like length together.

    All examples of one unit stay in one microbatch, because a unit's gradients must be added before they are clipped. A
    unit of more than `microbatch_size` examples therefore gets a larger microbatch of its own. Deterministic.

    Args:
      example_indices: (B,) indices of examples, as `Units.members_of` gives them.
      unit_of_each: (B,) the unit of each.
      lengths: (E,) tokens of every example of the dataset (`Examples.lengths`).
      microbatch_size: examples per microbatch.

    Returns:
      Arrays of positions into `example_indices`. Each position stands in exactly one of them, and the longest examples
      come first (so that what does not fit in memory fails at once). An empty batch gives an empty list.
    """
    if microbatch_size < 1:
        raise ValueError("microbatch_size must be at least 1")
    if len(example_indices) == 0:
        return []
    order = np.argsort(unit_of_each, kind="stable")
    starts = np.flatnonzero(np.diff(unit_of_each[order], prepend=unit_of_each[order[0]] - 1))
    blocks = np.split(order, starts[1:])
    longest = np.maximum.reduceat(np.asarray(lengths)[example_indices[order]], starts)
    result: list[list[np.ndarray]] = []
    room = 0
    for block in np.argsort(-longest, kind="stable"):
        positions = blocks[block]
        if len(positions) > room:
            result.append([])
            room = max(microbatch_size, len(positions))
        result[-1].append(positions)
        room -= len(positions)
    return [np.concatenate(parts) for parts in result]
