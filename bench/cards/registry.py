"""Finds methods and suites by folder; nothing is registered by hand and nothing is imported to list them.

Packages name a folder through the entry-point groups ``distillbench.methods`` and ``distillbench.suites``; ours are
found the same way as other people's. A method is ``<folder>/<problem>/<slug>.py``; a suite is ``<folder>/<slug>/``.
A method's slug is unique within its problem: every problem has its own ``scratch`` and ``teacher``. Where only one problem
has a slug, the slug alone names the method; ``problem/slug`` always does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Literal

from distillbench.cards.card import Card, SuiteCard
from distillbench.cards.reading import read_card
from distillbench.errors import UserError, unknown
from distillbench.identity import canonical, sha256

Kind = Literal["method", "suite"]


def _imported(file: Path, root: Path) -> list[Path]:
    """The modules of the package at ``root`` (``suites``) that ``file`` imports with ``from <root>.a.b import ...``."""
    names = re.findall(rf"^\s*from (?:distillbench\.)?{root.name}\.([\w.]+) import", file.read_text(encoding="utf-8"), re.MULTILINE)
    places = [root.joinpath(*name.split(".")).with_suffix(".py") for name in sorted(set(names))]
    return [p for p in places if p.is_file()]


@dataclass(frozen=True)
class Entry:
    """Something found: its card, or the reason why it cannot be used.

    Attributes:
        module: the importable name, or None for a loose file.
        error: why the card cannot be read; such an entry is listed, and everything else still works.
    """

    kind: Kind
    slug: str
    path: Path
    module: str | None
    card: Card | SuiteCard | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        """What names it among all of its kind: ``problem/slug`` for a method, the slug for a suite."""
        if self.kind == "suite":
            return self.slug
        return f"{self.card.problem if self.card else self.path.parent.name.replace('_', '-')}/{self.slug}"

    def sources(self) -> list[Path]:
        """The files that define it: the method's file; of a suite every module, what suites share, and what it imports from others."""
        if self.path.name != "__init__.py":
            return [self.path]
        own = sorted(self.path.parent.rglob("*.py"))
        shared = sorted((self.path.parent.parent / "metrics").glob("*.py"))
        found = [*own, *shared]
        for file in found:  # grows while it is read: what is imported may import more
            found += [p for p in _imported(file, self.path.parent.parent) if p not in found]
        return found

    def source_digest(self) -> str:
        """SHA-256 over the names and bytes of :meth:`sources` (line ends normalised)."""
        root = self.path.parent
        listing = {}
        for file in self.sources():
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else f"../{file.parent.name}/{file.name}"
            listing[name] = sha256(file.read_bytes().replace(b"\r\n", b"\n"))
        return sha256(canonical(listing))

    def load(self) -> ModuleType:
        """The imported module. Raises UserError with the reason where the import fails."""
        if self.error:
            raise UserError(f"{self.kind} {self.slug}: {self.error}")
        try:
            if self.module is not None:
                return importlib.import_module(self.module)
            name = f"distillbench_file_{sha256(str(self.path.resolve()).encode())[:12]}_{self.path.stem}"
            spec = importlib.util.spec_from_file_location(name, self.path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            hint = ""
            if isinstance(error, ModuleNotFoundError):
                hint = "; install what it needs: pip install 'distillbench[train]' or see 'distillbench doctor'"
            raise UserError(f"{self.kind} {self.slug} fails to import: {type(error).__name__}: {error}{hint}") from error


def _folder(point: EntryPoint) -> Path | None:
    """The folder of the package an entry point names; finding a top-level package imports nothing."""
    try:
        spec = importlib.util.find_spec(point.value)
    except Exception:  # a dotted name imports its parents, which may fail in any way
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _read(kind: Kind, path: Path, slug: str, module: str | None) -> Entry:
    try:
        card = read_card(path)
        wanted = Card if kind == "method" else SuiteCard
        if not isinstance(card, wanted):
            raise UserError(f"{path}: expected a {wanted.__name__}")
        if card.slug != slug:
            raise UserError(f"{path}: the card says slug {card.slug!r}, the file's name says {slug!r}")
        return Entry(kind, slug, path, module, card)
    except UserError as error:
        return Entry(kind, slug, path, module, None, str(error))


def _candidates(kind: Kind, folder: Path) -> Iterable[tuple[Path, str, str]]:
    if kind == "method":
        for path in sorted(folder.glob("*/*.py")):
            if not path.name.startswith("_"):
                yield path, path.stem, f"{path.parent.name}.{path.stem}"
    else:
        for path in sorted(folder.glob("*/__init__.py")):
            if "CARD" in path.read_text(encoding="utf-8", errors="replace"):
                yield path, path.parent.name.replace("_", "-"), path.parent.name


@functools.cache
def _found(kind: Kind) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for point in sorted(entry_points(group=f"distillbench.{kind}s"), key=lambda p: p.name):
        folder = _folder(point)
        if folder is None:
            found[point.name] = Entry(kind, point.name, Path(point.value), None, error=f"the package {point.value!r} is not there")
            continue
        for path, slug, tail in _candidates(kind, folder):
            entry = _read(kind, path, slug, f"{point.value}.{tail}")
            key, other = entry.key, found.get(entry.key)
            if other is not None and other.path != path:
                entry = Entry(kind, slug, path, None, error=f"two {kind}s are called {key!r}: {other.path} and {path}; rename one")
            found[key] = entry
    return found


def methods() -> dict[str, Entry]:
    """Every method found, by ``problem/slug``, the broken ones included."""
    return dict(_found("method"))


def suites() -> dict[str, Entry]:
    """Every suite found, by slug, the broken ones included."""
    return dict(_found("suite"))


def refresh() -> None:
    """Forget what was found (tests that drop files in call this)."""
    _found.cache_clear()


def find(kind: Kind, name: str, problem: str | None = None) -> Entry:
    """The method or suite called ``name``; a method may also be named by ``problem/slug`` or by the path of its file.

    Args:
        problem: where several problems have a method of this slug, the one of this problem is meant.

    Raises:
        UserError: unknown (with the nearest name), ambiguous, or found but broken (with the reason).
    """
    if kind == "method" and name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file; a method is a slug ('distillbench list methods') or a Python file")
        inside = next((e for e in _found("method").values() if e.path.resolve() == path.resolve()), None)
        entry = inside or _read("method", path.resolve(), path.stem, None)
    else:
        known = _found(kind)
        fitting = {key: e for key, e in known.items() if name in (key, e.slug)}
        chosen = fitting.get(f"{problem}/{name}") or (next(iter(fitting.values())) if len(fitting) == 1 else None)
        if chosen is None and fitting:
            raise UserError(f"several problems have a {kind} called {name!r}: say {' or '.join(sorted(fitting))}")
        if chosen is None:
            raise unknown(kind, name, {e.slug for e in known.values()}, f"('distillbench list {kind}s' shows them)")
        entry = chosen
    if entry.error:
        raise UserError(f"{kind} {entry.slug}: {entry.error}")
    return entry


def method_card(entry: Entry) -> Card:
    """The entry's card, typed. Raises UserError where it has none."""
    if not isinstance(entry.card, Card):
        raise UserError(f"method {entry.slug}: {entry.error or 'has no card'}")
    return entry.card


def suite_card(entry: Entry) -> SuiteCard:
    """The entry's card, typed. Raises UserError where it has none."""
    if not isinstance(entry.card, SuiteCard):
        raise UserError(f"suite {entry.slug}: {entry.error or 'has no card'}")
    return entry.card
