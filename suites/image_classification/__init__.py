"""Image classification: the judge (accuracy, likelihood, calibration, agreement) and its four kinds of setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.assets import Asset
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training, Variant

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
    settings={
        "blobs": Setting(
            tier="analytic",
            summary="Overlapping Gaussian classes in 8 dimensions; their exact Bayes posterior teaches. 50 labels, 1,000 examples.",
            budget=Budget(student_examples=32000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            options={
                "classes": 5,
                "dimension": 8,
                "separation": 2.2,
                "labelled": 50,
                "train": 1000,
                "tune": 1000,
                "test": 4000,
                "student": {"name": "mlp", "arguments": {"inputs": 8, "widths": [32, 32], "outputs": 5}},
            },
        ),
        "digits": Setting(
            tier="embedded",
            summary="Real handwritten digits: 100 labels, 1,197 transfer images, a student of 3.7k parameters, a teacher of 62k.",
            budget=Budget(student_examples=72000),
            training=Training(batch_size=64, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            data=Asset(
                name="handwritten digits",
                source="scikit-learn load_digits",
                licence="CC BY 4.0",
                sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            ),
            teacher=Asset(
                name="digits CNN",
                source="suites/image_classification/train_digits_teacher.py",
                licence="Apache-2.0",
                sha256="deb7dfa8ac16d4345f78f6d276af0153d08a842d5d3acb19dc0e815ba4d4a394",
            ),
            options={
                "labelled": 100,
                "transfer": 1197,
                "student": {"name": "small-cnn", "arguments": {"widths": [14, 26], "outputs": 10}},
            },
        ),
        "cifar100": Setting(
            tier="paper",
            summary="CIFAR-100, ResNet32x4 to ResNet8x4: the 240-epoch protocol of RepDistiller and mdistiller, judged at the last epoch.",
            budget=Budget(student_examples=11996160),
            training=Training(
                batch_size=64,
                optimizer="sgd",
                learning_rate=0.05,
                momentum=0.9,
                weight_decay=0.0005,
                schedule="steps",
                milestones=[0.625, 0.75, 0.875],
            ),
            data=Asset(name="CIFAR-100", source="cs.toronto.edu/~kriz/cifar.html", licence="not stated by its authors"),
            teacher=Asset(
                name="a CIFAR-100 teacher as safetensors",
                source="RepDistiller's checkpoints, converted by distillbench.suites.image_classification.convert",
                licence="BSD-2-Clause",
            ),
            options={
                "reader": "cifar100",
                "classes": 100,
                "workers": 2,
                "data_path": ["cifar100", "cifar-100-python"],
                "teacher_path": ["teachers/resnet32x4.safetensors"],
                "teacher_net": "resnet32x4",
                "student": {"name": "resnet8x4", "arguments": {"outputs": 100}},
            },
        ),
        "imagenet1k": Setting(
            tier="paper",
            summary="ImageNet-1k, ResNet-34 to ResNet-18 with torchvision's weights: 100 epochs, batch 512, in mixed precision.",
            budget=Budget(student_examples=128102400),
            training=Training(
                batch_size=512,
                optimizer="sgd",
                learning_rate=0.2,
                momentum=0.9,
                weight_decay=0.0001,
                schedule="steps",
                milestones=[0.3, 0.6, 0.9],
                precision="bfloat16",
            ),
            data=Asset(name="ImageNet-1k (ILSVRC 2012)", source="image-net.org", licence="ImageNet terms of access"),
            teacher=Asset(name="torchvision ResNet-34", source="torchvision ResNet34_Weights.IMAGENET1K_V1", licence="BSD-3-Clause"),
            options={
                "reader": "imagenet1k",
                "classes": 1000,
                "workers": 8,
                "data_path": ["imagenet"],
                "teacher_path": ["teachers/resnet34.safetensors"],
                "teacher_published": "torchvision:resnet34-b627a593",
                "teacher_net": "resnet34",
                "student": {"name": "torchvision:resnet18", "arguments": {"outputs": 1000}},
            },
        ),
    },
    variants={
        "digits-scarce": Variant(
            of="digits",
            summary="The same digits with 200 transfer images: the regime where soft targets beat the teacher's hard decisions.",
            options={"transfer": 200},
        ),
        "digits-tiny": Variant(
            of="digits",
            summary="The same digits with a student of 1.0k parameters: the regime that separates methods most.",
            options={"student": {"name": "small-cnn", "arguments": {"widths": [7, 12], "outputs": 10}}},
        ),
        "cifar100-resnet56-resnet20": Variant(
            of="cifar100",
            summary="CIFAR-100, resnet56 to resnet20, the same protocol.",
            options={
                "teacher_path": ["teachers/resnet56.safetensors"],
                "teacher_net": "resnet56",
                "student": {"name": "resnet20", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-resnet110-resnet20": Variant(
            of="cifar100",
            summary="CIFAR-100, resnet110 to resnet20, the same protocol.",
            options={
                "teacher_path": ["teachers/resnet110.safetensors"],
                "teacher_net": "resnet110",
                "student": {"name": "resnet20", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-resnet110-resnet32": Variant(
            of="cifar100",
            summary="CIFAR-100, resnet110 to resnet32, the same protocol.",
            options={
                "teacher_path": ["teachers/resnet110.safetensors"],
                "teacher_net": "resnet110",
                "student": {"name": "resnet32", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-wrn_40_2-wrn_16_2": Variant(
            of="cifar100",
            summary="CIFAR-100, wrn_40_2 to wrn_16_2, the same protocol.",
            options={
                "teacher_path": ["teachers/wrn_40_2.safetensors"],
                "teacher_net": "wrn_40_2",
                "student": {"name": "wrn_16_2", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-wrn_40_2-wrn_40_1": Variant(
            of="cifar100",
            summary="CIFAR-100, wrn_40_2 to wrn_40_1, the same protocol.",
            options={
                "teacher_path": ["teachers/wrn_40_2.safetensors"],
                "teacher_net": "wrn_40_2",
                "student": {"name": "wrn_40_1", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-vgg13-vgg8": Variant(
            of="cifar100",
            summary="CIFAR-100, vgg13 to vgg8, the same protocol.",
            options={
                "teacher_path": ["teachers/vgg13.safetensors"],
                "teacher_net": "vgg13",
                "student": {"name": "vgg8", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-vgg13-MobileNetV2": Variant(
            of="cifar100",
            summary="CIFAR-100, vgg13 to MobileNetV2, the same protocol.",
            options={
                "teacher_path": ["teachers/vgg13.safetensors"],
                "teacher_net": "vgg13",
                "student": {"name": "MobileNetV2", "arguments": {"outputs": 100}},
            },
            training={"learning_rate": 0.01},
        ),
        "cifar100-ResNet50-MobileNetV2": Variant(
            of="cifar100",
            summary="CIFAR-100, ResNet50 to MobileNetV2, the same protocol.",
            options={
                "teacher_path": ["teachers/ResNet50.safetensors"],
                "teacher_net": "ResNet50",
                "student": {"name": "MobileNetV2", "arguments": {"outputs": 100}},
            },
            training={"learning_rate": 0.01},
        ),
        "cifar100-ResNet50-vgg8": Variant(
            of="cifar100",
            summary="CIFAR-100, ResNet50 to vgg8, the same protocol.",
            options={
                "teacher_path": ["teachers/ResNet50.safetensors"],
                "teacher_net": "ResNet50",
                "student": {"name": "vgg8", "arguments": {"outputs": 100}},
            },
        ),
        "cifar100-resnet32x4-ShuffleV1": Variant(
            of="cifar100",
            summary="CIFAR-100, resnet32x4 to ShuffleV1, the same protocol.",
            options={
                "teacher_path": ["teachers/resnet32x4.safetensors"],
                "teacher_net": "resnet32x4",
                "student": {"name": "ShuffleV1", "arguments": {"outputs": 100}},
            },
            training={"learning_rate": 0.01},
        ),
        "cifar100-resnet32x4-ShuffleV2": Variant(
            of="cifar100",
            summary="CIFAR-100, resnet32x4 to ShuffleV2, the same protocol.",
            options={
                "teacher_path": ["teachers/resnet32x4.safetensors"],
                "teacher_net": "resnet32x4",
                "student": {"name": "ShuffleV2", "arguments": {"outputs": 100}},
            },
            training={"learning_rate": 0.01},
        ),
        "cifar100-wrn_40_2-ShuffleV1": Variant(
            of="cifar100",
            summary="CIFAR-100, wrn_40_2 to ShuffleV1, the same protocol.",
            options={
                "teacher_path": ["teachers/wrn_40_2.safetensors"],
                "teacher_net": "wrn_40_2",
                "student": {"name": "ShuffleV1", "arguments": {"outputs": 100}},
            },
            training={"learning_rate": 0.01},
        ),
    },
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
