"""Whom a row is believed on the word of: levels of trust (docs/trust.md), kept by who keeps the board and never by a record itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from distillbench.errors import UserError
from distillbench.leaderboard.table import Board

FILE = "trust.json"  # in a folder of records: digest of a record -> level, by whom, on which day

# From the least, with the mark that boards show and what was done.
LEVELS = {
    "self-reported": ("○", "the record is whole and consistent; its numbers are its author's word"),
    "verified": ("◐", "the exported weights were judged again by who keeps this board, and gave the same numbers"),
    "reproduced": ("●", "trained again by who keeps this board, on seeds that they drew, with the same result within its interval"),
}
LEAST = next(iter(LEVELS))


def read(folders: Iterable[Path]) -> dict[str, str]:
    """Digest of a record -> its level, from the ``trust.json`` of each folder; a folder may have none.

    Raises:
        UserError: a file is not such a table.
    """
    found: dict[str, str] = {}
    for path in (folder / FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            table = json.loads(path.read_bytes())
            levels = {str(digest): about["level"] for digest, about in table.items()}
            if odd := [level for level in levels.values() if level not in LEVELS]:
                raise ValueError(f"level {odd[0]!r}, which is none of {', '.join(LEVELS)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}: no table {{"<digest>": {{"level": ..., "by": ..., "on": ...}}}} ({error}); mend or remove it'
            ) from error
        found |= levels
    return found


def marked(boards: Sequence[Board], known: Mapping[str, str]) -> list[Board]:
    """``boards`` whose rows say how far they are to be trusted: each as far as the least of its records."""
    order = list(LEVELS)

    def level(digests: Sequence[str]) -> str:
        return min((known.get(d, LEAST) for d in digests), key=order.index, default=LEAST)

    return [dataclasses.replace(b, rows=type(b.rows)(dataclasses.replace(r, trust=level(r.records)) for r in b.rows)) for b in boards]
