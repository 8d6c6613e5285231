"""distillbench board, as a user and as a script meets it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from distillbench.errors import UserError
from distillbench.leaderboard import commands

ROOT = Path(__file__).parents[2]
TRACK = "image-classification/digits"


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    commands.add(parser.add_subparsers())
    args = parser.parse_args(["board", *map(str, words)])
    return args.call(args)


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    return make.write(tmp_path_factory.mktemp("records"), make.full_board())


def test_build_prints_the_index_and_names_unreadable_files(make, tmp_path, capsys):
    records = make.write(tmp_path / "records", make.full_board())
    (records / "cut.json").write_text('{"schema": 1,')
    assert run("build", "--records", records, "--out", tmp_path / "site") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'site' / 'index.html'}\n"
    assert len(err.splitlines()) == 1
    assert "cut.json" in err
    run("build", "--records", records, "--out", tmp_path / "site", "--json")
    data = json.loads(capsys.readouterr().out)
    assert (data["tracks"], data["boards"], len(data["problems"])) == ([TRACK], 1, 1)


def test_show_in_a_pipe_is_tab_separated(folder, capsys):
    assert run("show", TRACK, "--records", folder) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {len(line) for line in lines} == {12}
    assert lines[1][:2] == ["1", "dist"]
    assert len(lines) == 1 + 9


def test_show_json_has_the_promised_keys(folder, capsys):
    run("show", TRACK, "--records", folder, "--json")
    rows = json.loads(capsys.readouterr().out)
    expected = ["method", "control", "status", "seeds", "score", "low", "high", "gap_closed", "gap_low", "gap_high", "rank", "cost"]
    assert all(list(row) == expected for row in rows)
    assert rows[0]["cost"]["wall_seconds"] == 30.0
    assert [r["method"] for r in rows if r["control"]] == ["teacher", "pseudo_label", "scratch"]
    assert rows[-1]["score"] is None
    run("show", TRACK, "--records", folder, "--json", "--metric", "nll")
    assert json.loads(capsys.readouterr().out)[0]["score"] < 0.3


def test_show_on_a_terminal_fits_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    run("show", TRACK, "--records", folder)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "over budget" in out
    assert "loss is not finite" in out


def test_a_store_is_read_by_its_records_alone(make, tmp_path, capsys):
    (tmp_path / "store.json").write_text('{"schema": 1}')
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "meta.json").write_text("{}")
    make.write(tmp_path / "records", make.full_board())
    run("show", TRACK, "--records", tmp_path)
    assert capsys.readouterr().err == ""


def test_errors_name_the_way_out(make, folder, tmp_path):
    with pytest.raises(UserError, match=f"did you mean '{TRACK}'"):
        run("show", "image-classification/digit", "--records", folder)
    with pytest.raises(UserError, match="did you mean 'top1'"):
        run("show", TRACK, "--records", folder, "--metric", "top")
    with pytest.raises(UserError, match="no such folder"):
        run("build", "--records", tmp_path / "absent")
    with pytest.raises(UserError, match="no records; make some with 'distillbench run"):
        run("build", "--records", tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="none of 1 could be used"):
        run("build", "--records", tmp_path)
    tuned = make.write(tmp_path / "tuned", [make.record(make.card("kd"), make.suite(), 0, split="tune")])
    with pytest.raises(UserError, match="only tuning runs"):
        run("build", "--records", tuned)


def test_it_works_where_torch_is_not_and_imports_lightly(folder, tmp_path):
    """torch, and everything else that reading records does not need, is blocked before anything is imported."""
    script = f"""
import sys
for name in ("torch", "torchvision", "transformers", "accelerate", "safetensors", "sklearn", "distillbench.methods", "distillbench.suites"):
    sys.modules[name] = None
import argparse, time
start = time.perf_counter()
from distillbench.leaderboard import commands
assert time.perf_counter() - start < 0.2
assert not {{"pandas", "numpy", "scipy", "jinja2", "rich"}} & set(sys.modules), sorted(sys.modules)
parser = argparse.ArgumentParser()
commands.add(parser.add_subparsers())
for words in (["build", "--out", {str(tmp_path)!r}], ["show", {TRACK!r}]):
    args = parser.parse_args(["board", *words, "--records", {str(folder)!r}])
    assert args.call(args) == 0
from distillbench.leaderboard import claims, export, picture, site, table
allowed = {{
    "assets", "cards.card", "cards.reading", "errors", "files",
    "identity", "runs.identities", "runs.packing", "runs.record", "stats", "version",
}}
seen = {{m.removeprefix("distillbench.") for m in sys.modules if m.startswith("distillbench.") and ".leaderboard" not in m}}
assert seen - {{"cards", "runs", "methods", "suites"}} == allowed, seen
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
