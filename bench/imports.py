"""What a method may not import: suites and what judges, packages that carry data, and modules whose names nobody can read.

A method learns from its problem alone. This reads the source, in functions too, and imports nothing. It is a list of what is refused and
not of what is allowed, because authors use libraries that nobody here has heard of; what hides from it is watched for at run time.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from distillbench.code import ROOT, closure, source, text
from distillbench.errors import UserError

OURS = ("cards", "training", "problems", "methods", "errors", "identity", "stats", "version")  # of distillbench, what a method may use
FOLDERS = ("bench", "suites", "leaderboard", "tests", "benchmarks")  # of our repository, which are importable from its root
DATA = frozenset(
    [
        "datasets",
        "tensorflow_datasets",
        "torchtext",
        "torchaudio",
        "torchdata",
        "webdataset",
        "deeplake",
        "fiftyone",
        "kaggle",
        "kagglehub",
        "openml",
        "pmlb",
        "ucimlrepo",
        "ogb",
        "medmnist",
        "mnist",
        "vega_datasets",
        "nltk",
        "seaborn",
        "huggingface_hub",
        "modelscope",
        "gdown",
        "wget",
        "requests",
        "httpx",
        "aiohttp",
        "urllib",
        "http",
        "ftplib",
        "socket",
    ]
)
PLACES = ("datasets", "dataset")  # modules of libraries that are called so carry data
INSIDE = ("skimage.data", "scipy.misc", "timm.data", "torch.hub", "torch.utils.model_zoo", "importlib.resources", "pkgutil")
LIBRARIES = (ROOT, "sklearn", "scipy", "torchvision", "keras", "tensorflow", "statsmodels", "skimage", "timm")
HIDES = ("__import__", "import_module")
CALLS = ("import_module", "__import__", "find_spec", "run_module", "run_path", "spec_from_file_location", "load_module")


def refused(path: Path, name: str | None = None) -> list[str]:
    """One line for each import in a method's file, or in the loose modules that it imports, that a method may not make.

    Args:
        path: of the method.  name: the importable name of its module, or None for a loose file.

    Raises:
        UserError: a file cannot be read.
    """
    package = (name or "").split(".")[0]
    found = []
    for module, file in closure({name or path.stem: path}).items():
        if file == path or module.partition(".")[0] not in (ROOT, package):
            where = "" if file == path else f"{file.name} "
            found += [f"{where}line {line} {why}" for line, why in _in(file, module)]
    return list(dict.fromkeys(found))


def watch(files: Collection[str]) -> None:
    """From now on whoever of ``files`` imports what a method may not raises UserError, whatever the name is computed from."""
    statement, function = builtins.__import__, importlib.import_module

    def judge(importer: Mapping[str, object], names: Sequence[str], base: str = "") -> None:
        if importer.get("__file__") in files:
            for why in (why for name in names for why in _judged(name, base)):
                raise UserError(f"it {why}")

    def by_statement(name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0) -> ModuleType:
        if not level:
            judge(
                sys._getframe(1).f_globals if globals is None else globals,
                [f"{name}.{x}" for x in fromlist] if fromlist else [name],
                name if fromlist else "",
            )
        return statement(name, globals, locals, fromlist or (), level)

    def by_function(name: str, package: str | None = None) -> ModuleType:
        judge(sys._getframe(1).f_globals, [name])
        return function(name, package)

    builtins.__import__, importlib.import_module = by_statement, by_function


def _in(file: Path, module: str) -> list[tuple[int, str]]:
    try:
        tree = ast.parse(text(file))
    except (SyntaxError, ValueError, RecursionError):
        return []  # who runs it says so
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]
    names = {a.asname: a.name for node in nodes if isinstance(node, ast.Import) for a in node.names if a.asname}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found = [(node.lineno, why) for node in nodes for why in _node(node, module, names)]
    hidden = [x for x in nodes if isinstance(x, ast.Name) and x.id in (*HIDES, "exec", "eval") and id(x) not in called]
    return sorted({*found, *((x.lineno, f"gives {x.id} another name: write an import statement") for x in hidden)})


def _node(node: ast.stmt | ast.expr, module: str, names: Mapping[str, str]) -> Iterator[str]:
    """Why a node may not be there.   names: what modules are called here -> what they are called."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _judged(alias.name)
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        whole = [f"{base}.{alias.name}" for alias in node.names]
        yield from [said for name in whole for said in _judged(name, base)]
        if any(alias.name in CALLS and alias.asname not in (None, alias.name) for alias in node.names):
            yield "gives import_module another name: write an import statement"
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called == "getattr" and node.args and _chain(node.args[0]) in ("importlib", "builtins", "sys"):
            yield "looks into the import system: write an import statement"
        if called in CALLS or (isinstance(node.func, ast.Name) and called in ("exec", "eval")):
            given = [*node.args, *(k.value for k in node.keywords if k.arg in ("name", "fullname", "mod_name"))]
            literal = _literal(given[0]) if given else None
            if literal is None or called in ("exec", "eval", "run_path", "spec_from_file_location"):
                yield f"calls {called}: nobody can read what it imports; write an import statement"
            else:
                yield from _judged(literal)
    elif isinstance(node, ast.Attribute):
        chain = _chain(node)
        first, dot, rest = chain.partition(".")
        chain = f"{names.get(first, first)}{dot}{rest}"
        if chain == "sys.modules":
            yield "reads sys.modules: write an import statement"
        elif chain in INSIDE or (chain.partition(".")[0] in LIBRARIES and chain.rpartition(".")[2] in (*PLACES, "runs", "suites")):
            yield from _judged(chain)


def _judged(name: str, base: str = "") -> Iterator[str]:
    """Why a module may not be imported, or nothing.   base: what a name is imported from, which is enough to know the module by."""
    top, *rest = name.split(".")
    if top == ROOT and (not rest or rest[0] not in OURS):
        yield f"imports {name}: methods use {ROOT}.cards, .training, .problems and .errors, and nothing of what plans, runs and judges"
    elif top in FOLDERS and not source(name):
        yield f"imports {name}: what knows the judged split is not for methods"
    elif any(name == suite or name.startswith(f"{suite}.") for suite in _suites()):
        yield f"imports {name}, which brings suites: what knows the judged split is not for methods"
    elif (
        top in DATA or any(f"{name}.".startswith(f"{place}.") for place in INSIDE) or (set(rest) & set(PLACES) and not source(base or name))
    ):
        yield f"imports {name}, which brings or fetches data: a method learns from its problem alone"


def _literal(node: ast.expr) -> str | None:
    """The text that an expression of literals is, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.JoinedStr):
        parts = [_literal(part) for part in node.values]
        return None if None in parts else "".join(map(str, parts))
    return _literal(node.value) if isinstance(node, ast.FormattedValue) else None


def _chain(node: ast.expr) -> str:
    """``a.b.c`` as it is written, or empty."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        above = _chain(node.value)
        return f"{above}.{node.attr}" if above else ""
    return ""


@functools.cache
def _suites() -> frozenset[str]:
    return frozenset(point.value for point in entry_points(group="distillbench.suites"))
