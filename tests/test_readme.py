"""The README keeps its word: its example works as printed, its commands exist, its counts are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distillbench.cards import registry
from distillbench.checks import check_method
from distillbench.cli import main, parser
from distillbench.runs.study import studies

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example() -> str:
    return re.findall(r"```python\n(.*?)```", README, re.S)[0]


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
