"""Distribution matching: synthetic and real images of a class have the same mean embedding in random networks."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.cards.card import Card, Paper
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run, coupled
from distillbench.training.student import Student
from outside_sets.problem import DatasetDistillation

CARD = Card(
    slug="distribution_matching",
    version=1,
    problem="dataset-distillation",
    title="Distribution matching",
    paper=Paper(title="Dataset Condensation with Distribution Matching", year=2021, arxiv="2110.04844"),
    objective="matching_loss",
    equations={"matching_loss": "sum over classes of || mean of real embeddings - mean of synthetic embeddings ||^2"},
    deviations=["No augmentation: the paper's siamese one is left out."],
    exempt={"micro_batches": "a batch is one whole: classes are compared by their means"},
)


def matching_loss(real_embeddings: Tensor, synthetic_embeddings: Tensor) -> Tensor:
    """Equation 4 of the paper for one network.   (C, M, D), (C, N, D) float: examples of each class; returns (), the sum over classes."""
    return (real_embeddings.mean(1) - synthetic_embeddings.mean(1)).square().sum()


def distill(problem: DatasetDistillation, run: Run) -> Student:
    """A network that nobody has seen or will see again at each step; only the images are learnt."""
    student, classes = problem.student, problem.classes

    def loss(batch: Batch) -> Losses:
        seed = int(torch.randint(2**31, (1,), generator=batch.generator("network")))
        net = problem.build(problem.network, seed=seed).to(run.device).requires_grad_(False)
        real, synthetic = (net.embed(x).unflatten(0, (classes, -1)) for x in (batch.inputs, student.images))  # type: ignore[operator]
        return run.loss(batch, matching=coupled(matching_loss, real, synthetic))

    run.fit(student, loss, problem.batches)
    return run.export(parts=student.parts())
