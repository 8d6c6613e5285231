"""What every kind of problem has without saying so: teachers, students, and networks from any seed."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from distillbench.training.nets import Architecture
from distillbench.training.oracle import ModuleOracle, Oracle
from distillbench.training.problem import Problem


def build(architecture, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Linear(**architecture.arguments)
    net.architecture = architecture
    return net


LINE = Architecture("line", {"in_features": 2, "out_features": 3})


@dataclass(frozen=True)
class Alone(Problem):
    """A kind without a teacher."""

    classes: int


@dataclass(frozen=True)
class Verified(Problem):
    """A kind with two networks to train, a teacher that is a network, and a verifier that is none."""

    tower: nn.Module
    teacher: ModuleOracle
    verifier: Oracle


def problem(kind, **fields):
    return kind(setting="s", student=build(LINE, 5), build=functools.partial(build, seed=5), **fields)


def test_a_kind_needs_no_teacher():
    alone = problem(Alone, classes=3)
    assert alone.teachers == {} and alone.students == {"student": alone.student}


def test_teachers_are_the_fields_that_are_oracles_and_students_those_that_are_networks():
    teacher, verifier, tower = ModuleOracle(nn.Linear(2, 2)), Oracle("0" * 64), nn.Linear(1, 1)
    found = problem(Verified, tower=tower, teacher=teacher, verifier=verifier)
    assert found.teachers == {"teacher": teacher, "verifier": verifier}
    assert found.students == {"student": found.student, "tower": tower}


def test_a_new_student_is_of_the_init_seed_and_build_takes_any():
    alone = problem(Alone, classes=3)
    assert torch.equal(alone.new_student().weight, alone.student.weight)
    assert torch.equal(alone.build(LINE, seed=6).weight, build(LINE, 6).weight)
    assert not torch.equal(alone.build(LINE, seed=6).weight, alone.student.weight)
    assert alone.new_student(out_features=4).architecture.arguments == {"in_features": 2, "out_features": 4}


def test_an_oracle_that_is_no_network_counts_what_it_is_asked_and_moves_nothing():
    class Verifier(Oracle):
        def right(self, answers):
            self._asked(len(answers), computed=False)
            return answers == answers.round()

    verifier = Verifier("0" * 64)
    verifier.to(torch.device("cpu"))
    assert verifier.right(torch.tensor([1.0, 1.5])).tolist() == [True, False]
    assert verifier.meter.counts["teacher_examples"] == 2 and verifier.meter.counts["teacher_forwards"] == 0
