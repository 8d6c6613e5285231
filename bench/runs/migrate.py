"""Records of schema 1 as records of schema 2: nothing is run, nothing is left out, and what was told apart stays apart.

Schema 1 identified a run by its cards and by digests of source files. Here the versions on the cards stand for both, for methods and
suites of distillbench; the digests stay as provenance (``before``). Where two arenas, or two entries of one arena, would become one,
the older of them keeps its old digest as that of loose code.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.cards.card import Card, SuiteCard
from distillbench.cards.reading import from_data
from distillbench.code import text
from distillbench.errors import UserError, unknown
from distillbench.files import write_atomic
from distillbench.identity import canonical, sha256
from distillbench.runs import identities
from distillbench.runs.packing import pack
from distillbench.runs.record import Measurement, Record
from distillbench.runs.store import file_name

KIND = 1  # the version of every kind of problem when schema 1 was written


def read_old(path: Path) -> dict[str, Any]:
    """The content of a record of schema 1.

    Raises:
        UserError: it is none, or was edited or damaged.
    """
    try:
        data = json.loads(path.read_bytes())
        schema = data["schema"]
        stated, digest = data.pop("id"), data.pop("digest")
        same = sha256(canonical(data)) == digest and sha256(canonical(data["spec"])) == stated
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no record of schema 1 ({error})") from error
    if schema != 1:
        raise UserError(f"{path}: a record of schema {schema}, not 1")
    if not same:
        raise UserError(f"{path}: its content does not match its digest: it was edited or damaged; restore it")
    return {"id": stated, **data}


def migrated(old: list[dict[str, Any]], older: Collection[str] = ()) -> list[Record]:
    """Each record of schema 1 (as :func:`read_old` gives them) in schema 2, in their order.

    Args:
        older: cells (``suite/setting method``) that today's code does not give again: their records stay below the board, as of a
            version before the first of their kind of problem.

    Raises:
        UserError: a card in one of them does not fit this version, or a cell has no record.
    """
    news = []
    for data in old:
        try:
            news.append(_translated(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"record {data['id'][:16]}: not a whole record of schema 1 (missing or odd {error})") from error
    cells = {f"{r.track} {r.slug}" for r in news}
    for cell in older:
        if cell not in cells:
            raise unknown("cell", cell, cells)
    news = [_before_the_first(r) if f"{r.track} {r.slug}" in older else r for r in news]
    suites = _told_apart(
        [(identities.arena_of(r.identity), d["spec"]["suite"]["source"], r.created) for r, d in zip(news, old, strict=True)]
    )
    news = [_marked(r, "suite", loose) for r, loose in zip(news, suites, strict=True)]
    entries = [
        ([identities.arena_of(r.identity), r.identity["method"]], d["spec"]["method"]["source"], r.created)
        for r, d in zip(news, old, strict=True)
    ]
    return [_marked(r, "method", loose) for r, loose in zip(news, _told_apart(entries), strict=True)]


def _told_apart(found: list[tuple[Any, str, str]]) -> list[str | None]:
    """For each (what it becomes, its old digest, when): None for the newest digest of what it becomes, the digest itself for others."""
    newest: dict[bytes, tuple[str, str]] = defaultdict(lambda: ("", ""))
    for content, digest, created in found:
        newest[canonical(content)] = max(newest[canonical(content)], (created, digest))
    return [None if newest[canonical(content)][1] == digest else digest for content, digest, _ in found]


def _marked(record: Record, part: str, loose: str | None) -> Record:
    if loose is None:
        return record
    return dataclasses.replace(record, identity={**record.identity, part: {**record.identity[part], "loose": loose}})


def _before_the_first(record: Record) -> Record:
    return dataclasses.replace(record, identity={**record.identity, "kind": {**record.identity["kind"], "version": KIND - 1}})


def _translated(data: Mapping[str, Any]) -> Record:
    spec = data["spec"]
    method, suite = from_data(spec["method"]["card"]), from_data(spec["suite"]["card"])
    if not isinstance(method, Card) or not isinstance(suite, SuiteCard):
        raise UserError(f"record {data['id'][:16]}: its cards are no cards of a method and a suite")
    dirty = data["environment"].get("dirty") is not False
    arena = identities.arena(
        suite,
        digests={role: digest for role, digest in spec["digests"].items() if digest is not None},
        precision=data["environment"].get("precision") or suite.settings[spec["setting"]].training.precision,
        split=spec["split"],
        distribution=_distribution("suite", suite.slug),
        kind=KIND,
        loose=spec["suite"]["source"] if dirty else None,
    )
    arena["engine"] = spec["engine"]
    distribution = _distribution("method", f"{method.problem}/{method.slug}")
    loose = spec["method"]["source"] if dirty or distribution is None else None
    part = identities.method_part(method, spec["method"]["hyperparameters"], distribution=distribution, loose=loose)
    sources = {"suite": spec["suite"]["source"], "method": spec["method"]["source"]}
    fields = ("status", "reason", "cost", "student", "environment", "created", "trace", "picture")
    return Record(
        identity={**arena, "method": part, "seed": spec["seed"], "seeds": spec["seeds"]},
        setting_name=spec["setting"],
        cards={"method": spec["method"]["card"], "suite": spec["suite"]["card"]},
        code={"digest": None, "fingerprint": None, "loose": {}},
        measurements=tuple(_measurement(m) for m in data["measurements"]),
        before={"schema": 1, "id": data["id"], "sources": sources},
        **{name: data[name] for name in fields if name in data},
    )


def _measurement(m: Mapping[str, Any]) -> Measurement:
    values = m["per_example"]
    return Measurement(m["metric"], m["value"], m["n"], None if values is None else pack(values))


def _distribution(kind: registry.Kind, key: str) -> str | None:
    found = (registry.methods() if kind == "method" else registry.suites()).get(key)
    return found.distribution if found else None


def migrate(folder: Path, older: Collection[str] = ()) -> list[tuple[Path, str, str]]:
    """Bring every record of schema 1 below ``folder`` to schema 2, in place: (new file, old id, new id) of each; ``older`` as above.

    A new file is written beside the old one before that is removed, so a kill loses nothing, and the same command goes on.

    Raises:
        UserError: there is no such folder, or a file in it that says it is a record of schema 1 is damaged: nothing is changed then.
        SaveError: something cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of records")
    root = folder / "records" if (folder / "store.json").is_file() else folder
    paths = [p for p in sorted(root.rglob("*.json")) if p.name != "store.json" and p.is_file() and b'"schema": 1' in text(p)]
    old = [read_old(path) for path in paths]
    done = []
    for path, data, record in zip(paths, old, migrated(old, older), strict=True):
        # where the old file stood three folders below the root, the new one stands in the same place
        target = root / file_name(record) if len(path.relative_to(root).parts) == 4 else path.with_name(file_name(record).name)
        write_atomic(target, record.to_bytes())
        path.unlink()
        done.append((target, data["id"], record.id))
    if root != folder and not list(root.rglob("*.json")):
        write_atomic(folder / "store.json", b'{"schema": 2}\n')
    return done
