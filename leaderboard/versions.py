"""What becomes of records when a version rises: which ones a board still holds, and which stand below it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillbench.identity import canonical
from distillbench.runs.record import Record

Rise = Mapping[str, Any]  # part, slug, from, to, cells: as leaderboard/joined.json has them

JOINED: tuple[Rise, ...] = tuple(json.loads((Path(__file__).parent / "joined.json").read_text(encoding="utf-8")))


def lifted(record: Record, joined: Sequence[Rise] = JOINED) -> dict[str, Any]:
    """A record's identity at the versions that its cell holds for as well: those whose rise did not move its fingerprints."""
    identity: dict[str, Any] = copy.deepcopy(record.identity)
    cell = f"{record.track} {identity['kind']['slug']}/{record.slug}"
    for rise in joined:  # in the order in which they happened
        part = identity if rise["part"] == "engine" else identity[rise["part"]]
        name = "engine" if rise["part"] == "engine" else "version"
        if part[name] == rise["from"] and part.get("slug") == rise["slug"] and cell in rise["cells"]:
            part[name] = rise["to"]
    return identity


def versions(arena: Mapping[str, Any]) -> tuple[int, ...]:
    """The versions of engine, kind and suite in an arena or an identity."""
    return (arena["engine"], arena["kind"]["version"] or 0, arena["suite"]["version"])


def unversioned(arena: Mapping[str, Any]) -> bytes:
    """An arena without its versions: boards that differ in those alone are one board, of the newest."""
    plain = {**arena, "engine": None, "kind": {**arena["kind"], "version": None}, "suite": {**arena["suite"], "version": None}}
    return canonical(plain)


def behind(versions: tuple[int, ...], newest: tuple[int, ...]) -> str:
    """What people read beside a row of older versions."""
    named = zip(("engine", "kind", "suite"), versions, newest, strict=True)
    return "older version: " + ", ".join(f"{what} {has} (now {now})" for what, has, now in named if has != now)


def differences(newest: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """What sets the arena ``other`` apart from a track's newest one: ``budget.student_examples 1000 (newest: 2000)``."""
    here, there = _flat(other), _flat(newest)
    lines = []
    for path in sorted(here.keys() | there.keys()):
        a, b = here.get(path), there.get(path)
        if a != b:
            lines.append(f"{path.removeprefix('setting.')} {_short(a)} (newest: {_short(b)})")
    return tuple(lines)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict) and data:
        return {k: v for name, inner in data.items() for k, v in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}
    if isinstance(data, list) and data:
        return {k: v for i, inner in enumerate(data) for k, v in _flat(inner, f"{prefix}.{i}").items()}
    return {prefix: data}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:8]
    return text if len(text) <= 60 else f"{text[:57]}..."
