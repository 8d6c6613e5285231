"""Names by content: the one JSON text of plain data, its hash, and seeds that follow from names."""

from __future__ import annotations

import hashlib
import json
from typing import Any

ENGINE = 1  # raised when the engine's own arithmetic changes results: part of every identity
SEEDS = 10_000  # in one plan
LAST_SEED = 2**31 - 1
ROLES = ("teacher", "data", "init", "order", "noise", "evaluation")


def canonical(data: Any) -> bytes:
    """The one JSON text of ``data``: sorted keys, no spaces, ASCII, no NaN. Raises ValueError for NaN or infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def derive_seed(role: str, seed: int) -> int:
    """The seed of one role: 48 bits of a hash of the role's name and the run's seed, so roles never share a stream."""
    return int.from_bytes(hashlib.sha256(f"{role}/{seed}".encode()).digest()[:6], "big")
