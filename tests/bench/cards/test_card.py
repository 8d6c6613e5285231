import dataclasses
import json

import pytest

from distillbench.assets import Asset
from distillbench.cards.card import (
    Beats,
    Budget,
    Card,
    Choice,
    Flag,
    Integer,
    Metric,
    Paper,
    Real,
    Reported,
    Setting,
    SuiteCard,
    Training,
)
from distillbench.cards.reading import from_data, read_card, resolve, to_data
from distillbench.errors import UserError
from distillbench.identity import canonical

HEAD = 'slug="x", version=1, problem="classification", title="X"'


@pytest.fixture
def card(tmp_path):
    def read(text):
        path = tmp_path / "x.py"
        path.write_text(text)
        return read_card(path)

    return read


def one_line(error):
    return "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_a_card_is_read_without_running_its_module(card, tmp_path):
    read = card(
        f"import nowhere_to_be_found\nCARD = Card({HEAD}, paper=Paper(title='T', year=2015, arxiv='1503.02531'), objective='f',"
        "hyperparameters={'t': Real(-4.0, ge=-5), 'n': Integer(3), 'c': Choice('a', ['a', 'b']), 'f': Flag(True)},"
        "claims=[Beats('kd'), Reported(suite='s', metric='m', value=0.5, source='Table 1')], deviations=['one', 'two'])\n"
        f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit"
    )
    assert read == Card(
        slug="x",
        version=1,
        problem="classification",
        title="X",
        paper=Paper(title="T", year=2015, arxiv="1503.02531"),
        objective="f",
        hyperparameters={"t": Real(-4.0, ge=-5), "n": Integer(3), "c": Choice("a", ("a", "b")), "f": Flag(True)},
        claims=(Beats("kd"), Reported(suite="s", metric="m", value=0.5, source="Table 1")),
        deviations=("one", "two"),
    )
    assert not (tmp_path / "ran").exists()
    assert read.objectives == ("f",)
    assert dataclasses.replace(read, objective=("f", "g")).objectives == ("f", "g")
    assert dataclasses.replace(read, objective=None).objectives == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "has no CARD"),
        ("CARD = Card(", "cannot be read as Python"),
        ("CARD = Card(\0)", "cannot be read as Python"),
        ("CARD = 3", "must be a Card or a SuiteCard"),
        ("CARD = Real(3.0)", "must be a Card or a SuiteCard"),
        ('CARD = Card(version=1, problem="p", title="t")', "slug"),
        (f"CARD = Card({HEAD}, colour=3)", "colour"),
        (f"CARD = Card({HEAD.replace('x', 'X', 1)})", "the slug 'X'"),
        ('CARD = Card(slug=3, version=1, problem="p", title="t")', "the slug 3"),
        ('CARD = Card(slug="../x", version=1, problem="p", title="t")', "the slug '../x'"),
        *((f'CARD = Card(slug="x", version={v}, problem="p", title="t")', "the version") for v in ("'1'", "0", "1.0", "True", "9" * 30)),
        (f"CARD = Card({HEAD}, notes=open('f').read())", "may only call"),
        (f"CARD = Card({HEAD}, notes=__import__('os').system('true'))", "may only call"),
        (f"CARD = Card({HEAD}, notes='a' + 'b')", "nothing may be computed"),
        (f"CARD = Card({HEAD}, notes=f'{{1}}')", "nothing may be computed"),
        (f"CARD = Card({HEAD}, notes=NAME)", "nothing may be computed"),
        (f"CARD = Card({HEAD}, deviations=[x for x in 'ab'])", "nothing may be computed"),
        (f"CARD = Card({HEAD}, deviations=[*['a']])", "nothing may be computed"),
        (f"CARD = Card({HEAD}, version=2 if 1 else 3)", "repeated|nothing may be computed|cannot be read"),
        (f"CARD = Card({HEAD}, notes={{1, 2}})", "no place in JSON"),
        (f"CARD = Card({HEAD}, notes={{[1]}})", "nothing may be computed"),
        (f"CARD = Card({HEAD}, notes=b'bytes')", "no place in JSON"),
        (f"CARD = Card({HEAD}, notes=1e999)", "no place in JSON"),
        (f"CARD = Card({HEAD}, notes=1 + 2j)", "no place in JSON"),
        (f"CARD = Card({HEAD}, equations={{**{{}}}})", r"no \*\* in it"),
        (f"CARD = Card({HEAD}, **{{'notes': 'hidden'}})", r"no \*\* in it"),
        (f"CARD = Card({HEAD}, equations={{3: 'x'}})", "keys of a dict on a card are strings"),
        (f"CARD = Card({HEAD}, equations={{(): 'x'}})", "keys of a dict on a card are strings"),
        (f"CARD = Card({HEAD}, equations={{{{}}: 'x'}})", "keys of a dict on a card are strings"),
        (f"CARD = Card({HEAD}, hyperparameters={{'a': 3}})", "hyper-parameter a"),
        (f"CARD = Card({HEAD}, hyperparameters={{'a': Real('much')}})", "hyper-parameter a"),
        (f"CARD = Card({HEAD}, hyperparameters={{'a': Real(0.0, gt=0)}})", "must be > 0"),
        (f"CARD = Card({HEAD}, hyperparameters={{'a': Choice('c', ['a', 'b'])}})", "not one of a, b"),
        (f"CARD = Card({HEAD}, hyperparameters=7)", "items"),
        ("CARD = Card(" + "(" * 300 + ")" * 300 + ")", "cannot be read|must be|missing|takes"),
    ],
)
def test_every_wrong_card_is_one_line(card, text, says):
    with pytest.raises(UserError, match=says) as caught:
        card(text)
    assert one_line(caught)
    assert "x.py" in str(caught.value)


def test_a_card_that_is_not_text_or_not_there_is_one_line(tmp_path):
    path = tmp_path / "x.py"
    path.write_bytes(b"\xff\xfe\x00garbage\x9d")
    with pytest.raises(UserError, match="cannot be read as Python"):
        read_card(path)
    with pytest.raises(UserError, match="cannot be read as Python"):
        read_card(tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Real(1.0), "2.5", 2.5),
        (Real(1.0), "1e-3", 0.001),
        (Real(1.0, ge=0), 0, 0.0),
        (Real(1.0, gt=0, le=1), "1", 1.0),
        (Integer(1), "7", 7),
        (Integer(1), 7.0, 7),
        (Integer(1, ge=1, lt=3), "2", 2),
        (Choice("a", ("a", "b")), "b", "b"),
        (Flag(True), "false", False),
        (Flag(True), "Yes", True),
        (Flag(False), True, True),
    ],
)
def test_values_are_parsed(kind, text, value):
    parsed = kind.parse(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Real(1.0), "nan"),
        (Real(1.0), "inf"),
        (Real(1.0), "1e999"),
        (Real(1.0), "two"),
        (Real(1.0), True),
        (Real(1.0, gt=0), "0"),
        (Real(1.0, ge=0), "-0.1"),
        (Real(0.5, lt=1), "1"),
        (Real(0.5, le=1), "1.01"),
        (Integer(1), "1.5"),
        (Integer(1), 1.5),
        (Integer(1), False),
        (Integer(1), "nan"),
        (Integer(1), float("inf")),
        (Integer(2, gt=1), "1"),
        (Integer(1, le=3), "4"),
        (Choice("a", ("a", "b")), "c"),
        (Flag(True), "maybe"),
        (Real(1.0), None),
    ],
)
def test_values_out_of_range_are_one_line_with_the_default(kind, text):
    card = Card(slug="m", version=1, problem="p", title="t", hyperparameters={"h": kind})
    with pytest.raises(UserError, match=r"m\.h=.*default") as caught:
        resolve(card, {"h": text})
    assert one_line(caught)


def test_resolve_puts_values_over_defaults_and_names_the_nearest():
    card = Card(slug="m", version=1, problem="p", title="t", hyperparameters={"temperature": Real(4.0), "steps": Integer(3)})
    assert resolve(card, {}) == {"temperature": 4.0, "steps": 3}
    assert resolve(card, {"temperature": "2"}) == {"temperature": 2.0, "steps": 3}
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        resolve(card, {"temprature": 2})


def test_a_default_and_the_same_value_given_are_one_run():
    card = Card(slug="m", version=1, problem="p", title="t", hyperparameters={"a": Real(4), "b": Integer(2)})
    assert canonical(resolve(card, {})) == canonical(resolve(card, {"a": "4", "b": "2"})) == canonical(resolve(card, {"a": 4.0, "b": 2.0}))


def suite_card(**more):
    base = Setting(
        tier="analytic",
        summary="base",
        budget=Budget(student_examples=100),
        training=Training(batch_size=10, optimizer="sgd", learning_rate=0.1, milestones=(0.5,)),
        assets={"data": Asset(name="d", source="s", licence="l")},
        options={"width": 3, "net": {"name": "a", "deep": [1, 2]}},
    )
    return SuiteCard(
        slug="s",
        version=1,
        problem="p",
        title="t",
        metrics=(Metric(name="top1", unit="fraction", better="higher", range=(0, 1)), Metric(name="nll", unit="nats", better="lower")),
        primary="top1",
        controls=("scratch",),
        settings={"base": base},
        **more,
    )


def test_a_setting_of_a_record_from_before_has_the_same_assets():
    """Records never change, and those made before have three fields for their assets."""
    data, more = (Asset(name=n, source="s", licence="l", sha256=n * 64) for n in "ab")
    today = dataclasses.replace(suite_card().settings["base"], options={}, assets={"data": data, "reference": more})
    written = to_data(today)
    assert written["assets"] == {"data": to_data(data), "reference": to_data(more)} and from_data(written) == today
    before = {k: v for k, v in written.items() if k != "assets"} | {
        "data": to_data(data),
        "teacher": None,
        "others": {"reference": to_data(more)},
    }
    assert from_data(before) == today
    del before["others"]
    assert from_data(before).assets == {"data": data}


def test_metrics_are_found_by_name():
    card = suite_card()
    assert card.metric().name == "top1" and card.metric("nll").better == "lower"
    with pytest.raises(UserError, match="did you mean 'top1'"):
        card.metric("top11")


def test_cards_survive_json():
    method = Card(
        slug="m",
        version=2,
        problem="p",
        title="t",
        paper=Paper(title="T", year=2020),
        hyperparameters={"a": Real(1.0, ge=0), "b": Integer(2), "c": Choice("x", ("x", "y")), "d": Flag(False)},
        claims=(Beats("kd"), Reported(suite="s", metric="m", value=0.1, source="t")),
    )
    for card in (method, suite_card()):
        back = from_data(json.loads(json.dumps(to_data(card))))
        assert to_data(back) == to_data(card)
        assert type(back) is type(card)
    assert from_data(to_data(method)) == method
    still = dataclasses.replace(method, trains=False)
    assert from_data(to_data(still)) == still and "trains" not in to_data(method)  # a later field at its default, and not at it


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"_": "Kard"}, "unknown card class 'Kard'; did you mean 'Card'"),
        ({"_": []}, "unknown card class"),
        ({"_": "Real", "default": 1.0, "shape": 3}, "does not fit this version"),
        ({"_": "Card", "slug": "x"}, "does not fit this version"),
        (
            {"_": "SuiteCard", **{k: v for k, v in to_data(suite_card()).items() if k not in ("_", "settings")}, "settings": 3},
            "does not fit",
        ),
    ],
)
def test_odd_cards_in_a_record_are_one_line(data, says):
    with pytest.raises(UserError, match=says) as caught:
        from_data(data)
    assert one_line(caught)


def test_a_setting_names_its_own_metrics_and_its_primary_one():
    card = suite_card()
    assert card.at("base").primary == "top1" and len(card.at("base").metrics) == 2
    own = dataclasses.replace(card.settings["base"], metrics=("nll",))
    other = dataclasses.replace(card, settings={"base": own, "rest": card.settings["base"]}).at("base")
    assert (other.primary, [m.name for m in other.metrics], list(other.settings)) == ("nll", ["nll"], ["base"])
    unknown = dataclasses.replace(card, settings={"base": dataclasses.replace(own, metrics=("nil",))})
    with pytest.raises(UserError, match="did you mean 'nll'"):
        unknown.at("base")


def test_a_field_added_later_is_left_out_at_its_default_so_old_identities_stay():
    setting = suite_card().settings["base"]
    assert "metrics" not in to_data(setting)
    changed = dataclasses.replace(setting, metrics=("nll",))
    assert to_data(changed)["metrics"] == ["nll"]
    assert from_data(to_data(changed)).metrics == ("nll",)


def test_a_level_that_boards_mark_travels_with_the_card():
    metric = Metric(name="speed", unit="ratio", better="higher", below=(1.0, "slower"))
    assert from_data(to_data(metric)) == metric
    assert "below" not in to_data(Metric(name="speed", unit="ratio", better="higher"))
    for wrong in ("slower", 1.0, (1.0,), ("slower", 1.0), (True, "slower")):
        with pytest.raises(UserError, match="does not fit this version"):
            from_data({**to_data(metric), "below": wrong})
