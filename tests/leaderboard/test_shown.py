"""A metric without a direction on a board: shown beside the others, ranked nowhere, deciding no claim."""

import dataclasses
import json

import pytest

from distillbench.cards.card import Beats, Gains, Metric, Reported
from distillbench.leaderboard import commands, export
from distillbench.leaderboard.claims import verdicts
from distillbench.leaderboard.site import pages
from distillbench.leaderboard.table import boards, by_metric

RATIO = Metric(name="ratio", unit="ratio", better=None, range=(0, None), meaning="1 is right")
UNUSED = Metric(name="unused", unit="ratio", better=None)
TRACK = "image-classification/digits"
CLAIMS = (
    Beats("dist", metric="ratio"),
    Gains("temperature", over=1.0, metric="ratio"),
    Reported(suite="image-classification", metric="ratio", value=1.0, source="Table 1"),
    Reported(suite="elsewhere", metric="ratio", value=1.0, source="Table 1"),
    Beats("dist"),
)


@pytest.fixture(scope="module")
def records(make):
    judge = make.suite(metrics=(*make.suite().metrics, RATIO, UNUSED))
    methods = {"scratch": (0.5, 0.2), "teacher": (0.95, 1.0), "kd": (0.9, 3.0), "dist": (0.8, 0.9)}
    return [
        make.record(make.card(slug, claims=CLAIMS), judge, seed, {"top1": top1 + seed / 500, "nll": 0.3, "ratio": ratio + seed / 500})
        for slug, (top1, ratio) in methods.items()
        for seed in range(5)
    ]


@pytest.fixture(scope="module")
def board(records):
    (found,), bad = boards(records)
    assert bad == []
    return found


def test_it_is_shown_and_one_that_nobody_scored_is_not(board):
    assert [m.name for m in board.others] == ["nll", "ratio"]
    assert board.rows[0].intervals["ratio"].estimate == pytest.approx(3.004)
    table = export.frame(board)
    assert table["metrics.ratio"][0] == pytest.approx(3.004) and "metrics.unused" not in table
    site = pages([board])
    page = next(text for path, text in site.items() if path == f"tracks/{TRACK}.html")
    assert "ratio (ratio)" in page and "3.004" in page and "unused" not in page
    about = site["suites/image-classification.html"]
    assert "ratio, shown, never ranked: 1 is right" in about and "None" not in about


def test_judged_in_it_nothing_is_ranked_and_the_order_stays(board):
    shown = by_metric(board, "ratio")
    assert [r.name for r in shown.rows] == [r.name for r in board.rows]
    assert {r.rank for r in shown.rows} == {None} and {r.gap for r in shown.rows} == {None}
    assert shown.rows[0].gap_reason == "neither more nor less ratio is better"
    assert {r.rank for r in board.rows} == {1, 2, None}


def test_no_claim_is_decided_by_it(board):
    row = next(r for r in board.rows if r.name == "kd")
    beats, gains, reported, elsewhere, primary = verdicts(board, row)
    for verdict in (beats, gains, reported):
        assert (verdict.outcome, verdict.note) == ("undecided", "neither more nor less ratio is better")
    assert beats.measured is None and reported.measured == row.intervals["ratio"]
    assert elsewhere.outcome == "not measured here"
    assert primary.outcome == "reproduced"


def test_show_says_so_in_one_line(make, records, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    commands.add(parser.add_subparsers())
    folder = make.write(tmp_path / "r", records)
    words = ["board", "show", TRACK, "--metric", "ratio", "--records", str(folder)]
    args = parser.parse_args(words)
    assert args.call(args) == 0
    out, err = capsys.readouterr()
    assert err == "ratio: neither more nor less is better, so nothing is ranked; rows in the order of top1\n"
    first = out.splitlines()[1].split("\t")
    assert first[0] == "" and "None" not in out
    args = parser.parse_args([*words, "--json"])
    assert args.call(args) == 0
    assert {r["rank"] for r in json.loads(capsys.readouterr().out)} == {None}


def test_a_person_reads_no_direction(board, capsys):
    commands._print_rich(by_metric(board, "ratio"), older=0)
    out = capsys.readouterr().out
    assert "ratio in ratio, 95% intervals over seeds" in out and "better" not in out


def test_a_record_that_hides_an_odd_metric_there_costs_its_own_row(records):
    cards = records[0].cards
    odd = {**cards["suite"], "shown": [{"name": "x"}]}
    found, bad = boards([dataclasses.replace(records[0], cards={**cards, "suite": odd})])
    assert found == [] and len(bad) == 1 and "suite card is not whole" in bad[0]
