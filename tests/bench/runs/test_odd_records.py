"""Whole records that no run can have left: each is refused in one line where it is read, and costs no other record anything."""

import copy
import dataclasses
import math

import pytest

from distillbench.cards.card import Metric
from distillbench.cards.reading import to_data
from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.leaderboard.table import boards
from distillbench.runs import identities
from distillbench.runs.packing import pack
from distillbench.runs.record import Measurement, Record, read_records
from tests.bench.runs.test_record import IDENTITY, METHOD, SUITE, record

RANGED = dataclasses.replace(SUITE, metrics=(Metric(name="top1", unit="fraction", better="higher", range=(0, 1)),))
CARDS = {"method": to_data(METHOD), "suite": to_data(RANGED)}


def seeds(**changes):
    identity = copy.deepcopy(IDENTITY)
    identity["seeds"].update(changes)
    return identity


def pinned(digest):
    identity = copy.deepcopy(IDENTITY)
    identity["setting"]["digests"] = {"data": digest}
    return identity


ODD = {
    "an accuracy of 7": ({"measurements": (Measurement("top1", 7.0, 3),)}, r"top1 = 7\.0 is outside its range, 0 to 1"),
    "below its range": ({"measurements": (Measurement("top1", -0.1, 3),)}, r"top1 = -0\.1 is outside its range"),
    "a value that is a text": ({"measurements": (Measurement("top1", "0.9", 3),)}, "top1 is '0.9', no finite number"),
    "a value that is true": ({"measurements": (Measurement("top1", True, 3),)}, "top1 is True, no finite number"),
    "no examples": ({"measurements": (Measurement("top1", 0.5, 0),)}, "top1 stands for 0 examples"),
    "a part of an example": ({"measurements": (Measurement("top1", 0.5, 1.5),)}, "top1 stands for 1.5 examples"),
    "other examples than it says": (
        {"measurements": (dataclasses.replace(Measurement.mean("top1", [1.0, 0.0]), n=3),)},
        "top1 stands for 3 examples and carries 2",
    ),
    "another value than the mean of its examples": (
        {"measurements": (dataclasses.replace(Measurement.mean("top1", [1.0, 0.0, 1.0]), value=0.75),)},
        r"top1 = 0.75 is not the mean of its examples, which is 0.6666667",
    ),
    "one in the seventh digit off": (
        {"measurements": (dataclasses.replace(Measurement.mean("top1", [0.25, 0.75]), value=0.500002),)},
        "top1 = 0.500002 is not the mean of its examples, which is 0.5",
    ),
    "examples that are no numbers": ({"measurements": (Measurement("top1", 0.5, 1, pack([math.nan])),)}, "top1 = 0.5 is not the mean"),
    "other data than its card pins": ({"identity": pinned("cd" * 32)}, r"its digests \(data\) are not those that its card pins"),
    "a package that is a list": ({"identity": {**IDENTITY, "method": {**IDENTITY["method"], "distribution": ["d"]}}}, "is no text"),
    "a metric twice": ({"measurements": (Measurement("top1", 0.5, 1), Measurement("top1", 0.9, 1))}, "it measures top1 twice"),
    "ok and not scored": ({"measurements": ()}, "it is ok, and top1 was not measured"),
    "a status of its own": ({"status": "winner"}, "its status is 'winner', which is none of ok, failed"),
    "a reason that is a number": ({"status": "failed", "measurements": (), "reason": 3}, "its reason is no text"),
    "another seed's evaluation": ({"identity": seeds(evaluation=1)}, "its seeds by role are not those of seed 0"),
    "from the future": ({"created": "2999-01-01T00:00:00+00:00"}, "2999.*, which is not yet"),
    "without a time zone": ({"created": "2026-01-01T00:00:00"}, "which is no date"),
    "a date that is none": ({"created": "yesterday"}, "which is no date"),
    "time that was given back": ({"cost": {"total": {"wall_seconds": -1}, "phases": {}}}, "its cost wall_seconds is -1"),
    "a cost that is a text": ({"cost": {"total": {"wall_seconds": "little"}, "phases": {}}}, "its cost wall_seconds is 'little'"),
    "a student without weights": ({"student": {"sha256": "../../etc/passwd"}}, "its student has no SHA-256"),
    "a loss curve of words": ({"trace": {"fit/kd": ["low"]}}, "its loss curve fit/kd is no list of numbers"),
}


def test_the_record_that_is_bent_is_whole():
    Record.from_bytes(record(cards=CARDS).to_bytes(), "here")


@pytest.mark.parametrize("what", ODD)
def test_what_no_run_can_have_left_is_one_line(what):
    changes, says = ODD[what]
    with pytest.raises(UserError, match=says) as caught:
        Record.from_bytes(record(cards=CARDS, **changes).to_bytes(), "here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_a_board_is_built_from_all_the_others(tmp_path):
    (tmp_path / "good.record").write_bytes(record(cards=CARDS).to_bytes())
    for i, (changes, _) in enumerate(ODD.values()):
        (tmp_path / f"odd{i}.record").write_bytes(record(cards=CARDS, **changes).to_bytes())
    records, bad = read_records(tmp_path)
    assert len(records) == 1 and len(bad) == len(ODD)
    [board], problems = boards(records)
    assert not problems and [r.name for r in board.rows] == ["m"]


@pytest.mark.parametrize("sources", [{"m": 3}, ["m"], {"m": None}])
def test_texts_that_are_none_are_one_line(sources):
    with pytest.raises(UserError, match="here: not a whole record"):
        Record.from_bytes(record(cards=CARDS, sources=sources).to_bytes(), "here")


def test_a_text_must_be_the_one_whose_digest_stands_beside_it():
    code = {"digest": "c0de", "fingerprint": None, "loose": {"mine": sha256(b"T = 2.0\n")}}
    Record.from_bytes(record(cards=CARDS, code=code, sources={"mine": "T = 2.0\n", "a helper": "any"}).to_bytes(), "here")
    with pytest.raises(UserError, match="its content does not match its digest"):
        Record.from_bytes(record(cards=CARDS, code=code, sources={"mine": "T = 3.0\n"}).to_bytes(), "here")


def test_a_value_computed_otherwise_is_still_the_mean_of_its_examples():
    thirds = [1 / 3, 1 / 7, 2 / 3]
    made = Measurement.of("top1", sum(thirds) / 3, thirds)  # examples keep seven digits, the value all of them
    read = Record.from_bytes(record(cards=CARDS, measurements=(made,)).to_bytes(), "here")
    assert read.measurements == (made,) and made.value != sum(made.per_example) / 3
    with pytest.raises(ValueError, match=r"top1 = 0\.4 is not the mean of its examples"):
        Measurement.of("top1", 0.4, thirds)


def test_a_trial_needs_its_primary_metric_alone():
    identity = {**IDENTITY, "split": "tune"}
    assert identities.arena_of(identity)["split"] == "tune"
    Record.from_bytes(record(cards=CARDS, identity=identity, measurements=(Measurement("top1", 0.5, 2),)).to_bytes(), "here")
