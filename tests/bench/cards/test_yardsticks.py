"""A suite's card names its yardsticks; a card of before names none and has the ones that every suite had."""

import dataclasses
import json

import pytest

from distillbench.cards import registry
from distillbench.cards.card import SuiteCard
from distillbench.cards.reading import from_data, to_data
from distillbench.errors import UserError


def suite(controls=("scratch", "other", "teacher"), **fields):
    return SuiteCard(slug="s", version=1, problem="p", title="t", metrics=(), primary="m", controls=controls, settings={}, **fields)


def test_they_are_what_the_card_says():
    card = suite(("random", "whole", "herding"), floor="random", ceiling="whole", strongest=("herding",))
    assert (card.floor, card.ceiling, card.strongest) == ("random", "whole", ("herding",))
    assert from_data(json.loads(json.dumps(to_data(card)))) == card


def test_a_card_of_an_older_record_has_those_that_all_suites_had():
    data = {k: v for k, v in to_data(suite()).items() if k not in ("floor", "ceiling", "strongest", "accepts")}
    card = from_data(data)
    assert (card.floor, card.ceiling, card.strongest) == ("scratch", "teacher", ("scratch", "other"))
    assert card == suite() == suite(floor="scratch", ceiling="teacher", strongest=("scratch", "other"))


def test_a_suite_without_such_controls_names_none():
    card = suite(("random",))
    assert (card.floor, card.ceiling, card.strongest) == ("", "", ("random",))
    assert (suite(()).floor, suite(()).strongest) == ("", ())


@pytest.mark.parametrize("fields", [{"floor": "kd"}, {"ceiling": "kd"}, {"strongest": ("scratch", "kd")}, {"strongest": "scratch"}])
def test_one_that_is_no_control_is_refused(fields):
    with pytest.raises(ValueError, match=r"a yardstick is one of the controls \(scratch, other, teacher\)"):
        suite(**fields)
    with pytest.raises(UserError, match="does not fit this version"):
        from_data({**to_data(suite()), **fields})


def test_every_installed_suite_names_all_three():
    for entry in registry.suites().values():
        text = entry.path.read_text()
        card = registry.suite_card(entry)
        assert card.floor and card.ceiling and card.strongest and card.ceiling not in card.strongest
        assert all(f"{name}=" in text for name in ("floor", "ceiling", "strongest")), entry.slug


def test_kinds_are_its_own_and_those_it_accepts():
    assert suite().kinds == ("p",)
    assert dataclasses.replace(suite(), accepts=("classification",)).kinds == ("p", "classification")
    with pytest.raises(ValueError, match="write a list of kinds"):
        suite(accepts="classification")


def test_what_was_measured_is_no_part_of_a_card_and_older_records_still_have_it():
    data = to_data(registry.method_card(registry.find("method", "kd")))
    assert "results" not in data
    assert from_data({**data, "results": "Top-1 0.9"}) == from_data(data)
    with pytest.raises(UserError, match="unexpected keyword argument 'result'"):
        from_data({**data, "result": "Top-1 0.9"})
