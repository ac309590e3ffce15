"""The loop that moves large weights on the CPU (`move.c`), compiled by the machine's C compiler when first needed.

It makes entries where they are added, in half of numpy's time, which makes them in a small place and adds them from
there; or in less, with torch's threads. Where there is no compiler, it fails, or the loop gives other numbers than
numpy, `move` does nothing, and the caller takes that way. The library is loaded from a folder of this process alone,
which is gone when it is loaded. With `SOTTO_COMPILE=0` no compiler is run.

Shape legend: e entries, r runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sotto.zeroth_order import counter, laws, walsh

LEAST = 1 << 17
"""Entries from which on it is worth a compiler's time, a fifth of a second."""
_SOURCE = Path(__file__).with_name("move.c")
_NUMBERS = {"WORD": laws.PER_WORD, "BLOCK": counter.BLOCK, "RUN": laws.RUN}
# The processor's own vectors: without them the loop takes longer than numpy, which has several and chooses.
_OPTIONS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
    *(f"-D{name}={n}" for name, n in _NUMBERS.items()),
)
_PATIENCE = 60  # seconds
_u32, _u64, _i64, _at, _f32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_TYPES = (_u64, _u32, _u32, _i64, _u32, _u64, _at, _at, _f32, _f32, _u64, _u64, _at, _at, ctypes.c_int)
_SLOWER = "weights are moved by slower operations, without the compiled loop: %s"
_log = logging.getLogger(__name__)


def move(stream: walsh.Stream, factor: float, source_e: laws.Floats, first: int, target_e: laws.Floats) -> bool:
    """target = source + factor * u, of the flat elements of a direction from number `first` on; False if not done.

    Args:
      target_e: it may be the source.
    """
    if len(target_e) < LEAST or not (source_e.flags.c_contiguous and target_e.flags.c_contiguous):
        return False
    function = loop(stream.places is not None)
    if function is not None:
        _call(function, stream, factor, source_e, first, target_e)
    return function is not None


@functools.cache
def loop(sized: bool) -> Any:
    """The compiled function, once it has been seen to give numpy's bits; None if it cannot be had.

    Args:
      sized: for entries with sizes, whose table takes memory; else for signs.
    """
    function = _library()
    if function is None or agrees(function, sized):
        return function
    _log.warning(_SLOWER, "its numbers differ from numpy's")
    return None


@functools.cache
def _library() -> Any:
    if os.environ.get("SOTTO_COMPILE") == "0":
        return None
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
        return None if shutil.which(command[0]) is None else _compiled(command)
    except subprocess.CalledProcessError as error:
        why = f"{error.cmd[0]} ended with {error.returncode}: {error.stderr.strip()[:200]}"
    except (OSError, AttributeError, ValueError, subprocess.TimeoutExpired) as error:
        why = f"{type(error).__name__}: {error}"
    _log.warning(_SLOWER, why)
    return None


def _compiled(command: list[str]) -> Any:
    threads = _threads()
    try:
        return _built([*command, *_OPTIONS, *threads])
    except subprocess.CalledProcessError:
        if not threads:
            raise
        return _built([*command, *_OPTIONS])


def _threads() -> list[str]:
    """Torch's own, where what it has loaded is GNU's OpenMP. Those of another library would want the same cores."""
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return []
    return ["-fopenmp"]


def _built(command: list[str]) -> Any:
    with tempfile.TemporaryDirectory(prefix="sotto-") as folder:
        library = Path(folder, "move.so")
        subprocess.run(  # noqa: S603, what CC names is the user's own choice
            [*command, str(_SOURCE), "-o", str(library)],
            check=True, capture_output=True, text=True, errors="replace", timeout=_PATIENCE,
        )  # fmt: skip
        function = ctypes.CDLL(str(library)).sotto_move
    function.argtypes, function.restype = _TYPES, None
    return function


def _call(
    function: Any, stream: walsh.Stream, factor: float, source_e: laws.Floats, first: int, target_e: laws.Floats
) -> None:
    key, step, index, row, low, first_word, places, stretch = stream
    if places is None:
        table, place_r = _ones(), None
    else:
        runs, table = laws.runs(first, first + len(target_e)), laws.sizes_from_any_place()
        place_r = laws.places(counter.words(places, step, index, runs.start, runs.stop)).astype(np.uint32, copy=False)
    function(
        key, step, index, row, low, first_word, table.ctypes.data, None if place_r is None else place_r.ctypes.data,
        stretch, factor, first, len(target_e), source_e.ctypes.data, target_e.ctypes.data, torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def _ones() -> laws.Floats:
    """(RUN,) the sizes of signs."""
    return np.ones(laws.RUN, dtype=np.float32)


def agrees(function: Any, sized: bool) -> bool:
    """Whether a loop gives the bits of numpy, for entries with sizes or signs, wherever it begins and ends."""
    size, factor = 17 * laws.RUN + 70, 0.3  # enough for several threads
    source_e, room = np.linspace(-1, 1, size, dtype=np.float32), np.empty(laws.RUN, dtype=np.float32)
    for stream in (streams["w"] for streams in walsh.examples({"before": 131, "w": size})):
        if sized != (stream.places is not None):
            continue
        expected_e = source_e.copy()
        for low, high, shifts_e in stream.pieces(0, size, room, factor):
            expected_e[low:high] += shifts_e
        for first, stop in ((0, size), (1, 2), (31, 33), (100, laws.RUN + 1), (2 * laws.RUN - 5, size - 1)):
            found_e, in_place_e = np.empty(stop - first, dtype=np.float32), source_e[first:stop].copy()
            _call(function, stream, factor, source_e[first:stop], first, found_e)
            _call(function, stream, factor, in_place_e, first, in_place_e)
            if not all(np.array_equal(x, expected_e[first:stop]) for x in (found_e, in_place_e)):
                return False
    return True
