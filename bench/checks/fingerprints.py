"""Fingerprints hold versions to their word: numbers of every method and setting that are committed, and computed anew by the tests.

What moved although no version rose fails by name: ``results of dkd moved (first at update 3), raise its version ...``. The numbers are
made in float64 on one thread (:mod:`.fingerprint_values`) and compared with a relative tolerance of 1e-6 (:mod:`.checksums`), never as
hashes of floats. They stand beside what they are of, ``methods/fingerprints/<problem>/<slug>.json`` and
``suites/fingerprints/<suite>.json``, in any package that brings methods or suites.

``python -m distillbench.checks.fingerprints [NAME ...]`` writes them: of all, or of methods, suites and ``suite/setting`` by name.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.checks.checksums import agree, close, same_sums
from distillbench.checks.core import analytic_tracks
from distillbench.checks.fingerprint_values import DEFAULT, Values, never, of_method, of_setting, offline, others, traced
from distillbench.errors import UserError, unknown
from distillbench.files import write_atomic
from distillbench.identity import ENGINE
from distillbench.runs.code_of import fingerprint_file
from distillbench.runs.identities import kind_version
from distillbench.runs.plan import RunSpec

Versions = dict[str, int]


# --- where they lie -----------------------------------------------------------------------------------------------------


def read(entry: registry.Entry) -> dict[str, Any]:
    """What is committed about a method, or about a suite's settings by name; empty where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    path = fingerprint_file(entry)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no fingerprint: {error}; restore it (git checkout)") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no fingerprint; restore it (git checkout)")
    return found


def _text(data: Any, depth: int, indent: str = "") -> str:
    """JSON with a line for each entry down to ``depth``, so that a change shows as the lines it is about."""
    if not depth or not isinstance(data, dict) or not data:
        return json.dumps(data, ensure_ascii=False)
    inner = ",\n".join(f"{indent} {json.dumps(k, ensure_ascii=False)}: {_text(v, depth - 1, indent + ' ')}" for k, v in data.items())
    return f"{{\n{inner}\n{indent}}}"


def save(path: Path, data: dict[str, Any], depth: int) -> None:
    """Write ``data`` whole or not at all, a line for each entry down to ``depth``."""
    write_atomic(path, (_text(data, depth) + "\n").encode())


# --- what they are compared with ------------------------------------------------------------------------------------------


def method_versions(entry: registry.Entry) -> Versions:
    """The versions that a method's numbers belong to: its own, its kind's, that of the suite it was trained on, and the engine's."""
    card = registry.method_card(entry)
    found = {"method": card.version, "kind": kind_version(card.problem) or 0, "engine": ENGINE}
    tracks = analytic_tracks(card.problem)
    return found | ({"suite": registry.suite_card(tracks[0][0]).version} if tracks else {})


def setting_versions(entry: registry.Entry) -> Versions:
    """The versions that the numbers of a suite's settings belong to: its own, its kind's and the engine's."""
    card = registry.suite_card(entry)
    return {"suite": card.version, "kind": kind_version(card.problem) or 0, "engine": ENGINE}


def moved_method(kept: Values, now: Values) -> str | None:
    """Where the runs of a method first differ: ``first at update 3``, also ``... with divergence=js``. None where they agree."""
    for name in (n for n in kept if n in now):
        where = _moved_run(kept[name], now[name])
        if where is not None:
            return where if name == DEFAULT else f"{where} with {name}"
    return None


def _moved_run(kept: Values, now: Values) -> str | None:
    if "refused" in kept or "refused" in now:
        return None if kept == now else "refused before or now"
    for update, (old, new) in enumerate(itertools.zip_longest(kept["terms"], now["terms"]), 1):
        # A term may be what rounding leaves of large ones: then only the others say how much it may be off.
        if old is None or new is None or len(old) != len(new):
            return f"first at update {update}"
        scale = 1e-3 * max(map(abs, old), default=0.0)
        gradients = kept["gradients"][update - 1], now["gradients"][update - 1]
        if not all(close(a, b, scale) for a, b in zip(old, new, strict=True)) or not same_sums(*gradients):
            return f"first at update {update}"
    trained = len(kept["trained"]) == len(now["trained"])
    if not trained or not all(itertools.starmap(same_sums, zip(kept["trained"], now["trained"], strict=True))):
        return "in the weights at the end"
    return None if agree(kept["student"], now["student"]) else "in the exported student"


def moved_setting(kept: Values, now: Values) -> list[str]:
    """What of a setting differs: ``teacher's answers``, ``top1 of the initial student``. Empty where all agrees."""
    return [what for what in kept if not agree({what: kept[what]}, now)]


def _name(entry: registry.Entry) -> str:
    """A method's slug where only one problem has it."""
    return entry.slug if sum(e.slug == entry.slug for e in registry.methods().values()) < 2 else entry.key


def _stale(name: str, kept: Versions, today: Versions) -> str | None:
    for part in today:
        if kept.get(part) != today[part]:
            return f"the fingerprint of {name} is of {part} version {kept.get(part)}, now {today[part]}: make fingerprints writes it anew"
    return None


def verify_method(entry: registry.Entry) -> str | None:
    """None where today's code gives the committed numbers of a method, else the one line that says what moved or is missing."""
    name = _name(entry)
    try:
        kept = read(entry)
        if not kept:
            return f"{name} has no fingerprint: make fingerprints writes it"
        stale = _stale(name, kept["versions"], method_versions(entry))
        if stale is not None:
            return stale
        missing = [run for run in others(registry.method_card(entry)) if run not in kept["runs"]]
        if missing:
            return f"the fingerprint of {name} has no run with {missing[0]}: make fingerprints writes it anew"
        where = moved_method(kept["runs"], of_method(entry))
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a changed method raises
        return f"results of {name} moved (it fails: {type(error).__name__}: {' '.join(str(error).split())})"
    return None if where is None else f"results of {name} moved ({where}), raise its version and name it in the changelog"


def verify_setting(entry: registry.Entry, setting: str) -> str | None:
    """None where today's code gives the committed numbers of a setting, else the one line that says what moved or is missing."""
    name = f"{entry.slug}/{setting}"
    try:
        kept = read(entry).get(setting)
        if kept is None:
            return f"{name} has no fingerprint: make fingerprints writes it"
        stale = _stale(name, kept["versions"], setting_versions(entry))
        if stale is not None:
            return stale
        what = moved_setting(kept["values"], of_setting(entry, setting))
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a changed suite raises
        return f"results of {name} moved (it fails: {type(error).__name__}: {' '.join(str(error).split())})"
    return line_of_setting(entry.slug, setting, what) if what else None


def line_of_setting(suite: str, setting: str, what: list[str]) -> str:
    """The one line that says what of a setting moved."""
    more = f" (and {len(what) - 1} more)" if len(what) > 1 else ""
    return f"{what[0]} of {suite}/{setting}{more} moved, raise the version of {suite} and name it in the changelog"


@functools.cache
def _vouched(method: str, suite: str, setting: str, code: str) -> str | None:
    judge = registry.find("suite", suite)
    return verify_method(registry.find("method", method, *registry.suite_card(judge).kinds)) or verify_setting(judge, setting)


def vouch(spec: RunSpec) -> str | None:
    """Whether what today's code would make of a run is what the committed fingerprints say: None, or the one line that says what moved.

    Computed once for the code of a method and a setting (about a second).
    """
    return _vouched(spec.method, spec.suite, spec.setting, spec.code.digest)


# --- writing --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one method or setting.

    Attributes:
        key: ``problem/slug`` or ``suite/setting``.  kept: the versions of its file before, empty where there was none.
        moved: what differs from the file, or None.  said: what is printed of it.  line: why the file was left as it is, or None.
    """

    entry: registry.Entry
    key: str
    problem: str
    kept: Versions
    today: Versions
    moved: str | None
    said: str
    line: str | None = None
    seconds: float = 0.0


def write_method(entry: registry.Entry, force: bool = False) -> tuple[Outcome, list[str]]:
    """Compute a method's fingerprint and write it, unless its numbers moved and no version did. Also the lines never executed.

    Raises:
        UserError: it cannot be computed.
    """
    kept, today, start = read(entry), method_versions(entry), time.perf_counter()
    with traced(entry.path) as seen:
        runs = of_method(entry)
    unseen = never(entry.path, seen)
    before = kept.get("versions", {})
    moved = moved_method(kept["runs"], runs) if kept else None
    done = Outcome(entry, entry.key, registry.method_card(entry).problem, before, today, moved, _said(before, today, moved))
    if moved and before == today and not force:
        done.line = f"results of {_name(entry)} moved ({moved}), raise its version and name it in the changelog"
    else:
        same = kept and not moved and list(kept["runs"]) == list(runs)
        save(fingerprint_file(entry), {"versions": today, "runs": kept["runs"] if same else runs, "never executed": unseen}, 2)
    done.seconds = time.perf_counter() - start
    return done, unseen


def write_setting(entry: registry.Entry, setting: str, force: bool = False) -> Outcome:
    """Compute a setting's fingerprint and write it, unless its numbers moved and no version did.

    Raises:
        UserError: the setting cannot be loaded here.
    """
    whole, today, start = read(entry), setting_versions(entry), time.perf_counter()
    kept = whole.get(setting, {})
    values = of_setting(entry, setting)
    before = kept.get("versions", {})
    what = moved_setting(kept["values"], values) if kept else []
    moved = ", ".join(what) or None
    done = Outcome(entry, f"{entry.slug}/{setting}", registry.suite_card(entry).problem, before, today, moved, _said(before, today, moved))
    if moved and before == today and not force:
        done.line = line_of_setting(entry.slug, setting, what)
    else:
        same = kept and not moved and set(kept["values"]) == set(values)
        whole[setting] = {"versions": today, "values": kept["values"] if same else values}
        known = registry.suite_card(entry).settings
        save(fingerprint_file(entry), {k: whole[k] for k in known if k in whole}, 3)
    done.seconds = time.perf_counter() - start
    return done


def _said(before: Versions, today: Versions, moved: str | None) -> str:
    if not before:
        return "new"
    risen = ", ".join(f"{part} {before.get(part)} -> {v}" for part, v in today.items() if before.get(part) != v)
    return "; ".join(x for x in (risen, "moved" if moved else "the same") if x)


# --- wider versions ---------------------------------------------------------------------------------------------------------


def joined_path() -> Path | None:
    """The table of what a wider version left as it was, which the board reads; None where the board is not installed."""
    spec = importlib.util.find_spec("distillbench.leaderboard")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) / "joined.json" if places else None


def joined(methods: Sequence[Outcome], settings: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What stays comparable although the version of the engine, of a kind or of a suite rose, as entries of the table.

    A cell is a method on a track, ``suite/setting problem/slug``. It stays where neither the method's nor the setting's numbers moved
    and the method's own version is the same.
    """
    found: dict[tuple[str, str | None, int, int], list[str]] = {}
    pairs = itertools.product((s for s in settings if s.kept and not s.moved), (m for m in methods if m.kept and not m.moved))
    for setting, method in pairs:
        if setting.problem != method.problem or method.kept["method"] != method.today["method"]:
            continue
        for part, slug in (("engine", None), ("kind", setting.problem), ("suite", setting.entry.slug)):
            old, new = setting.kept[part], setting.today[part]
            if old < new and (part == "suite" or method.kept[part] == old):
                found.setdefault((part, slug, old, new), []).append(f"{setting.key} {method.key}")
    return [{"part": p, "slug": s, "from": a, "to": b, "cells": cells} for (p, s, a, b), cells in found.items()]


def _join(entries: list[dict[str, Any]]) -> None:
    path = joined_path()
    if path is None or not entries:
        return
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    table += [e for e in entries if e not in table]
    write_atomic(path, (json.dumps(table, indent=1) + "\n").encode())
    for e in entries:
        print(f"{path.name}: {len(e['cells'])} cells stay from {e['part']} {e['slug'] or ''} version {e['from']} to {e['to']}")


# --- the command --------------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> tuple[list[registry.Entry], list[tuple[registry.Entry, str]]]:
    """The methods, and the suites with their settings, that ``names`` stand for; everything that runs offline where there are none.

    Raises:
        UserError: a name is no method, suite, setting or problem.
    """
    methods = [e for e in registry.methods().values() if e.card is not None]
    settings = [
        (e, name) for e in registry.suites().values() if e.card for name, s in registry.suite_card(e).settings.items() if offline(s)
    ]
    if not names:
        return methods, settings
    of_methods = [(e, {e.slug, e.key, e.key.partition("/")[0]}) for e in methods]
    of_settings = [((e, name), {e.slug, f"{e.slug}/{name}"}) for e, name in settings]
    known = set().union(*(words for _, words in [*of_methods, *of_settings]))
    for name in names:
        if name not in known:
            raise unknown("method, suite, setting or problem", name, known)
    wanted = set(names)
    return [e for e, words in of_methods if words & wanted], [s for s, words in of_settings if words & wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the fingerprints that are named, or all. Returns 1 where something moved without a version or could not be computed."""
    parser = argparse.ArgumentParser(prog="python -m distillbench.checks.fingerprints", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a method, a suite, suite/setting, or a problem for all its methods")
    parser.add_argument("--force", action="store_true", help="write also what moved without a raised version")
    given = parser.parse_args(arguments)
    lines: list[str] = []
    methods: list[Outcome] = []
    settings: list[Outcome] = []
    try:
        of_methods, of_settings = chosen(given.names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for entry in of_methods:
        try:
            done, unseen = write_method(entry, given.force)
        except UserError as error:
            lines.append(str(error))
            continue
        methods.append(done)
        print(f"{done.seconds:7.2f} s  {done.key}: {done.said}", flush=True)
        for text in unseen:
            print(f"            never executed: {text}")
    for entry, setting in of_settings:
        try:
            done = write_setting(entry, setting, given.force)
        except UserError as error:
            lines.append(str(error))
            continue
        settings.append(done)
        print(f"{done.seconds:7.2f} s  {done.key}: {done.said}", flush=True)
    if given.names and any(o.kept and o.kept.get(p, v) < v for o in (*methods, *settings) for p, v in o.today.items() if p != "method"):
        lines.append("the version of an engine, kind or suite rose: run it without names, so that joined.json gets what stayed")
    elif not given.names:
        _join(joined(methods, settings))
    lines += [o.line for o in (*methods, *settings) if o.line]
    for line in lines:
        print(line, file=sys.stderr)
    if sum(o.line is not None for o in methods) > 1:
        print("where shared code moved them: raise VERSION of the kind of problem, the suite's version or ENGINE instead", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
