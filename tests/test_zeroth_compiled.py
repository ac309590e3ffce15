"""The compiled loop that moves large weights on the CPU: numpy's bits, or not used.

Its sums are tested with numpy's in test_zeroth_processor.py.
"""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sotto.zeroth_order import compiled, laws, processor, walsh
from sotto.zeroth_order.directions import Directions
from sotto.zeroth_order.law import LAWS, Law

needs_compiler = pytest.mark.skipif(compiled.loop(True) is None, reason="no C compiler that works")
SIZE = 20 * laws.RUN + 77  # enough for several threads


@pytest.fixture
def anew(monkeypatch):
    """Compiles again for this test, under what it sets."""
    monkeypatch.setattr(compiled, "loop", compiled.loop.__wrapped__)
    monkeypatch.setattr(compiled, "_library", compiled._library.__wrapped__)


def compiler(folder: Path, *lines: str) -> str:
    path = folder / "compiler"
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def moved(kind: str, first: int = 0, in_place: bool = False) -> torch.Tensor:
    made = Directions("0" * 32, {"v": torch.Size((131,)), "w": torch.Size((SIZE,))}, 3, Law(kind))
    source_e = torch.linspace(-1, 1, SIZE)[first:]
    target_e = source_e if in_place else torch.full_like(source_e, torch.nan)
    assert processor.add(made.stream("w", 5, 1), 0.3, source_e, first, target_e)
    return target_e


@needs_compiler
@pytest.mark.parametrize("kind", LAWS)
def test_any_number_of_threads_gives_the_bits_of_numpy(kind, monkeypatch):
    calls, function, threads = [], compiled.loop(True), torch.get_num_threads()
    monkeypatch.setattr(compiled, "loop", lambda sized: lambda *args: (calls.append(args[-1]), function(*args)))
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [moved(kind, 45), moved(kind, 45, in_place=True)]
    finally:
        torch.set_num_threads(threads)
    assert calls == [1, 1, 2, 2, 3, 3]
    monkeypatch.setattr(compiled, "loop", lambda sized: None)
    assert all(torch.equal(moved(kind, 45), x) for x in found)


@needs_compiler
def test_a_loop_that_gives_other_numbers_does_not_agree():
    function = compiled.loop(True)
    assert compiled.agrees(function, False)
    assert compiled.agrees(function, True)
    names = ("key", "step", "index", "row", "low", "first_word", "sizes", "places", "stretch", "factor", "first")
    wrong = {"places": lambda at: None, "factor": lambda x: x * (1 + 1e-6), "stretch": lambda x: x * (1 + 1e-6)}
    wrong |= {name: lambda number: number ^ 1 for name in ("key", "step", "index", "low")}
    wrong |= {"first_word": lambda number: number ^ 64, "first": lambda number: number ^ 32}
    for name, change in wrong.items():
        at = names.index(name)

        def other(*args, at=at, change=change):
            function(*args[:at], change(args[at]), *args[at + 1 :])

        both = compiled.agrees(other, False), compiled.agrees(other, True)
        signs_alone, sizes_alone = name in ("low", "first_word"), name == "places"
        assert both == (sizes_alone, signs_alone), name
    assert not compiled.agrees(lambda *args: None, False)


@needs_compiler
def test_small_tensors_and_those_with_gaps_are_left_to_numpy():
    stream, w = walsh.Stream(1, 2, 3), np.zeros(2 * compiled.LEAST, dtype=np.float32)
    assert not compiled.move(stream, 1.0, w[: compiled.LEAST - 1], 0, w[: compiled.LEAST - 1])
    assert not compiled.move(stream, 1.0, w[::2], 0, w[::2])
    assert not compiled.move(stream, 1.0, w[: compiled.LEAST], 0, w[::2])
    assert not w.any()
    assert compiled.move(stream, 1.0, w, 0, w)
    assert w.all()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo no such option >&2", "exit 3"], "ended with 3: no such option"),
        (["exit 0"], "OSError: "),  # nothing was made
        (["cp /bin/sh $(eval echo \\${$#})"], ""),
        (["exec cc \"$@\" -UWORD -DWORD=16"], "its numbers differ from numpy's"),
        (["exec cc \"$@\" -Dsotto_move=another"], "AttributeError: "),
    ],
)  # fmt: skip
def test_what_does_not_compile_or_is_wrong_is_not_used(lines, said, anew, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler(tmp_path, *lines))
    with caplog.at_level(logging.WARNING):
        assert compiled.loop(True) is None
    (record,) = caplog.records
    assert said in record.getMessage()


@pytest.mark.parametrize(("name", "value"), [("CC", "no-such-compiler"), ("SOTTO_COMPILE", "0")])
def test_no_compiler_is_no_news(name, value, anew, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert compiled.loop(True) is None
    assert not caplog.records
    assert moved("gaussian").isfinite().all()


def test_a_name_that_cannot_be_read(anew, monkeypatch, caplog):
    monkeypatch.setenv("CC", '"')
    assert compiled.loop(True) is None
    assert "No closing quotation" in caplog.text


@needs_compiler
def test_a_compiler_without_openmp_makes_a_loop_for_one_thread(anew, tmp_path, monkeypatch, caplog):
    command = compiler(tmp_path, 'case "$*" in *-fopenmp*) exit 1;; esac', 'exec cc "$@"')
    monkeypatch.setenv("CC", f"{command} -O1")
    assert compiled.loop(True) is not None
    assert not caplog.records


@needs_compiler
def test_nothing_is_left_behind(anew, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compiled.loop(True) is not None
    assert os.listdir(tmp_path) == []


@needs_compiler
def test_the_source_has_no_warnings(tmp_path):
    options = [o for o in compiled._OPTIONS if o.startswith("-D")]
    done = subprocess.run(
        ["cc", *options, "-fopenmp", "-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-O3",
         "-c", str(compiled._SOURCE), "-o", str(tmp_path / "move.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
