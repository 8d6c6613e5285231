"""Spec-Bench from the user's files to a record, with the real judge and clock on tiny Llamas."""

import dataclasses

import pytest

import distillbench.suites.speculative as suite
from distillbench.cards import registry
from distillbench.cli.doctor import examine
from distillbench.errors import UserError
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.suites.speculative import spec_bench
from tests.suites.language_modeling.fixtures import sentences, tokenizer, write_lines, write_llama

TRACK = "speculative/spec-bench"
SMALL = {"max_prompt": 120, "length": 6, "gamma": 2, "timed": 1, "tuning": 3, "validation": 2}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The user's folder, and the card's setting cut down to its size."""
    folder = tmp_path / "data/spec-bench"
    categories = [c for subset in spec_bench.SUBSETS.values() for c in subset]
    rows = [{"question_id": 81 + i, "category": c, "turns": [s]} for i, (c, s) in enumerate(zip(categories, sentences(13), strict=True))]
    write_lines(folder / "question.jsonl", rows)
    write_lines(folder / "train.jsonl", [{"prompt": p, "response": p[::-1]} for p in sentences(15, seed=2)])
    words = tokenizer(beginning=True)
    write_llama(folder / "vicuna-7b-v1.3", 0, len(words) + 3, width=24, words=words)
    write_llama(folder / "vicuna-68m", 1, len(words) + 3, words=words)
    real = suite.CARD.settings["spec-bench"]
    training = dataclasses.replace(real.training, batch_size=4)
    small = dataclasses.replace(real, options={**real.options, **SMALL}, training=training)
    card = dataclasses.replace(suite.CARD, settings={**suite.CARD.settings, "spec-bench": small})
    monkeypatch.setattr(suite, "CARD", card)
    monkeypatch.setattr(registry, "suite_card", lambda e: card if e.slug == "speculative" else e.card)
    return tmp_path / "data"


def test_a_run_goes_from_the_users_files_to_a_record(data, tmp_path):
    specs = plan(TRACK, ["seqkd"], [0], data=str(data), budget={"student_examples": 8})
    values = {}
    for spec in specs:
        record = execute(spec, Store(tmp_path / "runs"))
        assert record.status == "ok", (spec.method, record.reason)
        values[spec.method] = {m.metric: m.value for m in record.measurements}
        assert {f"acceptance_{name}" for name in spec_bench.SUBSETS} < set(values[spec.method])
        assert set(record.identity["setting"]["digests"]) == {"data", "teacher", "student", "questions"}
    assert set(values) == {"scratch", "undistilled", "teacher", "seqkd"}
    # a target that proposes to itself is always accepted, on every subset
    assert all(values["teacher"][f"acceptance_{name}"] == pytest.approx(1, abs=1e-5) for name in spec_bench.SUBSETS)
    assert values["undistilled"]["acceptance"] < 0.999


def test_tuning_gives_a_record_too(data, tmp_path):
    spec = plan(TRACK, ["undistilled"], [0], data=str(data), split="tune", controls=False)[0]
    record = execute(spec, Store(tmp_path / "runs"))
    assert record.status == "ok", record.reason
    assert {m.metric: m.n for m in record.measurements}["acceptance"] == 3


def test_what_is_missing_is_said_at_planning_time(data):
    (data / "spec-bench/question.jsonl").unlink()
    with pytest.raises(UserError, match=r"question\.jsonl: not found"):
        plan(TRACK, ["seqkd"], [0], data=str(data))
    assert any("question.jsonl" in f.remedy for f in examine(str(data)) if f.what == TRACK)
