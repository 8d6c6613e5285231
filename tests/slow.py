"""Which slow tests have to run: those that rest on something that is not what it was when they last passed.

A test rests on its module, the conftests around it, every module of ours that these import, the cards among them, the methods and
suites that it is about, and the files beside and named. Not on time stamps, prose or comments; not on installed libraries either.
``passed.txt`` has a line for each slow test that passed: a digest of all that, and the test's name. Lines of merged branches stand
beside each other: a test that has several is known to pass in several states.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distillbench import code
from distillbench.cards import registry
from distillbench.cards.card import Card
from distillbench.cards.reading import to_data
from distillbench.identity import canonical, sha256

ROOT = Path(__file__).parents[1]
PASSED = ROOT / "tests" / "passed.txt"
PACKAGES = {"bench": "distillbench", **{room: f"distillbench.{room}" for room in ("methods", "suites", "leaderboard")}}


def name_of(path: Path) -> str:
    """The dotted name of a module of the repository, or the stem of one elsewhere."""
    if not path.is_relative_to(ROOT):
        return path.stem
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES.get(first, first), *rest]).removesuffix(".__init__")


@functools.cache
def _closure(path: Path) -> Mapping[str, Path]:
    return code.closure({name_of(path): path})


@functools.cache
def _named(path: Path) -> tuple[frozenset[Path], frozenset[str], frozenset[Path]]:
    """What a test's text names in strings: modules, methods and suites (their keys), golden files.

    ``"-m", "distillbench"``, ``"image-classification/blobs"`` and a method's slug count; ``scratch`` and ``teacher``, which every
    problem has, come with the suites.
    """
    text = path.read_text(encoding="utf-8")
    dotted = {tuple(found.split(".")) for found in re.findall(r"\bdistillbench(?:\.\w+)+", text)}
    prefixes = {".".join(parts[:end]) for parts in dotted for end in range(2, len(parts) + 1)}
    modules = {file for name in prefixes if (file := code.source(name)) is not None}
    if re.search(r'"-m",\s*"distillbench"', text):
        modules.add(ROOT / "bench" / "__main__.py")
    words = set(re.findall(r"""["'](\w[\w-]*(?:/[\w-]+)?)""", text))
    words |= {word.partition("/")[0] for word in words}
    slugs = [entry.slug for entry in registry.methods().values()]
    methods = {e.key for e in registry.methods().values() if e.key in words or (e.slug in words and slugs.count(e.slug) == 1)}
    goldens = {file for file in (ROOT / "tests" / "goldens").iterdir() if file.name in text}
    return frozenset(modules), frozenset(methods | (registry.suites().keys() & words)), frozenset(goldens)


@functools.cache
def _entries() -> Mapping[str, registry.Entry]:
    return {**registry.methods(), **registry.suites()}


def _about(key: str) -> set[Path]:
    """The modules that a method or suite brings: its own; a method's oracle; a suite's worlds, which it imports by name."""
    entry = _entries()[key]
    oracle = ROOT / "tests" / "oracles" / entry.path.parent.name / entry.path.name
    own = {entry.path, *([oracle] if entry.kind == "method" and oracle.is_file() else [])}
    return own if entry.kind == "method" else {*own, *entry.path.parent.rglob("*.py")}


def _widened(keys: Iterable[str]) -> set[str]:
    """``keys`` with the suites that checks train a method on, and with the controls that runs on a suite take along."""
    found = set(keys)
    cards = [card for key in found if (card := _entries()[key].card) is not None]
    problems = {kind for card in cards for kind in ([card.problem] if isinstance(card, Card) else card.kinds)}
    for key, entry in _entries().items():
        if entry.card is None or entry.card.problem not in problems:
            continue
        if entry.card.control if isinstance(entry.card, Card) else any(s.tier == "analytic" for s in entry.card.settings.values()):
            found.add(key)
    return found


def digest(test: Path, parameters: Iterable[Any] = ()) -> str:
    """Of all that the tests of a module, or one with these parameters, rest on."""
    below = [folder for folder in test.parents if folder.is_relative_to(ROOT / "tests")][:-1]  # the uppermost only chooses tests
    files = {test, *(folder / "conftest.py" for folder in below if (folder / "conftest.py").is_file())}
    files |= {path for file in [*files] for name, path in _closure(file).items() if name.partition(".")[0] == "tests"}
    named = [_named(file) for file in sorted(files)]
    modules = {name: path for file in {*files, *(m for n in named for m in n[0])} for name, path in _closure(file).items()}
    keys = {key for n in named for key in n[1]} | {p.key for p in parameters if isinstance(p, registry.Entry) and p.key in _entries()}
    keys |= {key for key, entry in _entries().items() if entry.path in modules.values()}
    keys = _widened(keys)
    for path in {path for key in keys for path in _about(key)}:
        modules |= _closure(path)
    for package in {path.parent for path in test.parent.glob("*/*.dist-info")}:  # what the test installs as somebody else's
        modules |= {name: path for file in package.rglob("*.py") for name, path in _closure(file).items()}
    data = {file for n in named for file in n[2]}
    data |= {file for folder in {path.parent for path in modules.values()} for file in _beside(folder)}
    said = [[key, _card(key)] for key in sorted(keys)] + [[file.name, _bytes(file)] for file in sorted(data)]
    return sha256(canonical([code.syntax_digest(modules), said]))[:16]


@functools.cache
def _card(key: str) -> str:
    return sha256(canonical(to_data(_entries()[key].card)))


@functools.cache
def _bytes(file: Path) -> str:
    return sha256(file.read_bytes())


@functools.cache
def _beside(folder: Path) -> frozenset[Path]:
    """The files of a package that are no modules: templates, weights."""
    rooms = [ROOT / room for room in PACKAGES]
    found = folder.iterdir() if any(folder.is_relative_to(room) for room in rooms) else ()
    return frozenset(f for f in found if f.is_file() and f.suffix not in (".py", ".pyc"))


def passed() -> set[tuple[str, str]]:
    """(digest, test) of every slow test that is known to pass."""
    lines = PASSED.read_text(encoding="utf-8").splitlines() if PASSED.exists() else []
    return {(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if " " in line}


def remember(tests: Mapping[str, str]) -> None:
    """Write down which slow tests (name -> digest) have passed, and nothing else."""
    PASSED.write_text("".join(f"{tests[name]} {name}\n" for name in sorted(tests)), encoding="utf-8")
