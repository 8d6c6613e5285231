"""Which code a result rests on: found without importing it, compared by what it says, vouched for or counted by its bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distillbench import code
from distillbench.cards import registry

METHOD = """'''Prose.'''
from typing import TYPE_CHECKING
import {helper}
from other_package_that_is_not_there import x
if TYPE_CHECKING:
    import only_for_checkers
CARD = Card(slug="m", version=1, problem="p", title="a title")
def f(x):
    '''What it does.'''
    import later  # anywhere in the text
    return 2 * x
"""


@pytest.fixture
def loose(tmp_path, monkeypatch):
    """``loose(name=text, ...)`` writes modules that can be imported; ``loose(...)[name]`` are their files."""
    monkeypatch.syspath_prepend(tmp_path)
    code.forget()

    def write(**texts):
        paths = {name: tmp_path / f"{name}.py" for name in texts}
        for name, text in texts.items():
            paths[name].write_text(text)
        return paths

    yield write
    for name in ("loose_one", "loose_two", "later", "only_for_checkers"):
        sys.modules.pop(name, None)


def test_a_closure_follows_imports_wherever_they_stand_and_imports_nothing(loose):
    paths = loose(
        m=METHOD.format(helper="loose_one"),
        loose_one="import importlib\nimportlib.import_module('loose_two')\nraise SystemExit(9)",
        loose_two="import torch, json",
        later="",
        only_for_checkers="",
    )
    found = code.closure({"m": paths["m"]})
    assert found == {name: paths[name] for name in ("later", "loose_one", "loose_two", "m")}
    assert not {"later", "loose_one", "loose_two"} & set(sys.modules)


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import later", True),
        ("import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    import later", True),
        ("import typing\nif typing.TYPE_CHECKING:\n    import later", False),
        ("try:\n    import later\nexcept ImportError:\n    pass", True),
        ("from later import *", True),
        ("__import__('later')", True),
        ("x = 'import later'", False),
    ],
)
def test_only_what_never_runs_is_left_out_of_a_closure(loose, text, follows):
    paths = loose(m=text, later="")
    assert ("later" in code.closure({"m": paths["m"]})) is follows


def test_a_closure_of_a_method_ends_at_libraries_and_leaves_the_door_out():
    entry = registry.find("method", "kd")
    found = code.closure(entry.modules())
    assert {"distillbench.problems.classification.losses", "distillbench.training.run", entry.module} <= set(found)
    assert all(name.startswith("distillbench.") for name in found)
    assert not any(name.startswith(("distillbench.runs", "distillbench.suites", "distillbench.problems.image")) for name in found)


def test_relative_imports_and_packages_around_a_module_count(tmp_path, monkeypatch):
    for name, text in {
        "__init__.py": "",
        "a.py": "from . import b\nfrom .deep.c import x",
        "b.py": "",
        "deep/__init__.py": "",
        "deep/c.py": "",
    }.items():
        (tmp_path / "pack_of_ours" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack_of_ours" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    code.forget()
    found = code.closure({"pack_of_ours.a": tmp_path / "pack_of_ours/a.py"})
    assert set(found) == {"pack_of_ours", "pack_of_ours.a", "pack_of_ours.b", "pack_of_ours.deep", "pack_of_ours.deep.c"}


def test_packages_without_init_files_are_looked_into(tmp_path, monkeypatch):
    module = tmp_path / "outer_space/inner_space/deep/m.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "user.py").write_text("import outer_space.inner_space.deep.m")
    monkeypatch.syspath_prepend(tmp_path)
    code.forget()
    assert set(code.closure({"user": tmp_path / "user.py"})) == {"user", "outer_space.inner_space.deep.m"}
    assert "outer_space" not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("'''Prose.'''", "'''Other prose.'''\n# and a comment", True),
        ("'''What it does.'''", "'''Something else.'''", True),
        ("a title", "another title", True),
        ("return 2 * x", "return (2\n            * x)", True),
        ("return 2 * x", "return 3 * x", False),
        ("return 2 * x", "return x * 2", False),
        ("2 * x", "2.0 * x", False),
        ("2 * x", "True * x", False),
        ("def f(x):", "def f(x, y=1):", False),
    ],
)
def test_prose_does_not_count_and_every_statement_does(tmp_path, old, new, same):
    text = METHOD.format(helper="json")
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text(text)
    assert old in text
    second.write_text(text.replace(old, new))
    assert (code.syntax_digest({"m": first}) == code.syntax_digest({"m": second})) is same


def test_a_changed_helper_changes_the_digest(loose):
    paths = loose(m=METHOD.format(helper="loose_one"), loose_one="x = 1")
    before = code.syntax_digest(code.closure({"m": paths["m"]}))
    loose(loose_one="x = 2")
    assert code.syntax_digest(code.closure({"m": paths["m"]})) != before


@pytest.fixture
def repository(tmp_path):
    """A repository with one committed module."""

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True)

    (tmp_path / "m.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "m.py")
    git("commit", "-qm", "first")
    code.forget()
    return tmp_path


def test_a_commit_gives_a_text_again_until_it_is_edited(repository):
    path = (repository / "m.py").resolve()
    assert code.recoverable("m", path)
    path.write_text("x = 2\n")
    code.forget()
    assert not code.recoverable("m", path)
    (repository / "new.py").write_text("")
    assert not code.recoverable("new", (repository / "new.py").resolve())


def test_a_loose_file_counts_by_its_bytes_whatever_is_committed(repository):
    """A repository without fingerprints, and no installed package: nobody holds its versions to their word."""
    path = (repository / "m.py").resolve()
    before = code.unvouched({"m": path})
    assert set(before) == {"m"}
    path.write_text("x = 1  # a comment\n")
    assert code.unvouched({"m": path}) != before


def test_installed_files_are_vouched_for_by_their_record(tmp_path, monkeypatch):
    """A package that ships fingerprints: its files count by version while they are what RECORD says."""
    import base64
    import hashlib

    folder = tmp_path / "vouched_pkg"
    (folder / "classification").mkdir(parents=True)
    (folder / "fingerprints").mkdir()
    module = folder / "classification" / "a.py"
    module.write_text("x = 1\n")
    (folder / "__init__.py").write_text("")
    digest = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
    about = tmp_path / "vouched_pkg-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vouched-pkg\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[distillbench.methods]\nvouched = vouched_pkg\n")
    (about / "RECORD").write_text(f"vouched_pkg/classification/a.py,sha256={digest},6\n")
    monkeypatch.syspath_prepend(tmp_path)
    code.forget()
    named = {"vouched_pkg.classification.a": module.resolve()}
    assert code.unvouched(named) == {}
    module.write_text("x = 2\n")
    assert set(code.unvouched(named)) == set(named)
    module.write_text("x = 1\n")
    (folder / "fingerprints").rmdir()
    code.forget()
    assert set(code.unvouched(named)) == set(named)
    monkeypatch.undo()
    code.forget()


def test_what_is_cached_is_keyed_by_the_code_that_made_it(tmp_path, monkeypatch):
    (tmp_path / "cached_by.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    code.forget()
    first = code.digest_of("cached_by", "torch.nn")
    assert code.digest_of("cached_by", "torch.nn") == first != code.digest_of("cached_by")
    (tmp_path / "cached_by.py").write_text("def f(): return 2\n")
    code.forget()
    assert code.digest_of("cached_by", "torch.nn") != first


def test_this_file_is_no_module_of_a_library():
    assert code.source("json") is None and code.source("numpy") is None and code.source("no_such_module_at_all") is None
    assert code.source("distillbench.code") == Path(code.__file__).resolve()
