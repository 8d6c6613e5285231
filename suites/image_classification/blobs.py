"""The analytic setting: Gaussian classes, whose exact Bayes posterior is the teacher."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distillbench.suites.image_classification.memory as memory
from distillbench.identity import derive_seed
from distillbench.problems.classification.problem import Classification
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_classification.nets import build
from distillbench.training.data import Arrays
from distillbench.training.nets import Architecture
from distillbench.training.student import tensor_digest

CLASSES_SEED = 20150309  # draws the classes, which are the same for every run


@dataclass(frozen=True)
class Options:
    """The classes, and how many examples each split has; the first ``labelled`` of ``train`` keep their labels."""

    classes: int
    dimension: int
    separation: float
    labelled: int
    train: int
    tune: int
    test: int
    student: Architecture


def classes(options: Options) -> tuple[Tensor, Tensor]:
    """Means (C, d) and spreads (C,) of N(mean_c, spread_c^2 I)."""
    generator = torch.Generator().manual_seed(CLASSES_SEED)
    means = torch.randn(options.classes, options.dimension, generator=generator)
    spreads = torch.linspace(0.8, 1.6, options.classes)
    return means * options.separation / math.sqrt(options.dimension), spreads


def draw(options: Options, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` examples: inputs (N, d) and classes (N,), equally likely."""
    means, spreads = classes(options)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(means), (count,), generator=generator)
    noise = torch.randn(count, means.shape[1], generator=generator)
    return means[labels] + spreads[labels, None] * noise, labels


def splits(options: Options, seed: int, names: Collection[str] = ("train", "tune", "test")) -> dict[str, Arrays]:
    """Those called ``names``. ``train`` follows the seed of the run's data; ``tune`` and ``test`` are the same for every run."""
    made = {}
    for name, count, s in (
        ("train", options.train, seed),
        ("tune", options.tune, derive_seed("blobs tune", 0)),
        ("test", options.test, derive_seed("blobs test", 0)),
    ):
        if name not in names:
            continue
        inputs, labels = draw(options, count, s)
        labelled = torch.ones(count, dtype=torch.bool)
        if name == "train":
            labelled[options.labelled :] = False
        made[name] = Arrays(inputs, labels, labelled, tensor_digest({"inputs": inputs, "labels": labels}))
    return made


def teacher(ctx: Context) -> nn.Module:
    """The exact posterior."""
    means, spreads = classes(ctx.options(Options))
    return build(Architecture("gaussian-bayes", {"means": means.tolist(), "spreads": spreads.tolist()}), 0).eval()


def problem(ctx: TrainContext) -> Classification:
    """What a method gets."""
    options = ctx.options(Options)
    made = splits(options, ctx.seeds["data"], memory.TUNING if ctx.tuning else memory.TRAINING)
    return memory.problem(ctx, options.student, teacher(ctx), made["train"], made.get("tune"))


def evaluation_batches(ctx: JudgeContext) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples of the split."""
    return memory.batches(splits(ctx.options(Options), ctx.seeds["data"], [ctx.split])[ctx.split])
