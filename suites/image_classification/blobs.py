"""The analytic setting: Gaussian classes, whose exact Bayes posterior is the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distillbench.identity import derive_seed
from distillbench.training.data import Arrays
from distillbench.training.student import tensor_digest

WORLD = 20150309  # draws the classes; the world is one and the same for every seed


def world(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The classes: means (C, d) and spreads (C,) of N(mean_c, spread_c^2 I)."""
    classes, dimension = int(options["classes"]), int(options["dimension"])
    generator = torch.Generator().manual_seed(WORLD)
    means = torch.randn(classes, dimension, generator=generator)
    spreads = torch.linspace(0.8, 1.6, classes)
    return means * float(options["separation"]) / math.sqrt(dimension), spreads


def draw(options: dict[str, Any], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` examples: inputs (N, d) and classes (N,), equally likely."""
    means, spreads = world(options)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(means), (count,), generator=generator)
    noise = torch.randn(count, means.shape[1], generator=generator)
    return means[labels] + spreads[labels, None] * noise, labels


def splits(options: dict[str, Any], seed: int) -> dict[str, Arrays]:
    """``train`` follows the seed of the run's data; ``tune`` and ``test`` are the same for every run."""
    made = {}
    for name, count, s in (
        ("train", int(options["train"]), seed),
        ("tune", int(options["tune"]), derive_seed("blobs tune", 0)),
        ("test", int(options["test"]), derive_seed("blobs test", 0)),
    ):
        inputs, labels = draw(options, count, s)
        labelled = torch.ones(count, dtype=torch.bool)
        if name == "train":
            labelled[int(options["labelled"]) :] = False
        made[name] = Arrays(inputs, labels, labelled, tensor_digest({"inputs": inputs, "labels": labels}))
    return made
