"""Dataset distillation (the student is a data set, and there is no teacher) as somebody else's kind: run, record, board, checks."""

from pathlib import Path

import pytest
import torch

from distillbench.api import judge, weights
from distillbench.checks import CHECKS, check_method
from distillbench.cli import main as cli
from distillbench.leaderboard.table import boards
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.training.student import Student

TRACK = "synthetic-sets/digits-1"
METHOD = Path(__file__).parent / "dataset_distillation/outside_sets/methods/dataset_distillation/distribution_matching.py"
EXPORT = "    return run.export(parts=student.parts())\n"


@pytest.fixture(autouse=True)
def installed(outsider):
    outsider("dataset_distillation")


def test_records_of_sets_make_a_board(tmp_path, capsys):
    store = Store(tmp_path)
    records = [execute(spec, store) for spec in plan(TRACK, ["distribution_matching"], [0, 1])]
    assert {r.status for r in records} == {"ok"}, {r.reason for r in records}
    [board], bad = boards(records)
    assert not bad and {row.card.slug for row in board.rows} == {"scratch", "distribution_matching"}
    mean = {row.card.slug: row.intervals["top1"].estimate for row in board.rows}
    assert mean["distribution_matching"] > mean["scratch"] + 0.15  # 0.84 and 0.59 of digits
    first = next(r for r in records if r.slug == "distribution_matching")
    student = Student.read(weights(first, tmp_path))
    assert student.parts["images"].weights["images"].shape == (10, 1, 8, 8)
    assert torch.equal(student.parts["labels"].weights["labels"], torch.eye(10))
    assert first.student["parts"] == {"images": {"kind": "trained", "numbers": 640}, "labels": {"kind": "untrained", "numbers": 100}}
    assert first.cost["total"]["parameters"] == 740 and first.cost["total"]["teacher_examples"] == 0
    assert first.cost["total"]["student_bytes"] == student.size == weights(first, tmp_path).stat().st_size
    assert cli.main(["show", first.id, "--out", str(tmp_path)]) == 0
    assert f"images (trained), labels (untrained) sha256 {first.student['sha256']}" in capsys.readouterr().out
    assert judge(weights(first, tmp_path), TRACK)["top1"] == first.value("top1")


@pytest.mark.slow
def test_the_checks_hold_for_a_method_of_sets():
    results = check_method("distribution_matching", track=TRACK)
    assert {r.name for r in results} == set(CHECKS)
    assert not [(r.name, r.message) for r in results if r.outcome == "failed"]
    done = {"card", "teacher_intact", "seeds", "resume", "export", "beats_scratch"}
    assert done <= {r.name for r in results if r.outcome == "passed"}


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ('    return run.export(parts={"images": student})\n', ""),
        ("    student.images.data.clamp_(0, 0.5)\n" + EXPORT, "images is declared as trained, and no loop left a parameter so"),
        ('    student.images.data.clamp_(0, 0.5)\n    return run.export(parts={"images": student})\n', "changed after the training"),
        ('    return run.export(parts={"images": problem.new_student()})\n', "is not one that was trained"),
        ("    return run.export(student)\n", ""),
        (EXPORT.replace("student.parts()", "{'images': Part.of(student, 'untrained')}"), "changes with the order of the examples"),
    ],
)
def test_what_is_exported_as_parts_was_trained(tmp_path, export, says):
    text = METHOD.read_text()
    changes = ((EXPORT, export), ('slug="distribution_matching"', 'slug="planted"'), ("import Student", "import Part, Student"))
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "planted.py").write_text(text)
    [result] = check_method(str(tmp_path / "planted.py"), track=TRACK, only=["export"])
    assert (result.outcome == "failed") == bool(says) and says in result.message
