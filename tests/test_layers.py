"""The laws of the house (docs: DESIGN, section 2), read from the source of every module."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "methods", "suites", "leaderboard")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
FORBIDDEN = {"bench": {"methods", "suites", "leaderboard"}, "methods": {"suites", "leaderboard"}, "suites": {"methods", "leaderboard"}}
BOARD_MAY = {"bench.record", "bench.card", "bench.stats", "bench.errors", "bench.study"}


def imported(tree, package=()):
    """Every module that a tree names in an import statement or an import call, as an absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            known = (ROOT / base.replace(".", "/")).is_dir()
            yield from (f"{base}.{a.name}" if known else base for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.args[0].value


def broken_laws(path, tree):
    relative = path.relative_to(ROOT)
    package = relative.parts[0]
    for name in imported(tree, relative.parts[:-1]):
        if name.split(".")[0] in FORBIDDEN.get(package, ()):
            yield name
        if package == "leaderboard" and name.split(".")[0] in ("methods", "suites"):
            yield name
        if (
            package == "leaderboard"
            and name.split(".")[0] == "bench"
            and name != "bench"
            and ".".join(name.split(".")[:2]) not in BOARD_MAY
        ):
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert not list(broken_laws(path, ast.parse(path.read_text())))


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("bench/x.py", "import methods.classification.kd"),
        ("bench/x.py", "def f():\n    from suites import image_classification"),
        ("bench/problems/x.py", "import importlib\nimportlib.import_module('leaderboard.table')"),
        ("methods/classification/x.py", "from suites.metrics import mmd"),
        ("suites/image_classification/x.py", "from methods import classification"),
        ("leaderboard/x.py", "from bench.runner import execute"),
        ("leaderboard/x.py", "from bench import run"),
        ("methods/classification/x.py", "from ...suites import metrics"),
    ],
)
def test_the_law_can_be_broken(where, line):
    assert list(broken_laws(ROOT / where, ast.parse(line)))


def test_the_law_lets_the_board_read_records():
    assert not list(broken_laws(ROOT / "leaderboard/x.py", ast.parse("from bench.record import Record\nfrom bench import stats, card")))


def run(code, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_importing_bench_and_building_the_parser_leave_torch_alone():
    done = run("import sys, bench, bench.cli; bench.cli.parser(); print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_board_needs_no_torch():
    """With torch made unimportable, every module of the leaderboard still imports."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if p.parts[len(ROOT.parts)] == "leaderboard"]
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
    code = "import sys, bench.cli; code = bench.cli.main(['list', 'methods']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = run(code, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text())
    names = set(imported(tree, path.relative_to(ROOT).parts[:-1]))
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
