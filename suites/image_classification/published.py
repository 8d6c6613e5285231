"""The paper settings: data sets streamed from the user's folder, teachers from weights files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distillbench.suites.image_classification.folders as folders
from distillbench.cards.card import Setting
from distillbench.identity import derive_seed
from distillbench.training.data import Batch, Batches, Request, epoch_rows

HELD_OUT = 10  # with --split tune, every tenth training image (by hash) is kept out of training and judged instead


@dataclass(frozen=True)
class Streamed(Batches):
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


def _dataset(name: str, options: dict[str, Any], data: Path, train: bool) -> folders.LabelledImages:
    if options["reader"] == "cifar100":
        return folders.cifar100(data, train, int(options["classes"]))
    return folders.imagenet1k(data, "train" if train else "val", int(options["classes"]))


def _transform(options: dict[str, Any], train: bool) -> folders.Transform:
    return folders.cifar_transform(train) if options["reader"] == "cifar100" else folders.imagenet_transform(train)


def _held_out(count: int) -> Tensor:
    return torch.tensor([derive_seed("held out", i) % HELD_OUT == 0 for i in range(count)])


def _training(name: str, setting: Setting, data: Path, split: str) -> tuple[folders.LabelledImages, Tensor]:
    """The training images, and the rows that may be trained on: without the held-out ones where the run is for tuning."""
    dataset = _dataset(name, setting.options, data, train=True)
    rows = torch.arange(len(dataset))
    return dataset, rows[~_held_out(len(dataset))] if split == "tune" else rows


def _labelled(loader: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Batch]:
    for inputs, labels, index in loader:
        yield Batch(inputs, labels, index, torch.ones(len(labels), dtype=torch.bool))


def one_pass(name: str, setting: Setting, data: Path, split: str, size: int) -> Iterator[Batch]:
    """Every training image once, without augmentation."""
    dataset, rows = _training(name, setting, data, split)
    view = folders.AugmentedView(dataset, _transform(setting.options, False), 0)
    return _labelled(folders.one_pass(view, rows, size, int(setting.options["workers"])))


def training_batches(name: str, setting: Setting, data: Path, seed: int, split: str) -> Streamed:
    """Augmented epochs over the training images."""
    dataset, rows = _training(name, setting, data, split)
    view = folders.AugmentedView(dataset, _transform(setting.options, True), seed)
    return Streamed(view, rows, min(setting.training.batch_size, len(rows)), seed, int(setting.options["workers"]))


def evaluation_batches(name: str, setting: Setting, data: Path, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) of the published test split, or of the held-out training images, without augmentation."""
    dataset = _dataset(name, setting.options, data, train=split == "tune")
    rows = torch.arange(len(dataset))
    if split == "tune":
        rows = rows[_held_out(len(dataset))]
    view = folders.AugmentedView(dataset, _transform(setting.options, False), 0)
    for inputs, labels, _ in folders.one_pass(view, rows, 256, int(setting.options["workers"])):
        yield inputs, labels


def teacher(setting: Setting, data: Path) -> nn.Module:
    """The setting's pretrained teacher."""
    name = str(setting.options["teacher_net"])
    path = data / str(setting.options["teacher_path"][0])
    classes = int(setting.options["classes"])
    if setting.options["reader"] == "cifar100":
        return folders.cifar_teacher(name, path, classes)
    return folders.imagenet_teacher(name, path if path.exists() else None, classes)
