"""Averages of weights: their schedules as known numbers, what a kill may not change, and what an export calls them."""

import math

import pytest
import torch
from torch import nn

from distillbench.cards.card import Budget, Training
from distillbench.errors import UserError
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.averages import at, name
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture
from distillbench.training.run import Learner, Run
from distillbench.training.student import Student, tensor_digest


def warm(update):
    """An average that forgets its first steps."""
    return min(0.9, (1 + update) / (10 + update))


def halving(update):
    return 1 - 0.5 ** (update + 1)


def linear():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net.architecture = Architecture("linear", {})
    return net


def batches():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(40, 3, generator=generator), torch.randint(2, (40,), generator=generator)
    return Shuffled(Arrays(rows, labels, torch.ones(40, dtype=torch.bool), tensor_digest({"rows": rows})), torch.arange(40), 8, seed=5)


def make(**options):
    training = Training(batch_size=8, optimizer="adamw", learning_rate=0.1)
    return Run(seeds={"noise": 1}, budget=Budget(student_examples=160), training=training, **options)


def play(run, seen=None, die=None, **averages):
    """Ten steps of two updates; the learner, and the weights after every update in ``seen``. Dies before the update ``die``."""
    net = linear()
    done = []

    def loss(b):
        if die is not None and len(done) == die:
            raise KeyboardInterrupt
        done.append(1)
        return run.loss(b, ce=cross_entropy(net(b.inputs), b.labels))

    def after(terms):
        if seen is not None:
            seen.append(net.weight.detach().clone())

    learner = Learner(net, loss, updates=2, after=after, **averages)
    run.loop([learner], batches())
    return learner


# --- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan, lambda k: 2.0 - k])
def test_what_is_no_decay_is_one_line(decay):
    with pytest.raises(UserError, match=r"the decay of an average is (-0\.1|1\.5|nan|2\.0 at update 0): a number from 0"):
        Learner(linear(), lambda b: {}, ema=decay)


def test_a_schedule_that_goes_astray_is_said_at_its_update():
    with pytest.raises(UserError, match=r"1\.2 at update 3"):
        at(lambda k: 0.3 * (k + 1), 3)


# --- in a loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [warm, lambda k: k % 2 / 2], ids=["form", "function"])
def test_both_averages_are_known_numbers_over_every_update_of_every_step(decay):
    seen: list[torch.Tensor] = []
    first = linear().weight.detach()
    learner = play(make(), seen, ema=decay, target=0.5)
    assert len(seen) == 20
    average = target = first
    for k, weight in enumerate(seen):
        average = decay(k) * average + (1 - decay(k)) * weight
        target = (target + weight) / 2
    assert torch.allclose(learner.average.weight, average, atol=1e-6)
    assert torch.allclose(learner.target.weight, target, atol=1e-6)


def test_a_schedule_that_is_constant_is_the_number_bit_for_bit():
    assert torch.equal(play(make(), ema=lambda k: 0.9).average.weight, play(make(), ema=0.9).average.weight)


@pytest.mark.parametrize("die", [1, 7, 14])
def test_a_killed_run_goes_on_with_the_same_schedule(tmp_path, die):
    whole = play(make(), ema=warm, target=halving)
    with pytest.raises(KeyboardInterrupt):
        play(make(folder=tmp_path, checkpoint_seconds=0.0), die=die, ema=warm, target=halving)
    again = play(make(folder=tmp_path, checkpoint_seconds=0.0), ema=warm, target=halving)
    assert torch.equal(again.average.weight, whole.average.weight)
    assert torch.equal(again.target.weight, whole.target.weight)


# --- in an export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "called"),
    [
        (0.999, "ema 0.999"),
        (warm, "ema warm"),
        (lambda k: 0.5, "ema by a schedule"),
    ],
)
def test_an_export_names_the_average_it_is(decay, called):
    run = make()
    student = run.export(play(run, ema=decay, target=0.5).average, averaged=True)
    assert student.averaged == called == name("ema", decay)
    fixed = not callable(decay)
    assert Student.from_bytes(student.to_bytes()).averaged == ("average" if fixed else called)
    assert (b'\\"averaged\\": true' in student.to_bytes()) is fixed  # published students of fixed averages keep their bytes


def test_the_target_and_an_average_of_the_methods_own_have_their_names():
    run = make()
    learner = play(run, ema=0.9, target=halving)
    assert run.export(learner.target, averaged=True).averaged == "target halving"
    assert run.export(linear(), averaged="mean of the last 5").averaged == "mean of the last 5"
    assert run.export(linear(), averaged=True).averaged == "average"


def test_plain_weights_are_no_average_and_cannot_be_declared_one():
    run = make()
    learner = play(run, ema=0.9)
    assert run.export(learner.module).averaged == ""
    assert b'\\"averaged\\": false' in run.export(learner.module).to_bytes()
    with pytest.raises(UserError, match="this network was trained itself"):
        run.export(learner.module, averaged=True)


def test_a_file_whose_average_is_no_name_is_refused():
    blob = Student.of(linear()).to_bytes().replace(b'\\"averaged\\": false', b'\\"averaged\\": [1]  ')
    with pytest.raises(UserError, match="not a distillbench student"):
        Student.from_bytes(blob)
