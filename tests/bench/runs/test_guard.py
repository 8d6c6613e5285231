"""Guarding a student: the same weights hold, worse ones do not, and what cannot be compared is one line."""

from __future__ import annotations

import dataclasses
import json

import pytest

from distillbench.cards.card import Metric
from distillbench.cli.main import main
from distillbench.errors import UserError
from distillbench.runs.guard import _compare, guard
from distillbench.runs.plan import plan
from distillbench.runs.record import Measurement
from distillbench.runs.runner import execute
from distillbench.runs.store import Store


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(store, records by method) of kd and scratch on blobs."""
    store = Store(tmp_path_factory.mktemp("guard"))
    specs = plan("image-classification/blobs", ["kd", "scratch"], [0], controls=False, budget={"student_examples": 6400})
    return store, {s.method: (execute(s, store), next(store.root.glob(f"records/*/*/{s.method}/*.record"))) for s in specs}


def weights(store, record):
    return store.root / "students" / f"{record.student['sha256']}.safetensors"


def test_the_recorded_student_holds_to_the_last_digit(runs):
    store, by = runs
    for verdict in guard(weights(store, by["kd"][0]), by["kd"][0], margin=0.0):
        assert verdict.now == pytest.approx(verdict.recorded, abs=1e-7)
        assert verdict.holds is (True if verdict.metric == "top1" else None)


def test_a_worse_student_is_exit_code_3(runs, capsys):
    store, by = runs
    code = main(["guard", str(weights(store, by["scratch"][0])), "--record", str(by["kd"][1]), "--json"])
    top1 = next(v for v in json.loads(capsys.readouterr().out) if v["metric"] == "top1")
    assert code == 3
    assert top1["holds"] is False and top1["worse_by"] > 0.02
    assert main(["guard", str(weights(store, by["scratch"][0])), "--record", str(by["kd"][1]), "--margin", "0.9"]) == 0


def test_a_metric_where_lower_is_better_is_judged_the_other_way_round(runs):
    store, by = runs
    [nll] = [v for v in guard(weights(store, by["scratch"][0]), by["kd"][0], margin=0.05, metrics=["nll"]) if v.metric == "nll"]
    assert nll.holds is False and nll.now > nll.recorded and nll.worse_by == pytest.approx(nll.now - nll.recorded)


def test_the_whole_interval_counts_and_not_the_mean():
    metric = Metric(name="m", unit="fraction", better="higher")
    then = Measurement.mean("m", [1.0] * 10)
    now = Measurement.mean("m", [1.0] * 9 + [0.0])  # 0.1 worse; one-sided 95% over 10 examples: 0.1 + 1.8331 * 0.1
    verdict = _compare(metric, then, now, 0.15, judged=True)
    assert verdict.worse_by == pytest.approx(0.1)
    assert verdict.at_most == pytest.approx(0.1 + 1.8331129 * 0.1, rel=1e-6)
    assert verdict.holds is False
    assert _compare(metric, then, now, 0.29, judged=True).holds is True


def test_without_examples_the_values_are_compared():
    metric = Metric(name="m", unit="x", better="lower")
    assert _compare(metric, Measurement("m", 1.0, 5), Measurement("m", 1.2, 5), 0.1, judged=True).holds is False
    assert _compare(metric, Measurement("m", 1.0, 5), Measurement("m", 0.5, 5), 0.1, judged=True).holds is True


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    store, by = runs
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no student")
    for student, record in ((junk, by["kd"][1]), (tmp_path / "absent", by["kd"][1]), (weights(store, by["kd"][0]), junk)):
        assert main(["guard", str(student), "--record", str(record)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("distillbench: ")
    failed = dataclasses.replace(by["kd"][0], status="failed", measurements=())
    with pytest.raises(UserError, match="nothing to compare"):
        guard(weights(store, by["kd"][0]), failed, margin=0.1)
    metric = Metric(name="m", unit="x", better="higher")
    with pytest.raises(UserError, match="not the same split"):
        _compare(metric, Measurement.mean("m", [1.0]), Measurement.mean("m", [1.0, 0.0]), 0.1, judged=True)
