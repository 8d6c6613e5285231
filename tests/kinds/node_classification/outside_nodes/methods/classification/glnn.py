"""GLNN: a network that sees no edges learns a graph network's answers."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Card, Paper, Real
from distillbench.problems.classification.losses import cross_entropy
from distillbench.problems.classification.problem import Classification
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="glnn",
    version=1,
    problem="classification",
    title="Graph-less neural networks",
    paper=Paper(title="Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation", year=2022, arxiv="2110.08727"),
    objective="glnn_loss",
    equations={"glnn_loss": "KL(teacher || student)"},
    hyperparameters={"weight": Real(0.8, ge=0, le=1, note="of the teacher's term; what is left goes to the labels")},
)


def glnn_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student).   (B, C) float each; returns (B,), nats."""
    student, teacher = student_logits.log_softmax(1), teacher_logits.detach().log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1)


def distill(problem: Classification, run: Run, *, weight: float) -> Student:
    """Labels where they were observed, the teacher's answer everywhere."""

    def loss(batch: Batch) -> Losses:
        student = problem.student(batch.inputs)
        ce = batch.labelled * cross_entropy(student, batch.labels)
        return run.loss(batch, ce=(1 - weight) * ce, kd=weight * glnn_loss(student, problem.teacher.logits(batch)))

    return run.fit(problem.student, loss, problem.batches)
