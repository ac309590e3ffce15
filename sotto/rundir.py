"""The folder of one run: what lies where, and who may read it.

runs/2026-11-22_clinic_4f1c/
  config.yaml     what ran            plan.json        the numbers derived from it
  statement.txt   the guarantee       privacy.json     the same for machines
  report.html     a page about both   metrics.public.jsonl, metrics.private.jsonl (0600)
  private/        sampling key, dataset name in the ledger, data report, seal (0700, never exported)
  checkpoints/    resumable (0700)    model/           the exported Hugging Face folder
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sotto import begun, config_file
from sotto.config import Config
from sotto.errors import SottoError, did_you_mean
from sotto.metrics import last_step
from sotto.privacy.plan import Plan

SEAL = "private/seal.json"
"""SHA-256 of every file that says what was promised or what it rests on. It finds accidents, not forgers."""


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def id(self) -> str:
        """The name of the folder, whatever the path that leads to it."""
        return self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def finished(self) -> bool:
        """Whether everything has been written; what is left to do then is to close the run in the ledger."""
        return (self.path / "privacy.json").exists()

    @classmethod
    def planned(cls, config: Config, stem: str) -> RunDir:
        """The folder that a new run will have. Nothing is written yet."""
        root = Path(config.output.dir)
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", config.output.name or stem).strip("-.")[:80] or "run"
        return cls(root / f"{datetime.date.today().isoformat()}_{label}_{secrets.token_hex(3)}")

    def create(self, config: Config, plan: dict[str, Any], private: Mapping[str, str]) -> None:
        """Writes the folder, whole or not at all: a crash or an error leaves no half of a run.

        Args:
          private: file name -> content, for the folder `private/`.

        Raises:
          SottoError: SOT503, it cannot be written.
        """
        begun.note(self.path)
        root, new = self.path.parent, RunDir(self.path.with_name(f".{self.id}.new"))
        made = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            new.path.mkdir()
            for folder in ("private", "checkpoints"):
                (new.path / folder).mkdir(mode=0o700)
            files = {f"private/{name}": text for name, text in private.items()}
            new.write_all({"plan.json": json.dumps(plan, indent=2) + "\n", **files})
            new._replace("config.yaml", config_file.dump(config.to_dict()))  # some of its keys may be edited
            new.path.rename(self.path)
            _sync(root)
        except BaseException as error:
            shutil.rmtree(new.path, ignore_errors=True)
            if made:
                with suppress(OSError):
                    root.rmdir()
            if isinstance(error, OSError):
                raise cannot_write(root, error) from None
            raise

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Opens an existing run folder."""
        run = cls(Path(path))
        wanted = ("config.yaml", "plan.json", "private/secrets.json", SEAL)
        missing = [name for name in wanted if not (run.path / name).exists()]
        if missing and (run.path / "sweep.json").exists():
            raise SottoError(
                "SOT501", what="this is what a sweep has released, not a run folder", where=str(run.path.absolute()),
                why="the runs that it chose from are deleted",
                fix=f"read {run.path / 'statement.txt'}; the model is {run.path / 'model'}, ready for use",
            )  # fmt: skip
        if missing:
            raise SottoError(
                "SOT501", what=f"this is not a run folder: {missing[0]} is not there", where=str(run.path.absolute()),
                why="a run is read from its own configuration and plan", fix="'sotto ls' lists the runs",
            )  # fmt: skip
        return run

    def config(self) -> Config:
        return Config.load(self.path / "config.yaml")

    def read(self, name: str) -> str:
        """A file that `write` wrote.

        Raises:
          SottoError: SOT516, it is not what was written.
        """
        self.verify(name)
        return (self.path / name).read_text(encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """The same, parsed."""
        return json.loads(self.read(name))

    def plan(self) -> Plan:
        """The plan that was settled before the first step. Raises SOT516; SOT110, a split run's folder has none."""
        values = self.read_json("plan.json")
        if values.get("kind") == "split":
            raise SottoError(
                "SOT110", what="this is the folder of a split run", where=str(self.path),
                why="customer and vendor have a part of the model each, and its promise is not that of a training",
                fix=f"read its statement: sotto show {self.path}",
            )  # fmt: skip
        return Plan.from_dict(values)

    def split_progress(self, steps: int) -> tuple[bool, int]:
        """Whether a split run's side is through, and the steps that its training has taken.

        The vendor's has no statement: it is through with the checkpoint of the last step. A folder with an outbox is
        the customer's, or that of both sides, and is through with the statement.
        """
        if self.finished:
            return True, steps
        numbers = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        step = max((int(number) for number in numbers if number.isdecimal()), default=0)
        return step >= steps and not (self.path / "private" / "outbox").exists(), step

    def verify(self, *names: str) -> None:
        """Compares files with the seal.

        Raises:
          SottoError: SOT516, one of them is gone, or other than it was written.
        """
        sums = self._seal()
        for name in names:
            try:
                if name in sums and sums[name] == _sha256(self.path / name):
                    continue
            except OSError:
                pass
            raise self._damaged(name)

    def write(self, name: str, text: str, private: bool = False) -> None:
        """Seals and replaces a file. Readers see the old text or the new one, never half of it.

        A crash in between leaves an old file under a new seal, so nothing may depend on a file that is written again.
        """
        self.write_all({name: text}, private)

    def write_all(self, files: Mapping[str, str], private: bool = False) -> None:
        """The same for several files, sealed together. What lies in `private/` is for the owner alone in any case."""
        self._add_to_seal({name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()})
        for name, text in files.items():
            self._replace(name, text, private or name.startswith("private/"))

    def seal_model(self) -> None:
        """Seals the exported model, but for its card, which is there to be edited."""
        files = [file for file in self.model.iterdir() if file.suffix in (".safetensors", ".json")]
        self._add_to_seal({f"model/{file.name}": _sha256(file) for file in files})

    def verify_model(self) -> None:
        """Compares the exported model with the seal. Raises SOT516."""
        self.verify(*(name for name in self._seal() if name.startswith("model/")))

    def released(self) -> dict[str, str]:
        """SHA-256 of the files that are there to be handed over, as they were when the run ended. Raises SOT516."""
        return {n: digest for n, digest in self._seal().items() if n.startswith("model/") or n == "statement.txt"}

    def _seal(self) -> dict[str, str]:
        try:
            sums, check = json.loads((self.path / SEAL).read_text(encoding="utf-8"))
            if check == _check(sums):
                return sums
        except (OSError, ValueError, TypeError, RecursionError):
            pass
        raise self._damaged(SEAL)

    def _add_to_seal(self, sums: Mapping[str, str]) -> None:
        both = {**(self._seal() if (self.path / SEAL).exists() else {}), **sums}
        (self.path / "private").mkdir(mode=0o700, exist_ok=True)
        self._replace(SEAL, json.dumps([both, _check(both)], indent=1) + "\n", private=True)

    def _damaged(self, name: str) -> SottoError:
        return SottoError(
            "SOT516", what=f"{name} is not what was written", where=str(self.path),
            why="the guarantee rests on the files of the run, and this one is damaged, gone, or was edited",
            fix="restore it from a backup; if there is none, start a new run: what this one spent stays in the ledger",
        )  # fmt: skip

    def _replace(self, name: str, text: str, private: bool = False) -> None:
        target = self.path / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o644)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Refuses a second process on the same run."""
        begun.note(self.path)
        descriptor = os.open(self.path / "private" / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SottoError(
                    "SOT502", what="another process is working on this run", where=str(self.path),
                    why="two processes would overwrite each other's checkpoints",
                    fix="wait for it, or stop it and run 'sotto resume' again",
                ) from None  # fmt: skip
            yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(sums: Any) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk, so that the ledger never knows a run that the disk does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(config: Config) -> None:
    """Refuses, before anything is read, an output folder that cannot be written.

    Raises:
      SottoError: SOT503.
    """
    root = Path(config.output.dir).absolute()
    existing = next(p for p in (root, *root.parents) if p.exists())
    if not existing.is_dir():
        raise cannot_write(root, NotADirectoryError(errno.ENOTDIR, f"{existing} is not a folder"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise cannot_write(root, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def cannot_write(path: Path, error: OSError) -> SottoError:
    return SottoError(
        "SOT503", what=f"cannot write: {error.strerror or error}", where=str(path.absolute()),
        why="a run needs a place for its checkpoints and its statement; nothing was charged",
        fix="choose a writable folder with --set output.dir=...",
    )  # fmt: skip


def find_run(path: str | Path) -> Path:
    """A run folder, with a suggestion when it does not exist."""
    path = Path(path)
    if not path.is_dir():
        folders = [p.name for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
        what = "this is a file" if path.is_file() else f"there is no such folder.{did_you_mean(path.name, folders)}"
        raise SottoError("SOT501", what=what, where=str(path.absolute()),
                         why="a run is read from its folder", fix="'sotto ls' lists the runs")  # fmt: skip
    return path


def list_runs(directory: Path) -> list[dict[str, Any]]:
    """See `sotto.ls`."""
    found = []
    for path in sorted(directory.glob("[!.]*/plan.json")):
        run = RunDir(path.parent)
        if not (run.path / "private").is_dir():
            continue  # somebody else's plan.json
        finished, step, state, done, planned = run.finished, last_step(run.path), "", {}, {}
        try:
            planned = run.read_json("plan.json")
            done = run.read_json("privacy.json") if run.finished else {}
            if planned.get("kind") == "split" and isinstance(planned.get("steps"), int):
                finished, step = run.split_progress(planned["steps"])
        except SottoError:
            state = "damaged"
        found.append(
            {
                "run": str(run.path),
                "state": state or ("finished" if finished else "unfinished"),
                "step": step,
                "steps": planned.get("steps"),
                "epsilon": done.get("epsilon"),
                "delta": planned.get("delta"),
                "private": planned.get("not_private") is None,
            }
        )
    return found
