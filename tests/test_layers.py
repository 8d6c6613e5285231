"""The layer rules, read from the source of every module: what may import what, and what nobody may do."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"bench": "distillbench", **{name: f"distillbench.{name}" for name in ("methods", "suites", "leaderboard")}}
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
# From the ground up: a room imports what lies below it, or itself, and nothing above.
FLOORS = ("ground", "cards", "training", "runs", "problems", "checks", "cli")

BOARD_MAY = {
    "distillbench.assets",
    "distillbench.cards",
    "distillbench.cards.card",
    "distillbench.cards.reading",
    "distillbench.errors",
    "distillbench.files",
    "distillbench.identity",
    "distillbench.runs",
    "distillbench.runs.identities",
    "distillbench.runs.record",
    "distillbench.runs.study",
    "distillbench.stats",
}


def name_of(path):
    """The dotted name of the module in a file of the repository."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *rest]).removesuffix(".__init__")


MODULES = {name_of(p): p for p in FILES}


def imported(tree, name, package=False):
    """Every module that the module ``name`` mentions in an import statement or an import call, wherever it stands."""
    parents = name.split(".") if package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            yield base  # the package too, where its modules are named: it is imported with them
            yield from {f"{base}.{a.name}" for a in node.names} & set(MODULES)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.args[0].value


def room(name):
    """``methods``, ``suites``, ``leaderboard``, or a floor of the engine. The package itself and its API are the door, above all rooms."""
    parts = name.split(".")
    if parts[0] in PACKAGES:
        return parts[0] if parts[0] != "bench" else "old"
    if parts[0] != "distillbench":
        return None
    if parts[1:] in ([], ["__main__"], ["api"]):
        return "cli"
    return parts[1] if parts[1] in (*PACKAGES, *FLOORS) else "ground"


def kind(name):
    """The kind of problem whose room a module stands in, or None."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["distillbench", "problems"] and len(parts) > 2 else None


def broken_rules(name, tree, package=False):
    """The imports of a module that the house forbids."""
    own = room(name)
    for other in imported(tree, name, package):
        theirs = room(other)
        if theirs is None or other == "distillbench":
            continue
        if own in FLOORS:
            allowed = theirs in FLOORS and FLOORS.index(theirs) <= FLOORS.index(own)
            allowed = allowed and not (own == "problems" and kind(other) not in (None, kind(name)))
        elif own == "leaderboard":
            allowed = theirs == "leaderboard" or other in BOARD_MAY
        else:
            allowed = theirs == own or theirs in FLOORS[: FLOORS.index("checks")]
        if not allowed:
            yield other


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    path = MODULES[name]
    assert not list(broken_rules(name, ast.parse(path.read_text()), path.name == "__init__.py"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("distillbench.x", "import distillbench.methods.classification.kd"),
        ("distillbench.runs.x", "def f():\n    from distillbench.suites import image_classification"),
        ("distillbench.problems.x", "import importlib\nimportlib.import_module('distillbench.leaderboard.table')"),
        ("distillbench.errors", "from distillbench.cards.card import Card"),
        ("distillbench.cards.registry", "if TYPE_CHECKING:\n    from distillbench.training.run import Run"),
        ("distillbench.runs.runner", "from distillbench.problems.classification.problem import Classification"),
        ("distillbench.training.oracle", "from distillbench.problems.image_generation.edm import guided"),
        ("distillbench.problems.classification.losses", "from distillbench.problems.image_generation.edm import row_mean"),
        ("distillbench.methods.classification.x", "from distillbench.suites.metrics import mmd"),
        ("distillbench.methods.classification.x", "from ...suites import metrics"),
        ("distillbench.methods.classification.x", "from distillbench.checks import check_method"),
        ("distillbench.suites.image_classification.x", "from distillbench.methods import classification"),
        ("distillbench.leaderboard.x", "from distillbench.runs.runner import execute"),
        ("distillbench.leaderboard.x", "from distillbench.training import run"),
        ("distillbench.runs.plan", "from bench.record import Record"),
    ],
)
def test_the_rules_can_be_broken(name, line):
    assert list(broken_rules(name, ast.parse(line)))


def test_the_rules_let_the_board_read_records():
    line = "from distillbench.runs.record import Record\nfrom distillbench import stats\nfrom distillbench.cards import card"
    assert not list(broken_rules("distillbench.leaderboard.x", ast.parse(line)))


def circles(graph):
    """The sets of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    found, index, low, stack, count = [], {}, {}, [], iter(range(len(graph) + 1))

    def visit(node):
        index[node] = low[node] = next(count)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_nothing_imports_in_a_circle():
    """Imports for type checkers and imports inside functions included."""
    graph = {  # the door leads to all of it, and is imported with any of it
        name: sorted(set(imported(ast.parse(path.read_text()), name, path.name == "__init__.py")) & set(MODULES) - {name, "distillbench"})
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == []
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]


def run(code, **more):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **more}, capture_output=True, text=True, timeout=120)


def test_importing_the_engine_and_building_the_parser_leave_torch_alone():
    done = run(
        "import sys; from distillbench.cli.arguments import parser; parser()\n"
        "print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_board_needs_no_torch():
    """With torch made unimportable, every module of the leaderboard still imports."""
    names = [name for name in MODULES if room(name) == "leaderboard"]
    code = f"import sys; sys.modules['torch'] = None\nimport importlib\nfor n in {names!r}: importlib.import_module(n)"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_list_reads_cards_and_runs_no_module(tmp_path):
    """A module that ends the process right after its card is listed all the same, and its slug with it."""
    package = tmp_path / "other_people"
    (package / "classification").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit(9)")
    (package / "classification" / "quits.py").write_text(
        'CARD = Card(slug="quits", version=1, problem="classification", title="ends the process")\nraise SystemExit(9)\n'
    )
    about = tmp_path / "other_people-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-people\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[distillbench.methods]\nother = other_people\n")
    code = (
        "import sys; from distillbench.cli.main import main; code = main(['list', 'methods'])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = run(code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("quits\tclassification\t") for line in done.stdout.splitlines())


def without_comments(path):
    return ast.unparse(ast.parse(path.read_text()))


# UnpicklingError says in one line that torch's restricted unpickler refused. EDM's checkpoints, which torch cannot restrict, are
# read by an unpickler that looks every name up in a list of its own.
# TorchScript is code too: Inception's published file is run under its pinned SHA-256, and nothing else is.
PINNED = {"suites/metrics/images/extractors.py": {"torch.jit.load"}}
RESTRICTED = {"suites/image_generation/convert_edm.py": {"Unpickler"}}


def restricted_unpicklers(tree):
    """The classes on pickle.Unpickler whose find_class is their own from end to end: it imports nothing and asks no base class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and [ast.unparse(b) for b in node.bases] == ["pickle.Unpickler"]:
            finders = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "find_class"]
            calls = {ast.unparse(c.func) for f in finders for c in ast.walk(f) if isinstance(c, ast.Call)}
            if finders and calls <= {"_Refused"}:
                yield node


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpickles_or_evaluates(name):
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    names = set(imported(tree, name, path.name == "__init__.py"))
    assert not {n for n in names if n.split(".")[0] in ("dill", "cloudpickle", "joblib", "marshal", "shelve") or n.startswith("pickle.")}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert used <= {"UnpicklingError"} | RESTRICTED.get(path.relative_to(ROOT).as_posix(), set())
    assert sum(ast.unparse(n) == "pickle.Unpickler" for n in ast.walk(tree)) == len(list(restricted_unpicklers(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {k.arg: k.value for k in node.keywords}
            forbidden = {"eval", "exec", "compile", "torch.jit.load"} - PINNED.get(path.relative_to(ROOT).as_posix(), set())
            assert called not in forbidden, f"{called} at line {node.lineno}"
            assert getattr(arguments.get("trust_remote_code"), "value", False) is False, f"line {node.lineno}"
            if called == "torch.load":
                assert getattr(arguments.get("weights_only"), "value", None) is True, f"torch.load at line {node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert getattr(arguments.get("allow_pickle"), "value", False) is False, f"line {node.lineno}"
    assert not re.search(r"trust_remote_code['\"]?\s*[:=]\s*True", without_comments(path))
