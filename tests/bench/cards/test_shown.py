"""Metrics without a direction: on the card, apart from what judges, and never primary."""

import dataclasses
import json

import pytest

from distillbench.cards import registry
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training
from distillbench.cards.reading import from_data, to_data
from distillbench.errors import UserError

TOP1 = Metric(name="top1", unit="fraction", better="higher")
NLL = Metric(name="nll", unit="nats", better="lower")
RATIO = Metric(name="ratio", unit="ratio", better=None, range=(0, None))


def suite(metrics=(TOP1, RATIO, NLL), primary="top1", judged=()):
    setting = Setting(
        tier="analytic",
        summary="",
        budget=Budget(student_examples=1),
        training=Training(batch_size=1, optimizer="sgd", learning_rate=0.1),
        metrics=judged,
    )
    return SuiteCard(
        slug="s",
        version=1,
        problem="p",
        title="t",
        metrics=metrics,
        primary=primary,
        controls=(),
        settings={"base": setting, "other": setting},
    )


def test_they_stand_apart_from_what_is_judged_and_are_found_by_name():
    card = suite()
    assert (tuple(card.metrics), tuple(card.shown)) == ((TOP1, NLL), (RATIO,))
    assert card.metric("ratio") is RATIO
    with pytest.raises(UserError, match="did you mean 'ratio'"):
        card.metric("rati")


def test_a_setting_judges_what_it_did_and_shows_them_all():
    card = suite(judged=("nll",))
    for at in (card.at("base"), dataclasses.replace(card, settings={"base": card.settings["base"]}).at("base")):
        assert (at.primary, tuple(at.metrics), tuple(at.shown)) == ("nll", (NLL,), (RATIO,))
    everything = suite().at("base")
    assert tuple(everything.metrics) == (TOP1, NLL)


def test_they_survive_json_and_a_card_without_them_keeps_its_text():
    card = suite()
    assert from_data(json.loads(json.dumps(to_data(card)))) == card
    assert "shown" not in to_data(suite((TOP1, NLL)))


@pytest.mark.parametrize("fields", [{"primary": "ratio"}, {"judged": ("ratio",)}, {"judged": ("top1", "ratio")}])
def test_nothing_is_judged_by_one(fields):
    with pytest.raises(ValueError, match=r"metric ratio has no direction \(better=None\): it is shown"):
        suite(**fields)


@pytest.mark.parametrize("shown", [3, {"_": "Metric", "name": "x"}, {"_": "Metrik"}])
def test_odd_ones_in_a_record_are_one_line(shown):
    with pytest.raises(UserError, match=r"does not fit this version|unknown card class"):
        from_data({**to_data(suite()), "shown": shown})


def test_the_published_settings_of_generators_judge_by_what_they_did():
    card = registry.suite_card(registry.find("suite", "image-generation"))
    assert {m.name for m in card.shown} == {"spread_ratio", "diversity", "class_accuracy", "closer_to_training"}
    judged = {name: [m.name for m in card.at(name).metrics] for name in ("gaussians", "digits")}
    assert judged == {
        "gaussians": ["mmd2", "sliced_wasserstein", "spread_error", "between_modes", "coverage", "nfe"],
        "digits": ["fd_digits_cnn", "kid_digits_cnn", "precision", "recall", "diversity_error", "copied_fraction", "nfe"],
    }
