"""Searches every byte that a run releases for texts, people, keys, who was drawn, losses and norms."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs

import sotto
from sotto import commands, training
from sotto import session as sessions
from sotto.data.sampling import PoissonSampler

PUBLIC = ("model", "privacy.json", "statement.txt", "report.html", "plan.json", "metrics.public.jsonl")


class Witness:
    """What a run did in private: who was drawn in each step, and the loss and the norm of each example and unit."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.drawn: list[list[int]] = []
        self.numbers: list[float] = []
        draw, losses, private = PoissonSampler.draw, training.losses_of, training.private_numbers

        def drawing(sampler: Any, step: int, attempt: int = 0) -> Any:
            units = draw(sampler, step, attempt)
            self.drawn.append([int(unit) for unit in units])
            return units

        def losing(session: Any, examples: Any) -> Any:
            found = losses(session, examples)
            self.numbers += found.detach().flatten().tolist()
            return found

        def counting(session: Any, total: Any, units: Any) -> dict[str, Any]:
            numbers = private(session, total, units)
            self.numbers += total.norms.detach().flatten().tolist()
            self.numbers += [v for v in numbers.values() if isinstance(v, float) and len(repr(v)) > 7]
            return numbers

        patch.setattr(PoissonSampler, "draw", drawing)
        patch.setattr(training, "losses_of", losing)
        patch.setattr(training, "private_numbers", counting)


def spellings(number: float) -> list[bytes]:
    """A number as JSON and text write it, and as tensors hold it. Of the texts those with eight digits or more: a
    fraction such as 0.5 stands in many places, and one of seven digits by chance in one run of ten thousand. So do four
    bytes that are letters."""
    words = {repr(number), str(np.float32(number))}
    single = struct.pack("<f", number)
    return [*(w.encode() for w in sorted(words) if len(w.replace(".", "").lstrip("-0")) >= 8),
            struct.pack("<d", number), *([] if single.isascii() else [single])]  # fmt: skip


def lists(units: list[int]) -> list[bytes]:
    """A batch as JSON writes it, and as arrays of three kinds hold it."""
    words = [json.dumps(units), json.dumps(units, separators=(",", ":")), " ".join(map(str, units))]
    return [w.encode() for w in words] + [np.array(units, kind).tobytes() for kind in ("<i8", "<i4", "<u2")]


def secret_bytes(text: str) -> list[bytes]:
    raw = bytes.fromhex(text)
    return [text.encode(), text.upper().encode(), raw, raw[::-1], base64.b64encode(raw), base64.urlsafe_b64encode(raw)]


def needles(folder: Path, run: Path, seen: Witness) -> dict[str, list[bytes]]:
    """What must be found nowhere, by kind."""
    table = tiny_runs.rows()
    texts = {row[name].strip() for row in table for name in ("text", "completion")}
    secret = json.loads((run / "private" / "secrets.json").read_text())
    return {
        "text": [text.encode() for text in texts] + [" ".join(t.split()[:3]).encode() for t in texts],
        "canary": [tiny_runs.CANARY.encode(), tiny_runs.CANARY.lower().encode(), b"anzibar"],
        "unit": [row["who"].encode() for row in table] + [b"patient-"],
        "key": secret_bytes(secret["sampling_key"]),
        "dataset": [secret["data"].encode(), secret["ledger"].split(".")[0].encode(), str(folder).encode()],
        "drawn": [spelling for units in seen.drawn if len(units) > 3 for spelling in lists(units)],
        "number": [spelling for number in set(seen.numbers) if abs(number) > 1e-3 for spelling in spellings(number)],
    }


def files_in(paths: Iterable[Path]) -> list[Path]:
    return [f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*"))) if f.is_file()]


def stands_in(needle: bytes, content: bytes) -> bool:
    """Whether it does; a number not as the beginning of a longer one, which is another."""
    if needle not in content or not re.fullmatch(rb"[\d.e+-]+", needle):
        return needle in content
    return re.search(rb"(?<!\d)" + re.escape(needle) + rb"(?!\d)", content) is not None


def found(files: list[Path], wanted: dict[str, list[bytes]]) -> list[tuple[str, str, bytes]]:
    """(file, kind, needle) of everything that was found. Four bytes of a float may stand anywhere by chance in weights,
    so there a number counts only as text or as eight bytes."""
    result = []
    for file in files:
        content = file.read_bytes() + str(file.name).encode()
        binary = file.suffix == ".safetensors"
        for kind, options in wanted.items():
            for needle in options:
                if stands_in(needle, content) and not (binary and len(needle) <= 4):
                    result.append((file.name, kind, needle))
    return result


def released(run: Path, out: Path) -> list[Path]:
    """Every file that leaves: the public files of the run, and what `sotto export` writes."""
    return files_in([*(run / name for name in PUBLIC if (run / name).exists()), out])


CASES: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "classifier": ("classification", {}, "merged"),
    "adapter": ("completion", {"method": {"train": "lora"}, "output": {"export": "adapter"}}, "adapter"),
    "adaptive, averaged": ("plain_text", {"method": {"clipping": "adaptive"}, "run": {"ema_decay": 0.9}}, "merged"),
    "from losses": ("classification", {"method": {"gradient": "zeroth_order", "zeroth_preset": "aggzo"}}, "merged"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_run_is_in_what_it_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    kind, changes, mode = CASES[case]
    seen, stop_at = Witness(monkeypatch), 2
    session = sessions.start(tiny_runs.config(tmp_path, kind, **changes), "x")

    def stop(done: int, values: dict[str, Any]) -> None:
        session.stop_requested = done == stop_at

    commands.run_session(session, stop)
    done = sotto.resume(session.run.path)  # a resumed run has written every kind of file that there is
    out = sotto.export(done.path, tmp_path / "out", mode)  # type: ignore[arg-type]
    files, wanted = released(done.path, out), needles(tmp_path, done.path, seen)
    assert len(files) >= 14
    assert wanted["drawn"]
    assert wanted["number"]
    assert found(files, wanted) == []
    for words in (sotto.show(done.path), done.statement or "", json.dumps(sotto.ls(tmp_path / "runs")[0]["step"])):
        assert not [n for kind in ("text", "canary", "unit", "key") for n in wanted[kind] if n in words.encode()]


def test_the_search_finds_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of secret is found where it does stand, and where it is planted in a released file."""
    seen = Witness(monkeypatch)
    done = sotto.train(tiny_runs.config(tmp_path))
    wanted = needles(tmp_path, done.path, seen)
    private = {kind for _, kind, _ in found(files_in([done.path / "private", done.path / "metrics.private.jsonl",
                                                      tmp_path / "notes.csv"]), wanted)}  # fmt: skip
    assert private >= {"text", "canary", "unit", "key", "dataset", "number"}
    card = done.path / "model" / "README.md"
    kept = card.read_bytes()
    for kind, options in wanted.items():
        for needle in options[:8]:
            card.write_bytes(kept + b"\n" + needle + b"\n")
            assert kind in {kind for _, kind, _ in found([card], {kind: options})}
    card.write_bytes(kept)
    assert found([card], wanted) == []


def test_nothing_private_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands print, and what the ledger writes, names no text, no person and no key."""
    seen = Witness(monkeypatch)
    config = tiny_runs.config(tmp_path)
    done = sotto.train(config)
    wanted = {k: v for k, v in needles(tmp_path, done.path, seen).items() if k in ("text", "canary", "unit", "key")}
    ledger = Path(sotto.ledger(config)["path"])
    words = [repr(sotto.check(config).to_dict()), repr(sotto.plan(config)), repr(sotto.ls(tmp_path / "runs")),
             ledger.read_text()]  # fmt: skip
    for text in words:
        assert not [n for options in wanted.values() for n in options if n in text.encode()]
    assert not re.search(r"[0-9a-f]{32}\b", sotto.show(done.path)), "no key or digest in the statement"
