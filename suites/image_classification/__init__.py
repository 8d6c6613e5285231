"""Image classification: the judge (accuracy, likelihood, calibration, agreement) and its four kinds of setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.card import Asset, Budget, Metric, Setting, SuiteCard, Training

if TYPE_CHECKING:
    from bench.problems.classification import Classification
    from bench.record import Measurement
    from bench.student import Student

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
        Metric(name="agreement", unit="fraction", better="higher", range=(0, 1), meaning="share of images on which student and teacher decide alike"),
    ],
    primary="top1",
    controls=["scratch", "pseudo_label", "teacher", "shuffled_teacher"],
    settings={
        "blobs": Setting(
            tier="analytic",
            summary="Overlapping Gaussian classes in 8 dimensions; the teacher is their exact Bayes posterior. 50 labels, 1,000 unlabelled examples.",
            budget=Budget(student_examples=32000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            options={
                "classes": 5, "dimension": 8, "separation": 2.2, "labelled": 50, "train": 1000, "tune": 1000, "test": 4000,
                "student": {"name": "mlp", "arguments": {"inputs": 8, "widths": [32, 32], "outputs": 5}},
            },
        ),
        "digits": Setting(
            tier="embedded",
            summary="Real handwritten digits: 100 labels, 1,197 transfer images, a student of 3.7k parameters, a teacher of 63k.",
            budget=Budget(student_examples=72000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            data=Asset(name="handwritten digits", source="scikit-learn load_digits", licence="CC BY 4.0", sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"),
            teacher=Asset(name="digits CNN", source="suites/image_classification/train_digits_teacher.py", licence="Apache-2.0", sha256="deb7dfa8ac16d4345f78f6d276af0153d08a842d5d3acb19dc0e815ba4d4a394"),
            options={
                "labelled": 100, "transfer": 1197,
                "student": {"name": "small-cnn", "arguments": {"widths": [14, 26], "outputs": 10}},
            },
        ),
        "digits-scarce": Setting(
            tier="embedded",
            summary="The same digits with 200 transfer images: the regime where soft targets beat the teacher's hard decisions.",
            budget=Budget(student_examples=72000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            data=Asset(name="handwritten digits", source="scikit-learn load_digits", licence="CC BY 4.0", sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"),
            teacher=Asset(name="digits CNN", source="suites/image_classification/train_digits_teacher.py", licence="Apache-2.0", sha256="deb7dfa8ac16d4345f78f6d276af0153d08a842d5d3acb19dc0e815ba4d4a394"),
            options={
                "labelled": 100, "transfer": 200,
                "student": {"name": "small-cnn", "arguments": {"widths": [14, 26], "outputs": 10}},
            },
        ),
        "digits-tiny": Setting(
            tier="embedded",
            summary="The same digits with a student of 1.0k parameters: the regime that separates methods most.",
            budget=Budget(student_examples=72000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            data=Asset(name="handwritten digits", source="scikit-learn load_digits", licence="CC BY 4.0", sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"),
            teacher=Asset(name="digits CNN", source="suites/image_classification/train_digits_teacher.py", licence="Apache-2.0", sha256="deb7dfa8ac16d4345f78f6d276af0153d08a842d5d3acb19dc0e815ba4d4a394"),
            options={
                "labelled": 100, "transfer": 1197,
                "student": {"name": "small-cnn", "arguments": {"widths": [7, 12], "outputs": 10}},
            },
        ),
    },
)


@functools.cache
def _splits(setting: str, seed: int, options: str, sha: str | None) -> Any:
    import json

    from suites.image_classification import blobs, digits

    chosen = json.loads(options)
    return blobs.splits(chosen, seed) if setting == "blobs" else digits.splits(chosen, seed, sha)


def _data(name: str, setting: Setting, seed: int) -> Any:
    import json

    return _splits("blobs" if setting.tier == "analytic" else "digits", seed, json.dumps(setting.options, sort_keys=True), setting.data.sha256 if setting.data else None)


def problem(name: str, setting: Setting, seeds: Mapping[str, int], *, data: Path | None = None, cache: Path | None = None) -> Classification:
    """The problem of one setting for one set of seeds.

    Args:
        data: the user's folder of data sets.  cache: where tables of teacher outputs are kept.

    Raises:
        UserError: data or weights are missing, or are not what the card pins.
    """
    import torch

    from bench.data import Arrays, Shuffled
    from bench.nets import Architecture
    from bench.oracle import CHUNK, ClassifierOracle
    from bench.problems.classification import Classification
    from suites.image_classification.nets import build

    splits = _data(name, setting, seeds["data"])
    raw: Arrays = splits["train"]
    about = setting.options["student"]
    architecture = Architecture(about["name"], dict(about["arguments"]))
    teacher = _teacher(setting)
    with torch.no_grad():
        decisions = torch.cat([teacher(rows).argmax(1) for rows in raw.inputs.split(CHUNK)])
    train = Arrays(raw.inputs, torch.where(raw.labelled, raw.labels, decisions), raw.labelled, raw.digest)
    size = setting.training.batch_size
    return Classification(
        setting=name,
        student=build(architecture, seeds["init"]),
        build=lambda a: build(a, seeds["init"]),
        classes=int(architecture.arguments["outputs"]),
        teacher=ClassifierOracle(teacher, train, cache),
        batches=Shuffled(train, torch.arange(len(train)), size, seeds["order"]),
        labelled=Shuffled(train, torch.nonzero(train.labelled).flatten(), size, seeds["order"]),
        tune=splits["tune"],
        train=train,
    )


def _teacher(setting: Setting) -> Any:
    from bench.errors import UserError
    from bench.nets import Architecture
    from bench.record import sha256
    from bench.student import Student
    from suites.image_classification import blobs, digits
    from suites.image_classification.nets import build

    if setting.tier == "analytic":
        means, spreads = blobs.world(setting.options)
        net = build(Architecture("gaussian-bayes", {"means": means.tolist(), "spreads": spreads.tolist()}), 0)
        return net.eval()
    blob = digits.TEACHER.read_bytes()
    if setting.teacher is None or sha256(blob) != setting.teacher.sha256:
        raise UserError(f"{digits.TEACHER}: not the teacher the card pins; restore it (git checkout) or reinstall distillbench")
    return rebuild(Student.from_bytes(blob, str(digits.TEACHER)))


def rebuild(student: Student) -> Any:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from bench.errors import UserError
    from suites.image_classification.nets import build

    net = build(student.architecture, 0)
    try:
        net.load_state_dict(student.weights)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit architecture {student.architecture.name}: {str(error).splitlines()[-1].strip()}") from error
    return net.eval()


def evaluate(student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None) -> list[Measurement]:
    """Judge plain weights on a split: top1, nll, ece and agreement with the teacher, with per-example values.

    Raises:
        UserError: the student cannot be rebuilt, or gives NaN.
    """
    import torch
    import torch.nn.functional as F
    from torchmetrics.functional.classification import multiclass_calibration_error

    from bench.errors import UserError
    from bench.record import Measurement

    examples = _data(name, setting, seeds["data"])[split]
    net, teacher = rebuild(student), _teacher(setting)
    with torch.no_grad():
        logits = torch.cat([net(x) for x in examples.inputs.split(512)])
        decisions = torch.cat([teacher(x).argmax(1) for x in examples.inputs.split(512)])
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the student's logits are not finite on the evaluation split")
    guess = logits.argmax(1)
    ece = multiclass_calibration_error(logits.softmax(1), examples.labels, num_classes=logits.shape[1], n_bins=15)
    return [
        Measurement.mean("top1", (guess == examples.labels).float().tolist()),
        Measurement.mean("nll", F.cross_entropy(logits, examples.labels, reduction="none").tolist()),
        Measurement("ece", float(ece), len(guess)),
        Measurement.mean("agreement", (guess == decisions).float().tolist()),
    ]
