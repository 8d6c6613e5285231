"""Where records and artifacts live. Every write is atomic, several processes may share a store, nothing is overwritten.

<store>/store.json                                  schema of the store
<store>/records/<suite>/<setting>/<method>/<id>-<digest>.json
<store>/students/<sha256>.safetensors               exported weights
<store>/runs/<id>/                                  lock and checkpoints of a run in progress
<store>/cache/                                      teacher outputs, keyed by bytes
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import SaveError, UserError
from bench.plan import RunSpec
from bench.record import Record, sha256

SCHEMA = 1
UMASK = os.umask(0)
os.umask(UMASK)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, whatever is killed when.

    Raises:
        SaveError: the disk is full or may not be written; the old file, if any, is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as stream:
            temporary = Path(stream.name)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o666 & ~UMASK)  # a temporary file is private; a store may be shared
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        why = "the disk is full: free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise SaveError(f"{path}: could not be saved ({why}); run the same command again to go on where it stopped") from error


class Store:
    """A folder of records and artifacts.

    Raises:
        UserError: the folder belongs to a newer version, or is a file.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root}: is a file, not a store; name another folder with --out")
        marker = self.root / "store.json"
        if marker.exists():
            try:
                schema = int(json.loads(marker.read_text())["schema"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f'{marker}: corrupt; restore it or write {{"schema": {SCHEMA}}} into it') from error
            if schema > SCHEMA:
                raise UserError(f"{self.root}: a store of schema {schema}, this version knows {SCHEMA}; upgrade distillbench")

    def _mark(self) -> None:
        marker = self.root / "store.json"
        if not marker.exists():
            write_atomic(marker, (json.dumps({"schema": SCHEMA}) + "\n").encode())

    def folder(self, spec: RunSpec) -> Path:
        """The folder of one run in progress."""
        return self.root / "runs" / spec.id[:32]

    def _records_of(self, spec: RunSpec) -> Path:
        return self.root / "records" / spec.suite / spec.setting / str(spec.resolved["method"]["card"]["slug"])

    def find(self, spec: RunSpec) -> Record | None:
        """The newest finished record of ``spec``, or None. A damaged file is moved aside, and never counted as done."""
        found = []
        for path in self._records_of(spec).glob(f"{spec.id[:16]}-*.json"):
            try:
                record = Record.read(path)
            except UserError:
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".damaged"))
                continue
            if record.finished and record.id == spec.id:
                found.append(record)
        return max(found, key=lambda r: r.created) if found else None

    def save(self, record: Record) -> Path:
        """Write a record and return its path; the name holds id and content, so nothing is ever replaced."""
        self._mark()
        text = record.to_json().encode()
        folder = self.root / "records" / record.track / record.slug
        path = folder / f"{record.id[:16]}-{sha256(text)[:8]}.json"
        write_atomic(path, text)
        return path

    def save_student(self, blob: bytes) -> str:
        """Write exported weights (safetensors bytes) under their own SHA-256, which is returned."""
        digest = sha256(blob)
        path = self.root / "students" / f"{digest}.safetensors"
        if not path.exists():
            write_atomic(path, blob)
        return digest

    @contextlib.contextmanager
    def lock(self, spec: RunSpec, timeout: float = -1) -> Iterator[bool]:
        """Hold the run's lock; yields False where another process held it for longer than ``timeout`` seconds."""
        folder = self.folder(spec)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._mark()
            lock = FileLock(folder.with_suffix(".lock"))
            lock.acquire(timeout=timeout)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise SaveError(f"{folder}: cannot be written ({error.strerror}); name another folder with --out") from error
        try:
            yield True
        finally:
            lock.release()

    def clear(self, spec: RunSpec) -> None:
        """Drop the checkpoints of a run that has its record."""
        shutil.rmtree(self.folder(spec), ignore_errors=True)
