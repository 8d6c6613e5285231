"""What is installed is what is here: the wheel's names, the wheel at work in a bare environment, an editable install that finds new files.

Environments are made once. They see the heavy libraries of the running one through a .pth file: that adds its folder behind their own, and
Python reads no .pth files of a folder added so, which leaves the developer's editable install out (a test looks).
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import distillbench
from distillbench.runs.record import Record

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"bench": "distillbench", **{name: f"distillbench/{name}" for name in ("methods", "suites", "leaderboard")}}
TRACK = "image-classification/blobs"
pytestmark = pytest.mark.slow


def run(*command, cwd, rc=0, **more):
    """A command without the settings of this session; its output. Fails where it ends otherwise than with ``rc``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "DISTILLBENCH"))}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1", **more}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == rc, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def copy(target):
    """The repository's files, so that nothing is built in it. Tests and benchmarks are there, and must stay out of the wheel."""
    for name in (*ROOTS, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "goldens"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def bare(folder):
    """A virtual environment with nothing in it that sees the libraries of the running one; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).stdout.strip())
    (own / "libraries_of_the_developer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def pip(python, *words, cwd):
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", *words, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    source = copy(folder / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a bare environment that has the wheel."""
    python = bare(tmp_path_factory.mktemp("bare") / "env")
    pip(python, "--no-index", wheel, cwd=python.parent)
    return python


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """(Python of a bare environment, tree that is installed in it for development)."""
    folder = tmp_path_factory.mktemp("editable")
    (folder / "tree").mkdir()
    tree, python = copy(folder / "tree"), bare(folder / "env")
    pip(python, "--editable", tree, cwd=folder)
    return python, tree


@pytest.fixture(params=["an empty folder", "the user's own bench, methods, suites, leaderboard and tests"])
def place(request, tmp_path):
    """A folder to work in. The user's own packages of our folders' names must neither be imported nor stop anything."""
    if request.param != "an empty folder":
        for name in (*ROOTS, "tests"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the user\\'s own {name}')\n")
    return tmp_path


def test_the_wheel_carries_the_tree_under_one_name_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}
    about = f"distillbench-{distillbench.__version__}.dist-info"
    assert {n.partition("/")[0] for n in names} == {"distillbench", about}
    ours = {f"{prefix}/{name}" for root, prefix in ROOTS.items() for name in files(ROOT / root)}
    assert {n for n in names if n.startswith("distillbench/")} == ours - {"distillbench/leaderboard/records/README.md"}
    for kind in (".safetensors", ".j2", ".css", ".js", "method.txt", "suite.txt", "/py.typed", ".record", "joined.json", "words.txt"):
        assert any(n.endswith(kind) for n in names), kind
    assert not [n for n in names if "/tests/" in n or n.rpartition("/")[2].startswith("test_")]


def test_the_version_is_said_once_more_and_the_same():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == distillbench.__version__


def test_the_developers_install_is_out_of_sight(installed, tmp_path):
    code = """
import sys, torch, importlib, importlib.metadata as m
finders = [f for f in sys.meta_path if "editable" in getattr(f, "__module__", "")]
for name in ("distillbench", "distillbench.methods", "distillbench.suites.image_classification", "distillbench.leaderboard.table"):
    print(importlib.import_module(name).__file__)
print([p for d in [m.distribution("distillbench")] for p in [d.locate_file("")]][0], finders, torch.__file__)
"""
    *ours, last = run(installed, "-c", code, cwd=tmp_path).stdout.splitlines()
    inside = str(installed.parents[1])
    assert len(ours) == 4 and all(line.startswith(inside) for line in [*ours, last])
    assert " [] " in last and last.rpartition(" ")[2].startswith(tuple(site.getsitepackages()))


@pytest.mark.parametrize("way", ["script", "module"])
def test_the_installed_command_works_from_anywhere(installed, place, way):
    command = [installed, "-m", "distillbench"] if way == "module" else [installed.parent / "distillbench"]
    listed = run(*command, "list", "methods", cwd=place)
    assert listed.stderr == "" and re.search(r"^kd\tclassification\t", listed.stdout, re.M)
    assert f"{TRACK}\t" in run(*command, "list", "suites", cwd=place).stdout
    assert run(*command, "--version", cwd=place).stdout == f"distillbench {distillbench.__version__}\n"
    # By -m with two workers: they are started anew, from the same folder, and must find the same code.
    workers = "2" if way == "module" else "1"
    words = ["run", TRACK, "--method", "kd", "--seeds", "2", "--budget", "640", "--out", "runs", "--workers", workers]
    table = run(*command, *words, cwd=place).stdout.splitlines()
    assert [line.split("\t")[1] for line in table] == ["seeds", *["2"] * (len(table) - 1)] and any(
        line.startswith("kd\t") for line in table
    )
    assert run(*command, "board", "build", "--records", "runs", "--out", "site", cwd=place).stdout == "site/index.html\n"
    assert [p.name for p in (place / "site" / "tracks").glob("*/*.html")] == ["blobs.html"]
    assert "--ink" in (place / "site" / "style.css").read_text()
    if workers == "2":
        return
    built = run(*command, "board", "build", cwd=place)  # of the published records, which are installed too
    assert (built.stdout, built.stderr) == ("site/index.html\n", "")
    tracks = {p.relative_to(ROOT / "leaderboard" / "records").as_posix() for p in (ROOT / "leaderboard" / "records").glob("*/*/")}
    assert {p.relative_to(place / "site" / "tracks").with_suffix("").as_posix() for p in (place / "site").glob("tracks/*/*.html")} == tracks


def test_a_notebook_beside_the_users_own_packages(installed, place):
    code = f"""
import distillbench as db
from distillbench import leaderboard
records = db.run("{TRACK}", "kd", seeds=1, budget={{"student_examples": 640}}, progress=False)
assert db.judge(db.weights(records[-1]), "{TRACK}")["top1"] == records[-1].value("top1")
board = leaderboard.board("{TRACK}", "runs")
assert list(leaderboard.frame(board)["method"]) and leaderboard.draw(board)._repr_svg_().startswith("<svg")
import sys
assert not {{"bench", "methods", "suites", "leaderboard", "tests"}} & set(sys.modules)
"""
    (place / "notebook.py").write_text(code)
    run(installed, "-W", "error", "notebook.py", cwd=place)  # as a script: the folder comes first on the path, as in a notebook
    [record] = (place / "runs").glob("records/*/*/kd/*.record")
    assert Record.read(record).environment["commit"] is None  # nobody's checkout: not one that happens to lie around


def test_an_editable_install_finds_new_files_at_once(editable, tmp_path):
    """A module, a method, and a new kind of problem (a folder with its own method): nothing is installed again."""
    python, tree = editable
    assert "echo" not in run(python, "-m", "distillbench", "list", "methods", cwd=tmp_path).stdout
    card = "from distillbench.cards.card import Card\nfrom distillbench.problems.{room} import {what}\n"
    card += 'CARD = Card(slug="{slug}", version=1, problem="{problem}", title="one that was not there", control=True)\n'
    new = {
        "bench/novel.py": "WHERE = __file__\n",
        "bench/problems/graphs/__init__.py": '"""A new kind of problem."""\nfrom distillbench.problems.graphs.edges import count\n',
        "bench/problems/graphs/edges.py": "from distillbench.training.problem import Problem\n\n\ndef count(g):\n    return len(g)\n",
        "methods/graphs/__init__.py": "",
        "methods/graphs/echo_graph.py": card.format(room="graphs", what="count", slug="echo_graph", problem="graphs"),
        "methods/classification/echo.py": card.format(room="classification", what="losses", slug="echo", problem="classification"),
        "suites/echoes/__init__.py": "SEEN = True\n",
        "leaderboard/echoes.py": "from distillbench.leaderboard.table import Board\n",
    }
    for name, text in new.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text)
    code = """
import distillbench.novel, distillbench.problems.graphs.edges, distillbench.suites.echoes, distillbench.leaderboard.echoes
from distillbench.problems.graphs import count
from distillbench.methods.graphs import echo_graph
from distillbench.cards import registry
assert registry.find("method", "echo").load().CARD.slug == "echo"
assert registry.find("method", "graphs/echo_graph").load() is echo_graph and count([1, 2]) == 2
print(distillbench.novel.WHERE)
"""
    assert run(python, "-c", code, cwd=tmp_path).stdout.strip() == str(tree / "bench" / "novel.py")
    listed = run(python, "-m", "distillbench", "list", "methods", cwd=tmp_path).stdout
    assert "echo\tclassification" in listed and "echo_graph\tgraphs" in listed
