"""What the settings whose data fit in memory share: the problem, and the examples that are judged."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distillbench.problems.classification.oracle import CHUNK, ClassifierOracle
from distillbench.problems.classification.problem import Classification
from distillbench.runs.suite import TrainContext
from distillbench.suites.image_classification.nets import build
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture

TRAINING = ("train", "tune")  # the splits that a method may see
TUNING = ("train",)  # and those where its student is judged on the one for tuning


def problem(ctx: TrainContext, architecture: Architecture, net: nn.Module, raw: Arrays, tune: Arrays | None) -> Classification:
    """The problem of a student of ``architecture`` under the teacher ``net``, which labels what of ``raw`` has no label."""
    with torch.no_grad():
        decisions = torch.cat([net(rows).argmax(1) for rows in raw.inputs.split(CHUNK)])
    train = Arrays(raw.inputs, torch.where(raw.labelled, raw.labels, decisions), raw.labelled, raw.digest)
    size, order = ctx.setting.training.batch_size, ctx.seeds["order"]
    return Classification(
        setting=ctx.name,
        student=build(architecture, ctx.seeds["init"]),
        build=functools.partial(build, seed=ctx.seeds["init"]),
        classes=int(architecture.arguments["outputs"]),
        teacher=ClassifierOracle(net, train, ctx.cache),
        batches=Shuffled(train, torch.arange(len(train)), size, order),
        labelled=Shuffled(train, torch.nonzero(train.labelled).flatten(), size, order),
        tune=tune,
        train=train,
    )


def batches(examples: Arrays) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples once: inputs (B, ...) and labels (B,)."""
    return iter(zip(examples.inputs.split(512), examples.labels.split(512), strict=True))
