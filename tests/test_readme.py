"""The README keeps its word: its example works as printed, its commands exist, its counts are true."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import distillbench
from distillbench import leaderboard
from distillbench.cards import registry
from distillbench.checks import check_method
from distillbench.cli.arguments import parser
from distillbench.cli.main import main
from distillbench.runs.study import studies

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example(having: str = "CARD = ") -> str:
    [found] = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if having in code]
    return found


def test_the_printed_method_passes_the_checks_and_runs(tmp_path, capsys):
    path = tmp_path / "logit_regression.py"
    path.write_text(example())
    failed = [r for r in check_method(str(path)) if r.outcome == "failed"]
    assert not failed, failed
    code = main(
        [
            "run",
            "image-classification/blobs",
            "--method",
            str(path),
            "--seeds",
            "2",
            "--budget",
            "640",
            "--workers",
            "1",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    assert code == 0
    assert "logit_regression" in capsys.readouterr().out


def test_the_example_is_about_forty_lines():
    code = [line for line in example().splitlines() if line.strip()]
    assert len(code) <= 40


def test_the_printed_lines_of_python_do_what_they_say(tmp_path, monkeypatch):
    """Five lines, each as printed; those that a notebook would show are looked at."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for node in ast.parse(example("import distillbench as db")).body:
        code = ast.unparse(node)
        if isinstance(node, ast.Expr):
            shown.append(eval(code, names))
        else:
            exec(code, names)
    judged, table, picture = shown
    assert len(names["records"]) == 3 * (2 + 4) and all(r.status == "ok" for r in names["records"])
    last = names["records"][-1]
    assert judged == {m.metric: m.value for m in last.measurements} and last.slug == "dkd"
    assert list(table.columns) == ["rank", "method", "score", "low", "high"] and {"kd", "dkd", "teacher"} <= set(table["method"])
    assert picture == Path("board.svg") and "image-classification/blobs" in picture.read_text()


def test_the_python_api_is_documented_as_it_is():
    """docs/python-api.md shows every function with its arguments and defaults, and no other."""
    text = " ".join((ROOT / "docs" / "python-api.md").read_text().split())
    for module, name in ((distillbench, "db"), (leaderboard, "leaderboard")):
        functions = {n: f for n in module.__all__ if inspect.isfunction(f := getattr(module, n))}
        assert set(re.findall(rf"`{name}\.([a-z_]+)\(", text)) == set(functions)
        for n, function in functions.items():
            assert f"`{name}.{n}({arguments(function)})`" in text, f"{name}.{n}({arguments(function)})"


def arguments(function) -> str:
    """The arguments of a function without their types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1].replace("'", '"')


@pytest.mark.parametrize(
    "line", re.findall(r"^distillbench (.*)$", README + "\n".join(p.read_text() for p in (ROOT / "docs").glob("*.md")), re.M)
)
def test_every_command_in_the_text_parses(line):
    words = [w.strip("<>") for w in re.sub(r"<[^>]*>", "x", line.partition("#")[0]).split()]
    parser().parse_args(words)


def test_the_catalogue_count_is_true():
    papers = {e.card.paper.catalogue for e in registry.methods().values() if e.card and e.card.paper and e.card.paper.row}
    papers |= {f.study.paper.catalogue for f in studies().values() if f.study.paper.row}
    stated = re.search(r"So far (\d+) of them do \((.*?)\)", README, re.S)
    assert stated is not None
    assert set(re.findall(r"`(\w+)`", stated[2])) == papers
    assert int(stated[1]) == len(papers)


def test_local_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
