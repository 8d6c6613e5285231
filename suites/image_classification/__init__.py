"""Image classification: the judge (accuracy, likelihood, calibration, agreement) and its four kinds of setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.cards.card import Metric, Setting, SuiteCard
from distillbench.cards.reading import read_settings

if TYPE_CHECKING:
    from torch import nn

    from distillbench.problems.classification.problem import Classification
    from distillbench.runs.record import Measurement
    from distillbench.training.data import Arrays
    from distillbench.training.student import Student

CARD = SuiteCard(
    slug="image-classification",
    version=1,
    problem="classification",
    title="Image classification",
    summary="One frozen classifier, one small student, one budget: how much of the teacher does each method carry over?",
    metrics=[
        Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="share of the split's images classified right"),
        Metric(name="nll", unit="nats", better="lower", range=(0, None), meaning="mean negative log-likelihood of the true class"),
        Metric(name="ece", unit="fraction", better="lower", range=(0, 1), meaning="expected calibration error, 15 equal-width bins"),
        Metric(
            name="agreement",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="share of images on which student and teacher decide alike",
        ),
    ],
    primary="top1",
    controls=["scratch", "pseudo_label", "teacher", "shuffled_teacher"],
    floor="scratch",
    ceiling="teacher",
    strongest=["scratch", "pseudo_label", "shuffled_teacher"],
    settings=read_settings(__file__),
)

# Options that make a fingerprint small (see distillbench.checks.fingerprints): the arithmetic is the same, on fewer examples.
FINGERPRINT = {"blobs": {"tune": 200, "test": 1000}, "digits": {"transfer": 300}, "digits-tiny": {"transfer": 300}}


def _splits(setting: Setting, seed: int) -> dict[str, Arrays]:
    """The splits of a setting that fits in memory."""
    from distillbench.suites.image_classification import blobs, digits

    if setting.tier == "analytic":
        return blobs.splits(setting.options, seed)
    return digits.splits(setting.options, seed, setting.data.sha256 if setting.data else None)


def problem(
    name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None, cache: Path | None = None
) -> Classification:
    """The problem of one setting for one set of seeds.

    Args:
        split: what the student will be judged on; with ``tune``, that part is kept out of training.
        data: the user's folder of data sets.  cache: where tables of teacher outputs are kept.

    Raises:
        UserError: data or weights are missing, or are not what the card pins.
    """
    import torch

    from distillbench.problems.classification.oracle import CHUNK, ClassifierOracle
    from distillbench.problems.classification.problem import Classification
    from distillbench.suites.image_classification import published
    from distillbench.suites.image_classification.nets import build
    from distillbench.training.data import Arrays, Batches, Shuffled
    from distillbench.training.nets import Architecture

    about = setting.options["student"]
    architecture = Architecture(about["name"], dict(about["arguments"]))
    net = _teacher(setting, data)
    train: Arrays | None = None
    tune: Arrays | None = None
    once = None
    batches: Batches
    labelled: Batches
    if setting.tier == "paper":
        assert data is not None
        batches = labelled = published.training_batches(name, setting, data, seeds["order"], split)
        once = functools.partial(published.one_pass, name, setting, data, split)
        teacher = ClassifierOracle(net)
    else:
        splits = _splits(setting, seeds["data"])
        raw, tune = splits["train"], splits["tune"]
        with torch.no_grad():
            decisions = torch.cat([net(rows).argmax(1) for rows in raw.inputs.split(CHUNK)])
        train = Arrays(raw.inputs, torch.where(raw.labelled, raw.labels, decisions), raw.labelled, raw.digest)
        size = setting.training.batch_size
        batches = Shuffled(train, torch.arange(len(train)), size, seeds["order"])
        labelled = Shuffled(train, torch.nonzero(train.labelled).flatten(), size, seeds["order"])
        teacher = ClassifierOracle(net, train, cache)
    return Classification(
        setting=name,
        student=build(architecture, seeds["init"]),
        build=functools.partial(build, seed=seeds["init"]),
        classes=int(architecture.arguments["outputs"]),
        teacher=teacher,
        batches=batches,
        labelled=labelled,
        tune=tune,
        train=train,
        once=once,
    )


def _teacher(setting: Setting, data: Path | None) -> nn.Module:
    from distillbench.errors import UserError
    from distillbench.identity import sha256
    from distillbench.suites.image_classification import blobs, digits, published
    from distillbench.suites.image_classification.nets import build
    from distillbench.training.nets import Architecture
    from distillbench.training.student import Student

    if setting.tier == "paper":
        assert data is not None
        net = published.teacher(setting, data)
        name = setting.options["teacher_net"]
        known = f"torchvision:{name}" if setting.options["reader"] == "imagenet1k" else name
        net.architecture = Architecture(known, {"outputs": int(setting.options["classes"])})  # type: ignore[assignment]
        return net
    if setting.tier == "analytic":
        means, spreads = blobs.world(setting.options)
        return build(Architecture("gaussian-bayes", {"means": means.tolist(), "spreads": spreads.tolist()}), 0).eval()
    blob = digits.TEACHER.read_bytes()
    if setting.teacher is None or sha256(blob) != setting.teacher.sha256:
        raise UserError(f"{digits.TEACHER}: not the teacher the card pins; restore it (git checkout) or reinstall distillbench")
    return rebuild(Student.from_bytes(blob, str(digits.TEACHER)))


def rebuild(student: Student) -> nn.Module:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from distillbench.suites.image_classification.nets import build
    from distillbench.training import student as students

    return students.rebuild(student, build)


def evaluate(
    student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
) -> list[Measurement]:
    """Judge plain weights on a split: top1, nll, ece and agreement with the teacher, with per-example values.

    Raises:
        UserError: the student cannot be rebuilt, or gives NaN.
    """
    import torch
    import torch.nn.functional as F
    from torchmetrics.functional.classification import multiclass_calibration_error

    from distillbench.errors import UserError
    from distillbench.runs.record import Measurement
    from distillbench.suites.image_classification import published

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, teacher = rebuild(student).to(device), _teacher(setting, data).to(device)
    if setting.tier == "paper":
        assert data is not None
        stream = published.evaluation_batches(name, setting, data, split)
    else:
        examples = _splits(setting, seeds["data"])[split]
        stream = iter(zip(examples.inputs.split(512), examples.labels.split(512), strict=True))
    logits, labels, decisions = [], [], []
    with torch.no_grad():
        for inputs, truth in stream:
            logits.append(net(inputs.to(device)).float().cpu())
            decisions.append(teacher(inputs.to(device)).argmax(1).cpu())
            labels.append(truth)
    scores, truths, theirs = torch.cat(logits), torch.cat(labels), torch.cat(decisions)
    if not bool(torch.isfinite(scores).all()):
        raise UserError("the student's logits are not finite on the evaluation split")
    guess = scores.argmax(1)
    ece = multiclass_calibration_error(scores.softmax(1), truths, num_classes=scores.shape[1], n_bins=15)
    return [
        Measurement.mean("top1", (guess == truths).float().tolist()),
        Measurement.mean("nll", F.cross_entropy(scores, truths, reduction="none").tolist()),
        Measurement("ece", float(ece), len(guess)),
        Measurement.mean("agreement", (guess == theirs).float().tolist()),
    ]
