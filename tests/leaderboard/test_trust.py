"""Levels of trust: kept beside the records, the least of a row's, and shown."""

import dataclasses
import html
import json

import pytest

from distillbench.errors import UserError
from distillbench.leaderboard import trust
from distillbench.leaderboard.export import frame
from distillbench.leaderboard.site import build
from distillbench.leaderboard.table import boards
from distillbench.runs.record import Record


@pytest.fixture
def records(make):
    """Records as they are read from files: with their digests."""
    return [Record.from_bytes(r.to_bytes()) for r in make.full_board(make.suite())]


def digests(records, slug):
    return [r.digest for r in records if r.slug == slug]


def test_a_row_is_trusted_as_far_as_the_least_of_its_records(records, tmp_path):
    first, *others = digests(records, "kd")
    table = {first: "verified", **dict.fromkeys(others, "reproduced")}
    table |= dict.fromkeys(digests(records, "dist"), "reproduced") | {"another": "reproduced"}
    (tmp_path / trust.FILE).write_text(json.dumps({d: {"level": level, "by": "us", "on": "2026-11-28"} for d, level in table.items()}))
    [board] = trust.marked(boards(records)[0], trust.read([tmp_path, tmp_path / "without"]))
    levels = {row.name: row.trust for row in board.rows}
    assert levels["kd"] == "verified" and levels["dist"] == "reproduced"
    assert set(levels.values()) == set(trust.LEVELS) and levels["scratch"] == "self-reported"
    assert dict(zip(frame(board)["method"], frame(board)["trust"], strict=True)) == levels
    build([board], tmp_path / "site")
    page = next((tmp_path / "site").rglob("digits.html")).read_text()
    page = html.unescape(page)
    for level, (mark, what) in trust.LEVELS.items():
        assert f'aria-label="{level}"' in page and mark in page and what in page


def test_records_bring_no_level_of_their_own(records):
    boasting = [dataclasses.replace(r, environment={**r.environment, "trust": "reproduced"}) for r in records]
    [board] = trust.marked(boards([Record.from_bytes(r.to_bytes()) for r in boasting])[0], {})
    assert {row.trust for row in board.rows} == {"self-reported"}


@pytest.mark.parametrize("content", ["[]", "{", '{"a": {}}', '{"a": {"level": "certain"}}', '{"a": 1}', "[" * 10**5])
def test_an_odd_table_is_one_line(tmp_path, content):
    (tmp_path / trust.FILE).write_text(content)
    with pytest.raises(UserError, match=r"trust\.json: no table") as error:
        trust.read([tmp_path])
    assert "\n" not in str(error.value)


def test_passes_are_said(make):
    judge = make.suite()
    cards = (make.card("scratch"), make.card("teacher"), make.card("mine", passes=2))
    [board] = boards([make.record(c, judge, s) for c in cards for s in range(2)])[0]
    assert {row.name: row.reason for row in board.rows} == {"scratch": "", "teacher": "", "mine": "2 passes per example"}


@pytest.mark.parametrize(("oracle", "said"), [({}, False), ({"oracle": "ab" * 32}, False), ({"oracle": None}, True)])
def test_an_objective_without_an_independent_oracle_is_unproven(make, oracle, said):
    judge = make.suite()
    card = make.card("mine", objective="loss", equations={"loss": "L"})
    made = [make.record(c, judge, s) for c in (make.card("scratch"), make.card("teacher"), card) for s in range(2)]
    [board] = boards([dataclasses.replace(r, code={**r.code, **oracle}) for r in made])[0]
    assert {row.name: "unproven" in row.reason for row in board.rows} == {"scratch": False, "teacher": False, "mine": said}
