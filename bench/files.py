"""Files written whole or not at all, and digests of what lies in a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from pathlib import Path

from distillbench.errors import SaveError, UserError
from distillbench.identity import sha256

SETTINGS = "settings.toml"  # beside a suite's module: the part of its card that is data


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, whatever is killed when.

    Raises:
        SaveError: the disk is full or may not be written; the old file, if any, is untouched.
    """
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:  # not tempfile's, which only this user could read: a store may be shared
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = "the disk is full: free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise SaveError(f"{path}: could not be saved ({why}); run the same command again to go on where it stopped") from error


def digest_tree(path: Path, name: str = "data", source: str = "") -> str:
    """SHA-256 over the relative names and bytes of a file or of every file below a folder.

    Raises:
        UserError: there is no such file or folder.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; put {name} there{f' ({source})' if source else ''}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise UserError(f"{path}: the folder is empty; put {name} there{f' ({source})' if source else ''}")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        total.update(sha256(file.relative_to(path).as_posix().encode()).encode() + content)
    return total.hexdigest()
