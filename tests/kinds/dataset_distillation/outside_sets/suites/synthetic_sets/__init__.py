"""Synthetic sets: a few images in place of a thousand, judged by what fresh networks learn from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training
from distillbench.errors import UserError
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, Judgement, Suite, TrainContext
from distillbench.training import student as students
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from distillbench.training.student import Student, tensor_digest
from outside_sets.problem import DatasetDistillation, PerClass, SyntheticSet

CARD = SuiteCard(
    slug="synthetic-sets",
    version=1,
    problem="dataset-distillation",
    title="Synthetic sets",
    metrics=[Metric(name="top1", unit="fraction", better="higher", range=(0, 1), meaning="right answers of networks trained on the set")],
    primary="top1",
    controls=["scratch"],
    settings={
        "digits-1": Setting(
            tier="embedded",
            summary="one 8x8 digit of each class",
            budget=Budget(student_examples=5000),
            training=Training(batch_size=50, optimizer="sgd", learning_rate=0.1, momentum=0.5),
            options={"each": 1, "networks": 3, "steps": 60},
            requires=["sklearn"],
        ),
    },
)
CLASSES = 10


@dataclass(frozen=True)
class Options:
    """``each`` images of a class; ``networks`` that learn from them, for ``steps`` steps."""

    each: int
    networks: int
    steps: int


PARTS = ("train", "tune", "test")


class ConvNet(nn.Module):
    """Two convolutions and a linear layer.   forward: (B, 1, 8, 8) -> (B, 10); :meth:`embed` gives (B, 4 width)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers = [[nn.Conv2d(i, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.AvgPool2d(2)] for i in (1, width)]
        self.body = nn.Sequential(*layers[0], *layers[1], nn.Flatten())
        self.head = nn.Linear(4 * width, CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        """What the last layer sees, (B, 4 width)."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.head(self.embed(images))
        return logits


@functools.cache
def digits(part: str) -> Arrays:
    """Rows of scikit-learn's digits, always the same: 1,197 to train, 300 to tune, 300 to test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split([1197, 300, 300])[PARTS.index(part)]
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    return Arrays(inputs, torch.tensor(labels)[order], torch.ones(len(order), dtype=torch.bool), tensor_digest({"inputs": inputs}))


def build(architecture: Architecture, seed: int) -> nn.Module:
    """A fresh network, or a set of random real images, from ``seed``."""
    net: nn.Module
    if architecture.name == "convnet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = ConvNet(**architecture.arguments)
    elif architecture.name == "synthetic-set":
        batch = next(PerClass(digits("train"), CLASSES, int(architecture.arguments["each"]), seed).stream(0))
        net = SyntheticSet(batch.inputs.clone(), F.one_hot(batch.labels, CLASSES).float())
    else:
        raise UserError(f"unknown architecture {architecture.name!r}")
    net.architecture = architecture  # type: ignore[assignment]
    return net


class SyntheticSets(Suite):
    """Judges a set by what fresh networks learn from it."""

    def problem(self, ctx: TrainContext) -> DatasetDistillation:
        """What a method gets: the real images to train on, and as many of them as it may leave. There is no teacher."""
        options, seeds = ctx.options(Options), ctx.seeds
        student = build(Architecture("synthetic-set", {"each": options.each}), seeds["init"])
        assert isinstance(student, SyntheticSet)
        return DatasetDistillation(
            setting=ctx.name,
            student=student,
            build=functools.partial(build, seed=seeds["init"]),
            classes=CLASSES,
            train=digits("train"),
            batches=PerClass(digits("train"), CLASSES, ctx.setting.training.batch_size // CLASSES, seeds["order"]),
            network=Architecture("convnet"),
        )

    def rebuild(self, student: Student, ctx: Context) -> dict[str, nn.Module]:
        """The networks among a student's parts: none, where it is data."""
        return students.rebuild_parts(student, build)

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """Train several fresh networks on the set, from seeds of the judge's own, and count what they get right of unseen digits."""
        options = ctx.options(Options)
        images, labels = _set(student, options.each)
        known = torch.ones(len(images), dtype=torch.bool)
        data = Arrays(images, labels, known, tensor_digest({"images": images, "labels": labels}))
        training = Training(batch_size=len(images), optimizer="adam", learning_rate=0.01)

        def learn(run: Run) -> Student:
            net = build(Architecture("convnet"), run.seeds["init"])
            batches = Shuffled(data, torch.arange(len(data)), len(data), run.seeds["order"])
            return run.fit(
                net, lambda batch: run.loss(batch, ce=F.cross_entropy(net(batch.inputs), batch.labels, reduction="none")), batches
            )

        unseen = digits("tune" if ctx.split == "tune" else "test")
        right = torch.zeros(len(unseen))
        for i in range(options.networks):
            fitted = ctx.fit(student, "learner", i, learn, examples=options.steps * len(images), training=training)
            net = students.rebuild(fitted, build)
            with torch.no_grad():
                right += net(unseen.inputs).argmax(1) == unseen.labels
        return Judgement([Measurement.mean("top1", (right / options.networks).tolist())])


def _set(student: Student, each: int) -> tuple[Tensor, Tensor]:
    """Images and labels of an exported set. Raises UserError where they are none that this setting allows."""
    tensors = {name: tensor for part in student.parts.values() for name, tensor in part.weights.items()}
    count = CLASSES * each
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"images": (count, 1, 8, 8), "labels": (count, CLASSES)}:
        raise UserError(f"a set of this setting is images {(count, 1, 8, 8)} and labels {(count, CLASSES)}, not {shapes}")
    return tensors["images"], tensors["labels"]


SUITE = SyntheticSets()
