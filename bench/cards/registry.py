"""Finds methods and suites by folder; nothing is registered by hand and nothing is imported to list them.

Packages name a folder through the entry-point groups ``distillbench.methods`` and ``distillbench.suites``; ours are
found the same way as other people's. A method is ``<folder>/<problem>/<slug>.py``; a suite is ``<folder>/<slug>/``.
A method's slug is unique within its problem. Where only one problem has a slug, the slug alone names the method; ``problem/slug``
always does. A suite runs the methods of its own kind of problem and of the kinds that its card accepts: of two with one slug the former.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Literal

from distillbench import code
from distillbench.cards.card import Card, SuiteCard
from distillbench.cards.reading import read_card
from distillbench.errors import UserError, unknown
from distillbench.identity import sha256

Kind = Literal["method", "suite"]


@dataclass(frozen=True)
class Entry:
    """Something found: its card, or the reason why it cannot be used.

    Attributes:
        module: the importable name, or None for a loose file.
        distribution: the installed package that brings it, or None for a loose file.
        error: why the card cannot be read; such an entry is listed, and everything else still works.
    """

    kind: Kind
    slug: str
    path: Path
    module: str | None
    card: Card | SuiteCard | None = None
    error: str | None = None
    distribution: str | None = None

    @property
    def key(self) -> str:
        """What names it among all of its kind: ``problem/slug`` for a method, the slug for a suite."""
        if self.kind == "suite":
            return self.slug
        return f"{self.card.problem if self.card else self.path.parent.name.replace('_', '-')}/{self.slug}"

    def modules(self) -> dict[str, Path]:
        """The modules that define it, by name: the method's; of a suite every module of its package. A loose file goes by its stem."""
        if self.kind == "method" or self.module is None:
            return {self.module or self.path.stem: self.path}
        folder = self.path.parent
        named = ((p, ".".join([self.module, *p.relative_to(folder).with_suffix("").parts])) for p in folder.rglob("*.py"))
        return {name.removesuffix(".__init__"): path for path, name in sorted(named)}

    @property
    def oracle(self) -> Path | None:
        """The file of a method's independent test oracle: tests/oracles/<problem>/<slug>.py of its project, or <slug>_oracle.py beside it.

        None where there is none: its values and gradients are then unproven.
        """
        places = [self.path.with_name(f"{self.path.stem}_oracle.py")]
        if len(self.path.parents) > 2:
            places.insert(0, self.path.parents[2] / "tests" / "oracles" / self.path.parent.name / f"{self.path.stem}.py")
        return next((place for place in places if place.is_file()), None)

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


def _read(kind: Kind, path: Path, slug: str, module: str | None, distribution: str | None = None) -> Entry:
    try:
        card = read_card(path)
        wanted = Card if kind == "method" else SuiteCard
        if not isinstance(card, wanted):
            raise UserError(f"{path}: expected a {wanted.__name__}")
        if card.slug != slug:
            raise UserError(f"{path}: the card says slug {card.slug!r}, the file's name says {slug!r}")
        return Entry(kind, slug, path, module, card, distribution=distribution)
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


@functools.cache  # every plan and every judge asks; what is installed stays so while a process runs, and :func:`refresh` forgets
def _found(kind: Kind) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for point in sorted(entry_points(group=f"distillbench.{kind}s"), key=lambda p: p.name):
        folder = _folder(point)
        if folder is None:
            found[point.name] = Entry(kind, point.name, Path(point.value), None, error=f"the package {point.value!r} is not there")
            continue
        for path, slug, tail in _candidates(kind, folder):
            entry = _read(kind, path, slug, f"{point.value}.{tail}", point.dist.name if point.dist else None)
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
    code.forget()


def find(kind: Kind, name: str, *kinds: str) -> Entry:
    """The method or suite called ``name``; a method may also be named by ``problem/slug`` or by the path of its file.

    Args:
        kinds: where several problems have a method of this slug, that of the first of these problems is meant.

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
        meant = [fitting[key] for k in kinds if (key := f"{k}/{name}") in fitting]
        chosen = meant[0] if meant else next(iter(fitting.values())) if len(fitting) == 1 else None
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
