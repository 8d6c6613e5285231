"""Which code a result rests on, what it says, and whose word its versions are.

A module is *ours* where its statements matter to a result: the modules of distillbench and of packages that bring methods or suites,
and every loose file. Installed libraries and the standard library end the search; their versions are in a record's environment.
Nothing is imported to find out.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, entry_points, version
from pathlib import Path

from distillbench.errors import UserError
from distillbench.files import SETTINGS
from distillbench.identity import canonical, sha256

ROOT = "distillbench"
INSTALLED = tuple(
    {Path(place).resolve() for place in map(sysconfig.get_paths().get, ("stdlib", "platstdlib", "purelib", "platlib")) if place}
)


# --- finding modules ------------------------------------------------------------------------------------------------


def _spec(name: str) -> ModuleSpec | None:
    """Where the import system would find a module; its parents are looked up, never imported."""
    parent, _, last = name.rpartition(".")
    above = _spec(parent) if parent else None
    if parent and (above is None or above.submodule_search_locations is None):
        return None
    path = list(above.submodule_search_locations or ()) if above else None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        except KeyError:  # a package without __init__ in one that is not imported yet: Python then does not know its folders
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(f) for place in path or () if (f := Path(place) / last).is_dir()]
        except Exception:  # of another package's finder: it finds nothing
            continue
        if spec is not None:
            return spec
    return None


@functools.cache
def _own(name: str) -> Path | None:
    """The file of a module of ours; looked up once, since it does not move while we run."""
    return _file(_spec(name))


def _file(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin).resolve() if spec and spec.origin and spec.origin.endswith(".py") and Path(spec.origin).is_file() else None


def source(name: str) -> Path | None:
    """The file of the module called ``name`` if it is ours, else None."""
    top = name.partition(".")[0]
    if top == ROOT:
        return _own(name)
    if top in sys.stdlib_module_names:
        return None
    path = None if _library(top) else _file(_spec(name))
    return None if path is None or (top not in _plugins() and installed(path)) else path


@functools.cache
def _library(top: str) -> bool:
    """Whether a top-level package is an installed one that brings nothing of ours; looked up once, since most imports are of these."""
    path = _file(_spec(top))
    return path is not None and top not in _plugins() and installed(path)


def installed(path: Path) -> bool:
    """Whether a file came with Python or was put there by an installer, in this environment or in one that it looks into."""
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(path.is_relative_to(place) for place in INSTALLED)


@functools.cache
def _plugins() -> dict[str, Distribution | None]:
    """Top-level package -> distribution, of all that bring methods, suites, studies or commands."""
    groups = (f"distillbench.{kind}" for kind in ("methods", "suites", "studies", "commands"))
    return {point.value.partition(".")[0]: point.dist for group in groups for point in entry_points(group=group)}


# --- what a module imports, and what it says ------------------------------------------------------------------------


def _named(tree: ast.AST, package: list[str]) -> Iterator[tuple[str, str | None]]:
    """(module, name imported from it or None) of every import in the tree, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _named(ast.Module(node.orelse, []), package)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.args[0].value, None
        yield from _named(node, package)


def _statements(node: ast.AST) -> Iterator[str]:
    """The abstract syntax of a tree, without places, docstrings and cards; the same for every version of Python that can parse it."""
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]
    if isinstance(node, ast.Module):
        node.body = [s for s in node.body if not _card(s)]
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in ("type_comment", "kind", "ctx"):
            continue
        yield f" {name}="
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from _statements(item)
            else:
                yield f"{item!r},"
    yield ")"


def _card(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["CARD"]


@functools.lru_cache(maxsize=4096)
def _read(content: bytes, package: tuple[str, ...]) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    """(digest of the abstract syntax, imports) of a module's text. What cannot be parsed counts by its bytes."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return sha256(content), ()
    imports = tuple(dict.fromkeys(_named(tree, list(package))))
    return sha256("".join(_statements(tree)).encode()), imports


def _package(name: str, path: Path) -> tuple[str, ...]:
    return tuple(name.split(".") if path.name == "__init__.py" else name.split(".")[:-1])


def text(path: Path) -> bytes:
    """A file's bytes with one kind of line end. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def closure(modules: Mapping[str, Path]) -> dict[str, Path]:
    """``modules`` (name -> file) and every module of ours that they import, anywhere in their text, directly or through others.

    The packages around a module count too, since they are imported with it; distillbench itself, the door, does not.
    """
    found = dict(modules)
    left = list(found.items())
    while left:
        name, path = left.pop()
        wanted = [(parent, None) for parent in _parents(name)]
        for base, item in [*wanted, *_read(text(path), _package(name, path))[1]]:
            inner = f"{base}.{item}" if item else None
            for candidate in (*_parents(base), base, inner):
                if candidate in (None, "", ROOT) or candidate in found:
                    continue
                file = source(candidate)
                if file is not None:
                    found[candidate] = file
                    left.append((candidate, file))
    return dict(sorted(found.items()))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def syntax_digest(modules: Mapping[str, Path]) -> str:
    """SHA-256 over the abstract syntax of ``modules`` (as :func:`closure` gives them): prose, comments and cards do not count."""
    return sha256(canonical({name: _read(text(path), _package(name, path))[0] for name, path in modules.items()}))


@functools.cache
def digest_of(*names: str) -> str:
    """:func:`syntax_digest` of the importable modules called ``names`` and all they import: part of the key of whatever they compute.

    A module that is not ours (a library's class) counts by its name and the version of its package.
    """
    own = {name: path for name in names if (path := source(name)) is not None}
    return sha256(canonical([syntax_digest(closure(own)), sorted(map(_versioned, set(names) - set(own)))]))


def _versioned(name: str) -> str:
    try:
        return f"{name} {version(name.partition('.')[0])}"
    except PackageNotFoundError:
        return name


# --- whose word versions are ----------------------------------------------------------------------------------------


def unvouched(modules: Mapping[str, Path]) -> dict[str, str]:
    """Module -> SHA-256 of its bytes, for those whose versions are nobody's word.

    A version counts where it is held to by fingerprints: in an installed package whose file is the one its RECORD names, or in a
    repository at a clean commit, and the package ships fingerprints. Loose files, edited files and other packages count by bytes,
    and so do the settings beside them.
    """
    return {name: sha256(text(path)) for name, path in with_settings(modules).items() if not _vouched(name, path)}


def with_settings(modules: Mapping[str, Path]) -> dict[str, Path]:
    """``modules`` and the files of settings beside the packages among them, as ``package/settings.toml``."""
    files = {f"{name}/{SETTINGS}": path.with_name(SETTINGS) for name, path in modules.items() if path.name == "__init__.py"}
    return {**modules, **{name: path for name, path in files.items() if path.is_file()}}


def _vouched(name: str, path: Path) -> bool:
    top = name.partition(".")[0]
    return top in _plugins() and _ships_fingerprints(top) and recoverable(name, path)


def recoverable(name: str, path: Path) -> bool:
    """Whether a module's text can be had again from its package's version or its repository's commit: it is what they say it is."""
    top = name.partition(".")[0]
    recorded = _recorded(top).get(path) if top in _plugins() else None
    return path in _committed(path.parent) if recorded is None else recorded == _sha256_of_record(path)


@functools.cache
def _ships_fingerprints(top: str) -> bool:
    groups = (f"distillbench.{kind}" for kind in ("methods", "suites"))
    named = [point.value for group in groups for point in entry_points(group=group) if point.value.partition(".")[0] == top]
    return any((Path(place) / "fingerprints").is_dir() for n in named if (s := _spec(n)) for place in s.submodule_search_locations or ())


@functools.cache
def _recorded(top: str) -> dict[Path, str]:
    """File -> digest, as the RECORD of an installed distribution has them."""
    distribution = _plugins()[top]
    files = (distribution.files or ()) if distribution is not None else ()
    return {Path(str(f.locate())).resolve(): f.hash.value for f in files if f.hash is not None and f.hash.mode == "sha256"}


def _sha256_of_record(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


@functools.cache
def _committed(folder: Path) -> frozenset[Path]:
    """The modules and settings at and below ``folder``'s repository that are as the last commit has them; none outside a repository."""
    root = next((p for p in (folder, *folder.parents) if (p / ".git").exists()), None)
    if root is None:
        return frozenset()
    return _committed(root) if root != folder else _clean(root)


def _clean(root: Path) -> frozenset[Path]:
    try:
        tracked, changed = (
            subprocess.run(["git", "-C", root, *words, "--", "*.py", f"*{SETTINGS}"], capture_output=True, text=True, check=True).stdout
            for words in (["ls-files", "-z"], ["diff", "--name-only", "-z", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError):
        return frozenset()
    return frozenset((root / name).resolve() for name in {*tracked.split("\0")} - {*changed.split("\0")} - {""})


def unplanned(before: frozenset[str], planned: frozenset[Path]) -> dict[str, Path]:
    """Modules of ours that were imported since ``before`` (names of ``sys.modules``) without being ``planned`` (files).

    What the engine imports for itself does not count: it is the same for every method.
    """
    found = {}
    for name in sys.modules.keys() - before:
        origin = getattr(sys.modules[name], "__file__", None)
        if not isinstance(origin, str) or (name.partition(".")[0] == ROOT and name.split(".")[1:2] not in (["methods"], ["suites"])):
            continue
        path = Path(origin).resolve()
        if path not in planned and (name.partition(".")[0] in _plugins() or not installed(path)):
            found[name] = path
    return found


@contextlib.contextmanager
def hidden(planned: frozenset[Path]) -> Iterator[None]:
    """Inside, loose modules that were imported before and are not ``planned`` are not there: who imports one is seen to import it.

    A process lives long, and what one method imports by right must not be at hand for another one that does so in secret.
    """
    away = {name: sys.modules[name] for name in unplanned(frozenset(), planned) if name != "__main__"}
    for name in away:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(away)


def forget() -> None:
    """Look packages, files and repositories up again (tests that drop files in call this)."""
    for cached in (_own, _plugins, digest_of, _ships_fingerprints, _recorded, _committed):
        cached.cache_clear()
