"""The paper settings: data sets streamed from the user's folder, teachers from weights files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import distillbench.suites.image_classification.folders as folders
from distillbench.errors import UserError
from distillbench.identity import derive_seed
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.problems.classification.problem import Classification
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_classification.nets import build
from distillbench.training.data import Batch, Batches, Request, epoch_rows
from distillbench.training.nets import Architecture

HELD_OUT = 10  # with --split tune, every tenth training image (by hash) is kept out of training and judged instead


@dataclass(frozen=True)
class Options:
    """Which data set, and the networks.

    Attributes:
        reader: which of :mod:`folders` reads the data.  workers: decoding processes.  teacher_net: the teacher's name there.
    """

    reader: Literal["cifar100", "imagenet1k"]
    classes: int
    workers: int
    teacher_net: str
    student: Architecture


@dataclass(frozen=True)
class Streamed(Batches[Batch]):
    """Epochs over an augmented view of the rows ``chosen``: pixels are a function of (seed, epoch, row)."""

    view: folders.AugmentedView
    chosen: Tensor
    batch_size: int
    seed: int
    workers: int

    def rows(self, position: int) -> Tensor:
        """Rows of the data set."""
        return self.chosen[epoch_rows(len(self.chosen), self.batch_size, self.seed, position)]

    def take(self, request: Request) -> Batch:
        """One batch, decoded here. Raises UserError for an image that cannot be decoded."""
        return next(_labelled(folders.load(self.view, [self._wanted(request)])))

    def load(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """Batches, decoded ahead. Raises UserError for an image that cannot be decoded."""
        return _labelled(folders.load(self.view, map(self._wanted, requests), self.workers))

    def _wanted(self, request: Request) -> list[tuple[int, int]]:
        epoch = request.position // (len(self.chosen) // self.batch_size)
        return [(epoch, row) for row in request.rows.tolist()]


def _folder(ctx: Context) -> Path:
    if ctx.data is None:
        raise UserError(f"{ctx.name} needs its data set and its teacher: name the folder that holds them with --data DIR")
    return ctx.data


def _dataset(ctx: Context, train: bool) -> folders.LabelledImages:
    options = ctx.options(Options)
    if options.reader == "cifar100":
        return folders.cifar100(_folder(ctx), train, options.classes)
    return folders.imagenet1k(_folder(ctx), "train" if train else "val", options.classes)


def _transform(ctx: Context, train: bool) -> folders.Transform:
    return folders.cifar_transform(train) if ctx.options(Options).reader == "cifar100" else folders.imagenet_transform(train)


def _held_out(count: int) -> Tensor:
    return torch.tensor([derive_seed("held out", i) % HELD_OUT == 0 for i in range(count)])


def _training(ctx: TrainContext) -> tuple[folders.LabelledImages, Tensor]:
    """The training images, and the rows that may be trained on: without the held-out ones where the run is for tuning."""
    dataset = _dataset(ctx, train=True)
    rows = torch.arange(len(dataset))
    return dataset, rows[~_held_out(len(dataset))] if ctx.tuning else rows


def _labelled(loader: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Batch]:
    for inputs, labels, index in loader:
        yield Batch(inputs, labels, index, torch.ones(len(labels), dtype=torch.bool))


def one_pass(ctx: TrainContext, size: int) -> Iterator[Batch]:
    """Every training image once, without augmentation."""
    dataset, rows = _training(ctx)
    view = folders.AugmentedView(dataset, _transform(ctx, False), 0)
    return _labelled(folders.one_pass(view, rows, size, ctx.options(Options).workers))


def training_batches(ctx: TrainContext) -> Streamed:
    """Augmented epochs over the training images."""
    (dataset, rows), seed = _training(ctx), ctx.seeds["order"]
    view = folders.AugmentedView(dataset, _transform(ctx, True), seed)
    return Streamed(view, rows, min(ctx.setting.training.batch_size, len(rows)), seed, ctx.options(Options).workers)


def evaluation_batches(ctx: JudgeContext) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) of the published test split, or of the held-out training images, without augmentation."""
    tuning = ctx.split == "tune"
    dataset = _dataset(ctx, train=tuning)
    rows = torch.arange(len(dataset))
    if tuning:
        rows = rows[_held_out(len(dataset))]
    view = folders.AugmentedView(dataset, _transform(ctx, False), 0)
    for inputs, labels, _ in folders.one_pass(view, rows, 256, ctx.options(Options).workers):
        yield inputs, labels


def teacher(ctx: Context) -> nn.Module:
    """The setting's pretrained teacher."""
    options = ctx.options(Options)
    name, classes = options.teacher_net, options.classes
    if options.reader == "cifar100":
        net, known = folders.cifar_teacher(name, ctx.place("teacher"), classes), name
    else:
        own = any((_folder(ctx) / p).exists() for p in ctx.setting.options["teacher_path"])  # else the library's own weights
        net, known = folders.imagenet_teacher(name, ctx.place("teacher") if own else None, classes), f"torchvision:{name}"
    net.architecture = Architecture(known, {"outputs": classes})  # type: ignore[assignment]
    return net


def problem(ctx: TrainContext) -> Classification:
    """What a method gets: images streamed from disk."""
    architecture, net = ctx.options(Options).student, teacher(ctx)
    batches = training_batches(ctx)
    return Classification(
        setting=ctx.name,
        student=build(architecture, ctx.seeds["init"]),
        build=functools.partial(build, seed=ctx.seeds["init"]),
        classes=int(architecture.arguments["outputs"]),
        teacher=ClassifierOracle(net),
        batches=batches,
        labelled=batches,
        once=functools.partial(one_pass, ctx),
    )
