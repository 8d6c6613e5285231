"""A setting names its world, and a name off the list is never imported."""

import pytest

from distillbench.cards.card import Budget, Setting, Training
from distillbench.cards.worlds import Worlds
from distillbench.errors import UserError


def setting(**options):
    return Setting(
        tier="analytic",
        summary="s",
        budget=Budget(student_examples=1),
        training=Training(batch_size=1, optimizer="sgd", learning_rate=0.1),
        options=options,
    )


def test_a_world_is_the_module_that_the_setting_names():
    assert Worlds("json", ("decoder", "encoder")).of(setting(world="encoder")).__name__ == "json.encoder"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"world": "tool"}, "unknown world 'tool'"), ({"world": "decodr"}, "did you mean 'decoder'"), ({}, "unknown world 'None'")],
)
def test_what_is_not_on_the_list_is_refused_though_it_is_there(options, said):
    with pytest.raises(UserError, match=said):
        Worlds("json", ("decoder", "encoder")).of(setting(**options))
