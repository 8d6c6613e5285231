"""What is said of a method, from its records: means, comparisons with the yardsticks of the card, and no gain where there is none."""

from __future__ import annotations

import argparse
import json
import statistics

import pytest

from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.leaderboard import commands
from distillbench.leaderboard.api import load
from distillbench.leaderboard.measured import measured
from distillbench.leaderboard.table import boards

BASE = [0.50, 0.52, 0.51, 0.53, 0.49]


def above(by: float, noise: float = 0.001) -> list[float]:
    return [v + by + noise * (-1) ** i for i, v in enumerate(BASE)]


def seen(make, method: list[float], suite=None, **controls: list[float]):
    """What is measured of ``m`` with these scores beside ``controls``."""
    judge = suite or make.suite(controls=tuple(controls))
    records = [r for slug, scores in controls.items() for r in make.runs(make.card(slug), judge, scores)]
    found, bad = boards([*records, *make.runs(make.card("m"), judge, method)])
    assert not bad
    [one] = measured(found, "classification", "m")
    return one


def test_mean_deviation_and_paired_differences_are_those_of_the_scores(make):
    scores = above(0.1)
    one = seen(make, scores, scratch=BASE, teacher=above(0.4), pseudo_label=above(0.05))
    assert (one.seeds, one.mean, one.deviation) == (5, pytest.approx(statistics.fmean(scores)), pytest.approx(statistics.stdev(scores)))
    assert [(a.control, a.strongest, a.outcome) for a in one.against] == [("scratch", False, "better"), ("pseudo_label", True, "better")]
    first = one.against[0].difference
    assert first.estimate == pytest.approx(statistics.fmean(a - b for a, b in zip(scores, BASE, strict=True)))
    assert first.low > 0.09 and "better than scratch by 0.1" in one.text and "gains nothing" not in one.text


def test_no_gain_is_said(make):
    noise = [0.49, 0.55, 0.50, 0.54, 0.48]
    one = seen(make, noise, scratch=BASE, teacher=above(0.4), pseudo_label=above(0.2))
    assert [a.outcome for a in one.against] == ["not separated", "worse"]
    assert "It gains nothing over pseudo_label. It gains nothing over scratch that its seeds can show." in one.text
    assert "worse than pseudo_label, the strongest control, by 0.1" in one.text and "not separated from scratch: +0.002" in one.text


def test_lower_is_better_where_the_metric_says_so(make):
    judge = make.suite(controls=("scratch",), primary="nll")
    one = seen(make, above(-0.1), judge, scratch=BASE)
    [against] = one.against
    assert against.strongest and against.outcome == "better" and against.difference.estimate > 0


def test_the_strongest_is_the_best_scored_of_those_that_the_card_names(make):
    controls = {"scratch": BASE, "other": above(0.2), "pseudo_label": above(0.1), "teacher": above(0.4)}
    judge = make.suite(controls=tuple(controls))
    assert seen(make, above(0.3), judge, **controls).against[1].control == "other"
    judge = make.suite(controls=tuple(controls), strongest=("scratch", "pseudo_label"))
    assert seen(make, above(0.3), judge, **controls).against[1].control == "pseudo_label"


def test_floor_and_ceiling_are_the_cards_and_no_name_is_known(make):
    controls = {"random": BASE, "whole": above(0.4)}
    judge = make.suite(controls=tuple(controls), floor="random", ceiling="whole", strongest=("random",))
    one = seen(make, above(0.1), judge, **controls)
    assert [(a.control, a.strongest) for a in one.against] == [("random", True)]
    assert one.row.gap is not None and one.row.gap.estimate == pytest.approx(0.25, abs=0.01)
    nameless = seen(make, above(0.1), make.suite(controls=("random",)), random=BASE)
    assert nameless.row.gap_reason == "the suite does not name both a floor and a ceiling"


def test_what_cannot_be_compared_says_why(make):
    judge = make.suite()
    costly = make.runs(make.card("m"), judge, above(0.1), status="over_budget", reason="too much")
    found, _ = boards([*make.runs(make.card("scratch"), judge, BASE), *costly])
    [one] = measured(found, "classification", "m")
    assert [a.outcome for a in one.against] == ["undecided"] and "not at equal cost: m over budget" in one.text
    failed = [make.record(make.card("m"), judge, 0, None, status="failed", reason="out of memory")]
    found, _ = boards([*make.runs(make.card("scratch"), judge, BASE), *failed])
    [one] = measured(found, "classification", "m")
    assert (one.mean, one.against, one.text) == (None, (), "no score: seed 0 failed: out of memory")
    alone, _ = boards(make.runs(make.card("m"), judge, [0.5]))
    [one] = measured(alone, "classification", "m")
    assert one.text == "top1 0.5 over 1 seed."


def test_a_control_is_no_contestant_and_defaults_come_first(make):
    found, _ = boards(make.full_board())
    assert measured(found, "classification", "pseudo_label")[0].against == ()
    assert measured(found, "classification", "kd")[0].row.name == "kd"
    assert measured(found, "classification", "absent") == () == measured(found, "generation", "kd")


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    commands.add(parser.add_subparsers())
    args = parser.parse_args(["board", "method", *map(str, words)])
    return args.call(args)


def test_the_command_says_it_and_has_json(make, tmp_path, capsys):
    folder = make.write(tmp_path / "records", make.full_board())
    assert run("kd", "--records", folder) == 0
    first, line, notes = capsys.readouterr().out.splitlines()
    assert first == "classification/kd version 1, Knowledge distillation: Distilling the knowledge in a neural network (2015)"
    assert line.startswith("image-classification/digits\ttop1 0.9") and notes == "The temperature was chosen on the tune split."
    run("classification/kd", "--records", folder, "--json")
    data = json.loads(capsys.readouterr().out)
    [track] = data["tracks"]
    assert (data["method"], track["seeds"], [a["control"] for a in track["against"]]) == ("classification/kd", 5, ["scratch"])
    assert set(track["against"][0]) == {"control", "strongest", "difference", "low", "high", "outcome", "note"}
    with pytest.raises(UserError, match="unknown method with a record 'kdd'; did you mean 'kd'"):
        run("kdd", "--records", folder)
    with pytest.raises(UserError, match="several problems have a method called 'scratch': say classification/scratch or"):
        run("scratch")


def test_every_published_method_is_measured_on_its_tracks():
    found = load([], pytest.fail)
    for entry in registry.methods().values():
        card = registry.method_card(entry)
        said = measured(found, card.problem, card.slug)
        assert said and all(m.mean is not None and m.seeds >= 3 for m in said), entry.key
        control = said[0].row.control or card.control
        assert all(bool(m.against) is not control and sum(a.strongest for a in m.against) == (not control) for m in said), entry.key
