"""What is on a board, in which order, and what the claims come to."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random

import pytest

from distillbench.cards.card import Beats, Budget, Gains, Integer, Metric, Real, Reported
from distillbench.errors import UserError
from distillbench.identity import canonical, sha256
from distillbench.leaderboard import export
from distillbench.leaderboard.claims import verdicts
from distillbench.leaderboard.site import pages
from distillbench.leaderboard.table import boards, by_metric
from distillbench.runs.packing import open_up
from distillbench.runs.record import read_records
from distillbench.stats import mean_interval


def one(records):
    found, bad = boards(records)
    assert bad == []
    assert len(found) == 1
    return found[0]


def rows_of(board):
    return {r.name: r for r in board.rows}


@pytest.fixture
def full(make):
    return one(make.full_board())


def test_scores_are_means_over_seeds_with_the_t_interval(make):
    scores = [0.81, 0.83, 0.80, 0.84, 0.82]
    row = one(make.runs(make.card("kd"), make.suite(), scores)).rows[0]
    assert row.intervals["top1"] == mean_interval(scores)
    assert row.intervals["top1"].low == pytest.approx(0.82 - 2.776445105 * 0.0158113883 / 5**0.5)  # t table, 4 degrees of freedom
    assert row.cost["wall_seconds"] == 10.0


def test_ranks_count_the_significantly_better_and_ties_share(full):
    ranks = {r.name: r.rank for r in full.rows}
    assert ranks["dist"] == 1
    assert ranks["kd"] == ranks["lossy"] == ranks["kd (temperature=1)"] == 2
    assert [r.name for r in full.leaders] == ["dist"]


def test_controls_over_budget_failed_and_single_seeds_have_no_rank(make, full):
    rows = rows_of(full)
    assert all(rows[n].rank is None for n in ("scratch", "teacher", "pseudo_label", "greedy", "broken"))
    assert rows["greedy"].status == "over_budget"
    assert rows["greedy"].reason == "seeds 0, 1, 2, 3, 4 over budget: student_examples 20000 of 10000"
    assert rows["broken"].status == "failed"
    assert "out of memory" in rows["broken"].reason
    lone = one(make.runs(make.card("kd"), make.suite(), [0.9])).rows[0]
    assert (lone.rank, len(lone.seeds)) == (None, 1)


def test_one_seed_over_budget_takes_the_rank_of_the_row(make):
    judge, kd = make.suite(), make.card("kd")
    records = [*make.runs(kd, judge, [0.9, 0.91, 0.92]), make.record(kd, judge, 3, 0.99, status="over_budget", reason="late")]
    row = one(records).rows[0]
    assert (row.status, row.rank, row.reason) == ("over_budget", None, "seed 3 over budget: late")


def test_a_lower_is_better_metric_ranks_the_other_way(make):
    metrics = (Metric(name="fd", unit="squared distance", better="lower"),)
    judge = make.suite(metrics=metrics, primary="fd")
    board = one(make.runs(make.card("good"), judge, make.spread(2, sd=0.1)) + make.runs(make.card("poor"), judge, make.spread(9, sd=0.1)))
    assert [(r.name, r.rank) for r in board.rows] == [("good", 1), ("poor", 2)]


def test_equal_differences_of_one_image_are_no_lead(make):
    """Over 0/1 values the score has steps of 1/n; two methods one image apart on each of 3 seeds are tied."""
    judge = make.suite()
    coarse = make.runs(make.card("a"), judge, [0.90, 0.91, 0.92], n=100) + make.runs(make.card("b"), judge, [0.89, 0.90, 0.91], n=100)
    assert [r.rank for r in one(coarse).rows] == [1, 1]
    fine = make.runs(make.card("a"), judge, [0.90, 0.91, 0.92]) + make.runs(make.card("b"), judge, [0.89, 0.90, 0.91])
    assert [r.rank for r in one(fine).rows] == [1, 2]


def test_a_missing_seed_shows_and_the_rest_is_compared_on_shared_seeds(full):
    lossy = rows_of(full)["lossy"]
    assert lossy.seeds == (1, 2, 3, 4)
    assert full.seeds == (0, 1, 2, 3, 4)
    assert lossy.reason == "seed 0 failed: loss is not finite"
    assert export.frame(full).set_index("method").loc["lossy", ["seeds", "seeds_of"]].tolist() == [4, 5]


def test_the_newest_record_of_a_seed_counts_and_a_failure_before_it_stays_visible(make):
    judge, kd = make.suite(), make.card("kd")
    records = [
        make.record(kd, judge, 0, 0.5, created="2026-01-01T00:00:00Z"),
        make.record(kd, judge, 0, 0.7, created="2026-02-01T00:00:00Z"),
        make.record(kd, judge, 0, None, status="failed", reason="out of disk", created="2026-03-01T00:00:00Z"),
    ]
    row = one(records).rows[0]
    assert row.scores["top1"] == {0: 0.7}
    assert row.reason == "seed 0 failed: out of disk (run again since)"


def test_a_run_that_scored_something_else_is_a_seed_without_a_score(make):
    judge, kd = make.suite(), make.card("kd")
    row = one([*make.runs(kd, judge, [0.8, 0.9]), make.record(kd, judge, 2, {"nll": 0.3})]).rows[0]
    assert (row.seeds, row.reason) == ((0, 1), "seed 2 ok: top1 was not scored")


def test_gap_closed_and_its_refusals(make, full):
    rows = rows_of(full)
    low, high, mine = (rows[n].intervals["top1"].estimate for n in ("scratch", "teacher", "dist"))
    assert rows["dist"].gap.estimate == pytest.approx((mine - low) / (high - low))
    assert (rows["scratch"].gap, rows["scratch"].gap_reason) == (None, "an end of the gap itself")
    judge, kd = make.suite(), make.card("kd")
    alone = one(make.runs(kd, judge, make.spread(0.9))).rows[0]
    assert (alone.gap, alone.gap_reason) == (None, "no scored scratch on this board")
    same = [
        r for i, s in enumerate(("scratch", "teacher", "kd")) for r in make.runs(make.card(s), judge, make.spread(0.9, sd=0.05, salt=i))
    ]
    assert rows_of(one(same))["kd"].gap_reason == "scratch and teacher are not separated"


def test_two_hyperparameter_rows_and_two_files_are_told_apart(make, full):
    assert {"kd", "kd (temperature=1)"} <= set(rows_of(full))
    judge, kd = make.suite(), make.card("kd")
    names = {r.name for r in one(make.runs(kd, judge, [0.8, 0.9], loose="a" * 64) + make.runs(kd, judge, [0.8, 0.9], loose="b" * 64)).rows}
    assert names == {"kd @aaaaaaaa", "kd @bbbbbbbb"}


def test_tuning_trials_are_counted_and_never_scored(full):
    rows = rows_of(full)
    assert (rows["kd"].trials, rows["dist"].trials) == (2, 0)
    assert 900 not in full.seeds


def test_arenas_never_mix_and_the_newest_comes_first(make):
    old = make.suite()
    larger = {"digits": dataclasses.replace(old.settings["digits"], budget=Budget(student_examples=20_000))}
    new = make.suite(settings=("digits",), summary=old.summary)
    new = dataclasses.replace(new, settings=larger)
    records = make.runs(make.card("kd"), old, [0.8, 0.9], created="2025-01-01T00:00:00Z")
    records += make.runs(make.card("kd"), new, [0.9, 0.95], created="2026-01-01T00:00:00Z")
    found, bad = boards(records)
    assert bad == []
    assert [b.setting.budget.student_examples for b in found] == [20_000, 10_000]
    assert [len(b.rows) for b in found] == [1, 1]
    assert found[0].differs == ()
    assert found[1].differs == ("budget.student_examples 10000 (newest: 20000)",)


@pytest.mark.parametrize(
    ("scores", "outcome"), [([0.91, 0.92, 0.93], "reproduced"), ([0.71, 0.72, 0.73], "not reproduced"), ([0.75, 0.9, 0.81], "undecided")]
)
def test_beats(make, scores, outcome):
    judge = make.suite()
    board = one(make.runs(make.card("new", claims=(Beats("kd"),)), judge, scores) + make.runs(make.card("kd"), judge, [0.8, 0.812, 0.82]))
    (verdict,) = verdicts(board, rows_of(board)["new"])
    assert verdict.outcome == outcome
    assert verdict.measured.estimate == pytest.approx(sum(scores) / 3 - 0.8106666667)


def test_beats_in_a_lower_is_better_metric(make):
    judge = make.suite()
    mine = [
        make.record(make.card("new", claims=(Beats("kd", metric="nll"),)), judge, s, {"top1": 0.5, "nll": 0.1 + s / 100}) for s in range(3)
    ]
    board = one(mine + [make.record(make.card("kd"), judge, s, {"top1": 0.5, "nll": 0.3 + s / 90}) for s in range(3)])
    (verdict,) = verdicts(board, rows_of(board)["new"])
    assert verdict.outcome == "reproduced"
    assert verdict.measured.low > 0


def test_a_claim_against_a_variant_uses_the_defaults(make):
    """The claim is against kd as it is published, not against its weakest setting on the board."""
    judge, kd = make.suite(), make.card("kd")
    new = make.card("new", claims=(Beats("kd"),))
    records = make.runs(new, judge, make.spread(0.9, salt=1)) + make.runs(kd, judge, make.spread(0.95, salt=2))
    records += make.runs(kd, judge, make.spread(0.5, salt=3), temperature=9.0, created="2027-01-01T00:00:00Z")
    board = one(records)
    assert verdicts(board, rows_of(board)["new"])[0].outcome == "not reproduced"


def test_claims_are_not_decided_without_equal_cost_or_grounds(make):
    judge = make.suite()
    claims = (Beats("kd"), Beats("absent"), Beats("kd", metric="bleu"), Reported(suite=judge.slug, metric="top1", value=0.5, source="T"))
    fast = make.runs(make.card("new", claims=claims), judge, make.spread(0.9), status="over_budget")
    board = one(fast + make.runs(make.card("kd"), judge, make.spread(0.8)))
    outcomes = [v.outcome for v in verdicts(board, rows_of(board)["new"])]
    assert outcomes == ["undecided", "not measured here", "not measured here", "undecided"]


@pytest.mark.parametrize(
    ("claimed", "seeds", "outcome"),
    [(0.90, 5, "reproduced"), (0.905, 5, "reproduced"), (0.99, 5, "not reproduced"), (0.5, 5, "reproduced"), (0.9, 2, "undecided")],
)
def test_reported(make, claimed, seeds, outcome):
    claims = (Reported(suite="image-classification", metric="top1", value=claimed, source="Table 1"),)
    board = one(make.runs(make.card("kd", claims=claims), make.suite(), [0.89, 0.91, 0.90, 0.88, 0.92][:seeds]))
    (verdict,) = verdicts(board, board.rows[0])
    assert (verdict.outcome, verdict.reported) == (outcome, claimed)


def test_reported_elsewhere_is_not_measured_here(make):
    claims = (
        Reported(suite="imagenet-1k", metric="top1", value=0.7, source="Table 1"),
        Reported(suite="image-classification", setting="cifar100", metric="top1", value=0.7, source="Table 2"),
    )
    board = one(make.runs(make.card("kd", claims=claims), make.suite(), [0.8, 0.9, 0.85]))
    assert [(v.outcome, v.note) for v in verdicts(board, board.rows[0])] == [
        ("not measured here", "imagenet-1k"),
        ("not measured here", "image-classification/cifar100"),
    ]


def test_a_board_in_another_metric(full):
    board = by_metric(full, "nll")
    assert board.rows[0].name == "dist"  # lower is better
    assert rows_of(board)["dist"].gap.estimate != rows_of(full)["dist"].gap.estimate
    with pytest.raises(UserError, match="did you mean 'nll'"):
        by_metric(full, "nlll")


def test_a_record_that_fits_no_board_is_a_line_and_the_rest_stands(make):
    good = make.runs(make.card("kd"), make.suite(), [0.8, 0.9])
    spoiled = make.record(make.card("odd"), make.suite(), 0)
    spoiled.cards["method"]["slug"] = "../../outside"
    newer = make.record(make.card("newer"), make.suite(), 0)
    newer.cards["method"]["unheard_of"] = 1
    strange = make.record(make.card("kd"), make.suite(), 0, split="validation")
    found, bad = boards([*good, spoiled, newer, strange])
    assert [r.name for r in found[0].rows] == ["kd"]
    assert len(bad) == 3


def test_a_record_with_a_true_digest_and_an_empty_spec_is_a_line(make, tmp_path):
    make.write(tmp_path, make.runs(make.card("kd"), make.suite(), [{"top1": 0.8, "nll": 0.5}, {"top1": 0.9, "nll": 0.4}]))
    body = json.loads(open_up((tmp_path / "00000.record").read_bytes())) | {"identity": {}}
    del body["id"], body["digest"]
    (tmp_path / "empty.json").write_text(json.dumps({"id": sha256(canonical({})), "digest": sha256(canonical(body)), **body}))
    records, bad = read_records(tmp_path)
    assert len(records) == 2, bad
    assert len(bad) == 1
    assert "empty.json" in bad[0]


def test_csv_json_and_markdown_are_one_table(full):
    rows = json.loads(export.to_json(full))["rows"]
    lines = list(csv.DictReader(io.StringIO(export.to_csv(full))))
    table = [[c.strip() for c in line.strip("|").split(" | ")] for line in export.to_markdown(full).splitlines()]
    names = table[0]
    assert names == list(rows[0]) == list(lines[0]) == list(export.frame(full).columns)
    assert len(rows) == len(lines) == len(table) - 2 == len(full.rows)
    for data, line, cells in zip(rows, lines, table[2:], strict=True):
        for name, cell in zip(names, cells, strict=True):
            value = data[name]
            if value is None:
                assert line[name] == cell == ""
            elif isinstance(value, float):
                assert float(line[name]) == float(cell) == value
            else:
                assert line[name] == cell.replace("\\|", "|") == str(value)


def test_the_order_of_records_is_of_no_account(make):
    records = make.full_board()
    shuffled = random.Random(3).sample(records, len(records))
    assert boards(records) == boards(shuffled)


def test_markdown_cells_cannot_break_the_table(make):
    judge = make.suite()
    records = make.runs(make.card("kd"), judge, [0.8, 0.9])
    records.append(make.record(make.card("kd"), judge, 2, None, status="failed", reason="a | b\n<script>x</script>"))
    text = export.to_markdown(one(records))
    assert "seed 2 failed: a \\| b &lt;script&gt;x&lt;/script&gt;" in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(("two", "outcome"), [([0.91, 0.92, 0.93], "reproduced"), ([0.71, 0.72, 0.73], "not reproduced")])
def test_gains_compares_a_method_with_itself_at_another_value(make, two, outcome):
    judge = make.suite()
    few = make.card("few", claims=(Gains("steps", over=1),), hyperparameters={"steps": Integer(0), "rate": Real(1.0)})
    records = make.runs(few, judge, two) + make.runs(few, judge, [0.8, 0.81, 0.82], steps=1)
    records += make.runs(few, judge, [0.99, 0.98, 0.99], steps=1, rate=2.0)  # differs in more than the steps
    board = one(records)
    rows = rows_of(board)
    (verdict,) = verdicts(board, rows["few"])
    assert (verdict.outcome, verdict.claim) == (outcome, "beats itself with steps=1 in top1")
    assert verdict.measured.estimate == pytest.approx(sum(two) / 3 - 0.81)
    assert verdicts(board, rows["few (steps=1)"])[0].outcome == "not measured here"
    alone = one(make.runs(few, judge, two))
    assert verdicts(alone, rows_of(alone)["few"])[0].note == "no scored few with steps=1 on this board"


def test_distances_are_ranked_by_their_ratios(make):
    """A failed method's seeds scatter as widely as it is bad; that must not let it share the first rank."""
    bad = [98.0, 31.0, 50.0, 87.0, 58.0]
    found = {}
    for limits in ((0, None), None):
        judge = make.suite(metrics=(Metric(name="fd", unit="distance", better="lower", range=limits),), primary="fd")
        records = [r for i in range(9) for r in make.runs(make.card(f"good{i}"), judge, make.spread(0.5 + i / 100, salt=i))]
        found[limits] = rows_of(one(records + make.runs(make.card("bad"), judge, bad)))["bad"].rank
    assert found == {(0, None): 10, None: 1}


def test_a_mean_below_a_metrics_level_is_said_wherever_the_row_is_shown(make):
    first, second = make.suite().metrics
    judge = make.suite(metrics=(first, dataclasses.replace(second, name="speed", better="higher", below=(1.0, "slower than its target"))))
    records = [
        make.record(make.card(slug), judge, seed, {"top1": 0.8, "speed": speed})
        for slug, speeds in (("kd", (0.4, 0.45)), ("dist", (1.2, 0.9)))
        for seed, speed in enumerate(speeds)
    ]
    board = one(records)
    rows = rows_of(board)
    assert rows["kd"].reason == "slower than its target (speed 0.425)" and rows["kd"].status == "ok"
    assert rows["dist"].reason == ""
    assert export.to_markdown(board).count("slower than its target") == export.to_csv(board).count("slower than its target") == 1
    assert pages([board])["tracks/image-classification/digits.html"].count("slower than its target") == 1
    unmarked = one([make.record(make.card("kd"), make.suite(), 0, {"top1": 0.8, "nll": 0.4})])
    assert unmarked.rows[0].marks == ()
