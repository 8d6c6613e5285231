"""Metrics without a direction in a run and in a guard: measured, kept in their range, never missed, never held to."""

import dataclasses

import pytest

from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.runs.guard import guard
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import suite_of


@pytest.fixture
def spec():
    return plan("image-generation/gaussians", ["teacher"], [0], controls=False)[0]


@pytest.fixture
def judge(monkeypatch):
    """``judge(change)`` makes the suite score as ``change(measurements)`` says."""
    kind = type(suite_of(registry.find("suite", "image-generation")))
    real = kind.evaluate

    def judged(change, *a):
        found = real(*a)
        return dataclasses.replace(found, measurements=change(found.measurements))

    return lambda change: monkeypatch.setattr(kind, "evaluate", lambda *a: judged(change, *a))


def test_they_are_measured_and_described_by_the_record(spec, tmp_path):
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert record.value("spread_ratio") == pytest.approx(1, abs=0.05)
    assert "spread_ratio" in {m.name for m in record.suite.shown} and "spread_ratio" not in {m.name for m in record.suite.metrics}


def test_a_run_without_one_is_whole(spec, judge, tmp_path):
    judge(lambda found: [m for m in found if m.metric != "spread_ratio"])
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok" and record.value("spread_ratio") is None


def test_one_outside_its_range_is_nonsense(spec, judge, tmp_path):
    judge(lambda found: [dataclasses.replace(m, value=-1.0) if m.metric == "spread_ratio" else m for m in found])
    record = execute(spec, Store(tmp_path))
    assert record.status == "failed" and "spread_ratio = -1.0 is outside" in record.reason


def test_no_student_is_held_to_one(spec, tmp_path):
    store = Store(tmp_path)
    record = execute(spec, store)
    weights = store.root / "students" / f"{record.student['sha256']}.safetensors"
    with pytest.raises(UserError, match="spread_ratio: neither more nor less of it is better"):
        guard(weights, record, margin=0.1, metrics=["spread_ratio"])
    assert {v.metric for v in guard(weights, record, margin=0.1)} == {m.name for m in record.suite.metrics}
