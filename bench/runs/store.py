"""Where records and artifacts live. Every write is atomic, several processes may share a store, nothing is overwritten.

<store>/store.json                                  schema of the store
<store>/records/<suite>/<setting>/<method>/<id>-<digest>.record
<store>/students/<sha256>.safetensors               exported weights
<store>/artifacts/<sha256>                          pictures, texts and curves that judging gave
<store>/runs/<id>/                                  checkpoints of a run in progress; beside it its lock, and <id>.scratch for its method
<store>/passed/<code>-<fingerprint>                 code that has passed the fingerprints of a cell
<store>/cache/                                      teacher outputs, keyed by bytes
<store>/judging/                                    what the judge keeps for itself
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from distillbench.errors import SaveError, UserError
from distillbench.files import write_atomic
from distillbench.identity import sha256
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import SUFFIX, Record

SCHEMA = 2


def file_name(record: Record) -> Path:
    """Where a record lies below a folder of records: its track, its method, then its id and its content."""
    return Path(record.track) / record.slug / f"{record.id[:16]}-{sha256(record.to_bytes())[:8]}{SUFFIX}"


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
        return self.root / "records" / spec.suite / spec.setting / spec.slug

    def find(self, spec: RunSpec) -> Record | None:
        """The newest finished record of ``spec`` that today's code would make again, or None; see :meth:`stands`."""
        return max((r for r in self.made(spec) if self.stands(r, spec)), key=lambda r: r.created, default=None)

    def stands(self, record: Record, spec: RunSpec) -> bool:
        """Whether a record of the same id holds for the code that ``spec`` would run.

        It does where the code is the same, prose apart, or where today's code has passed the very fingerprints that the record's code
        was held to (:meth:`passed`).
        """
        if record.code.get("digest") == spec.code.digest:
            return True
        return record.code.get("fingerprint") == spec.code.fingerprint is not None and self._passed(spec).exists()

    def passed(self, spec: RunSpec) -> None:
        """Note that the code of ``spec`` has passed the fingerprints of its method and setting."""
        write_atomic(self._passed(spec), b"")

    def _passed(self, spec: RunSpec) -> Path:
        return self.root / "passed" / f"{spec.code.digest[:32]}-{str(spec.code.fingerprint)[:32]}"

    def made(self, spec: RunSpec) -> list[Record]:
        """The finished records with the id of ``spec``, whatever code made them. A damaged file is moved aside, and counts for nothing."""
        return [r for r in self._all(spec) if r.finished]

    def newest(self, spec: RunSpec) -> Record | None:
        """The newest record with the id of ``spec``, whatever became of it."""
        return max(self._all(spec), key=lambda r: r.created, default=None)

    def _all(self, spec: RunSpec) -> list[Record]:
        found = []
        for path in self._records_of(spec).glob(f"{spec.id[:16]}-*{SUFFIX}"):
            try:
                record = Record.read(path)
            except UserError:
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".damaged"))
                continue
            if record.id == spec.id:
                found.append(record)
        return found

    def save(self, record: Record) -> Path:
        """Write a record and return its path; the name holds id and content, so nothing is ever replaced."""
        self._mark()
        path = self.root / "records" / file_name(record)
        write_atomic(path, record.to_bytes())
        return path

    def save_student(self, blob: bytes) -> str:
        """Write exported weights (safetensors bytes) under their own SHA-256, which is returned."""
        digest = sha256(blob)
        path = self.root / "students" / f"{digest}.safetensors"
        if not path.exists():
            write_atomic(path, blob)
        return digest

    def save_artifact(self, content: bytes) -> str:
        """Write what a judge wants to show under its own SHA-256, which is returned."""
        digest = sha256(content)
        path = self.root / "artifacts" / digest
        if not path.exists():
            write_atomic(path, content)
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
        """Drop the checkpoints of a run that has its record, and what its method wrote besides."""
        for folder in (self.folder(spec), self.scratch(spec)):
            shutil.rmtree(folder, ignore_errors=True)

    def scratch(self, spec: RunSpec) -> Path:
        """The folder in which the method of a run in progress may write what it likes."""
        return self.folder(spec).with_suffix(".scratch")
