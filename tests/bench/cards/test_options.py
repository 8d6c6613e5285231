"""Options are typed: what a world reads has a name, a type and a place on the card, and anything else is one line."""

import dataclasses
import importlib
from typing import Any, Literal

import pytest

from distillbench.assets import PLACES, Asset
from distillbench.cards import registry
from distillbench.cards.card import Budget, Setting, Training
from distillbench.cards.options import options_of
from distillbench.errors import UserError


@dataclasses.dataclass(frozen=True)
class Net:
    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    classes: int
    spread: float
    reader: Literal["folder", "zip"]
    widths: tuple[float, ...] = ()
    flip: bool = False
    student: Net = dataclasses.field(default=Net("mlp"), hash=False)


GIVEN = {"classes": 3, "spread": 2, "reader": "zip"}


def setting(**options):
    return Setting(
        tier="analytic",
        summary="s",
        budget=Budget(student_examples=1),
        training=Training(batch_size=1, optimizer="sgd", learning_rate=0.1),
        assets={"data": Asset(name="images", source="a page", licence="CC0")},
        options=options,
    )


def test_each_is_of_its_type_and_the_rest_have_their_defaults():
    found = options_of(setting(**GIVEN, world="x", data_path=["a"], data_hub=["b", "c"]), Options)
    assert found == Options(3, 2.0, "zip") and type(found.spread) is float
    found = options_of(
        setting(**{**GIVEN, "classes": 4.0}, widths=[1, 0.5], flip=True, student={"name": "cnn", "arguments": {"w": [7]}}), Options
    )
    assert (found.classes, type(found.classes), found.widths, found.flip) == (4, int, (1.0, 0.5), True)
    assert found.student == Net("cnn", {"w": [7]})
    assert len({found, found}) == 1  # it keys what is made once from it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**GIVEN, "clases": 3}, "unknown option of tiny 'clases'; did you mean 'classes'"),
        ({**GIVEN, "teacher_path": ["x"]}, "unknown option of tiny 'teacher_path'"),  # the setting has no such asset
        ({"classes": 3, "spread": 2.0}, "option 'reader' of tiny is missing; it has classes, spread"),
        ({**GIVEN, "classes": 3.5}, "option 'classes' of tiny: must be int, not 3.5"),
        ({**GIVEN, "classes": True}, "option 'classes' of tiny: must be int, not True"),
        ({**GIVEN, "spread": "2"}, "option 'spread' of tiny: must be float, not '2'"),
        ({**GIVEN, "reader": "tar"}, r"option 'reader' of tiny: must be Literal\['folder', 'zip'\], not 'tar'"),
        ({**GIVEN, "widths": [1, "x"]}, r"option 'widths' of tiny: must be tuple\[float, ...\], not \[1, 'x'\]"),
        ({**GIVEN, "flip": 1}, "option 'flip' of tiny: must be bool, not 1"),
        ({**GIVEN, "student": "cnn"}, "option 'student' of tiny: must be Net, not 'cnn'"),
        ({**GIVEN, "student": {"nam": "cnn"}}, "unknown part of option 'student' of tiny 'nam'; did you mean 'name'"),
        ({**GIVEN, "student": {"name": 3}}, "part 'name' of option 'student' of tiny: must be str, not 3"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line_that_names_the_setting_and_the_option(options, said):
    with pytest.raises(UserError, match=said) as error:
        options_of(setting(**options), Options, "tiny")
    assert "\n" not in str(error.value)


OF_TIER = {"analytic": "blobs", "embedded": "digits", "paper": "published"}  # image-classification has no option world


@pytest.mark.parametrize("track", [f"{s}/{n}" for s, e in registry.suites().items() for n in registry.suite_card(e).settings])
def test_every_setting_on_a_card_is_read_whole(track):
    slug, _, name = track.partition("/")
    entry = registry.find("suite", slug)
    found = registry.suite_card(entry).settings[name]
    world = importlib.import_module(f"{entry.module}.{found.options.get('world', OF_TIER[found.tier])}")
    kind = getattr(world, "Options", None) or importlib.import_module("distillbench.suites.language_modeling.markov").Options
    for options in (found.options, {**found.options, **entry.load().FINGERPRINT.get(name, {})}):
        read = options_of(dataclasses.replace(found, options=options), kind, name)
        places = {f"{role}_{place}" for role in found.assets for place in PLACES}
        for key, literal in options.items():
            if key in {"world", "student"} | places:
                continue
            value = getattr(read, key)
            assert value == (tuple(literal) if isinstance(literal, list) else literal), key
        if "student" in options:
            assert {"name": read.student.name, "arguments": read.student.arguments} == options["student"]
