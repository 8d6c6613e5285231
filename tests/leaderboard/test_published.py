"""The published records: whole, made from a clean commit, every method and control of their tracks, with the seeds promised."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from distillbench.cards import registry
from distillbench.runs.record import Record, read_records

FOLDER = Path(__file__).resolve().parents[2] / "leaderboard" / "records"
# Not yet run there: minutes per seed, and not written for drafts.
NOT_ON_SMOLLM2 = {"alm", "minillm", "miniplm"}
TRACKS = {  # the kind of problem, and the seeds that every method of it has
    **{f"image-classification/{t}": ("classification", 5) for t in ("blobs", "digits", "digits-scarce", "digits-tiny")},
    **{f"image-generation/{t}": ("image-generation", 5) for t in ("gaussians", "digits")},
    **{f"{t}/markov": ("language-modeling", 5) for t in ("language-modeling", "speculative")},
    "speculative/smollm2": ("language-modeling", 3),
}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found, bad = read_records(FOLDER)
    assert not bad
    return found


def test_every_method_and_control_has_its_seeds(records):
    seeds = defaultdict(set)
    for record in records:
        if record.status == "ok":
            seeds[record.track, record.slug].add(record.seed)
    for track, (problem, least) in TRACKS.items():
        for entry in registry.methods().values():
            absent = track == "speculative/smollm2" and entry.slug in NOT_ON_SMOLLM2
            if registry.method_card(entry).problem == problem and not absent:
                assert len(seeds[track, entry.slug]) >= least, (track, entry.slug)


def test_they_name_a_clean_commit(records):
    assert all(r.environment["commit"] and r.environment["dirty"] is False for r in records)


def test_they_spent_the_same_budget(records):
    for record in records:
        used = record.cost["total"]["student_examples"]
        assert used <= record.setting.budget.student_examples
        if record.slug not in ("teacher", "teacher_one_step", "undistilled", "score_sde"):
            assert used > 0.9 * record.setting.budget.student_examples, (record.track, record.slug)
