"""A run that is killed and goes on has the bill of one that was not; copies of networks are watched as well."""

import copy

import pytest

from distillbench.cards.card import Card
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.learner import Learner
from distillbench.training.problem import Problem
from tests.bench.training.small import Killed, batches, linear, make

CARD = Card(slug="x", version=1, problem="p", title="t")


def distill(run, problem, kill_at=None):
    """An auxiliary network learns for six updates, each with a further pass; its weights begin the student's four."""
    made = []

    def loss(batch, net):
        if kill_at is not None and len(made) == kill_at:
            raise Killed
        made.append(batch)
        return run.loss(batch, ce=cross_entropy(net(batch.inputs), batch.labels) + 0 * net(batch.inputs).sum(1))

    twin = copy.deepcopy(problem.student)
    run.loop([Learner(twin, lambda b: loss(b, twin), counts=None)], batches(), steps=6)
    problem.student.load_state_dict(twin.state_dict())
    return run.fit(problem.student, lambda b: loss(b, problem.student), batches(), steps=4)


def begin(folder=None):
    run = make(folder=folder, checkpoint_seconds=0.0)
    return run, run.watching(Problem("s", linear(), lambda architecture, seed=0: linear(seed=seed, **architecture.arguments)), CARD)


@pytest.mark.parametrize("kill_at", [3, 7])
def test_a_killed_run_has_the_same_bill(tmp_path, kill_at):
    totals = []
    for folder, kills in ((tmp_path / "whole", [None]), (tmp_path / "killed", [kill_at, None])):
        for kill in kills:
            run, problem = begin(folder)
            if kill is not None:
                with pytest.raises(Killed):
                    distill(run, problem, kill)
                continue
            run.returned(distill(run, problem))
            totals.append({k: v for k, v in run.cost()["total"].items() if k != "wall_seconds"})
    assert totals[0] == totals[1]
    # 6 batches of 8 and as much again are the twin's; the student's are 4 batches, as much again, and all of the twin's.
    assert totals[0]["auxiliary_examples"] == 96 and totals[0]["student_examples"] == 64 + 96


def test_a_copy_is_watched_and_its_own_weights_are_what_it_has():
    run, problem = begin()
    twin = copy.deepcopy(problem.student)
    twin.weight.data.zero_()
    inputs = next(batches().stream(0)).inputs
    assert not twin(inputs).sub(twin.bias).any() and problem.student(inputs).sub(problem.student.bias).any()
    run.cost()
    assert run.meter.counts["auxiliary_examples"] == 8 and run.meter.counts["student_examples"] == 8
