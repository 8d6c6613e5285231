"""Image classification: exact teacher, honest splits, and a judge with known answers."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites import image_classification as suite
from distillbench.suites.image_classification import blobs, digits
from distillbench.suites.image_classification.nets import build, rebuild
from distillbench.training.data import Arrays
from distillbench.training.nets import Architecture, Marginalized, parameters
from distillbench.training.student import Student, tensor_digest

SETTINGS = suite.CARD.settings
DIGITS = [n for n in SETTINGS if n.startswith("digits")]
SMALL = Architecture("small-cnn", {"widths": [14, 26], "outputs": 10})


@contextlib.contextmanager
def fails(*parts: str) -> Iterator[None]:
    """The block raises a UserError of one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def setting_problem(name: str, seed: int = 0, **options: Any) -> Any:
    return suite.SUITE.problem(TrainContext(name, SETTINGS[name], seeds_by_role(seed), **options))


def teacher_of(name: str) -> nn.Module:
    return suite._world(SETTINGS[name]).teacher(Context(name, SETTINGS[name], {}))


def splits_of(name: str) -> dict[str, Arrays]:
    seed = seeds_by_role(0)["data"]
    if name == "blobs":
        return blobs.splits(options_of(SETTINGS[name], blobs.Options), seed)
    return digits.splits(options_of(SETTINGS[name], digits.Options), seed, None)


def judge(student: Student | nn.Module, name: str = "digits", split: str = "test") -> dict[str, Measurement]:
    if isinstance(student, nn.Module):
        student = Student.of(student)
    ctx = JudgeContext(name, SETTINGS[name], seeds_by_role(0), split=split)
    return {m.metric: m for m in suite.SUITE.evaluate(student, ctx).measurements}


# --- blobs: the truth is known --------------------------------------------------------------------------------------


def posterior(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """p(c | x) from scipy's densities."""
    means, spreads = (t.double().numpy() for t in blobs.classes(options_of(SETTINGS["blobs"], blobs.Options)))
    logs = np.stack([multivariate_normal.logpdf(inputs, m, s**2 * np.eye(len(m))) for m, s in zip(means, spreads, strict=True)], axis=1)
    return np.exp(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))


def test_blobs_teacher_is_the_exact_posterior() -> None:
    inputs, _ = blobs.draw(options_of(SETTINGS["blobs"], blobs.Options), 20_000, 5)
    teacher = teacher_of("blobs")
    with torch.no_grad():
        answer = teacher(inputs).softmax(1).numpy()
    assert np.abs(answer - posterior(inputs.double().numpy())).max() < 1e-6


def test_blobs_no_classifier_beats_the_teacher() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
    from sklearn.neighbors import KNeighborsClassifier

    options = options_of(SETTINGS["blobs"], blobs.Options)
    x, y = (t.numpy() for t in blobs.draw(options, 10_000, 6))
    inputs, labels = (t.numpy() for t in blobs.draw(options, 20_000, 7))
    bayes = posterior(inputs).argmax(1) == labels
    assert 0.7 < bayes.mean() < 0.8
    behind = []
    for rival in (QuadraticDiscriminantAnalysis(), LinearDiscriminantAnalysis(), KNeighborsClassifier(25)):
        difference = (rival.fit(x, y).predict(inputs) == labels).astype(float) - bayes
        assert difference.mean() < 3 * difference.std() / math.sqrt(len(difference))  # paired, so the bound is tight
        behind.append(-difference.mean())
    assert behind[0] < 0.005  # the one of the right form comes close: the truth can be reached
    assert behind[1] > 0.01


def test_blobs_splits() -> None:
    options = options_of(SETTINGS["blobs"], blobs.Options)
    one, two = blobs.splits(options, 1), blobs.splits(options, 2)
    assert {n: len(a) for n, a in one.items()} == {"train": 1000, "tune": 1000, "test": 4000}
    assert int(one["train"].labelled.sum()) == 50
    for name in ("tune", "test"):
        assert torch.equal(one[name].inputs, two[name].inputs)
    assert not torch.equal(one["train"].inputs, two["train"].inputs)
    assert not rows(one["test"].inputs) & (rows(one["train"].inputs) | rows(one["tune"].inputs))


def test_unlabelled_examples_carry_the_teachers_decision() -> None:
    problem, truth = setting_problem("blobs"), blobs.splits(options_of(SETTINGS["blobs"], blobs.Options), seeds_by_role(0)["data"])["train"]
    train = problem.train
    decided = torch.from_numpy(posterior(train.inputs.double().numpy()).argmax(1))
    assert torch.equal(train.labels[train.labelled], truth.labels[train.labelled])
    assert torch.equal(train.labels[~train.labelled], decided[~train.labelled])
    assert (train.labels != truth.labels)[~train.labelled].float().mean() > 0.2  # the teacher errs, and its errors stay
    assert (decided != truth.labels)[train.labelled].any()  # and an observed label is not replaced by its decision


# --- digits: real data, honestly split --------------------------------------------------------------------------------


def rows(inputs: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def test_digits_are_the_pinned_bytes() -> None:
    blob = files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()
    assert SETTINGS["digits"].assets["data"].sha256 == sha256(blob)
    table = np.loadtxt(gzip.decompress(blob).decode().splitlines(), delimiter=",")
    images, labels = digits.load(sha256(blob))
    assert np.array_equal(images.flatten(1).numpy(), table[:, :-1] / 8 - 1) and np.array_equal(labels.numpy(), table[:, -1])
    assert len(rows(images)) == 1797  # no digit is there twice, so disjoint rows are disjoint images
    with fails("other digits"):
        digits.load("0" * 64)


def test_digits_partition_is_frozen_disjoint_and_balanced() -> None:
    parts, labels = digits.partition(), digits.load()[1]
    assert tensor_digest(parts) == "a133ec74cb4571bd87c339a266ffe62d92b20647cec65cec7f920a00493090c0"
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(1797))
    assert torch.bincount(labels[parts["test"]]).tolist() == [40] * 10
    assert torch.bincount(labels[parts["tune"]]).tolist() == [20] * 10


@pytest.mark.parametrize("name", DIGITS)
def test_digits_problem(name: str) -> None:
    images, truth = digits.load()
    number = {row.numpy().tobytes(): i for i, row in enumerate(images)}
    teacher = teacher_of(name)
    labelled_sets, tests = [], []
    for seed in range(3):
        problem = setting_problem(name, seed)
        train = problem.train
        index = torch.tensor([number[row.numpy().tobytes()] for row in train.inputs])
        assert len(train) == len(set(index.tolist())) == SETTINGS[name].options["transfer"]
        assert set(index.tolist()) <= set(digits.partition()["train"].tolist())
        assert torch.bincount(truth[index[train.labelled]]).tolist() == [10] * 10
        assert torch.equal(train.labels[train.labelled], truth[index[train.labelled]])
        with torch.no_grad():
            assert torch.equal(train.labels[~train.labelled], teacher(train.inputs).argmax(1)[~train.labelled])
        labelled_sets.append(frozenset(index[train.labelled].tolist()))
        tests.append(digits.splits(options_of(SETTINGS[name], digits.Options), seeds_by_role(seed)["data"], None)["test"])
        batch = next(problem.labelled.stream(0))
        assert bool(batch.labelled.all())
    assert len(set(labelled_sets)) == 3
    assert all(torch.equal(t.inputs, tests[0].inputs) and torch.equal(t.labels, tests[0].labels) for t in tests)


@pytest.mark.parametrize("name", ["blobs", *DIGITS])
@pytest.mark.parametrize("split", ["test", "tune"])
def test_no_problem_holds_what_it_is_judged_on(name: str, split: str) -> None:
    problem = setting_problem(name, tuning=split == "tune")
    judged = splits_of(name)
    held = rows(problem.train.inputs)
    for stream in (problem.batches.stream(0), problem.labelled.stream(0)):
        for _ in range(20):
            held |= rows(next(stream).inputs)
    assert not held & rows(judged[split].inputs)
    if split == "tune":
        assert problem.tune is None
    else:
        assert not (held | rows(problem.tune.inputs)) & rows(judged["test"].inputs)


def test_tune_split_is_judged_on_its_own_images() -> None:
    net = build(SMALL, 3)
    tune, test = judge(net, split="tune"), judge(net)
    assert (tune["top1"].n, test["top1"].n) == (200, 400)
    part = digits.partition()["tune"]
    with torch.no_grad():
        right = net.eval()(digits.load()[0][part]).argmax(1) == digits.load()[1][part]
    assert tune["top1"].per_example == tuple(right.float().tolist())


def test_sizes_are_what_the_card_says() -> None:
    sizes = {}
    for name in DIGITS:
        about = SETTINGS[name].options["student"]
        sizes[name] = parameters(build(Architecture(about["name"], about["arguments"]), 0))
    teacher = teacher_of("digits")
    assert (sizes["digits"], sizes["digits-tiny"], parameters(teacher)) == (3752, 987, 62434)
    assert "3.7k" in SETTINGS["digits"].summary and "62k" in SETTINGS["digits"].summary and "1.0k" in SETTINGS["digits-tiny"].summary


def test_digits_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = SETTINGS["digits"]
    assert setting.assets["teacher"].sha256 == sha256(digits.TEACHER.read_bytes())
    part = digits.partition()["tune"]
    with torch.no_grad():
        right = teacher_of("digits")(digits.load()[0][part]).argmax(1) == digits.load()[1][part]
    assert float(right.float().mean()) == pytest.approx(0.99)
    blob = bytearray(digits.TEACHER.read_bytes())
    for damaged in (blob[:1000], blob[:-1] + bytes([blob[-1] ^ 1])):
        path = tmp_path / "teacher.safetensors"
        path.write_bytes(damaged)
        monkeypatch.setattr(digits, "TEACHER", path)
        with fails("not the teacher the card pins", "restore"):
            setting_problem("digits")


# --- the judge: known answers ---------------------------------------------------------------------------------------


def test_constant_student() -> None:
    net = build(SMALL, 0)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    found = judge(net)
    assert found["top1"].value == pytest.approx(0.1)  # balanced: no constant scores more
    assert found["nll"].value == pytest.approx(math.log(10), abs=1e-6)
    assert found["ece"].value == pytest.approx(0, abs=1e-6)  # it says one in ten, and one in ten it is
    with torch.no_grad():
        net.head.bias[3] = 100.0
    sure = judge(net)
    assert sure["top1"].value == pytest.approx(0.1)
    assert sure["ece"].value == pytest.approx(0.9)
    assert sure["nll"].value == pytest.approx(90)


def test_random_student_against_numpy() -> None:
    net = build(SMALL, 1)
    with torch.no_grad():
        net.head.weight.mul_(20)
    found = judge(net)
    part = digits.partition()["test"]
    images, labels = digits.load()[0][part], digits.load()[1][part].numpy()
    with torch.no_grad():
        logits = net.eval()(images).double().numpy()
        theirs = teacher_of("digits")(images).argmax(1).numpy()
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    sure, right = p.max(1), p.argmax(1) == labels
    bins = np.minimum((sure * 15).astype(int), 14)
    ece = sum(abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in range(15) if (bins == b).any())
    assert 0.02 < right.mean() < 0.35
    assert found["top1"].value == pytest.approx(right.mean())
    assert found["nll"].value == pytest.approx(-np.log(p[np.arange(400), labels]).mean(), rel=1e-5)
    assert found["ece"].value == pytest.approx(ece, abs=1e-5)
    assert found["agreement"].value == pytest.approx((p.argmax(1) == theirs).mean())


def test_perfect_student_and_per_example_values() -> None:
    part = digits.partition()["test"]
    images, labels = digits.load()[0][part], digits.load()[1][part]
    torch.manual_seed(0)
    net = build(Architecture("small-cnn", {"widths": [16, 32], "outputs": 10}), 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(60):  # it has seen the answers
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = judge(net)
    assert found["top1"].value == 1
    assert found["nll"].value < 0.1
    for name in ("top1", "nll", "agreement"):
        values = found[name].per_example
        assert values is not None and len(values) == found[name].n == 400
        assert found[name].value == pytest.approx(sum(values) / 400, abs=1e-12)


def test_the_teacher_agrees_with_itself() -> None:
    for name in ("digits", "blobs"):
        teacher = teacher_of(name)
        found = judge(teacher, name)
        assert found["agreement"].value == 1
        assert {m.name for m in suite.CARD.metrics} == set(found)


def test_students_that_are_refused() -> None:
    good = Student.of(build(SMALL, 0))

    def changed(**part: Any) -> Student:
        return Student({"student": dataclasses.replace(good.only, **part)})

    with fails("not finite"):
        judge(changed(weights={k: v * math.nan if v.is_floating_point() else v for k, v in good.weights.items()}))
    with fails("do not fit", "Missing key"):
        judge(changed(weights={k: v for k, v in good.weights.items() if k != "head.bias"}))
    with fails("do not fit", "size mismatch"):
        judge(changed(architecture=Architecture("small-cnn", {"widths": [4, 8], "outputs": 10})))
    with fails("unknown architecture", "small-cnn"):
        judge(changed(architecture=Architecture("small-cn", {})))
    for arguments in ({}, {"widths": "x", "outputs": 10}, {**SMALL.arguments, "depth": 3}, {**SMALL.arguments, "groups": "x"}):
        with fails("small-cnn cannot be built"):
            judge(changed(architecture=Architecture("small-cnn", arguments)))
    with fails("cannot be built"):
        judge(changed(architecture=Architecture("torchvision:resnet19", {"outputs": 10})))


def test_marginalized_sums_the_mass_of_its_groups() -> None:
    problem = setting_problem("digits")
    net = problem.new_student(groups=3).eval()
    assert isinstance(net, Marginalized)
    inputs = next(problem.batches.stream(0)).inputs
    with torch.no_grad():
        assert net.body(inputs).shape == (64, 30)
        mass = net.body(inputs).softmax(1).view(64, 10, 3).sum(2)
        assert torch.allclose(net(inputs).softmax(1), mass, atol=1e-6)
        again = rebuild(Student.from_bytes(Student.of(net).to_bytes()))
        assert torch.equal(again(inputs), net(inputs))
