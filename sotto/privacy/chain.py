"""A file of JSON lines that is only ever appended to, where each line's hash covers the line before it.

What it detects: an edited, deleted, inserted or reordered line anywhere; and, where the small `.head` file beside it
survives, a tail that was cut off. What it cannot detect: someone who removes the tail and the head, or rewrites the
whole chain. It is a guard against accidents and quiet edits, not against the machine's owner. Keep it on a local disk:
file locks and fsync are not dependable on every network file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, cast

from sotto.errors import SottoError

_HASH_TAIL = len(b',"hash":""}') + 64

Entry = dict[str, Any]


class Chain:
    """One file, safe for several processes. Holds no open file between calls, so it may be used after a fork.

    Attributes:
      path: the file.
      entries: number of entries read so far.
    """

    def __init__(self, path: Path, genesis: str, on_entry: Callable[[Entry], None]):
        """Names the file. Nothing is read or created until `locked`.

        Args:
          path: the file; its folder is created with mode 0700, the file with mode 0600.
          genesis: what the first line's `prev` covers; binds the file to its subject.
          on_entry: called once for every entry, in order, before it counts as read; may raise `ValueError`.
        """
        self.path = path
        self.entries = 0
        self._genesis = hashlib.sha256(genesis.encode()).hexdigest()
        self._hash = self._genesis
        self._size = 0
        self._on_entry = on_entry
        self._thread_lock = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Generator[int]:
        """Locks the file against other processes, reads what they have appended, and yields its descriptor.

        Raises:
          SottoError: SOT410, the file cannot be opened; SOT411, the chain is broken.
        """
        with self._thread_lock:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._read_new(descriptor)
                yield descriptor
            finally:
                os.close(descriptor)  # releases the lock

    def append(self, descriptor: int, **fields: Any) -> None:
        """Appends one entry and returns when it is on the disk. Call inside `locked`.

        Raises:
          SottoError: SOT412, it could not be written; the file is as before.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        body = json.dumps({"seq": self.entries, "time": now, **fields, "prev": self._hash}, separators=(",", ":"))
        unhashed = body[:-1].encode()
        line = unhashed + b',"hash":"' + hashlib.sha256(unhashed).hexdigest().encode() + b'"}\n'
        try:
            _write_all(descriptor, line, self._size)
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the torn tail is set aside by the next reader
                os.ftruncate(descriptor, self._size)
                os.fsync(descriptor)
            raise self._cannot_write(error) from error
        self._take(line[:-1])
        self._write_head()

    def _open(self) -> int:
        """Opens the file; creates it, durably, the first time only: a ledger that vanished later is an error."""
        try:
            if self.entries == 0 and not self.path.exists():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                _sync_folder(self.path.parent)
                return descriptor
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise cannot_open(self.path, error) from error

    def _read_new(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        first = self.entries == 0
        if size < self._size:
            self._broken("the file became shorter while it was in use")
        if self.entries and _read_at(descriptor, self._size - 67, 64) != self._hash.encode():
            self._broken(f"line {self.entries} changed while the file was in use")
        head = self._read_head() if first or size > self._size else None
        if size > self._size:
            self._take_all(_read_at(descriptor, self._size, size - self._size), descriptor, head)
        if head is not None and head[0] > self.entries:
            self._broken(f"the file ends at entry {self.entries}, but {head[0]} were written: its end was cut off")

    def _take_all(self, data: bytes, descriptor: int, head: tuple[int, str] | None) -> None:
        lines = data.split(b"\n")
        torn = lines.pop()
        if not torn and lines and _parse(lines[-1]) is None:
            torn = lines.pop() + b"\n"
        for line in lines:
            self._take(line)
            if head is not None and head[0] == self.entries and head[1] != self._hash:
                self._broken(f"line {self.entries} is not the one that was written: the file was replaced")
        if torn:
            # Never complete on the disk, so the call that wrote it did not return and its step never began.
            if head is not None and head[0] > self.entries:
                self._broken(f"line {self.entries + 1} was damaged after it had been written")
            try:
                aside = os.open(self.path.with_suffix(".torn"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with open(aside, "ab") as file:
                    file.write(torn + b"\n")
                os.ftruncate(descriptor, self._size)
                os.fsync(descriptor)
            except OSError as error:  # nothing is cut off that was not set aside
                raise self._cannot_write(error) from error

    def _take(self, line: bytes) -> None:
        """Checks one line (without its newline) and counts it as read."""
        number = self.entries + 1
        entry = _parse(line)
        if entry is None:
            self._broken(f"line {number} is not a JSON object")
        unhashed, digest = line[:-_HASH_TAIL], str(entry.get("hash"))
        if line[-_HASH_TAIL:] != b',"hash":"' + digest.encode() + b'"}':
            self._broken(f"line {number} does not end with its hash")
        if hashlib.sha256(unhashed).hexdigest() != digest:
            self._broken(f"line {number} was edited: its hash does not match")
        if entry.get("prev") != self._hash or entry.get("seq") != self.entries:
            self._broken(f"line {number} does not follow the line before it: a line was removed, added or moved")
        try:
            self._on_entry(entry)
        except (SottoError, ValueError, KeyError, TypeError) as error:
            reason = error.what if isinstance(error, SottoError) else repr(error)
            self._broken(f"line {number} is not understood by this version of Sotto: {reason}")
        self.entries, self._hash, self._size = number, digest, self._size + len(line) + 1

    def _cannot_write(self, error: OSError) -> SottoError:
        return SottoError(
            "SOT412",
            what=f"cannot write to the privacy ledger: {error.strerror or error}",
            where=str(self.path),
            why="a step may only begin when its cost is on the disk: nothing is charged, no step is taken",
            fix="free some disk space or make the file writable, then resume the run",
        )

    def _broken(self, what: str) -> NoReturn:
        raise SottoError(
            "SOT411",
            what=f"the privacy ledger is damaged: {what}",
            where=str(self.path),
            why="what has been spent on this dataset can no longer be known, and it must never be under-counted",
            fix="restore the file from a backup, or upgrade Sotto if a newer version wrote it. "
            "Never train on this dataset with a ledger that misses entries",
        )

    def _head_path(self) -> Path:
        return self.path.with_suffix(".head")

    def _write_head(self) -> None:
        text = f"{self.entries:012d} {self._hash}"
        line = f"{text} {zlib.crc32(text.encode()):08x}\n".encode()
        with contextlib.suppress(OSError):  # a help, not a condition: the ledger itself is complete
            descriptor = os.open(self._head_path(), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, line, 0)
            finally:
                os.close(descriptor)

    def _read_head(self) -> tuple[int, str] | None:
        """(entries, hash of the last one), or None where the file is missing or unreadable."""
        try:
            number, digest, check = self._head_path().read_text("ascii").split()
            intact = int(check, 16) == zlib.crc32(f"{number} {digest}".encode())
            return (int(number), digest) if intact else None
        except (OSError, ValueError):
            return None


def cannot_open(path: Path, error: OSError) -> SottoError:
    return SottoError(
        "SOT410",
        what=f"cannot open the privacy ledger: {error.strerror or error}",
        where=str(path),
        why="without it, what earlier runs have spent is unknown",
        fix="make the file readable and writable for this user, or restore it from a backup. "
        "SOTTO_LEDGER_DIR names the folder",
    )


def _parse(line: bytes) -> Entry | None:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(Entry, value) if isinstance(value, dict) else None


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(descriptor, min(length, 1 << 26), offset)
        if not part:
            break
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
