"""Node classification (a graph network teaches one that sees no edges) as somebody else's kind: run, record, board, checks."""

import pytest

from distillbench.cards import registry
from distillbench.checks import CHECKS, check_method
from distillbench.leaderboard.table import boards
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

TRACK = "node-graphs/csbm"
NOT_APPLICABLE = {
    "uskd": ("skipped", "uskd reads the second-to-last stage"),
    "mcmi": ("skipped", "a graph network answers about all 600 nodes of its graph at once, not about 64"),
}
METHODS = [e for _, e in sorted(registry.methods().items()) if e.card is not None and e.card.problem == "classification"]


@pytest.fixture(autouse=True)
def installed(outsider):
    outsider("node_classification")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda entry: entry.slug)
def test_every_classification_method_runs_on_nodes_or_says_why_it_does_not_apply(method, tmp_path):
    [spec] = plan(TRACK, [method.slug], [0], controls=False)
    record = execute(spec, Store(tmp_path))
    status, reason = NOT_APPLICABLE.get(method.slug, ("ok", ""))
    assert record.status == status and (record.reason or "").startswith(reason), record.reason
    if status == "ok":
        assert 0.45 < record.value("top1") < 0.9  # 0.25 by chance, 0.49 for scratch, 0.85 for the teacher


def test_records_of_nodes_make_a_board(tmp_path):
    store, methods = Store(tmp_path), ["glnn", "scratch", "teacher"]
    records = [execute(spec, store) for spec in plan(TRACK, methods, [0, 1], controls=False)]
    assert {r.status for r in records} == {"ok"}, {r.reason for r in records}
    [board], bad = boards(records)
    assert not bad and board.track == TRACK and {row.card.slug for row in board.rows} == set(methods)
    mean = {row.card.slug: row.intervals["top1"].estimate for row in board.rows}
    assert mean["scratch"] + 0.05 < mean["glnn"] < mean["teacher"] - 0.05
    assert [row.card.slug for row in board.rows if row.rank == 1] == ["glnn"]


@pytest.mark.slow
def test_the_checks_hold_for_a_method_of_nodes():
    results = check_method("glnn", track=TRACK)
    assert {r.name for r in results} == set(CHECKS)
    assert not [(r.name, r.message) for r in results if r.outcome == "failed"]
    skipped = {
        "temperature_scale",
        "hyperparameter_bounds",
        "token_padding",
        "averages",
        "arguments",
        "gains",
        "memory",
        "splits",
        "fresh_answers",
        "direction",
    }
    assert {r.name for r in results if r.outcome == "skipped"} <= skipped
