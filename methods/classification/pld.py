"""PLD (2025): the teacher's ranking as a Plackett-Luce choice model, weighted by its confidence, with the label ranked first."""

from __future__ import annotations

import math

from torch import Tensor

from distillbench.cards.card import Beats, Card, Paper, Real, Reported
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="pld",
    version=1,
    problem="classification",
    title="Plackett-Luce distillation",
    paper=Paper(
        title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        year=2025,
        arxiv="2506.12542",
        catalogue="pld",
        row=137,
    ),
    objective="pld_loss",
    equations={
        "pld_loss": "L = sum_{k=1..C} a_k [log sum_{l>=k} exp s_{pi_l} - s_{pi_k}],  "
        "pi_1 = y, then by falling teacher logit,  a_k = softmax(t/T)_{pi_k}"
    },
    hyperparameters={"temperature": Real(4.0, gt=0, note="softens the weights alone, never the student; 4 on CIFAR-100, 1 on ImageNet")},
    claims=[
        Beats("kd", metric="top1", source="the paper's tables"),
        Beats("dist", metric="top1", source="the paper's tables"),
        Reported(
            suite="image-classification",
            setting="cifar100",
            metric="top1",
            value=0.7397,
            source="the paper's CIFAR-100 table, ResNet32x4 to ResNet8x4",
            note="mean of 3, standard deviation 0.0005, under its own recipe (AdamW, 250 epochs), where kd has 0.7211",
        ),
        Reported(
            suite="image-classification", setting="cifar100-wrn_40_2-wrn_40_1", metric="top1", value=0.7350, source="the same, sd 0.0030"
        ),
        Reported(
            suite="image-classification", setting="cifar100-resnet56-resnet20", metric="top1", value=0.7028, source="the same, sd 0.0021"
        ),
        Reported(
            suite="image-classification", setting="cifar100-ResNet50-MobileNetV2", metric="top1", value=0.6816, source="the same, sd 0.0038"
        ),
    ],
    deviations=[
        "There is no code by the authors to compare with: what is proven is the paper's equation.",
        "Equal teacher logits keep the order of their classes.",
    ],
    exempt={
        "zero_at_match": "a weighted ranking likelihood and no divergence: student = teacher is not even stationary, which a test shows",
    },
)


def pld_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """sum_k a_k [logsumexp_{l>=k} s_{pi_l} - s_{pi_k}]: choose the label among all, then the teacher's best of the rest, and so on.

    pi ranks the label first and the others by falling teacher logit. a = softmax(t/T) in that order, so the cross-entropy
    with the label, which is the first choice, counts as much as the teacher believes the label, and no further hard-label
    term is added.

    student_logits, teacher_logits: (B, C) float, labels: (B,) int64; returns (B,), nats.
    """
    teacher_logits = teacher_logits.detach()
    order = teacher_logits.scatter(1, labels[:, None], math.inf).argsort(dim=1, descending=True, stable=True)
    weights = (teacher_logits / temperature).softmax(1).gather(1, order)
    ranked = student_logits.gather(1, order)
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)  # over the classes not chosen yet: a sum from each rank to the last
    return (weights * (remaining - ranked)).sum(1)


def distill(problem: Classification, run: Run, *, temperature: float) -> Student:
    """One optimizer, one term: the hard label is in it."""

    def loss(batch: Batch) -> Losses:
        teacher = problem.teacher.logits(batch)
        student = problem.student(batch.inputs)
        return run.loss(batch, pld=pld_loss(student, teacher, batch.labels, temperature=temperature))

    return run.fit(problem.student, loss, problem.batches)
