"""A new suite runs as written: discovered through an entry point, distilled on, judged."""

from __future__ import annotations

import sys

import pytest

from distillbench.cards import registry
from distillbench.cards.scaffold import write_method, write_suite
from distillbench.checks import check_method
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of somebody else's with one new suite in it."""
    folder = tmp_path / "my_suites"
    folder.mkdir()
    (folder / "__init__.py").touch()
    write_suite("my-suite", folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    real = registry.entry_points
    extra = registry.EntryPoint("mine", "my_suites", "distillbench.suites")
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), *([extra] if group == extra.group else [])])
    registry.refresh()
    yield
    registry.refresh()
    for name in [n for n in sys.modules if n.startswith("my_suites")]:
        del sys.modules[name]


def test_a_new_suite_runs_as_written(mine, tmp_path):
    specs = plan("my-suite/line", ["kd", "lelp"], [0])
    assert {s.method for s in specs} == {"scratch", "pseudo_label", "teacher", "shuffled_teacher", "kd", "lelp"}
    for spec in specs:
        record = execute(spec, Store(tmp_path / "runs"))
        assert record.status == "ok", (spec.method, record.reason)
        value = record.value("top1")
        assert value is not None
        assert 0.7 < value < 0.9  # the exact posterior scores 0.84


@pytest.mark.slow
def test_a_new_generation_method_runs_as_written_on_every_kind_of_teacher(tmp_path):
    path = write_method("mine_generator", "image-generation", tmp_path)
    scores = {}
    for track, budget in (("gaussians", 256 * 200), ("gaussians-guided", 256 * 10), ("digits", 128 * 10)):
        for spec in plan(f"image-generation/{track}", [str(path)], [0], controls=False, split="tune", budget={"student_examples": budget},
                         options={"samples": 500}):  # fmt: skip
            record = execute(spec, Store(tmp_path / "runs"))
            assert record.status == "ok", (track, record.reason)
            scores[track] = record.value(record.suite.primary)
    assert scores["gaussians"] < 0.4  # 0.6 for the teacher in one step
    assert scores["digits"] < 14  # 16 for the teacher in one step


def test_a_language_model_skeleton_runs_and_passes_the_checks(tmp_path):
    path = write_method("mine_language", "language-modeling", tmp_path)
    results = check_method(str(path), only=["card", "teacher_intact", "micro_batches", "token_padding", "export"])
    assert {r.name for r in results if r.outcome != "passed"} == {"card"}  # what is marked TODO
