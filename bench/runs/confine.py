"""Where a process may write from now on: Linux's Landlock, which any process may put on itself and none can take off again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

CREATE, ADD, RESTRICT = 444, 445, 446  # the system calls, alike on all processors
VERSION, BENEATH = 1, 1  # flag of CREATE, type of rule
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # of prctl

# Rights by the version of Landlock that brought them: write a file; remove and make files, folders, links, sockets; move; truncate.
WRITES = ((1, 1 << 1), *((1, 1 << bit) for bit in range(4, 13)), (2, 1 << 13), (3, 1 << 14))
SIGNALS_SINCE, SIGNALS = 6, 1 << 1  # signals go to processes inside alone


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """The kernel's version of Landlock, 0 where there is none."""
    return max(0, _libc().syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))) if sys.platform == "linux" else 0


def confine(folders: Sequence[Path]) -> bool:
    """From now on this thread, and all that it starts, writes below ``folders`` and to devices alone.

    It reads what it could read before, but for the memory of processes outside. From Linux 6.12 on it signals none of these either.

    Returns:
        Whether that holds: False where the system cannot do it.
    """
    have = version()
    if not have:
        return False
    rights = sum(bit for since, bit in WRITES if have >= since)
    ruleset = _Ruleset(rights, 0, SIGNALS if have >= SIGNALS_SINCE else 0)
    size = ctypes.sizeof(ruleset) if have >= SIGNALS_SINCE else 8  # older kernels know the first field alone
    libc = _libc()
    rules = libc.syscall(CREATE, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return False
    try:
        for folder in (*folders, Path("/dev")):
            if not folder.is_dir():
                continue
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = _Beneath(rights, place)
                if libc.syscall(ADD, rules, BENEATH, ctypes.byref(rule), ctypes.c_uint32(0)):
                    return False
            finally:
                os.close(place)
        return not libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) and not libc.syscall(RESTRICT, rules, ctypes.c_uint32(0))
    finally:
        os.close(rules)


def adopt_orphans() -> None:
    """Be the parent of what children leave running, where the system can do that."""
    if sys.platform == "linux":
        _libc().prctl(CHILD_SUBREAPER, 1, 0, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
