"""The student as a file, and how any suite makes a network of it again."""

import dataclasses

import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.training.nets import Architecture
from distillbench.training.student import Student, rebuild


def build(architecture, seed):
    torch.manual_seed(seed)
    net = nn.Linear(**architecture.arguments)
    net.architecture = architecture
    return net


def student(**arguments):
    return Student.of(build(Architecture("line", {"in_features": 3, "out_features": 2, **arguments}), 1))


def test_a_rebuilt_network_has_the_weights_and_is_in_evaluation_mode():
    mine = student()
    net = rebuild(Student.from_bytes(mine.to_bytes()), build)
    assert not net.training
    assert all(torch.equal(v, mine.weights[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("arguments", [{"depth": 3}, {"in_features": "wide"}, {"out_features": -1}, {}])
def test_an_architecture_that_cannot_be_built_is_one_line(arguments):
    broken = dataclasses.replace(student(), architecture=Architecture("line", arguments))
    with pytest.raises(UserError, match=r"architecture line cannot be built from .*: \w+Error: ") as error:
        rebuild(broken, build)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_one_line():
    broken = dataclasses.replace(student(), weights={"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
    with pytest.raises(UserError, match="the weights do not fit architecture line: size mismatch") as error:
        rebuild(broken, build)
    assert "\n" not in str(error.value)
