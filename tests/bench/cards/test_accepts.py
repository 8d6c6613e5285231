"""A suite of a kind of its own that runs another kind's methods, in a package of its own as an outsider writes it."""

import dataclasses

import pytest

from distillbench.cards import registry
from distillbench.checks import check_method
from distillbench.cli.main import main
from distillbench.errors import UserError
from distillbench.leaderboard.measured import measured
from distillbench.leaderboard.table import boards
from distillbench.runs import identities
from distillbench.runs.plan import plan
from distillbench.runs.record import Record
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

TRACK = "nodes/small"
SUITE = """
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training
from distillbench.suites.image_classification import SUITE as SUITE
from distillbench.suites.image_classification import blobs as blobs  # imported by name only, so its identity must be told

CARD = SuiteCard(
    slug="nodes",
    version=1,
    problem="node-classification",
    accepts=["classification"],
    title="Nodes of a graph",
    metrics=[Metric(name="top1", unit="fraction", better="higher", range=(0, 1))],
    primary="top1",
    controls=["untrained", "scratch", "teacher"],
    floor="untrained",
    ceiling="teacher",
    strongest=["untrained", "scratch"],
    settings={"small": Setting(
        tier="analytic",
        summary="a few",
        budget=Budget(student_examples=640),
        training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003),
        options={"classes": 5, "dimension": 8, "separation": 2.2, "labelled": 50, "train": 100, "tune": 50, "test": 200,
            "student": {"name": "mlp", "arguments": {"inputs": 8, "widths": [16], "outputs": 5}}},
    )},
)
"""
METHOD = """
from distillbench.cards.card import Card, Paper

CARD = Card(slug="{slug}", version=1, problem="node-classification", title="of its own", control={control})


def distill(problem, run):
    return run.export(problem.student)
"""
FILES = {
    "nodes/__init__.py": SUITE,
    "node_classification/untrained.py": METHOD.format(slug="untrained", control=True),
    "node_classification/kd.py": METHOD.format(slug="kd", control=False),
}


@pytest.fixture
def nodes(package):
    return package("graph_pkg", FILES, suites=True)


def planned(*methods, **options):
    return {s.method: s for s in plan(TRACK, methods, [0], **options)}


def test_all_are_its_own_methods_and_the_accepted_kinds_and_the_controls_of_both(nodes):
    specs = planned("all")
    theirs = {e.slug for e in registry.methods().values() if e.card.problem == "classification" and not e.card.control}
    assert set(specs) == {"untrained", "scratch", "teacher"} | theirs
    kinds = {name: spec.identity["method"].get("kind") for name, spec in specs.items()}
    foreign = {"slug": "classification", "version": identities.kind_version("classification")}
    assert kinds == {name: None if name in ("untrained", "kd") else foreign for name in specs}
    assert {s.identity["kind"]["slug"] for s in specs.values()} == {"node-classification"}


def test_its_own_of_one_slug_wins_and_the_other_goes_by_its_whole_name(nodes):
    assert planned("kd", controls=False)["kd"].cards["method"]["title"] == "of its own"
    assert list(planned("node-classification/kd", controls=False)) == ["kd"]
    other = planned("classification/kd", controls=False)["classification/kd"]
    assert other.cards["method"]["title"] == "Knowledge distillation"
    assert len({other.id, planned("kd", controls=False)["kd"].id}) == 2
    assert plan("image-classification/blobs", ["kd"], [0], controls=False)[0].cards["method"]["title"] == "Knowledge distillation"


def test_what_nobody_accepts_is_one_line(nodes):
    with pytest.raises(UserError, match="seqkd solves language-modeling, suite nodes asks for node-classification or classification"):
        planned("seqkd")
    with pytest.raises(
        UserError, match="untrained solves node-classification, suite image-classification asks for classification; it runs on"
    ):
        plan("image-classification/blobs", ["untrained"], [0])


def test_cards_fit_an_identity_of_an_accepted_kind_only(nodes):
    spec = planned("dkd", controls=False)["dkd"]
    card, suite = registry.method_card(registry.find("method", "dkd")), spec.suite_card
    assert identities.fits(spec.identity, card, suite, "small")
    assert not identities.fits(spec.identity, card, dataclasses.replace(suite, accepts=()), "small")
    assert not identities.fits(spec.identity, dataclasses.replace(card, problem="node-classification"), suite, "small")
    plain = {**spec.identity, "method": {k: v for k, v in spec.identity["method"].items() if k != "kind"}}
    assert not identities.fits(plain, card, suite, "small")


def test_the_methods_run_there_and_the_board_measures_them_from_its_floor(nodes, tmp_path):
    specs = plan(TRACK, ["dkd", "kd"], [0, 1])
    records = [Record.from_bytes(execute(spec, Store(tmp_path / "s")).to_bytes()) for spec in specs]
    assert {r.status for r in records} == {"ok"}, [(r.slug, r.reason) for r in records]
    [board], bad = boards(records)
    assert len(bad) == 2 and all(line.startswith(f"{TRACK}: kd seed ") and "and untrained seed " in line for line in bad)
    assert {r.name for r in board.rows if r.control} == {"untrained", "scratch", "teacher"}
    [seen] = measured([board], "classification", "dkd")
    assert [a.control for a in seen.against][:1] == ["untrained"]
    [own] = measured([board], "node-classification", "kd")
    assert own.against[0].difference.estimate == 0  # untrained too, by another name


def test_list_and_check_follow(nodes, capsys):
    assert main(["list", "suites"]) == 0
    assert "nodes/small\tnode-classification, classification\tanalytic\ta few" in capsys.readouterr().out
    assert check_method("kd", track=TRACK, only=["card"])[0].message.startswith("say where the method comes from")  # its own kd
    results = {r.name: r.outcome for r in check_method("dkd", track=TRACK, only=["card", "seeds"])}
    assert results == {"card": "passed", "seeds": "passed"}
