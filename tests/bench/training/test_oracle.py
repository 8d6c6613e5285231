"""The teacher behind one door: what it answers, what is metered, and when a cache holds its answers."""

import math

import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.training.nets import Architecture
from tests.bench.training.small import batches, examples


class Teacher(nn.Module):
    """A classifier that dropout and batch statistics would show up in."""

    head_name = "head"
    stage_names = ("norm",)

    def __init__(self, seed=0, squash=False):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.drop, self.head = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)
        self.architecture = Architecture("teacher", {"squash": squash})
        self.squash = squash

    def forward(self, inputs):
        inner = self.norm(inputs)
        return self.head(self.drop(inner.tanh() if self.squash else inner))


def ask(teacher, data, cache=None):
    oracle = ClassifierOracle(teacher, data, cache)
    return oracle, oracle.logits(data.take(torch.arange(len(data))))


@pytest.mark.parametrize("tabled", [True, False])
def test_the_teacher_is_in_evaluation_mode_without_a_graph_and_metered(tabled):
    data, teacher = examples(), Teacher().train()
    oracle = ClassifierOracle(teacher, data if tabled else None)
    statistics = teacher.norm.running_mean.clone()
    batch = next(batches(data=data).stream(0))
    first, second = oracle.logits(batch), oracle.logits(batch)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.allclose(first, teacher.head((batch.inputs - 0) / math.sqrt(1 + 1e-5)), atol=1e-6)
    assert not teacher.training and torch.equal(statistics, teacher.norm.running_mean)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert oracle.meter.counts["teacher_examples"] == 16
    assert oracle.meter.counts["teacher_forwards"] == (40 if tabled else 16)
    seen = oracle.outputs(batch)
    assert torch.allclose(seen.logits, first, atol=1e-6) and seen.embedding.shape == (8, 3) and len(seen.stages) == 1
    assert not seen.embedding.requires_grad and oracle.meter.counts["teacher_examples"] == 24


def test_a_copy_of_the_teacher_may_be_trained_and_the_oracle_stays():
    oracle = ClassifierOracle(Teacher(), examples())
    copy = oracle.trainable_copy()
    assert copy.training and all(p.requires_grad for p in copy.parameters())
    copy.head.weight.data.zero_()
    assert oracle.head_weight.abs().sum() > 0
    other = oracle.retaught(copy)
    assert other.meter is oracle.meter and other.digest != oracle.digest


def test_the_cache_is_hit_by_bytes_alone(tmp_path):
    data = examples()
    first, answer = ask(Teacher(0), data, tmp_path)
    files = list(tmp_path.iterdir())
    again, same = ask(Teacher(0), examples(), tmp_path)  # built anew: equal bytes
    assert torch.equal(answer, same)
    assert (first.meter.counts["teacher_forwards"], again.meter.counts["teacher_forwards"]) == (40, 0)
    assert list(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("teacher", "data"),
    [(Teacher(1), examples()), (Teacher(0), examples(seed=1)), (Teacher(0, squash=True), examples()), (Teacher(0), examples(39))],
    ids=["other weights", "other data", "other forward pass of equal weights", "fewer rows"],
)
def test_another_model_or_other_data_never_hits_the_cache(tmp_path, teacher, data):
    ask(Teacher(0), examples(), tmp_path)
    oracle, answer = ask(teacher, data, tmp_path)
    assert oracle.meter.counts["teacher_forwards"] == len(data)
    with torch.no_grad():
        assert torch.allclose(answer, teacher.eval()(data.inputs), atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage", "empty"])
def test_a_damaged_cache_is_computed_anew(tmp_path, damage):
    _, answer = ask(Teacher(0), examples(), tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:]  # one bit of one answer
    path.write_bytes({"cut": whole[:-5], "flip": flipped, "garbage": b"\x93garbage" * 50, "empty": b""}[damage])
    oracle, again = ask(Teacher(0), examples(), tmp_path)
    assert torch.equal(answer, again) and oracle.meter.counts["teacher_forwards"] == 40
    assert path.read_bytes() == whole


def test_a_teacher_that_is_not_finite_is_one_line():
    teacher = Teacher()
    teacher.head.bias.data[0] = math.nan
    with pytest.raises(UserError, match="the teacher's outputs are not finite"):
        ask(teacher, examples())
